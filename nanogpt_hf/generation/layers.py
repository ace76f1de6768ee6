"""A model's layers as plain functions of few rows: no hooks, no reshaping, and on a CPU in 8 bits where that is asked.

Shapes: B rows, C channels, I inputs and O outputs of a projection.
"""

import math
from collections.abc import Callable
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..model.modeling_nanogpt import RMSNorm

Layer = Callable[[torch.Tensor], torch.Tensor]

# A product of few rows reads its weights once, and MKL lets one core do that: 2 cores of an AMD EPYC (2026-11-24) read 8
# to 12 GB/s of 3072 x 768 weights whole and 15 to 18 as a batch of two halves; below so many weights it costs more.
SPLIT_FROM = 2**18
INT8_FROM = 2**16  # weights: smaller matrices are in the cache anyway


def plain(module: nn.Module, int8: bool = False) -> Layer:
    """A layer as a function of x (B C). What is not one of the network's own stays itself.

    Args:
        int8: hold a projection's weights in 8 bits, where it has enough of them.
    """
    if type(module) is nn.LayerNorm:
        shape = module.normalized_shape
        return lambda x: torch.layer_norm(x, shape, module.weight, module.bias, module.eps)
    if type(module) is RMSNorm:
        return plain_rms_norm(module, module.weight)
    if type(module) not in (Conv1D, nn.Linear):
        return module
    weight, bias, transposed = module.weight, module.bias, type(module) is Conv1D
    if int8 and weight.numel() >= INT8_FROM:
        return _product_in_8_bits(module, transposed)
    split = weight.device.type == "cpu" and weight.numel() >= SPLIT_FROM and torch.get_num_threads() > 1
    if transposed:
        return _split_by_inputs(weight, bias) if split else partial(torch.addmm, bias, mat2=weight)
    return _split_by_outputs(weight, bias) if split else partial(F.linear, weight=weight, bias=bias)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def plain_rms_norm(module: RMSNorm, weight: torch.Tensor) -> Layer:
    """RMSNorm with another weight, which broadcasts against x."""
    C, shape = module.normalized_shape[0], module.normalized_shape
    if weight.is_cuda and weight.shape == shape:
        return lambda x: torch.rms_norm(x, shape, weight, module.eps)  # one kernel, float32 inside
    floor = torch.tensor(math.sqrt(C * module.eps), device=weight.device)
    return partial(_rms_norm, weight=weight.float() * math.sqrt(C), floor=floor)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, given weight sqrt(C) and floor sqrt(C eps)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return (x / norm.hypot(floor) * weight).to(x.dtype)


def _split_by_inputs(weight: torch.Tensor, bias: torch.Tensor) -> Layer:
    """x (B I) @ weight (I O) + bias (O), a share of the inputs on each thread."""
    inputs, outputs = weight.shape
    parts = max(n for n in range(1, torch.get_num_threads() + 1) if inputs % n == 0)
    weights = weight.view(parts, -1, outputs)
    biases = torch.cat((bias[None], bias.new_zeros(parts - 1, outputs)))[:, None]
    return lambda x: torch.baddbmm(biases, x.view(len(x), parts, -1).transpose(0, 1), weights).sum(0)


def _split_by_outputs(weight: torch.Tensor, bias: torch.Tensor | None) -> Layer:
    """x (B I) @ weight (O I) transposed + bias (O), a share of the outputs on each thread."""
    outputs, inputs = weight.shape
    parts = min(torch.get_num_threads(), outputs)
    even = outputs - outputs % parts
    weights, rest = weight[:even].view(parts, -1, inputs).transpose(1, 2), weight[even:]

    def product(x: torch.Tensor) -> torch.Tensor:
        y = torch.matmul(x, weights).transpose(0, 1).reshape(len(x), even)
        y = torch.cat((y, F.linear(x, rest)), dim=1) if len(rest) else y
        return y if bias is None else y + bias

    return product


# Of modules: the state of their weights, and those in 8 bits. A text is written in less time than rounding them takes.
_ROUNDED: WeakKeyDictionary = WeakKeyDictionary()


def round_to_8_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix (O I) as int8 of the same shape and a bfloat16 scale for every output (O)."""
    scale = (weight.abs().amax(dim=1) / 127).clamp(min=1e-30).bfloat16()
    return (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8).contiguous(), scale


def _product_in_8_bits(module: Conv1D | nn.Linear, transposed: bool) -> Layer:
    """The module's product with its weights in int8, x and the product rounded to bfloat16."""
    weight, bias = module.weight.detach(), module.bias
    state = (weight.data_ptr(), weight._version)
    if _ROUNDED.get(module, (None,))[0] != state:
        _ROUNDED[module] = state, *round_to_8_bits(weight.T if transposed else weight)
    _, rounded, scale = _ROUNDED[module]

    def product(x: torch.Tensor) -> torch.Tensor:
        y = torch._weight_int8pack_mm(x.bfloat16(), rounded, scale).to(x.dtype)
        return y if bias is None else y + bias

    return product
