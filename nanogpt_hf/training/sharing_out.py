"""Work on whole weights, shared out over the processes: each takes some of them and sends the others what came of it.

With DDP every process has the whole of everything, with FSDP2 some rows of each weight. Shapes: N weights of one shape
R x C, of which a process takes K.
"""

import math
from collections.abc import Sequence

import torch
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from .sharding import local


class SharedOut:
    """N weights of one shape: `whole` are the tensors that this process takes, `targets` are for what it makes of them.

    Every process calls these in the same order, with the same weights.

    Args:
        weights: the parameters.
        tensors: what belongs to them, as this process holds it.
        dtype: in which it is sent.

    Attributes:
        mine: which of the N this process takes.
        whole: K tensors R x C.
        targets: K tensors R x C of zeros, or the weights themselves where one process has them all.
    """

    def __init__(self, weights: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor], dtype: torch.dtype):
        self.weights = [local(weight) for weight in weights]
        self.shape, self.sharded = weights[0].shape, isinstance(weights[0], DTensor)
        self.group = group_of(weights[0])
        self.size = 1 if self.group is None else dist.get_world_size(self.group)
        rank = 0 if self.group is None else dist.get_rank(self.group)
        share = -(-len(weights) // self.size)
        self.counts = [len(part) for part in _chunks(len(weights), share, self.size)]
        self.mine = slice(rank * share, rank * share + self.counts[rank])
        if self.size == 1:
            self.whole, self.targets = list(tensors), self.weights
            return
        if self.sharded:
            self.rows = [
                len(part) for part in _chunks(self.shape[0], -(-self.shape[0] // self.size), self.size)
            ]
            row = self.shape[1:].numel()
            self.sent = [count * self.rows[rank] * row for count in self.counts]
            self.received = [self.counts[rank] * rows * row for rows in self.rows]
            flat = torch.cat([tensor.to(dtype).flatten() for tensor in tensors])
            mine, sending = self._exchange(flat, self.sent, self.received)
            sending.wait()
            parts = mine.split(self.received)
            shapes = [(self.counts[rank], rows, *self.shape[1:]) for rows in self.rows]
            rows_of_mine = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
            self.whole = list(torch.cat(rows_of_mine, dim=1).unbind())
        else:
            self.whole = list(tensors[self.mine])
        count = self.counts[rank] if self.sharded else share
        self._made = torch.zeros(count, *self.shape, dtype=dtype, device=tensors[0].device)
        self.targets = list(self._made[: self.counts[rank]].unbind())

    def send(self) -> None:
        """Begin to send the targets to the processes that wait for them; the device goes on meanwhile."""
        if self.size == 1:
            return
        if self.sharded:
            flat = torch.cat([part.flatten() for part in self._made.split(self.rows, dim=1)])
            self._others, self._sending = self._exchange(flat, self.received, self.sent)
        else:
            self._others = self._made.new_empty(self.size * self._made.numel())
            parts = [part.view_as(self._made) for part in self._others.chunk(self.size)]
            self._sending = dist.all_gather(parts, self._made, group=self.group, async_op=True)

    def receive(self) -> torch.Tensor:
        """The targets of all N weights, N R C: as many rows of each as this process holds."""
        self._sending.wait()
        shape = (len(self.weights), *self.weights[0].shape)
        return self._others[: math.prod(shape)].view(shape)

    def _exchange(
        self, flat: torch.Tensor, sent: list[int], received: list[int]
    ) -> tuple[torch.Tensor, dist.Work]:
        result = flat.new_empty(sum(received))
        return result, dist.all_to_all_single(result, flat, received, sent, group=self.group, async_op=True)


def group_of(weight: torch.Tensor) -> dist.ProcessGroup | None:
    """The processes that share in a weight: those that hold its shards, or all; None for a process alone."""
    if isinstance(weight, DTensor):
        (dimension,) = (n for n, placement in enumerate(weight.placements) if placement.is_shard())
        return weight.device_mesh.get_group(dimension)
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def _chunks(length: int, size: int, number: int) -> list[range]:
    """Pieces of a range as torch.chunk cuts them, empty ones at the end among them."""
    return [range(length)[n * size : (n + 1) * size] for n in range(number)]
