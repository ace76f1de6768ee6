"""Bases, what an adapter is put on, what trains then, and the tokens that are added: on tiny models, without a run."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from transformers import (
    CTRLConfig,
    CTRLLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from nanogpt_hf import NanoGPTConfig, NanoGPTForCausalLM
from nanogpt_hf.common.settings import FinetuningSettings
from nanogpt_hf.data.tokenization import extend_tokenizer, train_bpe_tokenizer
from nanogpt_hf.training.lora import (
    adapter_size,
    add_adapter,
    called_projections,
    describe_trained,
    embed_new_tokens,
    extend_embedding,
    find_targets,
    load_base,
    public_base,
)

SETTINGS = FinetuningSettings(lora_r=2, lora_alpha=4, lora_dropout=0.0, model_name_or_path="some/base")


def ours(**fields):
    torch.manual_seed(0)
    sizes = dict(vocab_size=40, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    return NanoGPTForCausalLM(NanoGPTConfig(**sizes | fields))


def llama():
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(LlamaConfig(**sizes))


ATTENTION, MLP = ["attn.c_attn", "attn.c_proj"], ["mlp.c_fc", "mlp.c_proj"]


@pytest.mark.parametrize(
    "make, names, expected",
    [
        (ours, ["attention"], ATTENTION),
        (ours, ["mlp"], MLP),
        (ours, ["mlp", "attention"], ATTENTION + MLP),
        (ours, ["all"], ATTENTION + MLP),
        (ours, ["c_proj", "h.1.mlp.c_fc"], ["c_proj", "h.1.mlp.c_fc"]),
        (llama, ["attention"], [f"self_attn.{letter}_proj" for letter in "koqv"]),
        (llama, ["mlp"], ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]),
        (llama, ["lm_head"], ["lm_head"]),
    ],
)
def test_short_names_and_ends_of_names_mean_projections(make, names, expected):
    assert find_targets(make(), names) == expected


@pytest.mark.parametrize(
    "name, message",
    [
        ("c_atn", "matches no projection of the base: use c_attn.$"),
        ("proj", "use c_proj.$"),
        (
            "zzz",
            "use all, attention, attn.c_attn, attn.c_proj, c_attn, c_fc, c_proj, mlp, mlp.c_fc, mlp.c_proj.$",
        ),
        ("lm_head", "cannot be merged, because the head's weights are the embedding's too"),
    ],
)
def test_another_name_is_answered_with_those_that_there_are(name, message):
    with pytest.raises(ValueError, match=message):
        find_targets(ours(), ["mlp", name])


def test_a_projection_that_has_a_number_is_named_with_what_holds_it():
    model = CTRLLMHeadModel(CTRLConfig(vocab_size=40, n_positions=8, n_embd=16, dff=24, n_layer=1, n_head=2))
    attention = ["Wk", "Wq", "Wv", "dense"]
    known = [f"multi_head_attention.{name}" for name in attention]
    names = ", ".join(sorted(["all", "attention", "mlp", "ffn.0", "ffn.2", *attention, *known]))
    with pytest.raises(ValueError, match=f"use {names}.$"):
        find_targets(model, ["zzz"])


@pytest.mark.parametrize("training", [True, False])
def test_looking_for_projections_leaves_the_model_and_the_random_numbers_alone(training):
    model = ours(embd_pdrop=0.5).train(training)
    before = torch.get_rng_state()
    found = called_projections(model)
    assert "lm_head" in found and len(found) == 9
    assert torch.equal(torch.get_rng_state(), before) and model.training == training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    "make, tokens",
    [(ours, []), (ours, [3, 5]), (llama, [3, 5]), (lambda: ours(tie_word_embeddings=False), [3])],
)
def test_an_adapter_changes_nothing_before_it_is_trained_and_trains_alone(make, tokens):
    model, ids = make().eval(), torch.arange(8)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        add_adapter(model, SETTINGS, tokens)
        torch.testing.assert_close(model(input_ids=ids).logits, before)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    of_tokens = {name for name in trained if "trainable_tokens" in name}
    assert all("lora_" in name for name in trained - of_tokens) and trained > of_tokens
    tied = model.config.tie_word_embeddings
    assert len(of_tokens) == (0 if not tokens else 1 if tied else 2)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            assert not module.cast_input_dtype_enabled and module.r == {"default": 2}
            assert module.scaling == {"default": 2.0}
    config = model.peft_config["default"]
    assert config.base_model_name_or_path == "some/base" and config.task_type == "CAUSAL_LM"
    assert config.fan_in_fan_out == (make is not llama)


@pytest.mark.parametrize("flag", ["use_dora", "use_rslora"])
def test_kinds_of_adapters_are_settings(flag):
    model = ours()
    add_adapter(model, replace(SETTINGS, lora_dropout=0.25, **{flag: True}), [])
    config = model.peft_config["default"]
    assert getattr(config, flag) and config.lora_dropout == 0.25
    assert [config.use_dora, config.use_rslora].count(True) == 1


def test_what_trains_is_counted():
    """AdamW holds two float32 numbers beside each weight and its gradient."""
    model = ours()
    total = model.num_parameters()
    assert describe_trained(model) == (
        f"all of it; weights {4 * total / 2**20:,.1f} MiB, gradients and AdamW {12 * total / 2**20:,.1f} MiB, activations "
        "come on top"
    )
    model = ours(n_embd=256)
    own = model.num_parameters()
    add_adapter(model, replace(SETTINGS, lora_r=64, target_modules=["mlp"]), [])
    trained = sum(p.numel() for name, p in model.named_parameters() if "lora" in name)
    assert adapter_size(model) == trained > 100_000 and model.num_parameters() == own + trained
    assert describe_trained(model) == (
        f"an adapter of {trained:,} parameters, {trained / own:.2%} of the model's; weights "
        f"{4 * (own + trained) / 2**20:,.1f} MiB, gradients and AdamW {12 * trained / 2**20:,.1f} MiB, activations come on top"
    )


def test_a_base_is_named_as_others_can_find_it(tmp_path, monkeypatch):
    (tmp_path / "here" / "base").mkdir(parents=True)
    (tmp_path / "beside").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert public_base("some/base") == "some/base"
    assert public_base(str(tmp_path / "here" / "base")) == public_base("./base/") == "base"
    assert public_base("../beside") == str(tmp_path / "beside")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert public_base("../beside") == "~/beside"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("ids", [[38, 39], [39, 40], [40, 42]])
def test_new_tokens_begin_as_the_mean_of_the_others_and_may_be_sampled(ids, tied):
    model = ours(tie_word_embeddings=tied)
    model.generation_config.suppress_tokens = [7, *ids]
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    before = [module.weight.detach().clone() for module in modules]
    embed_new_tokens(model, ids)
    assert model.config.vocab_size == max(40, max(ids) + 1)
    for module, weight in zip(
        [model.get_input_embeddings(), model.get_output_embeddings()], before, strict=True
    ):
        mean = weight[: min(ids)].mean(dim=0)
        torch.testing.assert_close(module.weight[ids].detach(), mean.expand(2, -1))
        assert torch.equal(module.weight[: min(ids)].detach(), weight[: min(ids)])
    assert model.generation_config.suppress_tokens == [7]
    embed_new_tokens(model, [7])
    assert model.generation_config.suppress_tokens is None


def as_checkpoint(folder, model, **changes):
    """A checkpoint as transformers writes it, with a changed config.json."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return str(folder)


