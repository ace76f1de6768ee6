"""Rewards as an objective: a model's own texts, and what their lines are worth (GRPO).

Group relative policy optimisation (Shao et al. 2024, DeepSeekMath, section 4): of several texts for one prompt, each
is judged by how much better it is than the others, so that no second network has to guess what a prompt is worth.
Here a token has the advantage of its line (their process supervision, without the sum over later steps: a line's
metre owes nothing to the lines after it), and what the last word of a line decides is the advantage of that word. A
batch is used for one update, where the clipped ratio of their formula is 1 and its gradient that of advantage * log p.
The divergence from the model at the start is a penalty in the loss, by their estimator exp(d) - d - 1 with
d = log p_start - log p.

A small model rhymes one pair of lines in a hundred, and of what hardly ever happens rewards teach nothing. So drills come
first (`verse/drills.py`), and now and then afterwards: stanzas in place of the model's own texts, whose words that answer
a rhyme have an advantage, which makes the same formula their likelihood.

Beside it stands what the model has forgotten of the text that the base was trained on: the Kullback-Leibler divergence
of the start from it on windows of that text. The plain loss on the text (Ouyang et al. 2022, InstructGPT: PPO-ptx) does
harm where the text is small and has been read many times: the model learns it by heart, and its validation loss rose
from 1.80 to 2.07 nats in 66 steps.

Why our own loop, and not TRL's GRPOTrainer with its rollout hook: writing is most of the time, and our decoder, which
its hook can be given too, writes 30 to 100 times faster than generate; but the hook does not know of lines, and
resuming there is not exact.

Shapes: B texts, T tokens of the context, V vocabulary.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..data.token_stream import TokenStream, mix, permute
from ..generation.stanza_writer import StanzaWriter, Written
from ..model.loading import context_length
from ..verse.drills import Drills
from ..verse.rewards import OF_LAST_WORD, Rewards
from .evaluation import evaluate_split
from .objectives import Batch, Objective

LEAST_SPREAD = 0.02  # of a reward, which one lucky line would else make a mountain of
DRILL_EVERY = 3  # steps one is a drill, after the first ones, which all are
TEXT_EVERY = 4  # one window of text for so many texts that the model writes


@dataclass(frozen=True)
class RewardsEvaluation:
    """The mean reward on prompts that are not tuned on, and the loss on the validation text."""

    reward: float
    bits_per_char: float
    more: dict[str, float]

    @property
    def loss(self) -> float:
        """What is missing to a reward of 1."""
        return 1 - self.reward


class GroupRelativePolicy(Objective):
    """GRPO on texts that begin with given lines.

    Args:
        model: as it is at the start, on its device; what is no drill is written by it with the weights of that time.
        prompts, held_out: first lines, to tune on and to evaluate on.
        train, validation: the text that the base was trained on.
        batch_size: texts of the global batch.
        group: texts for one prompt.
        beta: weight of the divergence from the start. text_coef: weight of what is forgotten of the text.
        drills: for the first drill_steps, and one step in `DRILL_EVERY` after them; None: there are none.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: PreTrainedModel,
        write: StanzaWriter,
        rewards: Rewards,
        prompts: Sequence[str],
        held_out: Sequence[str],
        train: TokenStream,
        validation: TokenStream,
        characters: int,
        drills: Drills | None = None,
        *,
        batch_size: int,
        group: int,
        beta: float,
        text_coef: float,
        seed: int,
        eval_texts: int,
        micro_batch: int,
        drill_steps: int = 0,
    ):
        self.accelerator, self.model, self.write, self.rewards = accelerator, model, write, rewards
        self.start = copy.deepcopy(model).requires_grad_(False).eval()
        # What writes is a copy: not compiled, without dropout, and of half the bytes where autocast computes so too.
        dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
        self.scribe = copy.deepcopy(self.start).to(dtype)
        self.prompts, self.held_out = write.by_length(prompts), write.by_length(held_out)
        self.longest = self.prompts[-1].shape[1] + write.max_new_tokens
        self.train, self.validation, self.characters = train, validation, characters
        self.batch_size, self.group, self.seed, self.eval_texts = batch_size, group, seed, eval_texts
        self.beta, self.text_coef, self.micro_batch = beta, text_coef, micro_batch
        self.context = context_length(model)
        self.drills, self.drill_steps = drills, drill_steps
        self.tokens_per_step = batch_size * write.max_new_tokens
        self.step = -1
        self.made: Any = None
        self.newest: dict[str, float] = {}

    def choose(self, step: int, groups: int) -> np.ndarray:
        """The prompts of a step, groups P: of one length, drawn by how many prompts have it."""
        place = int(mix(mix(np.uint64(self.seed)) ^ np.uint64(step)) >> np.uint64(1))
        bounds = np.cumsum([len(prompts) for prompts in self.prompts])
        prompts = self.prompts[int(np.searchsorted(bounds, place % bounds[-1], side="right"))]
        order = permute(np.arange(len(prompts)), len(prompts), mix(np.uint64(place)))
        return prompts[order.astype(int)[np.arange(groups) % len(prompts)]]

    def batch(self, step: int, rows: np.ndarray) -> Batch:
        if self.step != step:
            later = step - self.drill_steps
            if self.drills is not None and (later < 0 or later % DRILL_EVERY == 0):
                self.step, self.made = step, self._drill(self.drills, step)
            else:
                self.step, self.made = step, self._write(step)
        processes, first = self.accelerator.num_processes, self.accelerator.process_index
        own = torch.as_tensor((rows - first) // processes, device=self.accelerator.device)
        text, _ = self.train.batch(self.seed, step, self.batch_size, rows[::TEXT_EVERY])
        return *(part[own].flatten(0, 1) for part in self.made), text

    def _drill(self, drills: Drills, step: int) -> Batch:
        """What `_write` returns, of drills: the words that answer have the same advantage, and nothing else has any."""
        drawn = drills.draw(self._own_share(), self._seed(step))
        read = self.write.as_if_written([drill.text for drill in drawn], self.longest)
        K = self.write.lines
        answers = np.zeros((len(drawn), K + 1), bool)
        for row, drill in zip(answers, drawn, strict=True):
            row[drill.answers] = True
        worth = read.closing & np.take_along_axis(answers, read.lines.clip(max=K), axis=1)
        self.newest = {}
        return self._judged(read, worth.astype(float))

    def _write(self, step: int) -> Batch:
        """What this process writes for a step, in windows of S T: inputs, targets, advantages, log p at the start."""
        prompts = np.repeat(self.choose(step, self._own_share() // self.group), self.group, axis=0)
        written = self.write(self._as_it_is(), prompts, self._seed(step))
        given = self.rewards.by_name(written.texts)
        self.newest = {f"reward_{name}": _mean_without_first(parts) for name, parts in given.items()}
        self.newest["reward"] = _mean_without_first(self.rewards.combined(given))
        self.newest["written_tokens"] = float(written.lengths.mean())
        return self._judged(written, self._advantages(written, self.rewards.guarded(given)))

    def _own_share(self) -> int:
        return self.batch_size // self.accelerator.num_processes

    def _seed(self, step: int) -> int:
        place = step * self.accelerator.num_processes + self.accelerator.process_index
        return int(mix(mix(np.uint64(self.seed + 1)) ^ np.uint64(place)) >> np.uint64(1))

    @torch.no_grad()
    def _as_it_is(self) -> PreTrainedModel:
        """The scribe with the weights of this time."""
        for own, newest in zip(self.scribe.parameters(), self.model.parameters(), strict=True):
            own.copy_(newest)
        return self.scribe

    def _advantages(self, written: Written, given: Mapping[str, Sequence[np.ndarray]]) -> np.ndarray:
        """Of each new token (B N): what its line is worth more than the same line of the prompt's other texts.

        Each reward is measured in its own spread over the batch, so that a rare one is heard beside a common one
        (Liu et al. 2026, GDPO, who take the spread of each group).
        """
        B, K = len(written.texts), self.write.lines
        total = np.zeros(written.lines.shape)
        for name, lines in given.items():
            worth = np.full((B, K), np.nan)
            for row, values in enumerate(lines):
                worth[row, 1 : len(values)] = values[1:K]  # the first one was given
            groups = worth.reshape(-1, self.group, K)
            there = np.isfinite(groups)
            means = np.where(there, groups, 0).sum(1, keepdims=True) / there.sum(1, keepdims=True).clip(1)
            better = np.where(there, groups - means, 0).reshape(B, K)
            spread = np.sqrt((better**2).sum() / max(1, there.sum()))
            better *= self.rewards.weights[name] / max(spread, LEAST_SPREAD)
            part = np.take_along_axis(better, written.lines.clip(max=K - 1), axis=1)
            total += part * written.closing if name in OF_LAST_WORD else part
        return total

    def _judged(self, written: Written, advantages: np.ndarray) -> Batch:
        """Texts with the advantage of each new token (B N), which is measured in its own size over the batch."""
        counts = np.arange(advantages.shape[1]) < written.lengths[:, None]
        advantages = advantages / max(1e-6, np.sqrt((advantages[counts] ** 2).mean()))
        inputs, targets, spread = self._windows(written, advantages)
        return inputs, targets, spread, self._log_p_at_start(inputs, targets)

    def _windows(self, written: Written, advantages: np.ndarray) -> Batch:
        """The texts as the decoder read them: a full context is halved, and its later half begins the next window.

        Returns:
            Inputs, targets (-100 where nothing was written) and advantages, each B S T.
        """
        T, stride = self.train.block_size, self.context + 1 - self.context // 2
        S = 1 + max(0, -(-(self.longest - T - 1) // stride))
        room = (S - 1) * stride + T + 1
        rows, N = advantages.shape
        P = written.ids.shape[1] - N
        ids, targets = np.zeros((rows, room), np.int64), np.full((rows, room), -100)
        spread = np.zeros((rows, room), np.float32)
        ids[:, : P + N] = written.ids
        counts = np.arange(N) < written.lengths[:, None]
        targets[:, P : P + N] = np.where(counts, written.ids[:, P:], -100)
        spread[:, P : P + N] = advantages * counts
        parts = []
        for window in range(S):
            place = slice(window * stride + 1, window * stride + T + 1)
            target, worth = targets[:, place].copy(), spread[:, place].copy()
            if window:  # the window before has the first ones
                target[:, : T // 2 - 1], worth[:, : T // 2 - 1] = -100, 0
            parts.append((ids[:, window * stride :][:, :T], target, worth))
        device = self.accelerator.device
        return tuple(torch.from_numpy(np.stack(part, axis=1)).to(device) for part in zip(*parts, strict=True))

    @torch.no_grad()
    def _log_p_at_start(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        found = torch.empty(inputs.shape, device=inputs.device)
        for start in range(0, len(inputs), self.micro_batch):
            part = slice(start, start + self.micro_batch)
            with self.accelerator.autocast():
                logits = self.start(input_ids=inputs[part].flatten(0, 1), use_cache=False).logits
            found[part] = self._log_p(logits, targets[part].flatten(0, 1)).view(found[part].shape)
        return found

    def _log_p(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """log p(target) (B T) of logits (B T V) at the temperature at which texts are written; 0 without a target."""
        logits = logits.float() / self.write.temperature
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return -losses.view(targets.shape)

    def count(self, batch: Batch) -> torch.Tensor:
        return (batch[1] != -100).sum()

    def loss(self, model: nn.Module, batch: Batch, num_items: torch.Tensor) -> torch.Tensor:
        inputs, targets, advantages, at_start, text = batch
        logits = model(input_ids=torch.cat((inputs, text)), use_cache=False).logits
        written, on_text = logits.split((len(inputs), len(text)))
        log_p = self._log_p(written, targets)
        away = at_start - log_p
        divergence = away.exp() - away - 1
        policy = (self.beta * divergence - advantages * log_p).sum() / num_items
        with torch.no_grad(), self.accelerator.autocast():
            before = self.start(input_ids=text, use_cache=False).logits
        log_p, log_p_before = (part.float().log_softmax(-1) for part in (on_text, before))
        forgotten = F.kl_div(log_p, log_p_before, reduction="sum", log_target=True)
        return policy + self.text_coef * forgotten / (self.batch_size // TEXT_EVERY * text.shape[1])

    def measured(self) -> dict[str, float]:
        return self.newest

    def evaluate(self, model: nn.Module) -> RewardsEvaluation:
        prompts = max(self.held_out, key=len)  # of the commonest length, so that they are one batch
        prompts = np.repeat(prompts, -(-self.eval_texts // len(prompts)), axis=0)
        texts = self.write(self._as_it_is(), prompts, self.seed).texts
        given = self.rewards.by_name(texts)
        split = evaluate_split(model, self.validation, self.characters, 64, self.accelerator)
        more = {f"eval_reward_{name}": _mean_without_first(parts) for name, parts in given.items()}
        return RewardsEvaluation(
            _mean_without_first(self.rewards.combined(given)),
            split.bits_per_char,
            more | {"eval_text_loss": split.loss},
        )


def _mean_without_first(lines: Sequence[np.ndarray]) -> float:
    """Mean over all lines but each text's first, which was given."""
    written = np.concatenate([part[1:] for part in lines])
    return float(written.mean()) if written.size else 0.0
