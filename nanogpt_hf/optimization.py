"""Parameter groups, optimisers and the learning-rate schedule."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import SchedulerType, get_scheduler

from .settings import TrainingSettings


def make_optimizers(model: nn.Module, settings: TrainingSettings) -> list[torch.optim.Optimizer]:
    """AdamW alone, or Muon (Jordan et al. 2024) for the blocks' matrices and AdamW for everything else.

    Matrices decay, vectors (norms, biases) do not.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    muon, matrices, vectors = [], [], []
    for name, parameter in trainable:
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif settings.optim == "muon" and id(parameter) not in embeddings and ".wpe." not in f".{name}":
            muon.append(parameter)
        else:
            matrices.append(parameter)
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizers = [
        torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_epsilon,
            weight_decay=settings.weight_decay,
            fused=True,
        )
    ]
    if muon:
        optimizers.append(
            torch.optim.Muon(muon, lr=settings.muon_learning_rate, weight_decay=settings.weight_decay)
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def make_schedule(settings: TrainingSettings) -> Callable[[int], float]:
    """The factor of the learning rates at each step (from 0): transformers' schedule as a function.

    A function of the step alone has no state to save.

    Raises:
        ValueError: no schedule of that name depends on the step alone.
    """
    names = [name.value for name in SchedulerType]
    if settings.lr_scheduler_type not in names:
        raise ValueError(f"--lr_scheduler_type {settings.lr_scheduler_type} is not one of {', '.join(names)}.")
    warmup = min(settings.warmup_steps, settings.max_steps // 2)
    extra = {}
    if settings.lr_scheduler_type == "warmup_stable_decay":
        extra = {"num_decay_steps": settings.max_steps // 2}
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    try:
        scheduler = get_scheduler(settings.lr_scheduler_type, optimizer, warmup, settings.max_steps, extra)
        factor = scheduler.lr_lambdas[0]
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"--lr_scheduler_type {settings.lr_scheduler_type} needs more than the step: use linear, cosine, "
            "constant_with_warmup or warmup_stable_decay."
        ) from error
    # transformers counts from 0 and so would waste the first step on a learning rate of 0.
    return lambda step: factor(step + 1) if step < warmup else factor(step)


def set_learning_rates(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
