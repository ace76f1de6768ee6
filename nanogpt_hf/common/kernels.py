"""Modules of Triton kernels, where they work."""

import functools
import importlib
import warnings
from types import ModuleType

import torch

from .text import first_line


@functools.cache
def kernels(name: str, device: torch.device) -> ModuleType | None:
    """A module of Triton kernels; None where Triton is not (torch on Windows and CPUs has none) or does not work.

    Args:
        name: of the module, whose `try_out(device)` runs one of its kernels.
    """
    if device.type != "cuda":
        return None
    try:
        module = importlib.import_module(name)
    except ImportError:
        return None
    try:
        module.try_out(device)
    except Exception as error:  # of many kinds; one reason is a C compiler that Triton does not find
        warnings.warn(f"slower without {name} ({first_line(error)})", stacklevel=2)
        return None
    return module
