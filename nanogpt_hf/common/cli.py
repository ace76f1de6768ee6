"""The command line of every recipe, read at once: neither torch nor transformers, which take seconds, is imported before."""

import importlib.util
import os
import sys
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, field, fields, make_dataclass
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

import yaml

from .errors import UserError
from .fields import Settings, check_values
from .settings import RunSettings
from .text import nearest

if TYPE_CHECKING:
    from transformers.hf_argparser import HfArgumentParser, string_to_bool
else:  # this module alone, without the package that it lies in
    _package = Path(importlib.util.find_spec("transformers").origin).parent
    _spec = importlib.util.spec_from_file_location("transformers.hf_argparser", _package / "hf_argparser.py")
    _module = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_module)
    HfArgumentParser, string_to_bool = _module.HfArgumentParser, _module.string_to_bool

S = TypeVar("S", bound=Settings)
Values = Mapping[str, Any]

# What other tools call a setting of ours -> our names of it; the first one that a recipe has is meant.
OTHER_NAMES = {
    "batch_size": ["per_device_train_batch_size", "per_device_eval_batch_size"],
    "block_size": ["n_positions"],
    "context_length": ["n_positions"],
    "data": ["corpus"],
    "dataset": ["corpus"],
    "device": ["use_cpu"],
    "epochs": ["num_train_epochs"],
    "eval_file": ["validation_file"],
    "eval_interval": ["eval_steps"],
    "init_from": ["model_name_or_path"],
    "iters": ["max_steps"],
    "learning_rate_muon": ["muon_learning_rate"],
    "lora_rank": ["lora_r"],
    "lr": ["learning_rate"],
    "max_iters": ["max_steps"],
    "max_length": ["max_new_tokens", "n_positions"],
    "max_seq_length": ["n_positions"],
    "max_tokens": ["max_new_tokens"],
    "model": ["model_name_or_path", "model"],
    "num_epochs": ["num_train_epochs"],
    "num_samples": ["num_return_sequences"],
    "num_steps": ["max_steps"],
    "out_dir": ["output_dir"],
    "rank": ["lora_r"],
    "resume": ["resume_from_checkpoint"],
    "steps": ["max_steps"],
    "train_file": ["corpus"],
    "val_file": ["validation_file"],
    "warmup_iters": ["warmup_steps"],
}
# Settings that say the same thing in other ways: who gives one means it, and not a recipe's default of another.
RIVALS = ("max_steps", "num_train_epochs", "train_tokens")
UNSAID = object()


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps a recipe's launch lines as they are, and shows the defaults that say something."""

    def _get_help_string(self, action: Action) -> str:
        default = action.default
        shown = (
            default not in ("", SUPPRESS) and default != [] and default is not None and default is not False
        )
        return f"{action.help}{' (default: %(default)s)' if shown else ''}"


class _Parser(HfArgumentParser):
    """HfArgumentParser with one spelling for each setting, whose errors are UserErrors.

    A flag alone sets what is true or false, and the word none sets what may be None.
    """

    def __init__(self, cls: type[Settings], **kwargs: Any):
        super().__init__(list[Any](_groups(cls)), **kwargs)
        hints = get_type_hints(cls)
        for action in self._actions:
            if action.dest in hints:
                self._settle(action, hints[action.dest])

    def _settle(self, action: Any, hint: Any) -> None:
        for spelling in action.option_strings[1:]:
            del self._option_string_actions[spelling]
        del action.option_strings[1:]
        if get_origin(action.type) is Literal:  # each of a list
            action.type, action.choices = str, get_args(action.type)
        if action.type is string_to_bool:
            action.nargs, action.const, action.metavar = "?", True, "true|false"
        elif action.choices and not action.nargs:
            action.metavar = "|".join(action.choices)
        else:
            action.metavar = {int: "N", float: "X"}.get(action.type, "TEXT")
        if NoneType in get_args(hint):
            action.type = _or_none(action.type)
            action.choices = action.choices and [*action.choices, None]

    def error(self, message: str) -> NoReturn:
        if "expected" in message and "argument" in message:
            message += "; a value that begins with - is given as --setting=-value"
        raise UserError(f"{message[:1].lower()}{message[1:]}; --help lists every setting.")


