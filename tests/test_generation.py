"""The next token: how it is drawn, and that the fast step of our models is the network itself."""

import json
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_here, warm_interpreter
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.pytorch_utils import Conv1D

from nanogpt_hf import NanoGPTConfig, NanoGPTForCausalLM
from nanogpt_hf.generation import layers
from nanogpt_hf.generation.decoding import CachedDecoder, Sampler, StaticDecoder, make_decoder
from nanogpt_hf.generation.text import generate_ids
from nanogpt_hf.model.modeling_nanogpt import RMSNorm

CONTEXT, V = 32, 97
SIZES = {"n_layer": 3, "n_head": 4, "n_embd": 48, "n_positions": CONTEXT, "vocab_size": V}
SIZES |= {
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}  # or greedy texts are one token over and over
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
ARCHITECTURES = {
    "gpt2": {"architecture": "gpt2"},
    "qwen3": {"architecture": "qwen3"},
    "llama": {"architecture": "llama"},
    "grouped": {"architecture": "qwen3", "n_kv_head": 2, "head_dim": 16},
    "neither": {"positions": "rotary", "qk_norm": True, "scale_attn_by_inverse_layer_idx": True},
}


def make(kind="gpt2", **fields):
    torch.manual_seed(0)
    config = NanoGPTConfig(**SIZES | ARCHITECTURES[kind] | fields)
    model = NanoGPTForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.3)
    return model


def prompt(rows, length):
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(1))


def written(model, ids, count, **sampling):
    return torch.stack([token.cpu() for token in generate_ids(model, ids, count, **sampling)], dim=1)


