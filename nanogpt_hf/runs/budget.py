"""How many tokens a pretraining run will read, and the batch, heads and dropout that suit it.

The batch is the one that takes the least time. A batch of B tokens takes the time of FIXED + B tokens, and a run needs
1 + B / B_crit times the tokens of a run of small batches (McCandlish et al. 2018): the product is least at the square root
of FIXED x B_crit. B_crit grows with the tokens of the run to the power 0.47, whatever the model's size (Zhang et al. 2024).
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.presets import Preset, find_preset
from ..data.shards import INDEX, is_shards

# Settings that say how long a run is.
LENGTHS = ("max_steps", "train_tokens", "num_train_epochs", "max_minutes")
# Tokens a step on one device, for a run of one token. At GPT-2's size on an H100, of 8,192, 16,384 and 32,768 tokens the
# second came soonest to its loss, with 0.8 and 2 million tokens, and with 11 million sooner than the third. Longer runs go on
# from there by the formula.
BATCH_OF_ONE_TOKEN = 480
BATCH_GROWTH = 0.47 / 2
TOKENS_PER_PARAMETER = 20  # Hoffmann et al. 2022
MOST_EPOCHS = 4  # read so often a text is as good as a new one (Muennighoff et al. 2023)
FLOPS_GUESSED = {
    "cuda": 3e14,
    "mps": 3e12,
    "cpu": 1e11,
}  # a second; a tenth of them would not halve the batch
# Of texts that the preset `cpu` reads 6, 11, 17 and 43 times these come next to the best of what was tried.
DROPOUT_OF_A_PASS = 0.007
MOST_DROPOUT = 0.3
CHANNELS_PER_HEAD = 128  # as in every published Qwen3; 64 measured worse at GPT-2's size, and no faster


def parameters_of(size: Preset) -> int:
    """About how many parameters a size has: its blocks' matrices and its embedding."""
    return 12 * size.n_layer * size.n_embd**2 + (size.vocab_size or 0) * size.n_embd


def planned_tokens(said: Mapping[str, Any], size: Preset, device: str) -> float | None:
    """The tokens of the run that the user has asked for; None where steps say its length.

    Args:
        said: the settings that the user has given.
        device: cuda, mps or cpu.
    """
    if said.get("max_steps") or said.get("train_tokens"):
        return said.get("train_tokens")
    text = tokens_of_shards(str(said.get("corpus", "")))
    if said.get("num_train_epochs") and text:
        return said["num_train_epochs"] * text
    if said.get("max_minutes"):
        return 60 * said["max_minutes"] * FLOPS_GUESSED[device] / (6 * parameters_of(size))
    return min(TOKENS_PER_PARAMETER * parameters_of(size), MOST_EPOCHS * (text or math.inf))


def tokens_of_shards(folder: str) -> int | None:
    """Tokens of the training split in a folder of finished shards; None of anything else."""
    path = Path(os.path.expanduser(folder), INDEX)
    if not is_shards(folder) or not path.exists():
        return None
    return sum(shard["tokens"] for shard in json.loads(path.read_bytes())["splits"]["train"]["shards"])


def sequences_per_step(tokens: float | None, steps: int | None, block_size: int, devices: int) -> int:
    """The batch that takes the least time, in sequences of block_size tokens: a power of two.

    Args:
        tokens: of the whole run; None: steps say its length.
    """
    one = BATCH_OF_ONE_TOKEN * math.sqrt(devices)
    batch = one * tokens**BATCH_GROWTH if tokens else (one * steps**BATCH_GROWTH) ** (1 / (1 - BATCH_GROWTH))
    return max(1, 2 ** round(math.log2(batch / block_size)))


def heads_of(preset: str) -> int:
    """Attention heads of a named size in Qwen3's block."""
    size = find_preset(preset)
    return size.n_embd // CHANNELS_PER_HEAD if size.n_embd % CHANNELS_PER_HEAD == 0 else size.n_head


def dropout_of(passes: float) -> float:
    """The dropout of a run that reads its text so many times."""
    return round(min(MOST_DROPOUT, DROPOUT_OF_A_PASS * passes), 2) if passes > MOST_EPOCHS else 0.0
