"""Surprisal: what each token of a text costs a model, -log2 of its probability, and a page that shows it."""

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import regex
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..data.token_stream import TokenStream
from ..data.tokenization import encode_with_spans
from ..training.evaluation import token_losses
from .html_page import escaped, whole_page

ALTERNATIVES = 5
WINDOWS_AT_ONCE = 64

# The colour is mixed with what lies behind it, so that the text keeps its own by day and by night.
STYLE = """
.surprisal { --hot: light-dark(#f0673c, #b8360f); }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem 2rem; }
.panels h2 { overflow-wrap: anywhere; }
.surprisal { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7; margin: 0.75rem 0; unicode-bidi: plaintext;
  font-family: ui-monospace, "DejaVu Sans Mono", "Noto Sans Mono", monospace; font-size: 0.95rem; }
.surprisal span, .scale span { background: color-mix(in srgb, var(--hot) calc(var(--s) * 85%), transparent); }
.surprisal .given { color: color-mix(in srgb, currentColor 55%, transparent); }
.surprisal i { font-style: normal; opacity: 0.4; }
/* Under the mouse; where there is none, what was touched. */
.surprisal span:hover, .surprisal:not(:has(span:hover)) span:focus { outline: 2px solid currentColor; }
.surprisal span:hover::after, .surprisal:not(:has(span:hover)) span:focus::after { content: attr(data-tip); position: fixed; z-index: 99; left: 0; right: 0; bottom: 0;
  padding: 0.6rem 1.5rem; background: #22201c; color: #f7f3ea; white-space: pre-wrap; font-size: 0.95rem; line-height: 1.5; }
.scale { display: flex; max-width: 24rem; margin: 0.5rem 0 0; font-size: 0.85rem; gap: 0.75rem; align-items: center; }
.scale b { flex: 1; display: flex; }
.scale span { flex: 1; height: 0.9rem; }
"""


@dataclass(frozen=True)
class Cell:
    """Characters that are coloured as one: a token's, or those of tokens that spell what is read as one together.

    Attributes:
        start: of the text; `end` is past the last.
        bits: what the model paid for them; NaN where they were given and not predicted.
        alternatives: what was likeliest in their place, with its probability.
    """

    start: int
    end: int
    bits: float
    alternatives: tuple[tuple[str, float], ...] = ()


