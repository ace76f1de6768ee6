"""Sampling from any causal language model, past its context length too."""

import sys
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..common.errors import UserError
from ..data.tokenization import encode
from .decoding import Sampler, make_decoder


@torch.inference_mode()
def generate_ids(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    max_new_tokens: int | None = None,
    **sampling,
) -> Iterator[torch.Tensor]:
    """The next token of every row of input_ids (B T), each B, one after another.

    Cached decoding. A full context is halved: its later half is read again and becomes the past of what
    follows, so that the cost of a token does not grow with the text.

    Args:
        max_new_tokens: the end; None goes on for ever.
        sampling: temperature (0.8; 0 takes the likeliest token), top_k, top_p, and the seed of a generator of its
            own: the global one is left alone. A seed gives the same tokens on the same device.
    """
    context = model.config.max_position_embeddings
    window = input_ids.to(model.device)[:, -context:]
    left = sys.maxsize if max_new_tokens is None else max_new_tokens
    sampler = Sampler(model, **sampling)
    decoder = make_decoder(model, sampler, rows=len(window), room=min(context, window.shape[1] + left))
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


class _Writer:
    """Turns one sequence's tokens into text as they come, and knows when it has ended."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str]):
        self.backend, self.eos, self.stop = tokenizer.backend_tokenizer, tokenizer.eos_token_id, stop
        self.undecoded: list[int] = []
        self.text, self.given, self.ended = "", 0, False

    def add(self, token: int) -> None:
        if self.ended:
            return
        if token == self.eos:
            self.ended = True
            return
        # A character may be spelt in up to four tokens; a model may also begin one and not finish it.
        self.undecoded.append(token)
        piece = self.backend.decode(self.undecoded)
        if not piece.endswith("\ufffd") or len(self.undecoded) >= 4:
            self.text, self.undecoded = self.text + piece, []
        places = [place for word in self.stop if (place := self.text.find(word)) >= 0]
        if places:
            self.text, self.ended = self.text[: min(places)], True

    def news(self, last: bool) -> str:
        """Text not given out yet; what may become a stop string is held back."""
        held = 0 if last or self.ended else max((len(word) - 1 for word in self.stop), default=0)
        end = max(self.given, len(self.text) - held)
        news, self.given = self.text[self.given : end], end
        return news


def stream_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    *,
    num_return_sequences: int = 1,
    max_new_tokens: int = 500,
    stop: Sequence[str] = (),
    **sampling,
) -> Iterator[list[str]]:
    """Continuations of a prompt as they grow: at each token, the new text of every sequence.

    Args:
        stop: a continuation ends before the first of these; it also ends at the end-of-text token.
        sampling: temperature, top_k, top_p and seed of `generate_ids`.

    Raises:
        UserError: the prompt is empty, or is not Unicode text.
    """
    if not prompt:
        raise UserError("the prompt is empty: give at least one character (a newline will do).")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError("the prompt holds half of a surrogate pair, which is not Unicode text: leave it out.")
    ids = torch.from_numpy(encode(tokenizer, prompt)).long().repeat(num_return_sequences, 1)
    writers = [_Writer(tokenizer, stop) for _ in range(num_return_sequences)]
    for number, step in enumerate(generate_ids(model, ids, max_new_tokens, **sampling), start=1):
        for writer, token in zip(writers, step.tolist(), strict=True):
            writer.add(token)
        last = number == max_new_tokens or all(writer.ended for writer in writers)
        yield [writer.news(last) for writer in writers]
        if last:
            break


def generate_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, **options
) -> list[str]:
    """Whole continuations of a prompt (without it); the options are those of `stream_text`."""
    pieces = list(stream_text(model, tokenizer, prompt, **options))
    return ["".join(column) for column in zip(*pieces, strict=True)]
