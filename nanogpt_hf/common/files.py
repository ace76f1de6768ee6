"""Files and folders that are whole or not there, verified when read, and one writer at a time.

What is being written has another name, and beside it lies a lock that its process holds: when the process has died,
the next writer there puts what was complete in its place and deletes the rest.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import UserError
from .text import first_line

MANIFEST = "manifest.json"  # of what was written together: the size and SHA-256 of each file
SHOWN = ("README.md", "loss_curve.png", "samples.txt", "samples_before.txt")  # for people, who may edit them
UNFINISHED = ".nanogpt_hf-"  # how the names of what is not in its place begin
_UMASK = os.umask(0)
os.umask(_UMASK)


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
    with _staging(folder.parent) as staging:
        folder.rename(staging / folder.name)


# --- one writer ---


@contextmanager
def _held(lock: Path, wait: float = 10.0) -> Iterator[bool]:
    """A context that one process at a time is in; one that has died is not in it any more.

    It gives whether that is certain: some network disks know no locks.

    Raises:
        Timeout: another process is in it for longer than `wait` seconds.
    """
    held = FileLock(lock, timeout=wait)
    try:
        held.acquire()
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise
    try:
        yield held.is_locked
    finally:
        if held.is_locked:
            lock.unlink(missing_ok=True)  # before it is free: who has waited for it sees that it is gone
        held.release()


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """A context that one process at a time is in for a folder, which is made if need be, and goes if it stays empty.

    Raises:
        UserError: another process is in it, or the folder cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give a folder.")
    lock = folder / f"{UNFINISHED}writer.lock"
    with ExitStack() as stack:
        stack.callback(_delete_empty, [path for path in (folder, *folder.parents) if not path.exists()])
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_held(lock, wait=0))
        except Timeout as error:
            raise UserError(
                f"{folder} is being written by {_holder(lock)}: wait until that has ended, or use another folder."
            ) from error
        except OSError as error:
            raise UserError(f"{folder} cannot be written ({error.strerror}): give another folder.") from error
        with suppress(OSError):  # of a full disk
            lock.write_text(f"process {os.getpid()} of {socket.gethostname()}", encoding="utf-8")
        yield


def check_no_writer(folder: Path) -> None:
    """Raises UserError when another process is `one_writer` of the folder; changes nothing."""
    lock = folder / f"{UNFINISHED}writer.lock"
    if lock.exists():
        with one_writer(folder):
            pass


def _holder(lock: Path) -> str:
    with suppress(OSError):
        return lock.read_text(encoding="utf-8", errors="replace") or "another process"
    return "another process"


def _delete_empty(folders: list[Path]) -> None:
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


# --- whole or not there ---


@contextmanager
def _staging(parent: Path) -> Iterator[Path]:
    """A folder to write into, which goes when the context ends; one that dies in it leaves it to the next."""
    parent.mkdir(parents=True, exist_ok=True)
    delete_left_overs(parent)
    staging = parent / f"{UNFINISHED}{secrets.token_hex(4)}"
    with _held(staging.with_suffix(".lock")), _disk_errors():
        staging.mkdir()
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def delete_left_overs(parent: Path) -> None:
    """What processes that have died had not finished to write or to delete; what was complete takes its place."""
    for lock in {path.with_suffix(".lock") for path in parent.glob(f"{UNFINISHED}*")}:
        with suppress(Timeout), _held(lock, wait=0) as dead:
            if not dead:
                continue
            complete = lock.with_suffix(".complete")
            if complete.is_dir() and not complete.is_symlink():
                _move_files(complete, parent)
            for path in (complete, lock.with_suffix("")):
                delete(path)


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
    """A folder to write into, which takes its name, and a manifest, only when it is complete and on the disk."""
    with _staging(folder.parent) as staging:
        yield staging
        _write_manifest(staging)
        _sync_files(staging)
        if os.path.lexists(folder):
            delete_at_once(folder)
        staging.rename(folder)
        sync_folder(folder.parent)


