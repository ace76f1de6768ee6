"""Muon: momentum whose updates are orthogonalised matrices."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..common.kernels import kernels
from ..model.modeling_nanogpt import NanoGPTAttention, NanoGPTMLP
from .sharding import local
from .sharing_out import SharedOut

# Of x, x^3 and x^5 in each step: those of Polar Express (Amsel, Persson, Musco and Gower 2025) for singular values
# from 0.001 to 1, each the best polynomial for what the steps before it leave; their margin for bfloat16 is in them.
COEFFICIENTS = (
    (8.1247, -22.2349, 15.6695),
    (4.0265, -2.7778, 0.4935),
    (3.8713, -2.7411, 0.4998),
    (3.2534, -2.3450, 0.4620),
    (2.2555, -1.5726, 0.3793),
)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest matrices with all singular values about 1, by the iteration x <- a x + b x x'x + c x x'x x'x.

    Args:
        matrices: B rows columns.
    """
    rows, columns = matrices.shape[-2:]
    x = matrices / (1.02 * matrices.norm(dim=(-2, -1), keepdim=True)).clamp(min=1e-7)
    if x.dtype == torch.float32 and 2 * max(rows, columns) > 3 * min(rows, columns):
        return x @ _polynomial(x.mT @ x) if rows > columns else _polynomial(x @ x.mT) @ x
    for a, b, c in COEFFICIENTS:
        if rows > columns:
            x = x @ _quadratic(x.mT @ x, a, b, c)
        else:
            x = _quadratic(x @ x.mT, a, b, c) @ x
    return x


def _quadratic(gram: torch.Tensor, a: float, b: float, c: float) -> torch.Tensor:
    """a + b gram + c gram^2 by completing the square: only diagonals are added, without baddbmm's copy; overwrites gram."""
    gram.diagonal(dim1=-2, dim2=-1).add_(b / (2 * c))
    factor = torch.baddbmm(gram, gram, gram, beta=0, alpha=c)
    factor.diagonal(dim1=-2, dim2=-1).add_(a - b**2 / (4 * c))
    return factor


def _polynomial(gram: torch.Tensor) -> torch.Tensor:
    """What the whole iteration multiplies x with, out of its Gram matrix alone (B N N, of the shorter side).

    A third fewer products where the other side is longer. It squares the condition, which only float32 has the
    digits for.
    """
    result: torch.Tensor | None = None
    for step, (a, b, c) in enumerate(COEFFICIENTS, start=1):
        factor = _quadratic(gram.clone(), a, b, c)
        result = factor if result is None else factor @ result
        if step < len(COEFFICIENTS):
            gram = factor @ gram @ factor  # they commute
    assert result is not None
    return result


class Layout(NamedTuple):
    """How a weight holds its matrices: Linear's is (outputs, inputs), Conv1D's the other way round.

    Attributes:
        fan_in_fan_out: it is Conv1D's (peft's word).
        outputs: how many belong to each of the matrices that lie side by side in it; None: it is one matrix.
        multiplier: of the length of their updates.
    """

    fan_in_fan_out: bool = False
    outputs: tuple[int, ...] | None = None
    multiplier: float = 1.0

    def matrices(self, weight: torch.Tensor) -> Sequence[torch.Tensor]:
        """Views of each matrix, as the weight holds it."""
        return (weight,) if self.outputs is None else weight.split(self.outputs, dim=int(self.fan_in_fan_out))

    def scale(self, rows: int, columns: int) -> float:
        """Of an update of one of its matrices: the more outputs an input has, the longer the update."""
        fan_out, fan_in = (columns, rows) if self.fan_in_fan_out else (rows, columns)
        return self.multiplier * math.sqrt(max(1, fan_out / fan_in))


