"""What a step trains on: the batches, and their loss in nats with the number of tokens that it counts.

The loop knows the `Objective` protocol alone. Language modelling on contiguous windows is one; the others have rooms of
their own: completions.py, preferences.py, policy_gradient.py.

Shapes: B sequences, T tokens, C channels, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from ..data.token_stream import TokenStream
from .evaluation import SplitLoss, evaluate_split
from .fused_loss import linear_cross_entropy

Batch = tuple[torch.Tensor, ...]  # of shapes that change with the last of the short windows alone


class ShortWindows(NamedTuple):
    """Sequence-length warm-up (Li et al. 2022): how long a run's first windows are, in tokens, and how many steps have them.

    These steps take as many tokens as the others.
    """

    length: int = 0
    steps: int = 0


class Evaluation(Protocol):
    """What an objective says of a model. The model with the lowest loss is the best one."""

    @property
    def loss(self) -> float: ...

    @property
    def bits_per_char(self) -> float: ...

    @property
    def more(self) -> Mapping[str, float]:
        """What else was measured, by its name in metrics.jsonl."""
        ...


class Objective(Protocol):
    """What is minimised.

    Attributes:
        tokens_per_step: tokens that a whole global batch is given to read.
        same_count: the loss counts as many tokens in every process, so that none has to ask the others.
        passes: how often a step reads each of these tokens.
        short: the first steps' windows, where they are shorter.
    """

    tokens_per_step: int
    same_count: bool = False
    passes: int = 1
    short: ShortWindows = ShortWindows()

    def batch(self, step: int, rows: np.ndarray) -> Batch:
        """Some rows of the global batch of a step (counted from 0), on the device: a pure function of both."""
        ...

    def count(self, batch: Batch) -> torch.Tensor:
        """How many tokens the batch's loss is a sum over, on the device."""
        ...

    def loss(self, model: nn.Module, batch: Batch, num_items: torch.Tensor) -> torch.Tensor:
        """The batch's summed loss in nats divided by num_items, the count of the whole global batch."""
        ...

    def evaluate(self, model: nn.Module) -> Evaluation:
        """The loss over the whole validation split. Every process calls it."""
        ...

    def measured(self) -> Mapping[str, float]:
        """What the newest step's batch says beside its loss, by its name in metrics.jsonl."""
        return {}


class LanguageModeling(Objective):
    """Next-token prediction on contiguous windows of a text.

    Args:
        train: the training split's tokens, in windows of T.
        batch_size: sequences of T tokens of the global batch.
        seed: decides the order of the windows.
        validation: the validation split's tokens; without them there is no evaluation.
        characters: that the validation split spells.
        eval_batch_size: sequences that a process evaluates at once.
    """

    same_count = True  # whole windows

    def __init__(
        self,
        accelerator: Accelerator,
        train: TokenStream,
        batch_size: int,
        seed: int,
        validation: TokenStream | None = None,
        characters: int = 0,
        eval_batch_size: int = 64,
    ):
        self.accelerator, self.train, self.validation = accelerator, train, validation
        self.batch_size, self.seed = batch_size, seed
        self.eval_batch_size, self.characters = eval_batch_size, characters
        self.tokens_per_step = batch_size * train.block_size

    def batch(self, step: int, rows: np.ndarray) -> Batch:
        if step < self.short.steps:
            return self.train.pieces(self.seed, step, self.batch_size, rows, *self.short)
        return self.train.batch(self.seed, step, self.batch_size, rows)

    def count(self, batch: Batch) -> torch.Tensor:
        return (batch[1] != -100).sum()

    def loss(self, model: nn.Module, batch: Batch, num_items: torch.Tensor) -> torch.Tensor:
        inputs, targets = batch
        return next_token_loss(self.accelerator, model, targets, num_items, input_ids=inputs)

    def evaluate(self, model: nn.Module) -> SplitLoss:
        return evaluate_split(model, self.validation, self.characters, self.eval_batch_size, self.accelerator)


class RDrop(LanguageModeling):
    """Next-token prediction of which dropout changes little: R-Drop (Liang et al. 2021).

    A step reads each window twice, with other dropout, and the loss is the paper's, halved: the mean of both
    cross-entropies and alpha / 4 of the two Kullback-Leibler divergences between the predictions. The logits exist
    as a whole, in float32, so it is for small vocabularies.

    Args:
        alpha: weight of the divergences.
        options: of LanguageModeling.
    """

    passes = 2

    def __init__(self, alpha: float, **options: Any):
        super().__init__(**options)
        self.alpha = alpha

    def loss(self, model: nn.Module, batch: Batch, num_items: torch.Tensor) -> torch.Tensor:
        inputs, targets = batch
        logits = model(input_ids=torch.cat((inputs, inputs)), use_cache=False).logits
        log_p, log_q = logits.float().log_softmax(-1).flatten(0, 1).chunk(2)  # each B*T V
        nats = sum(F.nll_loss(each, targets.flatten(), reduction="sum") for each in (log_p, log_q))
        pull = self.alpha / 2 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum()  # of both divergences
        # Its value stays the cross-entropy alone, to be compared with the validation's.
        return (nats + pull - pull.detach()) / (2 * num_items)


def next_token_loss(
    accelerator: Accelerator,
    model: nn.Module,
    targets: torch.Tensor,
    num_items: torch.Tensor,
    **inputs: torch.Tensor,
) -> torch.Tensor:
    """The sum of -log p(target) in nats over a batch, divided by num_items.

    Fused with the head, so that the logits never exist as a whole, where the logits are nothing but the last hidden
    states times a matrix.

    Args:
        model: as the accelerator has prepared it; called once, so that data parallelism sees its forward.
        targets: the next tokens, B T; -100 is left out.
        inputs: of the model's forward.
    """
    lm = causal_lm(accelerator.unwrap_model(model))
    # In float16 the gradient of one token's loss is too small before it is scaled up.
    head = plain_head(lm) if accelerator.scaler is None else None
    if head is None:
        logits = model(**inputs, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum") / num_items
    with head_gives_loss(head, targets, num_items):
        return model(**inputs, use_cache=False).logits


@contextmanager
def head_gives_loss(head: nn.Module, targets: torch.Tensor, num_items: torch.Tensor) -> Iterator[None]:
    """A context in which a head answers hidden states (B T C) with the loss instead of logits.

    It is called as the module that it is, so that FSDP2's hooks gather its weight and reduce its gradient.
    """

    def loss(hidden_states: torch.Tensor) -> torch.Tensor:
        return linear_cross_entropy(hidden_states, head.weight, targets, num_items)

    head.forward = loss
    try:
        yield
    finally:
        del head.forward


def plain_head(lm: nn.Module) -> nn.Module | None:
    """The head of a model whose logits are its hidden states times `head.weight` (V C), None for all others.

    A head with an adapter or a bias is no plain matrix, and some models cap or scale their logits.
    """
    head, config = lm.get_output_embeddings(), lm.config
    changed = any(
        getattr(config, name, None) not in (None, 1, 1.0)
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
    )
    plain = getattr(head, "bias", None) is None and not hasattr(head, "lora_A")
    return head if plain and not changed else None


def causal_lm(model: nn.Module) -> nn.Module:
    """The network itself, without the adapters that peft puts around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
