"""Models side by side on one corpus, in units that compare."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from .. import metrics
from ..common.errors import UserError
from ..data.corpora import AnyCorpus
from ..generation.text import stream_text
from ..model.loading import context_length
from ..training.evaluation import evaluate_split, validation_stream

LONGEST_CONTEXT = 2048  # tokens, unless more is asked for: the attention of newer models' own would not fit
WINDOWS_AT_ONCE = 64

# Of results.json -> heading and format in the tables. What else is measured stands in results.json alone.
COLUMNS = {
    "model": ("model", "{}"),
    "parameters": ("parameters", "{:,}"),
    "context": ("context", "{:,}"),
    "loss": ("nats/token", "{:.4f}"),
    "bits_per_byte": ("bits/byte", "{:.4f}"),
    "bits_per_character": ("bits/char", "{:.4f}"),
}
SAMPLE_COLUMNS = {
    "model": ("model", "{}"),
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
    own = context_length(model)
    if wanted is not None and wanted > own:
        raise UserError(f"--n_positions is {wanted}, more than the model's context of {own} tokens.")
    return wanted or min(own, LONGEST_CONTEXT)


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    corpus: AnyCorpus,
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
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, count: int, length: int, **sampling: Any
) -> list[str]:
    """Continuations of a newline, each of `length` characters, or fewer where a text ends by itself.

    Args:
        sampling: temperature, top_k, top_p and seed of `generate_ids`.
    """
    texts = [""] * count
    stream = stream_text(
        model, tokenizer, "\n", num_return_sequences=count, max_new_tokens=length, **sampling
    )
    for pieces in stream:
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        if min(map(len, texts)) >= length:
            break
    return [text[:length] for text in texts]


def measure_samples(texts: Sequence[str], corpus: AnyCorpus) -> dict[str, int | float | str | None]:
    """What of a model's samples is copied from the training split, where there is one, and how varied they are."""
    copied = {}
    if corpus.train:
        copied = metrics.load("memorization").compute(predictions=list(texts), references=corpus.train)
    try:
        varied = metrics.load("distinct_n").compute(predictions=list(texts), n=2)
    except ValueError:  # no sample has two words
        varied = {"distinct_n": math.nan}
    return copied | varied


def percentage_held_out(model: str, corpus: AnyCorpus) -> int | None:
    """How much of this very corpus was held out when a model was trained on it; None where that is not known."""
    try:
        run = yaml.safe_load(Path(model, "run.yaml").read_text(encoding="utf-8"))
        same = run["record"]["corpus"]["sha256"] == corpus.sha256
        return int(run["validation_split_percentage"]) if same else None
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


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
