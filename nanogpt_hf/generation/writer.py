"""A model that is kept at hand to write with: it goes on with texts, or answers where it is one that chats."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..common.errors import UserError
from ..common.text import first_line
from ..model.loading import context_length, load_model_and_tokenizer
from .sampling_settings import SamplingSettings
from .text import stream_text, whole_texts

# What is written on with: a text, or the messages of a conversation, each with its role and content.
Prompt = str | list[dict[str, str]]


class Writer:
    """A model, its tokenizer, and the name that its user knows it by.

    Args:
        chats: whether prompts are messages of a conversation; by default they are where there is a chat template.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        chats: bool | None = None,
    ):
        self.name, self.model, self.tokenizer = name, model, tokenizer
        self.chats = tokenizer.chat_template is not None if chats is None else chats
        if self.chats and tokenizer.chat_template is None:
            raise UserError(f"{name} has no chat template, so it does not chat: leave --chat out.")

    @classmethod
    def load(cls, name_or_path: str, device: str, dtype: torch.dtype, chats: bool | None = None) -> "Writer":
        """Raises UserError as `load_model_and_tokenizer` does."""
        model, tokenizer = load_model_and_tokenizer(name_or_path, dtype, to_write=True)
        nn.Module.to(model, device)
        return cls(name_or_path, model, tokenizer, chats)

    def describe(self) -> str:
        """The model in one line."""
        size = self.model.num_parameters() / 1e6
        kind = ", chats" if self.chats else ""
        return f"{self.name}: {size:.2f}M parameters, context {context_length(self.model):,} tokens{kind}"

    def prompt(self, words: str, before: Prompt | None = None) -> Prompt:
        """What a user has typed as a prompt; in a conversation it follows what was said before."""
        return [*(before or []), {"role": "user", "content": words}] if self.chats else words

    def stream(self, prompt: Prompt, sampling: SamplingSettings, count: int = 1) -> Iterator[list[str]]:
        """The new text of each of `count` continuations or answers, at each token, as `stream_text` gives it.

        Raises:
            UserError: the prompt is empty or no Unicode text, or the chat template refuses it.
        """
        ids = prompt if isinstance(prompt, str) else self._ids(prompt)
        return stream_text(self.model, self.tokenizer, ids, num_return_sequences=count, **sampling.options())

    def write(self, prompt: Prompt, sampling: SamplingSettings, count: int = 1) -> list[str]:
        """The whole texts of `stream`."""
        return whole_texts(self.stream(prompt, sampling, count))

    def _ids(self, messages: list[dict[str, str]]) -> list[int]:
        unfinished = messages[-1]["role"] == "assistant"
        try:
            ids: Any = self.tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=not unfinished,
                continue_final_message=unfinished,
                return_dict=False,
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise UserError(f"the chat template of {self.name} fails: {first_line(error)}.") from error
        return ids


def written_on(prompt: Prompt, text: str) -> Prompt:
    """The prompt with what was written on it, to be gone on with."""
    if isinstance(prompt, str):
        return prompt + text
    if prompt[-1]["role"] == "assistant":
        return [*prompt[:-1], prompt[-1] | {"content": prompt[-1]["content"] + text}]
    return [*prompt, {"role": "assistant", "content": text}]


def as_text(prompt: Prompt) -> str:
    """A prompt as it is shown and saved."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
