"""Where a corpus's documents come from: a named corpus, files, folders, globs and Hub datasets, read as streams."""

import os
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

from huggingface_hub import HfApi, constants, errors

from ..common.errors import UserError
from ..common.paths import nearest_path
from ..common.reading_options import USUAL_READING, ReadingOptions
from ..common.text import first_line, nearest
from .named_corpora import NAMES, named_text
from .readers import CONVERSIONS, READERS, Reading, Text, column_of, kind_of, read_file, texts, why_unread
from .splits import cut_at_marks, with_plain_newlines

Documents = Iterable[Text]

_NEVER_A_HUB_ID = (*READERS, *CONVERSIONS, ".text", ".md", ".gz")
# Words in the name of a file or folder that say which split it is.
_SPLIT_WORDS = {
    "train": "train",
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    "test": "test",
}


@dataclass
class Source:
    """The documents of a corpus, still to be read.

    Attributes:
        splits: of "train" and, where it is known already, "validation", the documents of each file.
        source: pinned URL, Hub id@revision, or base names of the files.
        files: those that are read, of "train" first; none of a named corpus or a dataset.
        skipped: the files that are not read, by the reason why.
        held_out: where the validation split comes from, in words; None where it is still to be cut off.
        split_is_new: whether the first versions would have split these files otherwise, which a run that goes on
            has to know: they cut off the end of all files together, and knew fewer names.
        size: bytes of the files, or rows of the dataset.
        reading: what has been read so far.
    """

    splits: dict[str, list[Documents]]
    source: str
    language: str | None = None
    license: str | None = None
    notice: str | None = None
    files: list[Path] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)
    held_out: str | None = None
    split_is_new: bool = False
    size: int = 0
    reading: Reading = field(default_factory=Reading)


def open_source(corpus: str, **options: Unpack[ReadingOptions]) -> Source:
    """Find a corpus, without reading more of it than is asked for. The arguments are those of `load_corpus`.

    Raises:
        UserError: there is no such corpus; or, when it is read, no such text.
    """
    options = {**USUAL_READING, **options}
    text_column, validation_file = options["text_column"], options["validation_file"]
    reading = Reading()
    if validation_file is None:
        source = _find(corpus, text_column, reading)
    else:
        source = _find_both(corpus, validation_file, text_column, reading)
    for split, files in source.splits.items():
        if not options["keep_carriage_returns"]:
            files = [with_plain_newlines(documents, reading) for documents in files]
        if options["special_tokens_in_text"] == "document_ends":
            files = [cut_at_marks(documents, reading) for documents in files]
        source.splits[split] = files
    return source


def _find_both(corpus: str, validation_file: str, text_column: str, reading: Reading) -> Source:
    """A corpus with the text of its validation in a file, folder or glob of its own."""
    check_corpus(validation_file, "--validation_file")
    held_out = _find(validation_file, text_column, reading, own_splits=False)
    source = _find(corpus, text_column, reading, without={os.path.realpath(path) for path in held_out.files})
    train = source.splits["train"]
    if not train:
        raise UserError(f"--validation_file {validation_file} leaves nothing of {corpus} to train on.")
    if "validation" in source.splits:
        unused = [path.name for path in source.files[len(train) :]] or [f"{source.held_out}"]
        source.skipped["--validation_file is in their place"] = unused
        source.files = source.files[: len(train)]
    source.splits = {"train": train, "validation": held_out.splits["train"]}
    source.held_out = f"all of {held_out.source}"
    source.split_is_new = True
    source.files += held_out.files
    source.size += held_out.size
    return source


