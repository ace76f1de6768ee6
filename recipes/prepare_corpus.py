"""Tokenise a corpus of any size once, into shards that pretrain.py reads memory-mapped.

    python recipes/prepare_corpus.py --corpus my_texts/ --tokenizer openai-community/gpt2 --output_dir data/mine
    python recipes/prepare_corpus.py --corpus Skylion007/openwebtext --output_dir data/openwebtext   # 18 GB
    python recipes/prepare_corpus.py --corpus tiny_shakespeare --tokenizer tokenizers/tiny_shakespeare-bpe-1024 \\
        --output_dir data/tiny_shakespeare   # a small one, to try

Killed, it goes on where it was when the same command is given again, to the same bytes. A Hub dataset is downloaded
by `datasets` and read from its memory-mapped cache; a folder, glob or file is read as a stream. So the memory that it
takes does not grow with the corpus. What it makes: train-*.bin and validation-*.bin (uint16, or uint32 for more than
65,536 tokens), index.json, and the tokenizer.

A validation split of the corpus's own is kept. Of all else one stretch (a document, or 65,536 characters of a longer
one) in 2,000 is held out, as usual for OpenWebText: small, because pretraining evaluates on the whole of it.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from nanogpt_hf.common.cli import parse, run_recipe
from nanogpt_hf.common.errors import UserError
from nanogpt_hf.common.settings import setting
from nanogpt_hf.data.preparation import prepare


@dataclass
class PreparationSettings:
    corpus: str = setting(
        "tiny_shakespeare", "tiny_shakespeare, tiny_pushkin, a file, folder or glob, or a Hub dataset"
    )
    text_column: str = setting("text", "column of a .jsonl, .parquet or Hub dataset that holds the text")
    tokenizer: str = setting("openai-community/gpt2", "a tokenizer's folder, or a Hub id")
    output_dir: str | None = setting(None, "folder for the shards; default data/CORPUS")
    overwrite_output_dir: bool = setting(False, "replace the shards that are in the folder")
    validation_split_percentage: float = setting(
        0.05,
        "percent of the text held out, where the corpus has no validation split; more for less than 100 MB",
    )
    shard_tokens: int = setting(10**8, "tokens a shard")
    num_proc: int = setting(0, "processes that tokenise; default: one a core")

    def __post_init__(self):
        if not 0 < self.validation_split_percentage <= 50:
            raise UserError(
                f"--validation_split_percentage is {self.validation_split_percentage}, it must be more than 0 and at "
                "most 50."
            )
        for name, least in (("shard_tokens", 1), ("num_proc", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name} is {getattr(self, name)}, it must be at least {least}.")
        self.output_dir = os.path.expanduser(
            self.output_dir or f"data/{Path(self.corpus.rstrip('/*')).stem or 'corpus'}"
        )
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.num_proc = self.num_proc or cores


def main() -> None:
    settings = parse(PreparationSettings, __doc__)
    started = time.perf_counter()
    index = prepare(
        settings.corpus,
        os.path.expanduser(settings.tokenizer),
        settings.output_dir,
        text_column=settings.text_column,
        validation_split_percentage=settings.validation_split_percentage,
        shard_tokens=settings.shard_tokens,
        num_proc=settings.num_proc,
        overwrite=settings.overwrite_output_dir,
    )
    if index["corpus"]["notice"]:
        print(f"NOTE: {index['corpus']['notice']}")
    for name, split in index["splits"].items():
        print(
            f"{name:10}  {split['tokens']:,} tokens, {split['documents']:,} documents, {split['characters']:,} "
            f"characters in {len(split['shards'])} shards of {index['dtype']}"
        )
    print(f"{settings.output_dir}, {time.perf_counter() - started:.1f} s")
    print(f"train on it   accelerate launch recipes/pretrain.py --corpus {settings.output_dir}")


if __name__ == "__main__":
    run_recipe(main)
