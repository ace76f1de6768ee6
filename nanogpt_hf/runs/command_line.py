"""The settings of the training recipes, checked before anything slow is imported."""

import functools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from ..common.cli import Values, parse, read_yaml
from ..common.errors import UserError
from ..common.files import check_no_writer, damage
from ..common.paths import check_model_name, check_repo_id
from ..common.presets import find_preset
from ..common.settings import OF_A_START, DataSettings, RunSettings
from ..data.sources import check_corpora
from ..data.splits import compiled
from ..training.used_folder import check_usable

R = TypeVar("R", bound=RunSettings)
SHAPE = "architecture n_layer n_head n_kv_head head_dim n_embd n_inner".split()  # which a base brings with it


def read_settings(cls: type[R], description: str | None, defaults: Callable[[Values], Values] | Values) -> R:
    """The settings of a training recipe; what is not said of a run that goes on comes from its run.yaml.

    Args:
        defaults: as `parse` takes them.

    Raises:
        UserError: a mistake on the command line, a path that is not there, or a folder that another run writes into.
    """
    defaults = for_a_base(defaults) if callable(defaults) else defaults
    settings = parse(
        cls, description, defaults=defaults, check=check_paths, earlier=lambda v: earlier(cls, v)
    )
    if (
        os.environ.get("RANK", "0") == "0"
    ):  # the first process of this very run may have begun before the others look
        check_no_writer(Path(settings.folder()))
        if not settings.dry_run:
            check_usable(settings)
    return settings


def for_a_base(defaults: Callable[[Values], Values]) -> Callable[[Values], Values]:
    """A recipe's defaults without those that a base brings with it, where one is given."""

    @functools.wraps(defaults)
    def chosen(said: Values) -> Values:
        brought = (*SHAPE, "n_positions", "tokenizer") if said.get("model_name_or_path") else ()
        return {name: value for name, value in defaults(said).items() if name not in brought}

    return chosen


def check_paths(said: Values) -> None:
    """Raises UserError where something that the user has named is not there, or cannot be such a name."""
    check_corpora(said.get("corpus") or None, said.get("validation_file") or None)
    for name, check in (("preset", find_preset), ("document_end", compiled), ("hub_model_id", check_repo_id)):
        if said.get(name):
            check(said[name])
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
    asked = values["resume_from_checkpoint"]
    if asked is None:
        return {}
    if asked == "last":
        checkpoints = Path(os.path.expanduser(values["output_dir"] or cls(**values).folder())) / "checkpoints"
        found = [path for path in checkpoints.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
        newest_first = sorted(found, key=lambda path: -int(path.name.removeprefix("step-")))
    else:
        newest_first = [Path(os.path.expanduser(asked)).resolve()]
        checkpoints = newest_first[0].parent
    saved = _settings_in(newest_first)
    if saved is None:
        saved = _settings_in_yaml(cls, checkpoints.parent / "run.yaml")
    else:  # by then each checkpoint told how its text was read
        saved = {name: value for name, value in cls.BEFORE.items() if name not in DataSettings.BEFORE} | saved
    return {
        name: saved[name] for name in cls.__dataclass_fields__ if name in saved and name not in OF_A_START
    }


def _settings_in(checkpoints: Sequence[Path]) -> dict[str, Any] | None:
    """The settings in the first undamaged checkpoint, None where earlier versions have not kept them there."""
    for checkpoint in checkpoints:
        if damage(checkpoint, ["progress.json"], chosen=lambda name: name == "progress.json") is None:
            return json.loads((checkpoint / "progress.json").read_text(encoding="utf-8")).get("settings")
    return None


def _settings_in_yaml(cls: type[RunSettings], path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        saved = read_yaml(path, [item.name for item in fields(cls)], cls.RETIRED)
    except UserError as error:
        raise UserError(
            f"what the run was started with cannot be read: {str(error).rstrip('.')}; to go on, delete that file and give "
            "the settings again."
        ) from error
    from ..data.shards import is_shards

    before = dict(cls.BEFORE)
    if is_shards(str(saved.get("corpus", ""))):  # their text was read when they were made
        before = {name: value for name, value in before.items() if name not in DataSettings.BEFORE}
    return before | saved


def size_here(said: Values) -> str:
    """The preset that the user has named, or the one that suits the hardware: cpu, or baby with a GPU."""
    return preset_here(said, without_gpu="cpu", with_gpu="baby")


def preset_here(said: Values, without_gpu: str, with_gpu: str) -> str:
    """The preset that the user has named, or the one of two that suits the hardware."""
    if said.get("preset"):
        return said["preset"]
    from ..training.hardware import device_type

    return without_gpu if device_type(bool(said.get("use_cpu"))) == "cpu" else with_gpu
