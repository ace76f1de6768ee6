"""GGUF: read back by transformers and by pip gguf, and run by a real llama.cpp where there is one."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import ROOT, run_here
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

from nanogpt_hf import NanoGPTConfig, NanoGPTForCausalLM
from nanogpt_hf.common.errors import UserError
from nanogpt_hf.data.tokenization import END_OF_TEXT, train_bpe_tokenizer, train_char_tokenizer
from nanogpt_hf.sharing.export import export, export_run
from nanogpt_hf.sharing.gguf import write_gguf
from nanogpt_hf.sharing.gguf_tokenizer import PRE_TOKENIZERS

gguf = pytest.importorskip("gguf", reason="gguf is not installed (extra gguf)")

# The tokenizers of characters have met neither ё, nor the emoji, nor U+2581: the text has bytes in it.
PASSAGE = (
    "Now is the winter of our discontent made glorious summer by this sun of York.\r\nЕщё не всё: её весёлый счёт, "
    "зелёный клён\n\n  и тёмный мёд 👩‍💻, a\u2581b \u2581 <0x0A>, I've 1234567 of 'em; and all the clouds that "
    "lour'd upon our house\n\tin the deep bosom of the ocean buried. Now are our brows bound with victorious wreaths.\n"
)
UNSEEN = {*"ё👩💻\u2581"}
PROMPTS = ["Now is the winter of", "зелёный клён\n\n ", "и тёмный мёд 👩‍💻", "a\u2581b \u2581 <0x0A>,"]
PLAIN = {
    "gpt2": (GPT2LMHeadModel, GPT2Config, {"n_inner": 96}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True}),
    "llama": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 2}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_progress_bars():
    logging.disable_progress_bar()


def char_tokenizer():
    return train_char_tokenizer(["".join(sorted({*PASSAGE} - UNSEEN))])


def bpe_tokenizer():
    tokenizer = train_bpe_tokenizer([PASSAGE], 320)
    tokenizer.add_tokens([AddedToken("<poem>", normalized=False)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|verse|>"]})
    return tokenizer


def plain_model(family, tokenizer, **fields):
    """A tiny one of transformers' own classes, with padding in its embedding that is never sampled."""
    model_class, config_class, own = PLAIN[family]
    end, rows = tokenizer.eos_token_id, -(-len(tokenizer) // 64) * 64
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
    }
    sizes |= {} if family == "gpt2" else {"intermediate_size": 160}
    special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "vocab_size": rows}
    torch.manual_seed(0)
    model = model_class(config_class(**sizes | special | own | fields))
    model.generation_config.suppress_tokens = list(range(len(tokenizer), rows))
    return model.eval()


def read(path):
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return fields, tensors


# --- read back ---


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("family", PLAIN)
def test_transformers_reads_the_same_model(family, kind, tmp_path):
    tokenizer = char_tokenizer() if kind == "char" else bpe_tokenizer()
    model = plain_model(family, tokenizer, tie_word_embeddings=False)
    write_gguf(model, tokenizer, tmp_path / "model.gguf")
    rows = len(tokenizer)
    config = PLAIN[family][1].from_dict(model.config.to_dict() | {"vocab_size": rows})
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", config=config, dtype=torch.float32
    )
    ids = torch.tensor([tokenizer(PASSAGE).input_ids[:100]])
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits[..., :rows], atol=1e-5, rtol=0)


@pytest.mark.parametrize("quantization, error", [("bf16", 2**-8), ("q8_0", 1 / 127)])
def test_matrices_alone_are_quantised(quantization, error, tmp_path):
    tokenizer = char_tokenizer()
    model = plain_model("gpt2", tokenizer)
    for name in ("f32", quantization):
        write_gguf(model, tokenizer, tmp_path / name, name)
    exact, found = read(tmp_path / "f32")[1], read(tmp_path / quantization)[1]
    assert exact.keys() == found.keys() and "output.weight" not in found
    for name, weight in exact.items():
        rounded = weight.ndim == 2 and name != "position_embd.weight"
        assert np.array_equal(weight, found[name]) != rounded
        assert np.abs(weight - found[name]).max() <= error * np.abs(weight).max()


def test_it_holds_the_tokens_and_how_they_are_sampled(tmp_path):
    tokenizer = bpe_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    model = plain_model("qwen3", tokenizer)
    generation = model.generation_config
    generation.do_sample, generation.temperature, generation.top_k, generation.repetition_penalty = (
        True,
        0.5,
        7,
        1.25,
    )
    write_gguf(model, tokenizer, tmp_path / "model.gguf", name="poet")
    fields, tensors = read(tmp_path / "model.gguf")
    sampling = {
        "temp": 0.5,
        "top_k": 7,
        "top_p": 1.0,
        "min_p": 0.0,
        "penalty_repeat": 1.25,
        "penalty_last_n": -1,
    }
    assert {name: fields[f"general.sampling.{name}"] for name in sampling} == sampling
    assert fields["general.name"] == "poet" and fields["qwen3.context_length"] == 256
    tokens, kinds = fields["tokenizer.ggml.tokens"], dict(enumerate(fields["tokenizer.ggml.token_type"]))
    assert len(tokens) == len(tokenizer) == len(tensors["token_embd.weight"]) < model.config.vocab_size
    assert kinds[tokens.index("<poem>")] == gguf.TokenType.USER_DEFINED
    assert kinds[tokens.index("<|verse|>")] == kinds[tokenizer.eos_token_id] == gguf.TokenType.CONTROL
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template


