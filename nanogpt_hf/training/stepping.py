"""One optimiser step: gradients of the mean loss over all tokens, clipping, update; compiled and captured where it pays.

On one CUDA device the blocks are compiled and, after a few ordinary steps, a whole step is recorded as a CUDA graph:
a small model's step is a thousand launches, and the device waits for the host between them.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils.memory import should_reduce_batch_size
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..common.errors import UserError
from ..common.settings import RunSettings
from ..common.text import first_line
from ..data.token_stream import mix
from .objectives import Batch, Objective, causal_lm
from .optimization import make_capturable, set_learning_rates
from .reporting import say
from .sharding import clip_sharded_grad_norm_, prefetch_blocks

STEPS_BEFORE_CAPTURE = 3  # ordinary steps in which kernels are compiled and optimiser states made
MOST_TO_CAPTURE = (
    16  # micro-batches: recording takes as long as an ordinary step, and a step of more hardly gains
)


class Stepper:
    """Takes the optimiser steps of a run, for which it puts the model into training mode.

    All that a step depends on is its number and the weights.

    Args:
        model, optimizers: as prepared by the accelerator.
        objective: what is minimised.
        rate_factor: step -> factor of the learning rates.
        first_step: of those that are still to come.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        settings: RunSettings,
        model: torch.nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        objective: Objective,
        rate_factor: Callable[[int], float],
        first_step: int = 0,
    ):
        self.accelerator, self.settings = accelerator, settings
        self.model, self.optimizers = model, optimizers
        self.objective, self.rate_factor = objective, rate_factor
        self.micro_batch = settings.per_device_train_batch_size
        self.rows = np.arange(
            accelerator.process_index, global_batch_size(settings, accelerator), accelerator.num_processes
        )
        self.graph: CapturedStep | None = None
        self.compiled: list[torch.nn.Module] = []
        self.steps_before_capture = STEPS_BEFORE_CAPTURE if self._may_capture() else -1
        prefetch_blocks(model, blocks_of(accelerator.unwrap_model(model)))
        with fastest_attention(accelerator.device):
            self._get_ready(first_step)

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This process's part of the loss in nats per token, and the norm of the gradient; both on the device.

        Raises:
            UserError: out of memory, and --auto_find_batch_size may not or cannot help.
        """
        set_learning_rates(self.optimizers, self.rate_factor(step))
        while True:
            torch.manual_seed(step_seed(self.settings.seed, step, self.accelerator.process_index))
            try:
                batches = self._micro_batches(step)
                if self._captured(batches):
                    return self.graph.replay(batches)
                with fastest_attention(self.accelerator.device):
                    loss = accumulate_gradients(self.accelerator, self.model, self.objective, batches)
                break
            except RuntimeError as error:
                if not should_reduce_batch_size(error):
                    raise
            # Outside of `except`, which keeps what was allocated. The weights have not changed yet.
            self.micro_batch = smaller_batch(self.accelerator, self.settings, self.micro_batch)
            self.model.zero_grad()
        return loss, self._update()

    def _micro_batches(self, step: int) -> list[Batch]:
        parts = range(0, len(self.rows), self.micro_batch)
        return [self.objective.batch(step, self.rows[i : i + self.micro_batch]) for i in parts]

    def _captured(self, batches: Sequence[Batch]) -> bool:
        """Whether the step is recorded as a graph, which it is once enough ordinary steps have been taken."""
        if self.graph is not None and not self.graph.fits(batches):  # the last of the short windows are read
            self.graph, self.steps_before_capture = None, STEPS_BEFORE_CAPTURE
        if self.steps_before_capture == 0 and len(batches) <= MOST_TO_CAPTURE:
            with fastest_attention(self.accelerator.device):
                self._capture(batches)
        self.steps_before_capture -= 1
        return self.graph is not None

    def _update(self) -> torch.Tensor:
        limit = self.settings.max_grad_norm or float("inf")
        clip = clip_sharded_grad_norm_ if self.accelerator.is_fsdp2 else self.accelerator.clip_grad_norm_
        grad_norm = clip(self.model.parameters(), limit)
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad()
        return grad_norm

    def _get_ready(self, first_step: int) -> None:
        """Compile the blocks in place, for windows of each length to come; the longest, which take most memory, first.

        All blocks share what is compiled for the first one, so that it takes a fraction of the whole model's time.
        """
        self.model.train()
        wanted = self.settings.torch_compile
        if self.accelerator.device.type == "cuda" if wanted is None else wanted:
            self.compiled = blocks_of(self.accelerator.unwrap_model(self.model))
        try:
            for block in self.compiled:
                block.compile(backend=self.settings.torch_compile_backend, dynamic=False)
        except Exception as error:  # a backend that is not there
            self._stay_eager(error)
        whole = self.objective.short.steps
        later = [whole] if first_step < whole < (self.settings.max_steps or float("inf")) else []
        for step in (*later, first_step):
            # Without a compiler the first step is its own trial.
            while (step > first_step or self.compiled) and not self._fits(step):
                self.micro_batch = smaller_batch(self.accelerator, self.settings, self.micro_batch)
            self.model.zero_grad()

    def _fits(self, step: int) -> bool:
        """Whether there is memory for a step's micro-batch; where it cannot be compiled, all stays eager."""
        self.model.zero_grad()
        try:
            batch = self.objective.batch(step, self.rows[: self.micro_batch])
            accumulate_gradients(self.accelerator, self.model, self.objective, [batch])
        except Exception as error:
            if should_reduce_batch_size(error):
                return False
            if not self.compiled:
                raise
            self._stay_eager(error)
            return self._fits(step)
        return True

    def _stay_eager(self, error: Exception) -> None:
        self.release()
        self.compiled = []
        say(self.accelerator, f"torch.compile failed ({first_line(error)}): training goes on without it")

    def release(self) -> None:
        """Give the graph's memory back, and let the model be called eagerly again."""
        self.graph = None
        for block in self.compiled:
            block._compiled_call_impl = None

    def _may_capture(self) -> bool:
        """One CUDA device, and no scaling that the host decides on."""
        accelerator = self.accelerator
        alone = accelerator.device.type == "cuda" and accelerator.distributed_type == DistributedType.NO
        return alone and accelerator.scaler is None

    def _capture(self, batches: Sequence[Batch]) -> None:
        def step(batches: Sequence[Batch]) -> Any:
            return accumulate_gradients(self.accelerator, self.model, self.objective, batches), self._update()

        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        before = generator.clone_state()
        try:
            make_capturable(self.optimizers)
            self.graph = CapturedStep(step, batches)
        except Exception as error:
            generator.graphsafe_set_state(before)  # the one in use still waits for the end of the recording
            say(self.accelerator, f"no CUDA graph ({first_line(error)}): training goes on without it")
            self.model.zero_grad()


