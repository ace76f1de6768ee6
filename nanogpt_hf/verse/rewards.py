"""Rewards of whole texts: what they are worth, in numbers from 0 to 1, many in one call.

Tuning takes them line by line, and by name: line_rewards.py.
"""

import dataclasses
import functools
import importlib
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from ..common.errors import UserError
from ..common.text import nearest
from ..metrics.distinct_n import count_ngrams
from .scansion import Form, scan


class Reward(Protocol):
    def __call__(self, texts: Sequence[str]) -> list[float]:
        """A number for each text, from 0 for what is not wanted to 1."""


def metre(form: Form) -> Reward:
    """Share of a text's lines that are in metre."""
    return lambda texts: [poem.metre_share for poem in scan(texts, form)]


def rhyme(form: Form) -> Reward:
    """Share of the scheme's pairs that rhyme."""
    return lambda texts: [poem.rhyme_share for poem in scan(texts, form)]


def line_count(form: Form) -> Reward:
    """1 for a text of as many lines as the form's scheme, less for each that is missing or too much, 0 for double."""
    wanted = len(form.scheme.stanza)
    return lambda texts: [max(0.0, 1 - abs(len(poem.lines) / wanted - 1)) for poem in scan(texts, form)]


def variety(n: int = 2) -> Reward:
    """Distinct n-grams of words of a text / all (Li et al. 2016): against repetition; 0 if it has none."""
    counts = functools.partial(count_ngrams, n=n)
    return lambda texts: [distinct / max(1, total) for distinct, total in (counts([text]) for text in texts)]


def originality(training_texts: Sequence[str], window: int = 20) -> Reward:
    """Share of a text's windows of so many characters that no training text holds: against copying.

    1 - the metric memorization's memorized_share of the one text, but for a collision of hashes (64 bits).

    Raises:
        UserError: no training text is as long as a window.
    """
    known = np.unique(
        np.concatenate([np.zeros(0, np.uint64), *(windows(text, window) for text in training_texts)])
    )
    if not known.size:
        raise UserError(f"there is no training text of {window} characters or more to tell copies from.")

    def share(text: str) -> float:
        own = windows(text, window)
        found = known[np.searchsorted(known[:-1], own)] == own
        return 1.0 - float(found.mean()) if found.size else 1.0

    return lambda texts: [share(text) for text in texts]


def windows(text: str, width: int) -> np.ndarray:
    """A hash of each `width` characters of a text: a polynomial of its code points, modulo 2**64."""
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    count = max(0, len(points) - width + 1)
    hashes = np.zeros(count, np.uint64)
    for start in range(width):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + points[start : start + count]
    return hashes


def of_each_text(function: Callable[[str], float]) -> Reward:
    """A function of one text as a reward.

    Raises UserError, at a call, for what is not a finite number.
    """

    def reward(texts: Sequence[str]) -> list[float]:
        values = [function(text) for text in texts]
        for value in values:
            if not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
                name = getattr(function, "__name__", function)
                raise UserError(f"the reward {name} gave {value!r} for a text: it must be a finite number.")
        return [float(value) for value in values]

    return reward


def load_reward(name: str) -> Reward:
    """The reward "module:function": a Python function of one text to a number. The current folder is searched too.

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


@dataclasses.dataclass(frozen=True)
class Weighted:
    """Several rewards as one: the mean of some by weight, times each of the guards.

    parts: name -> weight and reward.
    guards: name -> reward. What they give 0, as `originality` a copy, is worth 0, however good it is otherwise.

    Raises UserError without parts, for a weight that is not above 0, or for a name in both.
    """

    parts: Mapping[str, tuple[float, Reward]]
    guards: Mapping[str, Reward] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.parts or not all(0 < weight < math.inf for weight, _ in self.parts.values()):
            weights = {name: weight for name, (weight, _) in self.parts.items()}
            raise UserError(f"the weights of the rewards are {weights}: each must be a number above 0.")
        if both := self.parts.keys() & self.guards.keys():
            raise UserError(f"the reward {min(both)!r} is both weighed and a guard: leave one of them out.")

    def __call__(self, texts: Sequence[str]) -> list[float]:
        return self.combined(self.by_name(texts))

    def by_name(self, texts: Sequence[str]) -> dict[str, list[float]]:
        """What each reward gives each text, for a log and for `combined`."""
        rewards = {name: reward for name, (_, reward) in self.parts.items()} | dict(self.guards)
        return {name: reward(texts) for name, reward in rewards.items()}

    def combined(self, given: Mapping[str, Sequence[float]]) -> list[float]:
        """One number for each text of what `by_name` returned."""
        weights = {name: weight for name, (weight, _) in self.parts.items()}
        values = np.average([given[name] for name in weights], axis=0, weights=list(weights.values()))
        for name in self.guards:
            values = values * given[name]
        return values.tolist()
