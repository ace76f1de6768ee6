"""Tune a model on preferences (DPO): of two texts for a prompt the chosen one becomes likelier than the rejected one.

    accelerate launch recipes/tune_preferences.py --model_name_or_path runs/tiny_pushkin-char --corpus preferences.jsonl
    accelerate launch recipes/tune_preferences.py --model_name_or_path runs/tiny_pushkin-char --corpus preferences.jsonl \\
        --use_cpu --max_steps 20                                                # a short try

A row holds prompt, chosen and rejected. Pairs that the scanner has judged: recipes/make_dialogues.py --kind verse_pairs.
"""

from nanogpt_hf.common.running import run_recipe
from nanogpt_hf.common.tuning_settings import PreferenceSettings
from nanogpt_hf.runs.command_line import read_settings


def main() -> None:
    settings = read_settings(PreferenceSettings, __doc__, {})
    from nanogpt_hf.runs.tuning import tune_preferences  # with torch, which takes seconds

    tune_preferences(settings)


if __name__ == "__main__":
    run_recipe(main)
