"""The upload of a checkpoint to the Hub.

Every request of an upload is bounded in time, and the upload as a whole is repeated when it fails: huggingface_hub
repeats some of its requests, but never the commit. Repeating is safe. Files that are there already are left out, and
a commit that arrives late is refused by the Hub, because it names the commit that it was to follow.
"""

import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    constants,
    get_session,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError

from ..common.errors import UserError
from ..common.files import MANIFEST
from ..common.paths import check_repo_id
from ..common.recipes import command
from ..common.text import first_line, printable, without_token
from .export import export_run

T = TypeVar("T")

PAUSES = (5.0, 15.0, 45.0, 120.0)  # seconds before each repetition of an upload
LONGEST_PAUSE = 300.0  # seconds, however long the Hub asks us to stay away
TIMEOUT = 120.0  # seconds without a byte from the Hub

# What huggingface_hub raises: RuntimeError for a large file, KeyError for an answer in an unknown form.
FAILURES = (HTTPError, OSError, RuntimeError, KeyError)
PASSING = (408, 409, 412, 425, 429)  # client errors that another try may not meet


def check_push(
    repo_id: str,
    private: bool = False,
    timeout: float = 30.0,
    tell: Callable[[str], None] = print,
    repo_type: Literal["model", "space"] = "model",
) -> None:
    """Find out, without changing anything, whether an upload could ever work.

    A repository that exists is asked itself; the right to create one follows from what the Hub says of the token.
    When the Hub does not answer, that is told and nothing is known: it may answer when the upload comes.

    Args:
        repo_id: NAME or OWNER/NAME.
        timeout: seconds that each of at most three requests may take.
        tell: prints a line.
        repo_type: of what is to be uploaded.

    Raises:
        UserError: there is no token, it is not accepted or may not write there, the name is not valid, or a
            repository that is to be private is public.
    """
    check_repo_id(repo_id)
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            "--push_to_hub is set, and so is HF_HUB_OFFLINE, which forbids it: unset one of them."
        )
    token = get_token()
    if token is None or not re.fullmatch("[!-~]+", token):
        fault = "there is none" if token is None else "the one there is has characters that no token has"
        raise UserError(f"uploading needs a token of the Hub, and {fault}: log in with `hf auth login`.")
    api = HfApi()
    try:
        with _bounded(timeout):
            owner, _, name = repo_id.rpartition("/")
            with _answers_understood():
                user = api.whoami()
                owner = owner or user["name"]
                may_create = _may_create(user, owner)
                try:
                    info = api.repo_info(f"{owner}/{name}", repo_type=repo_type, timeout=timeout)
                    api.auth_check(f"{owner}/{name}", repo_type=repo_type, write=True)
                except RepositoryNotFoundError:
                    info = None
    except FAILURES as error:
        status = _status(error)
        if status == 401:
            raise UserError("the Hub does not accept the token: log in again with `hf auth login`.") from None
        if status == 403:
            raise UserError(f"the token may not write to {repo_id}: log in with one that may.") from None
        tell(
            f"warning: whether the upload to {repo_id} will work is not known, the Hub did not say ({_reason(error)})"
        )
        return
    if info is None and not may_create:
        raise UserError(
            f"the token may not create {owner}/{name} on the Hub: log in with one that may write there."
        )
    if info is not None and private and not info.private:
        raise UserError(_is_public(f"{owner}/{name}"))


@contextmanager
def _answers_understood() -> Iterator[None]:
    """An answer of another form than the Hub gives is a failure of what has answered, and no bug."""
    try:
        yield
    except (TypeError, AttributeError) as error:
        raise OSError(f"an answer of a form that the Hub never gives: {first_line(error)}") from error


def _is_public(repo_id: str) -> str:
    return f"{repo_id} is to be private, but it exists and is public: change that on the Hub, or give another name."


def _may_create(user: dict, owner: str) -> bool:
    """Whether a token may create repositories for an owner, as far as whoami tells."""
    roles = {user["name"]: "admin"} | {org["name"]: org.get("roleInOrg") for org in user.get("orgs", [])}
    if owner not in roles or roles[owner] == "read":
        return False
    token = user.get("auth", {}).get("accessToken", {})
    if token.get("role") == "fineGrained":
        scopes = token.get("fineGrained", {}).get("scoped", [])
        return any("repo.write" in s["permissions"] for s in scopes if s["entity"].get("name") == owner)
    return token.get("role") != "read"


