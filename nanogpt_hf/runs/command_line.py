"""The settings of the training recipes, checked before anything slow is imported."""

import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from ..common.cli import Values, parse, read_yaml
from ..common.errors import UserError
from ..common.paths import check_model_name
from ..common.settings import RunSettings
from ..data.sources import check_corpus

R = TypeVar("R", bound=RunSettings)

# Of a run.yaml, what says where and how a run is started, and not what it is.
OF_A_START = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint")


def read_settings(cls: type[R], description: str | None, defaults: Callable[[Values], Values] | Values) -> R:
    """The settings of a training recipe; what is not said of a run that goes on comes from its run.yaml.

    Args:
        defaults: as `parse` takes them.

    Raises:
        UserError: a mistake on the command line, or a path that is not there.
    """
    return parse(cls, description, defaults=defaults, check=check_paths, earlier=lambda v: earlier(cls, v))


def check_paths(said: Values) -> None:
    """Raises UserError where something that the user has named is not there."""
    for name, what in (("corpus", "Corpus"), ("validation_file", "--validation_file")):
        if said.get(name):
            check_corpus(said[name], what)
    for name in ("model_name_or_path", "tokenizer"):
        if said.get(name) and said[name] not in ("char", "bpe"):
            check_model_name(said[name])
    if said.get("resume_from_checkpoint") not in (None, "last") and not os.path.isdir(
        os.path.expanduser(said["resume_from_checkpoint"])
    ):
        raise UserError(
            f"there is no checkpoint {said['resume_from_checkpoint']}: give last, or the folder of one."
        )


def earlier(cls: type[RunSettings], values: Values) -> dict[str, Any]:
    """The settings of the run that --resume_from_checkpoint goes on with, none for a new run."""
    checkpoint = values["resume_from_checkpoint"]
    if checkpoint is None:
        return {}
    folder = Path(cls(**values).folder())
    if checkpoint != "last":
        folder = Path(os.path.expanduser(checkpoint)).resolve().parents[1]
    if not (folder / "run.yaml").exists():
        return {}
    saved = read_yaml(folder / "run.yaml", [item.name for item in fields(cls)], cls.RETIRED)
    return {name: value for name, value in {**cls.BEFORE, **saved}.items() if name not in OF_A_START}


def size_here(said: Values) -> str:
    """The preset that the user has named, or the one that suits the hardware: cpu, or baby with a GPU."""
    return preset_here(said, without_gpu="cpu", with_gpu="baby")


def preset_here(said: Values, without_gpu: str, with_gpu: str) -> str:
    """The preset that the user has named, or the one of two that suits the hardware."""
    if said.get("preset"):
        return said["preset"]
    from ..training.hardware import device_type

    return without_gpu if device_type(bool(said.get("use_cpu"))) == "cpu" else with_gpu
