"""Rhyme: whether two endings sound alike, and which lines of a stanza are to."""

import dataclasses
from collections.abc import Iterator

from ..common.errors import UserError
from .readings import Ending


def rhymes(one: Ending, other: Ending) -> bool:
    """Whether two endings sound alike and are not the same words."""
    return one.words != other.words and not one.sounds.isdisjoint(other.sounds)


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Which lines of a stanza rhyme: each with the next one of its letter.

    letters: spaces do not count. Where both cases occur, upper case wants a feminine ending and lower case a
        masculine one; where only one does, as in "ABAB", any ending will do.

    Raises UserError for what is no letter, or if no letter comes twice.
    """

    letters: str = "AbAb CCdd EffE gg"

    def __post_init__(self) -> None:
        if not self.stanza.isalpha() or len(set(self.stanza)) == len(self.stanza):
            raise UserError(
                f"the rhyme scheme is {self.letters!r}: it must be letters and spaces, some letter twice, as in 'abab'."
            )

    @property
    def stanza(self) -> str:
        """The letter of each line."""
        return self.letters.replace(" ", "")

    def pairs(self, lines: int) -> Iterator[tuple[str, int, int | None]]:
        """Letter, first and second line of each pair in a stanza of `lines`; the second is None if it is missing.

        A longer stanza begins the scheme anew.
        """
        letters = self.stanza
        for first in range(lines):
            place = first % len(letters)
            after = letters.find(letters[place], place + 1)
            if after > 0:
                second = first - place + after
                yield letters[place], first, second if second < lines else None

    def met(self, letter: str, one: Ending | None, other: Ending | None) -> bool:
        """Whether two endings rhyme, both of the kind that their letter wants; None, a missing line, does not."""
        if one is None or other is None or not rhymes(one, other):
            return False
        return self.fits(letter, one) and self.fits(letter, other)

    def fits(self, letter: str, ending: Ending) -> bool:
        """Whether an ending is of the kind that a letter wants."""
        mixed = not (self.letters.isupper() or self.letters.islower())
        return not mixed or letter.isupper() == (ending.tail > 0)
