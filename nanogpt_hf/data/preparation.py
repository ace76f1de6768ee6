"""A corpus of any size to shards: read as a stream, tokenised in parallel, resumable after a kill at any moment.

The bytes are the same however often the work was interrupted, and whatever the number of processes.
"""

import hashlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from itertools import chain, count, islice
from math import ceil
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from ..common.errors import UserError
from ..common.reading_options import USUAL_READING, ReadingOptions
from ..common.recipes import command
from ..common.text import without_home
from .first_screen import lines_on_files, lines_on_text
from .named_corpora import NAMES
from .parallel_encoding import Encoder, Task, Unit, encode_tasks
from .shard_writing import AGAIN, SplitWriter, State, begin, commit, finish
from .shards import FORMAT, SPLITS, read_index, vocabulary_sha256, width_of
from .sources import Source, open_source
from .splits import split_at_the_end
from .token_stream import mix
from .tokenization import load_tokenizer, pieces

UNIT = 2**16  # characters: of a longer document each such stretch is held out, or not, by itself
TASK = 2**20  # characters that a process gets at once
COMMIT_SECONDS = 5.0
OF_A_SOURCE = ("source", "language", "license", "notice")  # what the index says of it


def units(source: Source, whole_documents: bool, percent: float) -> Iterator[Unit]:
    """The text of a corpus with the split of each stretch.

    Where the source has no validation split of its own, `percent` % of the units are held out.
    """
    number, held_out = 0, held_out_units(percent)
    next_held_out = next(held_out) if "validation" not in source.splits else -1
    for name in (name for name in SPLITS if name in source.splits):
        for document in (document for documents in source.splits[name] for document in documents):
            before = None
            for text in ["".join(document)] if whole_documents else stretches(document):
                if not text:
                    continue
                split = name
                if number == next_held_out:
                    split, next_held_out = "validation", next(held_out)
                yield Unit(split, split == before, text)
                before = split
                number += 1


def held_out_units(percent: float) -> Iterator[int]:
    """The numbers of the units that are held out: one of every 100 / `percent`, chosen by a hash.

    They depend on nothing else: the end of a stream is not known before it has come, and the last part of a sorted
    corpus is not like the rest.
    """
    share = Fraction(str(percent)) / 100
    for number in count():
        first, after = ceil(number / share), ceil((number + 1) / share)
        # The first comes early, so that a short corpus has one.
        size = after - first if number else min(after - first, 16)
        yield first + int(mix(np.uint64(number)) % np.uint64(size))


def stretches(document: Iterable[str]) -> Iterator[str]:
    """A document that comes in parts, cut where no token spans the place, whatever the parts were."""
    rest = ""
    for part in document:
        *whole, rest = pieces(rest + part, UNIT)
        yield from whole
    yield rest


def tasks(stream: Iterable[Unit], consumed: Any = None) -> Iterator[Task]:
    """The units in tasks.

    Args:
        consumed: a hashlib SHA-256 of the units before.
    """
    consumed = consumed or hashlib.sha256()
    task: list[Unit] = []
    size = 0
    for unit in stream:
        update(consumed, unit)
        task.append(unit)
        size += len(unit.text)
        if size >= TASK:
            yield Task(task, consumed.hexdigest())
            task, size = [], 0
    if task:
        yield Task(task, consumed.hexdigest())


def update(consumed: Any, unit: Unit) -> None:
    """Add a unit to a SHA-256."""
    consumed.update(f"\0{unit.split}{unit.continues}\0".encode() + unit.text.encode(errors="surrogatepass"))


