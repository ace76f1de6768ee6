"""A corpus as token ids in files: shards, their index and their tokenizer, in one folder.

A shard is nothing but ids, little-endian and of one width, as nanoGPT's train.bin; together those of a split are one
sequence. The index says how many ids each holds and their SHA-256, so that what is read is what was written.
"""

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from ..common.errors import UserError
from .first_screen import misfit
from .token_stream import MappedIds
from .tokenization import load_tokenizer

INDEX = "index.json"
PROGRESS = "progress.json"  # of shards in the making
FORMAT = "nanogpt_hf shards, version 1"
SPLITS = ("validation", "train")
SHARD = re.compile(r"(train|validation)-\d{5,}\.bin")  # how the files are called
READ = 2**24  # bytes at once
RESTORE = "copy it again, or prepare the corpus again with --overwrite_output_dir"


def vocabulary_sha256(tokenizer: PreTrainedTokenizerFast) -> str:
    """Of all tokens with their ids: two tokenizers that agree in it mean the same by an id."""
    tokens = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def width_of(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def is_shards(folder: str) -> bool:
    """Whether there are shards in the folder, finished or not."""
    for name in (INDEX, PROGRESS):
        path = Path(os.path.expanduser(folder), name)
        with suppress(OSError, ValueError):
            if path.is_file():  # and no pipe, which may never end
                with path.open("rb") as file:
                    if FORMAT.encode() in file.read(200):
                        return True
    return False


def read_shard(path: Path, dtype: np.dtype, vocab_size: int) -> tuple[str, np.ndarray]:
    """The SHA-256 of a shard, and which of the ids below vocab_size it holds, V.

    Raises:
        UserError: it holds other ids.
    """
    digest, seen = hashlib.sha256(), np.zeros(vocab_size, dtype=bool)
    with path.open("rb") as file:
        while block := file.read(READ):
            digest.update(block)
            ids = np.frombuffer(block, dtype=dtype)
            if ids.max() >= vocab_size:
                raise UserError(
                    f"the shard {path.name} holds the id {ids.max()}, but its tokenizer has {vocab_size} tokens: "
                    "prepare the corpus again."
                )
            seen[ids] = True
    return digest.hexdigest(), seen


@dataclass(frozen=True)
class ShardedCorpus:
    """What `Corpus` is for text, for a folder of shards: the ids are there already, the text is not."""

    name: str  # of the corpus that the shards were made of
    sha256: str  # of the index, which holds that of each shard
    source: str
    language: str | None
    license: str | None
    notice: str | None
    folder: Path = field(repr=False)
    index: dict[str, Any] = field(repr=False)

    def make_tokenizer(self, kind: str, vocab_size: int) -> PreTrainedTokenizerFast:
        """The tokenizer that the shards were made with, if `kind` names it.

        Raises:
            UserError: it names another, or asks to train one.
        """
        if kind in ("char", "bpe"):
            raise UserError(
                f"{self.folder} is tokenised already, so no {kind} tokenizer is trained on it: give --tokenizer "
                f"{self.folder}."
            )
        tokenizer = load_tokenizer(kind)
        self.ids("validation", tokenizer)
        return tokenizer

    def ids(self, split: str, tokenizer: PreTrainedTokenizerFast) -> MappedIds:
        """The token ids of "train" or "validation", memory-mapped.

        Raises:
            UserError: the shards were made with another tokenizer.
        """
        if vocabulary_sha256(tokenizer) != self.index["vocabulary_sha256"]:
            raise UserError(
                f"the shards in {self.folder} were made with another tokenizer: give --tokenizer {self.folder}, or "
                "prepare the corpus again with this one."
            )
        shards = self.index["splits"][split]["shards"]
        dtype = np.dtype(self.index["dtype"])
        return MappedIds([np.memmap(self.folder / shard["file"], dtype, mode="r") for shard in shards])

    def unseen_ids(self, tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> list[int]:
        """Those below vocab_size that the training split does not hold."""
        return [*self.index["splits"]["train"]["unseen_ids"], *range(self.index["vocab_size"], vocab_size)]

    def characters(self, split: str) -> int:
        return int(self.index["splits"][split]["characters"])

    validation_sha256 = None  # that of the index says it

    @property
    def reading(self) -> list[str]:
        """Lines for the first screen."""
        shards = sum(len(split["shards"]) for split in self.index["splits"].values())
        held_out = self.characters("validation")
        whole = held_out + self.characters("train")
        return [
            f"corpus     {self.name}: {whole:,} characters, tokenised in {shards:,} shards",
            f"validation {held_out:,} of these characters: {held_out / whole:.2%}, held out when they were made",
        ]

    def remarks(self, tokenizer: PreTrainedTokenizerFast) -> list[str]:
        """Lines for the first screen: how well the tokenizer and the text go together."""
        ids = self.ids("validation", tokenizer)
        whole = ids.windows(np.array([0]), len(ids))[0]
        warning = misfit(tokenizer, whole, self.characters("validation"))
        return [f"warning: {warning}"] if warning else []

    @property
    def train(self) -> list[str]:
        raise UserError(f"{self.folder} holds shards, of which the training text is not kept: give the text.")

    @cached_property
    def validation(self) -> list[str]:
        """The documents of the validation split, decoded."""
        tokenizer = load_tokenizer(str(self.folder))
        ids = self.ids("validation", tokenizer)
        ids = ids.windows(np.array([0]), len(ids))[0]
        ends = np.flatnonzero(ids == tokenizer.eos_token_id)
        return [
            str(tokenizer.decode(part[part != tokenizer.eos_token_id].tolist()))
            for part in np.split(ids, ends)
        ]


def read_index(folder: Path) -> dict[str, Any]:
    """The index of the shards in a folder, which may come from a stranger.

    Raises:
        UserError: it is none, of another format, or damaged.
    """
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_bytes())
        stated = index.get("format")
        sound = stated == FORMAT and _is_sound(index)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder}/{INDEX} is not an index of shards: prepare the corpus again.") from error
    if stated != FORMAT:
        raise UserError(f"{folder} holds {stated!r}, not {FORMAT!r}: prepare the corpus again.")
    if not sound:
        raise UserError(f"{folder}/{INDEX} is not an index of shards: prepare the corpus again.")
    return index


