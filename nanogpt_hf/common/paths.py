"""Names of folders and of the Hub, told apart without a network and without torch."""

import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from .errors import UserError
from .text import nearest

P = ParamSpec("P")
T = TypeVar("T")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)


def is_hub_id(name: str) -> bool:
    """Whether a name is meant for the Hub: it looks like an id, and neither it nor its first part is a folder here."""
    return bool(HUB_ID.fullmatch(name)) and not os.path.exists(name.split("/")[0])


def check_model_name(name_or_path: str) -> None:
    """Raises UserError where a name is neither a folder nor what a Hub id looks like; it names the nearest folder."""
    if os.path.exists(os.path.expanduser(name_or_path)) or not is_hub_id(name_or_path):
        check_folder(name_or_path, "give one with a saved model, or a Hub id.")


def check_folder(name: str, advice: str = "give one with a saved model.") -> None:
    """Raises UserError where a name is no folder; it names the nearest one, or else gives the advice."""
    name = os.path.expanduser(name)
    if os.path.isfile(name):
        raise UserError(f"{name} is a file: give the folder that it lies in.")
    if not os.path.isdir(name):
        near = nearest_path(name)
        raise UserError(f"there is no folder {name!r}: {f'did you mean {near}?' if near else advice}")


def check_repo_id(name: str) -> None:
    """Raises UserError where a name cannot be that of a repository on the Hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f"--hub_model_id {name!r} cannot be the name of a Hub repository: give NAME or OWNER/NAME, of at most 96 "
            "letters, digits, '-', '_' and '.'."
        ) from error


def asks_the_hub(load: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """A function of a folder or Hub id that looks into the cache alone where the Hub gives no answer, for the Hub's client
    would try for a minute."""

    @functools.wraps(load)
    def asking(name: Any, *args: P.args, **kwargs: P.kwargs) -> T:
        with _within_the_cache(name):
            return load(name, *args, **kwargs)

    return asking


@contextmanager
def _within_the_cache(name: str | os.PathLike) -> Iterator[None]:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or os.path.isdir(name) or _answers(constants.ENDPOINT):
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = False


@functools.cache
def _answers(endpoint: str) -> bool:
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=5)
    except Exception:  # another one with each version of its HTTP library
        return False
    return True


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
