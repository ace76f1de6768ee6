"""The evaluate modules: through both doors, against closed forms and a brute-force reference, offline."""

import functools
import importlib
import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import ROOT, Run, stranger

import nanogpt_hf.metrics

FOLDER = Path(nanogpt_hf.metrics.__file__).parent
TEXTS = ["Мороз и солнце;\r\n", "", "день чудесный! 😀\0"]
CASES = {
    "bits_per_byte": {"predictions": [3.0, 0.0, 4.5], "references": TEXTS},
    "bits_per_character": {"predictions": [3.0, 0.0, 4.5], "references": TEXTS},
    "perplexity": {"predictions": [3.0, 0.0, 4.5], "references": TEXTS, "token_counts": [5, 0, 6]},
    "distinct_n": {"predictions": ["to be or not to be", "to be"], "n": 2},
    "memorization": {"predictions": ["не мороз"], "references": ["Мороз", "и мороз"], "window": 3},
}


@functools.cache
def metric(name):
    return nanogpt_hf.metrics.load(name)


def expected_results():
    return {name: metric(name).compute(**inputs) for name, inputs in CASES.items()}


BY_PATH = """
import json, sys, evaluate
folder, cases = sys.argv[1], json.loads(sys.argv[2])
print(json.dumps({name: evaluate.load(f"{folder}/{name}.py").compute(**cases[name]) for name in cases}))
"""


def test_every_metric_loads_by_path_offline_without_the_package(tmp_path):
    said = stranger(BY_PATH, FOLDER, json.dumps(CASES), folder=tmp_path)
    assert json.loads(said.splitlines()[-1]) == expected_results()


def test_load_needs_no_writable_cache_and_no_writable_current_folder(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "current").mkdir(mode=0o555)
    # No cache can be made below a file, whoever asks.
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "file" / "cache")}
    prepare = (write_results, tmp_path / "current", tmp_path / "results.json")
    run = Run([], log=tmp_path / "log", prepare=prepare, **offline)
    assert run.wait() == 0, run.said()
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == expected_results()
    assert not list((tmp_path / "current").iterdir())


def write_results(current, path):
    import evaluate

    importlib.reload(evaluate.config)  # which reads the variables
    os.chdir(current)
    path.write_text(json.dumps(expected_results()), encoding="utf-8")
    raise SystemExit(0)


def test_what_takes_long_is_imported_where_a_metric_is_loaded(tmp_path):
    code = "import sys, nanogpt_hf.metrics; print({'evaluate', 'pydivsufsort'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_the_cases_cover_every_metric():
    assert {path.stem for path in FOLDER.glob("*.py")} - {"__init__"} == set(CASES)


@pytest.mark.parametrize(
    "name, nearest", [("memorisation", "memorization"), ("bits_per_char", "bits_per_character"), ("", "")]
)
def test_an_unknown_name_is_answered_with_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"unknown metric '{name}'.* is '{nearest}"):
        metric(name)


@given(st.text(min_size=1, max_size=40), st.integers(0, 40))
@settings(max_examples=50, deadline=None)
def test_bits_are_the_entropy_of_a_unigram_model_wherever_the_text_is_cut(text, cut):
    counts = Counter(text)
    pieces = [text[:cut], text[cut:]]
    nats = [sum(-math.log(counts[character] / len(text)) for character in piece) for piece in pieces]
    entropy = sum(-math.log2(counts[character] / len(text)) for character in text)
    per_byte = metric("bits_per_byte").compute(predictions=nats, references=pieces)["bits_per_byte"]
    per_character = metric("bits_per_character").compute(predictions=nats, references=pieces)
    per_character = per_character["bits_per_character"]
    assert per_byte * len(text.encode("utf-8")) == pytest.approx(entropy)
    assert per_character * len(text) == pytest.approx(entropy)


def test_perplexity_is_exp_of_torch_cross_entropy():
    torch.manual_seed(0)
    text, logits, labels = "eleven char", torch.randn(7, 13), torch.randint(13, (7,))
    nats = torch.nn.functional.cross_entropy(logits, labels, reduction="none").double()
    result = metric("perplexity").compute(
        predictions=[nats[:4].sum(), nats[4:].sum()], references=[text[:5], text[5:]], token_counts=[4, 3]
    )
    assert result["perplexity"] == pytest.approx(nats.mean().exp().item())
    assert result["perplexity_per_character"] == pytest.approx((nats.sum() / 11).exp().item())


