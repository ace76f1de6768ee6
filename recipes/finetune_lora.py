"""Fine-tune a pretrained GPT-2, or a model of ours, on a text: a small adapter (LoRA), or all its weights.

accelerate launch recipes/finetune_lora.py                                  # GPT-2 124M on Pushkin; wants a GPU
accelerate launch recipes/finetune_lora.py --corpus my_text.txt --merge     # a plain GPT-2 checkpoint as well
accelerate launch recipes/finetune_lora.py --extend_vocabulary 1024         # subwords for another script
accelerate launch recipes/finetune_lora.py --full --learning_rate 5e-5      # no adapter
accelerate launch recipes/finetune_lora.py --model_name_or_path runs/base --max_steps 300   # a small base, CPU
"""

from collections.abc import Mapping

from nanogpt_hf.finetuning import finetune
from nanogpt_hf.named_corpora import DOCUMENT_ENDS
from nanogpt_hf.settings import FinetuningSettings, parse, run_recipe


def defaults(said: Mapping) -> Mapping:
    corpus = said.get("corpus", "tiny_pushkin")
    return {"document_end": DOCUMENT_ENDS.get(corpus)}


def main() -> None:
    finetune(parse(FinetuningSettings, __doc__, defaults=defaults))


if __name__ == "__main__":
    run_recipe(main)
