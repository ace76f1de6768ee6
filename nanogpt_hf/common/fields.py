"""What a settings class is made of: fields with a help text and bounds, and values that are checked as soon as they are there."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from .errors import UserError

BOUNDS = {"ge": "at least {}", "gt": "more than {}", "le": "at most {}", "lt": "less than {}"}


def setting(
    default: Any, help: str, *, essential: bool = False, excludes: Sequence[str] = (), **bounds: float
) -> Any:
    """A field of a settings class.

    Args:
        default: its value where nobody gives one.
        help: what --help says of it.
        essential: shown by --help before all others.
        excludes: settings that cannot be given with it.
        bounds: ge, gt, le and lt, as `check_bounds` checks them.
    """
    metadata = {"help": help, "essential": essential, "excludes": excludes, "bounds": bounds}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def changed(group: Any, name: str, default: Any, **metadata: Any) -> Any:
    """A field of a group with another default, and another help where that is given."""
    return field(default=default, metadata={**group.__dataclass_fields__[name].metadata, **metadata})


@dataclass(frozen=True)
class Settings:
    """The base of all settings: values within their bounds, and a home folder written as ~ found.

    Attributes:
        RETIRED: settings that files of earlier versions hold and that say nothing any more.
    """

    RETIRED: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_values(type(self), vars(self))
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, str) and value.startswith("~"):
                object.__setattr__(self, item.name, os.path.expanduser(value))

    def given(self, *names: str) -> dict[str, Any]:
        """Those of the named settings that are not None."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def check_values(cls: type[Settings], values: Mapping[str, Any]) -> None:
    """Raises UserError where one of these values is not within its bounds, or excludes another of them."""
    for item in fields(cls):
        value = values.get(item.name)
        check_bounds(item.name, value, item.metadata.get("bounds", {}))
        for other in item.metadata.get("excludes", ()):
            if value and values.get(other):
                raise UserError(f"--{item.name} and --{other} exclude each other: give one of them.")


def check_bounds(name: str, value: Any, bounds: dict[str, float]) -> None:
    """Raises UserError where a number is not within its bounds; a number that is not finite never is."""
    if not bounds or isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    within = {
        "ge": lambda bound: value >= bound,
        "gt": lambda bound: value > bound,
        "le": lambda bound: value <= bound,
        "lt": lambda bound: value < bound,
    }
    if not math.isfinite(value) or not all(within[kind](bound) for kind, bound in bounds.items()):
        wanted = " and ".join(BOUNDS[kind].format(bound) for kind, bound in bounds.items())
        raise UserError(f"--{name} is {value}, it must be {wanted}.")
