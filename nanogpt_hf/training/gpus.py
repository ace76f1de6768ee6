"""What GPUs are sold with, and what share of it a model's FLOPs get (MFU, Chowdhery et al. 2022)."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..common.errors import UserError
from ..common.text import nearest

if TYPE_CHECKING:  # plan.py looks a GPU up before it imports them
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class GPU:
    """memory_gib as it is sold; bf16_tflops dense (without sparsity), float32 accumulation, by the vendor's datasheet."""

    memory_gib: float
    bf16_tflops: float


GPUS = {
    "b200": GPU(180, 2250),
    "h200": GPU(141, 989),
    "h100": GPU(80, 989),  # SXM
    "a100": GPU(80, 312),
    "a100-40gb": GPU(40, 312),
    "l40s": GPU(48, 362),
    "l4": GPU(24, 121),
    "rtx4090": GPU(24, 165),
    "rtx3090": GPU(24, 71),
}


def find_gpu(name: str, memory_gib: float | None = None, bf16_tflops: float | None = None) -> GPU:
    """A GPU of the table, or of any name where both numbers are given; a number given beats the table's.

    Raises:
        UserError: it is not in the table and a number is missing; the message names the nearest one.
    """
    known = GPUS.get(name.lower())
    if known is None and (memory_gib is None or bf16_tflops is None):
        near = nearest(name.lower(), GPUS)
        hint = f"did you mean {near!r}" if near else f"use one of {', '.join(GPUS)}"
        raise UserError(f"there is no GPU {name!r} here: {hint}, or give --gpu_memory_gib and --gpu_tflops.")
    known = known or GPU(0, 0)  # both numbers are given then
    return GPU(memory_gib or known.memory_gib, bf16_tflops or known.bf16_tflops)


def peak_flops(device_name: str) -> float | None:
    """Bfloat16 FLOPs per second of a GPU by the name that CUDA gives it, None of one that is not in the table."""
    words = [w for w in re.findall("[a-z0-9]+", device_name.lower()) if w not in ("nvidia", "geforce")]
    name = "".join(words[:2] if words[:1] == ["rtx"] else words[:1])
    # Cards of the same name with other rates.
    others = {"ti", "super", "d", "laptop"} | (set() if name == "a100" else {"pcie", "nvl"})
    return GPUS[name].bf16_tflops * 1e12 if name in GPUS and others.isdisjoint(words) else None


def peak_of(device: "torch.device") -> float | None:
    """The same for a device of this process."""
    import torch

    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def flops_per_token(model: "PreTrainedModel", context: int, passes: int = 1) -> float | None:
    """FLOPs of forward and backward for a token: 6 a parameter, and attention's scores over the whole context.

    None where a part of the model does not train, which costs less.

    Args:
        context: T.
        passes: how often a step reads the token.
    """
    if not all(parameter.requires_grad for parameter in model.parameters()):
        return None
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0) or 0
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // max(1, heads)
    return passes * (6 * model.num_parameters() + 12 * config.num_hidden_layers * heads * head_dim * context)
