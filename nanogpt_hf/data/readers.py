"""Where a corpus's documents come from: files of any kind, folders, globs and Hub datasets, read as streams."""

import codecs
import glob
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, errors

from ..common.errors import UserError
from ..common.paths import nearest_path
from ..common.text import first_line, nearest
from .named_corpora import NAMES, named_text

_SUFFIXES = (".txt", ".jsonl", ".parquet")
_PART = 2**20  # bytes of a .txt file that are read at once
_NEVER_A_HUB_ID = (*_SUFFIXES, ".text", ".md", ".json", ".csv", ".tsv", ".gz", ".zip", ".zst", ".xz", ".bz2")


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


def open_source(corpus: str, text_column: str = "text") -> Source:
    """Find a corpus as `load_corpus` does, without reading more of it than is asked for.

    Raises:
        UserError: there is no such corpus; or, when it is read, no such text.
    """
    if corpus in NAMES:
        text, source, language, notice = named_text(corpus)
        return Source({"train": [[text]]}, source, language, "public domain", notice)
    path = Path(os.path.expanduser(corpus))
    if corpus and os.path.isdir(path):
        return _files(corpus, path, "**/*", text_column)
    if corpus and os.path.exists(path):
        return _source_of({"train": [path]}, text_column)
    is_pattern = [_is_pattern(part) for part in path.parts]
    if any(is_pattern):
        first = is_pattern.index(True)
        return _files(corpus, Path(*path.parts[:first]), "/".join(path.parts[first:]), text_column)
    check_corpus(corpus)
    return _hub(corpus, text_column)


def _is_pattern(part: str) -> bool:
    return any(sign in part for sign in "*?[")


def check_corpus(corpus: str) -> None:
    """Raises UserError where a name is no named corpus, nothing on the disk, and not what a Hub id looks like."""
    path = os.path.expanduser(corpus)
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?", corpus, re.ASCII)
    if corpus in NAMES or corpus and os.path.exists(path) or _is_pattern(path):
        return
    if is_id and not corpus.lower().endswith(_NEVER_A_HUB_ID) and not os.path.exists(corpus.split("/")[0]):
        return
    near = nearest(corpus, NAMES) or nearest_path(path)
    hint = f"did you mean {near}?" if near else f"named corpora are {' and '.join(NAMES)}."
    raise UserError(f"Corpus {corpus!r} is not found as a file, folder, glob or Hub dataset id; {hint}")


# --- files ---


def _files(corpus: str, root: Path, pattern: str, text_column: str) -> Source:
    """The text files under `root` that match, in sorted order, without hidden ones."""
    files: dict[Path, Path] = {}  # a file that is reached twice, by a link, is read once
    for path in [root, *sorted(root.glob(pattern), key=Path.as_posix)]:
        inside = path.relative_to(root)
        if any(part.startswith(".") for part in inside.parts):
            continue
        if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
            raise UserError(f"The folder {path.name or path} cannot be read.")
        is_text = path.suffix.lower() in _SUFFIXES and not path.is_dir()
        if is_text or path.is_symlink() and path.is_dir():
            if not path.exists() or not path.resolve().is_relative_to(root.resolve()):
                raise UserError(
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
        raise UserError(
            f"{corpus} has files for train and {held_out}, but {stray} is for neither; move it away."
        )
    else:
        used = {"train": groups["train"], "validation": groups[held_out]}
    if not any(used.values()):
        raise UserError(f"{corpus} holds no file that ends in {', '.join(_SUFFIXES)}.")
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
            raise UserError(
                f"{path.name} does not end in any of {', '.join(_SUFFIXES)}, so how to read it is unknown."
            )
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path.name} cannot be read: {error.strerror or first_line(error, 2)}.")


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
        raise UserError(f"{path.name} is not UTF-8 at byte {place}; convert it to UTF-8.") from error
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
                raise UserError(f"{where} is not JSON in UTF-8.") from error
            if not isinstance(row, dict):
                raise UserError(f"{where} is not a JSON object.")
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
        raise UserError(f"{path.name} cannot be read as parquet: {first_line(error, 2)}") from error


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
        raise UserError(
            f"{where} has no column {text_column!r}; set text_column to one of: {', '.join(columns)}."
        )


def _texts(values: Iterable[object], text_column: str, where: str) -> Iterator[list[str]]:
    for value in values:
        if value is None:
            continue
        if not isinstance(value, str):
            raise UserError(f"{where} has a {type(value).__name__} in the column {text_column!r}, not text.")
        yield [value]


# --- the Hub ---


def _hub(corpus: str, text_column: str) -> Source:
    import datasets

    repo, _, config = corpus.partition(":")
    log_in = "log in with `hf auth login`."
    try:
        info = HfApi().dataset_info(repo, timeout=5)
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{repo} is neither a path nor a dataset on the Hub; if it is private, {log_in}"
        ) from error
    except Exception as error:  # a missing network is another exception with each HTTP library
        why = (
            "HF_HUB_OFFLINE is set"
            if constants.HF_HUB_OFFLINE
            else f"the Hub gave no answer, {first_line(error, 2)}"
        )
        raise UserError(f"{repo} is not a path, and as a dataset it cannot be fetched: {why}.") from error
    try:
        data = datasets.load_dataset(repo, config or None, revision=info.sha)
    except datasets.exceptions.DatasetNotFoundError as error:
        page = f"{constants.ENDPOINT}/datasets/{repo}"
        raise UserError(f"{repo} is a gated dataset: accept its terms at {page} and {log_in}") from error
    except Exception as error:  # each format has its own
        raise UserError(f"The dataset {corpus} cannot be loaded: {first_line(error, 2)}") from error
    if "train" not in data and len(data) > 1:
        raise UserError(f"{corpus} has no train split, only {', '.join(data)}.")
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