def find_layouts(model: nn.Module, residual_scale: float = 1.0) -> dict[nn.Parameter, Layout]:
    """The layout of each weight that is not one matrix (outputs, inputs) like all others.

    Queries, keys and values are matrices of their own, so are a SwiGLU's gate and value.

    Args:
        residual_scale: multiplier of the matrices that end a residual branch of NanoGPT's blocks.
    """
    layouts = {m.weight: Layout(fan_in_fan_out=True) for m in model.modules() if isinstance(m, Conv1D)}
    for module in model.modules():
        if isinstance(module, NanoGPTAttention):
            weight = module.c_attn.weight
            layout = layouts.get(weight, Layout())
            layouts[weight] = layout._replace(outputs=tuple(n * module.head_dim for n in module.heads))
        elif isinstance(module, NanoGPTMLP) and module.gated:
            weight = module.c_fc.weight
            layout = layouts.get(weight, Layout())
            half = weight.shape[int(layout.fan_in_fan_out)] // 2
            layouts[weight] = layout._replace(outputs=(half, half))
        if getattr(module, "ends_residual_branch", False):
            layout = layouts.get(module.weight, Layout())
            layouts[module.weight] = layout._replace(multiplier=residual_scale)
    return layouts


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum SGD whose updates are orthogonalised matrices.

    The steps of torch.optim.Muon, but for three things: matrices that a weight holds side by side, or the other way
    round, are updated as the matrices that they are; those of weights of one shape are orthogonalised at once; and it
    need not compute in bfloat16. A CPU without bfloat16 instructions spends 906 ms on torch's step of the preset `cpu`, twice as long
    as on the model (one core of an EPYC restricted to AVX2, November 2026).

    Args:
        params: weights.
        dtype: in which to orthogonalise.
        layouts: how each of params holds its matrices; by default each is one, (outputs, inputs).
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.bfloat16,
        layouts: Sequence[Layout] | None = None,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype
        self.layouts = layouts or [Layout()] * len(self.param_groups[0]["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        (group,) = self.param_groups
        moving = [
            pair for pair in zip(group["params"], self.layouts, strict=True) if pair[0].grad is not None
        ]
        if not moving:
            return loss
        parameters, layouts = zip(*moving, strict=True)
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        local_weights = [local(parameter) for parameter in parameters]
        momenta = [local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        gradients = [local(parameter.grad) for parameter in parameters]
        contiguous = all(weight.is_contiguous() for weight in local_weights)
        fused = kernels(f"{__package__}.muon_kernels", local_weights[0].device) if contiguous else None
        directions = _blend(fused, momenta, gradients, group["momentum"], self.dtype)

        of_one_shape = defaultdict(list)
        for parameter, direction, layout in zip(parameters, directions, layouts, strict=True):
            of_one_shape[parameter.shape].append((parameter, direction, layout))
        rate, decay, shares = group["lr"], group["weight_decay"], []
        for members in of_one_shape.values():
            weights, tensors, layouts = zip(*members, strict=True)
            share = SharedOut(weights, tensors, self.dtype)
            shares.append(share)
            # Where several processes share: updates of zeros, for all of them to subtract.
            how = (rate, decay) if share.size == 1 else (-1.0, 0.0)
            for directions, targets, scales in _matrices_of_one_shape(share, layouts[share.mine]):
                updates = torch.empty(
                    len(targets), *targets[0].shape, dtype=self.dtype, device=targets[0].device
                )
                torch._foreach_copy_(updates.unbind(), directions)
                _subtract(fused, targets, orthogonalize(updates), scales, *how)
            share.send()
        for share in shares:
            if share.size > 1:
                _subtract(fused, share.weights, share.receive(), [1.0] * len(share.weights), rate, decay)
        return loss


def _matrices_of_one_shape(
    share: SharedOut, layouts: Sequence[Layout]
) -> Iterable[tuple[Sequence[torch.Tensor], Sequence[torch.Tensor], Sequence[float]]]:
    """Of the weights that this process takes: directions, targets and scales of their matrices, shape by shape."""
    shapes = defaultdict(list)
    for direction, target, layout in zip(share.whole, share.targets, layouts, strict=True):
        for pair in zip(layout.matrices(direction), layout.matrices(target), strict=True):
            shape = pair[0].shape
            shapes[shape].append((*pair, layout.scale(*shape)))
    return [tuple(zip(*members, strict=True)) for members in shapes.values()]


def _blend(
    fused: ModuleType | None,
    momenta: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    momentum: float,
    dtype: torch.dtype,
) -> Sequence[torch.Tensor]:
    """Moves the buffers towards the gradients, in place; returns Nesterov's directions."""
    if fused:
        pairs = zip(momenta, gradients, strict=True)
        return [fused.blend(buffer, gradient.contiguous(), momentum, dtype) for buffer, gradient in pairs]
    torch._foreach_lerp_(momenta, gradients, 1 - momentum)
    return torch._foreach_lerp(gradients, momenta, momentum)


def _subtract(
    fused: ModuleType | None,
    matrices: Sequence[torch.Tensor],
    updates: torch.Tensor,
    scales: Sequence[float],
    rate: float | torch.Tensor,
    decay: float,
) -> None:
    """Lets B matrices of one shape decay and takes their updates (B R C) times rate and scale from them, in place.

    Args:
        rate: a tensor in a CUDA graph.
    """
    if fused:
        if not isinstance(rate, torch.Tensor):  # filled there: a copy from here would wait for the device
            rate = torch.full((), rate, dtype=torch.float32, device=updates.device)
        for matrix, update, scale in zip(matrices, updates, scales, strict=True):
            fused.subtract(matrix, update, rate, scale, decay)
        return
    if decay:
        torch._foreach_mul_(matrices, 1 - rate * decay)
    for matrix, update, scale in zip(matrices, updates, scales, strict=True):
        matrix.sub_(update.mul_(scale * rate))
