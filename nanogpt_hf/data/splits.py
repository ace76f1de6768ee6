"""What becomes of documents between their source and a split: newlines, ends, and what is held out.

Files that are named for validation are told apart in sources.py; shards hold out by preparation.py.
"""

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter

from ..common.errors import UserError
from .readers import Reading, Text

END_OF_TEXT = "<|endoftext|>"  # GPT-2's mark
MANY_FILES = 10  # so many held out speak for all
_MARK_ALONE = re.compile(rf"(?m)^{re.escape(END_OF_TEXT)}[ \t\r]*(?:\n|\Z)")
_MARK_SIZE = len(END_OF_TEXT) + 8  # characters of a line that may yet become a mark with white space after it


def with_plain_newlines(documents: Iterable[Text], reading: Reading) -> Iterator[Text]:
    """The documents with every CRLF and CR as one newline, as Python reads text; `reading` counts them."""
    return (_plain_newlines(parts, reading) for parts in documents)


def _plain_newlines(parts: Text, reading: Reading) -> Iterator[str]:
    decoder = io.IncrementalNewlineDecoder(None, translate=True)
    for part in parts:
        reading.carriage_returns += part.count("\r")
        yield decoder.decode(part)
    yield decoder.decode("", final=True)  # a CR at the very end


def cut_at_marks(documents: Iterable[Text], reading: Reading) -> Iterator[Text]:
    """The documents cut at every line that is nothing but the mark of the end of a text, which goes; counted too."""
    for parts in documents:
        for _, pieces in groupby(_numbered(parts, reading), key=itemgetter(0)):
            yield map(itemgetter(1), pieces)


def _numbered(parts: Text, reading: Reading) -> Iterator[tuple[int, str]]:
    """The text without marks, each piece with the number of the marks before it."""
    number, rest, within_line = 0, "", False

    def split(text: str, start: int) -> Iterator[tuple[int, str]]:
        nonlocal number
        begin = 0
        for mark in _MARK_ALONE.finditer(text, start):
            yield number, text[begin : mark.start()]
            number, begin = number + 1, mark.end()
            reading.marks += 1
        yield number, text[begin:]

    for part in parts:
        text = rest + part
        line = text.rfind("\n") + 1  # where the last line begins
        # The first line may have begun in a part before.
        start = (text.find("\n") + 1 or len(text)) if within_line else 0
        if (line or not within_line) and len(text) - line <= _MARK_SIZE:
            text, rest, within_line = text[:line], text[line:], False
        else:
            rest, within_line = "", True
        yield from split(text, start)
    yield from split(rest, 0)


def compiled(end: str) -> re.Pattern[str]:
    """Where documents end. Raises UserError where that is no regular expression."""
    try:
        return re.compile(end)
    except re.error as error:
        raise UserError(f"--document_end {end!r} is no regular expression: {error}.") from error


def documents_ended_by(texts: Sequence[str], end: str) -> list[str]:
    """The texts cut after every match of a regular expression; no character is lost.

    Raises:
        UserError: it is none.
    """
    pattern, documents = compiled(end), []
    for text in texts:
        cuts = [0, *(match.end() for match in pattern.finditer(text)), len(text)]
        documents += [text[start:stop] for start, stop in zip(cuts, cuts[1:], strict=False) if stop > start]
    return documents


def hold_out(files: Sequence[Sequence[str]], percent: int) -> tuple[dict[str, list[str]], str]:
    """Some `percent` % of the documents of several files, spread over them, and in words which.

    Of many files whole ones are held out, because a document that is cut ends where none does; of few the end of each.
    """
    if len(files) * percent < 100 * MANY_FILES or percent == 100:
        each = "each file" if len(files) > 1 else "the text"
        return split_at_the_end(
            files, percent
        ), f"the last {percent}% of {each}" if percent < 100 else "all of it"
    splits: dict[str, list[str]] = {"train": [], "validation": []}
    for number, documents in enumerate(files):
        is_next = (number + 1) * percent // 100 > number * percent // 100
        splits["validation" if is_next else "train"] += documents
    return splits, f"{len(files) * percent // 100:,} whole files, one of every {100 / percent:.3g}"


def split_at_the_end(files: Sequence[Sequence[str]], percent: int) -> dict[str, list[str]]:
    """Cut the last `percent` % of the characters off the documents of each file, inside a document if need be."""
    splits: dict[str, list[str]] = {"train": [], "validation": []}
    for documents in files:
        room = sum(map(len, documents)) * (100 - percent) // 100
        for text in documents:
            for name, part in (("train", text[:room]), ("validation", text[room:])):
                if part:
                    splits[name].append(part)
            room = max(0, room - len(text))
    return splits
