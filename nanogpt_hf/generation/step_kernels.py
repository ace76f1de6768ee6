"""What lies between the matrix products of one decoded token, as two Triton kernels.

A small model's token is launches: as single operations Qwen3's norms of heads, rotation and gate are twenty a block,
and it wrote at half of GPT-2's rate (benchmarks/RESULTS.md, 2026-11-26). torch.compile makes as few of them, and takes
longer than most texts do.

Shapes: B rows, H heads of queries, K of keys and of values, D head size, L room in the cache, I width of the MLP.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _place_heads(
    projected, query, keys, values, position, cos, sin, weights, eps, room,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BLOCK)
    inside = d < D
    place = tl.load(position)
    source = projected + (row * (H + 2 * K) + head) * D
    x = tl.load(source + d, mask=inside, other=0.0)
    if head >= H + K:
        tl.store(values + ((row * K + head - H - K) * room + place) * D + d, x, mask=inside)
    else:
        partner = tl.where(d < D // 2, d + D // 2, d - D // 2)  # turned together with d
        y = tl.load(source + partner, mask=inside, other=0.0)
        if NORM:
            part = weights + (head >= H) * D
            wide = x.to(tl.float32)
            scale = tl.rsqrt(tl.sum(wide * wide) / D + eps)
            x = (wide * scale * tl.load(part + d, mask=inside, other=0.0).to(tl.float32)).to(x.dtype)
            other = tl.load(part + partner, mask=inside, other=0.0).to(tl.float32)
            y = (y.to(tl.float32) * scale * other).to(y.dtype)
        if ROTARY:
            c = tl.load(cos + place * D + d, mask=inside, other=0.0)
            s = tl.load(sin + place * D + d, mask=inside, other=0.0)
            x = (x.to(tl.float32) * c + y.to(tl.float32) * s).to(x.dtype)
        if head < H:
            tl.store(query + (row * H + head) * D + d, x, mask=inside)
        else:
            tl.store(keys + ((row * K + head - H) * room + place) * D + d, x, mask=inside)


@triton.jit
def _swiglu(x, out, size, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    gate = tl.load(x + row * 2 * size + i, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + row * 2 * size + size + i, mask=inside, other=0.0).to(tl.float32)
    silu = (gate * tl.sigmoid(gate)).to(x.dtype.element_ty).to(tl.float32)  # rounded as F.silu's
    tl.store(out + row * size + i, silu * value, mask=inside)


def place_heads(
    projected: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    norms: tuple[torch.Tensor, float] | None,
) -> torch.Tensor:
    """The queries (B H D) of c_attn's output (B (H + 2K) D); keys and values go to their position in the cache.

    Args:
        keys, values: B K L D, contiguous.
        position: one integer, on the device.
        rotation: cosines and signed sines, L D each in float32.
        norms: weights of the RMSNorms of queries and keys (2 D), and their epsilon.
    """
    B, heads, D = projected.shape
    K, room = keys.shape[1:3]
    H = heads - 2 * K
    query = projected.new_empty(B, H, D)
    cos, sin = rotation or (projected, projected)
    weights, eps = norms or (projected, 0.0)
    _place_heads[(B, heads)](
        projected, query, keys, values, position, cos, sin, weights, eps, room,
        H, K, D, rotation is not None, norms is not None, triton.next_power_of_2(D),
    )  # fmt: skip
    return query


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * value of x (B 2I), which holds them side by side."""
    B, size = x.shape[0], x.shape[1] // 2
    out = x.new_empty(B, size)
    _swiglu[(B, triton.cdiv(size, 1024))](x, out, size, 1024)
    return out


def try_out(device: torch.device) -> None:
    """Raises whatever keeps the kernels from working."""
    swiglu(torch.zeros(1, 2, device=device))
