"""Train a GPT on subwords from scratch: byte-level BPE of the corpus's own, or any tokenizer.

    accelerate launch recipes/pretrain_bpe.py                                   # Shakespeare, 1,024 tokens
    accelerate launch recipes/pretrain_bpe.py --tokenizer tokenizers/tiny_shakespeare-bpe-4096
    accelerate launch recipes/pretrain_bpe.py --corpus tiny_pushkin --vocab_size 4096
    accelerate launch recipes/pretrain_bpe.py --tokenizer openai-community/gpt2 # GPT-2's 50,257 tokens, from the Hub
    accelerate launch recipes/pretrain_bpe.py --preset cpu --max_steps 300      # a short try

All but the defaults is as in pretrain_char.py. Losses in nats a token compare only within one tokenizer;
recipes/compare.py puts all on one scale, bits per byte.
"""

from nanogpt_hf.common.cli import by_preset
from nanogpt_hf.common.running import run_recipe
from nanogpt_hf.common.settings import TrainingSettings
from nanogpt_hf.runs.command_line import read_settings, size_here

# Tiny Shakespeare's training split is 411,000 tokens of 1,024: 400 steps of 8 x 128 or 25 of 64 x 256.
DEFAULTS = {
    "cpu": dict(
        tokenizer="bpe",
        vocab_size=1024,
        architecture="qwen3",
        attn_implementation="eager",
        optim="muon",
        muon_learning_rate=0.03,
        learning_rate=3e-3,
        weight_decay=0.0,
        per_device_train_batch_size=8,
        max_steps=1500,
        eval_steps=250,
        save_steps=1000,
    ),
    "baby": dict(
        tokenizer="bpe",
        vocab_size=1024,
        architecture="qwen3",
        dropout=0.4,
        torch_compile=False,
        optim="muon",
        muon_learning_rate=0.015,
        learning_rate=3e-3,
        weight_decay=0.1,
        per_device_train_batch_size=64,
        max_steps=700,
        eval_steps=50,
        save_steps=350,
    ),
}


def main() -> None:
    settings = read_settings(TrainingSettings, __doc__, by_preset(DEFAULTS, size_here))
    from nanogpt_hf.runs.pretraining import pretrain  # with torch, which takes seconds

    pretrain(settings)


if __name__ == "__main__":
    run_recipe(main)
