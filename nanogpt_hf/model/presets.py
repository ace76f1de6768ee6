"""Named sizes, from a laptop's CPU to GPT-3."""

import difflib

from .configuration_nanogpt import NanoGPTConfig

# n_layer, n_head, n_embd, n_positions, vocab_size. The char-level sizes take their tokenizer's vocabulary later.
#
# GPT-2: Radford et al. 2019, table 2; heads as in OpenAI's checkpoints (width / 64).
# GPT-3: Brown et al. 2020, table 2.1, context 2,048, GPT-2's vocabulary. Where that table contradicts itself:
#   gpt3-xl says 24 heads of 128 at width 2,048; 24 x 128 is 3,072. Taken: 16 heads of 128, which keeps width and
#   head size (and the 1.3B parameters in the name).
#   gpt3-13b says width 5,140 with 40 heads of 128; 40 x 128 is 5,120. Taken: width 5,120.
PRESETS = {
    "cpu": (4, 4, 128, 128, None),
    "baby": (6, 6, 384, 256, None),
    "gpt2": (12, 12, 768, 1024, 50257),
    "gpt2-medium": (24, 16, 1024, 1024, 50257),
    "gpt2-large": (36, 20, 1280, 1024, 50257),
    "gpt2-xl": (48, 25, 1600, 1024, 50257),
    "gpt3-small": (12, 12, 768, 2048, 50257),
    "gpt3-medium": (24, 16, 1024, 2048, 50257),
    "gpt3-large": (24, 16, 1536, 2048, 50257),
    "gpt3-xl": (24, 16, 2048, 2048, 50257),
    "gpt3-2.7b": (32, 32, 2560, 2048, 50257),
    "gpt3-6.7b": (32, 32, 4096, 2048, 50257),
    "gpt3-13b": (40, 40, 5120, 2048, 50257),
    "gpt3-175b": (96, 96, 12288, 2048, 50257),
}


def preset_config(name: str, **overrides) -> NanoGPTConfig:
    """The configuration of a named size; `overrides` are any fields of NanoGPTConfig.

    Raises:
        ValueError: no such preset; the message names the nearest one.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(PRESETS)}."
        raise ValueError(f"there is no preset {name!r}: {hint}")
    n_layer, n_head, n_embd, n_positions, vocab_size = PRESETS[name]
    fields = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "n_positions": n_positions}
    if vocab_size is not None:
        fields["vocab_size"] = vocab_size
    return NanoGPTConfig(**fields | overrides)