class CapturedStep:
    """A step recorded as one CUDA graph: recording runs nothing, every replay is one step.

    The random numbers of a replay are those that the device's seed at that time gives, as without a graph.
    """

    def __init__(self, step: Callable[[Sequence[Batch]], Any], batches: Sequence[Batch]):
        self.batches = [tuple(part.clone() for part in batch) for batch in batches]
        torch.cuda.empty_cache()  # the graph takes memory of its own
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = step(self.batches)

    def fits(self, batches: Sequence[Batch]) -> bool:
        """Whether these are of the shapes that were recorded."""
        return [part.shape for part in chain(*self.batches)] == [part.shape for part in chain(*batches)]

    def replay(self, batches: Sequence[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
        for mine, given in zip(chain(*self.batches), chain(*batches), strict=True):
            mine.copy_(given)
        self.graph.replay()
        return tuple(result.clone() for result in self.results)


def blocks_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules that a model names as its blocks, in their order."""
    lm = causal_lm(model)
    names = lm._no_split_modules or ()
    return [module for module in lm.modules() if type(module).__name__.removeprefix("FSDP") in names]


def fastest_attention(device: torch.device) -> AbstractContextManager:
    """A context in which torch takes cuDNN's attention on Hopper, where it is the fastest (4% of a step of GPT-2)."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return nullcontext()
    others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *others], set_priority=True)


def accumulate_gradients(
    accelerator: Accelerator, model: torch.nn.Module, objective: Objective, micro_batches: Sequence[Batch]
) -> torch.Tensor:
    """Add up the gradients of the mean loss over all tokens of all micro-batches of all processes.

    Dividing by the global token count once is what makes the sum right for micro-batches of unequal length:
    a mean of means is not the mean.

    Returns:
        This process's part of the loss in nats per token, on the device; the parts of all processes sum to it.
    """
    tokens = sum(map(objective.count, micro_batches))
    if objective.same_count:
        tokens = tokens * accelerator.num_processes
    else:
        tokens = accelerator.reduce(tokens, reduction="sum")
    total = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(micro_batches, start=1):
        last = number == len(micro_batches)
        # FSDP2 adds up sharded gradients; without its synchronisation each process would hold them whole.
        with nullcontext() if last or accelerator.is_fsdp2 else accelerator.no_sync(model):
            loss = objective.loss(model, batch, tokens)
            accelerator.backward(loss * accelerator.num_processes)  # data parallelism averages over processes
        total += loss.detach()
    return total


def global_batch_size(settings: RunSettings, accelerator: Accelerator) -> int:
    """Sequences of one step over all processes and micro-batches."""
    per_device = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    return per_device * accelerator.num_processes


def step_seed(seed: int, step: int, process_index: int) -> int:
    """Seed of the random numbers (dropout) of one step of one process; nothing of them needs to be stored."""
    return int(mix(mix(mix(np.uint64(seed)) ^ np.uint64(step)) ^ np.uint64(process_index)) >> np.uint64(1))


def smaller_batch(accelerator: Accelerator, settings: RunSettings, micro_batch: int) -> int:
    """Half the micro-batch, which doubles the accumulation: the global batch and its mathematics stay.

    Raises:
        UserError: --auto_find_batch_size is not set, or there is nothing left to halve.
    """
    if accelerator.num_processes > 1 or not settings.auto_find_batch_size or micro_batch == 1:
        raise UserError(
            f"out of memory with {micro_batch} sequences at once: lower --per_device_train_batch_size and raise "
            "--gradient_accumulation_steps by as much, or try --gradient_checkpointing; on one device "
            "--auto_find_batch_size does it."
        )
    say(accelerator, f"out of memory with {micro_batch} sequences at once: going on with {micro_batch // 2}")
    return micro_batch // 2