def _find(
    corpus: str, text_column: str, reading: Reading, own_splits: bool = True, without: Collection[str] = ()
) -> Source:
    """A corpus as it lies there.

    Args:
        own_splits: keep the splits that it has; else all of it is "train".
        without: real paths of files that are left out.
    """
    if corpus in NAMES:
        text, source, language, notice = named_text(corpus)
        return Source({"train": [[[text]]]}, source, language, "public domain", notice, reading=reading)
    path = Path(os.path.expanduser(corpus))
    if corpus and os.path.isdir(path):
        return _files(corpus, path, "**/*", text_column, reading, own_splits, without)
    if corpus and os.path.exists(path):
        return _source_of(
            {"train": [] if os.path.realpath(path) in without else [path]}, text_column, reading
        )
    is_pattern = [_is_pattern(part) for part in path.parts]
    if any(is_pattern):
        first = is_pattern.index(True)
        root, pattern = Path(*path.parts[:first]), "/".join(path.parts[first:])
        return _files(corpus, root, pattern, text_column, reading, own_splits, without)
    check_corpus(corpus)
    return _hub(corpus, text_column, reading, own_splits)


def _is_pattern(part: str) -> bool:
    return any(sign in part for sign in "*?[")


def check_corpora(corpus: str | None, validation_file: str | None) -> None:
    """Raises UserError where one of the two is given and is not there."""
    for name, what in ((corpus, "Corpus"), (validation_file, "--validation_file")):
        if name is not None:
            check_corpus(name, what)


def check_corpus(corpus: str, what: str = "Corpus") -> None:
    """Raises UserError where a name is no named corpus, nothing on the disk, and not what a Hub id looks like."""
    path = os.path.expanduser(corpus)
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?", corpus, re.ASCII)
    if corpus in NAMES or corpus and os.path.exists(path) or _is_pattern(path):
        return
    if "\0" not in path and os.path.islink(path):
        raise UserError(f"{what} {corpus!r} is a link that leads nowhere; give the file itself.")
    if is_id and not corpus.lower().endswith(_NEVER_A_HUB_ID) and not os.path.exists(corpus.split("/")[0]):
        return
    near = nearest(corpus, NAMES) or nearest_path(path)
    hint = f"did you mean {near}?" if near else f"named corpora are {' and '.join(NAMES)}."
    raise UserError(f"{what} {corpus!r} is not found as a file, folder, glob or Hub dataset id; {hint}")


# --- files ---


def _files(
    corpus: str,
    root: Path,
    pattern: str,
    text_column: str,
    reading: Reading,
    own_splits: bool,
    without: Collection[str],
) -> Source:
    """The files under `root` that match and can be read, in sorted order, without hidden ones."""
    files: dict[str, Path] = {}  # a file that is reached twice, by a link, is read once
    skipped: dict[str, list[str]] = {}
    for path in [root, *sorted(root.glob(pattern), key=Path.as_posix)]:
        inside = path.relative_to(root)
        if any(part.startswith(".") for part in inside.parts) or not os.path.lexists(path):
            continue
        reason = _why_skipped(corpus, root, path)
        if reason:
            skipped.setdefault(reason, []).append(str(inside))
        elif not path.is_dir():
            files.setdefault(os.path.realpath(path), path)
    chosen = [path for real, path in files.items() if real not in without]
    used, held_out = _by_name(corpus, root, chosen, skipped) if own_splits else ({}, None)
    source = _source_of(used or {"train": chosen}, text_column, reading)
    source.skipped, source.held_out = skipped, held_out
    source.split_is_new = (
        not all(_named_as_before(path.relative_to(root)) for path in source.files)
        if used
        else len(chosen) > 1
    )
    if not files:
        found = f"; not read: {list_skipped(skipped)}" if skipped else ""
        raise UserError(f"{corpus} holds no file that can be read{found}.")
    return source


def _why_skipped(corpus: str, root: Path, path: Path) -> str | None:
    """Why a path under `root` is not read; None for what is, and for folders.

    Raises:
        UserError: it is surely meant to be read, and cannot be.
    """
    if not path.exists() or not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        if kind_of(path) in READERS or path.is_dir():
            inside = path.relative_to(root)
            raise UserError(
                f"{inside} in {corpus} is a link out of it or to nothing; put a copy in its place."
            )
        return "a link out of the folder or to nothing"
    if not path.is_dir():
        return why_unread(path)
    if not path.is_symlink() and not os.access(path, os.R_OK | os.X_OK):
        raise UserError(f"The folder {path.name or path} cannot be read.")
    return None