def _or_none(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """The conversion of a setting that may be None."""

    def converted(word: str) -> Any:
        return None if word.lower() == "none" else convert(word)

    converted.__name__ = getattr(convert, "__name__", "value")  # argparse's messages say it
    return converted


def _groups(cls: type[Settings]) -> list[type]:
    """The fields of a settings class as one dataclass for each group of --help, the essential ones first.

    A group is a class in which fields were first declared; its docstring is the group's title.
    """
    titles = {
        name: (owner.__doc__ or "").strip() if owner.__doc__ and len(owner.__doc__) < 20 else "Settings"
        for owner in cls.__mro__  # the last one wins: where it was first declared
        for name in owner.__dict__.get("__annotations__", {})
    }
    hints = get_type_hints(cls)
    groups: dict[str, list[tuple]] = {"The essentials": []}
    for item in fields(cls):
        title = "The essentials" if item.metadata.get("essential") else titles[item.name]
        groups.setdefault(title, []).append((item.name, hints[item.name], _for_argparse(item)))
    return [
        make_dataclass("Group", members, namespace={"_argument_group_name": title})
        for title, members in groups.items()
        if members
    ]


def _for_argparse(item: Field) -> Any:
    """A field that HfArgumentParser takes. It gives no default, so that what nobody said can be told from what is."""
    return field(default=None, metadata={"help": item.metadata["help"].replace("%", "%%")})


def read_yaml(path: str | Path, known: Iterable[str], retired: Iterable[str] = ()) -> dict[str, Any]:
    """The settings in a YAML file; a run.yaml's `record` of what happened is not a setting.

    Args:
        retired: settings of earlier versions that say nothing any more.

    Raises:
        UserError: it cannot be read, or holds anything but known settings.
    """
    known = [*known]
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
    for name in ("record", *retired):
        values.pop(name, None)
    for key in values:
        if key not in known:
            raise UserError(f"{path} sets {key!r}, which is no setting{_hint(str(key), known)}")
        words = values[key] if isinstance(values[key], list) else [values[key]]
        if any(isinstance(word, (dict, list, set, tuple)) for word in words):
            raise UserError(f"{path} gives {key} neither a value nor a list of values.")
    return values


def _hint(word: str, known: Sequence[str], prefix: str = "") -> str:
    """What a misspelt or another tool's name of a setting may have meant."""
    meant = [name for name in OTHER_NAMES.get(word, []) if name in known]
    near = meant[0] if meant else nearest(word, known)
    return f"; did you mean {prefix}{near}?" if near else "."


def _as_words(values: Values) -> list[str]:
    """Settings as a command line, so that one parser checks them wherever they come from."""
    words = []
    for name, value in values.items():
        if isinstance(value, (list, tuple)):
            words += [f"--{name}", *map(str, value)] if value else []
        else:
            words.append(f"--{name}={'none' if value is None else value}")
    return words


def parse(
    cls: type[S],
    description: str | None,
    argv: Sequence[str] | None = None,
    defaults: Callable[[Values], Values] | Values = MappingProxyType({}),
    check: Callable[[Values], None] = lambda said: None,
    earlier: Callable[[Values], Values] = lambda values: {},
    positional: str | None = None,
) -> S:
    """Settings from, weakest first: the class, `defaults`, an earlier run, the file of --config, the command line.

    Args:
        cls: the class of the settings.
        description: shown by --help.
        argv: the command line; sys.argv by default.
        defaults: a recipe's own defaults, or a function that chooses them by what the user has set.
        check: called with what the user has set before `defaults`, which may take seconds.
        earlier: the settings of the run that these settings go on with.
        positional: the setting that words without a flag are meant for.

    Raises:
        UserError: an unknown setting (the message names the nearest one), or a value of the wrong type.
    """
    argv = [_underscored(word) for word in (sys.argv[1:] if argv is None else argv)]
    known = [item.name for item in fields(cls)]
    parser = _Parser(
        cls,
        allow_abbrev=False,
        usage=f"%(prog)s {f'[{positional.upper()}] ' if positional else ''}[--SETTING VALUE …]",
        description=description,
        formatter_class=_HelpFormatter,
    )
    of_a_run = ", for instance the run.yaml of a run" if issubclass(cls, RunSettings) else ""
    parser.add_argument("--config", metavar="FILE", help=f"YAML file of settings{of_a_run}")

    def read(words: Sequence[str]) -> dict[str, Any]:
        namespace, alone = parser.parse_known_args(words)
        values = {name: value for name, value in vars(namespace).items() if value is not UNSAID}
        flags = [word for word in alone if word.startswith("-")]
        if positional and positional not in values and alone and not flags:
            takes_all = get_origin(get_type_hints(cls)[positional]) is list
            values[positional], alone = (alone, []) if takes_all else (alone[0], alone[1:])
        if alone:
            raise UserError(_what_is((flags or alone)[0], known))
        return values

    actual = {
        item.name: item.default_factory() if callable(item.default_factory) else item.default
        for item in fields(cls)
    }
    parser.set_defaults(**dict.fromkeys([*known, "config"], UNSAID))
    said = read([word for word in argv if word not in ("-h", "--help")])
    if "-h" in argv or "--help" in argv:
        parser.set_defaults(**{**actual, "config": None, **_shown(defaults)})
        parser.parse_args(["--help"])
    config = said.pop("config", None)
    from_file = {} if config is None else read(_as_words(_from_config(config, cls, said)))
    asked = from_file | said
    rivals = [name for name in RIVALS if asked.get(name) is not None]
    if len([name for name in RIVALS if said.get(name) is not None]) > 1:
        raise UserError(f"--{rivals[0]} and --{rivals[1]} exclude each other: give one of them.")
    check_values(cls, asked)
    check(asked)
    chosen = dict(defaults(asked) if callable(defaults) else defaults)
    values = actual | read(_as_words(chosen))
    values |= read(_as_words(earlier(values | asked))) | asked
    if rivals:
        decisive = next((name for name in rivals if name in said), rivals[0])
        values |= dict.fromkeys((name for name in RIVALS if name in known and name != decisive), None)
    return cls(**values)


def by_preset(table: Mapping[str, Values], choose: Callable[[Values], str]) -> Callable[[Values], Values]:
    """A recipe's defaults by size.

    Args:
        table: the defaults of some sizes.
        choose: of what the user has set, the size; one that is not in the table has the last one's defaults.
    """

    def defaults(said: Values) -> Values:
        preset = choose(said)
        return {"preset": preset, **table.get(preset, [*table.values()][-1])}

    defaults.table = table  # type: ignore[attr-defined] # for --help, which does not look at the hardware
    return defaults


def _shown(defaults: Callable[[Values], Values] | Values) -> Values:
    """The defaults as --help shows them."""
    if not callable(defaults):
        return defaults
    table = getattr(defaults, "table", {})
    names = dict.fromkeys(name for values in table.values() for name in values)
    shown: dict[str, Any] = {}
    for name in names:
        of_presets = {preset: values[name] for preset, values in table.items() if name in values}
        first, *others = of_presets.values()
        same = len(of_presets) == len(table) and all(other == first for other in others)
        words = ", ".join(f"{preset}: {value}" for preset, value in of_presets.items())
        shown[name] = first if same else words
    return shown


def _underscored(word: str) -> str:
    """--max-steps is --max_steps."""
    name, equals, value = word.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if word.startswith("--") else word


def _what_is(word: str, known: Sequence[str]) -> str:
    """The sentence that answers a word of the command line that is no setting."""
    name = word.split("=")[0]
    if name.startswith("--") and len(name) > 2:
        return f"there is no setting {name}{_hint(name[2:], known, '--')}"
    meant = next((setting for setting in ("corpus", "model") if setting in known), None)
    return (
        f"{word!r} stands alone{f'; did you mean --{meant} {word}?' if meant else ', without its setting.'}"
    )


def _from_config(path: str, cls: type[Settings], said: Values) -> dict[str, Any]:
    """The settings in the file of --config. The run.yaml that lies in a run's folder repeats it in another folder."""
    values = read_yaml(path, [item.name for item in fields(cls)], cls.RETIRED)
    folder = values.get("output_dir")
    goes_on = said.get("resume_from_checkpoint") or said.get("overwrite_output_dir")
    if (
        isinstance(folder, str)
        and not goes_on
        and Path(os.path.expanduser(folder)).resolve() == Path(path).resolve().parent
    ):
        values["output_dir"] = next_folder(folder)
    return values


def next_folder(folder: str) -> str:
    """The first of FOLDER-2, FOLDER-3, … that does not exist."""
    number = 2
    while Path(os.path.expanduser(f"{folder}-{number}")).exists():
        number += 1
    return f"{folder}-{number}"