def test_perplexity_of_a_diverged_model_is_not_an_overflow():
    perplexity = metric("perplexity")
    infinite = perplexity.compute(predictions=[1e4], references=["a"], token_counts=[1])
    assert infinite == {"perplexity": math.inf, "perplexity_per_character": math.inf}
    undefined = perplexity.compute(predictions=[math.nan], references=["a"], token_counts=[1])
    assert math.isnan(undefined["perplexity"])


@pytest.mark.parametrize(
    "texts, n, unit, share",
    [
        (["to be or not to be"], 1, "word", 4 / 6),
        (["to be or not to be"], 2, "word", 4 / 5),
        (["to be", "or not", "to be"], 2, "word", 2 / 3),  # "be or" spans two texts and is none
        (["abab", "", "ba"], 2, "character", 2 / 4),
        (["😀😀😀"], 1, "character", 1 / 3),
    ],
)
def test_distinct_n_by_hand(texts, n, unit, share):
    assert metric("distinct_n").compute(predictions=texts, n=n, unit=unit) == {"distinct_n": share}


def compared_naively(samples, references, window):
    """What memorization returns, from every substring of every sample."""
    best = {"longest_overlap": 0, "longest_overlap_text": ""}
    best |= dict.fromkeys(["sample_index", "sample_offset", "reference_index", "reference_offset"])
    windows = []
    for i, sample in enumerate(samples):
        for start in range(len(sample)):
            if len(sample) - start >= window:
                windows.append(any(sample[start : start + window] in text for text in references))
            for end in range(start + 1, len(sample) + 1):
                places = [(j, text.find(sample[start:end])) for j, text in enumerate(references)]
                places = [place for place in places if place[1] >= 0]
                if places and end - start > best["longest_overlap"]:
                    best = {
                        "longest_overlap": end - start,
                        "longest_overlap_text": sample[start:end],
                        "sample_index": i,
                        "sample_offset": start,
                        "reference_index": places[0][0],
                        "reference_offset": places[0][1],
                    }
    return best | {"memorized_share": sum(windows) / len(windows) if windows else 0.0}


# NUL, the last code point of Unicode, and both sides of where UTF-16 needs surrogates.
@st.composite
def samples_references_window(draw):
    alphabet = draw(st.sampled_from(["a", "ab", "a\0\U0010ffff", "\ud7ff\uffff\U00010000", "abcж\r\n"]))
    texts = st.lists(st.text(alphabet, max_size=12), max_size=4)
    return draw(texts), draw(texts.filter(any)), draw(st.integers(1, 5))


@given(samples_references_window())
@settings(max_examples=100, deadline=None)
def test_memorization_equals_brute_force(case):
    samples, references, window = case
    result = metric("memorization").compute(predictions=samples, references=references, window=window)
    assert result == compared_naively(samples, references, window)


@pytest.mark.parametrize("samples, references", [(["abcdef"], ["abc", "def"]), (["abc", "def"], ["abcdef"])])
def test_an_overlap_never_spans_two_texts(samples, references):
    result = metric("memorization").compute(predictions=samples, references=references, window=4)
    assert result["longest_overlap"] == 3
    assert result["memorized_share"] == 0.0


