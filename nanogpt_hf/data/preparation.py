"""A corpus of any size to shards: read as a stream, tokenised in parallel, resumable after a kill at any moment.

The shards of a split are one sequence that only grows. Every few seconds what has been written is put on the disk,
and then, in one small file, how much that is; to go on, what lies past it is cut off. So the bytes are the same
however often the work was interrupted, and whatever the number of processes.
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from ..common.errors import UserError
from ..common.files import delete, files_written_whole, sync
from ..common.text import without_home
from .corpora import split_at_the_end
from .named_corpora import NAMES
from .readers import Source, open_source
from .shards import FORMAT, INDEX, PROGRESS, SPLITS, read_shard, vocabulary_sha256, width_of
from .token_stream import mix
from .tokenization import encode_each, load_tokenizer, pieces, text_encoder

UNIT = 2**16  # characters: of a longer document each such stretch is held out, or not, by itself
TASK = 2**20  # characters that a process gets at once
COMMIT_SECONDS = 5.0


@dataclass(frozen=True)
class Unit:
    """A document, or a stretch of a long one."""

    split: str
    continues: bool  # the text of the unit before, so that no end-of-text token stands between them
    text: str


@dataclass
class Counts:
    """How much of a split has been written."""

    tokens: int = 0
    documents: int = 0
    characters: int = 0
    bytes: int = 0  # of the text in UTF-8


# --- reading ---


def units(source: Source, whole_documents: bool, period: int) -> Iterator[Unit]:
    """The text of a corpus with the split of each stretch.

    Where the source has no validation split of its own, of every `period` units one is held out, chosen by a hash.
    That depends on nothing but a unit's number: the end of a stream is not known before it has come, and the last
    part of a sorted corpus is not like the rest.
    """
    number = held_out = 0
    for name in (name for name in SPLITS if name in source.splits):
        for document in source.splits[name]:
            before = None
            for text in ["".join(document)] if whole_documents else stretches(document):
                if not text:
                    continue
                if number % period == 0:
                    held_out = number + int(mix(np.uint64(number // period)) % np.uint64(period))
                is_held_out = number == held_out and "validation" not in source.splits
                split = "validation" if is_held_out else name
                yield Unit(split, split == before, text)
                before = split
                number += 1


def stretches(document: Iterable[str]) -> Iterator[str]:
    """A document that comes in parts, cut where no token spans the place, whatever the parts were."""
    rest = ""
    for part in document:
        *whole, rest = pieces(rest + part, UNIT)
        yield from whole
    yield rest


def tasks(stream: Iterable[Unit]) -> Iterator[list[Unit]]:
    task, size = [], 0
    for unit in stream:
        task.append(unit)
        size += len(unit.text)
        if size >= TASK:
            yield task
            task, size = [], 0
    if task:
        yield task


# --- tokenising ---


class Encoder:
    """Units to the ids of each split."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, dtype: np.dtype):
        self.tokenizer, self.dtype = tokenizer, dtype
        self.encode_text = text_encoder(tokenizer)

    def __call__(self, task: list[Unit]) -> tuple[int, dict[str, tuple[np.ndarray, Counts]]]:
        """The number of units, and for each split its ids, an end-of-text token before each document, and counts.

        Raises:
            UserError: a text is not Unicode.
        """
        end = np.array([self.tokenizer.eos_token_id], dtype=self.dtype)
        encoded = {}
        for split in SPLITS:
            chosen = [unit for unit in task if unit.split == split]
            texts = [unit.text for unit in chosen]
            try:
                n_bytes = sum(len(text.encode()) for text in texts)
            except UnicodeEncodeError as error:
                raise UserError(
                    "the corpus holds half of a surrogate pair, which is not Unicode text."
                ) from error
            parts = [np.zeros(0, dtype=self.dtype)]
            ids = map(self.encode_text, texts) if self.encode_text else encode_each(self.tokenizer, texts)
            for unit, part in zip(chosen, ids, strict=True):
                parts += [part.astype(self.dtype)] if unit.continues else [end, part.astype(self.dtype)]
            documents = sum(not unit.continues for unit in chosen)
            counts = Counts(sum(map(len, parts)), documents, sum(map(len, texts)), n_bytes)
            encoded[split] = np.concatenate(parts), counts
        return len(task), encoded


_encoder: Encoder | None = None  # of a worker process


def _start_worker(folder: str, dtype: np.dtype) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's to answer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # killed: so end too
    _encoder = Encoder(load_tokenizer(folder), dtype)


def work(task: list[Unit]):
    """What `Encoder` does, in a process of `worker_pool`."""
    return _encoder(task)


def worker_pool(tokenizer: str, dtype: np.dtype, num_proc: int) -> ProcessPoolExecutor:
    """Processes that tokenise.

    Not threads: the ids of all pass through Python. Not fork: the libraries' own threads would be lost in it.
    """
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(num_proc, context, _start_worker, (tokenizer, dtype))


