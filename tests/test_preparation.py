"""Preparation in a stranger's hands: nothing of theirs is deleted, nothing half done or forged is taken for whole."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt_hf.common.errors import UserError
from nanogpt_hf.data import preparation
from nanogpt_hf.data.corpora import load_corpus
from nanogpt_hf.data.preparation import held_out_units, prepare
from nanogpt_hf.data.tokenization import load_tokenizer

TOKENIZER = str(Path(__file__).parents[1] / "tokenizers" / "tiny_shakespeare-bpe-1024")


def rows(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


TEXTS = [f"document {number}: to be, or not to be\n" for number in range(100)]


@pytest.fixture
def corpus(tmp_path) -> Path:
    (tmp_path / "a.jsonl").write_text(rows(TEXTS), encoding="utf-8")
    return tmp_path / "a.jsonl"


@pytest.fixture
def shards(corpus, tmp_path) -> Path:
    prepare(
        str(corpus), TOKENIZER, str(tmp_path / "shards"), validation_split_percentage=10, shard_tokens=500
    )
    return tmp_path / "shards"


def again(corpus: Path, folder: Path, **options) -> dict:
    options = {"validation_split_percentage": 10, "shard_tokens": 500} | options
    return prepare(str(corpus), TOKENIZER, str(folder), **options)


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- what is held out ---


@pytest.mark.parametrize("percent", [40, 30, 70, 12.5, 3])
def test_as_much_is_held_out_as_was_asked_for(corpus, tmp_path, percent):
    index = again(corpus, tmp_path / "shards", validation_split_percentage=percent)
    assert abs(index["splits"]["validation"]["documents"] - percent) <= 1


@given(st.floats(0.05, 99))
@settings(max_examples=60, deadline=None)
def test_held_out_units_are_spread_evenly(percent):
    numbers = held_out_units(percent)
    found = [next(numbers) for _ in range(40)]
    assert found == sorted(set(found)) and found[0] < 16
    for count, number in enumerate(found):
        assert abs(number - count * 100 / percent) <= 100 / percent + 1


def test_a_text_too_small_to_hold_any_out_leaves_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("to be " * 20, encoding="utf-8")
    with pytest.raises(UserError, match="holds no text for validation: give more text or a larger"):
        prepare(str(tmp_path / "a.txt"), TOKENIZER, str(tmp_path / "shards"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt"]


def test_a_tokenizer_that_is_still_to_be_trained_is_named(corpus, tmp_path):
    for kind in ("char", "bpe"):
        with pytest.raises(
            UserError, match=f"python recipes/train_tokenizer.py --kind {kind} --corpus .*a.jsonl"
        ):
            prepare(str(corpus), kind, str(tmp_path / "shards"))


def test_tokens_that_the_text_spells_are_tokens_when_asked(tmp_path):
    text = "to be <|endoftext|> or not\n<|endoftext|>\nto be\n"
    (tmp_path / "a.jsonl").write_text(rows([text] * 40), encoding="utf-8")
    tokenizer = load_tokenizer(TOKENIZER)
    ids = {}
    for mode, ends in (("text", 1), ("document_ends", 2), ("tokens", 3)):
        folder = tmp_path / mode
        index = prepare(
            str(tmp_path / "a.jsonl"),
            TOKENIZER,
            str(folder),
            validation_split_percentage=10,
            special_tokens_in_text=mode,
        )
        ids[mode] = np.fromfile(folder / "train-00000.bin", index["dtype"])
        texts = index["splits"]["train"]["documents"] // (2 if mode == "document_ends" else 1)
        assert np.count_nonzero(ids[mode] == tokenizer.eos_token_id) == ends * texts - 1
    first = tokenizer(text).input_ids
    assert ids["tokens"][: len(first)].tolist() == first


# --- files of others ---


@pytest.mark.parametrize(
    "stranger", ["notes.txt", "train-images.bin", "validation-mine.bin", "train-00099.bin"]
)
def test_overwriting_deletes_nothing_of_somebody_else(corpus, shards, stranger):
    (shards / stranger).write_bytes(b"mine")
    before = everything(shards)
    with pytest.raises(UserError, match=f"holds {stranger}, which is no shard"):
        again(corpus, shards, overwrite=True, shard_tokens=700)
    assert everything(shards) == before


@pytest.mark.parametrize(
    "index", ["{}", '{"version": 1, "files": []}', "[1]", "no json", '{"format": "other"}']
)
def test_an_index_of_something_else_is_left_alone(corpus, tmp_path, index):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in {"index.json": index, "train-images.bin": "a", "train-00000.bin": "b"}.items():
        (folder / name).write_text(content)
    before = everything(folder)
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds index.json, which is no shard"):
            again(corpus, folder, overwrite=overwrite)
    assert everything(folder) == before


def test_a_tokenizer_of_somebody_else_is_left_alone(corpus, tmp_path):
    folder = tmp_path / "tokenizer"
    shutil.copytree(TOKENIZER, folder)
    before = everything(folder)
    with pytest.raises(UserError, match="holds tokenizer.json, which is no shard"):
        again(corpus, folder)
    assert everything(folder) == before


def test_damaged_shards_are_replaced_when_asked(corpus, shards, tmp_path):
    whole = everything(shards)
    (shards / "index.json").write_bytes(whole["index.json"][:300])
    with pytest.raises(UserError, match="index.json is damaged.* --overwrite_output_dir"):
        again(corpus, shards)
    again(corpus, shards, overwrite=True)
    assert everything(shards) == whole


# --- half done ---


def stop_in_the_middle(corpus: Path, folder: Path, monkeypatch) -> None:
    commit = preparation.commit

    def dies(folder, about, state):
        if state.units > 40:
            raise KeyboardInterrupt
        commit(folder, about, state)

    with monkeypatch.context() as patch:
        patch.setattr(preparation, "TASK", 300)
        patch.setattr(preparation, "COMMIT_SECONDS", 0.0)
        patch.setattr(preparation, "commit", dies)
        with pytest.raises(KeyboardInterrupt):
            again(corpus, folder)


def test_a_text_that_has_changed_at_the_same_size_is_noticed(corpus, tmp_path, monkeypatch):
    folder = tmp_path / "shards"
    stop_in_the_middle(corpus, folder, monkeypatch)
    before = everything(folder)
    corpus.write_text(rows([text.replace("be", "do") for text in TEXTS]), encoding="utf-8")
    with pytest.raises(
        UserError, match="is no longer the text that .* was begun on: start again with --overwrite"
    ):
        again(corpus, folder)
    assert everything(folder) == before
    again(corpus, folder, overwrite=True)
    again(corpus, tmp_path / "fresh")
    assert everything(folder) == everything(tmp_path / "fresh")


@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_finished_shards_are_checked_before_they_are_called_done(corpus, shards, damage):
    shard = shards / "train-00001.bin"
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-2] + b"\0\0")
    with pytest.raises(
        UserError, match="train-00001.bin .*prepare the corpus again with --overwrite_output_dir"
    ):
        again(corpus, shards)


def test_shards_of_other_settings_are_not_taken_for_these(corpus, shards, tmp_path):
    (tmp_path / "own.txt").write_text("that is the question")
    for name, value in (
        ("validation_file", str(tmp_path / "own.txt")),
        ("keep_carriage_returns", True),
        ("special_tokens_in_text", "tokens"),
    ):
        with pytest.raises(UserError, match=f"shards with another .*{name}"):
            again(corpus, shards, **{name: value})
    lines = []
    again(corpus, shards, say=lines.append)
    assert lines == [f"shards     in {shards} since before, and whole"]


# --- an index from a stranger ---


def change(index: dict, path: str, value: object) -> None:
    *parents, last = path.split("/")
    for key in parents:
        index = index[int(key) if key.isdecimal() else key]
    if value is KeyError:
        del index[last]
    else:
        index[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("splits/train/shards/0/file", "/etc/hostname"),
        ("splits/train/shards/0/file", "../a.jsonl"),
        ("splits/train/shards/0/file", "validation-00000.bin"),
        ("splits/train/shards/0/file", "train-00001.bin"),
        ("splits/train/shards/0/file", "\x1b[2J"),
        ("splits/train/shards/0/file", 1),
        ("splits/train/shards/0/tokens", -1),
        ("splits/train/shards/0/tokens", 10**30),
        ("splits/train/shards/0/sha256", None),
        ("splits/train/shards", {}),
        ("splits/train/shards", []),
        ("splits/train/tokens", 1),
        ("splits/validation/characters", 0),
        ("splits/validation/characters", "9"),
        ("splits/train/unseen_ids", [10**9]),
        ("splits/train/unseen_ids", [True]),
        ("splits/train/unseen_ids", None),
        ("splits", None),
        ("dtype", "<f2"),
        ("dtype", "<u4"),
        ("dtype", "O"),
        ("vocab_size", 0),
        ("vocab_size", 2.5),
        ("vocabulary_sha256", 7),
        ("corpus/name", 3),
        ("corpus/source", ["a"]),
        ("corpus/language", {}),
        ("corpus/folder", "/"),
        ("corpus/notice", KeyError),
        ("corpus", "a"),
    ],
)
def test_a_forged_index_is_refused(shards, path, value):
    index = json.loads((shards / "index.json").read_text(encoding="utf-8"))
    change(index, path, value)
    (shards / "index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(
        UserError, match="index.json is not an index of shards: prepare the corpus again"
    ) as refused:
        load_corpus(str(shards))
    assert "\x1b" not in str(refused.value)


@pytest.mark.parametrize("depth", [100_000])
def test_an_index_that_is_nested_without_end_is_refused(shards, depth):
    start = (shards / "index.json").read_text(encoding="utf-8")[:200]
    (shards / "index.json").write_text(start + "[" * depth, encoding="utf-8")
    with pytest.raises(UserError, match="is not an index of shards"):
        load_corpus(str(shards))


def test_what_the_index_says_is_on_the_first_screen(shards):
    corpus = load_corpus(str(shards))
    whole = sum(corpus.characters(split) for split in ("train", "validation"))
    assert (
        corpus.reading[0]
        == f"corpus     {corpus.name}: {whole:,} characters, tokenised in {len(list(shards.glob('*.bin')))} shards"
    )
    assert f"{corpus.characters('validation'):,} of these characters: 10.0" in corpus.reading[1]
    assert corpus.remarks(load_tokenizer(TOKENIZER)) == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_in_the_place_of_an_index_is_not_opened(corpus, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    os.mkfifo(folder / "index.json")
    with pytest.raises(UserError, match="holds index.json, which is no shard"):
        again(corpus, folder, overwrite=True)
