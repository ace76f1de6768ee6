"""Russian words: their stress by silero-stress, and their endings as they sound."""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..common.errors import UserError
from .readings import Ending, Reading
from .russian_sounds import rhyming_sounds

LETTERS = "а-яё\u0301"
VOWELS = "[аеёиоуыэюя]"
ACUTE = "\u0301"  # after a vowel: stress as the text itself marks it
# Conjunctions, prepositions and particles that lean on a neighbour: their own stress is weak, and verse puts them in
# either place (Zhirmunsky 1925, Introduction to Metrics, on words of two syllables without stress).
ATONIC = frozenset("или либо чтобы дабы перед передо предо между через нибудь".split())
LONGEST_WORD = (
    40  # letters that are read: the model looks at every part of a word, and a run of thousands has too many
)

_known: dict[str, tuple[Reading, ...]] = {}


@functools.cache
def _accentor() -> Any:
    """silero-stress without what it does to torch: it takes a single thread and turns gradients off.

    Raises:
        UserError: the extra `verse` is not installed.
    """
    import torch  # which takes seconds

    threads, gradients = torch.get_num_threads(), torch.is_grad_enabled()
    try:
        from silero_stress import load_accentor

        return load_accentor("ru")
    except ModuleNotFoundError as error:
        raise UserError("Russian stress needs silero-stress: pip install 'nanogpt_hf[verse]'.") from error
    finally:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(gradients)


def _reading(accented: str) -> Reading:
    """The reading of a word that has "+" before its stressed vowels; ё is stressed too."""
    vowels = re.findall(rf"(\+?)({VOWELS})", accented)
    marks = "".join("+" if stress or vowel == "ё" else "-" for stress, vowel in vowels)
    letters = accented.replace("+", "")
    return Reading("?" * len(marks) if len(marks) == 1 or letters in ATONIC else marks, letters)


def readings(words: Iterable[str]) -> Mapping[str, tuple[Reading, ...]]:
    """The readings of words in lower case; all new ones go through the model in one call.

    A homograph has both of its readings: which is meant, the metre says.
    """
    new = sorted({word for word in words if word not in _known})
    if new:
        accentor = _accentor()
        plain = [re.sub(f"({VOWELS}){ACUTE}", r"+\1", word[:LONGEST_WORD]).replace(ACUTE, "") for word in new]
        guesses = accentor.accentor(" ".join(plain)).split(" ")
        for word, guess in zip(new, guesses, strict=True):
            choices = accentor.homosolver.homodict.get(word, [guess])
            _known[word] = tuple(dict.fromkeys(map(_reading, choices)))
    return _known


def ending(words: Sequence[str], said: Sequence[Reading], stressed: int) -> Ending:
    """The ending of a line from its last stressed syllable: number `stressed` of the first of these words."""
    tail = sum(len(reading.marks) for reading in said) - stressed - 1
    return Ending(tuple(words), rhyming_sounds([reading.sound for reading in said], stressed), tail)
