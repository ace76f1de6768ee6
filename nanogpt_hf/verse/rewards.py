"""What a text in verse is worth: a number for each of its lines, so that what a line did well is not lost in its poem.

A new reward is a function here and its name in `Rewards`.
"""

import importlib
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np
import torch

from ..common.errors import UserError
from ..common.text import nearest
from .metre import Metre
from .scansion import LANGUAGES, Form, Line, is_verse, scan

OF_FORM = ("metre", "feet", "endings", "rhyme", "lines")  # what a form says of a text
OF_LAST_WORD = ("endings", "rhyme")  # what the last word of a line decides
GUARDS = ("originality", "variety", "spelling", "stresses")
Reward = Callable[
    [Sequence[str]], list[np.ndarray]
]  # of texts: a number for each line (split at newlines) of each


class Scanned(NamedTuple):
    """A text's lines (split at newlines): from 0 to 1 of each, whether it is in metre, how near it comes to it, whether it
    ends as its rhyme in the scheme wants, and whether it answers an earlier line's rhyme."""

    metre: np.ndarray
    feet: np.ndarray
    endings: np.ndarray
    rhyme: np.ndarray


def scan_lines(texts: Sequence[str], form: Form) -> list[Scanned]:
    """Metre, feet, ending and rhyme of each line. A rhyme is the work of the later line of its pair: the earlier one asks,
    and can only choose what is easy to answer.

    Pairs that rhyme with one another too share the worth of one: a stanza all on one rhyme fits any scheme.
    """
    found = []
    for text, poem in zip(texts, scan(texts, form), strict=True):
        scanned = Scanned(*np.zeros((4, text.count("\n") + 1)))
        for number, line in zip(poem.numbers, poem.lines, strict=True):
            scanned.metre[number] = line.in_metre
            scanned.feet[number] = near_metre(line, form.metre)
            scanned.endings[number] = line.ending is not None  # what rhymes with nothing may end anyhow
        rhymed = []
        for pair in poem.pairs:
            for at in (pair.first, pair.second):
                if at is not None and (own := poem.lines[at].ending) is not None:
                    scanned.endings[poem.numbers[at]] = form.scheme.fits(pair.letter, own)
            ending = poem.lines[pair.first].ending
            if pair.rhymed and pair.second is not None and ending is not None:
                rhymed.append((poem.numbers[pair.second], ending.sounds))
        for number, sounds in rhymed:
            scanned.rhyme[number] = 1 / sum(not sounds.isdisjoint(others) for _, others in rhymed)
        found.append(scanned)
    return found


def near_metre(line: Line, metre: Metre) -> float:
    """Share of a line's syllables that are in their places, less what it has too many or too few."""
    count = len(line.syllables)
    wanted = min(map(len, metre.patterns), key=lambda length: abs(length - count))
    fitting = sum(syllable.fits for syllable in line.syllables)
    return max(0, fitting - abs(wanted - count)) / max(wanted, count)


class Scanner:
    """`scan_lines` in as many processes as are given; 0 is this one.

    A word that no text had before goes through the model of stresses: a core reads some 2,000 of them per second.
    """

    def __init__(self, form: Form, processes: int = 0):
        self.form, self.processes, self.pool = form, processes, None
        if processes:
            self.pool = ProcessPoolExecutor(
                processes, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
            )
            # They import while the model is loaded.
            self.pool.map(scan_lines, [[]] * processes, [form] * processes)

    def __call__(self, texts: Sequence[str]) -> list[Scanned]:
        if self.pool is None:
            return scan_lines(texts, self.form)
        parts = [texts[start :: self.processes] for start in range(self.processes)]
        found: list[Any] = [None] * len(texts)
        for start, part in enumerate(self.pool.map(scan_lines, parts, [self.form] * len(parts))):
            found[start :: self.processes] = part
        return found