# --- what a GGUF cannot hold ---


def renormalised(tokenizer):
    spec = json.loads(tokenizer.backend_tokenizer.to_str()) | {"normalizer": {"type": "Lowercase"}}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)), eos_token=END_OF_TEXT
    )


def with_stripping(tokenizer):
    tokenizer.add_tokens([AddedToken("<poem>", lstrip=True)])
    return tokenizer


def with_an_end(tokenizer):
    from tokenizers.processors import TemplateProcessing

    ends = [(END_OF_TEXT, tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"$A {END_OF_TEXT}", special_tokens=ends)
    return tokenizer


@pytest.mark.parametrize(
    "family, fields, change, words",
    [
        ("gpt2", {"activation_function": "relu"}, None, "activation_function (relu)"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, None, "scale_attn_by_inverse_layer_idx"),
        ("qwen3", {"attention_bias": True}, None, "attention_bias"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, None, "layer_types"),
        ("llama", {"mlp_bias": True}, None, "mlp_bias"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, None, "rope_parameters"),
        ("gpt2", {}, renormalised, "none that llama.cpp would read alike"),
        ("gpt2", {}, with_stripping, "'<poem>' has lstrip set"),
        ("gpt2", {}, with_an_end, "tokens around a text"),
        ("gpt2", {}, lambda _: train_char_tokenizer(["a\0b"]), "the character NUL"),
    ],
)  # fmt: skip
def test_what_llama_cpp_does_not_compute_is_refused(family, fields, change, words, tmp_path):
    tokenizer = char_tokenizer()
    model = plain_model(family, tokenizer, **fields)
    tokenizer = change(tokenizer) if change else tokenizer
    with pytest.raises(UserError) as caught:
        write_gguf(model, tokenizer, tmp_path / "model.gguf")
    assert words in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_other_models_and_odd_widths_are_refused(tmp_path):
    tokenizer = char_tokenizer()
    with pytest.raises(UserError, match="this is a gpt_neox"):
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

        odd = GPTNeoXConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=320
        )
        write_gguf(GPTNeoXForCausalLM(odd), tokenizer, tmp_path / "model.gguf")
    narrow = plain_model("gpt2", tokenizer, n_inner=40)
    with pytest.raises(UserError, match=r"blk.0.ffn_down.weight has 40: use --quantization bf16"):
        write_gguf(narrow, tokenizer, tmp_path / "model.gguf", "q8_0")
    assert not list(tmp_path.iterdir())


# --- share.py ---


def native_folder(path, architecture, tokenizer):
    end, rows = tokenizer.eos_token_id, -(-len(tokenizer) // 64) * 64
    special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "vocab_size": rows}
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 256}
    model = NanoGPTForCausalLM(NanoGPTConfig(architecture=architecture, **sizes | special))
    export(model, tokenizer, path, "nanogpt")
    return model


