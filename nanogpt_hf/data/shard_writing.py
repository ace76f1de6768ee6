"""The folder of shards in the making: what may be written there, what has been, and the index that completes it.

The shards of a split are one sequence that only grows. What has been written is put on the disk now and then, and
after it, in one small file, how much that is; to go on, what lies past it is cut off.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import count, takewhile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from transformers import PreTrainedTokenizerFast

from ..common.errors import UserError
from ..common.files import delete, files_written_whole, sync
from .shards import INDEX, PROGRESS, SHARD, SPLITS, is_shards, open_shards, read_index, read_shard

AGAIN = "start again with --overwrite_output_dir"
_OF_A_TOKENIZER = ("tokenizer", "special_tokens_map", "added_tokens", "chat_template")  # files begin so


@dataclass
class Counts:
    """How much of a split has been written."""

    tokens: int = 0
    documents: int = 0
    characters: int = 0
    bytes: int = 0  # of the text in UTF-8

    def add(self, other: "Counts") -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class State:
    """How far the work is.

    Attributes:
        units: of the corpus that are done.
        consumed: SHA-256 of their text.
        splits: what has been written of each split.
    """

    units: int
    consumed: str
    splits: dict[str, Counts]


class SplitWriter:
    """Appends to the shards of a split; what an earlier process wrote past `tokens` is cut off.

    Raises:
        UserError: there is less than `tokens`.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], shard_tokens: int, tokens: int):
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        self.tokens = tokens
        self.file: BinaryIO | None = None
        for path in shards_in(folder, split):
            number = int(path.stem.rpartition("-")[2])
            kept = max(0, min(shard_tokens, tokens - number * shard_tokens)) * dtype.itemsize
            if path.stat().st_size < kept:
                raise UserError(f"{path} is shorter than it was: {AGAIN}.")
            os.truncate(path, kept)
            if not kept:
                path.unlink()
        missing = [path for path in self.paths() if not path.exists()]
        if missing:
            raise UserError(f"{missing[0]} is missing: {AGAIN}.")

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


def shards_in(folder: Path, split: str) -> list[Path]:
    """The files of a folder that are called as the shards of a split are."""
    return sorted(path for path in folder.glob(f"{split}-*.bin") if SHARD.fullmatch(path.name))


def begin(
    folder: Path, about: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, overwrite: bool
) -> State | None:
    """How far the work in a folder is, None where it is done and whole.

    Args:
        about: what all shards of the folder have in common.
        overwrite: delete the shards that are there, and nothing else.

    Raises:
        UserError: the folder holds something else, or shards of something else.
    """
    try:
        there = is_shards(str(folder))
        if overwrite or not there:
            ours = made_there(folder) if there else []
            _check_strangers(folder, ours)
            for name in ours:
                delete(folder / name)
            folder.mkdir(parents=True, exist_ok=True)
            state = State(0, hashlib.sha256().hexdigest(), {split: Counts() for split in SPLITS})
            commit(folder, about, state)
        else:
            state = _state_of(folder, about)
        if state is None:
            open_shards(str(folder))
            return None
        with files_written_whole(folder) as staging:
            tokenizer.save_pretrained(staging)
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be used ({error.strerror}).") from error
    return state


def _state_of(folder: Path, about: Mapping[str, Any]) -> State | None:
    """How far earlier work is, None where it is done. Raises UserError where that is work on something else."""
    known = folder / (INDEX if (folder / INDEX).exists() else PROGRESS)
    try:
        found = json.loads(known.read_bytes())
        changed = [key for key, value in about.items() if found.get(key) != value]
        splits = (
            {split: Counts(**found["splits"][split]) for split in SPLITS} if known.name == PROGRESS else {}
        )
        state = State(found["units"], found["consumed"], splits) if splits else None
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{known} is damaged, or of an earlier version: {AGAIN}.") from error
    if changed:
        raise UserError(
            f"--output_dir {folder} holds shards with another {' and '.join(changed)}: choose another folder, or "
            "replace them with --overwrite_output_dir."
        )
    return state


def made_there(folder: Path) -> list[str]:
    """The files that the making of shards has left in their folder, the one last that says what they are."""
    tokenizer = [path.name for path in folder.iterdir() if path.name.startswith(_OF_A_TOKENIZER)]
    try:
        index = read_index(folder)
        shards = [shard["file"] for split in SPLITS for shard in index["splits"][split]["shards"]]
    except (UserError, OSError):  # none yet, or damaged: they were numbered from 0 on
        shards = []
        for split in SPLITS:
            names = (f"{split}-{number:05d}.bin" for number in count())
            shards += takewhile(lambda name: (folder / name).exists(), names)
    return [*shards, *tokenizer, PROGRESS, INDEX]


def _check_strangers(folder: Path, ours: list[str]) -> None:
    """Raises UserError where a folder holds something that no making of shards has left there."""
    for path in sorted(folder.iterdir() if folder.exists() else []):
        # What is hidden may be of a start that was killed.
        if path.name not in ours and not path.name.startswith("."):
            raise UserError(
                f"--output_dir {folder} holds {path.name}, which is no shard: choose another folder."
            )


def commit(folder: Path, about: Mapping[str, Any], state: State) -> None:
    """Write down how far the work is, once all shards are on the disk."""
    with files_written_whole(folder) as staging:
        (staging / PROGRESS).write_text(json.dumps({**about, **asdict(state)}, indent=1), encoding="utf-8")


def finish(
    folder: Path, about: Mapping[str, Any], writers: Mapping[str, SplitWriter], counts: Mapping[str, Counts]
) -> dict[str, Any]:
    """Write the index, with which the shards are complete.

    Raises:
        UserError: a split holds nothing to learn from or to predict; then nothing is left of the work.
    """
    for split in SPLITS:
        if counts[split].tokens < 2:
            for name in made_there(folder):
                delete(folder / name)
            with suppress(OSError):  # it holds something else
                folder.rmdir()
            remedy = "" if split == "train" else " or a larger --validation_split_percentage"
            raise UserError(f"{about['corpus']['name']} holds no text for {split}: give more text{remedy}.")
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
    index = {**about, "splits": splits}
    with files_written_whole(folder) as staging:
        (staging / INDEX).write_text(json.dumps(index) + "\n", encoding="utf-8")
    delete(folder / PROGRESS)
    sync(folder)
    return index
