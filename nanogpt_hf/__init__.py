"""Train and fine-tune small GPTs; everything made is an ordinary transformers checkpoint.

Importing the package registers its model with AutoConfig, AutoModel and AutoModelForCausalLM.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .model import NanoGPTConfig, NanoGPTForCausalLM, NanoGPTModel, preset_config

__version__ = "0.1.0"
__all__ = ["NanoGPTConfig", "NanoGPTForCausalLM", "NanoGPTModel", "preset_config"]

AutoConfig.register("nanogpt", NanoGPTConfig, exist_ok=True)
AutoModel.register(NanoGPTConfig, NanoGPTModel, exist_ok=True)
AutoModelForCausalLM.register(NanoGPTConfig, NanoGPTForCausalLM, exist_ok=True)
