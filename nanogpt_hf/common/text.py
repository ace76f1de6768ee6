"""Text that is safe to show and to give away, first lines of what libraries say, and the nearest name."""

import difflib
import os
from collections.abc import Iterable


def printable(text: str) -> str:
    """The text with control characters spelt out, so that no model's output can drive a terminal."""
    return "".join(
        c
        if c.isprintable() or c in "\n\t" or c.isspace() and ord(c) > 0x9F
        else c.encode("unicode_escape").decode()
        for c in text
    )


def without_home(path: str) -> str:
    """A path under the user's home begins with ~ instead, which `os.path.expanduser` undoes; all else stays."""
    home = os.path.expanduser("~")
    for prefix in (home, os.path.realpath(home)):
        if len(prefix) > 1 and (path == prefix or path.startswith(prefix.rstrip(os.sep) + os.sep)):
            return "~" + path[len(prefix.rstrip(os.sep)) :]
    return path


def first_line(error: BaseException, lines: int = 1) -> str:
    """The first lines of a library's message as one, without its full stop; the error's type where it says nothing."""
    line = " ".join(str(error).strip().splitlines()[:lines]).rstrip(".")
    return line[:300] or type(error).__name__


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The one of the known names that the word is most like, None where it is like none."""
    return next(iter(difflib.get_close_matches(word, [*known], n=1)), None)
