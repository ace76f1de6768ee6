"""Parameter groups, optimisers and the learning-rate schedule."""

from collections.abc import Callable, Iterable
from typing import get_args

import torch
from torch import nn
from transformers import PreTrainedModel, get_scheduler
from transformers.pytorch_utils import Conv1D

from ..common.errors import UserError
from ..common.settings import RunSettings, Schedule
from .hardware import has_fast_bf16
from .muon import Layout, Muon, find_layouts
from .sharding import AdamW


def make_optimizers(model: PreTrainedModel, settings: RunSettings) -> list[torch.optim.Optimizer]:
    """AdamW alone, or Muon (Jordan et al. 2024) for the blocks' matrices and AdamW for everything else.

    Matrices decay, vectors (norms, biases) do not. Learned positions, which are all embeddings but the tokens', decay
    too, but have the vectors' rate: every step trains all of them, and few of the tokens.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    head = model.get_output_embeddings()
    projections = [m for m in model.modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not head]
    for_muon = {id(module.weight) for module in projections} - {id(getattr(head, "weight", None))}
    tokens = model.get_input_embeddings()
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens}
    rate = settings.vector_learning_rate
    muon, matrices, positions, vectors = [], [], [], []
    for parameter in trainable:
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif settings.optim == "muon" and id(parameter) in for_muon:
            muon.append(parameter)
        elif rate is not None and id(parameter) in embeddings:
            positions.append(parameter)
        else:
            matrices.append(parameter)
    own_rate = {} if rate is None else {"lr": rate}
    groups = [
        {"params": matrices},
        {"params": positions, **own_rate},
        {"params": vectors, "weight_decay": 0.0, **own_rate},
    ]
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
        found = find_layouts(model, settings.muon_residual_scale)
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
            group["lr"] = torch.as_tensor(group["lr"], device=group["params"][0].device)
