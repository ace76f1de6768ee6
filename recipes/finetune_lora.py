"""Fine-tune a pretrained GPT-2, or a model of ours, on a text: a small adapter (LoRA), or all its weights.

    accelerate launch recipes/finetune_lora.py                                  # GPT-2 124M on Pushkin; wants a GPU
    accelerate launch recipes/finetune_lora.py --corpus my_text.txt --merge     # a plain GPT-2 checkpoint as well
    accelerate launch recipes/finetune_lora.py --extend_vocabulary 1024         # subwords for another script
    accelerate launch recipes/finetune_lora.py --full --learning_rate 5e-5      # no adapter
    accelerate launch recipes/finetune_lora.py --model_name_or_path runs/base --extend_vocabulary 768 \\
        --learning_rate 1e-2 --max_steps 300                                    # a small base of ours, on a CPU

tiny_pushkin is cut into its poems, so that generation can end; other texts by --document_end. No character is lost,
and what the end-of-text tokens cost is in the validation loss, so bits a byte compare with pretraining's.

GPT-2's tokenizer spends 1.10 tokens on a character of tiny Pushkin (0.30 on Shakespeare); with 1,024 more, 0.47.

The defaults come from a GPT-2 of 0.9M parameters that knew Shakespeare only (benchmarks/RESULTS.md). Its best
learning rate was 1e-2, and there rank 16 was better than 64. Without --extend_vocabulary it learned next to nothing,
for it had never seen a Cyrillic letter. The default of 2e-3 is 1e-2 scaled to GPT-2's width; like the 3 epochs it was
not measured on GPT-2 itself. Early stopping, and keeping the best model, guard against too many.
"""

from collections.abc import Mapping
from typing import Any

from nanogpt_hf.common.cli import run_recipe
from nanogpt_hf.common.settings import FinetuningSettings
from nanogpt_hf.data.named_corpora import DOCUMENT_ENDS
from nanogpt_hf.runs.command_line import read_settings


def defaults(said: Mapping[str, Any]) -> Mapping[str, Any]:
    corpus = said.get("corpus", "tiny_pushkin")
    return {"document_end": DOCUMENT_ENDS.get(corpus)}


def main() -> None:
    settings = read_settings(FinetuningSettings, __doc__, defaults)
    from nanogpt_hf.runs.finetuning import finetune  # with torch, which takes seconds

    finetune(settings)


if __name__ == "__main__":
    run_recipe(main)
