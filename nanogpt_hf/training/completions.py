"""Completions as an objective: the loss of what the model is to write, and nothing of what it is given to read.

Conversations are packed into windows of T tokens. In a window the positions of each begin anew at 0, by which attention
keeps them apart (transformers finds packed texts by their positions), so that a window is as good as one text in it.
"""

from collections.abc import Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from ..common.errors import UserError
from ..data.conversations import Example, share_within
from ..data.token_stream import mix, permute
from .evaluation import SplitLoss, evaluating
from .objectives import Batch, Objective, next_token_loss


class PackedWindows:
    """Examples side by side in W windows of T tokens: inputs, targets (-100 where nothing is learned) and positions.

    An example longer than T is cut at its end; one of which nothing learned is left goes away.

    Raises:
        UserError: nothing is left.
    """

    def __init__(self, examples: Sequence[Example], T: int, padding: int, device: torch.device, name: str):
        kept = [example for example in examples if example.learned[1 : T + 1].any()]
        self.left_out = len(examples) - len(kept)
        self.cut = sum(len(example.ids) > T + 1 for example in kept)
        if not kept:
            raise UserError(
                f"of none of {name} does the context of {T} tokens hold anything to learn: the prompts fill it; give "
                "shorter ones or a base with a longer context."
            )
        self.share = share_within(kept, examples, T)
        plan = pack([min(T, len(example.ids) - 1) for example in kept], T)
        inputs = np.full((len(plan), T), padding)
        targets, positions = np.full((len(plan), T), -100), np.tile(np.arange(T), (len(plan), 1))
        for row, members in enumerate(plan):
            start = 0
            for number in members:
                ids, learned = kept[number].ids[: T + 1], kept[number].learned[: T + 1]
                place = slice(start, start + len(ids) - 1)
                inputs[row, place] = ids[:-1]
                targets[row, place] = np.where(learned[1:], ids[1:], -100)
                positions[row, place] = np.arange(len(ids) - 1)
                start = place.stop
            positions[row, start:] = np.arange(T - start)  # the padding is a text of its own
        self.T, self.device = T, device
        self.tensors = [torch.from_numpy(part).to(device) for part in (inputs, targets, positions)]

    def __len__(self) -> int:
        return len(self.tensors[0])

    def take(self, numbers: np.ndarray) -> Batch:
        """These windows, each part B T."""
        index = torch.from_numpy(np.asarray(numbers, dtype=np.int64)).to(self.device)
        return tuple(part[index] for part in self.tensors)


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which of these go side by side into one room: the longest first, each where it leaves the least (best fit)."""
    rooms: list[list[int]] = []
    by_space: dict[int, list[int]] = {}
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[number]
        space = next((space for space in range(length, room + 1) if by_space.get(space)), None)
        if space is None:
            rooms.append([number])
            at, space = len(rooms) - 1, room
        else:
            at = by_space[space].pop()
            rooms[at].append(number)
        by_space.setdefault(space - length, []).append(at)
    return rooms


class Completions(Objective):
    """Next-token prediction of what is learned in packed windows.

    Args:
        batch_size: windows of the global batch.
        seed: decides their order.
        characters: that the learned part of the validation split spells; where windows hold a share of it, that share is
            counted.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        train: PackedWindows,
        validation: PackedWindows,
        batch_size: int,
        seed: int,
        characters: int,
        eval_batch_size: int = 16,
    ):
        self.accelerator, self.train, self.validation = accelerator, train, validation
        self.batch_size, self.seed = batch_size, seed
        self.characters = characters * validation.share
        self.eval_batch_size = eval_batch_size
        self.tokens_per_step = batch_size * train.T

    def batch(self, step: int, rows: np.ndarray) -> Batch:
        numbers = np.asarray(step * self.batch_size + rows, dtype=np.uint64)
        epoch, place = np.divmod(numbers, np.uint64(len(self.train)))
        return self.train.take(permute(place, len(self.train), mix(epoch ^ mix(np.uint64(self.seed)))))

    def count(self, batch: Batch) -> torch.Tensor:
        return (batch[1] != -100).sum()

    def loss(self, model: nn.Module, batch: Batch, num_items: torch.Tensor) -> torch.Tensor:
        inputs, targets, positions = batch
        return next_token_loss(
            self.accelerator, model, targets, num_items, input_ids=inputs, position_ids=positions
        )

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> SplitLoss:
        accelerator, windows = self.accelerator, self.validation
        sums = torch.zeros(2, dtype=torch.float64)
        own = np.arange(accelerator.process_index, len(windows), accelerator.num_processes)
        with evaluating(accelerator.unwrap_model(model)):
            for start in range(0, len(own), self.eval_batch_size):
                inputs, targets, positions = windows.take(own[start : start + self.eval_batch_size])
                logits = model(input_ids=inputs, position_ids=positions, use_cache=False).logits
                losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
                sums += torch.stack((losses.double().sum(), (targets != -100).sum().double())).cpu()
        nats, tokens = accelerator.reduce(sums.to(accelerator.device), reduction="sum").tolist()
        return SplitLoss(nats, int(tokens), self.characters)
