from .configuration_nanogpt import ARCHITECTURES, NanoGPTConfig
from .modeling_nanogpt import NanoGPTForCausalLM, NanoGPTModel, NanoGPTPreTrainedModel
from .presets import PRESETS, preset_config

__all__ = [
    "ARCHITECTURES",
    "PRESETS",
    "NanoGPTConfig",
    "NanoGPTForCausalLM",
    "NanoGPTModel",
    "NanoGPTPreTrainedModel",
    "preset_config",
]
