"""Tokens and characters per second: our encoding, tiktoken, and a plain call of the transformers tokenizer.

    python benchmarks/tokenization.py --corpus my_texts/ --tokenizer openai-community/gpt2
    python benchmarks/tokenization.py --corpus tiny_shakespeare --tokenizer tokenizers/tiny_shakespeare-bpe-1024 --num_proc 1

All three encode the same documents with the same vocabulary to the same ids (checked), in turn, on the same cores:
ours as prepare_corpus.py does, in processes of one thread, each time new ones that have met no word before; tiktoken
and transformers in as many threads of their own.
Needs the extra `interop`. Prints medians and ratios, and as JSON with --output_file. (The file is not called tokenize.py
because the standard library has a module of that name, which all scripts of this folder would lose.)
"""

import json
import os
import platform
import statistics
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import tiktoken
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from nanogpt_hf.common.cli import parse
from nanogpt_hf.common.errors import UserError
from nanogpt_hf.common.fields import setting
from nanogpt_hf.common.running import run_recipe
from nanogpt_hf.data.parallel_encoding import Unit, in_order, work, worker_pool
from nanogpt_hf.data.preparation import tasks, units
from nanogpt_hf.data.shards import width_of
from nanogpt_hf.data.sources import open_source
from nanogpt_hf.data.tokenization import SPELLING, load_tokenizer
from nanogpt_hf.training.reporting import library_versions

# The words of GPT-2's tokenizer, as tiktoken writes them.
WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


@dataclass
class Settings:
    corpus: str = setting("tiny_shakespeare", "as for the recipes")
    text_column: str = setting("text", "column of a .jsonl, .parquet or Hub dataset that holds the text")
    tokenizer: str = setting("openai-community/gpt2", "a byte-level BPE tokenizer's folder, or a Hub id")
    megacharacters: float = setting(20.0, "how much of the corpus")
    repetitions: int = setting(5, "rounds; each encodes everything three times, once a way")
    num_proc: int = setting(1, "cores")
    output_file: str | None = setting(None, "JSON of all measurements")


def as_tiktoken(tokenizer: PreTrainedTokenizerFast) -> tiktoken.Encoding:
    """The same vocabulary in tiktoken, where a token's id is its rank among the merges."""
    byte_of = {spelling: byte for byte, spelling in SPELLING.items()}
    special = set(tokenizer.all_special_tokens)
    ranks = {
        bytes(byte_of.get(ord(character), ord(character)) for character in token): number
        for token, number in tokenizer.get_vocab().items()
        if token not in special
    }
    return tiktoken.Encoding("same", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})


def read(settings: Settings) -> list[str]:
    """Documents of the corpus, as many as hold so many characters; of a long one its stretches."""
    texts, size = [], 0
    for unit in units(open_source(settings.corpus, text_column=settings.text_column), False, 1e-9):
        texts.append(unit.text)
        size += len(unit.text)
        if size >= settings.megacharacters * 1e6:
            break
    return texts


def ours(
    settings: Settings, tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> tuple[float, np.ndarray]:
    """Seconds, without the start of the processes, and the ids of all texts one after the other."""
    stream = tasks(Unit("train", True, text) for text in texts)
    with worker_pool(settings.tokenizer, width_of(len(tokenizer)), settings.num_proc) as pool:
        for done in [pool.submit(time.sleep, 0.5) for _ in range(settings.num_proc)]:
            done.result()
        started = time.perf_counter()
        ids = [done.splits["train"][0] for done in in_order(pool, work, stream, 2 * settings.num_proc)]
        return time.perf_counter() - started, np.concatenate(ids)


def in_time(encode) -> tuple[float, np.ndarray]:
    started = time.perf_counter()
    ids = encode()
    return time.perf_counter() - started, np.fromiter(chain.from_iterable(ids), dtype=np.int32)


def main() -> None:
    settings = parse(Settings, __doc__)
    os.environ["RAYON_NUM_THREADS"] = str(settings.num_proc)  # of the tokenizers library
    transformers_logging.set_verbosity_error()  # that the texts are longer than a model's context
    tokenizer = load_tokenizer(settings.tokenizer)
    texts, other = read(settings), as_tiktoken(tokenizer)
    ways = {
        "ours": lambda: ours(settings, tokenizer, texts),
        "tiktoken": lambda: in_time(
            lambda: other.encode_ordinary_batch(texts, num_threads=settings.num_proc)
        ),
        "transformers": lambda: in_time(lambda: tokenizer(texts, split_special_tokens=True).input_ids),
    }
    seconds, expected = {name: [] for name in ways}, None
    for number in range(settings.repetitions):
        for name, way in ways.items():
            taken, ids = way()
            seconds[name].append(taken)
            expected = ids if expected is None else expected
            if number == 0 and not np.array_equal(ids, expected):
                raise UserError(f"{name} gives other ids than ours on {settings.corpus}.")
    characters, tokens = sum(map(len, texts)), len(expected)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    results = {
        "corpus": Path(settings.corpus).name,
        "tokenizer_tokens": len(tokenizer),
        "characters": characters,
        "tokens": tokens,
        "cores": settings.num_proc,
        "machine": platform.processor() or platform.machine(),
        "seconds": seconds,
        "median_characters_per_s": {name: characters / value for name, value in median.items()},
        "median_tokens_per_s": {name: tokens / value for name, value in median.items()},
        "times_tiktoken": {name: median["tiktoken"] / value for name, value in median.items()},
        "versions": library_versions() | {"tiktoken": tiktoken.__version__},
    }
    print(
        f"{characters:,} characters, {tokens:,} tokens, {settings.num_proc} cores, median of {settings.repetitions}"
    )
    for name, value in median.items():
        print(
            f"{name:13} {characters / value / 1e6:7.2f} million characters/s {tokens / value / 1e6:7.2f} million "
            f"tokens/s {median['tiktoken'] / value:6.2f} x tiktoken"
        )
    if settings.output_file:
        Path(settings.output_file).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_recipe(main)
