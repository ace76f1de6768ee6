"""Seconds until the validation loss is at most a given one: ours and nanoGPT, one after the other on one machine.

    python benchmarks/time_to_loss.py --nanogpt_dir ~/nanoGPT                                  # on a GPU
    python benchmarks/time_to_loss.py --use_cpu --loss 1.8857 --nanogpt_dir ~/nanoGPT          # on a CPU
    python benchmarks/time_to_loss.py --runs 2 --ours "--max_steps 300 --rdrop_alpha 0 --dropout 0.1"  # the recipe's flags

Ours is recipes/pretrain_char.py on tiny Shakespeare, in a process of its own, up to its finished run folder; its
loss is over the whole validation split. nanoGPT is its train.py with its settings for the same text (on a CPU its
README's), stopped at the iterations given; its loss is over random crops, as it comes. The first of our runs begins
with an empty cache of compiled code; the others find what it has left.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from peers import ROOT, report

NANOGPT = {
    "gpu": "--max_iters=1750",
    "cpu": "--device=cpu --compile=False --eval_iters=20 --log_interval=50 --block_size=64 --batch_size=12 --n_layer=4 "
    "--n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0",
}


def timed(command: list[str], folder: Path, environment: dict) -> tuple[float, list[tuple[float, str]]]:
    """Seconds of the whole process, and its lines with the second at which each came.

    Raises:
        SystemExit: it failed; with its last lines.
    """
    began, lines = time.perf_counter(), []
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        lines.append((time.perf_counter() - began, line.rstrip()))
    if process.wait():
        raise SystemExit("\n".join(line for _, line in lines[-20:]))
    return time.perf_counter() - began, lines


def ours(words: list[str], target: float, cache: Path) -> dict:
    """Seconds of steps come from the tokens per second of each stretch, which leave evaluations and saving out."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            str(ROOT / "recipes" / "pretrain_char.py"),
            "--output_dir",
            f"{folder}/run",
        ]
        environment = {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(cache), "TQDM_DISABLE": "1"}
        process_s, _ = timed([*command, *words], ROOT, environment)
        rows = [
            json.loads(line)
            for line in Path(folder, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
    steps_s, tokens, found = 0.0, 0, {}
    for row in rows:
        if "tokens_per_s" in row:
            steps_s += (row["tokens_seen"] - tokens) / row["tokens_per_s"]
            tokens = row["tokens_seen"]
        if row.get("eval_loss", float("inf")) <= target and not found:
            found = {"steps": row["step"], "steps_s": steps_s, "training_s": row["elapsed_s"]}
    best = min(row["eval_loss"] for row in rows if "eval_loss" in row)
    return found | {"process_s": process_s, "best_loss": best, "all_steps_s": steps_s}


def nanogpt(directory: str, device: str, corpus: Path, target: float) -> dict:
    """Seconds of steps: the median time of an iteration, as nanoGPT prints it, times the iterations."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "nanoGPT"
        shutil.copytree(directory, folder)
        data = folder / "data" / "shakespeare_char"
        shutil.copy(corpus, data / "input.txt")
        timed([sys.executable, "prepare.py"], data, {})
        command = [
            sys.executable,
            "-u",
            "train.py",
            "config/train_shakespeare_char.py",
            *NANOGPT[device].split(),
        ]
        process_s, lines = timed(command, folder, {"TORCHINDUCTOR_CACHE_DIR": f"{scratch}/cache"})
    losses = [
        (at, int(found[1]), float(found[2]))
        for at, line in lines
        if (found := re.match(r"step (\d+): .*val loss ([\d.]+)", line))
    ]
    times = sorted(float(found[1]) for _, line in lines if (found := re.search(r"time ([\d.]+)ms", line)))
    step_s = times[len(times) // 2] / 1000
    result = {"process_s": process_s, "best_loss": min(loss for *_, loss in losses)}
    reached = [(at, step) for at, step, loss in losses if loss <= target]
    result["all_steps_s"] = losses[-1][1] * step_s
    if reached:
        at, step = reached[0]
        result |= {"steps": step, "steps_s": step * step_s, "training_s": at}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--loss", type=float, default=1.4697)
    parser.add_argument("--ours", default="", help="flags for the recipe")
    parser.add_argument("--runs", type=int, default=1, help="runs of ours")
    parser.add_argument("--use_cpu", action="store_true")
    parser.add_argument("--nanogpt_dir", help="a checkout of nanoGPT; without it nanoGPT is left out")
    parser.add_argument("--output", help="JSON file")
    options = parser.parse_args()
    results = []
    words = options.ours.split() + (["--use_cpu"] if options.use_cpu else [])
    with tempfile.TemporaryDirectory() as cache:
        for number in range(options.runs):
            result = ours(words, options.loss, Path(cache))
            results.append({"variant": f"ours, run {number + 1}"} | result)
    if options.nanogpt_dir:
        from nanogpt_hf.data.corpora import load_corpus

        corpus = load_corpus("tiny_shakespeare")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "input.txt"
            path.write_text("".join(corpus.train + corpus.validation), encoding="utf-8")
            device = "cpu" if options.use_cpu else "gpu"
            result = nanogpt(options.nanogpt_dir, device, path, options.loss)
        results.append({"variant": "nanoGPT"} | result)
    seconds = dict.fromkeys(("steps_s", "training_s", "all_steps_s", "process_s"), "{:.2f}")
    columns = {"variant": "{}", "best_loss": "{:.4f}", "steps": "{}"} | seconds
    report(results, columns, options.output, loss=options.loss, flags=options.ours or "the recipe's own")


if __name__ == "__main__":
    main()
