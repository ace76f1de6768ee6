"""Cross-entropy fused with the head: the logits exist a chunk of rows at a time and never in float32.

torch's own torch.nn.functional.linear_cross_entropy does it from torch 2.13 on, in several passes over the logits.
This is one kernel on CUDA, which moves them from and to memory once, wherever Triton can make it.
"""

from typing import Any

import torch
from torch.nn import functional as F

from ..common.kernels import kernels

CHUNK_BYTES = 2**30  # of logits that exist at once
# Rows. With GPT-2's 50,257 two of the head's products took 22.8 ms for 16,384 tokens, with 50,304 some 3.1 (by profiles on
# H200s, November 2026).
ALIGNMENT = 8


def linear_cross_entropy(
    hidden_states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, num_items_in_batch: torch.Tensor
) -> torch.Tensor:
    """The sum over all tokens of -log softmax(hidden_states @ weight.T)[target], divided by num_items_in_batch.

    The gradient is computed with the loss, while the logits are there (Wijmans et al. 2024, "Cut your losses",
    name the cost of keeping them). Under autocast the products are in its dtype, the softmax is in float32.

    Args:
        hidden_states: B T C.
        weight: V C, the head.
        targets: B T; -100 is left out.
        num_items_in_batch: a number, on the device.
    """
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
    return _LinearCrossEntropy.apply(
        hidden_states.flatten(0, 1).to(dtype), weight, targets.flatten(), num_items_in_batch
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        num_items: torch.Tensor,
    ) -> torch.Tensor:
        """hidden: N C. Saves the gradients themselves: hidden's, and the weight's in float32."""
        V = weight.shape[0]
        head = F.pad(weight.to(hidden.dtype), (0, 0, 0, -V % ALIGNMENT))  # rows of zeros, which add nothing
        hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_grad = None
        rows = max(1, CHUNK_BYTES // (head.shape[0] * head.element_size()))
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        scale = 1.0 / num_items
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            logits = hidden[chunk] @ head.T
            losses[chunk] = softmax_gradient_(logits[:, :V], targets[chunk], scale)
            if hidden_grad is not None:
                torch.mm(logits, head, out=hidden_grad[chunk])
            if ctx.needs_input_grad[1]:
                part = (logits.T @ hidden[chunk])[:V]
                weight_grad = part.float() if weight_grad is None else weight_grad.add_(part)
                del part
            del logits  # before the next chunk's are there
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.weight_dtype = weight.dtype
        return losses.sum() * scale

    @staticmethod
    def backward(ctx: Any, loss_grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return (
            None if hidden_grad is None else hidden_grad * loss_grad.to(hidden_grad.dtype),
            None if weight_grad is None else (weight_grad * loss_grad).to(ctx.weight_dtype),
            None,
            None,
        )


def softmax_gradient_(logits: torch.Tensor, targets: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Losses (N) of logits (N V), which become the gradient of the losses' sum times scale; -100 is no target."""
    if fused := kernels(f"{__package__}.fused_loss_kernel", logits.device):
        return fused.softmax_gradient_(logits, targets, scale)
    counts = targets != -100
    places = targets.clamp(min=0)[:, None]
    logs = logits.float().log_softmax(dim=-1)
    losses = -logs.gather(1, places)[:, 0] * counts
    gradient = logs.exp_().scatter_add_(1, places, logs.new_full(places.shape, -1.0))
    logits.copy_(gradient.mul_((counts * scale)[:, None]))
    return losses