@contextmanager
def files_written_whole(
    folder: Path, manifest: bool = False, instead_of: Collection[str] = ()
) -> Iterator[Path]:
    """A folder to write files into, which then replace those of the same name in `folder`: all of them or none.

    Once they are complete on the disk they are put into their places, one after another; where that is cut short,
    the next writer does the rest.

    Args:
        manifest: write the manifest of these files too.
        instead_of: names of files that are deleted where no new ones are written.
    """
    with _staging(folder) as staging:
        yield staging
        if manifest:
            _write_manifest(staging)
        _sync_files(staging)
        for path in staging.iterdir():
            if (folder / path.name).is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(folder / path.name))
        for name in instead_of:
            if not (staging / name).exists():
                delete(folder / name)
        complete = staging.rename(staging.with_suffix(".complete"))
        sync_folder(folder)
        _move_files(complete, folder)


def written_if_possible(
    path: Path, write: Callable[[Path], object], tell: Callable[[str], object] = print
) -> None:
    """Write a file that is there to be looked at: where that fails it is left out, said in a line, and costs nothing else."""
    try:
        write(path)
    except Exception as error:
        path.unlink(missing_ok=True)
        tell(f"warning: {path.name} is left out ({type(error).__name__}: {first_line(error)}).")


def _move_files(complete: Path, folder: Path) -> None:
    """The manifest goes last: until then what it says of a file, or what the new one says, is true."""
    for path in sorted(complete.iterdir(), key=lambda path: (path.name == MANIFEST, path.name)):
        os.replace(path, folder / path.name)
    sync_folder(folder)
    complete.rmdir()


def as_umask_says(path: Path) -> None:
    """Let others read a file as usual: safetensors lets nobody."""
    path.chmod(0o666 & ~_UMASK)


def _sync_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            as_umask_says(path)
            sync(path)
        else:
            sync_folder(path)
    sync_folder(folder)


# --- verified ---


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name not in SHOWN)
    manifest = {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def check_whole(folder: str | os.PathLike, chosen: Callable[[str], bool]) -> None:
    """Raises UserError where a folder has a manifest, and a chosen file is not what it says."""
    folder = Path(folder)
    reason = damage(folder, chosen=chosen) if (folder / MANIFEST).exists() else None
    if reason:
        way_out = "copy it, or make it, again"
        if (folder / "checkpoints").is_dir():
            way_out = "give one of its checkpoints, or go on with the run (--resume_from_checkpoint last), which mends it"
        raise UserError(
            f"{folder} is damaged ({reason}): {way_out}; if you have changed it yourself, delete its {MANIFEST}."
        )


def damage(
    folder: Path, needed: Collection[str] = (), chosen: Callable[[str], bool] = lambda name: True
) -> str | None:
    """What is wrong with a folder that has a manifest, or None.

    Args:
        needed: files that the manifest must name.
        chosen: which of the files are looked at.
    """
    # Of files that are just being replaced some may be the new ones.
    newer = [path / MANIFEST for path in folder.glob(f"{UNFINISHED}*.complete")]
    try:
        manifests = [_read_manifest(path) for path in (folder / MANIFEST, *filter(Path.exists, newer))]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"{MANIFEST} is missing or cannot be read"
    for name in needed:
        if name not in manifests[0]:
            return f"{name} is missing"
    for name in filter(chosen, manifests[0]):
        if Path(name).name != name:
            return f"{MANIFEST} names {name!r}, which is not a file of the folder"
        reasons = [_difference(folder / name, *manifest[name]) for manifest in manifests if name in manifest]
        if all(reasons):
            return reasons[0]
    return None


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    manifest = json.loads(path.read_text(encoding="utf-8"))
    return {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}


def _difference(path: Path, size: int, digest: str) -> str | None:
    """What tells a file from one of that size and SHA-256, or None."""
    if not path.is_file():
        return f"{path.name} is missing"
    try:
        if path.stat().st_size != size:
            return f"{path.name} has {path.stat().st_size} bytes instead of {size}"
        if file_sha256(path) != digest:
            return f"{path.name} does not have the SHA-256 of the manifest"
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"
    return None
