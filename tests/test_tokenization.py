"""Tokenizers: lossless, deterministic, the same in chunks as in one go, and BPE equal to its definition."""

import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2Config, PreTrainedTokenizerFast

from nanogpt_hf.common.settings import TrainingSettings
from nanogpt_hf.data.corpora import load_corpus
from nanogpt_hf.data.tokenization import (
    CHUNK,
    LONG_WORD,
    encode,
    encode_documents,
    encode_with_spans,
    extend_tokenizer,
    load_tokenizer,
    longest_tokens,
    make_tokenizer,
    pieces,
    short_words,
)
from nanogpt_hf.runs.pretraining import vocabulary_words
from recipes.train_tokenizer import main as train_tokenizer

ARTEFACTS = Path(__file__).parents[1] / "tokenizers"
NAMES = sorted(path.name for path in ARTEFACTS.iterdir() if path.is_dir())
TEXT = (
    "Мороз и солнце; день чудесный!\nThe frost, the sun; it's a wonderful day. We'll go, they'll go.\n\n" * 20
)
ODD = [
    "\r\n",
    "\0",
    "\ufeff",
    "👩‍👩‍👧",
    "<0x0A>",
    "<|endoftext|>",
    "e\u0301",
    "\x1c ",
    " \x85\n",
    "日本",
    "\U0010ffff",
    "'s",
    " 1st",
]
ANY_TEXT = st.lists(st.one_of(st.text(max_size=12), st.sampled_from(ODD)), max_size=12).map("".join)


@pytest.fixture(scope="module", params=["char", "bpe", *NAMES])
def tokenizer(request):
    """One trained here of each kind, and every one that is shipped."""
    if request.param in NAMES:
        return load_tokenizer(str(ARTEFACTS / request.param))
    return make_tokenizer(request.param, [TEXT], 300, [TEXT])


