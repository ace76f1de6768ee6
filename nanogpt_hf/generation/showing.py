"""Texts on a screen while they are written: one as a stream, two models' in columns, several one after another."""

import sys
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..common.text import printable
from .sampling_settings import SamplingSettings
from .writer import Prompt, Writer


def show(
    writers: Sequence[Writer], prompts: Sequence[Prompt], sampling: SamplingSettings, count: int = 1
) -> Iterator[list[list[str]]]:
    """Write, and print what is written; a prompt that is a text is printed before it.

    Args:
        prompts: one for each writer.
        count: texts of each writer.

    Yields:
        The texts of each writer so far, at each token.
    """
    streams = [
        writer.stream(prompt, sampling, count) for writer, prompt in zip(writers, prompts, strict=True)
    ]
    if len(writers) == count == 1:
        return _in_a_stream(prompts[0], streams[0])
    if count == 1 and sys.stdout.isatty():
        return _side_by_side(writers, prompts, streams)
    return _one_after_another(writers, prompts, streams, count)


def _in_a_stream(prompt: Prompt, stream: Iterator[list[str]]) -> Iterator[list[list[str]]]:
    sys.stdout.write(_opening(prompt))
    text = ""
    for (piece,) in stream:
        text += piece
        sys.stdout.write(printable(piece))
        sys.stdout.flush()
        yield [[text]]
    sys.stdout.write("\n")


def _side_by_side(
    writers: Sequence[Writer], prompts: Sequence[Prompt], streams: Sequence[Iterator[list[str]]]
) -> Iterator[list[list[str]]]:
    texts = [""] * len(writers)
    with Live(auto_refresh=False) as live:
        for pieces in zip_longest(*streams, fillvalue=[""]):
            texts = [text + piece for text, (piece,) in zip(texts, pieces, strict=True)]
            table = Table(box=None, expand=True)
            for writer in writers:
                table.add_column(Text(printable(writer.name)), ratio=1)
            table.add_row(*(Text(_opening(p) + printable(t)) for p, t in zip(prompts, texts, strict=True)))
            live.update(table, refresh=True)
            yield [[text] for text in texts]


def _one_after_another(
    writers: Sequence[Writer],
    prompts: Sequence[Prompt],
    streams: Sequence[Iterator[list[str]]],
    count: int,
) -> Iterator[list[list[str]]]:
    done: list[list[str]] = []
    number = 0
    for writer, prompt, stream in zip(writers, prompts, streams, strict=True):
        texts = [""] * count
        for pieces in stream:
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
            yield [*done, texts]
        done.append(texts)
        for text in texts:
            number += 1
            whose = f" {printable(writer.name)}" if len(writers) > 1 else ""
            print(f"--- {number}{whose}\n{_opening(prompt)}{printable(text)}", flush=True)


def _opening(prompt: Prompt) -> str:
    return printable(prompt) if isinstance(prompt, str) else ""


def say_faintly(words: str) -> None:
    """A line beside the texts, dim where the terminal can."""
    Console(soft_wrap=True, highlight=False).print(Text(printable(words), style="dim"))
