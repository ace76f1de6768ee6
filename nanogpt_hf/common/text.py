"""Text that is safe to show and to give away, first lines of what libraries say, and the nearest name."""

import codecs
import difflib
import os
import re
from collections.abc import Iterable

from .errors import UserError

# What drives a terminal or hides what a line says: controls (C0, C1), characters that turn the direction of the
# text around, and halves of surrogate pairs. Joiners, variation selectors and what a newer Unicode adds do neither.
_UNSAFE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


# Bytes of an argument or a file name as Python spells them where the locale is not UTF-8.
_BYTES = re.compile("[\udc80-\udcff]+")


def printable(text: str) -> str:
    """The text as it may be shown: with what could drive a terminal spelt out, and CRLF as one newline."""
    text = readable(text.replace("\r\n", "\n"))
    return _UNSAFE.sub(lambda c: c[0].encode("unicode_escape").decode(), text)


def readable(text: str) -> str:
    """A text with the bytes of names in it as the characters that they are in UTF-8."""
    return _BYTES.sub(
        lambda found: found[0].encode("utf-8", "surrogateescape").decode("utf-8", "replace"), text
    )


# n, t, r and the backslash itself, and code points in hexadecimal digits, as Python spells them.
_HEX = "[0-9a-fA-F]"
_ESCAPE = re.compile(
    rf"\\(?:[ntr\\]|x{_HEX}{{2}}|u(?![dD][89a-fA-F]){_HEX}{{4}}|U000{_HEX}{{5}}|U0010{_HEX}{{4}})"
)


def unescaped(text: str) -> str:
    r"""The text with its escapes for what they mean: \n, \t, \r, \\, \x1b, \u2028, \U0001f600."""
    return _ESCAPE.sub(lambda found: codecs.decode(found[0], "unicode_escape"), text)


def spelt_out(word: str) -> str:
    """A word of a command line as the text that is meant, its escapes too.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        # Python spells the bytes of an argument as surrogates where the locale is not UTF-8.
        return unescaped(os.fsencode(word).decode("utf-8"))
    except UnicodeError as error:
        raise UserError(f"{word!r} is not UTF-8: give it as such.") from error


def without_home(text: str) -> str:
    """A path into the user's home, however it is written, begins with ~ instead, which `os.path.expanduser` undoes.

    So does the home anywhere else in the text. A relative path that stays within the home, or outside, is as it was.
    """
    written = os.path.expanduser("~")
    for home in dict.fromkeys(path.rstrip(os.sep) for path in (written, os.path.realpath(written))):
        if home and text and _lies_in(text, home) and (os.path.isabs(text) or _leaves(text, home)):
            text = "~" + os.path.abspath(text)[len(home) :]
        elif home:
            text = re.sub(rf"(?<![\w.-]){re.escape(home)}(?![\w-]|\.\w)", "~", text)
    return text


def _lies_in(path: str, folder: str) -> bool:
    return f"{os.path.abspath(path)}{os.sep}".startswith(folder + os.sep)


def _leaves(path: str, home: str) -> bool:
    """Whether a relative path into the home comes from outside, or goes through it."""
    return not _lies_in(os.curdir, home) or os.path.normpath(path) != os.path.relpath(path)


def without_token(text: str) -> str:
    """The text without the token of the Hub that is in use here, or any that a request would carry."""
    from huggingface_hub import get_token  # which takes a while

    token = get_token()
    text = text.replace(token, "…") if token else text
    return re.sub(r"(?i)\b(bearer) +\S+", r"\1 …", text)


def first_line(error: BaseException, lines: int = 1) -> str:
    """The first lines of a library's message as one, without its full stop or a token that it quotes; the error's type
    where it says nothing."""
    line = without_token(" ".join(str(error).strip().splitlines()[:lines])).rstrip(".")
    return line[:300] or type(error).__name__


def counted(number: int, thing: str) -> str:
    """One thing, or several."""
    return f"{number:,} {thing}{'s' * (number != 1)}"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The one of the known names that the word is most like, None where it is like none."""
    return next(iter(difflib.get_close_matches(word, [*known], n=1)), None)
