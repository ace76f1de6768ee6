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
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nanogpt_hf.common.cli import parse
from nanogpt_hf.common.fields import changed, setting
from nanogpt_hf.common.paths import check_model_name
from nanogpt_hf.common.recipes import command
from nanogpt_hf.common.running import run_recipe, tell
from nanogpt_hf.common.settings import TextSettings, short_name
from nanogpt_hf.common.text import counted
from nanogpt_hf.data.sources import check_corpora


@dataclass(frozen=True)
class PreparationSettings(TextSettings):
    """Shards"""

    validation_split_percentage: float = changed(
        TextSettings,
        "validation_split_percentage",
        0.05,
        help="percent of the text that is held out where nothing else is; more for less than 100 MB",
        bounds={"gt": 0, "lt": 100},
    )
    tokenizer: str = setting("openai-community/gpt2", "a tokenizer's folder, or a Hub id", essential=True)
    output_dir: str | None = setting(None, "folder for the shards; default data/CORPUS", essential=True)
    overwrite_output_dir: bool = setting(False, "replace the shards that are in the folder")
    shard_tokens: int = setting(10**8, "tokens per shard", ge=1)
    num_proc: int = setting(0, "processes that tokenise; default: one per core", ge=0)

    def folder(self) -> str:
        return self.output_dir or str(Path("data", short_name(self.corpus)))


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(PreparationSettings, __doc__, argv)
    check_corpora(settings.corpus, settings.validation_file)
    check_model_name(settings.tokenizer)
    from nanogpt_hf.data.preparation import prepare  # with torch, which takes seconds

    started = time.perf_counter()
    index = prepare(
        settings.corpus,
        settings.tokenizer,
        settings.folder(),
        validation_split_percentage=settings.validation_split_percentage,
        shard_tokens=settings.shard_tokens,
        num_proc=settings.num_proc or cores(),
        overwrite=settings.overwrite_output_dir,
        say=tell,
        **settings.reading_options(),
    )
    characters = sum(split["characters"] for split in index["splits"].values())
    for name, split in index["splits"].items():
        tell(
            f"{name:10} {split['tokens']:,} tokens, {counted(split['documents'], 'document')}, {split['characters']:,} "
            f"characters ({split['characters'] / characters:.2%}) in {counted(len(split['shards']), 'shard')} of "
            f"{index['dtype'][-1]} bytes a token"
        )
    tell(f"{settings.folder()}, {time.perf_counter() - started:.1f} s")
    tell(f"train on it   {command('pretrain')} --corpus {shlex.quote(settings.folder())}")


if __name__ == "__main__":
    run_recipe(main)