def _is_sound(index: dict[str, Any]) -> bool:
    """Whether every value of an index is what it must be; KeyError, TypeError or AttributeError say no, too."""

    def is_count(value: object, least: int = 0) -> bool:
        return type(value) is int and least <= value < 2**63

    def is_sha256(value: str) -> bool:
        return re.fullmatch("[0-9a-f]{64}", value) is not None

    vocab_size, corpus = index["vocab_size"], index["corpus"]
    words = [corpus["name"], corpus["source"]]
    words += [corpus[key] for key in ("language", "license", "notice") if corpus[key] is not None]
    sound = [
        corpus.keys() == {"name", "source", "language", "license", "notice"},
        all(isinstance(word, str) for word in words),
        is_count(vocab_size, 1),
        index["dtype"] == width_of(vocab_size).str,
        is_sha256(index["vocabulary_sha256"]),
    ]
    for name in SPLITS:
        split, shards = index["splits"][name], index["splits"][name]["shards"]
        sound += [
            all(is_count(split[key], 1) for key in ("documents", "characters", "bytes")),
            is_count(split["tokens"], 2) and split["tokens"] == sum(shard["tokens"] for shard in shards),
            all(is_count(number) and number < vocab_size for number in split["unseen_ids"]),
        ]
        for number, shard in enumerate(shards):
            # Its own file, in this folder: what is checked is what is read.
            sound += [shard["file"] == f"{name}-{number:05d}.bin", is_count(shard["tokens"], 1)]
            sound.append(is_sha256(shard["sha256"]))
    return all(sound)


def open_shards(folder: str) -> ShardedCorpus:
    """The corpus in a folder of shards, every one of which is read once to check it, on each machine by one process.

    Raises:
        UserError: there is no whole index, or a shard is missing, of the wrong size or altered.
    """
    path = Path(os.path.expanduser(folder))
    if not (path / INDEX).exists():
        raise UserError(f"the shards in {folder} are not finished: run prepare_corpus.py on it again.")
    index = read_index(path)
    dtype, vocab_size = np.dtype(index["dtype"]), index["vocab_size"]
    shards = [shard for split in SPLITS for shard in index["splits"][split]["shards"]]
    for shard in shards:
        file, expected = path / shard["file"], shard["tokens"] * dtype.itemsize
        if not file.is_file():
            raise UserError(f"the shard {file.name} is missing from {folder}: {RESTORE}.")
        if file.stat().st_size != expected:
            raise UserError(
                f"the shard {file.name} in {folder} has {file.stat().st_size:,} bytes, its index says {expected:,}: "
                f"{RESTORE}."
            )
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            read = pool.map(lambda shard: read_shard(path / shard["file"], dtype, vocab_size), shards)
            for shard, (actual, _) in zip(shards, read, strict=True):
                if actual != shard["sha256"]:
                    raise UserError(
                        f"the shard {shard['file']} in {folder} is not what was written (SHA-256 {actual[:12]}…, not "
                        f"{shard['sha256'][:12]}…): {RESTORE}."
                    )
    sha256 = hashlib.sha256((path / INDEX).read_bytes()).hexdigest()
    return ShardedCorpus(sha256=sha256, folder=path, index=index, **index["corpus"])
