"""Names of folders and of the Hub, told apart without a network and without torch."""

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from .errors import UserError
from .text import nearest

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


def is_hub_id(name: str) -> bool:
    """Whether a name is meant for the Hub: it looks like an id, and neither it nor its first part is a folder here."""
    return bool(HUB_ID.fullmatch(name)) and not os.path.exists(name.split("/")[0])


def check_model_name(name_or_path: str) -> None:
    """Raises UserError where a name is neither a folder nor what a Hub id looks like; it names the nearest folder."""
    name = os.path.expanduser(name_or_path)
    if os.path.isfile(name):
        raise UserError(f"{name} is a file: give the folder that it lies in.")
    if not os.path.isdir(name) and not is_hub_id(name):
        near = nearest_path(name)
        hint = f"did you mean {near}?" if near else "give one with a saved model, or a Hub id."
        raise UserError(f"there is no folder {name!r}: {hint}")


def check_unused(folder: str, names: Iterable[str]) -> None:
    """Raises UserError where a folder holds something of a name that is about to be written."""
    for name in names:
        if os.path.lexists(os.path.join(folder, name)):
            raise UserError(
                f"--output_dir {folder} holds {name}: choose another folder, or replace it with --overwrite_output_dir."
            )


def nearest_path(name: str) -> str | None:
    """What lies beside a path that does not exist and has the most similar name."""
    with suppress(OSError, ValueError):
        beside = [str(Path(name).with_name(other)) for other in os.listdir(Path(name).parent)]
        return nearest(name, beside)
    return None
