"""Metre: a foot and how many of them make a line, and whether words can be read so."""

import dataclasses
import functools
from collections.abc import Sequence

from ..common.errors import UserError
from .readings import Reading

FEET = {
    "iamb": "ws",
    "trochee": "sw",
    "dactyl": "sww",
    "amphibrach": "wsw",
    "anapaest": "wws",
}  # weak, strong
# Which mark of a reading may stand in which place.
FITS = {"w": "-?", "s": "+-?", "S": "+?"}


@dataclasses.dataclass(frozen=True)
class Metre:
    """The rhythm that a line is to have.

    foot: a name of `FEET`. feet: how many a line has.
    endings: how many syllables may follow the last strong place: 0 masculine, 1 feminine, 2 dactylic.
    inversion: the first foot of an iambic line may be a trochee, as it often is in English.
    stressed_end: the last strong place needs a stress, as in Russian; English verse may end on "memory".

    Raises UserError for an unknown foot, or where there is nothing to scan.
    """

    foot: str = "iamb"
    feet: int = 4
    endings: tuple[int, ...] = (0, 1)
    inversion: bool = False
    stressed_end: bool = True

    def __post_init__(self) -> None:
        if self.foot not in FEET:
            raise UserError(f"the foot is {self.foot!r}: it must be one of {', '.join(FEET)}.")
        if self.feet < 1 or not self.endings or min(self.endings) < 0:
            raise UserError(f"a line of {self.feet} feet with the endings {self.endings} cannot be written.")

    @functools.cached_property
    def patterns(self) -> list[str]:
        """Every line in this metre: "w" a weak place, "s" a strong one, "S" a strong one that needs its stress."""
        line = (FEET[self.foot] * self.feet).rstrip("w")
        line = line[:-1] + "S" if self.stressed_end else line
        starts = [line, "sw" + line[2:]] if self.inversion and self.foot == "iamb" else [line]
        return [start + "w" * ending for start in starts for ending in self.endings]

    def endless(self, length: int) -> str:
        """The places of the first `length` syllables of a line that is too short or too long."""
        return (FEET[self.foot] * length)[:length]


def misfits(marks: str, places: str) -> list[bool]:
    """Of each syllable, whether it is against its place."""
    return [mark not in FITS[place] for mark, place in zip(marks, places, strict=True)]


def align(words: Sequence[Sequence[Reading]], pattern: str) -> list[Reading] | None:
    """The readings of words that fit a pattern best, or None if none are as long as it.

    Of all that end at one place of the pattern the best is kept, word by word (dynamic programming): readings of an
    English word differ in length.
    """
    best: dict[int, tuple[int, list[Reading]]] = {0: (0, [])}
    for readings in words:
        longer: dict[int, tuple[int, list[Reading]]] = {}
        for place, (bad, said) in best.items():
            for reading in readings:
                end = place + len(reading.marks)
                if end > len(pattern):
                    continue
                total = bad + sum(misfits(reading.marks, pattern[place:end]))
                if end not in longer or total < longer[end][0]:
                    longer[end] = total, [*said, reading]
        best = longer
    return best[len(pattern)][1] if len(pattern) in best else None