def gpt2(**fields):
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=8, n_embd=16, n_layer=1, n_head=2, **fields))


def test_a_base_is_held_in_the_class_that_its_adapter_must_load_on(tmp_path):
    """GPT-2's modules have the same names in ours; those of others have not."""
    for number, kind in enumerate((["GPT2LMHeadModel"], ["GPT2Model"], [], None)):
        base = load_base(
            as_checkpoint(tmp_path / str(number), gpt2().bfloat16(), architectures=kind), resid_pdrop=0.25
        )
        assert type(base) is NanoGPTForCausalLM and base.dtype == torch.float32
        assert base.config.resid_pdrop == 0.25
    plain = as_checkpoint(tmp_path / "llama", llama().bfloat16())
    assert type(load_base(plain)) is LlamaForCausalLM and load_base(plain).dtype == torch.float32
    with pytest.raises(ValueError, match="LlamaForCausalLM, which has no resid_pdrop to set"):
        load_base(plain, resid_pdrop=0.25)
    whole = load_base(plain, whole=True, resid_pdrop=0.25)
    assert type(whole) is NanoGPTForCausalLM and whole.config.resid_pdrop == 0.25


def test_what_is_no_base_is_refused(tmp_path):
    other = as_checkpoint(tmp_path / "other", gpt2(), architectures=["GPT2ForSequenceClassification"])
    with pytest.raises(ValueError, match="GPT2ForSequenceClassification"):
        load_base(other)
    (tmp_path / "other" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter, and a base is a whole model"):
        load_base(other)
    with pytest.raises(
        ValueError, match=r"nobody/base cannot .*; without the Hub, give a folder or smollm2-135m\.$"
    ):
        load_base("nobody/base")


def test_projections_that_only_lend_their_weights_are_left_out():
    config = MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, state_size=4)
    assert find_targets(MambaForCausalLM(config), ["all"]) == ["mixer.in_proj", "mixer.x_proj"]


def test_an_embedding_grows_by_what_a_tokenizer_learned():
    before = train_bpe_tokenizer(["the winter of our discontent " * 9], 262)
    after = extend_tokenizer(before, ["мой дядя самых честных правил " * 9], 5)
    for rows in (
        len(before),
        len(before) + 2,
        len(before) + 9,
    ):  # some checkpoints have more rows than tokens
        model = ours(vocab_size=rows)
        old = model.lm_head.weight.detach().clone()
        assert extend_embedding(model, before, before) == [] and len(model.lm_head.weight) == rows
        new = extend_embedding(model, before, after)
        assert new == [*range(len(before), len(after))]
        assert len(model.lm_head.weight) == model.config.vocab_size == max(rows, len(after))
        for token in new:
            pieces = before.backend_tokenizer.model.tokenize(after.convert_ids_to_tokens(token))
            torch.testing.assert_close(
                model.lm_head.weight[token], old[[piece.id for piece in pieces]].mean(dim=0)
            )


def test_conv1d_and_linear_may_be_adapted_together():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_adapter(
            ours(tie_word_embeddings=False), replace(SETTINGS, target_modules=["c_attn", "lm_head"]), []
        )


def test_what_peft_refuses_is_said_in_a_sentence():
    model = ours()
    add_adapter(model, SETTINGS, [])
    with pytest.raises(ValueError, match="peft puts no adapter on this base: .*already exists"):
        add_adapter(model, SETTINGS, [])
