"""Shards: the ids of the text, to the byte, however they were made; and every fault one sentence."""

import json
import os
import random
import re
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Run, digests, finished, metrics, train_here, training_words, without_times

from nanogpt_hf.data import preparation
from nanogpt_hf.data.corpora import load_corpus
from nanogpt_hf.data.preparation import prepare, stretches
from nanogpt_hf.data.shards import open_shards, width_of
from nanogpt_hf.data.sources import open_source
from nanogpt_hf.data.token_stream import MappedIds, TokenStream
from nanogpt_hf.data.tokenization import encode, encode_documents, load_tokenizer
from recipes.pretrain import main as pretrain_main

TOKENIZER = str(Path(__file__).parents[1] / "tokenizers" / "tiny_shakespeare-bpe-1024")
WORDS = "To be or not to be, that's the question:\tмороз и солнце 👩‍👩‍👧 \x1c 1st\r\n<|endoftext|> ".split(
    " "
)


def documents(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 60))) for _ in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def ids_of(folder: Path, split: str) -> np.ndarray:
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    files = [folder / shard["file"] for shard in index["splits"][split]["shards"]]
    return np.concatenate([np.fromfile(file, index["dtype"]) for file in files])


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """With a validation split of its own."""
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "train.jsonl", [*documents(60), "", *documents(60, 1)])
    write_jsonl(folder / "val.jsonl", documents(9, 2))
    return folder


