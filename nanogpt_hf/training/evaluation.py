"""The loss over a whole split, and of every token by itself."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..common.errors import UserError
from ..data.corpora import AnyCorpus
from ..data.token_stream import TokenStream

LOGITS_AT_ONCE = 2**28  # 1 GiB in float32: GPT-2's 50,257 tokens leave room for 5 windows of 1,024


@dataclass(frozen=True)
class SplitLoss:
    """What a model loses on a split: nats over all its tokens, and the characters that they spell."""

    nats: float
    tokens: int
    characters: float
    more: Mapping[str, float] = field(default_factory=dict)  # measured beside it, for metrics.jsonl

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def bits_per_char(self) -> float:
        return self.nats / math.log(2) / self.characters


def validation_stream(
    tokenizer: PreTrainedTokenizerFast,
    corpus: AnyCorpus,
    block_size: int,
    device: torch.device,
    begun: bool = False,
) -> TokenStream:
    """The validation split as a stream.

    Args:
        begun: put the token that begins a text before it, or else the end-of-text token, so that the first token is
            predicted as well: all bytes of the text are then paid for, as in EleutherAI's lm-eval.

    Raises:
        UserError: there is nothing in it to predict.
    """
    ids = corpus.ids("validation", tokenizer)
    if len(ids) < 2:
        raise UserError(
            f"what is held out of {corpus.name} for validation has {len(ids)} tokens, it needs at least 2: hold out more, "
            "with a longer --validation_file or a larger --validation_split_percentage."
        )
    if begun:
        begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        ids = np.concatenate((np.array([begin], dtype=ids.dtype), ids))
    return TokenStream(ids, min(block_size, len(ids) - 1), device)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Dropout off, nothing compiled, and float32 as in the saved checkpoint.

    accelerate's autocast, a wrapped forward, is set aside. A model sharded by FSDP2 keeps the precision that it
    gathers its weights in.
    """
    was_training, autocast = model.training, model.__dict__.pop("forward", None)
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(was_training)
        if autocast is not None:
            model.forward = autocast
        for module in model.modules():
            if isinstance(module, FSDPModule):  # without a backward pass the last weights stay gathered
                module.reshard()


@torch.no_grad()
def _predictions(
    model: torch.nn.Module, stream: TokenStream, numbers: np.ndarray, batch_size: int, stride: int | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of some windows of the stream, batch by batch: logits (B T V), and the tokens (B T), -100 for what does not count."""
    vocabulary = getattr(model, "module", model).get_input_embeddings().weight.shape[0]  # inside of DDP
    batch_size = min(batch_size, max(1, LOGITS_AT_ONCE // (stream.block_size * vocabulary)))
    for start in range(0, len(numbers), batch_size):
        x, y = stream.window_batch(numbers[start : start + batch_size], stride)
        yield model(input_ids=x, use_cache=False).logits, y


def _nats(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """B T; 0 for what does not count."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), ignore_index=-100, reduction="none")
    return losses.view(y.shape)


def evaluate_split(
    model: PreTrainedModel,
    stream: TokenStream,
    characters: int,
    batch_size: int,
    accelerator: Accelerator,
    stride: int | None = None,
) -> SplitLoss:
    """Loss over every token of the stream but its first, each counted once, in windows of T tokens.

    Every process takes its share of the windows. The result depends neither on batch_size nor on the number
    of processes: losses are summed in float64, token by token.

    Args:
        characters: of the text that the stream encodes. The first token's are among them, though it is given
            and not predicted.
        batch_size: windows a process computes at once; fewer where their logits would take more than 1 GiB.
        stride: tokens from one window to the next. Less than T makes windows overlap, so that every token is
            predicted from at least T - stride before it, where there are so many, in the last window too. Without
            any they stand side by side, and the last is as short as the stream leaves it.
    """
    nats = torch.zeros((), dtype=torch.float64 if stream.device.type != "mps" else torch.float32)
    # As many for each, since FSDP2 computes in step; a window past the end counts nothing.
    everybody = -(-stream.windows(stride) // accelerator.num_processes) * accelerator.num_processes
    numbers = np.arange(accelerator.process_index, everybody, accelerator.num_processes)
    with evaluating(accelerator.unwrap_model(model)):
        for logits, y in _predictions(model, stream, numbers, batch_size, stride):
            losses = _nats(logits, y)
            nats = nats.to(losses.device) + losses.sum(dtype=nats.dtype)
    nats = accelerator.reduce(nats.to(stream.device), reduction="sum").item()
    return SplitLoss(
        nats=nats,
        tokens=len(stream) - 1,
        characters=characters,
    )


@dataclass(frozen=True)
class TokenLosses:
    """Of N tokens in their order: nats (N), and the ids and probabilities of what was likeliest there (N K)."""

    nats: np.ndarray
    likeliest: np.ndarray
    probabilities: np.ndarray


def token_losses(
    model: PreTrainedModel, stream: TokenStream, batch_size: int, stride: int | None, likeliest: int = 0
) -> TokenLosses:
    """Of every token of the stream but its first; the arguments are those of `evaluate_split`.

    Args:
        likeliest: K, how many tokens to name that were the likeliest in its place.
    """
    nats, ids, probabilities = [], [], []
    with evaluating(model):
        for logits, y in _predictions(model, stream, np.arange(stream.windows(stride)), batch_size, stride):
            counts = y != -100
            nats.append(_nats(logits, y)[counts].double().cpu().numpy())
            best = logits[counts].float().softmax(-1).topk(min(likeliest, logits.shape[-1]))
            ids.append(best.indices.cpu().numpy())
            probabilities.append(best.values.cpu().numpy())
    return TokenLosses(*map(np.concatenate, (nats, ids, probabilities)))
