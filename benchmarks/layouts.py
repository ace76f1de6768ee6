"""One run under every layout: same curve, checkpoints that go on under each other, one plain checkpoint at the end.

    python benchmarks/layouts.py              # on all GPUs that are here, two or more
    python benchmarks/layouts.py --bf16       # in bfloat16, where the layouts round differently
    python benchmarks/layouts.py --optim muon # whose work is shared out over the processes
    python benchmarks/layouts.py --tiny       # on CPU processes, one and two: DDP only, 20 steps

A line a check, with the largest difference of all training losses, and exit status 1 when one fails. The text is the
project's own source, the model 0.8M parameters, the global batch 16 sequences, the precision float32 without TF32.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

import nanogpt_hf

ROOT = Path(__file__).parents[1]
SIZE = "--architecture gpt2 --n_layer 4 --n_head 4 --n_embd 128 --n_positions 128 --dropout 0 --torch_compile false"
# A small rate of Muon: at the recipe's, two runs of one process drift apart too, by rounding alone.
WORK = (
    "--learning_rate 1e-3 --muon_learning_rate 5e-3 --warmup_steps 20 --logging_steps 1 --save_total_limit 9"
)
GLOBAL_BATCH = 16


def launch(
    config: str, processes: int, folder: Path, text: Path, steps: int, bf16: bool, *options: str
) -> str | None:
    """A run of pretrain_char.py; what it said if it failed. Every other of its checkpoints is at half of the steps."""
    rhythm = ["--max_steps", steps, "--save_steps", steps // 2, "--eval_steps", steps // 2]
    place = ["--config_file", ROOT / "accelerate_configs" / f"{config}.yaml", "--num_processes", processes]
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *place]
    command += ["--main_process_port", 0, ROOT / "recipes" / "pretrain_char.py", *SIZE.split(), *WORK.split()]
    command += ["--corpus", text, "--output_dir", folder, "--bf16", bf16, *rhythm, *options]
    command += ["--per_device_train_batch_size", GLOBAL_BATCH // processes]
    exact = {"NVIDIA_TF32_OVERRIDE": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        list(map(str, command)), env=os.environ | exact, capture_output=True, text=True, errors="replace"
    )
    return None if done.returncode == 0 else done.stdout[-1000:] + done.stderr[-3000:]


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {row["step"]: row["train_loss"] for row in rows if "train_loss" in row}


def difference(folder: Path, other: Path, steps: int) -> float:
    ours, theirs = losses(folder), losses(other)
    assert list(ours) == list(theirs) == list(range(1, steps + 1)), "a step is missing, or there twice"
    return max(abs(ours[step] - theirs[step]) for step in ours)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--steps", type=int, default=100, help="an even number of steps")
    parser.add_argument(
        "--tolerance", type=float, default=1e-3, help="of every training loss, in nats a token"
    )
    parser.add_argument("--bf16", action="store_true", help="bfloat16 instead of float32")
    parser.add_argument("--optim", choices=["adamw", "muon"], default="adamw")
    parser.add_argument("--tiny", action="store_true", help="on the CPU")
    args = parser.parse_args()
    here = torch.cuda.device_count()
    if args.tiny:
        args.steps = 20
        layouts = {"one": ("cpu", 1), "DDP x 2": ("cpu_2_processes", 2)}
    elif here < 2:
        sys.exit(f"error: two GPUs are needed and {here} are here: --tiny takes the CPU.")
    else:
        counts = sorted({2, here})
        layouts = {"one": ("gpu", 1)} | {f"DDP x {n}": ("gpus_ddp", n) for n in counts}
        layouts |= {f"FSDP2 x {n}": ("gpus_fsdp2", n) for n in counts}
        layouts["FSDP2 x 2, checkpointing"] = ("gpus_fsdp2_checkpointing", 2)
    disable_progress_bar()
    failures = 0

    def check(good: bool, sentence: str) -> None:
        nonlocal failures
        failures += not good
        print(f"{'ok  ' if good else 'FAIL'} {sentence}", flush=True)

    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(len(layouts)) as together:
        place = Path(temporary)
        text = place / "text.txt"
        sources = sorted(ROOT.glob("**/*.py"))
        text.write_text("".join(path.read_text(encoding="utf-8") for path in sources), encoding="utf-8")
        folders = {name: place / f"whole-{number}" for number, name in enumerate(layouts)}

        def run(name: str, folder: Path, *options: str) -> str | None:
            common = args.steps, args.bf16, "--optim", args.optim
            return launch(*layouts[name], folder, text, *common, *options)

        said = dict(zip(layouts, together.map(lambda name: run(name, folders[name]), layouts), strict=True))
        for name, folder in folders.items():
            if said[name] is not None:
                check(False, f"{name}: the run failed\n{said[name]}")
                continue
            model = AutoModelForCausalLM.from_pretrained(folder)
            plain = type(model) is nanogpt_hf.NanoGPTForCausalLM and not list(folder.glob("*.index.json"))
            check(plain, f"{name}: the final folder loads with AutoModelForCausalLM")
            if name != "one":
                apart = difference(folder, folders["one"], args.steps)
                check(
                    apart < args.tolerance,
                    f"{name} and one: {args.steps} losses differ by {apart:.1e} at most",
                )

        def go_on(pair: tuple[str, str]) -> str | None:
            """The second half of the first layout's run under the second layout."""
            first, second = pair
            folder = place / f"{list(layouts).index(first)}-{list(layouts).index(second)}"
            shutil.copytree(folders[first], folder)
            shutil.rmtree(folder / "checkpoints" / f"step-{args.steps}")
            problem = run(second, folder, "--resume_from_checkpoint", "last")
            return problem if problem is not None else difference(folder, folders["one"], args.steps)

        good = [name for name in layouts if said[name] is None]
        pairs = list(zip(good, good[1:] + good[:1], strict=True))  # each goes on under the next
        pairs += [pair for pair in zip(good[1:], ["one"] * len(good), strict=False) if pair not in pairs]
        for (first, second), result in zip(pairs, together.map(go_on, pairs), strict=True):
            if isinstance(result, str):
                check(False, f"{first}, then {second}: the run failed\n{result}")
            else:
                check(
                    result < args.tolerance,
                    f"{first}, then {second}: {args.steps} losses differ by {result:.1e} at most",
                )
    precision = "bfloat16" if args.bf16 else "float32"
    hardware = "the CPU" if args.tiny else f"{here} x {torch.cuda.get_device_name()}"
    print(f"{precision} on {hardware}: {failures} checks failed")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
