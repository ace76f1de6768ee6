"""The model at the top of a run folder, and what shows it: card, loss curve and samples, all of one state.

It is the best by validation loss of the course that the run is on; until a model has been evaluated, that of the
newest checkpoint. Beside it lie its progress.json, which says of which step it is, and the manifest of its files.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedTokenizerFast

from ..common import files
from ..common.errors import UserError
from ..common.files import MANIFEST, files_written_whole
from .checkpoints import NEEDED, Progress, damage, read_progress, save_model, write_progress
from .reporting import read_metrics


class Show(Protocol):
    """Writes what shows a model: its card, the loss curve and samples."""

    def __call__(self, model: Path, target: Path, last: bool = False) -> None:
        """Write what shows the model in one folder into another; all of it, if need be, where it is the `last` time."""
        ...


WEIGHTS = ("model.safetensors", "adapter_model.safetensors")
OF_A_STATE = ("README.md", "loss_curve.png", "samples.txt")


def show_nothing(model: Path, target: Path, last: bool = False) -> None:
    """For a run without card, loss curve and samples."""


def replace_best(
    accelerator: Accelerator,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    progress: Progress,
    folder: Path,
    show: Show,
) -> None:
    """Put the model as it is now at the top of the run folder, together with what shows it. Every process calls it."""
    if not accelerator.is_main_process:
        return save_model(accelerator, model, tokenizer, folder)
    with files_written_whole(folder, manifest=True, instead_of=OF_A_STATE) as staging:
        save_model(accelerator, model, tokenizer, staging)
        write_progress(progress, staging)
        show(staging, staging)


def show_best(folder: Path, show: Show, last: bool = True) -> None:
    """Write anew what shows the model at the top of the run folder.

    Args:
        last: the run stops or has ended; otherwise it has gone on without a better one.
    """
    with files_written_whole(folder) as staging:
        show(folder, staging, last)


@dataclass(frozen=True)
class Repair:
    """What has to be done to the top of a run folder before the run goes on.

    Attributes:
        checkpoint: whose files are to be put there.
        weights: whether its weights too; otherwise those at the top are right.
        reason: what is wrong at the top; None where it is empty.
    """

    checkpoint: Path
    weights: bool = True
    reason: str | None = None


def find_repair(folder: Path, checkpoint: Path, progress: Progress) -> Repair | None:
    """What the top lacks of being the best model of the course that leads to a checkpoint, None for nothing.

    Where the best model is neither there nor in a checkpoint of its own, `progress` forgets it, and the model of the
    checkpoint stands in for it.
    """
    reason = None
    if any((folder / name).exists() for name in WEIGHTS):
        reason = _what_is_wrong(folder, progress)
        if reason is None:
            return None
        if (folder / MANIFEST).exists() and _what_is_wrong(
            folder, progress, chosen=_is_weights_or_state
        ) is None:
            return Repair(checkpoint, weights=False, reason=reason)
    best = checkpoint.with_name(f"step-{progress.best_step}")
    if progress.best_step is not None and damage(best) is None:
        if read_progress(best).best_loss == progress.best_loss:
            return Repair(best, reason=reason)
    progress.best_loss = progress.best_step = None
    return Repair(checkpoint, reason=reason)


def repair_best(repair: Repair, progress: Progress, folder: Path, show: Show) -> list[str]:
    """Do it, and say so in a line, unless the top was empty. Only the first process calls it."""
    source = repair.checkpoint
    with files_written_whole(
        folder, manifest=True, instead_of=OF_A_STATE if repair.weights else ()
    ) as staging:
        for path in source.iterdir():
            if path.name not in (*NEEDED, MANIFEST):
                right = path if repair.weights or path.name not in WEIGHTS else folder / path.name
                shutil.copy(right, staging)
        if not repair.weights:
            shutil.copy(folder / "progress.json", staging)
        else:
            write_progress(progress if progress.best_step is None else read_progress(source), staging)
            show(staging, staging)
    if repair.reason is None:
        return []
    until = ", until one is evaluated" if progress.best_step is None else ""
    what = (
        f"{source.name} takes its place{until}" if repair.weights else f"its files are those of {source.name}"
    )
    return [f"warning: the best model in {folder} is not what it should be ({repair.reason}): {what}."]


def _is_weights_or_state(name: str) -> bool:
    return name in (*WEIGHTS, "progress.json")


def _what_is_wrong(
    folder: Path, progress: Progress, chosen: Callable[[str], bool] = lambda name: True
) -> str | None:
    """Why the top of a run folder is not the best model of a course, or None.

    Args:
        chosen: which of its files are looked at.
    """
    if not (folder / MANIFEST).exists():
        return _what_is_wrong_without_manifest(folder, progress)
    if reason := files.damage(folder, ["progress.json"], chosen):
        return reason
    try:
        top = read_progress(folder)
    except UserError as error:
        return str(error)
    expected = progress.step if progress.best_step is None else progress.best_step
    if (top.step, top.best_loss) != (expected, progress.best_loss):
        return f"it is of step {top.step}, of a course that is left"
    return None


def _what_is_wrong_without_manifest(folder: Path, progress: Progress) -> str | None:
    """The same for a folder of an earlier version, where metrics.jsonl has to tell which step is at the top."""
    try:
        for name in ("config.json", "tokenizer.json"):
            if (folder / name).exists():
                json.loads((folder / name).read_text(encoding="utf-8"))
        for name in WEIGHTS:
            if (folder / name).exists():
                with safe_open(folder / name, "pt"):
                    pass
    except (OSError, ValueError, SafetensorError, RecursionError):
        return f"{name} cannot be read"
    evaluated = [row for row in read_metrics(folder / "metrics.jsonl") if "eval_loss" in row]
    best = min(evaluated, key=lambda row: row["eval_loss"], default={"step": None})
    if best["step"] == progress.best_step:
        return None
    return f"it is of step {best['step']}, of a course that is left"
