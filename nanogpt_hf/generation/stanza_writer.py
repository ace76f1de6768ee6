"""Stanzas that a model writes on given first lines, many side by side."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..data.tokenization import encode, encode_each
from ..verse.stanzas import prompt_of
from .text import generate_ids


class Written(NamedTuple):
    """Texts for prompts: ids (B P+N) of prompt and continuation, how many of the N count, and the texts.

    lines: the line of the text to which each of the N tokens belongs, B N.
    closing: whether it belongs to the last word of that line or follows it, B N.
    """

    ids: np.ndarray
    lengths: np.ndarray
    lines: np.ndarray
    closing: np.ndarray
    texts: list[str]


class StanzaWriter:
    """Writes texts that begin with given lines, to the end of a stanza.

    Args:
        lines: of the whole text, the given one among them. It also ends at an empty line or the end-of-text token.
        max_new_tokens: N at most.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, lines: int, max_new_tokens: int, temperature: float
    ):
        self.tokenizer, self.lines = tokenizer, lines
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        pieces = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
        self.newlines = np.array([piece.count("\n") for piece in pieces])
        self.blank = np.array(["\n\n" in piece for piece in pieces])
        self.begins, self.ends = (
            np.array([bool(piece) and piece[at] == "\n" for piece in pieces]) for at in (0, -1)
        )
        self.blank[tokenizer.eos_token_id] = True
        self.spaces = np.array([" " in piece for piece in pieces])
        self.letters = np.array([any(map(str.isalpha, piece)) for piece in pieces])

    @classmethod
    def like(
        cls, stanzas: Sequence[str], tokenizer: PreTrainedTokenizerFast, lines: int, temperature: float
    ) -> "StanzaWriter":
        """A writer of texts of so many lines, and as long as in these stanzas.

        Few stanzas are much longer than the others, and the longest one would decide how much is computed for each.
        """
        rests = ["\n".join(stanza.split("\n")[1:lines]) for stanza in stanzas]
        longest = int(np.quantile([len(encode(tokenizer, rest)) for rest in rests], 0.98))
        return cls(tokenizer, lines, longest + 8, temperature)

    def encode(self, line: str) -> np.ndarray:
        """The prompt of a first line."""
        return encode(self.tokenizer, prompt_of(line))

    def by_length(self, lines: Sequence[str]) -> list[np.ndarray]:
        """The prompts of each length in tokens (N P), since texts are written side by side."""
        found: dict[int, list[np.ndarray]] = {}
        for line in lines:
            ids = self.encode(line)
            found.setdefault(len(ids), []).append(ids)
        return [np.stack(found[length]) for length in sorted(found)]

    def write_on(self, model: PreTrainedModel, lines: Sequence[str], texts: int, seed: int) -> list[str]:
        """About so many texts that begin with these lines, as many with each."""
        each = max(1, round(texts / len(lines)))
        batches = [np.repeat(prompts, each, axis=0) for prompts in self.by_length(lines)]
        return [text for prompts in batches for text in self(model, prompts, seed).texts]

    def __call__(self, model: PreTrainedModel, prompts: np.ndarray, seed: int) -> Written:
        """Continue prompts of one length (B P), as of `encode`."""
        P = prompts.shape[1]
        options: dict[str, Any] = {"temperature": self.temperature, "seed": seed}
        ids = torch.from_numpy(prompts).long()
        new, state = [], self._begin(len(prompts), given=1)
        for step in generate_ids(model, ids, self.max_new_tokens, **options):
            new.append(step.cpu().numpy())
            state = self._follow(new[-1], *state)
            if state[0].all():
                break
        return self._cut(np.concatenate((prompts, np.stack(new, axis=1)), axis=1), P)

    def as_if_written(self, texts: Sequence[str], length: int) -> Written:
        """Whole texts as if they had been written on nothing but an empty line, all of so many tokens at most."""
        prompt, *rests = encode_each(self.tokenizer, ["\n\n", *(f"{text}\n\n" for text in texts)])
        ids = np.full((len(texts), length), self.tokenizer.eos_token_id)
        for row, rest in zip(ids, rests, strict=True):
            whole = np.concatenate((prompt, rest))
            if len(whole) > length:  # a line that is cut off has no end
                whole = whole[: 1 + np.flatnonzero(self.newlines[whole[:length]])[-1]]
            row[: len(whole)] = whole
        return self._cut(ids, len(prompt), given=0)

    def _begin(self, rows: int, given: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """After so many given lines: whether a text is over, its newlines, and whether it ends in one; each B."""
        return np.zeros(rows, bool), np.full(rows, given), np.ones(rows, bool)

    def _follow(
        self, token: np.ndarray, over: np.ndarray, count: np.ndarray, last: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same after one more token (B)."""
        count = count + self.newlines[token]
        over = over | self.blank[token] | (self.begins[token] & last) | (count >= self.lines)
        return over, count, self.ends[token]

    def _cut(self, ids: np.ndarray, P: int, given: int = 1) -> Written:
        new = ids[:, P:]
        over, count, last = self._begin(len(ids), given)
        lengths, lines = np.zeros(len(ids), int), np.zeros(new.shape, int)
        for place in range(new.shape[1]):
            lines[:, place] = count
            lengths += ~over
            over, count, last = self._follow(new[:, place], over, count, last)
        rows = [row[: P + length] for row, length in zip(ids, lengths, strict=True)]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return Written(ids, lengths, lines, self._closing(new), [text.strip("\n") for text in texts])

    def _closing(self, new: np.ndarray) -> np.ndarray:
        found, word, over = np.zeros(new.shape, bool), np.zeros(len(new), bool), np.zeros(len(new), bool)
        for place in range(new.shape[1] - 1, -1, -1):
            token = new[:, place]
            of_next = self.newlines[token] > 0
            word, over = word & ~of_next, over & ~of_next
            found[:, place] = ~over
            word |= self.letters[token]
            over |= word & self.spaces[token]
        return found
