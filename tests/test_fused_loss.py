"""The loss without logits against torch's own."""

import pytest
import torch
from torch.nn import functional as F

from nanogpt_hf.training import fused_loss
from nanogpt_hf.training.fused_loss import linear_cross_entropy, softmax_gradient_

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


def inputs(device, B=3, T=7, C=16, V=300):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, C, generator=generator).to(device).requires_grad_()
    weight = torch.randn(V, C, generator=generator).to(device).requires_grad_()
    targets = torch.randint(0, V, (B, T), generator=generator)
    targets[0, :3] = -100
    return hidden, weight, targets.to(device), torch.tensor(40, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_loss_and_gradients_are_those_of_cross_entropy(device, rows, monkeypatch):
    hidden, weight, targets, number = inputs(device)
    monkeypatch.setattr(fused_loss, "CHUNK_BYTES", rows * weight.shape[0] * 4)
    loss = linear_cross_entropy(hidden, weight, targets, number)
    gradients = torch.autograd.grad(3 * loss, (hidden, weight))
    logits = F.linear(hidden, weight)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / number
    torch.testing.assert_close(loss, expected)
    tolerance = dict(rtol=1e-3, atol=1e-4) if device == "cuda" else {}
    torch.testing.assert_close(gradients, torch.autograd.grad(3 * expected, (hidden, weight)), **tolerance)


@pytest.mark.parametrize("rows", [0.1, 2])
def test_products_are_in_the_dtype_of_autocast_and_gradients_in_the_weights_own(rows, monkeypatch):
    hidden, weight, targets, number = inputs("cpu")
    monkeypatch.setattr(fused_loss, "CHUNK_BYTES", int(rows * 304 * 2))  # of less than a row there is one
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, number)
        logits = F.linear(hidden, weight)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    expected = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum") / number
    torch.testing.assert_close(loss, expected)
    of_logits = (logits.float().softmax(dim=-1) - F.one_hot(targets.clamp(min=0), 300)) / number
    of_logits = of_logits.masked_fill((targets == -100)[..., None], 0).bfloat16().float()
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 2
    # Each part of the sum over tokens is rounded to bfloat16, the sum is not.
    sum_of_parts = of_logits.flatten(0, 1).T @ hidden.detach().bfloat16().float().flatten(0, 1)
    torch.testing.assert_close(gradients[1], sum_of_parts, rtol=2**-7, atol=2**-10)
    torch.testing.assert_close(
        gradients[0], of_logits @ weight.detach().bfloat16().float(), rtol=2**-7, atol=1e-3
    )


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_frozen_gets_no_gradient(frozen):
    hidden, weight, targets, number = inputs("cpu")
    (hidden, weight)[frozen].requires_grad_(False)
    linear_cross_entropy(hidden, weight, targets, number).backward()
    assert (hidden, weight)[frozen].grad is None and (hidden, weight)[1 - frozen].grad is not None


def test_a_batch_without_targets_costs_nothing():
    hidden, weight, targets, number = inputs("cpu")
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100), number)
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("V", [1, 2, 65, 4097, 50304])
def test_rows_of_any_width_with_large_logits(device, V):
    generator = torch.Generator().manual_seed(0)
    logits = (50 * torch.randn(5, V, generator=generator)).to(device)
    targets = torch.randint(0, V, (5,), generator=generator).to(device)
    expected = F.cross_entropy(logits, targets, reduction="none")
    gradient = (logits.softmax(dim=-1) - F.one_hot(targets, V)) / 5
    losses = softmax_gradient_(logits, targets, torch.tensor(0.2, device=device))
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(logits, gradient, rtol=1e-4, atol=1e-6)
