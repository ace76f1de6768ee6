"""Tokens per second, scaling efficiency and memory of the project's own training step on the GPUs that are here.

    python benchmarks/scaling.py                                   # GPT-2 with DDP, gpt2-xl with FSDP2 and DDP
    python benchmarks/scaling.py --presets gpt2 --processes 1 4    # one size, on 1 and 4 GPUs
    python benchmarks/scaling.py --profile traces/                 # and where the time of a step goes
    python benchmarks/scaling.py --without prefetch fused_head     # what each of these is worth
    python benchmarks/scaling.py --tiny                            # a small model on one and two CPU processes

Every row is a launch of its own with a file of accelerate_configs/, one after another, on random tokens: no corpus, no
evaluation, no checkpoint. Each GPU has the same batch in all rows of a size, so efficiency is tokens per second
over those of the same layout on one GPU times their number.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import accelerate
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.distributed.fsdp import fully_shard

from nanogpt_hf import NanoGPTForCausalLM, preset_config
from nanogpt_hf.common.errors import UserError
from nanogpt_hf.common.running import run_recipe
from nanogpt_hf.common.settings import TrainingSettings
from nanogpt_hf.data.token_stream import TokenStream
from nanogpt_hf.training import objectives, optimization, sharing_out, stepping
from nanogpt_hf.training.hardware import asks_for_checkpointing, describe_device, make_accelerator, settle
from nanogpt_hf.training.objectives import LanguageModeling
from nanogpt_hf.training.optimization import make_optimizers
from nanogpt_hf.training.stepping import Stepper, global_batch_size

ROOT = Path(__file__).parents[1]
# Launch settings of a layout on one process, and on several.
CONFIGS = {
    "DDP": ("gpu", "gpus_ddp"),
    "FSDP2": ("gpus_fsdp2", "gpus_fsdp2"),
    "FSDP2, checkpointing": ("gpus_fsdp2_checkpointing", "gpus_fsdp2_checkpointing"),
}
ON_CPU = {"DDP": ("cpu", "cpu_2_processes")}
# Sequences a device, and layouts.
SIZES = {
    "gpt2": (32, ["DDP"]),
    "gpt2-xl": (8, ["FSDP2", "FSDP2, checkpointing", "DDP"]),
    "cpu": (4, ["DDP"]),
}
WARM_UP = 5
# What --without leaves out: whose place is taken by what.
WITHOUT = {
    "fused_head": [(objectives, "plain_head", lambda lm: None)],
    "prefetch": [(stepping, "prefetch_blocks", lambda model, blocks: None)],
    "plain_shards": [
        (stepping, "clip_sharded_grad_norm_", torch.nn.utils.clip_grad_norm_),
        (optimization, "AdamW", torch.optim.AdamW),
    ],
    "sharing_out": [(sharing_out, "group_of", lambda weight: None)],  # of Muon's matrices; DDP only
}
LABELS = "FSDP::|nccl:|Optimizer|ProfilerStep|Torch-Compiled|## "  # spans of the device's timeline that are no kernels
COMMUNICATION = ("all-gather", "reduce-scatter", "all-reduce", "other communication")
# Kinds of kernels by a part of their names, the first that fits.
KERNELS = {
    "all-gather": "allgather",
    "reduce-scatter": "reducescatter",
    "all-reduce": "allreduce",
    "other communication": "nccl",
    "attention": "fmha|flash|sdpa|attention|cudnn_generated",
    "products": "gemm|nvjet|cutlass|xmma|splitk",
    "loss": "softmax|nll",
    "optimiser": "adam|lpnorm|lerp",
    "gathered and reduced copies": "split_with_sizes|chunk_cat|copyfunctor|copy_",
    "compiled": "triton",
    "memory": "memcpy|memset",
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--presets", nargs="+", choices=[*SIZES], default=["gpt2", "gpt2-xl"], help="sizes to measure")
    add("--layouts", nargs="+", choices=[*CONFIGS], help="default: those that suit the size")
    add("--processes", nargs="+", type=int, help="numbers of GPUs; default: 1, 2, 4 … all that are here")
    add(
        "--per_device_train_batch_size", type=int, help="sequences a GPU; default: 32 for gpt2, 8 for gpt2-xl"
    )
    add("--n_positions", type=int, help="context length; default: the preset's")
    add("--steps", type=int, default=20, help="steps measured, after 5 that are not")
    add("--max_minutes", type=float, default=None, help="begin no further row after this time")
    add("--token_ids", help="a .npy file of token ids instead of random ones")
    add("--no_compile", action="store_true", help="leave torch.compile out")
    add("--profile", metavar="FOLDER", help="profile two more steps of every row; their traces go here")
    add(
        "--without",
        nargs="+",
        choices=[*WITHOUT],
        default=[],
        help="leave out what the project does by itself",
    )
    add("--optim", default="adamw", help="adamw or muon")
    add("--reshard_after_forward", choices=["true", "false"], help="default: as the launch settings say")
    add("--blocks_per_group", type=int, default=1, help="blocks that FSDP2 gathers at once")
    add("--tiny", action="store_true", help="a small model on the CPU, to try the script")
    add("--output", help="file for the rows as JSON")
    add("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tiny:
        args.presets, args.processes = ["cpu"], args.processes or [1, 2]
    return args


# --- one row, in the processes that accelerate has launched ---


def measure(preset: str, layout: str, batch: int, args: argparse.Namespace) -> dict | None:
    """The numbers of one row; None in all processes but the first."""
    for module, name, other in (change for left_out in args.without for change in WITHOUT[left_out]):
        setattr(module, name, other)
    settings = TrainingSettings(
        preset=preset,
        per_device_train_batch_size=batch,
        use_cpu=args.tiny,
        optim=args.optim,
        torch_compile=False if args.no_compile or args.tiny else None,
    )
    accelerator = make_accelerator(settings)
    sizes = dict(n_layer=2, n_positions=32, vocab_size=256) if args.tiny else {}
    sizes |= {"n_positions": args.n_positions} if args.n_positions else {}
    config = preset_config(preset, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **sizes)
    config.vocab_size += -config.vocab_size % settings.pad_to_multiple_of
    set_seed(settings.seed)
    with accelerator.device:  # initialised where it is fast
        model = NanoGPTForCausalLM(config)
    if asks_for_checkpointing():
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if args.token_ids:
        ids = np.load(args.token_ids, mmap_mode="r")
    else:
        ids = np.random.default_rng(0).integers(0, config.vocab_size, size=2**20, dtype=np.uint16)
    stream = TokenStream(ids, config.n_positions, accelerator.device)
    objective = LanguageModeling(accelerator, stream, global_batch_size(settings, accelerator), seed=0)
    if args.blocks_per_group > 1:
        group_blocks(accelerator, model, args.blocks_per_group)
    model, *optimizers = accelerator.prepare(model, *make_optimizers(model, settings))
    optimizers = [optimizer.optimizer for optimizer in optimizers]
    model.train()
    stepper = Stepper(accelerator, settings, model, optimizers, objective, lambda step: 1.0)

    def take_step(step: int) -> torch.Tensor:
        return stepper(step)[0]

    for step in range(WARM_UP):
        take_step(step)
    seconds, loss = timed(take_step, range(WARM_UP, WARM_UP + args.steps), accelerator.device)
    host = median(host_seconds(take_step, range(args.steps), accelerator.device))
    memory = torch.tensor([peak_memory(accelerator.device)], device=accelerator.device)
    row = {
        "seconds_a_step": median(seconds),
        "slowest_step": max(seconds),
        "host_seconds_a_step": host,
        "tokens_per_s": objective.tokens_per_step / median(seconds),
        "peak_memory_gib": accelerator.gather(memory).max().item() / 2**30,
        "loss": accelerator.reduce(loss, reduction="sum").item(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "hardware": describe_device(accelerator),
    }
    if args.profile and accelerator.device.type == "cuda":
        row["profile"] = profile(
            take_step, range(WARM_UP + args.steps, WARM_UP + args.steps + 2), accelerator, args
        )
    settle(accelerator)
    accelerator.end_training()
    return row if accelerator.is_main_process else None


def timed(take_step, steps: range, device: torch.device) -> tuple[list[float], torch.Tensor]:
    """Seconds of every step, measured on the device without stopping it between steps, and the last loss."""
    on_gpu = device.type == "cuda"

    def now():
        if not on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    times = [now()]
    for step in steps:
        loss = take_step(step)
        times.append(now())
    if not on_gpu:
        return np.diff(times).tolist(), loss
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1000 for a, b in zip(times, times[1:], strict=False)], loss


def peak_memory(device: torch.device) -> int:
    """Bytes that torch held at most; a CPU process knows only its resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def host_seconds(take_step, steps: range, device: torch.device) -> list[float]:
    """Seconds until the host has given a step's work to an idle device: what the step can never be shorter than."""
    seconds = []
    for step in steps[:5]:
        if device.type == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        take_step(step)
        seconds.append(time.perf_counter() - begun)
    return seconds