def _by_name(
    corpus: str, root: Path, files: list[Path], skipped: dict[str, list[str]]
) -> tuple[dict[str, list[Path]], str | None]:
    """The files of each split, and where the validation split is, where the files' names say it."""
    groups: dict[str | None, list[Path]] = {}
    for path in files:
        groups.setdefault(split_named(path.relative_to(root)), []).append(path)
    held_out = next((name for name in ("validation", "test") if name in groups), None)
    if "train" not in groups or held_out is None:
        return {}, None
    used = {"train": groups["train"], "validation": groups[held_out]}
    kinds = {kind_of(path) for group in used.values() for path in group}
    for path in groups.get(None, []):
        if kind_of(path) in kinds:
            raise UserError(
                f"{corpus} has files for train and {held_out}, but {path.name} is for neither; move it away."
            )
        skipped.setdefault("in neither split", []).append(str(path.relative_to(root)))
    if held_out != "test":
        for path in groups.get("test", []):
            skipped.setdefault("of the test split", []).append(str(path.relative_to(root)))
    return used, list_files([path.name for path in used["validation"]])


def split_named(path: Path) -> str | None:
    """The split that a file's or a folder's name says: train.txt, my_val.txt, test-00000-of-00002.parquet."""
    for part in path.parts:
        words = re.findall(r"[^\W\d_]+", part.lower())
        named = {_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS}
        if len(named) == 1:
            return named.pop()
    return None


def _named_as_before(path: Path) -> bool:
    """Whether the first versions saw the split in a file's name."""
    plain = r"(train|validation|valid|val|dev|test)(-\d+-of-\d+)?"
    return any(re.fullmatch(plain, part.lower()) for part in path.with_suffix("").parts)


def _source_of(files: dict[str, list[Path]], text_column: str, reading: Reading) -> Source:
    paths = [path for group in files.values() for path in group]
    source = Source({}, list_files([path.name for path in paths]), files=paths, reading=reading)
    source.size = sum(path.stat().st_size for path in paths)
    for name, group in files.items():
        source.splits[name] = [read_file(path, text_column, reading) for path in group]
    return source


def list_files(names: list[str]) -> str:
    return ", ".join(names) if len(names) < 5 else f"{names[0]} … {names[-1]} ({len(names)} files)"


def list_skipped(skipped: dict[str, list[str]]) -> str:
    return ", ".join(f"{list_files(names)} ({reason})" for reason, names in skipped.items())


# --- the Hub ---


def _hub(corpus: str, text_column: str, reading: Reading, own_splits: bool) -> Source:
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
    if "train" in data and held_out and own_splits:
        used["validation"] = held_out
    card: Any = info.card_data or {}
    language, license = _only(card.get("language")), _only(card.get("license"))
    source = Source({}, f"{repo}@{info.sha}", language, license, reading=reading)
    source.held_out = f"its {held_out} split" if "validation" in used else None
    for ours, theirs in used.items():
        source.splits[ours] = [_rows(data[theirs], text_column, corpus, reading)]
        source.size += len(data[theirs])
    return source


def _rows(rows: Any, text_column: str, where: str, reading: Reading) -> Iterator[Text]:
    """The texts of one split of a dataset."""
    column = column_of(rows.column_names, text_column, where)
    for batch in rows.select_columns(column).iter(batch_size=1000):
        reading.finished += len(batch[column])
        yield from texts(batch[column], column, where, reading)


def _only(value: str | list[str] | None) -> str | None:
    """The value of a card's field, which may be a list, when there is exactly one."""
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    return value if isinstance(value, str) else None
