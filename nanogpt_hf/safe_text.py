"""Text that is safe to show and to give away: no control characters, no path of the user's home."""

import os


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