def group_blocks(accelerator: Accelerator, model: NanoGPTForCausalLM, size: int) -> None:
    """Let FSDP2 gather so many blocks at once, before accelerate gives each block a group of its own."""
    plugin, blocks = accelerator.state.fsdp_plugin, stepping.blocks_of(model)
    plugin.transformer_cls_names_to_wrap = [
        f"FSDP{type(blocks[0]).__name__}"
    ]  # as they are named from here on
    for start in range(0, len(blocks), size):
        fully_shard(
            blocks[start : start + size],
            reshard_after_forward=plugin.reshard_after_forward,
            mp_policy=plugin.mixed_precision_policy,
        )


def profile(take_step, steps: range, accelerator: Accelerator, args: argparse.Namespace) -> dict:
    """Where the first GPU's time of a step goes, in ms: kernels that compute, that communicate, and what overlaps.

    kinds holds the milliseconds of each kind of kernel, and those of its that nothing else hides.
    """
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for step in steps:
            take_step(step)
        torch.cuda.synchronize()
    if not accelerator.is_main_process:
        return {}
    spans, names = defaultdict(list), defaultdict(float)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not re.match(LABELS, event.name):
            name = event.name.lower()
            kind = next((kind for kind, parts in KERNELS.items() if re.search(parts, name)), "other")
            spans[kind].append((event.time_range.start, event.time_range.end))
            names[event.name[:120]] += (event.time_range.end - event.time_range.start) / 1000 / len(steps)
    Path(args.profile).mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(Path(args.profile) / f"{os.getpid()}.json.gz"))
    return summary(spans, len(steps)) | {
        "trace": f"{os.getpid()}.json.gz",
        "kernels": dict(sorted(names.items(), key=lambda item: -item[1])[:25]),
    }


