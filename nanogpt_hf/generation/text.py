"""Sampling from any causal language model, past its context length too."""

import sys
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..common.errors import UserError
from ..data.tokenization import encode
from ..model.loading import context_length
from .decoding import Sampler, make_decoder


@torch.inference_mode()
def generate_ids(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    max_new_tokens: int | None = None,
    int8: bool = False,
    **sampling: Any,
) -> Iterator[torch.Tensor]:
    """The next token of every row of input_ids (B T), each B, one after another.

    Cached decoding. A full context is halved: its later half is read again and becomes the past of what
    follows, so that the cost of a token does not grow with the text.

    Args:
        max_new_tokens: the end; None goes on for ever.
        int8: hold the weights in 8 bits while they are read for one token after the other; on a CPU.
        sampling: temperature (0.8; 0 takes the likeliest token), top_k, top_p, and the seed of a generator of its
            own: the global one is left alone. A seed gives the same tokens on the same device.
    """
    context = context_length(model)
    window = input_ids.to(model.device)[:, -context:]
    left = sys.maxsize if max_new_tokens is None else max_new_tokens
    sampler = Sampler(model, **sampling)
    decoder = make_decoder(model, sampler, len(window), min(context, window.shape[1] + left), int8)
    was_training = model.training
    model.eval()
    try:
        while left > 0:
            tokens = []
            for token in decoder.continue_(window, min(left, 1 + context - window.shape[1])):
                yield token
                tokens.append(token)
            left -= len(tokens)
            window = torch.cat((window, torch.stack(tokens, dim=1).to(window.device)), dim=1)
            window = window[:, -max(1, context // 2) :]
    finally:
        model.train(was_training)


class Continuation:
    """One sequence's tokens turned into text as they come, and where that text ends.

    The text is what the tokenizer's decoder makes of the tokens behind the prompt, with the spaces that only
    neighbours show; bytes that make no character become U+FFFD.

    Args:
        prompt: text before the first token.
        ends: ids of tokens that end the text; they are no part of it.
        stop: the text ends before the first of these.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        prompt: str,
        ends: Container[int] = (),
        stop: Sequence[str] = (),
    ):
        self.tokenizer, self.backend = tokenizer, tokenizer.backend_tokenizer
        self.ends, self.stop = ends, stop
        self.text, self.given, self.ended = "", 0, False
        # A stream that begins with a broken character would give it out again.
        self._restart(encode(tokenizer, prompt[-32:].rstrip("\ufffd")).tolist())

    def _restart(self, ids: list[int]) -> None:
        self.stream = DecodeStream(ids, skip_special_tokens=True)
        self.undecoded: list[int] = []

    def add(self, token: int) -> None:
        """Read one more token; after the end there is nothing to read."""
        if self.ended:
            return
        if token in self.ends:
            self.finish()
            return
        self.undecoded.append(token)
        try:
            piece = self.stream.step(self.backend, token)
        except (
            Exception
        ):  # bytes that make no character spoil the whole ones before them, which are given out
            piece = self.backend.decode(self.undecoded)
            self._restart(self.undecoded)
        if piece is not None:
            self._append(piece)

    def finish(self) -> None:
        """The end: what waits for the rest of a character becomes text as it is."""
        if not self.ended:
            self._append(self.backend.decode(self.undecoded))
            self.ended = True

    def _append(self, piece: str) -> None:
        start = max(0, len(self.text) - max(map(len, self.stop), default=0))
        self.text, self.undecoded = self.text + piece, []
        places = [place for word in self.stop if (place := self.text.find(word, start)) >= 0]
        if places:
            self.text, self.ended = self.text[: min(places)], True

    def news(self) -> str:
        """Text not given out yet; what may become a stop string or the end of a line is held back."""
        held = max((len(word) - 1 for word in self.stop), default=0)
        held = max(held, self.text.endswith("\r"))
        end = len(self.text) if self.ended else max(self.given, len(self.text) - held)
        news, self.given = self.text[self.given : end], end
        return news


def stream_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str | Sequence[int],
    *,
    num_return_sequences: int = 1,
    max_new_tokens: int = 500,
    stop: Sequence[str] = (),
    **sampling: Any,
) -> Iterator[list[str]]:
    """Continuations of a prompt as they grow: at each token, the new text of every sequence.

    Args:
        prompt: a text, whose spelt-out special tokens are text too, or the ids of one, as a chat template gives.
        stop: a continuation ends before the first of these; it also ends at the end-of-text token, and at those that
            the model's generation config names.
        sampling: temperature, top_k, top_p, seed and int8 of `generate_ids`.

    Raises:
        UserError: the prompt is empty, or is not Unicode text.
    """
    if not len(prompt):
        raise UserError("the prompt is empty: give at least one character (a newline will do).")
    if isinstance(prompt, str):
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise UserError(
                "the prompt holds half of a surrogate pair, which is not Unicode text: leave it out."
            )
        ids, text = torch.from_numpy(encode(tokenizer, prompt)).long(), prompt
    else:
        ids, text = torch.tensor(prompt), ""
    rows = [
        Continuation(tokenizer, text, end_tokens(model, tokenizer), stop) for _ in range(num_return_sequences)
    ]
    tokens = generate_ids(model, ids.repeat(num_return_sequences, 1), max_new_tokens, **sampling)
    for number, step in enumerate(tokens, start=1):
        for row, token in zip(rows, step.tolist(), strict=True):
            row.add(token)
            if number == max_new_tokens:
                row.finish()
        yield [row.news() for row in rows]
        if all(row.ended for row in rows):
            break


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Ids that end a text: the tokenizer's end of text, and what the model's generation config says."""
    said = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(said if isinstance(said, list) else [said])} - {None}


def whole_texts(stream: Iterable[list[str]]) -> list[str]:
    """The texts that a stream of their pieces makes."""
    return ["".join(pieces) for pieces in zip(*stream, strict=True)]


def generate_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str | Sequence[int], **options: Any
) -> list[str]:
    """Whole continuations of a prompt (without it); the options are those of `stream_text`."""
    return whole_texts(stream_text(model, tokenizer, prompt, **options))
