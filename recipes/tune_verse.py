"""Tune a model by rewards: it writes stanzas, each line is scanned, and what fits the metre and rhymes becomes likelier.

    accelerate launch recipes/tune_verse.py --model_name_or_path runs/tiny_pushkin-char         # on a GPU, 5 minutes
    accelerate launch recipes/tune_verse.py --model_name_or_path runs/tiny_pushkin-char --scheme abab --feet 3
    accelerate launch recipes/tune_verse.py --model_name_or_path runs/tiny_pushkin-char --reward metre my_rewards:joy
    accelerate launch recipes/tune_verse.py --model_name_or_path runs/tiny_pushkin-char --use_cpu --max_steps 5

The prompts are first lines of the corpus's stanzas; a tenth of them is kept for the table before and after, which is
written to the run folder as verse.md. Half of a run on a GPU are drills in rhyme on those stanzas (--drill_steps). Without a
GPU the batches are small, and there are no drills. It needs the extra verse.
"""

from collections.abc import Mapping
from typing import Any

from nanogpt_hf.common.running import run_recipe
from nanogpt_hf.common.tuning_settings import RewardSettings
from nanogpt_hf.runs.command_line import preset_here, read_settings

DEFAULTS = {
    "cpu": dict(
        per_device_train_batch_size=64,
        gradient_accumulation_steps=1,
        lines=4,
        drill_steps=0,
        max_steps=200,
        optim="adamw",
        learning_rate=3e-3,
        lr_scheduler_type="linear",
        text_coef=0.1,
        eval_texts=32,
        logging_steps=1,
        eval_steps=40,
        save_steps=200,
    ),
    "gpu": {},
}
GUARDS = ("originality", "variety", "spelling", "stresses")
# A small model learns metre in ten minutes if it is told how near it comes, and hardly a rhyme.
REWARDS = {
    "cpu": {"metre": 1, "feet": 1, "lines": 0.25},
    "gpu": {"metre": 1, "endings": 1, "rhyme": 3, "lines": 2},
}


def defaults(said: Mapping[str, Any]) -> Mapping[str, Any]:
    preset = preset_here(said, "cpu", "gpu")
    rewards = REWARDS[preset]
    weights = {} if said.get("reward") else {"reward": [*rewards], "reward_weights": [*rewards.values()]}
    # A small model finds out that words of one syllable fit any metre; but English verse has whole lines of them.
    guards = {"guards": [*GUARDS]} if said.get("form", "onegin") == "onegin" else {}
    return weights | guards | DEFAULTS[preset]


def main() -> None:
    settings = read_settings(RewardSettings, __doc__, defaults)
    from nanogpt_hf.runs.tuning import tune_rewards  # with torch, which takes seconds

    tune_rewards(settings)


if __name__ == "__main__":
    run_recipe(main)
