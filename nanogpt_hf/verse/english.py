"""English words: stress and sounds of the CMU Pronouncing Dictionary, by way of `pronouncing`."""

import re
from collections.abc import Iterable, Mapping, Sequence

from ..common.errors import UserError
from .readings import Ending, Reading

LETTERS = "a-z'’"
VOWELS = "[aeiouy]+"
MARKS = {"0": "-", "1": "+", "2": "?"}  # a secondary stress stands in either place

_known: dict[str, tuple[Reading, ...]] = {}


def _phones(word: str) -> list[str]:
    """What the dictionary has for a word; "bless'd" is the shortest of what it has for "blessed".

    Raises:
        UserError: the extra `verse` is not installed.
    """
    try:
        import pronouncing
    except ModuleNotFoundError as error:
        raise UserError("English verse needs pronouncing: pip install 'nanogpt_hf[verse]'.") from error
    found = pronouncing.phones_for_word(word)
    if not found and word.endswith("'d"):
        found = sorted(pronouncing.phones_for_word(word[:-2] + "ed"), key=pronouncing.syllable_count)[:1]
    return found


def _reading(phones: str) -> Reading:
    marks = "".join(MARKS[digit] for digit in re.findall(r"\d", phones))
    return Reading("?" if len(marks) == 1 else marks, phones)


def _guessed(word: str) -> Reading:
    """A word of no dictionary: its groups of vowels, but for a silent last e, are syllables of any stress."""
    groups = re.findall(VOWELS, re.sub("(?<=[^aeiouyl])e$", "", word.replace("'", "")))
    return Reading("?" * len(groups), word)


def readings(words: Iterable[str]) -> Mapping[str, tuple[Reading, ...]]:
    """The readings of words in lower case, each with another number of syllables or another stress."""
    for word in {word for word in words if word not in _known}:
        plain = word.replace("’", "'").strip("'")
        _known[word] = tuple(map(_reading, _phones(plain))) or (_guessed(plain),)
    return _known


def ending(words: Sequence[str], said: Sequence[Reading], stressed: int) -> Ending:
    """The ending of a line from its last stressed syllable: number `stressed` of the first of these words.

    A word of no dictionary sounds like its letters.
    """
    first, *others = (reading.sound for reading in said)
    vowels = [vowel.start() for vowel in re.finditer(rf"[A-Z]+\d|{VOWELS}", first)]
    sounds = " ".join((first[vowels[stressed] :], *others))
    tail = sum(len(reading.marks) for reading in said) - stressed - 1
    return Ending(tuple(words), frozenset([re.sub(r"\d", "", sounds)]), tail)
