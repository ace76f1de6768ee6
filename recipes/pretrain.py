"""Pretrain a GPT on a corpus of any size: GPT-2 (124M) on OpenWebText with no other flag.

    accelerate launch recipes/pretrain.py --corpus data/openwebtext --preset gpt2
    accelerate launch --config_file accelerate_configs/gpus_ddp.yaml --num_processes 2 recipes/pretrain.py \\
        --corpus data/openwebtext --preset gpt2 --max_steps 500
    accelerate launch recipes/pretrain.py --corpus tiny_shakespeare --preset cpu --tokenizer bpe   # a laptop
    accelerate launch recipes/pretrain.py --corpus data/mine --preset cpu --tokenizer data/mine    # your shards

--corpus is a folder of shards, made by prepare_corpus.py, whose tokenizer is then the default; or any text that the
other recipes take. A step has 512 x 1,024 tokens, on however many devices: --gradient_accumulation_steps follows from
their number and --per_device_train_batch_size, unless it is given.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nanogpt_hf.common.cli import run_recipe
from nanogpt_hf.common.settings import TrainingSettings
from nanogpt_hf.runs.command_line import preset_here, read_settings

SEQUENCES = (
    512  # a step: 512 x 1,024 tokens are the 0.5M of GPT-3 (Brown et al. 2020, table 2.1) and of nanoGPT
)

# GPT-2's paper says neither learning rates nor schedule. Learning rates: those of GPT-3's sizes of the same name; 6e-4
# is nanoGPT's too. Adam's betas, weight decay, clipping and cosine: GPT-3's appendix B. 600,000 steps of nanoGPT are
# 300 billion tokens; dropout is nanoGPT's for pretraining.
GPT2 = dict(
    architecture="gpt2",
    dropout=0.0,
    learning_rate=6e-4,
    lr_scheduler_type="cosine_with_min_lr",
    warmup_steps=2000,
    weight_decay=0.1,
    adam_beta1=0.9,
    adam_beta2=0.95,
    max_steps=600_000,
    per_device_train_batch_size=32,  # 64 took 22.6 GiB on an H200 in bfloat16
    eval_steps=1000,
    save_steps=1000,
)
BY_PRESET = {
    "cpu": dict(architecture="gpt2", dropout=0.0, learning_rate=1e-3, per_device_train_batch_size=8),
    "gpt2": GPT2,
    "gpt2-medium": GPT2 | dict(learning_rate=3e-4, per_device_train_batch_size=16),
    "gpt2-large": GPT2 | dict(learning_rate=2.5e-4, per_device_train_batch_size=8),
    "gpt2-xl": GPT2 | dict(learning_rate=2e-4, per_device_train_batch_size=4),
}


def defaults(said: Mapping[str, Any]) -> Mapping[str, Any]:
    """By preset, corpus and number of processes."""
    from nanogpt_hf.data.shards import is_shards

    preset = preset_here(said, without_gpu="cpu", with_gpu="gpt2")
    corpus = str(said.get("corpus", ""))
    chosen = {"preset": preset, "tokenizer": "openai-community/gpt2"} | BY_PRESET.get(preset, GPT2)
    if is_shards(corpus):
        chosen["tokenizer"] = corpus
        chosen["output_dir"] = f"runs/{Path(corpus).resolve().name}-{preset}"
    if preset != "cpu":
        each = str(said.get("per_device_train_batch_size", chosen["per_device_train_batch_size"]))
        if each.isdecimal() and int(each):  # what else a user gives is refused with the other settings
            at_once = int(each) * int(os.environ.get("WORLD_SIZE", "1"))
            chosen["gradient_accumulation_steps"] = max(1, round(SEQUENCES / at_once))
    return chosen


def main() -> None:
    settings = read_settings(TrainingSettings, __doc__, defaults)
    from nanogpt_hf.runs.pretraining import pretrain  # with torch, which takes seconds

    pretrain(settings)


if __name__ == "__main__":
    run_recipe(main)
