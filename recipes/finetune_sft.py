"""Tune a model on what it should answer (SFT): loss on the answers alone, conversations packed side by side.

    accelerate launch recipes/finetune_sft.py --model_name_or_path runs/tiny_pushkin-char --corpus dialogues.jsonl
    accelerate launch recipes/finetune_sft.py --model_name_or_path openai-community/gpt2 --corpus org/chats --full false
    accelerate launch recipes/finetune_sft.py --model_name_or_path runs/tiny_pushkin-char --corpus dialogues.jsonl \\
        --use_cpu --max_steps 20                                                # a short try

A row holds messages, prompt and completion, or instruction and output (input too). Messages are written by the base's
chat template; a base without one gets ours, with the marks of the roles as new tokens. Prompt and completion stand
side by side as they are. Dialogues of a corpus: recipes/make_dialogues.py.
"""

from nanogpt_hf.common.running import run_recipe
from nanogpt_hf.common.tuning_settings import CompletionSettings
from nanogpt_hf.runs.command_line import read_settings


def main() -> None:
    settings = read_settings(CompletionSettings, __doc__, {})
    from nanogpt_hf.runs.tuning import tune_completions  # with torch, which takes seconds

    tune_completions(settings)


if __name__ == "__main__":
    run_recipe(main)