def prepare(
    corpus: str,
    tokenizer_name: str,
    output_dir: str,
    *,
    validation_split_percentage: float = 0.05,
    shard_tokens: int = 10**8,
    num_proc: int = 1,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
    **options: Unpack[ReadingOptions],
) -> dict[str, Any]:
    """Make the shards, or go on making them, and return their index.

    Args:
        tokenizer_name: a folder or a Hub id.
        num_proc: processes that tokenise.
        overwrite: replace the shards in the folder.
        say: called with lines on what is read and how.
        options: how the text is read.

    Raises:
        UserError: the corpus, the tokenizer or the folder cannot be used, or the folder holds other shards.
    """
    if tokenizer_name in ("char", "bpe"):
        raise UserError(
            f"--tokenizer {tokenizer_name} has to be trained first: run {command('train_tokenizer')} --kind "
            f"{tokenizer_name} --corpus {corpus}, and give the folder that it makes."
        )
    tokenizer, folder = load_tokenizer(tokenizer_name), Path(output_dir)
    options = {**USUAL_READING, **options}
    source = open_source(corpus, **options)
    if corpus in NAMES and options["validation_file"] is None:
        _keep_named_split(source)
    about = _about(corpus, tokenizer, source, options, shard_tokens, validation_split_percentage)
    encoder = Encoder(tokenizer, width_of(len(tokenizer)), options["special_tokens_in_text"] == "tokens")
    stream = units(source, encoder.encode_text is None, validation_split_percentage)
    first = next(stream, None)
    if first is None:
        raise UserError(f"{corpus} holds no text.")
    state = begin(folder, about, tokenizer, overwrite)
    if state is None:
        say(f"shards     in {folder} since before, and whole")
        return read_index(folder)
    notice = [f"NOTE: {source.notice}"] if source.notice else []
    source.held_out = (
        source.held_out or f"{validation_split_percentage:g}% of all stretches of {UNIT:,} characters"
    )
    for line in [*notice, *lines_on_files(without_home(corpus), source)]:
        say(line)
    index = _make(chain([first], stream), source, state, folder, about, encoder, num_proc)
    for line in lines_on_text(source.reading):
        say(line)
    return index


def _about(
    corpus: str,
    tokenizer: PreTrainedTokenizerFast,
    source: Source,
    options: ReadingOptions,
    shard_tokens: int,
    percent: float,
) -> dict[str, Any]:
    """What all shards of a folder have in common, as their index says it."""
    # None stands for what is usual, as it does in an index that does not name them.
    unusual = {name: value if USUAL_READING.get(name) != value else None for name, value in options.items()}
    if options["validation_file"]:
        unusual["validation_file"] = without_home(options["validation_file"])
    return {
        "format": FORMAT,  # first, where `is_shards` looks for it
        **unusual,
        "corpus": {"name": without_home(corpus), **{key: getattr(source, key) for key in OF_A_SOURCE}},
        "text_column": options["text_column"],
        "source_size": source.size,
        "vocabulary_sha256": vocabulary_sha256(tokenizer),
        "vocab_size": len(tokenizer),
        "dtype": width_of(len(tokenizer)).str,
        "shard_tokens": shard_tokens,
        "validation_split": "its own" if "validation" in source.splits else f"{percent:g}%",
    }


def _keep_named_split(source: Source) -> None:
    """The last 10% of a named corpus, on which all comparisons are made, become its validation split."""
    source.held_out = "the last 10% of the text"
    texts = ["".join(parts) for documents in source.splits["train"] for parts in documents]
    splits = split_at_the_end([texts], 10)
    source.splits = {name: [[[text] for text in documents]] for name, documents in splits.items()}


def _make(
    stream: Iterator[Unit],
    source: Source,
    state: State,
    folder: Path,
    about: dict[str, Any],
    encoder: Encoder,
    num_proc: int,
) -> dict[str, Any]:
    """Tokenise and write what is still to be done, and finish."""
    shard_tokens, done, consumed = about["shard_tokens"], 0, hashlib.sha256()
    for unit in islice(stream, state.units):
        update(consumed, unit)
        done += 1
    if done < state.units or consumed.hexdigest() != state.consumed:
        raise UserError(
            f"{about['corpus']['name']} is no longer the text that {folder} was begun on: {AGAIN}."
        )
    writers = {
        split: SplitWriter(folder, split, encoder.dtype, shard_tokens, state.splits[split].tokens)
        for split in SPLITS
    }
    bar = _bar(source)
    committed = time.monotonic()
    for encoded in encode_tasks(tasks(stream, consumed), folder, encoder, num_proc):
        for split, (ids, new) in encoded.splits.items():
            if not state.splits[split].tokens and len(ids):
                ids, new.tokens = ids[1:], new.tokens - 1  # nothing ends before the first document
            writers[split].append(ids)
            state.splits[split].add(new)
        state.units += encoded.units
        state.consumed = encoded.consumed
        bar.set_postfix_str(f"{state.splits['train'].tokens:,} tokens", refresh=False)
        bar.update(source.reading.done - bar.n)
        if time.monotonic() - committed > COMMIT_SECONDS:
            for writer in writers.values():
                writer.sync()
            commit(folder, about, state)
            committed = time.monotonic()
    bar.close()
    for writer in writers.values():
        writer.close()
    commit(folder, about, state)
    return finish(folder, about, writers, state.splits)


def _bar(source: Source) -> Any:
    return tqdm(
        total=source.size or None,
        initial=source.reading.done,
        disable=not sys.stderr.isatty(),
        unit_scale=True,
        dynamic_ncols=True,
        bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
    )
