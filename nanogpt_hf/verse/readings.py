"""How a word may be read: what the rooms of the languages hand to metre and rhyme."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol


class Reading(NamedTuple):
    """One way to say a word.

    marks: a character for each syllable: "+" stressed, "-" not, "?" either, as the metre wants it.
    sound: what its language needs to find a rhyme: the letters with ё restored, or phones.
    """

    marks: str
    sound: str


class Ending(NamedTuple):
    """The end of a line as the ear compares it.

    words: those that it spans, in lower case: the same words again are no rhyme.
    sounds: the ways to hear it from its last stressed vowel on, with all that a rhyme needs; one is enough.
    tail: syllables after that vowel: 0 in a masculine, 1 in a feminine ending.
    """

    words: tuple[str, ...]
    sounds: frozenset[str]
    tail: int


class Language(Protocol):
    """What the module of a language offers; words are in lower case."""

    LETTERS: str  # of words, as within the brackets of a regular expression
    VOWELS: str  # a regular expression for the vowel of a syllable, as it is spelt

    def readings(self, words: Iterable[str]) -> Mapping[str, Sequence[Reading]]:
        """The readings of these words (and others), the likeliest first; none for a word without a syllable."""

    def ending(self, words: Sequence[str], said: Sequence[Reading], stressed: int) -> Ending:
        """The ending of a line from its last stressed syllable: number `stressed` of the first of these words."""
