"""The network and its config, registered with transformers' auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from ..common.presets import PRESETS, Preset, find_preset
from . import conversion  # noqa: F401  it teaches from_pretrained the other families
from .configuration_nanogpt import ARCHITECTURES, NanoGPTConfig
from .modeling_nanogpt import (
    NanoGPTForCausalLM,
    NanoGPTForSequenceClassification,
    NanoGPTModel,
    NanoGPTPreTrainedModel,
)
from .presets import preset_config

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

AutoConfig.register("nanogpt", NanoGPTConfig, exist_ok=True)
AutoModel.register(NanoGPTConfig, NanoGPTModel, exist_ok=True)
AutoModelForCausalLM.register(NanoGPTConfig, NanoGPTForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(NanoGPTConfig, NanoGPTForSequenceClassification, exist_ok=True)
