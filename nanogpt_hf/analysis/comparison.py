"""Models side by side on one corpus: a table in units that compare, and a page that shows what surprises them."""

import math
import os
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from .. import metrics
from ..common.errors import UserError
from ..data.corpora import Corpus
from ..data.token_stream import TokenStream
from ..data.tokenization import encode_with_spans
from ..generation.text import stream_text
from ..training.evaluation import evaluate_split, token_losses, validation_stream

LONGEST_CONTEXT = 2048  # tokens, unless more is asked for: the attention of newer models' own would not fit
WINDOWS_AT_ONCE = 64

# Of results.json -> heading and format in the table.
COLUMNS = {
    "model": ("model", "{}"),
    "parameters": ("parameters", "{:,}"),
    "vocabulary": ("vocabulary", "{:,}"),
    "context": ("context", "{:,}"),
    "tokens": ("tokens", "{:,}"),
    "loss": ("nats/token", "{:.4f}"),
    "bits_per_byte": ("bits/byte", "{:.4f}"),
    "bits_per_character": ("bits/char", "{:.4f}"),
    "perplexity": ("perplexity/token", "{:.2f}"),
    "perplexity_per_character": ("perplexity/char", "{:.3f}"),
    "longest_overlap": ("longest copy, chars", "{:,}"),
    "memorized_share": ("copied 20-char windows", "{:.1%}"),
    "distinct_n": ("distinct word pairs", "{:.1%}"),
}


def short_names(names: Sequence[str]) -> list[str]:
    """What to call models by: a Hub id as it is, a folder by its last parts, as few as tell it from the others.

    A whole path would give away where its user keeps things.
    """
    parts = [Path(os.path.abspath(name)).parts[1:] if os.path.isdir(name) else (name,) for name in names]
    for count in range(1, max(map(len, parts)) + 1):
        short = ["/".join(part[-count:]) for part in parts]
        if len(set(short)) == len(set(parts)):
            break
    return short


def context_of(model: PreTrainedModel, wanted: int | None) -> int:
    """Tokens that a model is to see at once: those asked for, or its own context, but not above 2,048.

    Raises:
        UserError: more is asked for than the model has.
    """
    own = getattr(model.config, "max_position_embeddings", None) or LONGEST_CONTEXT
    if wanted is not None and wanted > own:
        raise UserError(f"--n_positions is {wanted}, more than the model's context of {own} tokens.")
    return wanted or min(own, LONGEST_CONTEXT)


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Corpus,
    accelerator: Accelerator,
    n_positions: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
) -> dict[str, int | float]:
    """Size of a model, and its loss over the whole validation split in every unit. Every process calls it.

    The first token is predicted from the end of a text before it, as in lm-eval: what is given is not paid for.

    Raises:
        UserError: the model's context is shorter than n_positions or stride, or there is nothing to predict.
    """
    context = context_of(model, n_positions)
    if stride is not None and stride > context:
        raise UserError(
            f"--stride is {stride}, more than the context of {context}: tokens would be left out."
        )
    stream = validation_stream(tokenizer, corpus, context, accelerator.device, begun=True)
    split = evaluate_split(
        model,
        stream,
        corpus.characters("validation"),
        batch_size or WINDOWS_AT_ONCE,
        accelerator,
        min(stride or context, stream.block_size),
    )
    likelihoods = {"predictions": [split.nats], "references": ["".join(corpus.validation)]}
    return {
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "context": context,
        "stride": stride or context,
        "tokens": split.tokens,
        "loss": split.loss,
        **metrics.load("bits_per_byte").compute(**likelihoods),
        **metrics.load("bits_per_character").compute(**likelihoods),
        **metrics.load("perplexity").compute(**likelihoods, token_counts=[split.tokens]),
    }


def sample_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, count: int, length: int, **sampling
) -> list[str]:
    """Continuations of a newline, each of `length` characters, or fewer where a text ends by itself.

    Args:
        sampling: temperature, top_k, top_p and seed of `generate_ids`.
    """
    texts = [""] * count
    options = {"num_return_sequences": count, "max_new_tokens": length}
    for pieces in stream_text(model, tokenizer, "\n", **options, **sampling):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        if min(map(len, texts)) >= length:
            break
    return [text[:length] for text in texts]


def measure_samples(texts: Sequence[str], corpus: Corpus) -> dict[str, int | float | str | None]:
    """What of a model's samples is copied from the training split, and how varied they are."""
    copied = metrics.load("memorization").compute(predictions=list(texts), references=corpus.train)
    try:
        varied = metrics.load("distinct_n").compute(predictions=list(texts), n=2)
    except ValueError:  # no sample has two words
        varied = {"distinct_n": math.nan}
    return copied | varied


def table(rows: Sequence[Mapping], columns: Mapping[str, tuple[str, str]] = COLUMNS) -> str:
    """The rows in Markdown, with the columns that any of them has, padded to be read as it is.

    Args:
        columns: key of a row -> heading and format. The first is aligned to the left.
    """
    keys = [key for key in columns if any(key in row for row in rows)]
    cells = [[columns[key][0] for key in keys]]
    for row in rows:
        cells.append([columns[key][1].format(row[key]) if key in row else "" for key in keys])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        [
            cell.ljust(width) if key == keys[0] else cell.rjust(width)
            for key, cell, width in zip(keys, line, widths, strict=True)
        ]
        for line in (cells[0], rule, *cells[1:])
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# --- the page ---