def in_order(pool: Executor, function: Callable, arguments: Iterable, ahead: int) -> Iterator:
    """`pool.map` that takes no more than `ahead` arguments before their results are asked for."""
    waiting = deque()
    for argument in arguments:
        waiting.append(pool.submit(function, argument))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def encode_tasks(
    stream: Iterable[list[Unit]], folder: Path, encoder: Encoder, num_proc: int
) -> Iterator[tuple[int, dict]]:
    """The results of all tasks in order, from this process or from `num_proc` others.

    Raises:
        UserError: a text is not Unicode, or a process was killed.
    """
    if num_proc == 1:
        yield from map(encoder, stream)
        return
    with worker_pool(str(folder), encoder.dtype, num_proc) as pool:
        try:
            yield from in_order(pool, work, stream, ahead=2 * num_proc)
        except BrokenProcessPool as error:
            raise UserError(
                "a process that tokenises was killed, for want of memory it may be: run the same again, with fewer "
                "--num_proc."
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


# --- writing ---


class SplitWriter:
    """Appends to the shards of a split; what an earlier process wrote past `tokens` is cut off.

    Raises:
        UserError: there is less than `tokens`.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype, shard_tokens: int, tokens: int):
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        self.tokens = tokens
        for path in sorted(folder.glob(f"{split}-*.bin")):
            number = int(path.stem.rpartition("-")[2])
            kept = max(0, min(shard_tokens, tokens - number * shard_tokens)) * dtype.itemsize
            if path.stat().st_size < kept:
                raise UserError(f"{path} is shorter than it was: start again with --overwrite_output_dir.")
            os.truncate(path, kept)
            if not kept:
                path.unlink()
        missing = [path for path in self.paths() if not path.exists()]
        if missing:
            raise UserError(f"{missing[0]} is missing: start again with --overwrite_output_dir.")
        self.file = None

    def paths(self) -> list[Path]:
        count = -(-self.tokens // self.shard_tokens)
        return [self.folder / f"{self.split}-{number:05d}.bin" for number in range(count)]

    def append(self, ids: np.ndarray) -> None:
        while len(ids):
            room = self.shard_tokens - self.tokens % self.shard_tokens
            self.tokens += min(room, len(ids))
            if self.file is None:
                self.file = self.paths()[-1].open("ab")
            self.file.write(ids[:room].tobytes())
            if room <= len(ids):
                self.close()
            ids = ids[room:]

    def sync(self) -> None:
        if self.file is not None:
            self.file.flush()
            os.fsync(self.file.fileno())

    def close(self) -> None:
        self.sync()
        if self.file is not None:
            self.file.close()
            self.file = None


def prepare(
    corpus: str,
    tokenizer_name: str,
    output_dir: str,
    *,
    text_column: str = "text",
    validation_split_percentage: float = 0.05,
    shard_tokens: int = 10**8,
    num_proc: int = 1,
    overwrite: bool = False,
) -> dict:
    """Make the shards, or go on making them, and return their index.

    Raises:
        UserError: the corpus, the tokenizer or the folder cannot be used, or the folder holds other shards.
    """
    tokenizer = load_tokenizer(tokenizer_name)
    source, dtype, folder = open_source(corpus, text_column), width_of(len(tokenizer)), Path(output_dir)
    if corpus in NAMES:  # these have a validation split that all comparisons are made on: the last 10%
        texts = split_at_the_end(["".join(parts) for parts in source.splits["train"]], 10)
        source.splits = {name: [[text] for text in documents] for name, documents in texts.items()}
    about = {
        "format": FORMAT,
        "corpus": {
            "name": without_home(corpus),
            **{key: getattr(source, key) for key in ("source", "language", "license", "notice")},
        },
        "text_column": text_column,
        "source_size": source.size,
        "vocabulary_sha256": vocabulary_sha256(tokenizer),
        "vocab_size": len(tokenizer),
        "dtype": dtype.str,
        "shard_tokens": shard_tokens,
        "validation_split": "its own"
        if "validation" in source.splits
        else f"{validation_split_percentage:g}%",
    }
    encoder, period = Encoder(tokenizer, dtype), round(100 / validation_split_percentage)
    stream = units(source, whole_documents=encoder.encode_text is None, period=period)
    first = next(stream, None)
    if first is None:
        raise UserError(f"{corpus} holds no text.")
    stream = chain([first], stream)
    done, counts = begin(folder, about, overwrite)
    if done is None:
        return json.loads((folder / INDEX).read_text(encoding="utf-8"))
    if not (folder / PROGRESS).exists():
        with files_written_whole(folder) as staging:
            tokenizer.save_pretrained(staging)
        write_progress(folder, about, 0, counts)
    writers = {
        split: SplitWriter(folder, split, dtype, shard_tokens, counts[split].tokens) for split in SPLITS
    }
    if sum(1 for _ in islice(stream, done)) < done:
        raise UserError(f"{corpus} has become shorter: start again with --overwrite_output_dir.")
    bar = tqdm(
        total=source.size or None,
        initial=int(source.done),
        disable=not sys.stderr.isatty(),
        unit_scale=True,
        dynamic_ncols=True,
        bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
    )
    committed = time.monotonic()
    for n_units, encoded in encode_tasks(tasks(stream), folder, encoder, num_proc):
        done += n_units
        for split, (ids, new) in encoded.items():
            if not counts[split].tokens and len(ids):
                ids, new.tokens = ids[1:], new.tokens - 1  # nothing ends before the first document
            writers[split].append(ids)
            for key, value in asdict(new).items():
                setattr(counts[split], key, getattr(counts[split], key) + value)
        bar.set_postfix_str(f"{counts['train'].tokens:,} tokens", refresh=False)
        bar.update(int(source.done) - bar.n)
        if time.monotonic() - committed > COMMIT_SECONDS:
            for writer in writers.values():
                writer.sync()
            write_progress(folder, about, done, counts)
            committed = time.monotonic()
    bar.close()
    for writer in writers.values():
        writer.close()
    write_progress(folder, about, done, counts)
    return finish(folder, about, writers, counts)


def begin(folder: Path, about: dict, overwrite: bool) -> tuple[int | None, dict[str, Counts]]:
    """How many units are done, None when all are, and what has been written of each split.

    Raises:
        UserError: the folder holds something else.
    """
    try:
        if overwrite and ((folder / INDEX).exists() or (folder / PROGRESS).exists()):
            for path in [*folder.glob("train-*.bin"), *folder.glob("validation-*.bin")]:
                delete(path)
            delete(folder / INDEX)
            delete(folder / PROGRESS)
        known = next((folder / name for name in (INDEX, PROGRESS) if (folder / name).exists()), None)
        if known is None:
            # A tokenizer and hidden files may be what is left of a start that was killed.
            strangers = [
                path.name for path in folder.glob("*") if not path.name.startswith((".", "tokenizer"))
            ]
            if strangers:
                raise UserError(
                    f"--output_dir {folder} holds {min(strangers)}, which is no shard: choose another folder."
                )
            folder.mkdir(parents=True, exist_ok=True)
            return 0, {split: Counts() for split in SPLITS}
        state = json.loads(known.read_text(encoding="utf-8"))
        changed = [key for key, value in about.items() if state.get(key) != value]
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be used ({error.strerror}).") from error
    except (ValueError, AttributeError) as error:
        if isinstance(error, json.JSONDecodeError):
            raise UserError(
                f"{known} is damaged: start again with --overwrite_output_dir or in another folder."
            ) from error
        raise
    if changed:
        raise UserError(
            f"--output_dir {folder} holds shards with another {' and '.join(changed)}: choose another folder, or "
            "replace them with --overwrite_output_dir."
        )
    if known.name == INDEX:
        return None, {}
    return state["units"], {split: Counts(**state["splits"][split]) for split in SPLITS}


def write_progress(folder: Path, about: dict, done: int, counts: dict[str, Counts]) -> None:
    state = about | {"units": done, "splits": {split: asdict(count) for split, count in counts.items()}}
    with files_written_whole(folder) as staging:
        (staging / PROGRESS).write_text(json.dumps(state, indent=1), encoding="utf-8")


def finish(folder: Path, about: dict, writers: dict[str, SplitWriter], counts: dict[str, Counts]) -> dict:
    """Write the index, with which the shards are complete.

    Raises:
        UserError: a split holds nothing to learn from or to predict.
    """
    if counts["train"].tokens < 2:
        raise UserError(f"{about['corpus']['name']} holds no text.")
    if counts["validation"].tokens < 2:
        raise UserError(
            f"no text of {about['corpus']['name']} is held out for validation: give more text or a "
            "larger --validation_split_percentage, with --overwrite_output_dir; of less than a million characters the "
            "other recipes need no shards."
        )
    splits = {}
    for split, writer in writers.items():
        shards, seen = [], np.zeros(about["vocab_size"], dtype=bool)
        for path in writer.paths():
            sha256, in_shard = read_shard(path, writer.dtype, about["vocab_size"])
            tokens = path.stat().st_size // writer.dtype.itemsize
            shards.append({"file": path.name, "tokens": tokens, "sha256": sha256})
            seen |= in_shard
        splits[split] = asdict(counts[split]) | {
            "shards": shards,
            "unseen_ids": np.flatnonzero(~seen).tolist(),
        }
    index = about | {"splits": splits}
    with files_written_whole(folder) as staging:
        (staging / INDEX).write_text(json.dumps(index) + "\n", encoding="utf-8")
    delete(folder / PROGRESS)
    sync(folder)
    return index
