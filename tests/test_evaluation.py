"""Losses over a split, models of every kind on one scale, and what loading refuses."""

import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from processes import ring
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from nanogpt_hf import NanoGPTConfig, NanoGPTForCausalLM
from nanogpt_hf.analysis.comparison import (
    choose_passage,
    measure_samples,
    short_names,
)
from nanogpt_hf.common.settings import TrainingSettings
from nanogpt_hf.data.corpora import load_corpus
from nanogpt_hf.data.token_stream import TokenStream
from nanogpt_hf.data.tokenization import encode_documents, make_tokenizer
from nanogpt_hf.generation.text import generate_ids, generate_text
from nanogpt_hf.model.loading import load_model_and_tokenizer
from nanogpt_hf.runs.pretraining import pretrain
from nanogpt_hf.training import evaluation
from nanogpt_hf.training.evaluation import evaluate_split, token_losses
from recipes.compare import main as evaluate

ROOT = Path(__file__).parents[1]
TEXT = (
    "Мороз и солнце; день чудесный! Ещё ты дремлешь, друг прелестный.\nThe frost, the sun: a 😀 day.\n" * 20
)
T = 16
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": T, "initializer_range": 0.3}


def save(model, tokenizer, folder):
    """A checkpoint as another tool would leave it: nothing is said of how to generate."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_bytes(TEXT.encode())
    return load_corpus(str(path))


@pytest.fixture(scope="module")
def folders(corpus, tmp_path_factory):
    """A checkpoint of every kind that there is, by its name."""
    folder = tmp_path_factory.mktemp("models")
    char = make_tokenizer("char", corpus.train, 0, corpus.validation)
    bpe = make_tokenizer("bpe", corpus.train, 300)
    end = {name: bpe.eos_token_id for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(1)
    saved = {
        "char": save(
            NanoGPTForCausalLM(NanoGPTConfig(vocab_size=384, architecture="qwen3", **SIZES)),
            char,
            folder / "char",
        ),
        "bpe": save(NanoGPTForCausalLM(NanoGPTConfig(vocab_size=320, **SIZES, **end)), bpe, folder / "bpe"),
        "gpt2": save(GPT2LMHeadModel(GPT2Config(vocab_size=300, **SIZES, **end)), bpe, folder / "gpt2"),
        "qwen3": save(
            Qwen3ForCausalLM(
                Qwen3Config(
                    vocab_size=320,
                    hidden_size=32,
                    intermediate_size=64,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    head_dim=16,
                    max_position_embeddings=T,
                    initializer_range=0.3,
                    **end,
                )
            ),
            bpe,
            folder / "qwen3",
        ),
    }
    for name, init in (("adapter", False), ("new_adapter", True)):
        adapter = get_peft_model(
            AutoModelForCausalLM.from_pretrained(saved["gpt2"]),
            LoraConfig(
                task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=init
            ),
        )
        adapter.save_pretrained(folder / name)
        saved[name] = str(folder / name)
    return saved


@pytest.fixture(autouse=True)
def accelerator(own_accelerate_state):
    return Accelerator(cpu=True)


def stream_of(folder, corpus):
    model, tokenizer = load_model_and_tokenizer(folder)
    return model, TokenStream(encode_documents(tokenizer, corpus.validation), T)


@torch.no_grad()
def loss_by_definition(model, ids, places):
    """Nats of ids[last] after ids[first:last] in float64, summed over the places (first, last)."""
    model = model.double().eval()
    ids = torch.from_numpy(ids).long()
    total = 0.0
    for first, last in places:
        logits = model(input_ids=ids[None, first:last]).logits[0, -1].double()
        total -= logits.log_softmax(dim=-1)[ids[last]].item()
    return total


@pytest.mark.parametrize("kind", ["char", "bpe", "gpt2", "qwen3", "adapter"])
def test_the_loss_is_that_of_a_plain_loop_in_float64_for_any_batch_size(kind, folders, corpus, accelerator):
    model, stream = stream_of(folders[kind], corpus)
    model.train()  # as in the middle of a training, with its dropout
    splits = [
        evaluate_split(model, stream, corpus.characters("validation"), size, accelerator)
        for size in (1, 7, 64)
    ]
    assert model.training
    ids = stream.ids.numpy()
    places = [((last - 1) // T * T, last) for last in range(1, len(ids))]
    expected = loss_by_definition(model, ids, places) / len(places)
    for split in splits:
        assert split.tokens == len(places)
        assert split.loss == pytest.approx(expected, rel=1e-6)


def test_windows_come_fewer_at_once_where_the_vocabulary_is_large(folders, corpus, accelerator, monkeypatch):
    model, stream = stream_of(folders["char"], corpus)
    monkeypatch.setattr(evaluation, "LOGITS_AT_ONCE", 3 * T * model.config.vocab_size + 1)
    at_once = set()
    model.register_forward_hook(lambda module, inputs, output: at_once.add(len(output.logits)))
    evaluate_split(model, stream, corpus.characters("validation"), 64, accelerator)
    assert max(at_once) == 3


@pytest.mark.parametrize("stride", [1, 5, T])
def test_a_stride_gives_every_token_at_least_so_much_context(stride, folders, corpus, accelerator):
    model, stream = stream_of(folders["char"], corpus)
    split = evaluate_split(model, stream, corpus.characters("validation"), 32, accelerator, stride)
    ids, places = stream.ids.numpy(), []
    for last in range(1, len(ids)):
        first = max(0, math.ceil((last - T) / stride)) * stride  # the first window that holds it
        first = min(first, len(ids) - 1 - T)  # which ends with the text
        assert last - first > T - stride or first == 0
        places.append((first, last))
    assert split.nats == pytest.approx(loss_by_definition(model, ids, places), rel=1e-6)
    assert token_losses(model.float(), stream, 9, stride).nats.sum() == pytest.approx(split.nats, rel=1e-6)


@given(st.integers(1, 9), st.integers(1, 60), st.data())
@settings(max_examples=200, deadline=None)
def test_windows_of_any_stride_count_every_token_once(block_size, more, data):
    stride = data.draw(st.integers(1, block_size))
    stream = TokenStream(np.arange(block_size + more, dtype=np.int32), block_size)
    x, y = stream.window_batch(np.arange(stream.windows(stride)), stride)
    counts = y != -100
    assert y[counts].tolist() == list(range(1, block_size + more))
    assert (x + 1)[counts].tolist() == y[counts].tolist()
    context = counts.nonzero()[:, 1] + 1
    assert ((context > block_size - stride) | (y[counts] <= block_size)).all()


def results_of(words, folder):
    evaluate([*words, "--use_cpu", "--output_dir", str(folder)])
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_models_are_compared_as_poets(tmp_path, folders, capsys):
    pytest.importorskip("pronouncing", reason="pronouncing is not installed (extra verse)")
    ends = "cat dog hat log day sun way one night king light ring moon June".split()
    poems = [
        "".join(f"{first} {end}\n" for end in ends)
        for first in "The A One My No This That Each Our All".split()
    ]
    poems += [poem.lower() for poem in poems] + [poem.upper() for poem in poems]
    (tmp_path / "poems.txt").write_text("\n".join(poems))
    words = [
        "--model",
        folders["char"],
        "--corpus",
        tmp_path / "poems.txt",
        "--verse",
        "sonnet",
        "--samples",
        "6",
    ]
    evaluate([str(word) for word in (*words, "--use_cpu", "--output_dir", tmp_path / "out")])
    mine, real = json.loads((tmp_path / "out" / "results.json").read_text())["models"]
    assert mine["poems"] == len(mine["samples"]) == 6 and 0 <= mine["rhyme"] <= 1 and mine["loss"] > 0
    assert (
        real["model"] == "real stanzas" and real["rhyme"] == 1 and real["lines"] == 13 and real["poems"] == 30
    )
    first = [text.partition("\n")[0] for text in mine["samples"]]
    assert {*first} == {"All cat", "all cat", "ALL CAT"}
    assert (
        "in metre" in capsys.readouterr().out
        and "<h2>real stanzas" in (tmp_path / "out" / "verse.html").read_text()
    )


def test_models_of_every_kind_stand_in_one_table(folders, corpus, tmp_path, capsys):
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    words = ["--model", *folders.values(), "--corpus", str(tmp_path / "text.txt")]
    words += ["--validation_split_percentage", "10"]
    results = results_of(
        [*words, "--samples", "2", "--sample_length", "50", "--passage_length", "200"], tmp_path
    )
    rows = {row["model"]: row for row in results["models"]}
    assert list(rows) == list(folders)
    characters, n_bytes = (
        sum(map(len, part)) for part in (corpus.validation, map(str.encode, corpus.validation))
    )
    for row in rows.values():
        bits = row["loss"] * row["tokens"] / math.log(2)
        assert row["bits_per_byte"] == pytest.approx(bits / n_bytes, rel=1e-9)
        assert row["bits_per_character"] == pytest.approx(bits / characters, rel=1e-9)
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]), rel=1e-9)
        assert row["perplexity_per_character"] == pytest.approx(2 ** row["bits_per_character"], rel=1e-9)
        assert [len(text) <= 50 for text in row["samples"]] == [True, True]
        assert 0 <= row["memorized_share"] <= 1 and row["longest_overlap"] >= 1
    assert rows["char"]["tokens"] == characters
    assert rows["new_adapter"]["loss"] == pytest.approx(rows["gpt2"]["loss"], rel=1e-6)
    assert rows["adapter"]["loss"] != pytest.approx(rows["gpt2"]["loss"], rel=1e-4)
    assert rows["adapter"]["parameters"] > rows["gpt2"]["parameters"]

    table = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    assert max(map(len, table.splitlines())) <= 100  # columns of a terminal
    for part in table.split("\n\n")[1:]:
        assert [line.split("|")[1].strip() for line in part.splitlines()[2:]] == list(folders)
    assert f"{rows['qwen3']['bits_per_byte']:.4f}" in table
    assert str(tmp_path.parent) not in table + (tmp_path / "results.json").read_text(encoding="utf-8")
    page = (tmp_path / "surprisal.html").read_text(encoding="utf-8")
    assert [re.search(rf"<h2>{name}</h2>", page) is not None for name in folders] == [True] * len(folders)
    assert max(map(len, table.splitlines())) <= 100


def test_two_processes_measure_what_one_does(folders, tmp_path):
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    words = [
        "--model",
        folders["char"],
        folders["adapter"],
        "--corpus",
        str(tmp_path / "text.txt"),
        "--stride",
        "7",
    ]
    alone = results_of(words, tmp_path / "alone")
    words += ["--use_cpu", "--output_dir", str(tmp_path / "both"), "--per_device_eval_batch_size", "3"]
    runs = ring([words] * 2, tmp_path, recipe="compare.py")
    assert [run.wait() for run in runs] == [0, 0], runs[0].said() + runs[1].said()
    both = json.loads((tmp_path / "both" / "results.json").read_text(encoding="utf-8"))
    assert "".join(run.said() for run in runs).count("| char ") == 1
    for one, two in zip(alone["models"], both["models"], strict=True):
        assert one.keys() == two.keys()
        for key in one.keys() - {"model"}:
            assert two[key] == pytest.approx(one[key], rel=1e-6)


@given(
    st.lists(st.text("ab \n", min_size=1, max_size=40), min_size=1), st.integers(0, 50), st.integers(1, 30)
)
@settings(max_examples=200, deadline=None)
def test_a_passage_is_never_empty_and_begins_with_a_line_if_it_can(documents, wanted, length):
    text, start = choose_passage(documents, wanted, length)
    assert max(documents, key=len).startswith(text)
    assert 0 < len(text) - start <= length
    if start and text[start - 1] != "\n":
        assert "\n" not in text[start - 1 : start + length // 2 - 1]


def test_a_planted_quotation_is_found_in_samples(corpus):
    quote = corpus.train[0][100:400]
    result = measure_samples(["nothing", f"\x01{quote}\x01"], corpus)
    assert result["longest_overlap_text"] == quote
    assert (result["sample_index"], result["sample_offset"]) == (1, 1)
    assert corpus.train[0][result["reference_offset"] :].startswith(quote)
    assert math.isnan(measure_samples(["", "x"], corpus)["distinct_n"])


def test_models_are_called_by_as_little_of_their_path_as_tells_them_apart(tmp_path):
    for name in ("a/step-1", "b/step-1", "c"):
        (tmp_path / name).mkdir(parents=True)
    paths = [str(tmp_path / name) for name in ("a/step-1", "b/step-1", "c")]
    assert short_names([*paths[:2], "owner/name"]) == ["a/step-1", "b/step-1", "owner/name"]
    assert short_names([paths[0], paths[2]]) == ["step-1", "c"]
    assert short_names([paths[2], paths[2] + "/"]) == ["c", "c"]


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "there is nothing to compare"),
        (["--model", "no/such/folder"], "there is no folder 'no/such/folder'"),
        (["--model", "{bpe}", "--stride", "17"], "--stride is 17, more than the context of 16"),
        (["--model", "{bpe}", "--n_positions", "17"], "--n_positions is 17, more than .* 16 tokens"),
        (["--model", "{bpe}", "--stride", "0"], "--stride is 0, it must be at least 1"),
        (["--model", "{bpe}", "--samples", "-1"], "--samples is -1"),
    ],
)
def test_a_mistake_is_answered_in_one_sentence(words, message, folders, tmp_path):
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    words = [word.format(**folders) for word in words]
    with pytest.raises(ValueError, match=message):
        results_of([*words, "--corpus", str(tmp_path / "text.txt")], tmp_path / "results")
    assert not (tmp_path / "results").exists()


# --- loading ---


@pytest.mark.parametrize("kind", ["char", "bpe", "qwen3"])
def test_padding_of_the_vocabulary_is_never_sampled(kind, folders, tmp_path):
    shutil.copytree(folders[kind], tmp_path / kind)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / kind)
    model, tokenizer = load_model_and_tokenizer(str(tmp_path / kind))
    assert model.get_output_embeddings().weight.shape[0] > len(tokenizer)
    prompt = torch.tensor([[1, 2, 3]])
    with torch.no_grad():  # the padding is made what the models like best
        for each in (plain, model):
            hidden = each(prompt, output_hidden_states=True).hidden_states[-1][0, -1]
            each.get_output_embeddings().weight[len(tokenizer) :] = 9 * hidden

    def sampled(generator):
        return max(ids.max().item() for ids, _ in zip(generator, range(T - 3), strict=False))

    def generated(model):
        options = {"do_sample": True, "max_new_tokens": T - 3, "eos_token_id": None, "pad_token_id": 0}
        return model.generate(prompt.repeat(8, 1), **options).max().item()

    assert sampled(generate_ids(plain, prompt.repeat(8, 1), seed=1)) >= len(tokenizer)
    assert sampled(generate_ids(model, prompt.repeat(8, 1), seed=1)) < len(tokenizer)
    assert generated(plain) >= len(tokenizer)
    assert generated(model) < len(tokenizer)


def edit_json(path, **values):
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(content | values), encoding="utf-8")


def not_causal(folder):
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(vocab_size=300, **sizes)).save_pretrained(folder)


def not_a_decoder(folder):
    sizes = {"num_layers": 1, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(vocab_size=300, **sizes)).save_pretrained(folder)


def needs_code(folder):
    edit_json(folder / "config.json", model_type="other", auto_map={"AutoConfig": "code.Config"})
    (folder / "code.py").write_text("raise SystemExit(99)\n", encoding="utf-8")


def in_a_pickle(folder):
    torch.save(GPT2LMHeadModel.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut_short(folder):
    os.truncate(folder / "model.safetensors", 1000)


def other_tokenizer(folder):
    make_tokenizer("bpe", [TEXT], 310).save_pretrained(folder)


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


@pytest.mark.parametrize(
    "damage, message",
    [
        (shutil.rmtree, "there is no folder"),
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (
            lambda folder: (folder / "config.json").write_text("{", encoding="utf-8"),
            "config.json that cannot be read",
        ),
        (not_causal, "holds a BertForMaskedLM, but what is needed is a causal language model"),
        (not_a_decoder, "holds a T5ForConditionalGeneration, but"),
        (needs_code, "needs code of its own, which is never run"),
        (in_a_pickle, "weights .* cannot be loaded: .*model.safetensors"),
        (cut_short, "weights .* cannot be loaded"),
        (lambda folder: edit_json(folder / "config.json", n_layer=3), "lacks 12 weights"),
        (
            lambda folder: edit_json(folder / "config.json", vocab_size=304),
            r"asks for vocab_size 304, and there are only 300 rows",
        ),
        (other_tokenizer, "the tokenizer has ids up to 309, the model embeds 300 tokens"),
        (no_tokenizer, "holds no tokenizer"),
    ],
)
def test_a_bad_checkpoint_is_answered_in_one_sentence(damage, message, folders, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "model"
    shutil.copytree(folders["gpt2"], folder)
    damage(folder)
    with pytest.raises(ValueError, match=message) as raised:
        load_model_and_tokenizer(str(folder))
    assert "\n" not in str(raised.value)


def test_an_adapter_needs_its_base_and_safe_weights(folders, tmp_path):
    lost = shutil.copytree(folders["adapter"], tmp_path / "lost")
    edit_json(lost / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="adapter .*lost cannot be put on its base model: .*gone"):
        load_model_and_tokenizer(str(lost))
    pickled = shutil.copytree(folders["adapter"], tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(ValueError, match="no adapter_model.safetensors"):
        load_model_and_tokenizer(str(pickled))


def test_a_model_of_two_documents_stops_after_the_first(tmp_path):
    documents = [
        "The cat sat on the mat and looked at the moon.\n",
        "A dog ran over the hill and barked at stars.\n",
    ]
    rows = "".join(json.dumps({"text": document}) + "\n" for document in documents)
    (tmp_path / "texts.jsonl").write_text(rows, encoding="utf-8")
    AcceleratorState._reset_state(reset_partial_state=True)
    pretrain(
        TrainingSettings(
            corpus=str(tmp_path / "texts.jsonl"),
            output_dir=str(tmp_path / "run"),
            architecture="qwen3",
            n_layer=1,
            n_head=2,
            n_embd=32,
            n_positions=32,
            dropout=0.0,
            optim="muon",
            learning_rate=3e-3,
            per_device_train_batch_size=8,
            max_steps=150,
            warmup_steps=10,
            eval_steps=150,
            save_steps=150,
            sample_length=20,
            use_cpu=True,
        )
    )
    model, tokenizer = load_model_and_tokenizer(str(tmp_path / "run"))
    texts = generate_text(
        model, tokenizer, "The cat", temperature=0, num_return_sequences=2, max_new_tokens=100
    )
    assert texts == [documents[0].removeprefix("The cat")] * 2
