"""Preferences as an objective: of two texts for a prompt, the chosen one is to become likelier than the other (DPO).

Direct preference optimisation (Rafailov et al. 2023, equation 7): -log sigmoid(beta * (d_chosen - d_rejected)), where
d = log p(text | prompt) - log p_start(text | prompt). The start's log-probabilities never change, so they are computed
once before the first step. An objective of our loop and not TRL's DPOTrainer, because resuming is exact here and the
loop, the run folder and the flags are those of every other recipe.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..common.errors import UserError
from ..data.conversations import Example, share_within
from ..data.token_stream import mix, permute
from .evaluation import evaluating
from .objectives import Batch, Objective


@dataclass(frozen=True)
class PreferencesEvaluation:
    """loss: nats per pair. bits_per_char: of the chosen texts. accuracy: share of the pairs that the model ranks so."""

    loss: float
    bits_per_char: float
    accuracy: float

    @property
    def more(self) -> dict[str, float]:
        return {"eval_accuracy": self.accuracy}


class Pairs:
    """N pairs of a chosen and a rejected text with their prompt: inputs and targets, N 2 T, and log p at the start, N 2.

    Raises:
        UserError: the context holds nothing of the texts of any pair.
    """

    def __init__(
        self, pairs: Sequence[tuple[Example, Example]], T: int, padding: int, device: torch.device, name: str
    ):
        kept = [pair for pair in pairs if all(text.learned[1 : T + 1].any() for text in pair)]
        self.left_out = len(pairs) - len(kept)
        if not kept:
            raise UserError(f"the prompts of {name} fill the context of {T} tokens: give shorter ones.")
        self.share = share_within([chosen for chosen, _ in kept], [chosen for chosen, _ in pairs], T)
        longest = min(T, max(len(text.ids) for pair in kept for text in pair) - 1)
        inputs, targets = np.full((len(kept), 2, longest), padding), np.full((len(kept), 2, longest), -100)
        for row, pair in enumerate(kept):
            for side, (ids, learned) in enumerate(pair):
                ids, learned = ids[: longest + 1], learned[: longest + 1]
                inputs[row, side, : len(ids) - 1] = ids[:-1]
                targets[row, side, : len(ids) - 1] = np.where(learned[1:], ids[1:], -100)
        self.tensors = [torch.from_numpy(part).to(device) for part in (inputs, targets)]
        self.T = longest

    def __len__(self) -> int:
        return len(self.tensors[0])

    @torch.no_grad()
    def remember(self, model: PreTrainedModel, batch_size: int) -> None:
        """Keep the log-probabilities of a model, the start's."""
        with evaluating(model):
            parts = [
                log_p(model, *(part[start : start + batch_size] for part in self.tensors[:2]))
                for start in range(0, len(self), batch_size)
            ]
        self.tensors = [*self.tensors[:2], torch.cat(parts)]

    def take(self, numbers: np.ndarray) -> Batch:
        index = torch.from_numpy(np.asarray(numbers, dtype=np.int64)).to(self.tensors[0].device)
        return tuple(part[index] for part in self.tensors)


def log_p(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """log p of each text given its prompt, B 2, of inputs and targets B 2 T."""
    logits = model(input_ids=inputs.flatten(0, 1), use_cache=False).logits.float()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return -losses.view(targets.shape).sum(-1)


class Preferences(Objective):
    """DPO on pairs whose start's log-probabilities are remembered.

    Args:
        beta: how dear it is to leave the start.
        batch_size: pairs of the global batch.
        characters: of the validation split's chosen texts, as `Completions` takes them.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        train: Pairs,
        validation: Pairs,
        batch_size: int,
        seed: int,
        beta: float,
        characters: int,
        eval_batch_size: int = 16,
    ):
        self.accelerator, self.train, self.validation, self.beta = accelerator, train, validation, beta
        self.batch_size, self.seed = batch_size, seed
        self.characters = characters * validation.share
        self.eval_batch_size = eval_batch_size
        self.tokens_per_step = batch_size * 2 * train.T

    def batch(self, step: int, rows: np.ndarray) -> Batch:
        numbers = np.asarray(step * self.batch_size + rows, dtype=np.uint64)
        epoch, place = np.divmod(numbers, np.uint64(len(self.train)))
        return self.train.take(permute(place, len(self.train), mix(epoch ^ mix(np.uint64(self.seed)))))

    def count(self, batch: Batch) -> torch.Tensor:
        return torch.tensor(len(batch[0]), device=batch[0].device)

    def margins(self, log_p_now: torch.Tensor, at_start: torch.Tensor) -> torch.Tensor:
        """By how much the chosen text is preferred to the rejected one, B, of log p (B 2)."""
        away = log_p_now - at_start
        return self.beta * (away[:, 0] - away[:, 1])

    def loss(self, model: nn.Module, batch: Batch, num_items: torch.Tensor) -> torch.Tensor:
        inputs, targets, at_start = batch
        return -F.logsigmoid(self.margins(log_p(model, inputs, targets), at_start)).sum() / num_items

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> PreferencesEvaluation:
        pairs, sums = self.validation, torch.zeros(3, dtype=torch.float64)
        own = np.arange(self.accelerator.process_index, len(pairs), self.accelerator.num_processes)
        with evaluating(self.accelerator.unwrap_model(model)):
            for start in range(0, len(own), self.eval_batch_size):
                inputs, targets, at_start = pairs.take(own[start : start + self.eval_batch_size])
                now = log_p(model, inputs, targets)
                margins = self.margins(now, at_start)
                found = (-F.logsigmoid(margins).sum(), (margins > 0).sum(), -now[:, 0].sum())
                sums += torch.stack([part.double().cpu() for part in found])
        loss, right, nats = self.accelerator.reduce(
            sums.to(self.accelerator.device), reduction="sum"
        ).tolist()
        bits = nats / np.log(2) / self.characters
        return PreferencesEvaluation(loss / len(pairs), bits, right / len(pairs))
