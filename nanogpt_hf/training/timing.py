"""How many steps fit into a time, by trying."""

import copy
import time
from collections.abc import Callable

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from ..common.settings import RunSettings
from .objectives import Objective
from .optimization import make_optimizers
from .stepping import STEPS_BEFORE_CAPTURE, Stepper

TIMED_STEPS = 8
MARGIN = (
    0.97  # of the time is planned: what is too long would be stopped before its learning rate has come down
)


def steps_in_time(
    accelerator: Accelerator, settings: RunSettings, model: PreTrainedModel, objective: Objective
) -> int:
    """How many steps fit into max_minutes, with the evaluations between them.

    Measured on a copy of the model, which is thrown away. What its steps have compiled serves the run.
    """
    trial = copy.deepcopy(model)
    trial, *optimizers = accelerator.prepare(trial, *make_optimizers(trial, settings))
    if not settings.fp16:
        optimizers = [optimizer.optimizer for optimizer in optimizers]
    take_step = Stepper(accelerator, settings, trial, optimizers, objective, lambda step: 1e-3)
    steps = iter(range(10**9))
    for _ in range(STEPS_BEFORE_CAPTURE + 2):
        take_step(next(steps))
    seconds = [_seconds(accelerator, lambda: take_step(next(steps)), TIMED_STEPS)]
    take_step.release()
    seconds.append(_seconds(accelerator, lambda: objective.evaluate(trial), 1))
    accelerator.free_memory(take_step, trial, *optimizers)
    slowest = torch.tensor([seconds], device=accelerator.device)
    step_s, evaluation_s = accelerator.gather(slowest).amax(dim=0).tolist()
    left = MARGIN * 60 * settings.max_minutes - evaluation_s  # the last one comes whatever the length
    return max(1, int(left / (step_s + evaluation_s / settings.eval_steps)))


def _seconds(accelerator: Accelerator, action: Callable[[], object], times: int) -> float:
    """Seconds that an action takes, once the device has done all of it."""
    synchronize = torch.cuda.synchronize if accelerator.device.type == "cuda" else lambda: None
    synchronize()
    began = time.perf_counter()
    for _ in range(times):
        action()
    synchronize()
    return (time.perf_counter() - began) / times
