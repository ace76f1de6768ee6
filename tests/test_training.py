"""The loop's arithmetic."""

import math
from typing import get_args

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import LoggerType
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import SchedulerType

from nanogpt_hf import NanoGPTConfig, NanoGPTForCausalLM
from nanogpt_hf.common.cli import parse
from nanogpt_hf.common.errors import UserError
from nanogpt_hf.common.settings import Schedule, Tracker, TrainingSettings
from nanogpt_hf.data.token_stream import TokenStream
from nanogpt_hf.runs.run import of_length
from nanogpt_hf.training import muon as muon_module
from nanogpt_hf.training.muon import Layout, Muon, orthogonalize
from nanogpt_hf.training.objectives import LanguageModeling, ShortWindows
from nanogpt_hf.training.optimization import (
    learning_rates,
    make_capturable,
    make_optimizers,
    make_schedule,
    set_learning_rates,
)
from nanogpt_hf.training.stepping import Stepper, accumulate_gradients, step_seed

NONE_SHORT = ShortWindows()


def make():
    torch.manual_seed(0)
    fields = dict(
        vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return NanoGPTForCausalLM(NanoGPTConfig(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **fields))


def language_modeling(accelerator=None, batch_size=4, short=NONE_SHORT):
    ids = torch.randint(0, 50, (2000,), generator=torch.Generator().manual_seed(2)).numpy()
    accelerator = accelerator or Accelerator(cpu=True)
    stream = TokenStream(ids, 16, accelerator.device)
    objective = LanguageModeling(accelerator, stream, batch_size, 1337)
    objective.short = short
    return objective


def ragged_batch(rows):
    """Sequences of very unequal length, padded with -100."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 50, (rows, 16), generator=generator)
    y = torch.randint(0, 50, (rows, 16), generator=generator)
    lengths = torch.randint(1, 17, (rows, 1), generator=generator)
    lengths[: rows // 4] = 1
    return x, y.masked_fill(torch.arange(16) >= lengths, -100)


@pytest.mark.parametrize("micro_batch", [4, 8, 16])
def test_accumulation_of_ragged_micro_batches_is_the_whole_batch(micro_batch):
    accelerator = Accelerator(cpu=True)
    x, y = ragged_batch(32)
    results = []
    for size in (32, micro_batch):
        model = make()
        batches = [(x[i : i + size], y[i : i + size]) for i in range(0, 32, size)]
        loss = accumulate_gradients(accelerator, model, language_modeling(accelerator), batches)
        results.append((loss, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-7)
    logits = make()(x).logits
    torch.testing.assert_close(
        results[1][0], torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    )


def test_every_parameter_is_in_one_optimizer_and_only_matrices_decay():
    for optim, count in (("adamw", 1), ("muon", 2)):
        for architecture in ("gpt2", "qwen3"):
            config = NanoGPTConfig(architecture=architecture, n_embd=32, n_layer=2, n_head=2, vocab_size=50)
            model = NanoGPTForCausalLM(config)
            optimizers = make_optimizers(model, TrainingSettings(optim=optim, weight_decay=0.3))
            assert len(optimizers) == count
            groups = [(optimizer, group) for optimizer in optimizers for group in optimizer.param_groups]
            found = [id(p) for _, group in groups for p in group["params"]]
            assert sorted(found) == sorted(id(p) for p in model.parameters())
            for optimizer, group in groups:
                assert {0.3 if p.ndim > 1 else 0 for p in group["params"]} == {group["weight_decay"]}
                if isinstance(optimizer, Muon):
                    names = {
                        name for name, p in model.named_parameters() if any(p is q for q in group["params"])
                    }
                    assert all(".h." in name for name in names)


def test_linear_schedule_warms_up_and_ends_at_zero():
    factor = make_schedule(TrainingSettings(max_steps=100, warmup_steps=10))
    values = [factor(step) for step in range(101)]
    assert values[0] == pytest.approx(0.1) and values[9] == values[10] == 1
    assert all(a >= b for a, b in zip(values[10:], values[11:], strict=False)) and values[100] == 0
    assert values[99] == pytest.approx(1 / 90)


@pytest.mark.parametrize(
    "name, end",
    [
        ("cosine", 0),
        ("cosine_with_min_lr", 0.1),
        ("constant", 1),
        ("constant_with_warmup", 1),
        ("warmup_stable_decay", 0),
        ("polynomial", 1e-7),
    ],
)
def test_other_schedules_are_functions_of_the_step(name, end):
    factor = make_schedule(TrainingSettings(max_steps=101, warmup_steps=10, lr_scheduler_type=name))
    values = [factor(step) for step in range(102)]
    assert values[::-1] == [factor(step) for step in reversed(range(102))]
    assert values[10] == 1 and values[101] == pytest.approx(end)
    assert all(a >= b for a, b in zip(values[10:], values[11:], strict=False))
    if name == "warmup_stable_decay":
        assert [step for step, value in enumerate(values) if value == 1] == [*range(9, 52)]


def test_the_schedules_and_trackers_are_those_of_the_libraries():
    """Named in the settings, so that a misspelt one is answered before these libraries are imported."""
    for name in [name.value for name in SchedulerType]:
        settings = TrainingSettings(max_steps=100, warmup_steps=10, lr_scheduler_type=name)
        if name in get_args(Schedule):
            assert 0 < make_schedule(settings)(50) <= 1
        else:
            with pytest.raises(UserError, match=f"{name} is not one of linear, cosine"):
                make_schedule(settings)
    assert {*get_args(Tracker)} == {name.value for name in LoggerType} - {"all"}


def test_a_warm_up_ends_by_the_middle_of_a_run():
    lengths = {(50, 6): 3, (2, 6): 2, (1, 40): 1, (0.25, 40): 10, (0.9, 40): 20, (5, 0): 0}
    for (warmup, steps), expected in lengths.items():
        settings = of_length(TrainingSettings(warmup_steps=warmup), steps)
        assert (settings.warmup_steps, settings.max_steps) == (expected, max(1, steps))


def test_what_optimisers_take_is_a_setting():
    settings = TrainingSettings(
        optim="muon", muon_momentum=0.8, adam_beta1=0.7, adam_beta2=0.6, adam_epsilon=0.5
    )
    adamw, muon = make_optimizers(make(), settings)
    assert muon.param_groups[0]["momentum"] == 0.8
    assert {(*group["betas"], group["eps"]) for group in adamw.param_groups} == {(0.7, 0.6, 0.5)}


def test_rates_are_set_from_the_peak_each_time():
    optimizers = make_optimizers(
        make(), TrainingSettings(optim="muon", learning_rate=1.0, muon_learning_rate=2.0)
    )
    for factor in (0.5, 0.25):
        set_learning_rates(optimizers, factor)
        rates = {group["lr"] for optimizer in optimizers for group in optimizer.param_groups}
        assert rates == {factor, 2 * factor}


def test_seeds_differ_by_step_and_process():
    seeds = {step_seed(seed, step, rank) for seed in range(3) for step in range(50) for rank in range(4)}
    assert len(seeds) == 600 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("dtype, smallest", [(torch.float32, 1e-3), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (8, 8)])
def test_orthogonalize_sets_singular_values_near_one(shape, dtype, smallest):
    """The singular vectors stay, and so do zeros; the scale of a matrix does not matter."""
    generator = torch.Generator().manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(50, *shape, generator=generator), full_matrices=False)
    values = torch.logspace(math.log10(smallest), 0, 400).view(8, 50).T
    scale = torch.logspace(-5, 5, 50)[:, None, None]
    found = orthogonalize((scale * u * values[:, None] @ vt).to(dtype)).float()
    assert (u.mT @ found @ vt.mT - torch.eye(8)).abs().max() < 0.2
    assert not orthogonalize(torch.zeros(1, *shape, dtype=dtype)).any()


@given(st.integers(1, 20), st.integers(1, 40), st.floats(-6, 0), st.integers(0, 99))
@example(rows=5, columns=8, decades=-4.0, seed=77)
def test_orthogonalize_of_any_shape_and_condition_is_the_iteration_in_float64(rows, columns, decades, seed):
    matrix = torch.randn(1, rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix *= torch.logspace(0, decades, columns, dtype=torch.float64)
    expected = orthogonalize(matrix).float()
    # Float32 keeps 2^-24 of the largest eigenvalue of a Gram matrix: of a singular value that is s of the largest about
    # 2^-24 / s^2 of itself, down to 0.001, below which the polynomials only multiply. 256: the roundings of 15 products.
    values = torch.linalg.svdvals(matrix[0])
    s = max(1e-3, (values[-1] / values[0]).item())
    torch.testing.assert_close(
        orthogonalize(matrix.float()), expected, rtol=0, atol=2**-24 * (256 + 4 / s**2)
    )


def test_muon_takes_the_steps_of_torchs_muon(monkeypatch):
    monkeypatch.setattr(muon_module, "COEFFICIENTS", ((3.4445, -4.7750, 2.0315),) * 5)
    shapes = [(24, 8), (8, 24), (24, 8), (16, 16)]
    models = []
    for make_muon in (lambda p: torch.optim.Muon(p, lr=0.1, weight_decay=0.2), lambda p: Muon(p, 0.1, 0.2)):
        generator = torch.Generator().manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        muon = make_muon(parameters)
        assert muon.step() is None  # there are no gradients yet

        def loss(parameters=parameters, generator=generator):
            total = sum((p * torch.randn(p.shape, generator=generator)).sum() for p in parameters)
            for parameter in parameters:
                parameter.grad = None
            total.backward()
            return total.detach()

        losses = [muon.step(loss) for _ in range(5)]
        models.append([*parameters, losses[0]])
    for theirs, ours in zip(*models, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02)  # bfloat16 rounds in another order
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-3), (torch.float32, 1e-6)])
def test_muons_kernels_do_what_torchs_operations_do(dtype, tolerance, monkeypatch):
    layouts = [Layout(), Layout(outputs=(40, 24, 24)), Layout(True, (40, 24, 24)), Layout(True)]
    results = []
    assert muon_module.kernels("nanogpt_hf.training.muon_kernels", torch.device("cuda"))
    for kernels in (muon_module.kernels, lambda name, device: None):
        monkeypatch.setattr(muon_module, "kernels", kernels)
        generator = torch.Generator().manual_seed(0)
        shapes = [(88, 33), (88, 33), (33, 88), (1500, 33)]
        weights = [torch.nn.Parameter(torch.randn(shape, generator=generator).cuda()) for shape in shapes]
        muon = Muon(weights, lr=0.1, weight_decay=0.2, momentum=0.7, dtype=dtype, layouts=layouts)
        for rate in (0.1, 0.05, torch.tensor(0.02, device="cuda")):  # a tensor, as in a CUDA graph
            muon.param_groups[0]["lr"] = rate
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=generator).cuda()
            muon.step()
        results.append([*weights, *(muon.state[weight]["momentum_buffer"] for weight in weights)])
    torch.testing.assert_close(*results, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_computes_in_its_dtype(dtype):
    weight = torch.nn.Parameter(torch.zeros(8, 16))
    weight.grad = torch.randn(8, 16)
    Muon([weight], lr=0.1, weight_decay=0, dtype=dtype).step()
    assert torch.equal(weight, weight.bfloat16().float()) == (dtype == torch.bfloat16)


def test_norms_biases_and_positions_may_have_a_rate_of_their_own():
    settings, model = TrainingSettings(learning_rate=0.1, vector_learning_rate=0.3), make()
    matrices, positions, vectors = make_optimizers(model, settings)[0].param_groups
    assert (matrices["lr"], positions["lr"], vectors["lr"]) == (0.1, 0.3, 0.3)
    assert [*map(id, positions["params"])] == [id(model.transformer.wpe.weight)]
    assert positions["weight_decay"] == settings.weight_decay
    assert learning_rates(settings, 0.5) == {"learning_rate": 0.05, "vector_learning_rate": 0.15}


def moves_of_muon(model, gradients, **settings):
    """What a step of Muon adds to each matrix of the blocks, after gradients by name."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = gradients.get(name)
    _, muon = make_optimizers(model, TrainingSettings(optim="muon", bf16=False, weight_decay=0.0, **settings))
    muon.step()
    return {name: model.get_parameter(name).detach() - before[name] for name in gradients}


def blocks_of(**switches):
    sizes = dict(vocab_size=50, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model = NanoGPTForCausalLM(NanoGPTConfig(**sizes, **switches))
    return model, {name: p for name, p in model.named_parameters() if ".h." in name and p.ndim == 2}


def test_muon_moves_a_matrix_the_same_however_its_weight_is_laid_out():
    """GPT-2's Conv1D holds (inputs, outputs), the same block without biases a Linear's (outputs, inputs)."""
    conv1d, weights = blocks_of(architecture="gpt2")
    linear, others = blocks_of(architecture="gpt2", bias=False)
    gradients = {name: torch.randn_like(weight) for name, weight in weights.items()}
    moves = moves_of_muon(conv1d, gradients)
    moves_of_linear = moves_of_muon(
        linear, {name: gradient.T.contiguous() for name, gradient in gradients.items()}
    )
    assert moves.keys() == others.keys() and len(moves) == 4
    for name, move in moves.items():
        torch.testing.assert_close(move, moves_of_linear[name].T, rtol=1e-4, atol=1e-6)
        size = min(move.shape) ** 0.5 * 0.02 * (2 if "c_fc" in name else 1)  # 2: four outputs an input
        size *= 3**0.5 if "c_attn" in name else 1
        assert move.norm() == pytest.approx(size, rel=0.15), name


@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
def test_the_ends_of_residual_branches_move_by_their_own_scale(architecture):
    moves = []
    for scale in (1.0, 0.25):
        torch.manual_seed(0)
        model, weights = blocks_of(architecture=architecture)
        gradients = {name: torch.randn_like(weight) for name, weight in weights.items()}
        moves.append(moves_of_muon(model, gradients, muon_residual_scale=scale))
    for name, move in moves[0].items():
        expected = move * 0.25 if "c_proj" in name else move
        torch.testing.assert_close(moves[1][name], expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
def test_muon_takes_apart_what_lies_side_by_side(architecture):
    """Without a gradient for the queries, keys and values move as they do with one."""
    model, weights = blocks_of(architecture=architecture)
    outputs = 1 if architecture == "gpt2" else 0
    for name, parts in {"attn.c_attn": 3, "mlp.c_fc": 2}.items():
        if architecture == "gpt2" and name == "mlp.c_fc":
            continue
        name = f"transformer.h.0.{name}.weight"
        gradient = torch.randn_like(weights[name])
        without = gradient.clone()
        without.chunk(parts, dim=outputs)[0].zero_()
        moves = [moves_of_muon(model, {name: g})[name].chunk(parts, dim=outputs) for g in (gradient, without)]
        assert moves[1][0].abs().max() == 0
        torch.testing.assert_close(moves[0][1:], moves[1][1:], rtol=1e-4, atol=1e-6)


def steps_taken(optim, prepare=lambda optimizers: None):
    """The weights after three steps with rates that change."""
    model = make()
    optimizers = make_optimizers(model, TrainingSettings(optim=optim, weight_decay=0.3, bf16=False))
    x, y = ragged_batch(8)
    for factor in (0.5, 1.0, 0.25):
        prepare(optimizers)  # again, as for steps that are recorded anew
        set_learning_rates(optimizers, factor)
        accumulate_gradients(Accelerator(cpu=True), model, language_modeling(), [(x, y)])
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    return list(model.parameters())


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_rates_kept_on_the_device_give_the_same_steps(optim):
    torch.testing.assert_close(steps_taken(optim), steps_taken(optim, make_capturable), rtol=1e-4, atol=5e-6)


def tiny_run(tmp_path, *words):
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question.\n" * 60, encoding="utf-8")
    return parse(
        TrainingSettings,
        None,
        [*("--corpus", str(text), "--max_steps", "8", "--per_device_train_batch_size", "4"), *words],
    )


def stepper(settings, model=None, short=NONE_SHORT):
    accelerator = Accelerator(cpu=True)
    model = model or make()
    optimizers = make_optimizers(model, settings)
    objective = language_modeling(accelerator, short=short)
    return Stepper(accelerator, settings, model, optimizers, objective, make_schedule(settings)), model


def test_a_compiled_block_takes_the_steps_of_an_eager_one_and_is_eager_again_in_the_end(tmp_path):
    """Windows of two lengths are compiled before the first step."""
    words, short = ("--torch_compile", "--torch_compile_backend", "aot_eager"), ShortWindows(4, 2)
    torch._dynamo.reset()
    compiled, model = stepper(tiny_run(tmp_path, *words), short=short)
    eager, other = stepper(tiny_run(tmp_path, "--torch_compile", "false"), short=short)
    assert all(block._compiled_call_impl is not None for block in model.transformer.h)
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(4):
            torch.testing.assert_close(compiled(step), eager(step), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()), rtol=1e-4, atol=1e-5)
    compiled.release()
    assert all(block._compiled_call_impl is None for block in model.transformer.h)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_a_recorded_step_is_the_step_itself(architecture, optim, micro_batches, own_accelerate_state):
    """Dropout included: a replay draws the random numbers of its own step. Longer windows are recorded anew."""
    results = []
    for steps_before_capture in (3, -1):
        torch.manual_seed(0)
        config = NanoGPTConfig(
            architecture=architecture, vocab_size=50, n_positions=16, n_embd=64, n_layer=2, n_head=2,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        settings = TrainingSettings(
            optim=optim, per_device_train_batch_size=8, gradient_accumulation_steps=micro_batches, torch_compile=False
        )  # fmt: skip
        accelerator = Accelerator()
        model, *optimizers = accelerator.prepare(
            *(lambda m: (m, *make_optimizers(m, settings)))(NanoGPTForCausalLM(config))
        )
        take_step = Stepper(
            accelerator,
            settings,
            model,
            [o.optimizer for o in optimizers],
            language_modeling(accelerator, 8 * micro_batches, ShortWindows(8, 5)),
            lambda step: 1 / (step + 1),
        )
        take_step.steps_before_capture = steps_before_capture
        losses = [take_step(step)[0].item() for step in range(5)]
        assert (take_step.graph is not None) == (steps_before_capture == 3)
        losses += [take_step(step)[0].item() for step in range(5, 10)]
        assert (take_step.graph is not None) == (steps_before_capture == 3)
        results.append((losses, [p.detach().cpu() for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
