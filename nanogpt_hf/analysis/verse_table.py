"""Texts as verse in one table: metre and rhyme, and whether they were bought by copying or repetition."""

import math
from collections.abc import Sequence

from .. import metrics
from ..metrics.distinct_n import count_ngrams
from ..verse.scansion import Form, Poem, scan

# Of a row -> heading and format, for `table`.
VERSE_COLUMNS = {
    "model": ("", "{}"),
    "poems": ("poems", "{:,}"),
    "metre": ("in metre", "{:.1%}"),
    "rhyme": ("rhymed", "{:.1%}"),
    "rhyme_sounds": ("rhymes that differ", "{:.0%}"),
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
    """A row of the table: shares of all lines that are in metre, of all wanted pairs that rhyme, of the rhymes of a text
    that sound unlike its others, and of the texts that have as many lines as the form.

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
    if shares := [share for poem in poems if (share := _different_rhymes(poem)) is not None]:
        row["rhyme_sounds"] = _mean(shares)
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
    return written | {column: whole[column] for column in ("rhyme", "rhyme_sounds", "whole") if column in whole}


def _different_rhymes(poem: Poem) -> float | None:
    """How many rhymes of a text sound unlike all before them, of those that it has; None for fewer than two."""
    heard: list[frozenset[str]] = []
    for pair in poem.pairs:
        ending = poem.lines[pair.first].ending
        if pair.rhymed and ending is not None:
            heard.append(ending.sounds)
    new = sum(all(map(sounds.isdisjoint, heard[:place])) for place, sounds in enumerate(heard))
    return new / len(heard) if len(heard) > 1 else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
