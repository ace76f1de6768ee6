"""The planner against what was published, against what a step on the CPU really holds, and its command line."""

import functools
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed._tools.mem_tracker import MemTracker

from nanogpt_hf import NanoGPTConfig, NanoGPTForCausalLM, preset_config
from nanogpt_hf.analysis.planning import (
    GPU,
    Layout,
    activation_bytes,
    check_layout,
    measure_size,
    plan_budgets,
    plan_layout,
    step_memory,
    training_days,
    training_flops,
    usual_layouts,
)
from nanogpt_hf.common.settings import TrainingSettings
from nanogpt_hf.data.token_stream import TokenStream
from nanogpt_hf.model import PRESETS, find_preset
from nanogpt_hf.training import fused_loss
from nanogpt_hf.training.fused_loss import linear_cross_entropy
from nanogpt_hf.training.gpus import GPUS, flops_per_token, peak_flops
from nanogpt_hf.training.objectives import LanguageModeling
from nanogpt_hf.training.optimization import make_optimizers
from nanogpt_hf.training.stepping import accumulate_gradients

ROOT = Path(__file__).parents[1]
NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
# Brown et al. 2020, table D.1: millions of parameters, FLOPs of training on 300 billion tokens.
TABLE_D1 = {
    "gpt3-small": (125, 2.25e20),
    "gpt3-medium": (356, 6.41e20),
    "gpt3-large": (760, 1.37e21),
    "gpt3-xl": (1320, 2.38e21),
    "gpt3-2.7b": (2650, 4.77e21),
    "gpt3-6.7b": (6660, 1.20e22),
    "gpt3-13b": (12850, 2.31e22),
    "gpt3-175b": (174600, 3.14e23),
}


def small_config(architecture="gpt2", **fields):
    sizes = dict(n_layer=3, n_embd=64, n_head=4, n_positions=64, vocab_size=512)
    return preset_config("cpu", architecture=architecture, **NO_DROPOUT, **sizes | fields)


@functools.cache
def size_of(preset):
    return measure_size(preset_config(preset, **NO_DROPOUT))


# --- published sizes and runs ---


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.parameters])
def test_every_preset_has_the_size_that_it_is_known_by(name):
    known = find_preset(name).parameters
    count = size_of(name).parameters
    assert count == pytest.approx(float(known[:-1]) * {"M": 1e6, "B": 1e9}[known[-1]], rel=0.02)
    if name in TABLE_D1:
        assert count == pytest.approx(TABLE_D1[name][0] * 1e6, rel=0.005)


@pytest.mark.parametrize("name", TABLE_D1)
def test_flops_of_gpt3(name):
    size = size_of(name)
    (by_gpt3, by_chinchilla) = plan_budgets(size, 1, GPUS["a100"], 0.5, find_preset(name).batch_tokens)
    assert by_gpt3["matmul_flops"] == pytest.approx(TABLE_D1[name][1], rel=0.01)
    assert by_chinchilla["tokens"] == 20 * size.parameters


def test_batches_of_presets_are_whole_sequences():
    for preset in PRESETS.values():
        if preset.batch_tokens:
            assert preset.batch_tokens % preset.n_positions == 0 and 1e-5 < preset.learning_rate < 1e-3


def test_days_of_a_published_run():
    """Narayanan et al. 2021, section 5: GPT-3 on 1,024 A100 at 140 TFLOP/s, a quarter of it recomputation: 34 days."""
    flops = training_flops(size_of("gpt3-175b"), 300e9)
    assert training_days(flops, 1024, GPUS["a100"], 0.75 * 140 / 312) == pytest.approx(34, rel=0.03)


# --- memory that a step on the CPU holds ---


def kept_by_forward(config, batch_size: int, compiled: bool) -> int:
    """Bytes of all that autograd keeps under autocast, parameters left out."""
    model = NanoGPTForCausalLM(config).train()
    for block in model.transformer.h if compiled else ():
        block.compile(backend="aot_eager_decomp_partition")  # keeps what inductor does, and needs no compiler
    x = torch.randint(config.vocab_size, (batch_size, config.n_positions))
    kept, parameters = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # a tensor that is held is not allocated over
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16):
            hidden_states = model.transformer(input_ids=x, use_cache=False).last_hidden_state
            loss = linear_cross_entropy(hidden_states, model.lm_head.weight, x, torch.tensor(x.numel()))
    assert loss.isfinite()
    return sum(count for pointer, (count, _) in kept.items() if pointer not in parameters)


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3", "llama"])
@pytest.mark.parametrize(
    "fields, batch_size, compiled",
    [
        ({}, 2, False),
        ({"n_kv_head": 2, "head_dim": 8}, 2, False),
        ({"n_embd": 96, "n_head": 3, "n_positions": 48}, 5, False),
        ({"n_embd": 96, "n_head": 3}, 2, True),
    ],
)
def test_a_block_keeps_what_is_planned_to_the_byte(fields, batch_size, compiled, architecture):
    less, more = (small_config(architecture, n_layer=n, **fields) for n in (1, 2))
    kept = kept_by_forward(more, batch_size, compiled) - kept_by_forward(less, batch_size, compiled)
    per_token = sum(activation_bytes(more, compiled, device="cpu").values())
    if compiled and architecture == "gpt2":
        per_token -= 2 * 4  # CPU only: mean and 1/std in bfloat16
    weights = 2 * measure_size(more).matrices / more.n_layer
    assert kept == per_token * batch_size * more.n_positions + weights


