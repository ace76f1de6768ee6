"""What the machine has, and an Accelerator that uses it."""

import os
import time
from collections.abc import Mapping

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, FullyShardedDataParallelPlugin
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration, TorchDynamoPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy

from ..common.errors import UserError
from ..common.settings import RunSettings
from ..common.text import counted

NOT_HERE = {  # variables of accelerate -> what they ask for
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "accelerate's ParallelismConfig",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
    "ACCELERATE_FP8_BACKEND": "float8",
}
FLAGS = (
    "ACCELERATE_DEBUG_MODE",
    "ACCELERATE_CPU_AFFINITY",
    "ACCELERATE_USE_CPU",
)  # read by accelerate itself
SETTLE_SECONDS = 0.5  # a hundred of the 5 ms after which Python's lock changes hands


def device_type(use_cpu: bool = False) -> str:
    """cuda, mps or cpu: what a run would take."""
    if use_cpu or _is_on(os.environ, "ACCELERATE_USE_CPU"):
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def device_for_writing(use_cpu: bool = False) -> tuple[str, torch.dtype]:
    """Where a model writes text, and the precision of its weights there."""
    device = device_type(use_cpu)
    return device, torch.bfloat16 if device == "cuda" and has_fast_bf16(device) else torch.float32


def make_accelerator(settings: RunSettings) -> Accelerator:
    """An Accelerator for the processes and devices of this launch.

    Raises:
        UserError: a precision that the device does not have, or a launch for other hardware than is here.
    """
    device = device_type(settings.use_cpu)
    check_launch(device, os.environ, settings.use_cpu)
    check_environment(device, os.environ)
    sharded = _is_on(os.environ, "ACCELERATE_USE_FSDP")
    if settings.fp16 and sharded:
        raise UserError("--fp16 does not go with FSDP2: use --bf16, or accelerate_configs/gpus_ddp.yaml.")
    if settings.fp16 and device == "cpu":
        raise UserError("--fp16 needs a GPU: leave it out.")
    if settings.bf16 and device == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError("--bf16 is set, but this GPU has no bfloat16: use --fp16 or neither.")
    bf16 = settings.bf16
    if bf16 is None:
        bf16 = not settings.fp16 and has_fast_bf16(device)
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    if device == "cpu":
        use_all_cores()
    plugin = shard_parameters("bf16" if bf16 else "no") if sharded else None
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision="fp16" if settings.fp16 else "bf16" if bf16 else "no",
        fsdp_plugin=plugin,
        # What `accelerate config` has left behind would divide the gradients, or compile the model as a whole.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        dynamo_plugin=TorchDynamoPlugin(
            backend="no", mode="default", fullgraph=False, dynamic=False, use_regional_compilation=False
        ),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, bucket_cap_mb=100)],
        log_with=settings.report_to or None,
        project_config=ProjectConfiguration(logging_dir=os.path.join(settings.output_dir or "", "trackers")),
    )


def _is_on(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").lower() in ("true", "1", "yes")


def check_environment(device: str, environment: Mapping[str, str]) -> None:
    """Raises UserError for a variable of accelerate's that asks for what no run here does; the others are overruled.

    Args:
        device: cuda, mps or cpu: what the run would take.
    """
    for name, what in NOT_HERE.items():
        if environment.get(name, "no").lower() not in ("", "0", "no", "false"):
            raise UserError(
                f"{name} is set, but {what} is not used here: unset it, or run `accelerate config` again."
            )
    wanted = environment.get("ACCELERATE_TORCH_DEVICE", device).split(":")[0]
    if wanted != device:
        raise UserError(
            f"ACCELERATE_TORCH_DEVICE is {wanted}, but this run takes {device}: unset it, or give --use_cpu."
        )
    for name in FLAGS:
        if environment.get(name, "0").lower() not in (
            "0",
            "1",
            "true",
            "false",
            "yes",
            "no",
            "on",
            "off",
            "y",
            "n",
            "t",
            "f",
        ):
            raise UserError(f"{name} is {environment[name]!r}, neither true nor false: unset it.")


def check_launch(device: str, environment: Mapping[str, str], use_cpu: bool = False) -> None:
    """Raises UserError when the launch settings are for other hardware than is here.

    accelerate launch tells several processes nothing of its use_cpu; that GPUs are hidden (gpu_ids: "-1,-1") does.

    Args:
        device: cuda, mps or cpu: what the run would take.
        environment: the variables that accelerate launch or torchrun has set.
        use_cpu: the user wants no GPU.
    """
    processes = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    sharded = _is_on(environment, "ACCELERATE_USE_FSDP")
    visible = environment.get("CUDA_VISIBLE_DEVICES", "0" if processes > 1 else "")
    for_gpus = "ACCELERATE_MIXED_PRECISION" in environment and visible[:1].isdigit() and not use_cpu
    if device != "cuda" and sharded or device == "cpu" and for_gpus:
        raise UserError(
            f"these launch settings are for {'FSDP2 on GPUs' if sharded else 'GPUs'}, and there is none to use: launch "
            "with --config_file accelerate_configs/cpu.yaml or cpu_2_processes.yaml."
        )
    if device == "cuda" and processes > torch.cuda.device_count():
        raise UserError(
            f"{processes} processes are launched on a machine with {torch.cuda.device_count()} GPUs: give "
            f"accelerate launch --num_processes {torch.cuda.device_count()}."
        )


def asks_for_checkpointing() -> bool:
    """Whether the launch settings ask for activation checkpointing."""
    return _is_on(os.environ, "ACCELERATE_USE_FSDP") and _is_on(os.environ, "FSDP_ACTIVATION_CHECKPOINTING")


def shard_parameters(precision: str) -> FullyShardedDataParallelPlugin:
    """FSDP2 as the launch settings describe it, with a precision of ours.

    Weights, optimiser and the sum of gradients over processes stay float32; the weights are gathered in
    bfloat16. accelerate's own policy sums gradients in bfloat16 and rounds the loss to it as well.

    Args:
        precision: bf16 or no.

    Raises:
        UserError: the launch settings ask for the first FSDP.
    """
    if os.environ.get("FSDP_VERSION", "2") != "2":
        raise UserError(
            "the launch settings ask for FSDP 1: set fsdp_version: 2, as accelerate_configs/gpus_fsdp2.yaml does."
        )
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        # transformers' own instead: the wrapper of accelerate (1.15) draws other dropout when it recomputes.
        activation_checkpointing=False,
        mixed_precision_policy=MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if precision == "bf16" else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # rotary angles stay float32
        ),
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
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        )


def settle(accelerator: Accelerator) -> None:
    """Wait for all processes, and then for the threads of the last collective, before the process group goes.

    gloo's destructor waits for its threads and keeps Python's lock, for which a thread that still frees what that
    collective held waits in turn (https://github.com/pytorch/pytorch/issues/56297). No call tells whether one does,
    but while this one sleeps the lock is theirs.
    """
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        time.sleep(SETTLE_SECONDS)


def describe_device(accelerator: Accelerator) -> str:
    device = accelerator.device
    if device.type == "cpu":
        threads = torch.get_num_threads()
        name = f"CPU, {counted(threads, 'thread')}"
    else:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "Apple GPU"
    count = accelerator.num_processes
    precision = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[accelerator.mixed_precision]
    return f"{name}{f' x {count} processes' if count > 1 else ''}, {precision}"
