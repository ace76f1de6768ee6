"""Plan a training run that nobody has started: parameters, FLOPs, days, and memory per GPU by parallelism.

    python recipes/plan.py --preset gpt2 --gpus 1 --gpu rtx4090 --per_device_train_batch_size 8
    python recipes/plan.py --preset gpt3-175b --gpus 1024 --gpu h100 --output_dir runs/plan-175b
    python recipes/plan.py --preset gpt3-13b --gpus 64 --gpu a100 --tp_size 8 --gradient_checkpointing
    python recipes/plan.py --preset gpt2-xl --gpus 2 --gpu mine --gpu_memory_gib 32 --gpu_tflops 200

It needs no GPU. Without sizes of its own (--dp_replicate_size, --dp_shard_size, --tp_size, --cp_size, as accelerate's
ParallelismConfig names them) it compares the usual layouts. --output_dir gets plan.json and memory.png.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from nanogpt_hf.common.cli import parse
from nanogpt_hf.common.errors import UserError
from nanogpt_hf.common.fields import Settings, setting
from nanogpt_hf.common.files import files_written_whole, written_if_possible
from nanogpt_hf.common.paths import check_unused
from nanogpt_hf.common.presets import find_preset
from nanogpt_hf.common.running import run_recipe, tell
from nanogpt_hf.common.tables import table
from nanogpt_hf.training.gpus import find_gpu

BUDGET_COLUMNS = {
    "tokens_by": ("tokens by", "{}"),
    "tokens": ("tokens", "{:.3g}"),
    "steps": ("steps", "{:,}"),
    "matmul_flops": ("6ND FLOPs", "{:.3g}"),
    "attention_flops": ("attention FLOPs", "{:.3g}"),
    "days": ("days", "{:,.3g}"),
    "gpu_hours": ("GPU hours", "{:,.0f}"),
}
LAYOUT_COLUMNS = {
    "layout": ("layout", "{}"),
    "gradient_accumulation_steps": ("micro-batches a step", "{:,}"),
    "tokens_per_step": ("tokens a step", "{:,}"),
    "memory_gib": ("GiB per GPU", "{:,.1f}"),
    "verdict": ("fits", "{}"),
    "largest_batch_size": ("largest micro-batch that fits", "{:,}"),
}
CHARACTERS = (
    384  # tokens: those of a text in one alphabet, 256 bytes, the end of text, in whole multiples of 64
)
CONFIG_FIELDS = ("n_kv_head", "vocab_size", "n_positions")


@dataclass(frozen=True)
class PlanSettings(Settings):
    """Planning"""

    preset: str = setting("gpt2", "named size: cpu, baby, gpt2 … gpt2-xl, gpt3-small … gpt3-175b")
    architecture: Literal["gpt2", "qwen3", "llama", "modern"] = setting(
        "gpt2", "gpt2, qwen3 or llama: the block of that family (modern is qwen3's old name)"
    )
    n_kv_head: int | None = setting(None, "heads of keys and values; default: as many as of queries", ge=1)
    vocab_size: int | None = setting(None, "tokens of the vocabulary; default: the preset's", ge=1)
    n_positions: int | None = setting(None, "context length, in tokens; default: the preset's", ge=1)
    dropout: float = setting(0.0, "its masks take memory")
    gpus: int = setting(1, "GPUs in all", ge=1)
    gpu: str = setting(
        "h100", "b200, h200, h100, a100, a100-40gb, l40s, l4, rtx4090, rtx3090, or any other name"
    )
    gpu_memory_gib: float | None = setting(None, "memory of a GPU, instead of the table's", gt=0, lt=1e9)
    gpu_tflops: float | None = setting(
        None, "its dense bfloat16 TFLOP/s, instead of the table's", gt=0, lt=1e9
    )
    mfu: float = setting(0.4, "share of those TFLOP/s that the model's FLOPs will get", gt=0, le=1)
    batch_tokens: int | None = setting(
        None, "tokens a step on all GPUs; default: those published for the preset", ge=1
    )
    per_device_train_batch_size: int = setting(1, "sequences a device and micro-batch", ge=1)
    dp_replicate_size: int | None = setting(None, "copies that see different data; alone: DDP")
    dp_shard_size: int | None = setting(
        None, "GPUs that share one copy (FSDP2); default: those that are left"
    )
    tp_size: int | None = setting(None, "GPUs that split every matrix of a block")
    cp_size: int | None = setting(None, "GPUs that split the sequence")
    gradient_checkpointing: bool = setting(False, "keep the blocks' inputs alone, in the layout asked for")
    reshard_after_forward: bool = setting(True, "FSDP2 gives gathered weights back, in the layout asked for")
    torch_compile: bool = setting(False, "count activations as compiled code keeps them")
    output_dir: str | None = setting(None, "folder for plan.json and memory.png")
    overwrite_output_dir: bool = setting(False, "replace these files in the folder")


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(PlanSettings, __doc__, argv)
    if settings.output_dir and not settings.overwrite_output_dir:
        check_unused(settings.output_dir, ("plan.json", "memory.png"))
    preset = find_preset(settings.preset)
    gpu = find_gpu(settings.gpu, settings.gpu_memory_gib, settings.gpu_tflops)
    from nanogpt_hf.analysis.planning import (  # with torch, which takes seconds
        LAYOUT_SIZES,
        RESERVED,
        check_layout,
        draw_memory,
        fill_layout,
        measure_size,
        plan_budgets,
        plan_layout,
        usual_layouts,
    )
    from nanogpt_hf.model.loading import make_config

    fields = {name: value for name in CONFIG_FIELDS if (value := getattr(settings, name))}
    fields = ({} if preset.vocab_size else {"vocab_size": CHARACTERS}) | fields
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), settings.dropout)
    config = make_config(settings.preset, architecture=settings.architecture, **fields, **dropouts)
    sizes = {name: getattr(settings, name) for name in LAYOUT_SIZES if getattr(settings, name) is not None}
    if sizes or settings.gradient_checkpointing or not settings.reshard_after_forward:
        extra = {
            name: getattr(settings, name) for name in ("gradient_checkpointing", "reshard_after_forward")
        }
        layouts = [fill_layout(settings.gpus, **sizes, **extra)]
        check_layout(layouts[0], config, settings.gpus)
    else:
        layouts = usual_layouts(config, settings.gpus)
    size = measure_size(config)
    batch_tokens = settings.batch_tokens or preset.batch_tokens
    micro_batch = settings.per_device_train_batch_size * config.n_positions
    if settings.batch_tokens and settings.batch_tokens < micro_batch:
        raise UserError(
            f"--batch_tokens is {settings.batch_tokens:,}, less than one micro-batch of {micro_batch:,} tokens: give "
            "more, or a smaller --per_device_train_batch_size or --n_positions."
        )
    batch = (settings.per_device_train_batch_size, batch_tokens, settings.torch_compile)
    rows = [plan_layout(size, layout, gpu, *batch) for layout in layouts]
    budgets = plan_budgets(size, settings.gpus, gpu, settings.mfu, batch_tokens)
    title = f"{settings.preset} ({settings.architecture}, {size.parameters:,} parameters) on {settings.gpus:,} {settings.gpu}"
    vocabulary = f", a vocabulary of {CHARACTERS} tokens, a text's characters"
    vocabulary = vocabulary if preset.vocab_size is None and not settings.vocab_size else ""
    batch_words = f"micro-batches of {settings.per_device_train_batch_size} x {config.n_positions:,} tokens"
    tell(
        f"{title}\n{config.n_layer} layers, {config.n_head} heads, width {config.n_embd:,}{vocabulary}; {batch_words}"
    )
    if preset.learning_rate:
        tell(f"published: {preset.batch_tokens:,} tokens a step, learning rate {preset.learning_rate:g}")
    tell(f"\nAt {settings.mfu:.0%} of {gpu.bf16_tflops:g} TFLOP/s a GPU:\n\n{table(budgets, BUDGET_COLUMNS)}")
    verdicts = [row | {"verdict": "yes" if row["fits"] else "no"} for row in rows]
    tell(
        f"Memory, {RESERVED:.0%} of {gpu.memory_gib:g} GiB kept back:\n\n{table(verdicts, LAYOUT_COLUMNS)}".rstrip()
    )
    if settings.output_dir:
        plan = {
            "preset": settings.preset,
            "architecture": settings.architecture,
            "parameters": size.parameters,
        }
        plan |= {"gpus": settings.gpus, "gpu": {"name": settings.gpu} | asdict(gpu), "mfu": settings.mfu}
        plan |= {"budgets": budgets, "layouts": rows}
        try:
            with files_written_whole(Path(settings.output_dir)) as staging:
                (staging / "plan.json").write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
                written_if_possible(
                    staging / "memory.png",
                    lambda path: draw_memory(path, f"{title}\n{batch_words}", rows, gpu),
                )
        except OSError as error:
            raise UserError(
                f"--output_dir {settings.output_dir} cannot be written ({error.strerror})."
            ) from error
        tell(f"\nwritten to {settings.output_dir}: plan.json, memory.png")


if __name__ == "__main__":
    run_recipe(main)
