"""Prompts and what should follow them: rows of .jsonl files and Hub datasets, their chat template, their tokens."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from ..common.errors import UserError
from ..common.text import first_line, without_home
from .readers import json_lines
from .sources import check_corpus
from .tokenization import encode

Row = Mapping[str, Any]
ROLES = ("system", "user", "assistant")
MARKS = tuple(f"<|{role}|>" for role in ROLES)
# A message after the mark of its role; what the assistant says ends with the end-of-text token.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
COMPLETIONS = "messages, prompt and completion, or instruction and output"


class Part(NamedTuple):
    """A stretch of a rendered conversation. learned: it is to be written by the model."""

    text: str
    learned: bool


class Example(NamedTuple):
    """The token ids of a conversation, and which of them are to be written by the model; both N."""

    ids: np.ndarray
    learned: np.ndarray


@dataclass(frozen=True)
class Conversations:
    """Rows of a corpus, split for training and validation; the other fields are those of `Corpus`.

    rows: split -> rows, each with messages, or with the columns that were asked for.
    """

    name: str
    rows: dict[str, list[Row]] = field(repr=False)
    sha256: str
    source: str
    language: str | None = None
    license: str | None = None
    notice: str | None = None

    @property
    def chat(self) -> bool:
        """Whether a row holds messages, which need a chat template."""
        return any("messages" in row for rows in self.rows.values() for row in rows)

    @property
    def train(self) -> list[str]:
        """All that the model is to write, as texts."""
        return [text for row in self.rows["train"] for text in learned_texts(row)]

    @property
    def validation(self) -> list[str]:
        return [text for row in self.rows["validation"] for text in learned_texts(row)]

    def characters(self, split: str) -> int:
        return sum(map(len, getattr(self, split)))

    def ids(self, split: str, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
        """The tokens of all conversations of a split, one after the other."""
        return np.concatenate([example.ids for example in self.examples(split, tokenizer)])

    def examples(self, split: str, tokenizer: PreTrainedTokenizerFast) -> list[Example]:
        return [encode_row(tokenizer, row) for row in self.rows[split]]

    def pairs(self, split: str, tokenizer: PreTrainedTokenizerFast) -> list[tuple[Example, Example]]:
        """The chosen and the rejected text of each row, each with its prompt."""
        both = [
            [{"prompt": row["prompt"], "completion": row[side]} for side in ("chosen", "rejected")]
            for row in self.rows[split]
        ]
        return [(encode_row(tokenizer, chosen), encode_row(tokenizer, rejected)) for chosen, rejected in both]

    @property
    def validation_sha256(self) -> None:
        return None

    @property
    def reading(self) -> list[str]:
        """Lines for the first screen: what is read and what is held out."""
        rows = {name: len(split) for name, split in self.rows.items()}
        return [
            f"corpus     {self.name}: {rows['train']:,} rows, in which {self.characters('train'):,} characters are to be learned",
            f"validation {rows['validation']:,} more rows, spread over the file",
        ]

    def remarks(self, tokenizer: PreTrainedTokenizerFast) -> list[str]:
        return []

    def unseen_ids(self, tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> list[int]:
        """Those below vocab_size that the training split does not hold."""
        return np.setdiff1d(np.arange(vocab_size), self.ids("train", tokenizer)).tolist()


def load_conversations(
    corpus: str, validation_split_percentage: int, columns: Sequence[str] = ()
) -> Conversations:
    """Read the rows of a .jsonl file or a Hub dataset; every so many-th one is kept for validation.

    columns: that each row must have, all strings; without them a row has what `COMPLETIONS` says.

    Raises:
        UserError: there is no such corpus, or a row lacks what it needs.
    """
    check_corpus(corpus)
    found = _jsonl(corpus) if os.path.exists(os.path.expanduser(corpus)) else _hub(corpus)
    rows = [
        _with_columns(row, columns, where) if columns else _as_messages(row, where) for where, row in found
    ]
    every = max(2, round(100 / validation_split_percentage))
    if len(rows) < every:
        raise UserError(
            f"{corpus} has {len(rows)} rows, too few to keep some for validation: give {every} or more."
        )
    digest = hashlib.sha256("\n".join(json.dumps(row, sort_keys=True) for row in rows).encode())
    splits = {
        "train": [row for number, row in enumerate(rows, start=1) if number % every],
        "validation": rows[every - 1 :: every],
    }
    return Conversations(without_home(corpus), splits, digest.hexdigest(), Path(corpus).name)


def _jsonl(corpus: str) -> Iterable[tuple[str, Row]]:
    for where, row in json_lines(Path(os.path.expanduser(corpus))):
        if not isinstance(row, dict):
            raise UserError(f"{where} is not a JSON object.")
        yield where, row


def _hub(corpus: str) -> Iterable[tuple[str, Row]]:
    import datasets

    repo, _, config = corpus.partition(":")
    try:
        data = datasets.load_dataset(repo, config or None)
    except Exception as error:  # each format has its own
        raise UserError(f"the dataset {corpus} cannot be loaded: {first_line(error, 2)}.") from error
    rows = data["train"] if "train" in data else next(iter(data.values()))
    return ((f"row {number} of {corpus}", row) for number, row in enumerate(rows))


def _with_columns(row: Row, columns: Sequence[str], where: str) -> Row:
    for name in columns:
        if not isinstance(row.get(name), str) or not row[name]:
            raise UserError(f"{where} has no text in {name!r}: each row needs {', '.join(columns)}.")
    return {name: row[name] for name in columns}


def _as_messages(row: Row, where: str) -> Row:
    """A row with messages, or with prompt and completion, which stay as they are."""
    if "messages" in row:
        messages = row["messages"]
        fine = isinstance(messages, list) and all(
            isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str)
            for m in messages
        )
        if not fine or not any(m["role"] == "assistant" for m in messages):
            raise UserError(
                f"{where}: messages must be a list of role ({', '.join(ROLES)}) and content, one of the assistant's among "
                "them."
            )
        return {"messages": [{"role": m["role"], "content": m["content"]} for m in messages]}
    if "completion" in row:
        return _with_columns(row, ("prompt", "completion"), where)
    if "output" in row:
        given = _with_columns(row, ("instruction", "output"), where)
        asked = "\n\n".join(filter(None, [given["instruction"], str(row.get("input") or "")]))
        return {
            "messages": [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": given["output"]},
            ]
        }
    raise UserError(f"{where} has the columns {', '.join(row)}: it needs {COMPLETIONS}.")


def learned_texts(row: Row) -> list[str]:
    """What the model is to write of a row."""
    if "messages" in row:
        return [m["content"] for m in row["messages"] if m["role"] == "assistant"]
    return [row[name] for name in ("completion", "chosen") if name in row]


def render(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Mapping[str, str]]) -> list[Part]:
    """A conversation by the tokenizer's chat template, in parts that are learned and parts that are not.

    Raises:
        UserError: the template changes what came before when a message is added.
    """
    parts: list[Part] = []
    done = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        said: Any = messages
        before = str(tokenizer.apply_chat_template(said[:number], tokenize=False, add_generation_prompt=True))
        after = str(tokenizer.apply_chat_template(said[: number + 1], tokenize=False))
        if not before.startswith(done) or not after.startswith(before):
            raise UserError(
                "the chat template of the base writes a conversation anew with each message, so what the model is to "
                "write cannot be told: give prompt and completion instead of messages."
            )
        parts += [Part(before[len(done) :], False), Part(after[len(before) :], True)]
        done = after
    return parts


def encode_row(tokenizer: PreTrainedTokenizerFast, row: Row) -> Example:
    """A row's tokens. Prompt and completion stand side by side as they are, and the end-of-text token after them."""
    if "messages" in row:
        parts = [
            (tokenizer(part.text, add_special_tokens=False).input_ids, part.learned)
            for part in render(tokenizer, row["messages"])
        ]
    else:
        completion = [*encode(tokenizer, row.get("completion") or row["chosen"]), tokenizer.eos_token_id]
        parts = [(encode(tokenizer, row["prompt"]), False), (completion, True)]
    ids = np.concatenate([np.asarray(ids, dtype=np.int64) for ids, _ in parts])
    return Example(ids, np.repeat([learned for _, learned in parts], [len(ids) for ids, _ in parts]))


def share_within(kept: Sequence[Example], examples: Sequence[Example], T: int) -> float:
    """Of all tokens that examples have to learn, the share that a context of T holds of those that are kept."""
    held = sum(example.learned[1 : T + 1].sum() for example in kept)
    return float(held / sum(example.learned[1:].sum() for example in examples))


def response_template(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What of a model's text is its answer, as `transformers serve` is told; it takes any qwen3's for Qwen's own chat."""
    return {
        "defaults": {"role": "assistant"},
        "start_anchor": MARKS[ROLES.index("assistant")],
        "fields": {"content": {"close": tokenizer.eos_token, "content": "text"}},
    }


def add_chat_template(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Give a tokenizer without a chat template ours, and the marks of the roles as special tokens.

    Returns:
        Ids of the tokens that are new.
    """
    if tokenizer.chat_template is not None:
        return []
    known = tokenizer.get_vocab()
    tokenizer.add_tokens([mark for mark in MARKS if mark not in known], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.response_template = response_template(tokenizer)
    ids: list[Any] = [tokenizer.convert_tokens_to_ids(mark) for mark in MARKS]
    return [id for id in ids if id not in known.values()]
