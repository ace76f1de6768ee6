"""The Triton kernel of fused_loss.py: Triton reads a kernel's source from a file that imports it at the top."""

import triton
import triton.language as tl


@triton.jit
def softmax_gradient_kernel(logits, targets, losses, scale, stride, V, BLOCK: tl.constexpr):
    """One row: its loss, and the gradient in the place of its logits.

    The row is read twice, the second time from the L2 cache; the sum is that of an online softmax (Milakov and
    Gimelshein 2018).
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    top = -float("inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        places = start + tl.arange(0, BLOCK)
        x = tl.load(logits + places, mask=places < V, other=-float("inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(x, axis=0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(x - new_top), axis=0)
        top = new_top
    counts = target >= 0
    at_target = tl.load(logits + tl.where(counts, target, 0)).to(tl.float32)
    tl.store(losses + row, tl.where(counts, tl.log(total) + top - at_target, 0.0))
    factor = tl.where(counts, tl.load(scale), 0.0)
    tl.debug_barrier()
    for start in range(0, V, BLOCK):
        places = start + tl.arange(0, BLOCK)
        x = tl.load(logits + places, mask=places < V, other=-float("inf")).to(tl.float32)
        gradient = (tl.exp(x - top) / total - tl.where(places == target, 1.0, 0.0)) * factor
        tl.store(logits + places, gradient.to(logits.dtype.element_ty), mask=places < V)
