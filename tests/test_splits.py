"""What is held out is what a person thinks, and what the text means is what the model learns; the first screen says both."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from processes import Run, finished, train_here, training_words
from tokenizers import AddedToken

from nanogpt_hf.common.errors import UserError
from nanogpt_hf.data.corpora import load_corpus
from nanogpt_hf.data.readers import Reading
from nanogpt_hf.data.splits import END_OF_TEXT, cut_at_marks, with_plain_newlines
from nanogpt_hf.data.tokenization import make_tokenizer
from nanogpt_hf.training import loop
from recipes.compare import main as compare
from recipes.prepare_corpus import main as prepare_corpus
from recipes.train_tokenizer import main as train_tokenizer

LANGUAGES = "arabic czech dutch english french german greek hindi korean polish russian zulu".split()


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode())
    return folder


def line(corpus, label: str) -> str:
    """What the first screen says under a label."""
    (found,) = [said for said in corpus.reading if said.startswith(label)]
    return found.removeprefix(label).strip()


# --- held out by name ---


@pytest.mark.parametrize(
    "files",
    [
        {"my_train.txt": "T", "my_val.txt": "V"},
        {"train.txt": "T", "validation_set.txt": "V"},
        {"Poems.Train.txt": "T", "poems.dev.txt": "V"},
        {"train-1.txt": "T", "test-1.txt": "V"},
        {"train_data/a.txt": "T", "val_data/a.txt": "V", "test_data/a.txt": "never read"},
        {"my_train.txt": "T", "my_val.txt": "V", "README.md": "in neither", "LICENSE": "in neither"},
        {"my-train.csv": "text\nT\n", "my-valid.csv": "text\nV\n"},
    ],
)
def test_a_file_named_for_validation_is_not_trained_on(tmp_path, files):
    corpus = load_corpus(str(write(tmp_path, files)))
    assert ("".join(corpus.train), "".join(corpus.validation)) == ("T", "V")
    named = [
        Path(name).name for name in files if any(word in name.lower() for word in ("val", "dev", "test-"))
    ]
    assert line(corpus, "validation") == f"1 of these characters: {named[0]}"
    unread = [Path(name).name for name in files if name.startswith(("README", "LICENSE", "test_data"))]
    assert all(name in line(corpus, "not read") for name in unread)


def test_words_that_only_look_like_splits_are_none(tmp_path):
    files = {"trainspotting.txt": "a" * 20, "valentine.txt": "b" * 20, "train_val.txt": "c" * 20}
    corpus = load_corpus(str(write(tmp_path, files)))
    assert corpus.validation == ["cc", "aa", "bb"]


# --- held out by place ---


def test_few_files_are_held_out_at_the_end_of_each(tmp_path):
    texts = {f"{number:02}_{language}.txt": language[:2] * 500 for number, language in enumerate(LANGUAGES)}
    corpus = load_corpus(str(write(tmp_path, texts)))
    assert corpus.validation == [text[900:] for text in texts.values()]
    assert corpus.train == [text[:900] for text in texts.values()]
    assert line(corpus, "corpus") == f"{tmp_path}: 12,000 characters in 12 files (12 .txt)"
    assert line(corpus, "validation") == "1,200 of these characters: the last 10% of each file"


@given(st.integers(1, 99), st.integers(10, 60))
@settings(max_examples=50, deadline=None)
def test_of_many_files_whole_ones_are_held_out(tmp_path_factory, percent, more):
    count = 1000 // percent + more
    folder = tmp_path_factory.mktemp("many")
    texts = [f"{number:05}." for number in range(count)]
    corpus = load_corpus(str(write(folder, {f"{text}txt": text for text in texts})), percent)
    assert len(corpus.validation) == count * percent // 100
    assert sorted(corpus.train + corpus.validation) == texts
    assert "whole files" in line(corpus, "validation")


def test_one_file_is_held_out_at_its_end_as_ever(tmp_path):
    corpus = load_corpus(str(write(tmp_path, {"a.txt": "x" * 90 + "y" * 10}) / "a.txt"))
    assert (corpus.validation, corpus.validation_sha256) == (["y" * 10], None)
    assert line(corpus, "validation") == "10 of these characters: the last 10% of the text"
    all_of_it = load_corpus(str(tmp_path / "a.txt"), 100)
    assert (all_of_it.train, len(all_of_it.validation[0])) == ([], 100)


# --- held out by the user ---


def test_a_validation_file_is_held_out_all_of_it_wherever_it_lies(tmp_path):
    write(
        tmp_path,
        {"books/a.txt": "A" * 10, "books/own.txt": "V" * 30, "books/b.txt": "B" * 10, "other.md": "W"},
    )
    corpus = load_corpus(str(tmp_path / "books"), validation_file=str(tmp_path / "books" / "own.txt"))
    assert (corpus.train, corpus.validation) == (["A" * 10, "B" * 10], ["V" * 30])
    assert line(corpus, "validation") == "30 of these characters: all of own.txt"
    other = load_corpus(str(tmp_path / "books"), validation_file=str(tmp_path / "o*.md"))
    assert (len(other.train), other.validation) == (3, ["W"])
    assert len({corpus.validation_sha256, other.validation_sha256, None}) == 3


def test_a_validation_file_takes_the_place_of_other_splits(tmp_path):
    write(tmp_path, {"train.txt": "T", "val.txt": "V", "test.txt": "W", "mine/own.txt": "M"})
    corpus = load_corpus(f"{tmp_path}/*.txt", validation_file=str(tmp_path / "mine"))
    assert (corpus.train, corpus.validation) == (["T"], ["M"])
    assert "val.txt (--validation_file is in their place)" in line(corpus, "not read")
    named = load_corpus(str(tmp_path / "train.txt"), validation_file=str(tmp_path / "val.txt"))
    assert (named.train, named.validation) == (["T"], ["V"])


@pytest.mark.parametrize(
    ("own", "says"),
    [("a.txt", "leaves nothing of .* to train on"), ("b.txt", "--validation_file .* did you mean .*a.txt")],
)
def test_a_validation_file_that_cannot_be_is_refused(tmp_path, own, says):
    write(tmp_path, {"a.txt": "A" * 100})
    with pytest.raises(UserError, match=says):
        load_corpus(str(tmp_path / "a.txt"), validation_file=str(tmp_path / own))


def test_too_little_to_predict_is_refused_with_the_flags_that_help(tmp_path):
    write(tmp_path, {"a.txt": "to be or not to be " * 40, "own.txt": "t"})
    words = training_words(tmp_path / "run", tmp_path / "a.txt", "--validation_file", tmp_path / "own.txt")
    with pytest.raises(
        UserError, match="a longer --validation_file or a larger --validation_split_percentage"
    ):
        train_here(words)


def test_every_recipe_that_reads_takes_a_validation_file(tmp_path, capsys, own_accelerate_state):
    write(tmp_path, {"a.txt": "to be or not to be " * 40, "own.txt": "that is the question " * 20})
    files = ["--corpus", tmp_path / "a.txt", "--validation_file", tmp_path / "own.txt"]
    words = training_words(tmp_path / "run", tmp_path / "a.txt", "--max_steps", "6", *files[2:])
    said = finished(words, recipe="pretrain_char.py")
    assert "validation 420 of these characters: all of own.txt" in said
    assert "0.505 times the text" in said and "by heart" not in said
    for recipe, more in (
        (train_tokenizer, ["--vocab_size", "260", "--output_dir", tmp_path / "tokenizer"]),
        (
            prepare_corpus,
            ["--tokenizer", tmp_path / "run", "--output_dir", tmp_path / "shards", "--num_proc", "1"],
        ),
        (compare, ["--model", tmp_path / "run", "--output_dir", tmp_path / "table", "--use_cpu"]),
    ):
        recipe([str(word) for word in (*files, *more)])
        assert "all of own.txt" in capsys.readouterr().out
    assert json.loads((tmp_path / "table" / "results.json").read_text())["validation_characters"] == 420
    assert load_corpus(str(tmp_path / "shards")).characters("validation") == 420


def test_evaluation_takes_all_of_a_file_and_says_what_the_model_knows(tmp_path, capsys, own_accelerate_state):
    write(tmp_path, {"a.txt": "to be or not to be " * 40, "b.txt": "that is the question " * 20})
    train_here(training_words(tmp_path / "run", tmp_path / "a.txt", "--max_steps", "6"))
    for name, more, characters, notes in (
        ("b.txt", [], 420, False),
        ("a.txt", [], 760, True),
        ("a.txt", ["--validation_split_percentage", "10"], 76, False),
        (
            "b.txt",
            ["--validation_split_percentage", "100", "--samples", "1", "--sample_length", "30"],
            420,
            False,
        ),
    ):
        compare([*f"--model {tmp_path}/run --corpus {tmp_path / name} --use_cpu".split(), *more])
        said = capsys.readouterr().out
        part = "validation split" if characters == 76 else "whole text"
        assert f", {part} of {characters} characters" in said
        note = "NOTE: run was trained on this text; --validation_split_percentage 10 measures only what"
        assert (note in said) == notes


# --- newlines and ends ---


def cut(text: str, rng: random.Random) -> list[str]:
    """The text in parts of any size."""
    places = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 6)))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


PIECES = st.lists(
    st.sampled_from(["\r", "\n", "\r\n", "a", " ", END_OF_TEXT, "<|end", "oftext|>", "x" * 30]), max_size=30
)


@given(PIECES.map("".join), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_every_kind_of_newline_is_one_newline_however_the_text_comes(text, rng):
    reading = Reading()
    ((parts),) = with_plain_newlines([cut(text, rng)], reading)
    assert "".join(parts) == text.replace("\r\n", "\n").replace("\r", "\n")
    assert reading.carriage_returns == text.count("\r")


@given(PIECES.map("".join), st.randoms(use_true_random=False))
@example(f"{END_OF_TEXT}\na\n{END_OF_TEXT} \n\n{END_OF_TEXT}", random.Random(0))
@settings(max_examples=300, deadline=None)
def test_a_mark_alone_on_a_line_ends_a_document_however_the_text_comes(text, rng):
    text = text.replace("\r", "")
    reading, expected = Reading(), [""]
    for row in text.splitlines(keepends=True):
        if row.strip(" \n") == END_OF_TEXT and not row.startswith(" "):
            expected.append("")
        else:
            expected[-1] += row
    found = ["".join(parts) for parts in cut_at_marks([cut(text, rng)], reading)]
    assert [document for document in found if document] == [document for document in expected if document]
    assert reading.marks == len(expected) - 1


def test_crlf_and_marks_are_said_and_can_be_kept(tmp_path):
    text = f"one\r\n{END_OF_TEXT}\r\ntwo {END_OF_TEXT}\r\n" * 30
    write(tmp_path, {"a.txt": text})
    corpus = load_corpus(str(tmp_path / "a.txt"))
    assert set(corpus.train[:-1]) == {"one\n", f"two {END_OF_TEXT}\none\n"} and len(corpus.train) > 25
    assert line(corpus, "newlines").startswith("90 CRLF or CR are one newline each; --keep_carriage_returns")
    assert line(corpus, "documents").startswith(
        f"end at 30 lines {END_OF_TEXT}; --special_tokens_in_text text"
    )
    kept = load_corpus(str(tmp_path / "a.txt"), keep_carriage_returns=True, special_tokens_in_text="text")
    assert "".join(kept.train + kept.validation) == text and len(kept.reading) == 2


# --- special tokens that the text spells ---


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory):
    """A text with marks of turns, and a tokenizer that knows them."""
    text = "<|user|>to be?<|bot|>or not to be!\n" * 40
    tokenizer = make_tokenizer("bpe", [text.replace("<|", "").replace("|>", "")], 280)
    tokenizer.add_special_tokens(
        {
            "additional_special_tokens": [
                AddedToken("<|user|>", special=True),
                AddedToken("<|bot|>", special=True),
            ]
        }
    )
    return write(tmp_path_factory.mktemp("dialogues"), {"a.txt": text}) / "a.txt", tokenizer


def test_special_tokens_are_text_with_a_warning_or_the_tokens_when_asked(dialogues):
    path, tokenizer = dialogues
    special = set(tokenizer.convert_tokens_to_ids(["<|user|>", "<|bot|>"]))
    corpus = load_corpus(str(path))
    assert not special & set(corpus.ids("train", tokenizer).tolist())
    (warning,) = corpus.remarks(tokenizer)
    assert "<|user|> (40), <|bot|> (40)" in warning and "--special_tokens_in_text tokens" in warning
    corpus = load_corpus(str(path), special_tokens_in_text="tokens")
    assert corpus.ids("train", tokenizer).tolist() == tokenizer(corpus.train[0]).input_ids
    assert special < set(corpus.ids("train", tokenizer).tolist())
    (said,) = corpus.remarks(tokenizer)
    assert "<|user|> (40), <|bot|> (40): each is the tokenizer's token" in said


def test_the_end_of_text_is_learned_where_it_stands_alone_on_lines(tmp_path):
    poem = "rose and nose\n"
    write(tmp_path, {"poems.txt": f"{poem}{END_OF_TEXT}\n" * 60, "plain.txt": poem * 60})
    run = train_here(training_words(tmp_path / "run", tmp_path / "poems.txt", "--max_steps", "6"))
    assert run.step == 6
    suppressed = json.loads((tmp_path / "run" / "generation_config.json").read_text())
    end = suppressed["eos_token_id"]
    assert end not in suppressed["suppress_tokens"]
    tokenizer = make_tokenizer("char", [poem], 0)
    ids = load_corpus(str(tmp_path / "poems.txt")).ids("train", tokenizer)
    assert np.count_nonzero(ids == tokenizer.eos_token_id) == 53 and "<" not in tokenizer.decode(ids[:12])
    train_here(training_words(tmp_path / "other", tmp_path / "plain.txt", "--max_steps", "6"))
    assert end in json.loads((tmp_path / "other" / "generation_config.json").read_text())["suppress_tokens"]


# --- how well the tokenizer and the text go together, and how long the text is ---


def test_a_tokenizer_that_cannot_spell_the_text_is_warned_of(tmp_path):
    english = make_tokenizer("bpe", ["The frost, the sun, a wonderful day. " * 40], 300)
    write(tmp_path, {"ru.txt": "Мороз и солнце, день чудесный. " * 40, "en.txt": "The frost, the sun. " * 40})
    (warning,) = load_corpus(str(tmp_path / "ru.txt")).remarks(english)
    assert (
        "1.77 tokens per character" in warning
        and "--tokenizer char" in warning
        and "--extend_vocabulary" in warning
    )
    assert load_corpus(str(tmp_path / "en.txt")).remarks(english) == []
    assert (
        load_corpus(str(tmp_path / "ru.txt")).remarks(
            make_tokenizer("char", ["Мороз и солнце, день чудесный."], 0)
        )
        == []
    )


def test_a_tokenizer_that_loses_characters_is_warned_of(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "frost": 1, "[END]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="[END]")
    (warning,) = load_corpus(str(write(tmp_path, {"a.txt": "frost and frost " * 40}) / "a.txt")).remarks(
        tokenizer
    )
    assert "has no token for 33" in warning and "recipes/train_tokenizer.py" in warning


def test_a_text_that_is_read_hundreds_of_times_is_warned_of(tmp_path):
    write(tmp_path, {"a.txt": "to be or not to be, that is it\n" * 2})
    words = training_words(tmp_path / "run", tmp_path / "a.txt", "--max_steps", "90", "--eval_steps", "90")
    said = finished(words, recipe="pretrain_char.py")
    assert "105 times the text" in said and "warning: a model learns a text by heart" in said


# --- runs from before ---


def test_runs_of_earlier_versions_go_on_where_the_text_is_the_same(tmp_path, monkeypatch):
    write(tmp_path, {"few/a.txt": "to be or not to be " * 40, "few/b.txt": "that is the question " * 40})
    identity_of = loop.identity_of

    def as_before(*args):
        return {
            key: value
            for key, value in identity_of(*args).items()
            if key not in ("validation_text", "special_tokens_in_text")
        }

    for name, corpus in (("one", tmp_path / "few" / "a.txt"), ("several", tmp_path / "few")):
        with monkeypatch.context() as patch:
            patch.setattr(loop, "identity_of", as_before)
            train_here(training_words(tmp_path / name, corpus, "--max_steps", "5"))
    go_on = ["--resume_from_checkpoint", "last", "--max_steps", "10"]
    assert train_here(training_words(tmp_path / "one", tmp_path / "few" / "a.txt", *go_on)).step == 10
    with pytest.raises(
        UserError, match="an earlier version held out other parts of these files for validation"
    ):
        train_here(training_words(tmp_path / "several", tmp_path / "few", *go_on))


def test_a_run_that_does_not_know_the_new_settings_goes_on_without_them(tmp_path):
    text = f"to be\r\n{END_OF_TEXT}\r\nor not to be\r\n" * 60
    write(tmp_path, {"a.txt": text})
    old = ["--keep_carriage_returns", "--special_tokens_in_text", "text"]
    words = training_words(tmp_path / "run", tmp_path / "a.txt", "--max_steps", "5")
    finished([*words, *old], recipe="pretrain_char.py")
    saved = (tmp_path / "run" / "run.yaml").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [
        row
        for row in saved
        if not row.startswith(("keep_carriage_returns", "special_tokens_in_text", "validation_file"))
    ]
    assert len(saved) - len(kept) == 3
    (tmp_path / "run" / "run.yaml").write_text("".join(kept), encoding="utf-8")
    go_on = training_words(
        tmp_path / "run", tmp_path / "a.txt", "--max_steps", "10", "--resume_from_checkpoint", "last"
    )
    finished(go_on, recipe="pretrain_char.py")
    assert (
        Run(
            [*go_on, "--special_tokens_in_text", "tokens", "--max_steps", "11"], recipe="pretrain_char.py"
        ).wait()
        == 2
    )
