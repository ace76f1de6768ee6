"""What the machine has, and an Accelerator that uses it."""

import os
from collections.abc import Callable, Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from .settings import TrainingSettings


def device_type(use_cpu: bool = False) -> str:
    """cuda, mps or cpu: what a run would take."""
    if use_cpu or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes"):
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def make_accelerator(settings: TrainingSettings) -> Accelerator:
    """An Accelerator for the processes and devices of this launch.

    Raises:
        ValueError: a precision that the device does not have.
    """
    device = device_type(settings.use_cpu)
    if settings.fp16 and device == "cpu":
        raise ValueError("--fp16 needs a GPU: leave it out.")
    if settings.bf16 and device == "cuda" and not torch.cuda.is_bf16_supported():
        raise ValueError("--bf16 is set, but this GPU has no bfloat16: use --fp16 or neither.")
    bf16 = settings.bf16
    if bf16 is None:
        bf16 = not settings.fp16 and has_fast_bf16(device)
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    if device == "cpu":
        use_all_cores()
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision="fp16" if settings.fp16 else "bf16" if bf16 else "no",
        log_with=settings.report_to or None,
        project_config=ProjectConfiguration(logging_dir=os.path.join(settings.output_dir or "", "trackers")),
    )


def has_fast_bf16(device: str) -> bool:
    """Whether the hardware multiplies bfloat16 matrices itself, and faster than float32 ones."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and torch.cpu._is_avx512_bf16_supported()


def use_all_cores() -> None:
    """`accelerate launch` gives a lone CPU process one thread unless it is told otherwise; take them all."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and os.environ.get("OMP_NUM_THREADS") == "1" and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        torch.set_num_threads(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        )


def describe_device(accelerator: Accelerator) -> str:
    device = accelerator.device
    if device.type == "cpu":
        threads = torch.get_num_threads()
        name = f"CPU, {threads} thread{'s' * (threads != 1)}"
    else:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "Apple GPU"
    count = accelerator.num_processes
    precision = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[accelerator.mixed_precision]
    return f"{name}{f' x {count} processes' if count > 1 else ''}, {precision}"


def choose_defaults(by_preset: Mapping[str, Mapping]) -> Callable[[Mapping], Mapping]:
    """A recipe's defaults for the size that suits the hardware, as `parse` takes them.

    Args:
        by_preset: defaults of the presets `cpu` (taken without a GPU) and `baby` (with one, and for all others).
    """

    def defaults(said: Mapping) -> Mapping:
        without_gpu = device_type(bool(said.get("use_cpu"))) == "cpu"
        preset = said.get("preset") or ("cpu" if without_gpu else "baby")
        return {"preset": preset} | by_preset.get(preset, by_preset["baby"])

    return defaults
