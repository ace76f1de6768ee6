"""A corpus as token ids in files: shards, their index and their tokenizer, in one folder.

A shard is nothing but ids, little-endian and of one width, as nanoGPT's train.bin; together those of a split are one
sequence. The index says how many ids each holds and their SHA-256, so that what is read is what was written.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from ..common.errors import UserError
from .token_stream import MappedIds
from .tokenization import load_tokenizer

INDEX = "index.json"
PROGRESS = "progress.json"  # of shards in the making
FORMAT = "nanogpt_hf shards, version 1"
SPLITS = ("validation", "train")
READ = 2**24  # bytes at once


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
    index: dict = field(repr=False)

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
        return self.index["splits"][split]["characters"]

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
            tokenizer.decode(part[part != tokenizer.eos_token_id].tolist()) for part in np.split(ids, ends)
        ]


def open_shards(folder: str) -> ShardedCorpus:
    """The corpus in a folder of shards, every one of which is read once to check it, on each machine by one process.

    Raises:
        UserError: there is no whole index, or a shard is missing, of the wrong size or altered.
    """
    path = Path(os.path.expanduser(folder))
    if not (path / INDEX).exists():
        raise UserError(f"the shards in {folder} are not finished: run prepare_corpus.py on it again.")
    data = (path / INDEX).read_bytes()
    try:
        index = json.loads(data)
        corpus, shards = index["corpus"], [s for split in SPLITS for s in index["splits"][split]["shards"]]
        dtype, vocab_size = np.dtype(index["dtype"]), index["vocab_size"]
        files = [(path / Path(shard["file"]).name, shard["tokens"], shard["sha256"]) for shard in shards]
        corpus = ShardedCorpus(sha256=hashlib.sha256(data).hexdigest(), folder=path, index=index, **corpus)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}/{INDEX} is not an index of shards: prepare the corpus again.") from error
    if index.get("format") != FORMAT:
        raise UserError(f"{folder} holds {index.get('format')!r}, not {FORMAT!r}: prepare the corpus again.")
    for file, tokens, _ in files:
        if not file.is_file():
            raise UserError(f"the shard {file.name} is missing from {folder}: copy or prepare it again.")
        if file.stat().st_size != tokens * dtype.itemsize:
            raise UserError(
                f"the shard {file.name} in {folder} has {file.stat().st_size:,} bytes, its index says "
                f"{tokens * dtype.itemsize:,}: copy or prepare it again."
            )
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            read = pool.map(lambda item: read_shard(item[0], dtype, vocab_size), files)
            for (file, _, sha256), (actual, _) in zip(files, read, strict=True):
                if actual != sha256:
                    raise UserError(
                        f"the shard {file.name} in {folder} is not what was written (SHA-256 {actual[:12]}…, not "
                        f"{sha256[:12]}…): copy or prepare it again."
                    )
    return corpus