def through_the_forward(model, ids, count):
    """Greedy, the whole window read at every token; a full window is halved."""
    window, tokens = ids[:, -CONTEXT:], []
    with torch.inference_mode():
        for _ in range(count):
            tokens.append(model(window).logits[:, -1].argmax(-1))
            window = torch.cat((window, tokens[-1][:, None]), dim=1)
            window = window[:, -(CONTEXT // 2) :] if window.shape[1] > CONTEXT else window
    return torch.stack(tokens, dim=1)


@pytest.mark.parametrize("kind", ARCHITECTURES)
class TestGreedy:
    @pytest.mark.parametrize("rows, length", [(1, 1), (3, 5), (2, CONTEXT), (2, CONTEXT + 1), (1, 70)])
    def test_past_the_context(self, kind, rows, length):
        model, ids = make(kind), prompt(rows, length)
        assert isinstance(make_decoder(model, Sampler(model), rows, 1), StaticDecoder)
        found = written(model, ids, 60, temperature=0)
        assert torch.equal(found, through_the_forward(model, ids, 60))
        assert len(found.unique()) > 2

    def test_transformers_generate(self, kind):
        model, ids = make(kind), prompt(2, 7)
        theirs = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=CONTEXT - 7
        )
        assert torch.equal(written(model, ids, CONTEXT - 7, temperature=0), theirs[:, 7:])

    @pytest.mark.parametrize("rows, length", [(1, 1), (3, 5), (2, CONTEXT + 1)])
    def test_what_a_graph_would_replay(self, kind, rows, length, monkeypatch):
        """All that runs on a GPU but the recording: the masked step, and tokens in blocks."""

        def pretend(decoder):
            decoder._step_on_device()
            decoder.graph = SimpleNamespace(replay=decoder._step_on_device)

        model, ids = make(kind), prompt(rows, length)
        expected = written(model, ids, 100, temperature=0)
        monkeypatch.setattr(StaticDecoder, "_record", pretend)
        monkeypatch.setattr(
            StaticDecoder, "records", property(lambda _: True, lambda *_: None), raising=False
        )
        for count in (1, 2, 9, 100):
            assert torch.equal(written(model, ids, count, temperature=0), expected[:, :count])

    @needs_cuda
    @pytest.mark.parametrize("rows, length", [(1, 1), (3, 5), (2, CONTEXT + 1)])
    def test_a_graph_on_the_gpu(self, kind, rows, length):
        model, ids = make(kind), prompt(rows, length)
        on_cpu = written(model, ids, 100, temperature=0)
        assert torch.equal(written(model.cuda(), ids, 100, temperature=0), on_cpu)


def test_a_context_of_one_token():
    model, ids = make(n_positions=1), prompt(2, 1)
    token, expected = ids, []
    with torch.inference_mode():
        for _ in range(9):
            token = model(token).logits.argmax(-1)
            expected.append(token)
    assert torch.equal(written(model, ids, 9, temperature=0), torch.cat(expected, dim=1))


@pytest.mark.parametrize("rows, threads", [(1, 3), (5, 2)])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_products_split_over_threads_are_the_networks_own(kind, rows, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = make(kind, n_layer=1, n_embd=512, vocab_size=1031, initializer_range=0.05)
        ids = torch.randint(1031, (rows, 4))
        seen = []
        for make_one in (make_decoder, lambda model, sampler, rows, room: CachedDecoder(model, sampler)):
            logits = []

            def likeliest(row, logits=logits):
                logits.append(row)
                return row.argmax(dim=-1)

            with torch.inference_mode():
                list(make_one(model, likeliest, rows, 16).continue_(ids, 6))
            seen.append(torch.stack(logits))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inputs, outputs", [(6, 8), (5, 7)])  # halves and thirds, and neither
@pytest.mark.parametrize("bias", [None, False, True])
def test_a_product_split_over_threads_is_the_layers_own(bias, inputs, outputs, monkeypatch):
    monkeypatch.setattr(layers, "SPLIT_FROM", 0)
    layer = Conv1D(outputs, inputs) if bias is None else nn.Linear(inputs, outputs, bias)
    before = torch.get_num_threads()
    x = torch.randn(3, inputs)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            torch.testing.assert_close(layers.plain(layer)(x), layer(x))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("make_norm", [nn.LayerNorm, RMSNorm])
def test_a_norm_keeps_its_epsilon(make_norm):
    norm, x = make_norm(16, eps=0.1), torch.randn(3, 16) / 10
    torch.testing.assert_close(layers.plain(norm)(x), norm(x))


def test_what_bfloat16_is_divided_by_is_computed_in_float32():
    norm, x = RMSNorm(64, eps=1e-6), torch.randn(200, 64).bfloat16()
    error = layers.plain(norm)(x).float() - norm(x.float())
    assert (error.abs() <= 1.01 * 2**-8 * norm(x.float()).abs()).all()  # the result's own rounding


@pytest.mark.parametrize(
    "dtype, steps", [(torch.float32, 0.501), (torch.bfloat16, 0.75)]
)  # at 127 bfloat16 has halves
def test_weights_in_8_bits_are_the_nearest(dtype, steps):
    weight = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    rounded, scale = layers.round_to_8_bits(weight)
    assert ((weight.float() / scale.float()[:, None] - rounded).abs() <= steps).all()


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_weights_in_8_bits_write_nearly_the_same(kind, rows):
    model = make(kind, n_layer=2, n_embd=256, vocab_size=1031, initializer_range=0.05)
    ids, seen = torch.randint(1031, (rows, 4)), []
    for int8 in (False, True):
        logits = []

        def fixed(row, logits=logits):
            logits.append(row)
            return torch.full((rows,), len(logits))

        with torch.inference_mode():
            list(make_decoder(model, fixed, rows, 16, int8).continue_(ids, 6))
        seen.append(torch.stack(logits[1:]))  # the first are the forward's
    error = (seen[1] - seen[0]).std() / seen[0].std()
    assert 1e-4 < error < 0.05
    first = written(model, ids, 8, temperature=0, int8=True)
    model.transformer.h[0].attn.c_attn.weight.data.mul_(-1)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)  # what was rounded before must not be used
    assert not torch.equal(written(model, ids, 8, temperature=0, int8=True), first)


def test_weights_in_8_bits_are_for_our_models():
    theirs = GPT2LMHeadModel(GPT2Config(**SIZES)).eval()
    with pytest.raises(ValueError, match="weights of 8 bits need a CPU"):
        next(generate_ids(theirs, prompt(1, 3), 1, int8=True))


def test_gpt2_of_transformers_goes_through_its_own_forward():
    ours = make("gpt2")
    theirs = GPT2LMHeadModel(GPT2Config(**SIZES)).eval()
    theirs.load_state_dict(ours.state_dict())
    assert isinstance(make_decoder(theirs, Sampler(theirs), 1, 1), CachedDecoder)
    assert torch.equal(
        written(theirs, prompt(2, 5), 60, temperature=0), written(ours, prompt(2, 5), 60, temperature=0)
    )


def test_bfloat16():
    model = make("qwen3").to(torch.bfloat16)
    assert written(model, prompt(2, 5), 40, seed=1).shape == (2, 40)


def probabilities(logits, temperature, top_k, top_p):
    """What transformers' own warpers make of logits (V)."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers(None, logits[None].float())[0].softmax(-1)


def assert_distributed(tokens, expected):
    """Frequencies of tokens (N) within 5 standard errors, and 3 draws, of the expected probabilities (V); 0 is never."""
    found = torch.bincount(tokens, minlength=len(expected)) / len(tokens)
    error = (expected * (1 - expected) / len(tokens)).sqrt()
    # A token that is hardly ever drawn may be drawn once: its error is not that of a normal distribution.
    assert ((found - expected).abs() <= 5 * error + 3 / len(tokens)).all() and not found[expected == 0].any()


@settings(max_examples=25, deadline=None)
@given(
    st.floats(0.2, 3),
    st.none() | st.integers(1, 30),
    st.none() | st.floats(0.05, 1),
    st.integers(0, 2**32),
)
def test_tokens_are_drawn_as_transformers_would(temperature, top_k, top_p, seed):
    model = make(n_layer=1, vocab_size=20)
    logits = torch.randn(20, generator=torch.Generator().manual_seed(seed)) * 2
    sampler = Sampler(model, temperature, top_k, top_p, seed)
    expected = probabilities(logits, temperature, top_k, top_p)
    assert_distributed(sampler(logits.expand(20_000, 20)), expected)


def position_only(device):
    """A model that looks at no token: every row has the same distribution at a position."""
    model = make("gpt2", n_layer=1, vocab_size=20)
    torch.nn.init.zeros_(model.transformer.wte.weight)
    return model.to(device)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_every_position_has_its_distribution(device):
    model, rows = position_only(device), 4_000
    ids = torch.zeros(rows, 1, dtype=torch.long)
    sampling = {"temperature": 1.3, "top_k": 12, "top_p": 0.9}
    tokens = written(model, ids, 20, seed=3, **sampling)
    with torch.inference_mode():
        logits = model(torch.zeros(1, 20, dtype=torch.long, device=device)).logits[0].cpu()
    for position in range(20):
        assert_distributed(tokens[:, position], probabilities(logits[position], **sampling))
    correlation = torch.corrcoef(tokens.float().T) - torch.eye(20)
    assert correlation.abs().max() < 5 / rows**0.5  # no noise is used twice


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_a_seed_gives_the_same_tokens_and_leaves_the_global_generator_alone(device):
    model, ids = make("qwen3").to(device).train(), prompt(3, 4)
    before = torch.get_rng_state()
    first = written(model, ids, 80, seed=5, top_k=20)
    assert torch.equal(first, written(model, ids, 80, seed=5, top_k=20))
    assert torch.equal(first[:, :50], written(model, ids, 50, seed=5, top_k=20))
    endless = torch.stack(
        [token.cpu() for token in islice(generate_ids(model, ids, seed=5, top_k=20), 80)], 1
    )
    assert torch.equal(first, endless)
    assert not torch.equal(first, written(model, ids, 80, seed=6, top_k=20))
    assert torch.equal(before, torch.get_rng_state()) and model.training


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("sampling", [{"temperature": 0}, {}, {"top_k": 50}, {"top_p": 0.99}])
def test_suppressed_tokens_never_come(device, sampling):
    model = make("gpt2").to(device)
    model.generation_config.suppress_tokens = list(range(3, V))
    assert written(model, prompt(8, 3), 50, seed=1, **sampling).max() < 3


def test_the_benchmark_measures_every_variant(tmp_path, capsys):
    words = "--sizes tiny --batch_sizes 2 --repeats 1 --use_cpu --output".split()
    warm_interpreter()
    assert run_here("benchmarks/generate.py", *words, tmp_path / "out.json") == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    measured = [row["variant"] for row in rows]
    assert measured[:3] == ["transformers", "ours, gpt2", "ours, qwen3"] and measured[-1] == "ours, gpt2 int8"
    assert (
        all(row["tokens_per_s"] > 0 for row in rows)
        and "ours, gpt2 / transformers" in capsys.readouterr().out
    )
