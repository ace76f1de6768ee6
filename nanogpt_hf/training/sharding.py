"""FSDP2's shards without the price of DTensor: what goes tensor by tensor takes its shards as plain tensors.

DTensor asks for each of a model's hundreds of tensors how the result is laid out. For 580 of them (gpt2-xl's) clipping
and AdamW took the host 26 ms a step so (one core of an AMD EPYC, November 2026), longer than the GPU has to do for them.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Replicate


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def clip_sharded_grad_norm_(parameters: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
    """torch.nn.utils.clip_grad_norm_ for parameters that FSDP2 has all sharded alike: their norm before it."""
    gradients: list[Any] = [parameter.grad for parameter in parameters if parameter.grad is not None]
    shards = [local(gradient) for gradient in gradients]
    squares = torch.stack(torch._foreach_norm(shards)).square().sum()
    mesh, placements = gradients[0].device_mesh, gradients[0].placements
    summed = [Partial() if placement.is_shard() else Replicate() for placement in placements]
    norm = DTensor.from_local(squares, mesh, summed).full_tensor().sqrt()
    torch._foreach_mul_(shards, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


class AdamW(torch.optim.AdamW):
    """torch's, which takes the shards of sharded parameters as plain tensors; its state stays sharded as they are."""

    def _init_group(self, group: dict[str, Any], *lists: list[torch.Tensor]) -> Any:
        result = super()._init_group(group, *lists)
        for tensors in lists:
            tensors[:] = map(local, tensors)
        return result


def prefetch_blocks(model: nn.Module, blocks: list[nn.Module]) -> None:
    """Have each of FSDP2's blocks gather the next one's weights before it computes; a block before the first one.

    Otherwise a block's are gathered when the host has reached it, which may be when the device waits for it already.
    """
    modules = [module for module in (model, *blocks) if isinstance(module, FSDPModule)]
    for module, following in pairwise(modules):
        module.set_modules_to_forward_prefetch([following])