@pytest.fixture(scope="module")
def shards(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "shards"
    prepare(str(corpus), TOKENIZER, str(folder), shard_tokens=700)
    return folder


# --- what they hold ---


def test_the_ids_are_those_of_the_text(corpus, shards):
    tokenizer, text = load_tokenizer(TOKENIZER), load_corpus(str(corpus))
    ours = load_corpus(str(shards))
    assert len(ours.index["splits"]["train"]["shards"]) > 3
    for split, texts in (("train", text.train), ("validation", text.validation)):
        expected = encode_documents(tokenizer, texts)
        assert np.array_equal(ids_of(shards, split), expected)
        assert np.array_equal(ours.ids(split, tokenizer).windows(np.array([0]), len(expected))[0], expected)
        counted = ours.index["splits"][split]
        assert counted["characters"] == ours.characters(split) == text.characters(split)
        assert counted["bytes"] == sum(len(text.encode()) for text in texts)
        assert counted["documents"] == len(texts)
    assert ours.validation == text.validation
    assert ours.unseen_ids(tokenizer, 1030) == text.unseen_ids(tokenizer, 1030)
    assert load_tokenizer(str(shards)).get_vocab() == tokenizer.get_vocab()


@given(seed=st.integers(0, 10**6), size=st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_a_document_is_cut_alike_however_its_parts_come(seed, size):
    text = " ".join(documents(400, seed))
    whole = list(stretches([text]))
    rng, parts, start = random.Random(seed), [], 0
    while start < len(text):
        parts.append(text[start : start + rng.randint(1, size * 1000)])
        start += len(parts[-1])
    assert list(stretches(parts)) == whole and "".join(whole) == text


def test_a_long_text_is_held_out_in_stretches(tmp_path):
    text = "\n".join(documents(6000))
    (tmp_path / "text.txt").write_bytes(text.encode())
    unchanged = {"keep_carriage_returns": True, "special_tokens_in_text": "text"}
    percent = {"validation_split_percentage": 25}
    prepare(str(tmp_path / "text.txt"), TOKENIZER, str(tmp_path / "shards"), **percent, **unchanged)
    source = open_source(str(tmp_path / "text.txt"), **unchanged)
    all_units = list(preparation.units(source, False, 25))
    assert "".join(unit.text for unit in all_units) == text and len(all_units) > 8
    for start in range(0, len(all_units) - 3, 4):
        assert [unit.split for unit in all_units[start : start + 4]].count("validation") == 1
    runs = {"train": [], "validation": []}  # texts between end-of-text tokens
    for before, unit in zip([None, *all_units], all_units, strict=False):
        if before and unit.split == before.split:
            runs[unit.split][-1] += unit.text
        else:
            runs[unit.split].append(unit.text)
    tokenizer = load_tokenizer(TOKENIZER)
    for split, texts in runs.items():
        assert np.array_equal(ids_of(tmp_path / "shards", split), encode_documents(tokenizer, texts))


def test_a_named_corpus_keeps_its_last_tenth(tmp_path):
    if not os.environ.get("NANOGPT_HF_DATA"):
        pytest.skip("NANOGPT_HF_DATA is not set")
    named = load_corpus("tiny_shakespeare")
    prepare("tiny_shakespeare", TOKENIZER, str(tmp_path / "shards"))
    assert np.array_equal(
        ids_of(tmp_path / "shards", "validation"), encode(load_tokenizer(TOKENIZER), named.validation[0])
    )


def test_ids_take_the_smallest_width():
    assert width_of(50257) == width_of(65536) == np.uint16 and width_of(65537) == np.uint32


# --- made in parallel, killed, made again ---


def slowly():
    """Many small tasks, each put on the disk."""
    preparation.TASK, preparation.COMMIT_SECONDS = 1000, 0.0


def written(folder: Path) -> int:
    """Bytes of the shards in a folder that another process may be changing."""
    size = 0
    for path in folder.glob("*.bin"):
        with suppress(FileNotFoundError):  # what was not committed is taken away again
            size += path.stat().st_size
    return size


def test_kills_at_any_moment_leave_the_same_bytes(corpus, shards, tmp_path):
    folder, rng, killed = tmp_path / "killed", random.Random(os.environ.get("NANOGPT_HF_SEED", 7)), 0
    words = f"--corpus {corpus} --tokenizer {TOKENIZER} --output_dir {folder} --shard_tokens 700 --num_proc 1"
    whole = written(shards)
    while True:
        before = written(folder)
        run = Run(words.split(), recipe="prepare_corpus.py", prepare=(slowly,))
        goal = before + rng.randint(1, whole // 3)
        while run.process.is_alive() and written(folder) < goal:
            time.sleep(0.001)
        if run.process.is_alive():
            run.signal(signal.SIGKILL)
        if run.wait() == 0:
            break
        assert run.process.exitcode == -signal.SIGKILL, run.said()
        killed += 1
    assert killed >= 3
    assert bytes_of(folder) == bytes_of(shards)


def test_several_processes_make_the_same_bytes(corpus, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "TASK", 2000)
    prepare(str(corpus), TOKENIZER, str(tmp_path / "again"), shard_tokens=700, num_proc=2)
    assert bytes_of(tmp_path / "again") == bytes_of(shards)


def unfinished(corpus: Path, folder: Path, monkeypatch) -> None:
    """Shards that a process has left in the middle of its work."""

    def dies(folder, about, state):
        if state.units > 40:
            raise KeyboardInterrupt
        return commit(folder, about, state)

    commit = preparation.commit
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "TASK", 300)
        patch.setattr(preparation, "COMMIT_SECONDS", 0.0)
        patch.setattr(preparation, "commit", dies)
        with pytest.raises(KeyboardInterrupt):
            prepare(str(corpus), TOKENIZER, str(folder), shard_tokens=700)


def test_what_was_written_past_the_last_commit_is_cut_off(corpus, shards, tmp_path, monkeypatch):
    folder = tmp_path / "shards"
    unfinished(corpus, folder, monkeypatch)
    for path in folder.glob("train-*.bin"):
        with path.open("ab") as file:
            file.write(b"\xff" * 999)
    (folder / "train-00099.bin").write_bytes(b"\xff" * 10)
    prepare(str(corpus), TOKENIZER, str(folder), shard_tokens=700)
    assert bytes_of(folder) == bytes_of(shards)


def test_unfinished_shards_are_not_trained_on_nor_mixed_with_others(corpus, tmp_path, monkeypatch):
    folder = tmp_path / "shards"
    unfinished(corpus, folder, monkeypatch)
    before = bytes_of(folder)
    with pytest.raises(ValueError, match="are not finished: run prepare_corpus.py"):
        load_corpus(str(folder))
    with pytest.raises(ValueError, match="another shard_tokens: choose another folder"):
        prepare(str(corpus), TOKENIZER, str(folder), shard_tokens=701)
    with pytest.raises(ValueError, match="another corpus and source_size"):
        prepare(str(corpus / "val.jsonl"), TOKENIZER, str(folder), shard_tokens=700)
    assert bytes_of(folder) == before
    (folder / "train-00000.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="shorter than it was: start again with --overwrite_output_dir"):
        prepare(str(corpus), TOKENIZER, str(folder), shard_tokens=700)


def test_finished_shards_are_left_alone_and_replaced_when_asked(corpus, shards, tmp_path):
    folder = tmp_path / "shards"
    shutil.copytree(shards, folder)
    os.utime(folder / "index.json", (1, 1))
    prepare(str(corpus), TOKENIZER, str(folder), shard_tokens=700)
    assert (folder / "index.json").stat().st_mtime == 1
    prepare(str(corpus), TOKENIZER, str(folder), shard_tokens=10**6, overwrite=True)
    assert [path.name for path in sorted(folder.glob("*.bin"))] == ["train-00000.bin", "validation-00000.bin"]
    assert np.array_equal(ids_of(folder, "train"), ids_of(shards, "train"))


@pytest.mark.parametrize(
    "text, options, says",
    [
        ('{"text": "a\\ud800"}\n', "", "half of a surrogate pair"),
        (
            '{"text": "a b c"}\n',
            "",
            "holds no text for validation: give more text or a larger --validation_split_percentage",
        ),
        ('{"text": ""}\n', "", "holds no text"),
        ('{"text": "a"}\n', "--validation_split_percentage 0", "must be more than 0"),
        ('{"text": "a"}\n', "--shard_tokens 0", "--shard_tokens is 0"),
        ('{"txt": "a"}\n', "", "no column 'text'"),
        ('{"text": "a"}\n', "--tokenizer tests", "holds no tokenizer|no tokenizer can be loaded"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, text, options, says):
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    words = f"--corpus {tmp_path}/a.jsonl --tokenizer {TOKENIZER} --output_dir {tmp_path}/out --num_proc 1 {options}"
    run = Run(words.split(), recipe="prepare_corpus.py")
    assert run.wait() == 2
    error = run.said().strip().splitlines()[-1]
    assert error.startswith("error: ") and "Traceback" not in run.said()
    assert re.search(says, error), error
    assert says != "holds no text" or not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(corpus, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("a model's")
    with pytest.raises(ValueError, match="holds config.json, which is no shard"):
        prepare(str(corpus), TOKENIZER, str(tmp_path))
    with pytest.raises(ValueError, match="holds config.json, which is no shard"):
        prepare(str(corpus), TOKENIZER, str(tmp_path), overwrite=True)
    assert (tmp_path / "tokenizer.json").read_text() == "a model's"
    with pytest.raises(ValueError, match="config.json cannot be used"):
        prepare(str(corpus), TOKENIZER, str(tmp_path / "config.json"))


# --- read ---


def damage(folder: Path, kind: str) -> None:
    shard = folder / "train-00001.bin"
    if kind == "missing":
        shard.unlink()
    elif kind == "short":
        os.truncate(shard, 1398)
    elif kind == "flipped":
        shard.write_bytes(shard.read_bytes()[:-2] + b"\0\0")
    elif kind == "past":
        shard.write_bytes(shard.read_bytes()[:-2] + b"\xff\xff")
    elif kind == "index":
        index = (folder / "index.json").read_text(encoding="utf-8")
        (folder / "index.json").write_text(index[: len(index) // 2], encoding="utf-8")


@pytest.mark.parametrize(
    "kind, says",
    [
        ("missing", "the shard train-00001.bin is missing from"),
        ("short", "the shard train-00001.bin in .* has 1,398 bytes, its index says 1,400"),
        ("flipped", "the shard train-00001.bin in .* is not what was written"),
        ("past", "the shard train-00001.bin holds the id 65535, but its tokenizer has 1024 tokens"),
        ("index", "is not an index of shards"),
    ],
)
def test_damaged_shards_are_named(shards, tmp_path, kind, says):
    shutil.copytree(shards, tmp_path / "shards")
    damage(tmp_path / "shards", kind)
    with pytest.raises(ValueError, match=says):
        load_corpus(str(tmp_path / "shards"))


@pytest.mark.parametrize(
    "tokenizer, says",
    [
        (TOKENIZER.replace("1024", "4096"), "made with another tokenizer: give --tokenizer"),
        ("char", "no char tokenizer is trained on it: give --tokenizer"),
    ],
)
def test_another_tokenizer_is_refused(shards, tmp_path, tokenizer, says):
    words = training_words(tmp_path / "run", shards, "--tokenizer", tokenizer)
    with pytest.raises(ValueError, match=says):
        train_here(words)
    assert not (tmp_path / "run").exists()


LENGTHS = st.lists(st.integers(0, 60), min_size=1, max_size=8).filter(lambda lengths: sum(lengths) > 12)


@given(lengths=LENGTHS, block=st.integers(1, 11), seed=st.integers(0, 99), world=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_an_epoch_holds_every_window_once_across_shards_and_ranks(lengths, block, seed, world):
    ids = np.arange(sum(lengths)).astype(np.uint16)
    parts = np.split(ids, np.cumsum(lengths)[:-1])
    stream = TokenStream(MappedIds(parts), block)
    windows, batch = stream.windows_per_epoch, world * 2
    seen = []
    for step in range(-(-windows // batch)):
        for rank in range(world):
            x, y = stream.batch(seed, step, batch, np.arange(rank, batch, world))
            whole, expected = TokenStream(ids, block), np.arange(rank, batch, world)
            assert all(map(torch.equal, (x, y), whole.batch(seed, step, batch, expected)))
            assert torch.equal(y, x + 1)
            numbers = step * batch + expected
            seen += x[torch.from_numpy(numbers < windows)].flatten().tolist()
    assert sorted(seen) == list(range(min(seen), min(seen) + windows * block))


def test_training_on_shards_is_training_on_the_text(corpus, shards, tmp_path):
    for name, given_corpus in (("text", corpus), ("shards", shards)):
        train_here(
            training_words(
                tmp_path / name, given_corpus, "--tokenizer", TOKENIZER, "--per_device_eval_batch_size", 64
            )
        )
    runs = [without_times(metrics(tmp_path / name)) for name in ("text", "shards")]
    assert runs[0] == runs[1] and "eval_bits_per_char" in runs[0][-1]
    top = [digests(tmp_path / name)["model.safetensors"] for name in ("text", "shards")]
    assert top[0] == top[1]


def test_the_recipe_needs_nothing_but_the_shards(shards, tmp_path):
    words = f"--corpus {shards} --output_dir {tmp_path}/run --use_cpu --n_layer 1 --n_embd 16 --n_head 2 --n_positions 16"
    said = finished(
        [*words.split(), "--max_steps", "2", "--per_device_eval_batch_size", "64"], recipe="pretrain.py"
    )
    assert "validation loss" in said
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert open_shards(str(shards)).sha256 in card


@pytest.mark.parametrize(
    "option", [{"document_end": "\n\n"}, {"text_column": "body"}, {"validation_split_percentage": 20}]
)
def test_shards_were_cut_before(shards, option):
    with pytest.raises(ValueError, match=f"--{next(iter(option))} is set, but"):
        load_corpus(str(shards), **option)


def test_a_batch_of_none_is_refused_as_any_other_mistake(shards, tmp_path, monkeypatch):
    words = f"pretrain.py --preset gpt2 --corpus {shards} --output_dir {tmp_path}/run --per_device_train_batch_size 0"
    monkeypatch.setattr(sys, "argv", words.split())
    with pytest.raises(ValueError, match="--per_device_train_batch_size is 0"):
        pretrain_main()
