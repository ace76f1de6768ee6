"""Pretrain a GPT on a corpus of any size: as good as it gets in the time or the tokens that there are.

    accelerate launch recipes/pretrain.py --corpus data/openwebtext                     # GPT-2's size, 20 tokens a parameter
    accelerate launch recipes/pretrain.py --corpus data/openwebtext --max_minutes 10
    accelerate launch --config_file accelerate_configs/gpus_ddp.yaml --num_processes 2 recipes/pretrain.py \\
        --corpus data/openwebtext --preset gpt2-medium --train_tokens 1e9
    accelerate launch recipes/pretrain.py --corpus data/openwebtext --architecture gpt2 # exactly GPT-2
    accelerate launch recipes/pretrain.py --corpus tiny_shakespeare --preset cpu --tokenizer bpe   # a laptop
    accelerate launch recipes/pretrain.py --corpus data/mine --preset cpu --tokenizer data/mine    # your shards

--corpus is a folder of shards, made by prepare_corpus.py, whose tokenizer is then the default; or any text that the
other recipes take. The length is --train_tokens, --max_steps, --num_train_epochs or --max_minutes; without any, 20 tokens a
parameter, but no text more than four times. The learning rates come down to zero at its end, and the batch is the
one that takes the least time for that length (runs/budget.py), on however many devices. The first half of a new model's
steps reads its windows in pieces of an eighth of the context (--short_steps 0: none; measured in runs of up to 20 million
tokens); not with the preset cpu, and not where that were fewer than 16 tokens.

nanoGPT's settings for GPT-2 (--gradient_accumulation_steps is for one device):

    accelerate launch recipes/pretrain.py --corpus data/openwebtext --architecture gpt2 --optim adamw --learning_rate 6e-4 \\
        --vector_learning_rate 6e-4 --lr_scheduler_type cosine_with_min_lr --warmup_steps 2000 --max_steps 600000 \\
        --short_steps 0 --per_device_train_batch_size 32 --gradient_accumulation_steps 16
"""

import os
from collections.abc import Mapping
from typing import Any

from nanogpt_hf.common.presets import find_preset
from nanogpt_hf.common.running import run_recipe
from nanogpt_hf.common.settings import TrainingSettings
from nanogpt_hf.runs.command_line import preset_here, read_settings

# benchmarks/RESULTS.md has the sweeps of what is not somebody's. Betas, weight decay and clipping are GPT-3's (Brown et
# al. 2020, appendix B).
DEFAULTS = dict(
    architecture="qwen3",
    dropout=0.0,
    optim="muon",
    muon_learning_rate=0.02,
    muon_momentum=0.9,
    vector_learning_rate=0.03,
    weight_decay=0.1,
    adam_beta1=0.9,
    adam_beta2=0.95,
    lr_scheduler_type="linear",
    warmup_steps=0.05,
    max_steps=None,
    eval_steps=1000,
    save_steps=1000,
)
# Of GPT-2's own block, by runs of 4.5 million tokens that changed one rate each: positions gained most from 0.01, norms and
# biases about as much from 0.01 as from 0.003.
EXACTLY_GPT2 = dict(muon_learning_rate=0.03, vector_learning_rate=0.01)
ON_A_CPU = dict(dropout=None, attn_implementation="eager", muon_learning_rate=0.03, learning_rate=0.02)
# The first windows are so many times shorter than the context (measured up to 20 million tokens), of so many tokens at
# least. A base that goes on has learned already what they teach.
SHORTER, SHORTEST = 8, 16
SEQUENCES_AT_ONCE = {
    "cpu": 8,
    "gpt2-medium": 16,
    "gpt2-large": 8,
    "gpt2-xl": 4,
}  # others 32: 13 GiB at GPT-2's size


def residual_scale(n_layer: int) -> float:
    """By how much GPT-2 starts the ends of residual branches shorter than other matrices; so Muon moves them too."""
    return round((2 * n_layer) ** -0.5, 4)


def defaults(said: Mapping[str, Any]) -> Mapping[str, Any]:
    """By preset, length, corpus and number of processes."""
    from nanogpt_hf.data.shards import is_shards
    from nanogpt_hf.runs import budget
    from nanogpt_hf.training.hardware import device_type

    preset = preset_here(said, without_gpu="cpu", with_gpu="gpt2")
    size, corpus = find_preset(preset), str(said.get("corpus", ""))
    at_once = SEQUENCES_AT_ONCE.get(preset, 32)
    chosen = DEFAULTS | {"preset": preset, "tokenizer": "openai-community/gpt2"}
    if is_shards(corpus):
        chosen["tokenizer"] = corpus
        chosen["output_dir"] = f"runs/{os.path.basename(os.path.realpath(corpus))}-{preset}"
    length_is_said = any(said.get(name) for name in budget.LENGTHS)
    if preset == "cpu":
        length = {} if length_is_said else {"max_steps": 2000}
        return chosen | ON_A_CPU | length | {"per_device_train_batch_size": at_once}
    if said.get("architecture") == "gpt2":
        chosen |= EXACTLY_GPT2
    chosen["muon_residual_scale"] = residual_scale(said.get("n_layer") or size.n_layer)
    # A tied embedding of twice the width takes steps shorter by the root of two, as in nanochat.
    chosen["learning_rate"] = round(3e-3 * (768 / size.n_embd) ** 0.5, 5)
    if said.get("architecture") in (None, "qwen3", "modern") and not said.get("n_embd"):
        chosen["n_head"] = budget.heads_of(preset)
    tokens = budget.planned_tokens(said, size, device_type(bool(said.get("use_cpu"))))
    if not length_is_said:
        chosen["train_tokens"] = tokens
    devices = int(os.environ.get("WORLD_SIZE", "1"))
    block_size = said.get("n_positions") or size.n_positions
    shorter = block_size // SHORTER
    if shorter * SHORTER == block_size and shorter >= SHORTEST and not said.get("model_name_or_path"):
        chosen["short_positions"] = shorter
    sequences = budget.sequences_per_step(tokens, said.get("max_steps"), block_size, devices)
    each = said.get("per_device_train_batch_size") or min(at_once, max(1, sequences // devices))
    chosen["per_device_train_batch_size"] = each
    chosen["gradient_accumulation_steps"] = max(1, round(sequences / (each * devices)))
    return chosen


# For --help: of the sizes that are measured.
defaults.table = {  # type: ignore[attr-defined]
    "cpu": DEFAULTS | ON_A_CPU | {"max_steps": 2000, "muon_residual_scale": 1.0},
    "gpt2": DEFAULTS
    | {"max_steps": "by the length", "learning_rate": 3e-3, "muon_residual_scale": residual_scale(12)}
    | {"short_positions": "an eighth of n_positions"},
}


def main() -> None:
    settings = read_settings(TrainingSettings, __doc__, defaults)
    from nanogpt_hf.runs.pretraining import pretrain  # with torch, which takes seconds

    pretrain(settings)


if __name__ == "__main__":
    run_recipe(main)