def line_count(form: Form) -> Reward:
    """1 for a text of as many lines as the form's scheme, less for each that is missing or too much, 0 for double."""
    wanted = len(form.scheme.stanza)

    def worth(text: str) -> float:
        count = sum(map(is_verse, text.split("\n")))
        return max(0.0, 1 - abs(count / wanted - 1))

    return of_each_text(worth)


def originality(training_texts: Sequence[str], window: int = 14) -> Reward:
    """1 - the share of a line's characters, its newline among them, that end so many characters copied in one piece.

    Raises:
        UserError: no training text is as long as a window.
    """
    hashes = [windows(text, window) for text in training_texts]
    known = np.unique(np.concatenate([np.zeros(0, np.uint64), *hashes]))
    if not known.size:
        raise UserError(f"there is no training text of {window} characters or more to tell copies from.")

    def shares(text: str) -> np.ndarray:
        own = windows(text, window)
        copied = np.zeros(len(text) + 1)
        copied[window : window + len(own)] = known[np.searchsorted(known[:-1], own)] == own
        ends = np.cumsum([len(line) + 1 for line in text.split("\n")])
        parts = np.split(copied, ends[:-1])
        return np.array([1 - part.mean() if part.size else 1.0 for part in parts])

    return lambda texts: [shares(text) for text in texts]


def windows(text: str, width: int) -> np.ndarray:
    """A hash of each `width` characters of a text: a polynomial of its code points, modulo 2**64."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    count = max(0, len(points) - width + 1)
    hashes = np.zeros(count, np.uint64)
    for start in range(width):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + points[start : start + count]
    return hashes


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without what stands between them: no sign makes an old word a new one."""
    return re.findall(r"[^\W\d_]+", text.lower())


def variety(texts: Sequence[str]) -> list[np.ndarray]:
    """Of each line, how new its pairs of words are to the texts together, times how new its long words are to its text.

    A pair that occurs n times is worth 1 / n, so that the sum over all pairs is the number of different ones: what
    distinct-2 counts (Li et al. 2016). A word of four letters or more that its text repeats m times is worth 1 / m.
    """
    lines = [[words_of(line) for line in text.split("\n")] for text in texts]
    pairs = Counter(pair for text in lines for line in text for pair in pairwise(line))
    found = []
    for text in lines:
        long = Counter(word for line in text for word in line if len(word) > 3)
        found.append(
            np.array([_mean_of_shares(pairs, pairwise(line)) * _mean_of_shares(long, line) for line in text])
        )
    return found


def _mean_of_shares(counts: Counter, things: Iterable) -> float:
    """The mean of 1 / count over the things that were counted; 1 without any."""
    shares = [1 / counts[thing] for thing in things if thing in counts]
    return sum(shares) / len(shares) if shares else 1.0


def spelling(training_texts: Sequence[str]) -> Reward:
    """Share of a line's words that some training text has: against words that are made up to fit."""
    known = {word for text in training_texts for word in words_of(text)}

    def share(line: str) -> float:
        words = words_of(line)
        return sum(word in known for word in words) / max(1, len(words))

    return of_each_line(share)


def stresses(form: Form) -> Reward:
    """1 for a line with two words of several vowels or more, 1/2 with one, 0 with none.

    Words of one syllable fit either place of a foot, so that a line of them alone is in any metre.
    """
    vowel = LANGUAGES[form.language].VOWELS

    def worth(line: str) -> float:
        return min(2, sum(len(re.findall(vowel, word)) > 1 for word in words_of(line))) / 2

    return of_each_line(worth)


def of_each_line(function: Callable[[str], float]) -> Reward:
    """A function of one line as a reward."""
    return lambda texts: [np.array([function(line) for line in text.split("\n")]) for text in texts]


def of_each_text(function: Callable[[str], float]) -> Reward:
    """A function of one text as a reward of each of its lines.

    Raises UserError, at a call, for what is not a finite number.
    """

    def reward(texts: Sequence[str]) -> list[np.ndarray]:
        values = [function(text) for text in texts]
        for value in values:
            if not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
                name = getattr(function, "__name__", function)
                raise UserError(f"the reward {name} gave {value!r} for a text: it must be a finite number.")
        return [
            np.full(text.count("\n") + 1, float(value)) for text, value in zip(texts, values, strict=True)
        ]

    return reward