def in_one_go(tokenizer, text):
    """The library's ids of the whole text, special tokens spelt out in it taken for text."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    ids = backend.encode(text, add_special_tokens=False).ids
    backend.encode_special_tokens = False
    return ids


@given(text=ANY_TEXT)
@example(text="".join(ODD))
@settings(max_examples=40, deadline=None)
def test_any_text_comes_back_and_never_holds_a_special_token(tokenizer, text):
    ids = encode(tokenizer, text)
    assert tokenizer.decode(ids) == text
    assert not set(ids.tolist()) & set(tokenizer.all_special_ids)
    assert ids.tolist() == in_one_go(tokenizer, text)


@given(
    filler=st.sampled_from(["ab ", "a", "\n", "й!  "]),
    short=st.integers(0, 30),
    text=ANY_TEXT,
    again=st.integers(1, 3),
)
@settings(max_examples=15, deadline=None)
def test_a_long_text_has_the_same_ids_in_chunks(tokenizer, filler, short, text, again):
    text = ((filler * CHUNK)[: CHUNK - short] + text) * again
    assert encode(tokenizer, text).tolist() == in_one_go(tokenizer, text)


# Full of places where a cut would change the tokens: runs of white space, and a separator that only Python takes
# for white space.
TRAPS = "ab!\x1c!    \n\n\ncd  \x85\n ef\n\tthe other, the other\n" * 30


def byte_level(normalizer=None, **options):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**options)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [TRAPS], trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def byte_fallback_with_merges():
    names = [f"<0x{byte:02X}>" for byte in range(256)] + sorted(set(TRAPS)) + ["th", "the"]
    vocabulary = {name: number for number, name in enumerate(names)}
    return Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")], byte_fallback=True))


@pytest.mark.parametrize(
    "backend",
    [
        byte_level(add_prefix_space=False),
        byte_level(add_prefix_space=True),
        byte_level(add_prefix_space=False, use_regex=False),
        byte_level(add_prefix_space=False, normalizer=normalizers.Prepend("x")),
        byte_fallback_with_merges(),
    ],
    ids=["as GPT-2's", "prefix space", "no words", "normalizer", "merges without words"],
)
def test_tokenizers_of_other_makes_are_cut_only_where_it_changes_nothing(backend):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    for start in range(len(TRAPS) // 30):
        text = (TRAPS * 10)[start : start + CHUNK + 100]
        assert encode(tokenizer, text).tolist() == in_one_go(tokenizer, text)


# GPT-2's words (Radford et al. 2019, encoder.py).
WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def bpe_by_definition(vocabulary, merges, text):
    """Sennrich et al. 2016 on the bytes of each word: again and again the earliest learned of the pairs there."""
    rank = {tuple(pair): number for number, pair in enumerate(merges)}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letter = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    ids = []
    for word in WORDS.findall(text):
        parts = [letter[byte] for byte in word.encode()]
        while len(parts) > 1:
            best = min(zip(parts, parts[1:], strict=False), key=lambda pair: rank.get(pair, len(rank)))
            if best not in rank:
                break
            merged, place = [], 0
            while place < len(parts):
                size = 2 if tuple(parts[place : place + 2]) == best else 1
                merged.append("".join(parts[place : place + size]))
                place += size
            parts = merged
        ids += [vocabulary[part] for part in parts]
    return ids


@pytest.fixture(scope="module")
def bpe():
    """A BPE tokenizer, its vocabulary and its merges in the order in which they were learned."""
    tokenizer = make_tokenizer("bpe", [TEXT], 320)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return tokenizer, model["vocab"], model["merges"]


@given(text=ANY_TEXT)
@example(text=TEXT[:300])
@settings(max_examples=100, deadline=None)
def test_bpe_ids_are_those_of_the_definition(bpe, text):
    tokenizer, vocabulary, merges = bpe
    assert encode(tokenizer, text).tolist() == bpe_by_definition(vocabulary, merges, text)


def test_bpe_learns_from_the_training_split_only_and_char_knows_every_character():
    unseen = "ЖЖЖЖЖЖЖЖ " * 50
    with_it = make_tokenizer("bpe", [TEXT], 300, [unseen]).backend_tokenizer.to_str()
    assert with_it == make_tokenizer("bpe", [TEXT], 300).backend_tokenizer.to_str()
    char = make_tokenizer("char", [TEXT], 0, [unseen])
    assert len(encode(char, "Ж")) == 1
    assert char.convert_ids_to_tokens(encode(char, "Ъ")) == ["<0xD0>", "<0xAA>"]
    assert len(char) == 256 + len(set(TEXT + unseen)) + 1


@pytest.mark.parametrize("documents", [["one", "two"], ["", "a", ""], ["only"], ["<|endoftext|>", "мороз"]])
def test_documents_are_joined_by_the_end_of_text(tokenizer, documents):
    end = tokenizer.eos_token_id
    ids = encode_documents(tokenizer, documents)
    assert ids.dtype == np.int32
    assert (ids == end).sum() == len(documents) - 1
    parts = np.split(ids, np.flatnonzero(ids == end))
    texts = [tokenizer.decode(part[1:] if number else part) for number, part in enumerate(parts)]
    assert texts == documents


@given(text=ANY_TEXT)
@settings(max_examples=30, deadline=None)
def test_spans_cover_every_character_in_order(tokenizer, text):
    ids, spans = encode_with_spans(tokenizer, text)
    assert ids.tolist() == encode(tokenizer, text).tolist()
    assert {place for start, end in spans for place in range(start, end)} == set(range(len(text)))
    assert all(start < end for start, end in spans)
    assert spans == sorted(spans)


def test_the_longest_tokens_are_shown_as_text():
    bpe = make_tokenizer("bpe", [TEXT], 400)
    tokens = longest_tokens(bpe, 5)
    assert {" чудесный", " wonderful"} <= set(tokens)
    assert [len(token) for token in tokens] == sorted(map(len, tokens), reverse=True)


def test_bpe_knows_the_words_of_all_of_unicode(bpe):
    """What is a letter, a number or white space is the same for whoever cuts a text into words."""
    points = [
        point
        for point in range(0x110000)
        if not 0xD800 <= point < 0xE000
        and (unicodedata.category(chr(point)) not in ("Lo", "Cn", "Co") or point % 50 == 0)
    ]
    text = "".join(
        f"a{chr(point)}b {chr(point)}1{chr(point)} .{chr(point)}'s  {chr(point)}" for point in points
    )
    assert encode(bpe[0], text).tolist() == in_one_go(bpe[0], text)


@given(
    learned=st.text("ab c", min_size=40, max_size=200),
    more=st.text("ab c", min_size=1),
    text=st.text("ab cd", max_size=60),
)
@settings(max_examples=60, deadline=None)
def test_any_merges_give_the_librarys_ids(learned, more, text):
    tokenizer = make_tokenizer("bpe", [learned], 300)
    assert encode(tokenizer, text).tolist() == in_one_go(tokenizer, text)
    extended = extend_tokenizer(tokenizer, [more * 5], 20)
    assert encode(extended, text).tolist() == in_one_go(extended, text)


@pytest.mark.parametrize(
    "merges",
    [
        [("b", "c"), ("a", "b"), ("ab", "c")],  # "abc" is a token that no text comes to
        [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")],  # two ways to one token
        [("a", "b")],
    ],
)
def test_merges_that_nobody_would_learn_give_the_librarys_ids(merges):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*letters, "ab", "bc", "abc"])}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    text = "abc ab bc aabc abcc bcabc cab abab"
    assert encode(tokenizer, text).tolist() == in_one_go(tokenizer, text)


@pytest.mark.parametrize("word", ["ACGT" * 3 + "G", "中文字", "a"])
def test_a_word_of_a_million_letters_is_learned_and_read(word):
    text = (word * (1_000_000 // len(word)))[:1_000_000]
    start = "The frost, the sun. "
    tokenizer = make_tokenizer("bpe", [start + text], 300)
    extended = extend_tokenizer(make_tokenizer("bpe", [start], 257), [text], 20)
    for each in (tokenizer, extended):
        ids = encode(each, text[:100_000])
        assert each.decode(ids) == text[:100_000] and len(ids) < 60_000


def test_long_words_are_cut_for_the_trainer_and_other_texts_are_not_changed():
    assert "".join(short_words(TEXT * 50)) == TEXT * 50
    assert (
        make_tokenizer("bpe", [TEXT * 50], 400).get_vocab()
        == make_tokenizer("bpe", pieces(TEXT * 50, 300), 400).get_vocab()
    )
    cut = list(short_words("x" * 10**6 + " words as they are"))
    assert "".join(cut) == "x" * 10**6 + " words as they are" and max(map(len, cut)) <= 2 * LONG_WORD


@pytest.mark.parametrize(
    ("kind", "asked", "said"),
    [
        ("bpe", 100_000, " tokens and not --vocab_size 100,000: the text has merges for no more"),
        ("bpe", 260, None),
        ("char", 300, "and not --vocab_size 300: it has the text's characters"),
        ("char", TrainingSettings.vocab_size, None),
        (str(ARTEFACTS / "tiny_shakespeare-bpe-1024"), 300, None),
    ],
)
def test_a_vocabulary_of_another_size_than_was_asked_for_is_said(kind, asked, said):
    tokenizer = make_tokenizer(kind, ["to be or not to be"], asked)
    words = vocabulary_words(TrainingSettings(tokenizer=kind, vocab_size=asked), tokenizer)
    assert len(words) == bool(said) and (said or "") in "".join(words)


@pytest.mark.parametrize("vocab_size", [1, 256])
def test_a_vocabulary_without_room_for_the_bytes_is_an_error(vocab_size):
    with pytest.raises(ValueError, match=f"--vocab_size is {vocab_size}, .* at least 257"):
        make_tokenizer("bpe", [TEXT], vocab_size)


def test_what_is_no_tokenizer_is_answered_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    broken, empty, endless = tmp_path / "broken", tmp_path / "empty", tmp_path / "endless"
    for folder in (broken, empty, endless):
        GPT2Config().save_pretrained(folder)
    (broken / "tokenizer.json").write_text("{}", encoding="utf-8")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, "b": 1}, []))).save_pretrained(
        endless
    )
    for folder, message in [
        (tmp_path / "nowhere", "no tokenizer can be loaded"),
        (broken, "no tokenizer can be loaded"),
        (empty, "holds no tokenizer"),
        (endless, "has no end-of-text token"),
    ]:
        with pytest.raises(ValueError, match=message) as raised:
            load_tokenizer(str(folder))
        assert "\n" not in str(raised.value)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_the_recipe_is_deterministic_and_overwrites_nothing_unasked(kind, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT * 5, encoding="utf-8")
    words = ["--corpus", str(tmp_path / "text.txt"), "--kind", kind, "--vocab_size", "350"]
    for name in ("first", "second"):
        train_tokenizer([*words, "--output_dir", str(tmp_path / name)])
    assert files(tmp_path / "first") == files(tmp_path / "second")
    assert all(name.endswith(".json") for name in files(tmp_path / "first"))
    output = capsys.readouterr().out.splitlines()
    assert output[-1].replace("second", "first") in output
    loaded = AutoTokenizer.from_pretrained(tmp_path / "first")
    assert loaded.decode(encode(loaded, TEXT)) == TEXT

    (tmp_path / "second" / "tokenizer.json").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="second exists"):
        train_tokenizer([*words, "--output_dir", str(tmp_path / "second")])
    assert (tmp_path / "second" / "tokenizer.json").read_text(encoding="utf-8") == "mine"
    train_tokenizer([*words, "--output_dir", str(tmp_path / "second"), "--overwrite_output_dir"])
    assert files(tmp_path / "first") == files(tmp_path / "second")


def test_artefacts_are_json_only():
    assert len(NAMES) == 6
    for name in NAMES:
        assert {path.name for path in (ARTEFACTS / name).iterdir()} == {
            "tokenizer.json",
            "tokenizer_config.json",
        }
    assert {path.suffix for path in ARTEFACTS.rglob("*") if path.is_file()} == {".json", ".md"}


@pytest.mark.parametrize("name", NAMES)
def test_training_again_gives_the_same_bytes_and_the_row_of_the_table(name, tmp_path, capsys):
    corpus, kind, *size = name.split("-")
    if not Path(os.environ.get("NANOGPT_HF_DATA", ""), f"{corpus}.txt").is_file():
        pytest.skip(f"NANOGPT_HF_DATA has no {corpus}.txt, and what stands in for it is another text")
    words = ["--corpus", corpus, "--kind", kind, *(["--vocab_size", *size] if size else [])]
    train_tokenizer([*words, "--output_dir", str(tmp_path / name)])
    made = files(tmp_path / name)
    assert made.pop("manifest.json") and made == files(ARTEFACTS / name)
    row = capsys.readouterr().out.splitlines()[-1]
    assert row in (ARTEFACTS / "README.md").read_text(encoding="utf-8").splitlines()
    text = "".join(load_corpus(corpus).train)
    tokenizer = load_tokenizer(str(ARTEFACTS / name))
    assert tokenizer.decode(encode(tokenizer, text)) == text
