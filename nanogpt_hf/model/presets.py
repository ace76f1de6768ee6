"""A named size as a configuration."""

from typing import Any

from ..common.presets import find_preset
from .configuration_nanogpt import NanoGPTConfig


def preset_config(name: str, **overrides: Any) -> NanoGPTConfig:
    """The configuration of a named size; `overrides` are any fields of NanoGPTConfig.

    Raises:
        UserError: no such preset; the message names the nearest one.
    """
    preset = find_preset(name)
    fields = {field: getattr(preset, field) for field in ("n_layer", "n_head", "n_embd", "n_positions")}
    if preset.vocab_size is not None:
        fields["vocab_size"] = preset.vocab_size
    return NanoGPTConfig(**fields | overrides)
