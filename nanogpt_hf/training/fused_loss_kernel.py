"""The Triton kernel of fused_loss.py."""

import torch
import triton
import triton.language as tl


def softmax_gradient_(logits: torch.Tensor, targets: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """fused_loss.softmax_gradient_ in one kernel."""
    N, V = logits.shape
    losses = torch.empty(N, dtype=torch.float32, device=logits.device)
    block = min(8192, 1 << (V - 1).bit_length())
    warps = 16 if block == 8192 else 8  # of seven pairs tried on an H100 with 50,257 classes the fastest
    _softmax_gradient[(N,)](logits, targets, losses, scale, logits.stride(0), V, BLOCK=block, num_warps=warps)
    return losses


def try_out(device: torch.device) -> None:
    """Raises whatever keeps the kernels from working."""
    one = torch.zeros(1, 1, device=device)
    softmax_gradient_(one, torch.zeros(1, dtype=torch.long, device=device), one.sum())


@triton.jit
def _softmax_gradient(logits, targets, losses, scale, stride, V, BLOCK: tl.constexpr):
    """One row: its loss, and the gradient in the place of its logits.

    The row is read three times (its top, the sum of exponentials, the gradient), the last two from the L2 cache. That is
    two reductions a row; an online softmax reads once less but reduces in every block, and measured slower.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    tops = tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(0, V, BLOCK):
        places = start + tl.arange(0, BLOCK)
        x = tl.load(logits + places, mask=places < V, other=-float("inf")).to(tl.float32)
        tops = tl.maximum(tops, x)
    top = tl.max(tops, axis=0)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        places = start + tl.arange(0, BLOCK)
        x = tl.load(logits + places, mask=places < V, other=-float("inf")).to(tl.float32)
        sums += tl.exp(x - top)
    log_total = top + tl.log(tl.sum(sums, axis=0))
    counts = target >= 0
    at_target = tl.load(logits + tl.where(counts, target, 0)).to(tl.float32)
    tl.store(losses + row, tl.where(counts, log_total - at_target, 0.0))
    factor = tl.where(counts, tl.load(scale), 0.0)
    tl.debug_barrier()
    for start in range(0, V, BLOCK):
        places = start + tl.arange(0, BLOCK)
        x = tl.load(logits + places, mask=places < V, other=-float("inf")).to(tl.float32)
        gradient = (tl.exp(x - log_total) - tl.where(places == target, 1.0, 0.0)) * factor
        tl.store(logits + places, gradient.to(logits.dtype.element_ty), mask=places < V)
