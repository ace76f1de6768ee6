"""The loop's arithmetic."""

import pytest
import torch
from accelerate import Accelerator

from nanogpt_hf import NanoGPTConfig, NanoGPTForCausalLM
from nanogpt_hf.optimization import Muon, make_optimizers, make_schedule, orthogonalize, set_learning_rates
from nanogpt_hf.settings import TrainingSettings
from nanogpt_hf.stepping import accumulate_gradients, step_seed


def make():
    torch.manual_seed(0)
    fields = dict(
        vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return NanoGPTForCausalLM(NanoGPTConfig(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **fields))


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
        loss = accumulate_gradients(accelerator, model, batches)
        results.append((loss, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-7)
    logits = make()(x).logits
    torch.testing.assert_close(
        results[1][0], torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    )


def test_every_parameter_is_in_one_optimizer_and_only_matrices_decay():
    for optim, count in (("adamw", 1), ("muon", 2)):
        for architecture in ("gpt2", "modern"):
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


def test_muon_takes_the_steps_of_torchs_muon():
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
        assert (ours - theirs).norm() < 5e-3 * theirs.norm()