def surprisal(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    start: int,
    context: int,
    alternatives: int = 0,
) -> list[Cell]:
    """What text[start:] costs a model, token by token; the places of the cells count from `start`.

    Every token is predicted from at least half the context, where the text has so much. What begins the text is
    given, not predicted.

    Args:
        context: tokens that the model may see at once.
        alternatives: how many of the likeliest tokens to name in each place.
    """
    begin = max(0, start - 10 * context)  # no tokenizer has 10 characters a token
    ids, spans = encode_with_spans(tokenizer, text[begin:])
    spans = [(left + begin, right + begin) for left, right in spans]
    first = max(0, next((n for n, (_, right) in enumerate(spans) if right > start), 0) - context)
    ids, spans = ids[first:], spans[first:]
    bits = np.full(len(ids), math.nan)
    likeliest: list[tuple[tuple[str, float], ...]] = [()] * len(ids)
    if len(ids) > 1:
        stream = TokenStream(ids, min(context, len(ids) - 1), model.device)
        losses = token_losses(
            model, stream, WINDOWS_AT_ONCE, max(1, stream.block_size // 2), likeliest=alternatives
        )
        bits[1:] = losses.nats / math.log(2)
        likeliest[1:] = [
            tuple((_named(tokenizer, id), float(p)) for id, p in zip(*place, strict=True))
            for place in zip(losses.likeliest.tolist(), losses.probabilities, strict=True)
        ]
    cells = [
        Cell(shown - start, right - start, float(cost) * (right - shown) / (right - left), best)
        for (left, right), cost, best in zip(spans, bits, likeliest, strict=True)
        if right > (shown := max(left, start))
    ]
    # A letter with its accents, or an emoji of several signs, is drawn as one only within one element.
    return _merged(cells, {found.end() for found in regex.finditer(r"\X", text[start:])})


def _named(tokenizer: PreTrainedTokenizerFast, id: int) -> str:
    """A token as the text that it stands for, or by its own name where it is a piece of a character."""
    text = tokenizer.backend_tokenizer.decode([id], skip_special_tokens=False)
    piece = not text or "\ufffd" in text
    return str(tokenizer.convert_ids_to_tokens(id)) if piece else text


def _merged(cells: Sequence[Cell], ends: Container[int]) -> list[Cell]:
    """Cells that do not overlap and end at one of these places, made of as many of the given ones as that takes."""
    merged: list[Cell] = []
    for cell in cells:
        if merged and (cell.start < merged[-1].end or merged[-1].end not in ends):
            before = merged.pop()
            bits = [cost for cost in (before.bits, cell.bits) if not math.isnan(cost)]
            alternatives = before.alternatives or cell.alternatives
            cell = Cell(
                before.start, max(before.end, cell.end), sum(bits) if bits else math.nan, alternatives
            )
        merged.append(cell)
    return merged


def bits_of_characters(cells: Sequence[Cell]) -> np.ndarray:
    """The bits of every character: those of a cell spread evenly over its characters."""
    bits = [np.full(cell.end - cell.start, cell.bits / (cell.end - cell.start)) for cell in cells]
    return np.concatenate([*bits, np.zeros(0)])


def mean_words(cells: Sequence[Cell]) -> str:
    """What the text costs, in words."""
    bits = bits_of_characters(cells)
    known = bits[np.isfinite(bits)]
    return f"{known.mean():.2f} bits per character here" if len(known) else "nothing to predict"


def scale_of(panels: Sequence[Sequence[Cell]]) -> float:
    """Bits of a character that have the strongest colour: of the best model, or a hopeless one would wash it out."""
    known = [bits[np.isfinite(bits)] for bits in map(bits_of_characters, panels)]
    means = [(bits.mean(), math.ceil(np.percentile(bits, 98))) for bits in known if len(bits)]
    return float(max(1, min(means)[1])) if means else 1.0


def coloured(text: str, cells: Sequence[Cell], scale: float) -> str:
    """The text in HTML, each cell in the colour of its bits a character; what was likely shows under the mouse.

    Args:
        scale: bits a character that have the strongest colour.
    """
    spans = "".join(_span(text[cell.start : cell.end], cell, scale) for cell in cells)
    return f'<div class="surprisal" dir="auto">{spans}</div>'


def _span(text: str, cell: Cell, scale: float) -> str:
    shown = escaped(text).replace("\n", "<i>↵</i>\n")
    if math.isnan(cell.bits):
        return f'<span class="given" style="--s:0" data-tip="given, not predicted">{shown}</span>'
    share = min(1.0, cell.bits / len(text) / scale)
    tip = escaped("\n".join(_tip(text, cell))).replace("\n", "&#10;")
    return f'<span tabindex="-1" style="--s:{share:.2f}" data-tip="{tip}">{shown}</span>'


def _tip(text: str, cell: Cell) -> Iterator[str]:
    yield f"{_visible(text)}   {cell.bits:.1f} bits, probability {_percent(2**-cell.bits)}"
    if cell.alternatives:
        yield "likeliest: " + "   ".join(f"{_visible(word)} {_percent(p)}" for word, p in cell.alternatives)


def _visible(text: str) -> str:
    return text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣")


def _percent(probability: float) -> str:
    return f"{100 * probability:.3g}%"


def legend(scale: float) -> str:
    """What the colours say, in HTML."""
    steps = "".join(f'<span style="--s:{step / 9:.2f}"></span>' for step in range(10))
    return (
        f'<div class="scale surprisal">0<b>{steps}</b>{scale:g} bits per character</div>\n'
        "<p>Surprisal is −log₂ of the probability that a model gave to what came; a token's is spread evenly over its "
        "characters. Point at one to see what was likelier.</p>"
    )


def surprisal_page(title: str, passage: str, panels: Mapping[str, Sequence[Cell]]) -> str:
    """A page in HTML with the passage once a model, all on one scale.

    Args:
        panels: name of a model -> the cells of the passage.
    """
    scale, parts = scale_of([*panels.values()]), []
    for name, cells in panels.items():
        words = f"<h2>{escaped(name)}</h2>\n<p>{mean_words(cells)}</p>"
        parts.append(f"<section>{words}\n{coloured(passage, cells, scale)}</section>")
    body = f'{legend(scale)}\n<div class="panels">\n' + "\n".join(parts) + "\n</div>"
    return whole_page(title, body, STYLE)
