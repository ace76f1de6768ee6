"""Files and folders that are whole or not there: written under another name, put on the disk, and renamed."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MANIFEST = "manifest.json"  # of a folder written whole: the size and SHA-256 of each file


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    if os.name == "posix":  # Windows cannot open a folder, and commits renames by itself
        sync(path)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def delete(path: Path) -> None:
    """Delete a file, a folder, or a link but not what it leads to; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def delete_at_once(folder: Path) -> None:
    """A checkpoint that is cut short while it is deleted must not look like a damaged one."""
    aside = folder.with_name(f".unfinished-{folder.name}")
    delete(aside)
    folder.rename(aside)
    delete(aside)


def delete_left_overs(parent: Path) -> None:
    """What a process that was killed had not finished to write or to delete."""
    for left_over in parent.glob(".unfinished-*"):
        delete(left_over)


def _staging(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    delete_left_overs(parent)
    staging = parent / f".unfinished-{os.getpid()}"
    staging.mkdir()
    return staging


@contextmanager
def _disk_errors() -> Iterator[None]:
    """safetensors reports a full disk in an exception of its own, tokenizers in a bare one."""
    try:
        yield
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


@contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes its name only when it is complete and on the disk."""
    staging = _staging(folder.parent)
    try:
        with _disk_errors():
            yield staging
        files = sorted(path for path in staging.iterdir() if path.is_file())
        manifest = {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files}
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in [*files, staging / MANIFEST]:
            sync(path)
        sync_folder(staging)
        if os.path.lexists(folder):
            delete_at_once(folder)
        staging.rename(folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextmanager
def files_written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write files into, which then replace those of the same name in `folder`, each at once."""
    staging = _staging(folder)
    try:
        with _disk_errors():
            yield staging
        for path in sorted(staging.iterdir()):
            sync(path)
            os.replace(path, folder / path.name)
        sync_folder(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
