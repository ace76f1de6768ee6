"""Stretches of text to token ids, in this process or in several others, in order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from transformers import PreTrainedTokenizerFast

from ..common.errors import UserError
from .shard_writing import Counts
from .shards import SPLITS
from .tokenization import encode_each, load_tokenizer, text_encoder

A = TypeVar("A")
R = TypeVar("R")


@dataclass(frozen=True)
class Unit:
    """A document, or a stretch of a long one.

    Attributes:
        continues: the text of the unit before, so that no end-of-text token stands between them.
    """

    split: str
    continues: bool
    text: str


@dataclass(frozen=True)
class Task:
    """Units that are tokenised together.

    Attributes:
        consumed: SHA-256 of all units of the corpus up to the last of these.
    """

    units: list[Unit]
    consumed: str


@dataclass(frozen=True)
class Encoded:
    """What has become of a task: its number of units, and for each split the ids and how much they stand for."""

    units: int
    consumed: str
    splits: dict[str, tuple[np.ndarray, Counts]]


class Encoder:
    """Tasks to the ids of each split."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, dtype: np.dtype[Any], special_tokens: bool = False
    ):
        self.tokenizer, self.dtype, self.special_tokens = tokenizer, dtype, special_tokens
        self.encode_text = None if special_tokens else text_encoder(tokenizer)

    def __call__(self, task: Task) -> Encoded:
        """An end-of-text token stands before each document.

        Raises:
            UserError: the tokenizer gives up on a text.
        """
        return Encoded(
            len(task.units),
            task.consumed,
            {split: self.encode([unit for unit in task.units if unit.split == split]) for split in SPLITS},
        )

    def encode(self, chosen: Sequence[Unit]) -> tuple[np.ndarray, Counts]:
        texts = [unit.text for unit in chosen]
        n_bytes = sum(len(text.encode()) for text in texts)
        ids: Iterator[np.ndarray] = (
            map(self.encode_text, texts)
            if self.encode_text
            else encode_each(self.tokenizer, texts, self.special_tokens)
        )
        end = np.array([self.tokenizer.eos_token_id], dtype=self.dtype)
        parts = [np.zeros(0, dtype=self.dtype)]
        for unit, part in zip(chosen, ids, strict=True):
            parts += [part.astype(self.dtype)] if unit.continues else [end, part.astype(self.dtype)]
        documents = sum(not unit.continues for unit in chosen)
        counts = Counts(sum(map(len, parts)), documents, sum(map(len, texts)), n_bytes)
        return np.concatenate(parts), counts


_encoder: Encoder | None = None  # of a worker process


def _start_worker(folder: str, dtype: np.dtype[Any], special_tokens: bool) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's to answer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    _encoder = Encoder(load_tokenizer(folder), dtype, special_tokens)


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def work(task: Task) -> Encoded:
    """What `Encoder` does, in a process of `worker_pool`."""
    assert _encoder is not None
    return _encoder(task)


def worker_pool(
    tokenizer: str, dtype: np.dtype[Any], num_proc: int, special_tokens: bool = False
) -> ProcessPoolExecutor:
    """Processes that tokenise.

    Not threads: the ids of all pass through Python. Not fork: the libraries' own threads would be lost in it.
    """
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(num_proc, context, _start_worker, (tokenizer, dtype, special_tokens))


def in_order(pool: Executor, function: Callable[[A], R], arguments: Iterable[A], ahead: int) -> Iterator[R]:
    """`pool.map` that takes no more than `ahead` arguments before their results are asked for."""
    waiting: deque[Future[R]] = deque()
    for argument in arguments:
        waiting.append(pool.submit(function, argument))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def encode_tasks(stream: Iterable[Task], folder: Path, encoder: Encoder, num_proc: int) -> Iterator[Encoded]:
    """The results of all tasks in order, from this process or from `num_proc` others.

    Raises:
        UserError: the tokenizer gives up on a text, or a process was killed.
    """
    if num_proc == 1:
        yield from map(encoder, stream)
        return
    with worker_pool(str(folder), encoder.dtype, num_proc, encoder.special_tokens) as pool:
        try:
            yield from in_order(pool, work, stream, ahead=2 * num_proc)
        except BrokenProcessPool as error:
            raise UserError(
                "a process that tokenises was killed, perhaps because memory ran out: run the same again, with fewer "
                "--num_proc."
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
