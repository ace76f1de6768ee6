"""Write text with a model: a run folder, any causal language model's folder, or a Hub id.

    python recipes/sample.py --model runs/tiny_shakespeare-char
    python recipes/sample.py --model runs/tiny_shakespeare-char --prompt "ROMEO:" --max_new_tokens 2000
    python recipes/sample.py --model openai-community/gpt2 --prompt "Once" --num_return_sequences 3 --stop $'\\n\\n'

Texts may be longer than the model's context: its window slides.
"""

import os
import sys
from dataclasses import dataclass

import torch

from nanogpt_hf.common.cli import parse, run_recipe
from nanogpt_hf.common.errors import UserError
from nanogpt_hf.common.settings import setting
from nanogpt_hf.common.text import printable
from nanogpt_hf.generation.text import generate_text, stream_text
from nanogpt_hf.model.loading import load_model_and_tokenizer
from nanogpt_hf.training.hardware import device_type, has_fast_bf16


@dataclass
class SampleSettings:
    model: str | None = setting(None, "folder or Hub id")
    prompt: str = setting("\n", "text to continue; any character will do")
    num_return_sequences: int = setting(1, "how many continuations")
    max_new_tokens: int = setting(500, "length of each, in tokens")
    temperature: float = setting(0.8, "0: always the likeliest token; 1: as the model has learned")
    top_k: int | None = setting(None, "choose among the k likeliest tokens only")
    top_p: float | None = setting(
        None, "choose among the likeliest tokens that hold this share of probability"
    )
    stop: list[str] = setting([], "end before the first of these strings")
    seed: int | None = setting(None, "the same seed gives the same text on the same device")
    use_cpu: bool = setting(False, "leave a GPU alone")

    def __post_init__(self):
        if self.model is None:
            raise UserError("--model is missing: give a run folder or a Hub id.")
        # Python spells the bytes of an argument as surrogates where the locale is not UTF-8.
        self.prompt, *self.stop = (os.fsencode(text).decode("utf-8") for text in (self.prompt, *self.stop))
        for name in ("num_return_sequences", "max_new_tokens", "top_k"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}, it must be at least 1.")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature is {self.temperature}, it must be 0 or more.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top_p is {self.top_p}, it must be more than 0 and at most 1.")


def main() -> None:
    settings = parse(SampleSettings, __doc__)
    device = device_type(settings.use_cpu)
    dtype = torch.bfloat16 if device == "cuda" and has_fast_bf16(device) else torch.float32
    model, tokenizer = load_model_and_tokenizer(settings.model, dtype)
    model.to(device)
    options = {
        name: getattr(settings, name)
        for name in (
            "num_return_sequences",
            "max_new_tokens",
            "temperature",
            "top_k",
            "top_p",
            "stop",
            "seed",
        )
    }
    if settings.num_return_sequences == 1:
        sys.stdout.write(printable(settings.prompt))
        for (piece,) in stream_text(model, tokenizer, settings.prompt, **options):
            sys.stdout.write(printable(piece))
            sys.stdout.flush()
        print()
        return
    for number, text in enumerate(generate_text(model, tokenizer, settings.prompt, **options), start=1):
        print(f"--- {number}\n{printable(settings.prompt + text)}")


if __name__ == "__main__":
    run_recipe(main)
