"""Drills in rhyme: real stanzas in which the words of each rhyme are exchanged for those of another one.

Neither the sense of such a stanza nor what is known of it by heart tells the word that answers: only the sound that was
asked does, and so this is what is learnt. A new word has as many syllables before and after its stress as the one in
whose place it stands, which keeps the line in metre.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import accumulate
from random import Random
from typing import NamedTuple

from ..common.errors import UserError
from .scansion import LANGUAGES, Form, Line, scan

Shape = tuple[int, int]  # of a word: its syllables before its stress, and after it


class Drill(NamedTuple):
    """A stanza, and which of its lines, from 0, end in a word that answers."""

    text: str
    answers: list[int]


class Place(NamedTuple):
    """Of the last word in a line: the line's number, its span there, its shape."""

    line: int
    start: int
    end: int
    shape: Shape


class Choices(NamedTuple):
    """Words or sounds to draw from. weights: added up."""

    options: list[str]
    weights: list[int]

    def draw(self, random: Random) -> str:
        return random.choices(self.options, cum_weights=self.weights)[0]


class Drills:
    """Draws drills from stanzas in a form.

    Raises UserError if no rhyme of theirs can be exchanged.
    """

    def __init__(self, stanzas: Sequence[str], form: Form):
        poems = scan(["\n".join(stanza.split("\n")[: len(form.scheme.stanza)]) for stanza in stanzas], form)
        self.words = end_words([line for poem in poems for line in poem.lines], form)
        self.sounds_of: dict[Shape, set[str]] = defaultdict(set)
        for shape, sound in self.words:
            self.sounds_of[shape].add(sound)
        self.both: dict[tuple[Shape, Shape], Choices] = {}
        self.stanzas: list[tuple[list[str], list[tuple[Place, Place]]]] = []
        for poem in poems:
            places = [last_word(number, line) for number, line in enumerate(poem.lines)]
            pairs: list[tuple[Place, Place]] = []
            for pair in poem.pairs:
                one, other = places[pair.first], None if pair.second is None else places[pair.second]
                if one is None or other is None or not pair.rhymed:
                    continue
                # Of three lines on one rhyme two are drilled.
                taken = {place.line for done in pairs for place in done}
                if taken.isdisjoint((one.line, other.line)) and self._sounds(one.shape, other.shape).options:
                    pairs.append((one, other))
            if pairs:
                self.stanzas.append(([line.text for line in poem.lines], pairs))
        if not self.stanzas:
            raise UserError(
                f"no rhyme in the {len(stanzas)} stanzas can be exchanged for another one: give a corpus with more, or "
                "--drill_steps 0."
            )

    def draw(self, count: int, seed: int) -> list[Drill]:
        """So many drills, each with a stanza and words of its own."""
        random = Random(seed)
        return [self._drill(random) for _ in range(count)]

    def _drill(self, random: Random) -> Drill:
        lines, pairs = random.choice(self.stanzas)
        lines = list(lines)
        for one, other in pairs:
            sound = self._sounds(one.shape, other.shape).draw(random)
            asking = self.words[one.shape, sound].draw(random)
            answer = asking
            while answer == asking:
                answer = self.words[other.shape, sound].draw(random)
            for place, word in ((one, asking), (other, answer)):
                line = lines[place.line]
                word = word.capitalize() if line[place.start].isupper() else word
                lines[place.line] = line[: place.start] + word + line[place.end :]
        return Drill("\n".join(lines), [other.line for _, other in pairs])

    def _sounds(self, one: Shape, other: Shape) -> Choices:
        """The sounds on which a word of one shape can be answered by two or more of another one."""
        if (one, other) not in self.both:
            shared = self.sounds_of[one] & self.sounds_of[other]
            sounds = sorted(sound for sound in shared if len(self.words[other, sound].options) > 1)
            weights = accumulate(self.words[one, sound].weights[-1] for sound in sounds)
            self.both[one, other] = Choices(sounds, [*weights])
        return self.both[one, other]


def end_words(lines: Sequence[Line], form: Form) -> dict[tuple[Shape, str], Choices]:
    """By shape and sound the words that end a line, drawn by how often they do, and all longer ones.

    Other words of one syllable lean on the next word, most of them.
    """
    language = LANGUAGES[form.language]
    last = Counter(
        line.ending.words[0].strip("'’")
        for line in lines
        if line.ending is not None and len(line.ending.words) == 1
    )
    found_words = (word for line in lines for word in re.findall(f"[{language.LETTERS}]+", line.text.lower()))
    words = {word.strip("'’") for word in found_words} - {""}
    readings = language.readings(words)
    found: dict[tuple[Shape, str], dict[str, int]] = defaultdict(dict)
    for word in sorted(words):
        for reading in readings[word]:
            if reading.marks.count("+") == 1 or (reading.marks == "?" and word in last):
                stressed = max(0, reading.marks.find("+"))
                ending = language.ending((word,), (reading,), stressed)
                for sound in ending.sounds:
                    found[(stressed, ending.tail), sound][word] = max(1, last[word])
    return {key: Choices([*of_key], [*accumulate(of_key.values())]) for key, of_key in found.items()}


def last_word(number: int, line: Line) -> Place | None:
    """None if the line's last stress is not in its last word, or the word is a part of another one."""
    if line.ending is None or len(line.ending.words) > 1:
        return None
    word = line.ending.words[0]
    start = line.text.lower().rindex(word)
    if line.text[:start].endswith("-"):
        return None
    syllables = sum(start <= syllable.start < start + len(word) for syllable in line.syllables)
    return Place(number, start, start + len(word), (syllables - 1 - line.ending.tail, line.ending.tail))