def summary(spans: dict[str, list[tuple[float, float]]], steps: int) -> dict:
    """Milliseconds a step out of the microseconds at which the kernels of each kind began and ended."""
    everything = [span for kind in spans.values() for span in kind]
    both = length(everything)
    communication = [span for kind in COMMUNICATION for span in spans.get(kind, [])]
    computation = [span for kind, own in spans.items() if kind not in COMMUNICATION for span in own]
    whole = max(end for _, end in everything) - min(start for start, _ in everything)
    microseconds = {
        "communication": length(communication),
        "computation": length(computation),
        "communication_alone": both - length(computation),
        "idle": whole - both,
        "step": whole,
    }
    kinds = {}
    for kind, own in sorted(spans.items(), key=lambda item: -length(item[1])):
        others = [span for other, more in spans.items() if other != kind for span in more]
        kinds[kind] = [round(us / 1000 / steps, 2) for us in (length(own), both - length(others))]
    return {name: value / 1000 / steps for name, value in microseconds.items()} | {"kinds": kinds}


def length(intervals: list[tuple[float, float]]) -> float:
    """Of the union of some intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


# --- all rows ---


def launch(preset: str, layout: str, processes: int, batch: int, args: argparse.Namespace) -> dict:
    """A row, measured in processes of its own; `error` says why there is none."""
    config = (ON_CPU if args.tiny else CONFIGS)[layout][processes > 1]
    place = ["--config_file", ROOT / "accelerate_configs" / f"{config}.yaml", "--num_processes", processes]
    if args.reshard_after_forward:
        place += ["--fsdp_reshard_after_forward", args.reshard_after_forward]
    place += ["--main_process_port", 0] + ([] if args.tiny else ["--gpu_ids", "all"])
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "row.json"
        work = json.dumps([preset, layout, batch, str(result)])
        command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *place, __file__]
        command += [*sys.argv[1:], "--worker", work]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace")
        row = {"preset": preset, "layout": layout, "processes": processes, "batch_per_device": batch}
        if result.exists():
            return row | json.loads(result.read_text())
        said = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        return row | {"error": said[0].strip() if said else f"ended with status {done.returncode}"}


def table(rows: list[dict]) -> str:
    """Markdown; efficiency is against one process of the same size and layout."""
    lines = [
        "| model | layout | GPUs | batch per GPU | tokens/s | efficiency | ms per step | host ms | GiB per GPU |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        start = f"| {row['preset']} | {row['layout']} | {row['processes']} | {row['batch_per_device']} "
        if "error" in row:
            lines.append(f"{start}| {row['error'][:80]} | | | | |")
            continue
        share = f"{row['efficiency']:.1%}" if "efficiency" in row else ""
        lines.append(
            f"{start}| {row['tokens_per_s']:,.0f} | {share} | {1000 * row['seconds_a_step']:.1f} "
            f"| {1000 * row['host_seconds_a_step']:.1f} | {row['peak_memory_gib']:.1f} |"
        )
    return "\n".join(lines)


def add_efficiency(rows: list[dict]) -> None:
    """To every row of several processes that has one of a single process to be compared with."""
    alone = {(row["preset"], row["layout"]): row for row in rows if row["processes"] == 1}
    for row in rows:
        one = alone.get((row["preset"], row["layout"]), row)
        if row["processes"] > 1 and "tokens_per_s" in row and "tokens_per_s" in one and one is not row:
            row["efficiency"] = row["tokens_per_s"] / row["processes"] / one["tokens_per_s"]


def main() -> None:
    args = parse()
    if args.worker:
        preset, layout, batch, result = json.loads(args.worker)
        row = measure(preset, layout, batch, args)
        if row is not None:
            Path(result).write_text(json.dumps(row))
        return
    here = torch.cuda.device_count()
    if not args.tiny and not here:
        raise UserError("there is no GPU to measure on: --tiny tries the script on the CPU.")
    counts = args.processes or sorted({2**n for n in range(10) if 2**n <= here} | {here})
    if not args.tiny and max(counts) > here:
        raise UserError(f"--processes {max(counts)} is more than the {here} GPUs that are here.")
    started, rows = time.monotonic(), []
    for preset in args.presets:
        batch, layouts = SIZES[preset]
        for layout in args.layouts or layouts:
            for processes in counts:
                size = args.per_device_train_batch_size or batch
                if args.max_minutes and time.monotonic() - started > 60 * args.max_minutes:
                    rows.append(
                        {"preset": preset, "layout": layout, "processes": processes, "batch_per_device": size}
                        | {"error": "not run: out of time"}
                    )
                    continue
                rows.append(launch(preset, layout, processes, size, args))
                print(json.dumps(rows[-1]), flush=True)
    add_efficiency(rows)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, accelerate {accelerate.__version__}"
    hardware = next((row["hardware"] for row in rows if "hardware" in row), "no row")
    print(f"\n{hardware}; {versions}; {datetime.date.today()}; {time.monotonic() - started:.0f} s in all\n")
    print(table(rows))
    if args.output:
        report = {"versions": versions, "date": str(datetime.date.today()), "rows": rows}
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if any("error" in row and not row["error"].startswith("not run") for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    run_recipe(main)