def push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    format: str = "auto",
    merge: bool = False,
    quantization: str = "f32",
    pauses: tuple[float, ...] = PAUSES,
    timeout: float = TIMEOUT,
    tell: Callable[[str], None] = print,
) -> str:
    """Upload the best model of a run folder in one commit, with its card; what is there already is not sent again.

    Args:
        repo_id: NAME or OWNER/NAME; made if it does not exist.
        private: make it private.
        merge: of an adapter, upload the base with the adapter merged into it.
        quantization: of a GGUF: f32, bf16 or q8_0.
        pauses: seconds before each new try; where the Hub names a time, that is waited instead.
        timeout: seconds without a byte from the Hub after which a try has failed.
        tell: prints a line.

    Returns:
        The address of the repository.

    Raises:
        UserError: no try succeeded, or none can; the message says how to try again later.
    """
    api = HfApi()
    try:
        if "/" not in repo_id:
            repo_id = f"{_persist(lambda: api.whoami()['name'], pauses, timeout, tell)}/{repo_id}"
        with TemporaryDirectory() as staging:
            model = Path(staging) / "model"
            export_run(folder, model, format, repo_id, merge, quantization)
            _persist(lambda: _upload(api, repo_id, model, private, timeout), pauses, timeout, tell)
    except FAILURES as error:
        words = [*command("share").split(), "--model", str(folder), "--hub_model_id", repo_id]
        words += ["--hub_private_repo"] if private else []
        words += ["--hub_format", format] if format != "auto" else []
        words += ["--quantization", quantization] if quantization != "f32" else []
        words += ["--merge"] if merge else []
        # The causes are left out: a library's message may quote the token.
        raise UserError(
            f"the upload to {repo_id} failed ({_reason(error)}); the model is complete in {folder}, try again with: "
            f"{shlex.join(words)}"
        ) from None
    return f"{api.endpoint}/{repo_id}"


def push_space(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    pauses: tuple[float, ...] = PAUSES,
    timeout: float = TIMEOUT,
    tell: Callable[[str], None] = print,
) -> str:
    """Upload the folder of a Gradio Space in one commit; the arguments are those of `push`.

    Returns:
        The address of the Space.

    Raises:
        UserError: no try succeeded, or none can.
    """
    api = HfApi()
    try:
        if "/" not in repo_id:
            repo_id = f"{_persist(api.whoami, pauses, timeout, tell)['name']}/{repo_id}"
        _persist(
            lambda: _upload(api, repo_id, Path(folder), private, timeout, "space"), pauses, timeout, tell
        )
    except FAILURES as error:
        raise UserError(
            f"the upload to {repo_id} failed ({_reason(error)}); the Space is complete in {folder}, try again with: "
            f"{shlex.join(['hf', 'upload', repo_id, str(folder), '.', '--type', 'space'])}"
        ) from None
    return f"{api.endpoint}/spaces/{repo_id}"


def _upload(
    api: HfApi,
    repo_id: str,
    folder: Path,
    private: bool,
    timeout: float,
    repo_type: Literal["model", "space"] = "model",
) -> None:
    sdk = "gradio" if repo_type == "space" else None
    api.create_repo(repo_id, private=private or None, exist_ok=True, repo_type=repo_type, space_sdk=sdk)
    info = api.repo_info(repo_id, repo_type=repo_type, timeout=timeout)
    if private and not info.private:
        raise UserError(_is_public(repo_id))
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    # upload_folder may make several commits of it.
    api.create_commit(
        repo_id,
        [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files],
        commit_message=f"Upload {repo_type}",
        repo_type=repo_type,
        parent_commit=info.sha,
    )


def _persist(
    action: Callable[[], T], pauses: tuple[float, ...], timeout: float, tell: Callable[[str], None]
) -> T:
    """The action's result, after as many tries as it takes and pauses allow; the last failure is raised."""
    for pause in (*pauses, None):
        try:
            with _bounded(timeout), _answers_understood():
                return action()
        except FAILURES as error:
            # A large file goes to a signed address that expires: RuntimeError, whatever its status.
            status = _status(error) if isinstance(error, HTTPError) else None
            if pause is None or (status and 400 <= status < 500 and status not in PASSING):
                raise
            pause = min(_retry_after(error, pause), LONGEST_PAUSE)
            tell(f"the upload failed ({_reason(error)}), trying again in {pause:g} s")
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


@contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """huggingface_hub without its endless patience, and without its log, which quotes signed addresses."""
    session, log = get_session(), logging.getLogger("huggingface_hub")
    before, level = session.timeout, log.level
    session.timeout = seconds
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        session.timeout = before
        log.setLevel(level)


def _response(error: BaseException | None) -> Any:
    """The Hub's answer behind an error, if it gave one."""
    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    return error and error.response


def _status(error: BaseException) -> int | None:
    response = _response(error)
    return response.status_code if response is not None else None


def _retry_after(error: BaseException, otherwise: float) -> float:
    response = _response(error)
    seconds = response.headers.get("Retry-After", "") if response is not None else ""
    return float(seconds) if seconds.isascii() and seconds.isdigit() else otherwise


def _reason(error: BaseException) -> str:
    """An error in a few words, without the token."""
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    status = _status(error)
    text = getattr(error, "server_message", None) or str(error) or type(error).__name__
    text = " ".join(without_token(printable(text)).split())[:200].rstrip(".")
    return f"{status}: {text}" if status else f"{type(error).__name__}: {text}"