@pytest.mark.parametrize(
    "alphabet",
    ["ab", [chr(code) for code in range(0x4E00, 0x5E00)], [chr(code) for code in range(0x20000, 0x20040)]],
    ids=["two letters", "4096 letters", "astral"],
)
def test_a_planted_quotation_is_found_at_its_exact_place(alphabet):
    rng = random.Random(1)
    references = ["".join(rng.choices(alphabet, k=5000)) for _ in range(3)]
    samples = ["", "short", "".join(rng.choices(alphabet, k=1000)), "".join(rng.choices(alphabet, k=50))]
    quote = references[1][4321:4621]
    samples[2] = f"{samples[2][:700]}>{quote}<{samples[2][700:]}"  # in marks that no reference holds
    result = metric("memorization").compute(predictions=samples, references=references)
    share = result.pop("memorized_share")
    assert result == {
        "longest_overlap": 300,
        "longest_overlap_text": quote,
        "sample_index": 2,
        "sample_offset": 701,
        "reference_index": 1,
        "reference_offset": 4321,
    }
    windows = (1302 - 19) + (50 - 19)
    chance = 0.02 if alphabet == "ab" else 0  # 15000 windows of 2**20 possible ones
    assert (300 - 19) / windows <= share <= (300 - 19) / windows + chance


def test_samples_may_come_in_batches():
    memorization = nanogpt_hf.metrics.load("memorization")
    memorization.add_batch(predictions=["xx", "bc"])
    memorization.add_batch(predictions=["abx"])
    result = memorization.compute(references=["abc"], window=2)
    assert result["longest_overlap_text"] == "bc"
    assert result["sample_index"] == 1
    assert result["memorized_share"] == 2 / 4


@pytest.mark.parametrize("copied", [False, True], ids=["invented", "copied"])
def test_a_hundred_thousand_characters_against_a_million(copied):
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoin shrdlu", k=rng.randint(1, 9))) for _ in range(5000)]
    corpus = " ".join(rng.choices(words, k=250_000))[:1_100_000]
    sample = corpus[500_000:600_000] if copied else " ".join(rng.choices(words, k=25_000))[:100_000]
    memorization = metric("memorization")
    result = memorization.compute(predictions=[sample], references=[corpus])
    assert (result["memorized_share"] == 1.0) is copied


@pytest.mark.parametrize(
    "name, inputs, message",
    [
        (
            "bits_per_byte",
            {"predictions": [1.0, 2.0], "references": ["a"]},
            r"predictions \(2\).*references \(1\)",
        ),
        ("bits_per_byte", {"predictions": [], "references": []}, "references hold no text"),
        ("bits_per_character", {"predictions": [1.0], "references": ["a", "b"]}, "Mismatch in the number"),
        ("bits_per_character", {"predictions": [1.0], "references": [""]}, "references hold no text"),
        (
            "perplexity",
            {"predictions": [1.0], "references": ["a"], "token_counts": [1, 2]},
            "Mismatch in the number",
        ),
        ("perplexity", {"predictions": [1.0], "references": ["a"]}, "missing: .'token_counts'"),
        ("perplexity", {"predictions": [1.0], "references": [""], "token_counts": [1]}, "no text"),
        ("perplexity", {"predictions": [1.0], "references": ["a"], "token_counts": [0]}, "token_counts"),
        (
            "perplexity",
            {"predictions": [1.0, 1.0], "references": ["a", "b"], "token_counts": [3, -1]},
            "token_counts",
        ),
        ("distinct_n", {"predictions": ["a b"], "n": 0}, "n is 0"),
        ("distinct_n", {"predictions": ["a b"], "unit": "token"}, "unit is 'token'"),
        ("distinct_n", {"predictions": ["a", "b"]}, "holds 2 words"),
        ("distinct_n", {"predictions": "a b c"}, "single text"),
        ("memorization", {"predictions": ["a"], "references": []}, "references hold no text"),
        ("memorization", {"predictions": ["a"], "references": ["", ""]}, "references hold no text"),
        ("memorization", {"predictions": ["a"]}, "references hold no text"),
        ("memorization", {"predictions": ["a"], "references": "a"}, "put a single text into a list"),
        ("memorization", {"predictions": "a", "references": ["a"]}, "put a single text into a list"),
        ("memorization", {"predictions": ["a"], "references": ["a"], "window": 0}, "window is 0"),
    ],
)
def test_a_mistake_is_one_clear_sentence_and_leaves_the_metric_usable(name, inputs, message):
    used = nanogpt_hf.metrics.load(name)
    with pytest.raises(ValueError, match=message) as raised:
        used.compute(**inputs)
    assert "\n" not in str(raised.value)
    assert used.compute(**CASES[name]) == metric(name).compute(**CASES[name])