def peak_of_a_step(config, batch_size: int, micro_batches: int, checkpointing: bool) -> int:
    """Bytes at the peak of the loop's second step, as torch's MemTracker sees them."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = NanoGPTForCausalLM(config).train()
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    x = torch.randint(config.vocab_size, (batch_size, config.n_positions))
    model, *optimizers = accelerator.prepare(model, *make_optimizers(model, TrainingSettings()))
    optimizers = [optimizer.optimizer for optimizer in optimizers]

    objective = LanguageModeling(accelerator, TokenStream(np.zeros(1000), config.n_positions), 1, 0)

    def step(batches):
        accumulate_gradients(accelerator, model, objective, batches)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()

    step([(x, x)])
    if micro_batches > 1:
        accumulate_gradients(accelerator, model, objective, [(x, x)] * (micro_batches - 1))
    tracker = MemTracker()
    tracker.track_external(model, *optimizers)
    with tracker:  # the last micro-batch alone: a tracker follows one forward pass
        step([(x, x)])
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


FEW_WORDS = {"vocab_size": 64}
MANY_WORDS = {"vocab_size": 4096}


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
@pytest.mark.parametrize(
    "fields, batch_size, micro_batches, checkpointing",
    [
        (MANY_WORDS, 4, 1, False),  # the logits, in chunks, are the most
        (FEW_WORDS | {"n_kv_head": 1, "head_dim": 32}, 4, 1, False),  # grouped heads, wider than the model
        (MANY_WORDS, 1, 2, False),  # the head, its gradient and those of an earlier micro-batch
        (FEW_WORDS, 4, 2, False),  # the activations, beside gradients of an earlier micro-batch
        (FEW_WORDS, 4, 2, True),  # the last block, recomputed beside earlier gradients
        (FEW_WORDS, 1, 1, True),  # the gradients of all weights
    ],
)
def test_the_peak_of_a_step_is_what_is_planned(
    fields, batch_size, micro_batches, checkpointing, architecture, own_accelerate_state, monkeypatch
):
    monkeypatch.setattr(fused_loss, "CHUNK_BYTES", 2**18)
    config = small_config(architecture, **fields)
    peak = peak_of_a_step(config, batch_size, micro_batches, checkpointing)
    layout = Layout(gradient_checkpointing=checkpointing)
    terms = step_memory(measure_size(config), layout, batch_size, micro_batches, device="cpu")
    assert sum(terms.values()) == pytest.approx(peak, rel=0.1)


def test_on_a_gpu_logits_take_a_chunk():
    size = size_of("gpt2")
    for layout in (Layout(), Layout(dp_shard_size=2)):
        chunk = step_memory(size, layout, 64)["logits"]
        assert chunk == fused_loss.CHUNK_BYTES < 2 * (64 * 1024) * 50257
    assert step_memory(size, Layout(), 2)["logits"] == 2 * (2 * 1024) * 50257


# --- layouts ---


@settings(max_examples=50, deadline=None)
@given(
    shards=st.sampled_from([1, 2, 4, 64]),
    replicas=st.sampled_from([1, 3]),
    batch_size=st.integers(1, 32),
    accumulation=st.integers(1, 4),
    checkpointing=st.booleans(),
    compiled=st.booleans(),
)
def test_sharing_takes_memory_away_and_work_adds_it(
    shards, replicas, batch_size, accumulation, checkpointing, compiled
):
    def total(shards, batch_size):
        layout = Layout(replicas, shards, gradient_checkpointing=checkpointing)
        return sum(step_memory(size_of("gpt2-xl"), layout, batch_size, accumulation, compiled).values())

    assert total(shards, batch_size) < total(shards, batch_size + 1)
    if shards > 1:
        assert total(2 * shards, batch_size) < total(shards, batch_size)


def test_shards_of_the_states_add_up():
    size = size_of("gpt3-13b")
    for layout in usual_layouts(size.config, 64):
        terms = step_memory(size, layout, 1)
        states = (terms["weights"] + terms["AdamW's moments"]) * layout.shards * layout.tp_size
        assert states == pytest.approx(12 * 12_853e6, rel=0.15 if layout.tp_size > 1 else 1e-3)
        check_layout(layout, size.config, 64)


def test_what_checkpointing_tensor_and_context_parallelism_save():
    size = size_of("gpt3-13b")

    def activations(**fields):
        return step_memory(size, Layout(dp_shard_size=8, **fields), 4)["activations"]

    assert activations(gradient_checkpointing=True) < 0.2 * activations()
    # What lies between the projections is split, the residual stream is not.
    assert 1 / 8 < activations(tp_size=8) / activations() < 0.5
    assert activations(cp_size=4) == pytest.approx(activations() / 4, rel=0.05)


def test_the_largest_micro_batch_fits_and_its_double_does_not():
    size, gpu = size_of("gpt2"), GPUS["rtx4090"]
    largest = plan_layout(size, Layout(), gpu, 1, 2**19)["largest_batch_size"]
    assert plan_layout(size, Layout(), gpu, largest, 2**19)["fits"]
    assert not plan_layout(size, Layout(), gpu, 2 * largest, 2**19)["fits"]


def test_a_part_of_the_memory_is_never_planned_with():
    """What needs all that a GPU was sold with does not fit: the context, NCCL and fragments take their part."""
    size = size_of("gpt2")
    needed = plan_layout(size, Layout(), GPUS["h100"], 4, 2**19)["memory_gib"]
    assert not plan_layout(size, Layout(), GPU(needed * 1.001, 100), 4, 2**19)["fits"]
    assert plan_layout(size, Layout(), GPU(needed * 1.15, 100), 4, 2**19)["fits"]


# --- the recipe ---


def run(*words):
    return runpy.run_path(str(ROOT / "recipes" / "plan.py"))["main"](list(words))


def test_the_recipe_shows_and_writes_a_plan(tmp_path, capsys):
    run("--preset", "gpt3-175b", "--gpus", "1024", "--gpu", "h100", "--output_dir", str(tmp_path))
    shown = capsys.readouterr().out
    assert "174,604,259,328 parameters" in shown and "| GPT-3      |    3e+11 |" in shown
    plan = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert plan["gpu"] == {"name": "h100", "memory_gib": 80, "bf16_tflops": 989}
    assert plan["budgets"][0]["matmul_flops"] == pytest.approx(3.14e23, rel=0.002)
    by_name = {row["layout"]: row for row in plan["layouts"]}
    assert not by_name["DDP"]["fits"] and by_name["FSDP2, tp 8, checkpointing"]["fits"]
    assert len(by_name) == len(plan["layouts"]) and all(name in shown for name in by_name)
    for row in plan["layouts"]:
        assert sum(row["memory_bytes"].values()) / 2**30 == pytest.approx(row["memory_gib"])
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_the_recipe_plans_the_layout_that_it_is_given(capsys):
    run("--preset", "gpt3-13b", "--gpus", "64", "--gpu", "a100", "--tp_size", "8", "--dp_replicate_size", "2")
    assert "FSDP2 2 x 4, tp 8 " in capsys.readouterr().out


def test_a_gpu_of_ones_own(capsys):
    run("--preset", "baby", "--gpu", "mine", "--gpu_memory_gib", "3", "--gpu_tflops", "20")
    assert "of 3 GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        ("--preset gpt3-175", "did you mean 'gpt3-175b'"),
        ("--gpu h10", "there is no GPU 'h10' here: did you mean 'h100'"),
        ("--gpu h10 --gpu_memory_gib 80", "or give --gpu_memory_gib and --gpu_tflops"),
        ("--gpus 0", "--gpus is 0, it must be at least 1"),
        ("--gpus 12 --tp_size 8", "--gpus is 12, which tp_size 8 .8. does not divide"),
        ("--gpus 8 --dp_shard_size 3", "dp_shard_size 3 x tp_size 1 x cp_size 1 is 3: they must be equal"),
        ("--preset gpt2-xl --gpus 8 --tp_size 8", "--tp_size 8 does not divide n_head .25."),
        ("--gpus 3 --cp_size 3", "--cp_size 3 must divide n_positions .1,024."),
        ("--gpus 8 --tp_size 2 --dp_replicate_size 4", "no tensor or context parallelism beside DDP"),
        ("--gpus 8 --tp_size 0", "--tp_size is 0, it must be at least 1"),
        ("--mfu 40", "--mfu is 40.0, it must be more than 0 and at most 1"),
        ("--gpu_tflops -1", "--gpu_tflops is -1.0, it must be more than 0"),
    ],
)
def test_mistakes_get_one_sentence_and_write_nothing(words, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        run(*words.split(), "--output_dir", str(tmp_path / "plan"))
    assert "\n" not in str(error.value) and not (tmp_path / "plan").exists()


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA L40", None),
        ("Tesla T4", None),
        ("", None),
    ],
)
def test_the_rate_of_a_gpu_is_known_by_the_name_that_cuda_gives_it(name, tflops):
    assert peak_flops(name) == (tflops and tflops * 1e12)


@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
def test_flops_of_a_token_are_those_of_the_plan(architecture):
    config = NanoGPTConfig(
        architecture=architecture, n_layer=3, n_head=4, n_embd=64, n_positions=128, vocab_size=500
    )
    model = NanoGPTForCausalLM(config)
    assert flops_per_token(model, 128) == sum(training_flops(measure_size(config), 1).values())
    assert flops_per_token(model, 128, passes=2) == 2 * flops_per_token(model, 128)
    model.transformer.wte.weight.requires_grad = False
    assert flops_per_token(model, 128) is None
