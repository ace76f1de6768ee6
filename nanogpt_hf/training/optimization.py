"""Parameter groups, optimisers and the learning-rate schedule."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel, SchedulerType, get_scheduler
from transformers.pytorch_utils import Conv1D

from ..common.errors import UserError
from ..common.settings import RunSettings
from .hardware import has_fast_bf16


def orthogonalize(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest matrices with all singular values about 1: the quintic Newton-Schulz iteration of Muon.

    Args:
        matrices: B rows columns.
    """
    wide = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    x = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    rows, columns = x.shape[-2:]
    if x.dtype == torch.float32 and 2 * columns > 3 * rows:
        x = _polynomial(x @ x.mT, steps) @ x
    else:
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, _quadratic(gram), x, beta=COEFFICIENTS[0])
    return x.mT if wide is not matrices else x


COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of x, x^3 and x^5


def _quadratic(gram: torch.Tensor) -> torch.Tensor:
    return torch.baddbmm(gram, gram, gram, beta=COEFFICIENTS[1], alpha=COEFFICIENTS[2])


def _polynomial(gram: torch.Tensor, steps: int) -> torch.Tensor:
    """What the iteration multiplies x with from the left in the end, out of x xᵀ alone (B rows rows).

    A third fewer products for a wide x. It squares the condition, which only float32 has the digits for.
    """
    result = None
    for step in range(steps):
        factor = _quadratic(gram)
        factor.diagonal(dim1=-2, dim2=-1).add_(COEFFICIENTS[0])
        result = factor if result is None else factor @ result
        if step < steps - 1:
            gram = factor @ gram @ factor  # they commute
    return result


def _whole(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.full_tensor() if isinstance(matrix, DTensor) else matrix


def _sharded_as(matrix: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a matrix that every process has, laid out as the parameter is."""
    if not isinstance(parameter, DTensor):
        return matrix
    return distribute_tensor(matrix, parameter.device_mesh, parameter.placements, src_data_rank=None)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum SGD whose updates are orthogonalised matrices.

    The same steps as torch.optim.Muon, which differs in two ways that cost time: it takes one matrix after the
    other, and it always computes in bfloat16. A CPU without bfloat16 instructions then spends 906 ms on a step of
    the preset `cpu`, twice as long as on the model (one core of an EPYC restricted to AVX2, November 2026).

    Args:
        params: matrices.
        dtype: in which to orthogonalise.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for (rows, columns), parameters in by_shape.items():
                for parameter in parameters:
                    self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
                momenta = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
                gradients = [parameter.grad for parameter in parameters]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                updates = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov's
                updates = torch.stack([_whole(update.to(self.dtype)) for update in updates])
                updates = orthogonalize(updates).to(parameters[0].dtype)
                updates *= group["lr"] * math.sqrt(max(1, rows / columns))  # lr: a tensor in a CUDA graph
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                updates = [_sharded_as(*pair) for pair in zip(updates.unbind(), parameters, strict=True)]
                torch._foreach_sub_(parameters, updates)
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
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    optimizers = []
    if groups:  # an adapter may be matrices for Muon alone
        adamw = torch.optim.AdamW(
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
        rate, decay, momentum = settings.muon_learning_rate, settings.weight_decay, settings.muon_momentum
        optimizers.append(Muon(muon, rate, decay, momentum, dtype))
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
    names = [name.value for name in SchedulerType]
    if settings.lr_scheduler_type not in names:
        raise UserError(f"--lr_scheduler_type {settings.lr_scheduler_type} is not one of {', '.join(names)}.")
    warmup = settings.warmup_steps
    extra = {}
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
            f"--lr_scheduler_type {settings.lr_scheduler_type} needs more than the step: use linear, cosine, "
            "constant_with_warmup or warmup_stable_decay."
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
    rates = {"learning_rate": settings.learning_rate * factor}
    if settings.optim == "muon":
        rates["muon_learning_rate"] = settings.muon_learning_rate * factor
    return rates


def make_capturable(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Keep learning rates on the device, where a CUDA graph of the step reads them."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["capturable"] = True
            group["lr"] = torch.tensor(group["lr"], device=group["params"][0].device)
