"""The stanzas of a corpus that have a form, and their first lines, which are what a model is asked to go on with."""

from collections.abc import Sequence
from typing import NamedTuple

from ..common.errors import UserError
from .rewards import scan_lines
from .scansion import Form

HELD_OUT = 10  # every so many-th first line is kept for evaluation
LEAST_PROMPTS = 20


class FirstLines(NamedTuple):
    """First lines to tune on and to evaluate on, and the stanzas that they are of."""

    to_learn: list[str]
    held_out: list[str]
    stanzas: list[str]


def whole_stanzas(documents: Sequence[str], form: Form) -> list[str]:
    """Stanzas, between blank lines, of as many lines as the form's scheme: real poems for a row of their own."""
    stanzas = (stanza.strip() for document in documents for stanza in document.split("\n\n"))
    return [stanza for stanza in stanzas if stanza.count("\n") + 1 == len(form.scheme.stanza)]


def prompt_of(first_line: str) -> str:
    """What a model is given to go on with: the line begins a stanza."""
    return f"\n\n{first_line}\n"


def first_lines(documents: Sequence[str], name: str, form: Form) -> FirstLines:
    """Of the stanzas in the form, of which at least half the pairs rhyme.

    Args:
        name: of the corpus, for the error.

    Raises:
        UserError: there are too few.
    """
    stanzas = whole_stanzas(documents, form)
    scanned = scan_lines(stanzas, form)
    stanzas = [stanza for stanza, lines in zip(stanzas, scanned, strict=True) if lines.rhyme.mean() >= 0.25]
    if len(stanzas) < LEAST_PROMPTS:
        raise UserError(
            f"{name} holds {len(stanzas)} stanzas of {form.scheme.letters}, and their first lines are the prompts: give "
            f"a corpus with {LEAST_PROMPTS} or more, or another form."
        )
    lines = [stanza.partition("\n")[0].strip() for stanza in stanzas]
    held_out = lines[HELD_OUT - 1 :: HELD_OUT]
    return FirstLines([line for line in lines if line not in held_out], held_out, stanzas)
