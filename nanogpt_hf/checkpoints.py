"""Checkpoints that are whole or not there, verified when read, and enough to go on exactly.

A checkpoint folder holds the model as transformers saves it, the optimisers' state in safetensors, the progress
of the run in JSON, and a manifest of every file's size and SHA-256. It is written under another name and renamed.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from transformers import PreTrainedTokenizerFast

MANIFEST = "manifest.json"
FULL_ON_CPU = StateDictOptions(full_state_dict=True, cpu_offload=True)


@dataclass
class Progress:
    """Where a run is. Batches, learning rates and random numbers follow from `step`, so it is all there is."""

    step: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    elapsed_s: float = 0.0
    # What must be the same to go on: corpus, tokenizer, model, seed, tokens a step.
    identity: dict = field(default_factory=dict)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    if os.name == "posix":  # Windows cannot open a folder, and commits renames by itself
        _sync(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _staging(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    for left_over in parent.glob(".unfinished-*"):
        shutil.rmtree(left_over)
    staging = parent / f".unfinished-{os.getpid()}"
    staging.mkdir()
    return staging


@contextmanager
def _disk_errors() -> Iterator[None]:
    """safetensors reports a full disk in an exception of its own."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(errno.EIO, f"the weights could not be written ({error})") from error


@contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes its name only when it is complete and on the disk."""
    staging = _staging(folder.parent)
    try:
        with _disk_errors():
            yield staging
        files = sorted(path for path in staging.iterdir() if path.is_file())
        manifest = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in [*files, staging / MANIFEST]:
            _sync(path)
        _sync_folder(staging)
        if folder.exists():
            shutil.rmtree(folder)
        staging.rename(folder)
        _sync_folder(folder.parent)
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
            _sync(path)
            os.replace(path, folder / path.name)
        _sync_folder(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if _sha256(path) != expected["sha256"]:
                return f"{name} does not have the SHA-256 of the manifest"
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return f"{MANIFEST} is missing or cannot be read"
    return None


def step_of(folder: Path) -> int:
    number = folder.name.removeprefix("step-")
    return int(number) if number.isascii() and number.isdigit() else -1


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders in a folder, oldest first."""
    return sorted((path for path in folder.glob("step-*") if step_of(path) >= 0), key=step_of)


def newest_good(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint in a folder, and a sentence for each damaged one that is newer."""
    complaints = []
    for path in reversed(list_checkpoints(folder)):
        reason = damage(path)
        if reason is None:
            return path, complaints
        complaints.append(f"{path} is damaged ({reason}) and was passed over.")
    return None, complaints


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints. The newest has just been written, so a good one stays."""
    for path in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(path)


def save_model(accelerator: Accelerator, model, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Model and tokenizer as transformers (or peft) saves them. Every process calls it, the first one writes."""
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)


def load_weights(model, folder: Path) -> None:
    """The weights that `save_model` wrote, into a model of the same shape."""
    if (folder / "adapter_model.safetensors").exists():
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
        return
    result = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    missing = set(result.missing_keys) - set(model._tied_weights_keys or ())
    if missing or result.unexpected_keys:
        raise ValueError(f"{folder} holds the weights of another model ({sorted(missing | set(result.unexpected_keys))[0]}).")


def save_checkpoint(accelerator: Accelerator, model, optimizers, tokenizer, progress: Progress, folder: Path) -> None:
    """Everything to go on from progress.step. Every process calls it, the first one writes."""
    state = get_optimizer_state_dict(model, optimizers, options=FULL_ON_CPU)
    if not accelerator.is_main_process:
        save_model(accelerator, model, tokenizer, folder)
        return
    with folder_written_whole(folder) as staging:
        save_model(accelerator, model, tokenizer, staging)
        tensors = {
            f"{parameter}/{name}": torch.as_tensor(value).contiguous()
            for parameter, values in state["state"].items()
            for name, value in values.items()
        }
        save_file(tensors, staging / "optimizer.safetensors")
        (staging / "progress.json").write_text(json.dumps(asdict(progress), indent=1), encoding="utf-8")


def read_progress(folder: Path) -> Progress:
    """Raises ValueError when the file is not one that this version writes."""
    try:
        return Progress(**json.loads((folder / "progress.json").read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} has no progress.json of this version: it cannot be resumed.") from error


def load_checkpoint(model, optimizers, folder: Path) -> None:
    """Put a checkpoint's weights and optimiser state into a prepared model and its optimisers.

    Learning rates and the like stay as the optimisers were made: they are settings, not state.
    """
    load_weights(model.module if hasattr(model, "module") else model, folder)
    state: dict[str, dict] = {}
    for key, tensor in load_file(folder / "optimizer.safetensors").items():
        parameter, name = key.rsplit("/", 1)
        state.setdefault(parameter, {})[name] = tensor
    groups = get_optimizer_state_dict(model, optimizers, options=FULL_ON_CPU)["param_groups"]
    set_optimizer_state_dict(model, optimizers, {"state": state, "param_groups": groups}, options=FULL_ON_CPU)
