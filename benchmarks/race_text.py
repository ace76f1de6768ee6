"""One text for pretraining_race.py: as our shards, as nanoGPT's train.bin and as nanochat's data folder."""

import gzip
import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from peers import ROOT

DOCUMENT = 40_000  # characters at most
NANOCHAT_DOCUMENT = (
    1023  # tokens: with its first one nanochat's row of 1,024 holds one document and nothing is cropped
)
NANOCHAT_MARKS = (
    "bos user_start user_end assistant_start assistant_end python_start python_end output_start output_end"
).split()
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


def texts_of_packages(names: Sequence[str], folder: Path) -> Path:
    """The prose in Debian packages as .jsonl: plain text, reStructuredText and compressed dictionaries, shuffled."""
    unpacked, output = folder / "packages", folder / "text.jsonl"
    if output.exists():
        return output
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", *names], cwd=folder, check=True)
    for package in sorted(folder.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", package, unpacked], check=True)
    pieces = [
        text[start : start + DOCUMENT] for text in _prose(unpacked) for start in range(0, len(text), DOCUMENT)
    ]
    np.random.default_rng(0).shuffle(pieces)
    with output.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": piece}, ensure_ascii=False) + "\n" for piece in pieces)
    return output


def _prose(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*")):
        name = f"/{path.relative_to(folder)}"
        if path.is_symlink() or not path.is_file() or "/html/" in name or "changelog" in name:
            continue
        if name.endswith((".gz", ".dz")):
            try:
                text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
            except (OSError, EOFError):
                continue
        elif name.endswith((".txt", ".rst")):
            text = path.read_text("utf-8", "replace")
        else:
            continue
        if len(text) > 200:
            yield text


def make_shards(corpus: str, tokenizer: str, folder: Path) -> Path:
    """Shards of any corpus in GPT-2's tokens, 2% of it held out."""
    command = [sys.executable, ROOT / "recipes" / "prepare_corpus.py", "--corpus", corpus]
    command += ["--tokenizer", tokenizer, "--validation_split_percentage", "2", "--output_dir", folder]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return folder


def ids_of(shards: Path, split: str) -> np.ndarray:
    index = json.loads((shards / "index.json").read_bytes())
    files = [shards / shard["file"] for shard in index["splits"][split]["shards"]]
    return np.concatenate([np.fromfile(file, dtype=index["dtype"]) for file in files])


def for_nanogpt(shards: Path, nanogpt_dir: str, folder: Path) -> Path:
    """A copy of nanoGPT with the text as its dataset `race`."""
    shutil.copytree(nanogpt_dir, folder, ignore=shutil.ignore_patterns("assets", "*.ipynb", ".git"))
    (folder / "data" / "race").mkdir(parents=True)
    for split, name in (("train", "train"), ("validation", "val")):
        ids_of(shards, split).astype(np.uint16).tofile(folder / "data" / "race" / f"{name}.bin")
    return folder


def for_nanochat(shards: Path, base: Path) -> None:
    """The folder that NANOCHAT_BASE_DIR names: a tokenizer with GPT-2's tokens, and the text in parquet files."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    encoding, ordinary = _tiktoken_encoding(shards, base)
    (base / "tokenizer").mkdir(parents=True)
    (base / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(encoding))
    lengths = [len(encoding.decode_single_token_bytes(token)) for token in range(ordinary)]
    lengths += [0] * (encoding.n_vocab - ordinary)  # its marks spell nothing
    torch.save(torch.tensor(lengths, dtype=torch.int32), base / "tokenizer" / "token_bytes.pt")
    (base / "base_data_climbmix").mkdir()
    for split, name in (
        ("train", "shard_00000"),
        ("validation", "shard_06542"),
    ):  # it validates on the last one
        ids = ids_of(shards, split)
        starts = range(0, len(ids) - NANOCHAT_DOCUMENT, NANOCHAT_DOCUMENT)
        rows = [ids[start : start + NANOCHAT_DOCUMENT] for start in starts]
        texts = encoding.decode_batch([row[row < ordinary].tolist() for row in rows])
        table = pa.table({"text": [text for text in texts if text]})
        pq.write_table(table, base / "base_data_climbmix" / f"{name}.parquet", row_group_size=256)
    for module in ("wandb", "rustbpe"):  # imported at its start, and not used here
        if importlib.util.find_spec(module) is None:
            (base / f"{module}.py").touch()


def _tiktoken_encoding(shards: Path, base: Path):
    """GPT-2's tokens with nanochat's marks, and how many of them are not marks."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    bpe = json.loads((shards / "tokenizer.json").read_bytes())["model"]
    base.mkdir(parents=True)
    (base / "encoder.json").write_text(json.dumps(bpe["vocab"]), encoding="utf-8")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"]]
    (base / "vocab.bpe").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    ranks = data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(base / "vocab.bpe"), encoder_json_file=str(base / "encoder.json")
    )
    special = {f"<|{mark}|>": len(ranks) + number for number, mark in enumerate(NANOCHAT_MARKS)}
    encoding = tiktoken.Encoding("gpt2", pat_str=GPT2_WORDS, mergeable_ranks=ranks, special_tokens=special)
    return encoding, len(ranks)
