"""The Triton kernel of fused_loss.py: Triton reads a kernel's source from a file that imports it at the top."""

import triton
import triton.language as tl


@triton.jit
def softmax_gradient_kernel(logits, targets, losses, scale, stride, V, BLOCK: tl.constexpr):
    """One row: its loss, and the gradient in the place of its logits.

    The row is read three times (its top, the sum of exponentials, the gradient), the last two from the L2 cache: so a
    lane waits for the others twice a row, and an online softmax, which reads once less, is slower.
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
