"""Named sizes, from a laptop's CPU to GPT-3, with the batches and learning rates that they were published with."""

from typing import NamedTuple

from .errors import UserError
from .text import nearest


class Preset(NamedTuple):
    """A named size.

    parameters is the size as its authors round it. batch_tokens is tokens an optimiser step, learning_rate the peak
    of Adam's. None: the char-level sizes have none of these, their recipes say what measured best.
    """

    n_layer: int
    n_head: int
    n_embd: int
    n_positions: int
    vocab_size: int | None = None
    parameters: str | None = None
    batch_tokens: int | None = None
    learning_rate: float | None = None


# GPT-2: Radford et al. 2019, table 2, whose counts (117M, 345M, 762M, 1542M) OpenAI corrected to those here in its
#   repository; heads as in OpenAI's checkpoints (width / 64). 512 sequences a step (section 2.3). The learning rates
#   were tuned and not published: taken are GPT-3's of the same or the nearest size.
# GPT-3: Brown et al. 2020, table 2.1, context 2,048, GPT-2's vocabulary. Every layer attends to all before it here;
#   every second one of theirs was banded, which changes no weight. 0.5M, 1M and 2M tokens are taken as 2^19, 2^20 and
#   2^21: whole sequences, which processes divide evenly. Where the paper contradicts itself:
#   gpt3-xl    24 heads of 128 at width 2,048, but 24 x 128 is 3,072. Taken: 16 heads of 128, which keeps the width,
#              the head size and the 1,320M parameters of its table D.1.
#   gpt3-13b   width 5,140 with 40 heads of 128, but 40 x 128 is 5,120. Taken: 5,120, which gives the 12,850M
#              parameters of its table D.1; 5,140 would give 12,953M.
#   gpt3-175b  3.2M tokens a step are 1,562.5 sequences. Taken: 1,536 (3.15M tokens), which 512 processes divide.
PRESETS = {
    "cpu": Preset(4, 4, 128, 128),
    "baby": Preset(6, 6, 384, 256),
    "gpt2": Preset(12, 12, 768, 1024, 50257, "124M", 512 * 1024, 6.0e-4),
    "gpt2-medium": Preset(24, 16, 1024, 1024, 50257, "355M", 512 * 1024, 3.0e-4),
    "gpt2-large": Preset(36, 20, 1280, 1024, 50257, "774M", 512 * 1024, 2.5e-4),
    "gpt2-xl": Preset(48, 25, 1600, 1024, 50257, "1558M", 512 * 1024, 2.0e-4),
    "gpt3-small": Preset(12, 12, 768, 2048, 50257, "125M", 2**19, 6.0e-4),
    "gpt3-medium": Preset(24, 16, 1024, 2048, 50257, "350M", 2**19, 3.0e-4),
    "gpt3-large": Preset(24, 16, 1536, 2048, 50257, "760M", 2**19, 2.5e-4),
    "gpt3-xl": Preset(24, 16, 2048, 2048, 50257, "1.3B", 2**20, 2.0e-4),
    "gpt3-2.7b": Preset(32, 32, 2560, 2048, 50257, "2.7B", 2**20, 1.6e-4),
    "gpt3-6.7b": Preset(32, 32, 4096, 2048, 50257, "6.7B", 2**21, 1.2e-4),
    "gpt3-13b": Preset(40, 40, 5120, 2048, 50257, "13B", 2**21, 1.0e-4),
    "gpt3-175b": Preset(96, 96, 12288, 2048, 50257, "175B", 1536 * 2048, 0.6e-4),
}


def find_preset(name: str) -> Preset:
    """A named size.

    Raises:
        UserError: there is none of that name; the message names the nearest one.
    """
    if name not in PRESETS:
        near = nearest(name, PRESETS)
        hint = f"did you mean {near!r}?" if near else f"use one of {', '.join(PRESETS)}."
        raise UserError(f"there is no preset {name!r}: {hint}")
    return PRESETS[name]
