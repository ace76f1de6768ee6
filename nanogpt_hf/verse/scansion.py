"""Scansion: the syllables of a text with their stresses and places, its lines in metre, its rhymes."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from ..common.errors import UserError
from . import english, russian
from .metre import Metre, align, misfits
from .readings import Ending, Language, Reading
from .rhyme import Scheme

LANGUAGES: dict[str, Language] = {"ru": russian, "en": english}
STRESSED = {"+": True, "-": False, "?": None}


@dataclasses.dataclass(frozen=True)
class Form:
    """What a poem is to be.

    language: of `LANGUAGES`.

    Raises UserError for another language.
    """

    language: str = "ru"
    metre: Metre = Metre()
    scheme: Scheme = Scheme()

    def __post_init__(self) -> None:
        if self.language not in LANGUAGES:
            raise UserError(
                f"the language of verse is {self.language!r}: it must be one of {', '.join(LANGUAGES)}."
            )


FORMS = {
    "onegin": Form(),
    "sonnet": Form("en", Metre("iamb", 5, inversion=True, stressed_end=False), Scheme("ABAB CDCD EFEF GG")),
}


class Syllable(NamedTuple):
    """start, end: its span in the line. stressed: None is as the metre wants it. strong: its place in the metre."""

    start: int
    end: int
    stressed: bool | None
    strong: bool
    fits: bool


class Line(NamedTuple):
    """A line of verse. ending: None if it has no syllable."""

    text: str
    syllables: tuple[Syllable, ...]
    in_metre: bool
    ending: Ending | None


class Pair(NamedTuple):
    """Lines that are to rhyme, as indices of the poem's lines; second is None where the stanza has ended before."""

    letter: str
    first: int
    second: int | None
    rhymed: bool


class Poem(NamedTuple):
    """A text read as verse. numbers: which lines of the text its lines of verse are, from 0."""

    lines: tuple[Line, ...]
    numbers: tuple[int, ...]
    pairs: tuple[Pair, ...]

    @property
    def metre_share(self) -> float:
        """Share of the lines that are in metre; 0 without lines."""
        return sum(line.in_metre for line in self.lines) / max(1, len(self.lines))

    @property
    def rhyme_share(self) -> float:
        """Share of the scheme's pairs that rhyme; 0 without pairs."""
        return sum(pair.rhymed for pair in self.pairs) / max(1, len(self.pairs))


def scan(texts: Sequence[str], form: Form) -> list[Poem]:
    """Read texts as verse in a form.

    Lines without letters, and Roman numbers, are no verse: they part stanzas. A line with letters that are not its
    language's, or with digits, is never in metre.

    Raises:
        UserError: the extra `verse` is not installed.
    """
    language = LANGUAGES[form.language]
    # All new words go through the language's model in one call.
    language.readings(word for text in texts for _, word in _words(text, language))
    return [_poem(text, form) for text in texts]


def _letters(language: Language) -> str:
    return language.LETTERS + language.LETTERS.upper()


def _words(text: str, language: Language) -> list[tuple[int, str]]:
    """Where each word of a text begins, and the word in lower case."""
    return [(word.start(), word.group().lower()) for word in re.finditer(f"[{_letters(language)}]+", text)]


def is_verse(line: str) -> bool:
    """Whether a line holds more than signs, digits and a stanza's Roman number."""
    return bool(re.search(r"[^\W\d_IVXLC]", line))


def _poem(text: str, form: Form) -> Poem:
    lines: list[Line] = []
    numbers: list[int] = []
    pairs: list[Pair] = []
    numbered = enumerate(text.split("\n"))
    for of_verse, stanza in itertools.groupby(numbered, lambda line: is_verse(line[1])):
        if of_verse:
            start = len(lines)
            for number, line in stanza:
                lines.append(_line(line, form.language, form.metre))
                numbers.append(number)
            for letter, first, second in form.scheme.pairs(len(lines) - start):
                other = None if second is None else start + second
                rhymed = form.scheme.met(
                    letter, lines[start + first].ending, None if other is None else lines[other].ending
                )
                pairs.append(Pair(letter, start + first, other, rhymed))
    return Poem(tuple(lines), tuple(numbers), tuple(pairs))


@functools.lru_cache(maxsize=1 << 16)
def _line(text: str, language_name: str, metre: Metre) -> Line:
    language = LANGUAGES[language_name]
    found = _words(text, language)
    words = [word for _, word in found]
    known = language.readings(words)
    said, places = _fit([known[word] for word in words], metre)
    marks = "".join(reading.marks for reading in said)
    wrong = misfits(marks, places)
    foreign = re.search(rf"[^\W_{_letters(language)}]", text)
    in_metre = places in metre.patterns and not any(wrong) and not foreign
    spans = [
        (start + begin, start + end)
        for (start, word), reading in zip(found, said, strict=True)
        for begin, end in _syllables(word, len(reading.marks), language)
    ]
    syllables = tuple(
        Syllable(*span, STRESSED[mark], place != "w", not bad)
        for span, mark, place, bad in zip(spans, marks, places, wrong, strict=True)
    )
    if in_metre:
        last = len(places.rstrip("w")) - 1
    else:
        last = max(marks.rfind("+"), marks.rfind("?"), 0)
    return Line(text, syllables, in_metre, _ending(words, said, last, language) if marks else None)


def _fit(words: Sequence[Sequence[Reading]], metre: Metre) -> tuple[list[Reading], str]:
    """The readings of a line's words that fit the metre best, and the places of its syllables."""
    fits = [(said, pattern) for pattern in metre.patterns if (said := align(words, pattern)) is not None]
    if not fits:
        said = [readings[0] for readings in words]
        return said, metre.endless(sum(len(reading.marks) for reading in said))
    return min(fits, key=lambda fit: sum(misfits("".join(reading.marks for reading in fit[0]), fit[1])))


def _ending(words: Sequence[str], said: Sequence[Reading], last: int, language: Language) -> Ending:
    """The ending of a line from its syllable number `last` on."""
    index = 0
    while last >= len(said[index].marks):
        last -= len(said[index].marks)
        index += 1
    return language.ending(words[index:], said[index:], last)


def _syllables(word: str, count: int, language: Language) -> list[tuple[int, int]]:
    """Spans of the syllables in a word's letters: each ends before the consonant that opens the next one."""
    vowels = [vowel.start() for vowel in re.finditer(language.VOWELS, word)]
    if len(vowels) < count:  # English says more than it spells
        cuts = [len(word) * part // count for part in range(1, count)]
    else:
        cuts = [at - bool(re.match(f"(?!{language.VOWELS}|[ьъ])", word[at - 1])) for at in vowels[1:count]]
    return list(itertools.pairwise([0, *cuts, len(word)])) if count else []