def load_reward(name: str) -> Reward:
    """The reward "module:function": a Python function of one text to a number, given to each line of the text.

    The current folder is searched too.

    Raises:
        UserError: there is no such module, or no such function in it.
    """
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise UserError(f"the reward {name!r} must name a function as module:function.")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # it is there, and lacks a module of its own
        raise UserError(
            f"the reward {name!r}: there is no module {error.name!r} here or installed."
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    function = getattr(module, function_name, None)
    if not callable(function):
        known = [word for word, value in vars(module).items() if callable(value)]
        hint = f" Did you mean {near!r}?" if (near := nearest(function_name, known)) else ""
        raise UserError(f"the reward {name!r}: {module_name} has no function {function_name!r}.{hint}")
    return of_each_text(function)


@dataclass
class Rewards:
    """Several rewards as one: their mean by weight, times each of the guards.

    weights: name -> weight; metre, feet, endings, rhyme, lines, or a function of a text as module:function.
    guards: of `GUARDS`. What they give 0, as originality a copy, is worth 0, however good it is otherwise.
    processes: that scan; 0 is this one.

    Raises UserError for an unknown name, or for weights that are not above 0.
    """

    form: Form
    weights: Mapping[str, float]
    guards: Sequence[str] = GUARDS
    training_texts: Sequence[str] = field(default=(), repr=False)
    processes: int = 0

    def __post_init__(self) -> None:
        if not self.weights or not all(0 < weight < math.inf for weight in self.weights.values()):
            raise UserError(f"the weights of the rewards are {dict(self.weights)}: each must be above 0.")
        for name in self.weights:
            if name not in OF_FORM and ":" not in name:
                raise UserError(
                    f"the reward {name!r} is none of {', '.join(OF_FORM)}, and not module:function either."
                )
        if unknown := set(self.guards) - set(GUARDS):
            raise UserError(f"the guard {min(unknown)!r} is none of {', '.join(GUARDS)}.")
        self.scan = Scanner(self.form, self.processes)
        self.others = {name: load_reward(name) for name in self.weights if ":" in name}
        if "lines" in self.weights:
            self.others["lines"] = line_count(self.form)
        if "originality" in self.guards:
            self.others["originality"] = originality(self.training_texts)
        if "variety" in self.guards:
            self.others["variety"] = variety
        if "spelling" in self.guards:
            self.others["spelling"] = spelling(self.training_texts)
        if "stresses" in self.guards:
            self.others["stresses"] = stresses(self.form)

    def by_name(self, texts: Sequence[str]) -> dict[str, list[np.ndarray]]:
        """What each reward gives each line of each text."""
        found = {name: reward(texts) for name, reward in self.others.items()}
        if set(Scanned._fields) & self.weights.keys():
            found |= dict(zip(Scanned._fields, map(list, zip(*self.scan(texts), strict=True)), strict=True))
        return found

    def guarded(self, given: Mapping[str, Sequence[np.ndarray]]) -> dict[str, list[np.ndarray]]:
        """Each reward of what `by_name` returned, times the guards."""
        guards = [given[name] for name in self.guards]
        return {
            name: [np.prod(parts, axis=0) for parts in zip(given[name], *guards, strict=True)]
            for name in self.weights
        }

    def combined(self, given: Mapping[str, Sequence[np.ndarray]]) -> list[np.ndarray]:
        """One number for each line: the mean of `guarded` by weight."""
        weights = np.array([*self.weights.values()]) / sum(self.weights.values())
        return [
            np.tensordot(weights, np.stack(parts), 1)
            for parts in zip(*self.guarded(given).values(), strict=True)
        ]


def spare_cores() -> int:
    """Processes that can scan beside the one that trains; with two cores or fewer none."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(12, cores - 2) if cores > 2 else 0
