"""Peak memory of the project's training step on a GPU, beside what `nanogpt_hf.planning` says it should be.

    PYTHONPATH=. python benchmarks/memory.py                         # about a minute on one H100
    PYTHONPATH=. python benchmarks/memory.py --output_dir runs/memory

Every variant runs in a process of its own, several at once on every GPU that there is: each counts only its own memory
(torch.cuda.max_memory_allocated, after the optimiser's first step). --output_dir gets memory.json.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import set_seed

from nanogpt_hf import NanoGPTForCausalLM, preset_config
from nanogpt_hf.analysis.planning import GIB, Layout, measure_size, step_memory
from nanogpt_hf.common.cli import parse
from nanogpt_hf.common.errors import UserError
from nanogpt_hf.common.fields import setting
from nanogpt_hf.common.running import run_recipe
from nanogpt_hf.common.settings import TrainingSettings
from nanogpt_hf.common.tables import table
from nanogpt_hf.data.token_stream import TokenStream
from nanogpt_hf.training.hardware import make_accelerator
from nanogpt_hf.training.objectives import LanguageModeling
from nanogpt_hf.training.optimization import make_optimizers
from nanogpt_hf.training.reporting import library_versions
from nanogpt_hf.training.stepping import Stepper, global_batch_size

# preset, architecture, sequences a micro-batch, micro-batches, gradient checkpointing, torch.compile
VARIANTS = [
    ("gpt2", "gpt2", 8, 1, False, True),
    ("gpt2", "gpt2", 8, 1, True, True),
    ("gpt2", "qwen3", 8, 1, False, True),
    ("gpt2", "gpt2", 8, 1, False, False),
    ("gpt2", "gpt2", 4, 2, False, False),
    ("gpt2", "gpt2", 8, 1, True, False),
    ("gpt2", "qwen3", 8, 1, False, False),
    ("gpt2-medium", "gpt2", 4, 1, False, False),
    ("gpt2-medium", "gpt2", 4, 1, True, False),
    ("gpt2-large", "gpt2", 2, 1, False, False),
    ("gpt2-large", "gpt2", 1, 1, True, False),
]
AT_ONCE = 4  # processes a GPU: the largest four together take under 60 GiB
COLUMNS = {
    "variant": ("variant", "{}"),
    "measured_gib": ("measured GiB", "{:.2f}"),
    "planned_gib": ("planned GiB", "{:.2f}"),
    "difference": ("difference", "{:+.1%}"),
}


@dataclass
class MemorySettings:
    output_dir: str | None = setting(None, "folder for memory.json")
    variant: int | None = setting(None, "measure this one alone and print its bytes")


def step_config(variant: tuple):
    name, architecture = variant[:2]
    return preset_config(name, architecture=architecture, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def measure(variant: tuple) -> int:
    """Bytes at the peak of two steps, after two others."""
    _, _, batch_size, micro_batches, checkpointing, compiled = variant
    settings = TrainingSettings(
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=micro_batches,
        torch_compile=compiled,
        learning_rate=1e-4,
    )
    accelerator = make_accelerator(settings)
    set_seed(0)
    model = NanoGPTForCausalLM(step_config(variant))
    T = model.config.n_positions
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    ids = torch.randint(model.config.vocab_size, (T * batch_size * micro_batches * 2,)).numpy()
    stream = TokenStream(ids, T, accelerator.device)
    objective = LanguageModeling(accelerator, stream, global_batch_size(settings, accelerator), seed=0)
    model, *optimizers = accelerator.prepare(model, *make_optimizers(model, settings))
    model.train()
    optimizers = [optimizer.optimizer for optimizer in optimizers]
    take_step = Stepper(accelerator, settings, model, optimizers, objective, lambda step: 1.0)
    take_step.steps_before_capture = -1  # memory as the allocator has it, without a graph's own
    for step in range(4):
        if step == 2:
            torch.cuda.reset_peak_memory_stats()
        take_step(step)
    return torch.cuda.max_memory_allocated()


def compare(number: int) -> dict:
    """Measured in a process of its own, and planned."""
    variant = VARIANTS[number]
    name, architecture, batch_size, micro_batches, checkpointing, compiled = variant
    done = subprocess.run(
        [sys.executable, __file__, "--variant", str(number)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": str(number % torch.cuda.device_count())},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"variant {number} {variant} failed:\n{done.stdout}{done.stderr}")
    measured = int(done.stdout.split()[-1])
    layout = Layout(gradient_checkpointing=checkpointing)
    terms = step_memory(measure_size(step_config(variant)), layout, batch_size, micro_batches, compiled)
    planned = sum(terms.values())
    words = [f"{name} ({architecture})", f"{micro_batches} x {batch_size} x 1,024"]
    words += ["checkpointing"] * checkpointing + ["torch.compile" if compiled else "eager"]
    return {
        "variant": ", ".join(words),
        "measured_bytes": measured,
        "planned_bytes": {term: round(value) for term, value in terms.items()},
        "measured_gib": measured / GIB,
        "planned_gib": planned / GIB,
        "difference": planned / measured - 1,
    }


def main() -> None:
    settings = parse(MemorySettings, __doc__)
    if not torch.cuda.is_available():
        raise UserError("there is no CUDA GPU here, and this measures one.")
    if settings.variant is not None:
        return print(measure(VARIANTS[settings.variant]))
    with ThreadPoolExecutor(AT_ONCE * torch.cuda.device_count()) as pool:
        rows = list(pool.map(compare, range(len(VARIANTS))))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n\n{table(rows, COLUMNS)}", end="")
    if settings.output_dir:
        results = {"gpu": torch.cuda.get_device_name(), "versions": library_versions(), "variants": rows}
        Path(settings.output_dir).mkdir(parents=True, exist_ok=True)
        text = json.dumps(results, indent=1) + "\n"
        (Path(settings.output_dir) / "memory.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_recipe(main)
