"""Texts as verse in one table: metre and rhyme, and whether they were bought by copying or repetition."""

import math
from collections.abc import Sequence

from .. import metrics
from ..metrics.distinct_n import count_ngrams
from ..verse.scansion import Form, scan

# Of a row -> heading and format, for `table`.
VERSE_COLUMNS = {
    "model": ("", "{}"),
    "poems": ("poems", "{:,}"),
    "metre": ("in metre", "{:.1%}"),
    "rhyme": ("rhymed", "{:.1%}"),
    "bits_per_byte": ("bits/byte", "{:.4f}"),
    "longest_overlap": ("longest copy, chars", "{:,}"),
    "distinct_n": ("distinct word pairs", "{:.1%}"),
    "whole": ("with all lines", "{:.1%}"),
    "lines": ("lines a poem", "{:.1f}"),
    "characters": ("chars a poem", "{:.0f}"),
}


def measure_verse(
    name: str, texts: Sequence[str], form: Form, training_texts: Sequence[str] = ()
) -> dict[str, str | int | float]:
    """A row of the table: shares of all lines that are in metre, of all wanted pairs that rhyme, and of the texts that have
    as many lines as the form.

    training_texts: to look for copies in; without them, as for poems that are training text, the cell stays empty.
    Distinct pairs of words fall with the length of all texts: compare rows of as many poems (Li et al. 2016).
    """
    poems = scan(texts, form)
    lines = [line.in_metre for poem in poems for line in poem.lines]
    pairs = [pair.rhymed for poem in poems for pair in poem.pairs]
    row: dict[str, str | int | float] = {
        "model": name,
        "poems": len(texts),
        "metre": _mean(lines),
        "rhyme": _mean(pairs),
        "whole": _mean([len(poem.lines) == len(form.scheme.stanza) for poem in poems]),
        "lines": len(lines) / max(1, len(texts)),
        "characters": _mean([len(text) for text in texts]),
    }
    if any(training_texts):
        copied = metrics.load("memorization").compute(predictions=texts, references=training_texts)
        row["longest_overlap"] = copied["longest_overlap"]
    distinct, total = count_ngrams(texts)
    if total:
        row["distinct_n"] = distinct / total
    return row


def measure_written(
    name: str, texts: Sequence[str], form: Form, training_texts: Sequence[str] = ()
) -> dict[str, str | int | float]:
    """A row of the table for texts whose first line was given: that line counts for rhyme and number alone."""
    written = measure_verse(name, [text.partition("\n")[2] for text in texts], form, training_texts)
    whole = measure_verse(name, texts, form)
    return written | {"rhyme": whole["rhyme"], "whole": whole["whole"]}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