def test_share_writes_a_gguf_a_modelfile_and_a_card(tmp_path, capfd):
    native_folder(tmp_path / "run", "gpt2", char_tokenizer())
    words = ["--hub_format", "gguf", "--quantization", "q8_0", "--output_dir", tmp_path / "my poet"]
    status = run_here("share.py", "--model", tmp_path / "run", *words)
    assert (status, capfd.readouterr().err) == (0, "")
    assert {path.name for path in (tmp_path / "my poet").iterdir()} == {
        "README.md",
        "manifest.json",
        "Modelfile",
        "my-poet-Q8_0.gguf",
    }
    lines = (tmp_path / "my poet" / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./my-poet-Q8_0.gguf" and 'TEMPLATE """{{ .Prompt }}"""' in lines
    assert "PARAMETER num_ctx 256" in lines and "PARAMETER top_k 50" in lines
    card = (tmp_path / "my poet" / "README.md").read_text(encoding="utf-8")
    assert "library_name: gguf" in card and "A GPT of 0.1" in card
    assert "llama-completion -m my-poet-Q8_0.gguf" in card and "ollama create my-poet -f Modelfile" in card


def test_a_quantisation_without_gguf_is_a_sentence(tmp_path, capfd):
    words = ["--model", tmp_path, "--quantization", "q8_0", "--output_dir", tmp_path / "out"]
    assert run_here("share.py", *words) == 2
    assert "--quantization q8_0 is of a GGUF: add --hub_format gguf." in capfd.readouterr().err


def test_a_model_that_has_no_plain_form_has_no_gguf(tmp_path):
    model = native_folder(tmp_path / "run", "gpt2", char_tokenizer())
    model.config.bias, model.config.architecture = False, "custom"
    model.config.save_pretrained(tmp_path / "run")
    with pytest.raises(UserError):
        export(model, char_tokenizer(), tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


# --- a real llama.cpp ---

NODE_MODULES = Path(os.environ.get("NANOGPT_HF_NODE_MODULES", ROOT / "node_modules"))
needs_llama_cpp = pytest.mark.skipif(
    not (shutil.which("node") and (NODE_MODULES / "node-llama-cpp").is_dir()),
    reason="no llama.cpp: npm install node-llama-cpp, and name its node_modules in NANOGPT_HF_NODE_MODULES",
)


def run_llama_cpp(path, prompts, new_tokens=200):
    task = {
        "modules": str(NODE_MODULES),
        "model": str(path),
        "prompts": prompts,
        "context": 256,
        "new_tokens": new_tokens,
    }
    done = subprocess.run(
        ["node", Path(__file__).with_name("llama_cpp.mjs"), json.dumps(task)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["answers"]


def learn_by_heart(model, tokenizer, steps=150):
    """Until what follows each prompt in the passage is beyond doubt."""
    texts = [PASSAGE[PASSAGE.index(prompt) :] + PASSAGE for prompt in PROMPTS]
    x = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids[:230] for text in texts])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def assert_llama_cpp_says_the_same(path, model, tokenizer, new_tokens=200):
    for prompt, answer in zip(PROMPTS, run_llama_cpp(path, PROMPTS, new_tokens), strict=True):
        ids = tokenizer(prompt).input_ids
        assert answer["ids"] == ids and answer["text"] == prompt
        said = model.generate(torch.tensor([ids]), max_new_tokens=new_tokens, do_sample=False)[0, len(ids) :]
        assert answer["follow"] == said.tolist(), prompt


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("family", PLAIN)
def test_llama_cpp_says_the_same_200_tokens(family, kind, tmp_path):
    tokenizer = char_tokenizer() if kind == "char" else bpe_tokenizer()
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family == "gpt2" else {}
    model = learn_by_heart(plain_model(family, tokenizer, **dropout), tokenizer)
    write_gguf(model, tokenizer, tmp_path / "f32.gguf")
    assert_llama_cpp_says_the_same(tmp_path / "f32.gguf", model, tokenizer)
    marked = f"{END_OF_TEXT}Now <poem> is <|verse|>"
    assert run_llama_cpp(tmp_path / "f32.gguf", [marked], 0)[0]["ids"] == tokenizer(marked).input_ids
    for quantization in ("bf16", "q8_0"):
        write_gguf(model, tokenizer, tmp_path / quantization, quantization)
        answers = run_llama_cpp(tmp_path / quantization, PROMPTS, 8)
        assert [answer["ids"] for answer in answers] == [tokenizer(prompt).input_ids for prompt in PROMPTS]
        assert all(len(answer["follow"]) == 8 for answer in answers)


@needs_llama_cpp
@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_llama_cpp_cuts_words_as_the_tokenizers_of_others_do(name, tmp_path):
    spec = json.loads(Tokenizer(models.BPE(ignore_merges=name == "llama-bpe")).to_str())
    spec["pre_tokenizer"] = json.loads(
        json.dumps(PRE_TOKENIZERS[name]).replace('"use_regex"', '"trim_offsets": true, "use_regex"')
    )
    backend = Tokenizer.from_str(json.dumps(spec))
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([PASSAGE, "12 123 1234 I'LL we've\r\n\r\n x  y"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT
    )
    write_gguf(plain_model("llama", tokenizer), tokenizer, tmp_path / "model.gguf")
    prompts = [*PROMPTS, PASSAGE, "I'LL we've 12345,67  don't\n\n \t x\r\n\r\ny   "]
    answers = run_llama_cpp(tmp_path / "model.gguf", prompts, 0)
    assert [answer["ids"] for answer in answers] == [tokenizer(prompt).input_ids for prompt in prompts]


@needs_llama_cpp
@pytest.mark.parametrize("source", ["run", "plain"])
@pytest.mark.parametrize("architecture", PLAIN)
def test_what_share_writes_runs(architecture, source, tmp_path):
    tokenizer = char_tokenizer()
    export(native_folder(tmp_path / "run", architecture, tokenizer), tokenizer, tmp_path / "plain")
    export_run(tmp_path / source, tmp_path / "out", "gguf")
    answers = run_llama_cpp(next((tmp_path / "out").glob("*.gguf")), PROMPTS, 4)
    reader = AutoTokenizer.from_pretrained(tmp_path / source)
    assert [answer["ids"] for answer in answers] == [reader(prompt).input_ids for prompt in PROMPTS]
