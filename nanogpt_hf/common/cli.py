"""The command line of every recipe, and how a recipe answers what goes wrong."""

import errno
import os
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from io import TextIOWrapper
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool
from transformers.utils import logging as transformers_logging

from .errors import UserError
from .text import nearest, printable

T = TypeVar("T")


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps a recipe's launch lines as they are, and shows defaults."""


class OneSentenceParser(HfArgumentParser):
    """HfArgumentParser whose errors are UserErrors, and whose `bool | None` settings are flags too."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for action in self._actions:
            if action.type is string_to_bool:
                action.nargs, action.const = "?", True

    def error(self, message):
        raise UserError(f"{message[:1].lower()}{message[1:]}; --help lists every setting.")


def _from_yaml(path: str, known: Sequence[str]) -> dict:
    """The settings in a YAML file; a run.yaml's `record` of what happened is not a setting."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if len(text) > 2**16:  # PyYAML takes time that grows with the square of some texts' length
            raise UserError(f"it has {len(text):,} characters, settings have fewer")
        values = yaml.safe_load(text) or {}
    except OSError as error:
        raise UserError(f"--config {path} cannot be read ({error.strerror}).") from error
    except Exception as error:  # what PyYAML's constructors meet comes through as it is
        raise UserError(
            f"--config {path} is not valid YAML: {' '.join(str(error).split())[:300]}."
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must hold `setting: value` lines.")
    values.pop("record", None)
    for key in values:
        if key not in known:
            raise UserError(f"{path} sets {key!r}, which is no setting{_hint(str(key), known)}")
        words = values[key] if isinstance(values[key], list) else [values[key]]
        if any(isinstance(word, (dict, list, set, tuple)) for word in words):
            raise UserError(f"{path} gives {key} something else than a value or a list of values.")
    return values


def _hint(word: str, known: Sequence[str], prefix: str = "") -> str:
    near = nearest(word, known)
    return f"; did you mean {prefix}{near}?" if near else "."


def _as_words(values: Mapping) -> list[str]:
    """Settings as a command line, so that one parser checks them wherever they come from."""
    words = []
    for name, value in values.items():
        if isinstance(value, (list, tuple)):
            words += [f"--{name}", *map(str, value)] if value else []
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


def parse(
    cls: type[T],
    description: str | None,
    argv: Sequence[str] | None = None,
    defaults: Callable[[Mapping], Mapping] | Mapping = MappingProxyType({}),
) -> T:
    """Settings from, weakest first: the dataclass, `defaults`, the YAML file of --config, the command line.

    Args:
        cls: a dataclass of settings.
        description: shown by --help.
        argv: the command line; sys.argv by default.
        defaults: a recipe's own defaults, or a function that chooses them by what the user has set.

    Raises:
        UserError: an unknown setting (the message names the nearest one), or a value of the wrong type.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    known = [item.name for item in fields(cls)]
    parser = OneSentenceParser(
        cls,
        allow_abbrev=False,
        usage="%(prog)s [--SETTING VALUE …]",
        description=description,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; a run.yaml is one")

    def read(words: list[str]) -> dict:
        namespace, unknown = parser.parse_known_args(words)
        for word in unknown:
            name = word.split("=")[0]
            near = _hint(name.lstrip("-").replace("-", "_"), known, "--")
            raise UserError(f"there is no setting {name}{near}")
        return vars(namespace)

    actual = {name: parser.get_default(name) for name in known}
    parser.set_defaults(**dict.fromkeys(known))
    without_help = [word for word in argv if word not in ("-h", "--help")]
    said = {name: value for name, value in read(without_help).items() if value is not None}
    from_file = _from_yaml(said.pop("config"), known) if "config" in said else {}
    parser.set_defaults(**actual)
    if callable(defaults):
        defaults = defaults(from_file | said)
    parser.set_defaults(**read(_as_words(defaults) + _as_words(from_file)))  # so that --help shows them
    values = read(argv)
    values.pop("config")
    return cls(**values)


def run_recipe(main: Callable[[], None]) -> None:
    """Run a recipe's main: a user's mistake ends in one sentence and exit status 2, a failure around it in 1.

    NANOGPT_HF_DEBUG=1 shows the traceback too.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a model's Cyrillic prints under any locale
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    transformers_logging.disable_progress_bar()
    try:
        main()
    except (UserError, OSError, MemoryError, RuntimeError, KeyboardInterrupt) as error:
        lost = _is_lost_process(error)
        message, status = _answer(error, lost)
        if message is None or os.environ.get("NANOGPT_HF_DEBUG") == "1":
            raise
        if lost or os.environ.get("RANK", "0") == "0":
            print(f"error: {printable(message)}", file=sys.stderr)
        sys.exit(status)


def _is_lost_process(error: BaseException) -> bool:
    """Whether a collective failed, which it does in all processes once one of them has ended."""
    import torch

    failed = (
        isinstance(error, torch.distributed.DistError)
        or isinstance(error, RuntimeError)
        and "gloo" in str(error)
    )
    return failed and int(os.environ.get("WORLD_SIZE", "1")) > 1


def _answer(error: BaseException, lost: bool) -> tuple[str | None, int]:
    """What to say to an error and the exit status; nothing to say to one that is ours."""
    whole = "what was saved before this is whole"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted.", 130
    if lost:
        return f"another process of this run has ended, so this one ends too; {whole}.", 1
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, MemoryError) or should_reduce_batch_size(error):
        return (
            "out of memory: lower --per_device_train_batch_size (and raise --gradient_accumulation_steps by as much), "
            f"or --per_device_eval_batch_size if it came in evaluation; {whole}.",
            1,
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.strerror}: make room, and go on with --resume_from_checkpoint last; {whole}.", 1
    if isinstance(error, OSError):
        return f"{error}; {whole}.", 1
    return (str(error), 2) if isinstance(error, UserError) else (None, 1)
