"""The loop's arithmetic."""

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from nanogpt_hf import NanoGPTConfig, NanoGPTForCausalLM
from nanogpt_hf.common.cli import parse
from nanogpt_hf.common.settings import TrainingSettings
from nanogpt_hf.data.token_stream import TokenStream
from nanogpt_hf.training import optimization
from nanogpt_hf.training.objectives import LanguageModeling
from nanogpt_hf.training.optimization import (
    Muon,
    learning_rates,
    make_capturable,
    make_optimizers,
    make_schedule,
    orthogonalize,
    set_learning_rates,
)
from nanogpt_hf.training.stepping import Stepper, accumulate_gradients, step_seed


def make():
    torch.manual_seed(0)
    fields = dict(
        vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return NanoGPTForCausalLM(NanoGPTConfig(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **fields))


def language_modeling(accelerator=None, batch_size=4):
    ids = torch.randint(0, 50, (2000,), generator=torch.Generator().manual_seed(2)).numpy()
    accelerator = accelerator or Accelerator(cpu=True)
    return LanguageModeling(accelerator, TokenStream(ids, 16, accelerator.device), batch_size, 1337)


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
                assert {p.ndim > 1 for p in group["params"]} == {group["weight_decay"] == 0.3}
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
    "name", ["cosine", "constant", "constant_with_warmup", "warmup_stable_decay", "polynomial"]
)
def test_other_schedules_are_functions_of_the_step(name):
    factor = make_schedule(TrainingSettings(max_steps=100, warmup_steps=10, lr_scheduler_type=name))
    assert [factor(50), factor(50)] == [factor(50)] * 2 and 0 < factor(20) <= 1


def test_momentum_of_muon_is_a_setting():
    _, muon = make_optimizers(make(), TrainingSettings(optim="muon", muon_momentum=0.8))
    assert muon.param_groups[0]["momentum"] == 0.8


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


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (16, 16)])
def test_orthogonalize_sets_singular_values_near_one(shape):
    generator = torch.Generator().manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(3, *shape, generator=generator)))
    assert values.min() > 0.3 and values.max() < 1.3


@given(st.integers(1, 20), st.integers(1, 40), st.floats(-6, 0), st.integers(0, 99))
def test_orthogonalize_of_any_shape_and_condition_is_the_iteration_in_float64(rows, columns, decades, seed):
    matrix = torch.randn(1, rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix *= torch.logspace(0, decades, columns, dtype=torch.float64)
    expected = orthogonalize(matrix).float()
    # float32 has two digits left for singular values that are 1e-6 of the largest one.
    torch.testing.assert_close(orthogonalize(matrix.float()), expected, rtol=0, atol=1e-2)


def test_muon_takes_the_steps_of_torchs_muon(monkeypatch):
    monkeypatch.setattr(optimization, "COEFFICIENTS", ((3.4445, -4.7750, 2.0315),) * 5)
    shapes = [(24, 8), (8, 24), (24, 8), (16, 16)]
    models = []
    for make_muon in (lambda p: torch.optim.Muon(p, lr=0.1, weight_decay=0.2), lambda p: Muon(p, 0.1, 0.2)):
        generator = torch.Generator().manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        muon = make_muon(parameters)
        for _ in range(5):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            muon.step()
        models.append(parameters)
    for theirs, ours in zip(*models, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02)  # bfloat16 rounds in another order
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


def test_norms_and_biases_may_have_a_rate_of_their_own():
    settings = TrainingSettings(learning_rate=0.1, vector_learning_rate=0.3)
    matrices, vectors = make_optimizers(make(), settings)[0].param_groups
    assert (matrices["lr"], vectors["lr"]) == (0.1, 0.3)
    assert learning_rates(settings, 0.5) == {"learning_rate": 0.05, "vector_learning_rate": 0.15}


def moves_of_muon(model, gradients):
    """What a step of Muon adds to each matrix of the blocks, after gradients by name."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = gradients.get(name)
    _, muon = make_optimizers(model, TrainingSettings(optim="muon", bf16=False, weight_decay=0.0))
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
    prepare(optimizers)
    x, y = ragged_batch(8)
    for factor in (0.5, 1.0, 0.25):
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


def stepper(settings, model=None):
    accelerator = Accelerator(cpu=True)
    model = model or make()
    optimizers = make_optimizers(model, settings)
    return Stepper(
        accelerator, settings, model, optimizers, language_modeling(accelerator), make_schedule(settings)
    ), model


def test_a_compiled_block_takes_the_steps_of_an_eager_one_and_is_eager_again_in_the_end(tmp_path):
    compiled, model = stepper(tiny_run(tmp_path, "--torch_compile", "--torch_compile_backend", "aot_eager"))
    eager, other = stepper(tiny_run(tmp_path, "--torch_compile", "false"))
    assert all(block._compiled_call_impl is not None for block in model.transformer.h)
    for step in range(3):
        torch.testing.assert_close(compiled(step), eager(step), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(list(model.parameters()), list(other.parameters()), rtol=1e-4, atol=1e-5)
    compiled.release()
    assert all(block._compiled_call_impl is None for block in model.transformer.h)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_a_recorded_step_is_the_step_itself(architecture, optim, micro_batches, own_accelerate_state):
    """Dropout included: a replay draws the random numbers of its own step."""
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
            language_modeling(accelerator, 8 * micro_batches),
            lambda step: 1 / (step + 1),
        )
        take_step.steps_before_capture = steps_before_capture
        losses = [take_step(step)[0].item() for step in range(10)]
        assert (take_step.graph is not None) == (steps_before_capture == 3)
        results.append((losses, [p.detach().cpu() for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
