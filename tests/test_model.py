"""The network against the three reference implementations, and everything transformers expects of a model."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from nanogpt_hf import NanoGPTConfig, NanoGPTForCausalLM, preset_config
from nanogpt_hf.model.conversion import FAMILIES, native_fields, to_native, to_plain

SIZES = dict(vocab_size=97, n_positions=32, n_embd=48, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)


def make(architecture="gpt2", seed=0, **fields):
    torch.manual_seed(seed)
    model = NanoGPTForCausalLM(
        NanoGPTConfig(architecture=architecture, pad_token_id=0, **SIZES | fields)
    ).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)  # so that no weight may be left out unnoticed
    return model


def ids(*shape):
    return torch.randint(1, 97, shape, generator=torch.Generator().manual_seed(1))


def test_gpt2_has_the_state_dict_and_the_logits_of_gpt2():
    ours, theirs = make("gpt2"), GPT2LMHeadModel(GPT2Config(**SIZES)).eval()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    theirs.load_state_dict(ours.state_dict())
    x = ids(3, 32)
    torch.testing.assert_close(ours(x).logits, theirs(x).logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours(x, labels=x).loss, theirs(x, labels=x).loss)


@pytest.mark.parametrize(
    "options", [{"scale_attn_by_inverse_layer_idx": True}, {"activation_function": "gelu"}]
)
def test_gpt2_variants(options):
    ours, theirs = make("gpt2", **options), GPT2LMHeadModel(GPT2Config(**SIZES | options)).eval()
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(ids(2, 9)).logits, theirs(ids(2, 9)).logits, atol=1e-5, rtol=0)


GROUPED = {"n_kv_head": 2, "head_dim": 16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fields", [{}, GROUPED, {"n_kv_head": 1, "tie_word_embeddings": False}])
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_qwen3_and_llama_are_transformers_own(architecture, fields, dtype):
    ours = make(architecture, **fields)
    theirs = to_plain(ours)
    assert type(theirs) is FAMILIES[architecture][1]
    ours, theirs, x = ours.to(dtype), theirs.to(dtype), ids(3, 32)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(ours(x).logits, theirs(x).logits, atol=tolerance, rtol=0)


# As their config.json on the Hub says; depth is cut, and the vocabulary where memory demands it.
PUBLISHED = {
    "Qwen3-0.6B": ("qwen3", 1024, 3072, 16, 8, 128, 1024, 1e6),
    "Qwen3-1.7B": ("qwen3", 2048, 6144, 16, 8, 128, 1024, 1e6),
    "Qwen3-4B": ("qwen3", 2560, 9728, 32, 8, 128, 1024, 1e6),
    "SmolLM2-135M": ("llama", 576, 1536, 9, 3, 64, 1024, 1e5),
    "SmolLM2-360M": ("llama", 960, 2560, 15, 5, 64, 1024, 1e5),
    "SmolLM2-1.7B": ("llama", 2048, 8192, 32, 32, 64, 1024, 1.3e5),
    "Llama-3.2-1B": ("llama", 2048, 8192, 32, 8, 64, 1024, 5e5),  # without its rope_scaling
}


@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_published_shapes_go_both_ways(name):
    family, hidden, inner, heads, kv_heads, head_dim, vocabulary, theta = PUBLISHED[name]
    config_class, model_class = FAMILIES[family]
    fields = {
        **{"hidden_size": hidden, "intermediate_size": inner, "vocab_size": vocabulary, "head_dim": head_dim},
        **{"num_attention_heads": heads, "num_key_value_heads": kv_heads, "num_hidden_layers": 1},
        **{"max_position_embeddings": 8192, "tie_word_embeddings": True, "rope_theta": theta},
    }
    torch.manual_seed(0)
    theirs = model_class(config_class(**fields)).eval()
    for parameter_name, parameter in theirs.named_parameters():
        if "norm" in parameter_name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    ours = to_native(theirs, NanoGPTConfig(**native_fields(family, {"model_type": family, **fields})))
    x = torch.randint(vocabulary, (2, 9), generator=torch.Generator().manual_seed(1))
    expected = theirs(x).logits
    torch.testing.assert_close(ours(x).logits, expected, atol=1e-5, rtol=0)
    assert ours.config.architecture == family and ours.num_parameters() == theirs.num_parameters()
    back = to_plain(ours)
    torch.testing.assert_close(back(x).logits, expected, atol=1e-5, rtol=0)
    assert all(torch.equal(back.state_dict()[key], value) for key, value in theirs.state_dict().items())


@pytest.mark.parametrize(
    "family, field, value",
    [
        ("llama", "rope_parameters", {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
                                      "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}),
        ("llama", "mlp_bias", True),
        ("llama", "attention_bias", True),
        ("qwen3", "hidden_act", "gelu"),
        ("qwen3", "layer_types", ["sliding_attention"] * 32),
    ],
)  # fmt: skip
def test_what_ours_cannot_hold_is_refused_by_the_fields_name(family, field, value):
    with pytest.raises(ValueError, match=f"differs from the {family} architecture of nanogpt_hf in {field}:"):
        native_fields(family, {"model_type": family, field: value})


def test_a_checkpoint_of_the_old_name_is_a_qwen3():
    config = NanoGPTConfig(architecture="modern", **SIZES)
    assert config == NanoGPTConfig(architecture="qwen3", **SIZES) and config.architecture == "qwen3"


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3", "llama"])
class TestEveryArchitecture:
    def test_cached_static_and_uncached_greedy_agree(self, architecture):
        model, x = make(architecture), ids(2, 5)
        options = dict(
            max_new_tokens=20, do_sample=False, eos_token_id=None, attention_mask=torch.ones_like(x)
        )
        plain = model.generate(x, use_cache=False, **options)
        assert torch.equal(plain, model.generate(x, **options))
        assert torch.equal(plain, model.generate(x, cache_implementation="static", **options))

    def test_left_padding_does_not_change_a_sequence(self, architecture):
        model, x = make(architecture), ids(1, 6)
        padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), x), dim=1)
        mask = (torch.arange(10) >= 4).long()[None]
        options = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
        alone = model.generate(x, attention_mask=torch.ones_like(x), **options)[:, 6:]
        assert torch.equal(alone, model.generate(padded, attention_mask=mask, **options)[:, 10:])

    def test_beam_search_finds_nothing_worse_than_greedy(self, architecture):
        model, x = make(architecture), ids(1, 4)

        def score(sequence):
            return model(sequence).logits.log_softmax(-1)[0, 3:-1].gather(1, sequence[0, 4:, None]).sum()

        options = dict(
            max_new_tokens=6, do_sample=False, eos_token_id=None, attention_mask=torch.ones_like(x)
        )
        assert score(model.generate(x, num_beams=8, **options)) >= score(model.generate(x, **options)) - 1e-5

    def test_eager_and_fused_attention_agree(self, architecture):
        model, x = make(architecture), ids(2, 12)
        fused = model(x).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(x).logits, fused, atol=1e-5, rtol=0)
        assert len(model(x, output_attentions=True).attentions) == SIZES["n_layer"]

    def test_hidden_states(self, architecture):
        model, x = make(architecture), ids(2, 12)
        states = model(x, output_hidden_states=True).hidden_states
        assert len(states) == SIZES["n_layer"] + 1
        torch.testing.assert_close(model.lm_head(states[-1]), model(x).logits)

    def test_gradient_checkpointing_gives_the_same_gradients(self, architecture):
        gradients = []
        for checkpointing in (False, True):
            model, x = make(architecture, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train(), ids(2, 12)
            if checkpointing:
                getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
            model(x, labels=x, use_cache=False).loss.backward()
            gradients.append([p.grad for p in model.parameters()])
        torch.testing.assert_close(*gradients)

    def test_past_the_context_is_an_error_that_says_so(self, architecture):
        model = make(architecture)
        with pytest.raises(ValueError, match="33 tokens, more than the model's context of 32"):
            model(ids(1, 33))
        past = model(ids(1, 32), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="33 tokens"):
            model(ids(1, 1), past_key_values=past)

    def test_initialisation_is_gpt2s(self, architecture):
        torch.manual_seed(0)
        config = NanoGPTConfig(architecture=architecture, **SIZES | {"n_embd": 256, "n_layer": 8})
        residual = 0.02 / 16**0.5
        for name, weight in NanoGPTForCausalLM(config).named_parameters():
            if weight.ndim == 2:
                expected = residual if name.endswith("c_proj.weight") else 0.02
                assert weight.std().item() == pytest.approx(expected, rel=0.05), name
            elif name.endswith("bias"):
                assert not weight.any(), name
            else:
                assert (weight == 1).all(), name

    def test_losses_of_micro_batches_add_up(self, architecture):
        model, x = make(architecture), ids(4, 12)
        labels = x.masked_fill(torch.arange(12) > torch.tensor([[3], [11], [7], [5]]), -100)
        whole = model(x, labels=labels).loss
        count = (labels[:, 1:] != -100).sum()
        parts = sum(
            model(x[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=count).loss for i in range(4)
        )
        torch.testing.assert_close(parts, whole)

    def test_dropout_is_off_in_evaluation_and_on_in_training(self, architecture):
        model, x = make(architecture, attn_pdrop=0.5, resid_pdrop=0.0, embd_pdrop=0.0), ids(2, 12)
        assert torch.equal(model(x).logits, model(x).logits)
        model.train()
        assert not torch.equal(model(x).logits, model(x).logits)


def test_logits_to_keep_computes_the_last_logits_only():
    model = make("gpt2")
    assert model(ids(1, 5), logits_to_keep=1).logits.shape == (1, 1, 97)


def test_config_resolves_and_names_its_architecture():
    assert NanoGPTConfig().architecture == "gpt2"
    config = NanoGPTConfig(architecture="qwen3", **SIZES)
    assert (config.norm, config.positions, config.mlp, config.bias) == ("rmsnorm", "rotary", "swiglu", False)
    mixed = NanoGPTConfig(architecture="qwen3", norm="layernorm", **SIZES)
    assert mixed.architecture == "custom"
    assert NanoGPTConfig.from_dict(mixed.to_dict()).norm == "layernorm"
    assert NanoGPTForCausalLM(mixed)(ids(1, 4)).logits.isfinite().all()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"n_head": 5}, "multiple of n_head"),
        ({"architecture": "gemma"}, "use one of gpt2, qwen3, llama"),
        ({"n_kv_head": 3}, "multiple of n_kv_head"),
        ({"n_kv_head": 0}, "n_kv_head is 0"),
        ({"architecture": "qwen3", "head_dim": 7}, "even head size"),
        ({"norm": "batchnorm"}, "use one of layernorm, rmsnorm"),
        ({"n_layer": 0}, "at least 1"),
        ({"resid_pdrop": 1.5}, "under 1"),
        ({"architecture": "qwen3", "n_embd": 12, "n_head": 4}, "even head size"),
        ({"add_cross_attention": True}, "unset it"),
    ],
)
def test_config_that_does_not_fit_together(fields, message):
    with pytest.raises(ValueError, match=message):
        NanoGPTConfig(**SIZES | fields)


@pytest.mark.parametrize(
    "name, millions",
    [
        ("gpt2", 124.44),
        ("gpt2-medium", 354.82),
        ("gpt2-large", 774.03),
        ("gpt2-xl", 1557.61),
        ("gpt3-175b", 174_600),
    ],
)
def test_presets_have_the_size_in_their_name(name, millions):
    with torch.device("meta"):
        model = NanoGPTForCausalLM(preset_config(name))
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=1e-3)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'gpt2-large'"):
        preset_config("gpt2-larg")
