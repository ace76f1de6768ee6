from .configuration_nanogpt import ARCHITECTURES, NanoGPTConfig
from .modeling_nanogpt import (
    NanoGPTForCausalLM,
    NanoGPTForSequenceClassification,
    NanoGPTModel,
    NanoGPTPreTrainedModel,
)
from .presets import PRESETS, Preset, find_preset, preset_config

__all__ = [
    "ARCHITECTURES",
    "PRESETS",
    "Preset",
    "find_preset",
    "NanoGPTConfig",
    "NanoGPTForCausalLM",
    "NanoGPTForSequenceClassification",
    "NanoGPTModel",
    "NanoGPTPreTrainedModel",
    "preset_config",
]