def choose_passage(documents: Sequence[str], start: int, length: int) -> tuple[str, int]:
    """A document up to the end of the passage to show, and where in it the passage begins: whole lines, if any.

    Args:
        start: characters into the longest document, or fewer where it is shorter.
        length: characters of the passage, at most.
    """
    document = max(documents, key=len)
    start = max(0, min(start, len(document) - length))
    if start:
        line = document.find("\n", start - 1) + 1
        start = line if 0 < line < start + length // 2 else start
    end = min(start + length, len(document))
    line = document.rfind("\n", start, end) + 1
    end = line if line > start + length // 2 else end
    return document[:end], start


def surprise(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, text: str, start: int, context: int
) -> np.ndarray:
    """Bits that every character of text[start:] costs; a token's are spread evenly over its characters.

    Every token is predicted from at least half the context, where the text has so much. What begins the text is
    given, not predicted: NaN.
    """
    begin = max(0, start - 10 * context)  # no tokenizer has 10 characters a token
    ids, spans = encode_with_spans(tokenizer, text[begin:])
    spans = np.array(spans) + begin
    first = max(0, int(np.argmax(spans[:, 1] > start)) - context)
    ids, spans = ids[first:], spans[first:]
    bits = np.zeros(len(text))
    bits[: spans[0][1]] = math.nan
    if len(ids) > 1:
        stream = TokenStream(ids, min(context, len(ids) - 1), model.device)
        nats = token_losses(model, stream, WINDOWS_AT_ONCE, max(1, stream.block_size // 2))
        for (left, right), value in zip(spans[1:], nats / math.log(2), strict=True):
            bits[left:right] += value / (right - left)
    return bits[start:]


def _positions(text: str, width: int) -> np.ndarray:
    """Line and column of every character, with lines wrapped between words."""
    places, line, column = [], 0, 0
    for word in re.findall(r"[^\s]+[^\S\n]?|\s", text):
        if column and column + len(word.rstrip()) > width:
            line, column = line + 1, 0
        for character in word:
            if column >= width + character.isspace():
                line, column = line + 1, 0
            places.append((line, column))
            line, column = (line + 1, 0) if character == "\n" else (line, column + 1)
    return np.array(places)


def _glyph(character: str) -> str:
    if character == "\n":
        return "↵"
    if unicodedata.combining(character):
        return "◌" + character
    return character if character.isprintable() or character.isspace() else "\N{REPLACEMENT CHARACTER}"


def draw_surprise(
    path: Path, title: str, passage: str, panels: Mapping[str, np.ndarray], width: int = 64
) -> None:
    """A page with the passage once a model, every character on the colour of its surprise, on one scale.

    Args:
        panels: name of a model -> bits of every character of the passage, NaN for none.
        width: characters a line, at most.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    font = {"family": ["DejaVu Sans Mono", "DejaVu Sans"], "size": 10}
    cell_width, cell_height = 0.0836, 0.205  # inches; the first is the advance of the font
    places = _positions(passage, width)
    n_lines, n_columns = places.max(axis=0) + 1
    across = 2 if len(panels) == 4 else min(3, len(panels))
    down = -(-len(panels) // across)
    panel_width = max(28, n_columns, *map(len, panels)) * cell_width
    panel_height = n_lines * cell_height
    gap, above, below = 0.35, 0.65, 0.75  # above: the title; every panel has a heading as high as that
    title_width = 0.105 * len(title)
    size = (
        gap + max(5, title_width, across * (panel_width + gap)),
        above + down * (above + panel_height) + below,
    )
    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)
    figure.text(gap / size[0], 1 - 0.4 / size[1], title, fontsize=12, weight="bold")

    colours = colormaps["YlOrRd"].with_extremes(bad="#dddddd")
    # The best model's range: a hopeless one would wash all others out.
    best = min(panels.values(), key=lambda bits: np.nanmean(bits) if np.isfinite(bits).any() else math.inf)
    top = math.ceil(np.nanpercentile(best, 98)) if np.isfinite(best).any() else 1
    scale = Normalize(0, max(1, top))
    for number, (name, bits) in enumerate(panels.items()):
        left = gap + number % across * (panel_width + gap)
        top = above + number // across * (above + panel_height) + above
        axes = figure.add_axes(
            (
                left / size[0],
                1 - (top + panel_height) / size[1],
                panel_width / size[0],
                panel_height / size[1],
            )
        )
        axes.set(xlim=(0, panel_width / cell_width), ylim=(n_lines, 0))
        axes.axis("off")
        cells = np.full((n_lines, n_columns, 4), 1.0)
        cells[places[:, 0], places[:, 1]] = colours(scale(np.ma.masked_invalid(bits)))
        axes.imshow(cells, extent=(0, n_columns, n_lines, 0), aspect="auto", interpolation="nearest")
        mean = (
            f"{np.nanmean(bits):.2f} bits a character here"
            if np.isfinite(bits).any()
            else "nothing to predict"
        )
        axes.text(0, -1.35, name, fontsize=10, weight="bold")
        axes.text(0, -0.4, mean, fontsize=9)
        for character, (line, column), colour in zip(passage, places, cells[*places.T], strict=True):
            if not character.isspace() or character == "\n":
                ink = "white" if colour[:3] @ (0.299, 0.587, 0.114) < 0.5 else "black"
                faint = 0.35 if character == "\n" else 1
                axes.text(
                    column + 0.5, line + 0.74, _glyph(character), color=ink, alpha=faint, ha="center", **font
                )

    bar_width = min(5, size[0] - 2 * gap)
    bar = figure.add_axes((gap / size[0], 0.5 / size[1], bar_width / size[0], 0.14 / size[1]))
    figure.colorbar(ScalarMappable(scale, colours), cax=bar, orientation="horizontal", extend="max")
    bar.tick_params(labelsize=8)
    bar.set_xlabel(
        "surprise of a character in bits; a token's is spread evenly over its characters", fontsize=8
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a box stands for what the fonts lack
        figure.savefig(path, dpi=150, format="png")
