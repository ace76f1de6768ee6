"""Parameter groups, optimisers and the learning-rate schedule."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import nn
from transformers import PreTrainedModel, get_scheduler
from transformers.pytorch_utils import Conv1D

from ..common.errors import UserError
from ..common.settings import RunSettings, Schedule
from ..model.modeling_nanogpt import NanoGPTAttention, NanoGPTMLP
from .hardware import has_fast_bf16
from .sharding import AdamW, local
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
    factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    factor.diagonal(dim1=-2, dim2=-1).add_(a)
    return factor


def _polynomial(gram: torch.Tensor) -> torch.Tensor:
    """What the whole iteration multiplies x with, out of its Gram matrix alone (B N N, of the shorter side).

    A third fewer products where the other side is longer. It squares the condition, which only float32 has the
    digits for.
    """
    result: torch.Tensor | None = None
    for step, (a, b, c) in enumerate(COEFFICIENTS, start=1):
        factor = _quadratic(gram, a, b, c)
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
    """

    fan_in_fan_out: bool = False
    outputs: tuple[int, ...] | None = None

    def matrices(self, weight: torch.Tensor) -> Sequence[torch.Tensor]:
        """Views of each matrix, as the weight holds it."""
        return (weight,) if self.outputs is None else weight.split(self.outputs, dim=int(self.fan_in_fan_out))

    def scale(self, rows: int, columns: int) -> float:
        """Of an update of one of its matrices: the more outputs an input has, the longer the update."""
        fan_out, fan_in = (columns, rows) if self.fan_in_fan_out else (rows, columns)
        return math.sqrt(max(1, fan_out / fan_in))


def find_layouts(model: nn.Module) -> dict[nn.Parameter, Layout]:
    """The layout of each weight that is not one matrix (outputs, inputs).

    Queries, keys and values are matrices of their own, so are a SwiGLU's gate and value.
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
    return layouts


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum SGD whose updates are orthogonalised matrices.

    The steps of torch.optim.Muon, but for three things: matrices that a weight holds side by side, or the other way
    round, are updated as the matrices that they are; all of one shape are orthogonalised at once; and it need not
    compute in bfloat16. A CPU without bfloat16 instructions spends 906 ms on torch's step of the preset `cpu`, twice as long
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
            self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
        momenta = [local(self.state[parameter]["momentum_buffer"]) for parameter in parameters]
        gradients = [local(parameter.grad) for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        directions = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov's
        torch._foreach_mul_([local(p) for p in parameters], 1 - group["lr"] * group["weight_decay"])

        of_one_shape = defaultdict(list)
        for parameter, direction, layout in zip(parameters, directions, layouts, strict=True):
            of_one_shape[parameter.shape].append((parameter, direction, layout))
        shares = []
        batches = defaultdict(list)
        for members in of_one_shape.values():
            weights, tensors, layouts = zip(*members, strict=True)
            share = SharedOut(weights, tensors, self.dtype)
            shares.append(share)
            for direction, change, layout in zip(
                share.whole, share.changes, layouts[share.mine], strict=True
            ):
                for pair in zip(layout.matrices(direction), layout.matrices(change), strict=True):
                    shape = pair[0].shape
                    batches[shape, layout.scale(*shape)].append(pair)
        for (shape, scale), pairs in batches.items():
            updates = torch.empty(len(pairs), *shape, dtype=self.dtype, device=pairs[0][0].device)
            torch._foreach_copy_(updates.unbind(), [direction for direction, _ in pairs])
            updates = orthogonalize(updates).mul_(scale * group["lr"])  # lr: a tensor in a CUDA graph
            for (_, change), update in zip(pairs, updates, strict=True):
                change.sub_(update)
        for share in shares:
            share.add_changes()
        return loss


def make_optimizers(model: PreTrainedModel, settings: RunSettings) -> list[torch.optim.Optimizer]:
    """AdamW alone, or Muon (Jordan et al. 2024) for the blocks' matrices and AdamW for everything else.

    Matrices decay, vectors (norms, biases) do not.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    head = model.get_output_embeddings()
    projections = [m for m in model.modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
    for_muon = {id(module.weight) for module in projections} - {id(getattr(head, "weight", None))}
    muon, matrices, vectors = [], [], []
    for parameter in trainable:
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif settings.optim == "muon" and id(parameter) in for_muon:
            muon.append(parameter)
        else:
            matrices.append(parameter)
    rate = settings.vector_learning_rate
    of_vectors = {"weight_decay": 0.0} | ({} if rate is None else {"lr": rate})
    groups = [{"params": matrices}, {"params": vectors, **of_vectors}]
    groups = [group for group in groups if group["params"]]
    optimizers: list[torch.optim.Optimizer] = []
    if groups:  # an adapter may be matrices for Muon alone
        adamw = AdamW(
            groups,
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_epsilon,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        optimizers.append(adamw)
    if muon:
        fast = settings.bf16 is not False and has_fast_bf16(muon[0].device.type)
        dtype = torch.bfloat16 if fast else torch.float32
        found = find_layouts(model)
        layouts = [found.get(parameter, Layout()) for parameter in muon]
        rate, decay, momentum = settings.muon_learning_rate, settings.weight_decay, settings.muon_momentum
        optimizers.append(Muon(muon, rate, decay, momentum, dtype, layouts))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def make_schedule(settings: RunSettings) -> Callable[[int], float]:
    """The factor of the learning rates at each step (from 0): transformers' schedule as a function.

    A function of the step alone has no state to save.

    Raises:
        UserError: no schedule of that name depends on the step alone.
    """
    warmup = settings.warmup_steps
    extra: dict[str, float] = {}
    if settings.lr_scheduler_type == "warmup_stable_decay":
        extra = {"num_decay_steps": settings.max_steps // 2}
    if settings.lr_scheduler_type == "cosine_with_min_lr":
        extra = {"min_lr_rate": 0.1}  # as GPT-3's (Brown et al. 2020, appendix B)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    try:
        scheduler = get_scheduler(settings.lr_scheduler_type, optimizer, warmup, settings.max_steps, extra)
        factor = scheduler.lr_lambdas[0]
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(
            f"--lr_scheduler_type {settings.lr_scheduler_type} is not one of {', '.join(get_args(Schedule))}."
        ) from error
    # transformers counts from 0 and so would waste the first step on a learning rate of 0.
    return lambda step: factor(step + 1) if step < warmup else factor(step)


def set_learning_rates(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate = group["initial_lr"] * factor
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)  # the one that a CUDA graph reads
            else:
                group["lr"] = rate


def learning_rates(settings: RunSettings, factor: float) -> dict[str, float]:
    """The rate of each optimiser at a factor of its peak, as metrics.jsonl names them."""
    names = ["learning_rate", "vector_learning_rate", *["muon_learning_rate"] * (settings.optim == "muon")]
    return {name: rate * factor for name, rate in settings.given(*names).items()}


def make_capturable(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Keep learning rates on the device, where a CUDA graph of the step reads them."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["capturable"] = True
            group["lr"] = torch.tensor(group["lr"], device=group["params"][0].device)
