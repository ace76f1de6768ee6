"""The commands of a run: those that made it, as they may be shown, and the one that goes on with it."""

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from ..common.recipes import command, recipes
from ..common.settings import OF_A_START
from ..common.text import printable, without_home

PATHS = ("corpus", "validation_file", "tokenizer", "model_name_or_path", "config", *OF_A_START)


def going_on(folder: Path) -> str:
    """What to type to go on with the run in a folder; what it does not say, the run's own settings do."""
    name, alone = _recipe(), os.environ.get("WORLD_SIZE", "1") == "1"
    if name is None or not alone:  # how several processes were launched they are not told
        return "the same command and --resume_from_checkpoint last"
    return f"{command(name)} --output_dir {shlex.quote(str(folder))} --resume_from_checkpoint last"


def commands(earlier: dict | None, step: int, changed: dict[str, list]) -> dict[str, Any]:
    """The command that the run began with, and those that it went on with: from which step, and what they changed.

    Args:
        earlier: what was in run.yaml; None for a run that begins.
    """
    this = command_line()
    if earlier is None:
        return {"command": this}
    record = earlier.get("record")
    record = record if isinstance(record, dict) else {}
    history = record.get("history")
    before = [
        entry
        for entry in (history if isinstance(history, list) else [])
        if isinstance(entry, dict) and isinstance(entry.get("step"), int) and entry["step"] <= step
    ]
    return {
        "command": record.get("command"),
        "history": [*before, {"step": step, "command": this, "changed": changed}],
    }


def _recipe() -> str | None:
    """The recipe that this process runs, if it does."""
    script = Path(sys.argv[0])
    path = recipes().get(script.stem)
    return script.stem if path and path.resolve() == script.resolve() else None


def command_line() -> str | None:
    """The command of this process as it may be shown, if it is one of the recipes: how it was launched, and names
    instead of paths that only this machine has."""
    name, processes = _recipe(), os.environ.get("WORLD_SIZE", "1")
    if name is None:
        return None
    start = command(name)
    launcher = None
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        launcher = "accelerate launch" + (f" --num_processes {processes}" if processes != "1" else "")
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = f"torchrun --nproc_per_node {processes}"
    if launcher:
        start = re.sub("^python", launcher, re.sub("^nanogpt ", f"{launcher} -m nanogpt_hf ", start))
    return f"{start} {shlex.join(_without_paths(sys.argv[1:]))}".strip()


def _without_paths(words: list[str]) -> list[str]:
    """A command line whose paths from the root, the home or above are their last parts."""
    shown, setting = [], ""
    for word in words:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        setting = flag.removeprefix("--").replace("-", "_") or setting
        value = without_home(printable(value))
        if setting in PATHS and (os.path.isabs(value) or value.startswith(("~", os.pardir))):
            value = os.path.basename(value.rstrip("/\\"))
        shown.append(flag + equals + value)
    return shown
