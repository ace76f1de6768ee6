"""Train a character-level GPT from scratch.

    accelerate launch recipes/pretrain_char.py                                  # Shakespeare, on what is here
    accelerate launch recipes/pretrain_char.py --corpus tiny_pushkin
    accelerate launch recipes/pretrain_char.py --corpus my_text.txt --output_dir runs/mine
    accelerate launch recipes/pretrain_char.py --preset cpu --max_steps 300     # a short try

Without a GPU it takes the preset `cpu` (0.9M parameters, 2 to 6 minutes on 2 cores), with one `baby` (10.7M).
"""

from nanogpt_hf.common.cli import by_preset
from nanogpt_hf.common.running import run_recipe
from nanogpt_hf.common.settings import TrainingSettings
from nanogpt_hf.runs.command_line import read_settings, size_here

DEFAULTS = {
    "cpu": dict(
        architecture="qwen3",
        attn_implementation="eager",
        optim="muon",
        muon_learning_rate=0.03,
        muon_momentum=0.9,
        muon_residual_scale=0.3536,  # as GPT-2 starts these matrices: 1 / sqrt(2 x 4 layers)
        learning_rate=0.02,
        weight_decay=0.0,
        per_device_train_batch_size=8,
        max_steps=1500,
        eval_steps=250,
        save_steps=1000,
    ),
    "baby": dict(
        architecture="qwen3",
        n_positions=1024,
        rdrop_alpha=2.0,
        optim="muon",
        muon_learning_rate=0.015,
        learning_rate=3e-3,
        weight_decay=1.0,
        per_device_train_batch_size=16,
        max_steps=1800,
        logging_steps=50,
        eval_steps=300,
        save_steps=900,
    ),
}


def main() -> None:
    settings = read_settings(TrainingSettings, __doc__, by_preset(DEFAULTS, size_here))
    from nanogpt_hf.runs.pretraining import pretrain  # with torch, which takes seconds

    pretrain(settings)


if __name__ == "__main__":
    run_recipe(main)
