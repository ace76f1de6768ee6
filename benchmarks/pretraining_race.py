"""Seconds of training until GPT-2's size is as good as nanoGPT and nanochat make it, on one text and one machine.

    python benchmarks/pretraining_race.py --nanogpt_dir ~/nanoGPT --nanochat_dir ~/nanochat --tokenizer gpt2_tokenizer/ --minutes 4
    python benchmarks/pretraining_race.py --corpus data/shards --nanogpt_dir ~/nanoGPT --minutes 10 --ours_tokens 4e6 6e6
    python benchmarks/pretraining_race.py --corpus my_texts/ --tokenizer openai-community/gpt2 --seeds 1337 7 42   # ours alone

Each contender trains in a process of its own: nanoGPT with its settings for GPT-2 and the schedule fitted to the minutes,
once for each learning rate; nanochat's base_train of 12 layers; ours with no other flag than the tokens, and exactly
GPT-2. With several GPUs they run side by side, one on each. Without --corpus the text is prose from Debian packages.

The loss is over the whole held-out text in the same windows for nanoGPT and ours; nanochat reads other tokens (each row
begins with its mark), so it is compared in bits per byte, as it prints them. Seconds of steps are tokens over the
median rate, for ours of the second half, the slower one; those of training hold evaluations and what is compiled or
recorded on the way; those of the process all.
"""

import argparse
import json
import math
import os
import queue
import re
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

import torch
from peers import ROOT, in_processes, nanogpt_model, report
from race_text import for_nanochat, for_nanogpt, ids_of, make_shards, texts_of_packages
from time_to_loss import timed

PACKAGES = (
    "dict-gcide dict-foldoc dict-jargon dict-devil bible-kjv-text linux-doc-6.12 debian-history".split()
)
CONTEXT = 1024
NANOGPT_STEP = 480 * CONTEXT  # its 12 sequences x 40, in larger micro-batches, which is faster and the same
NANOCHAT_STEP = 64 * CONTEXT
OURS = {"ours": [], "ours, exactly GPT-2": ["--architecture", "gpt2"]}


def nanogpt(options, shards: Path, rate: float, environment: dict) -> dict:
    """Its published settings; warm-up and decay, published for 600,000 steps, fitted to the run."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = for_nanogpt(shards, options.nanogpt_dir, Path(scratch) / "nanoGPT")
        command = [
            sys.executable,
            "-u",
            "train.py",
            "config/train_gpt2.py",
            "--wandb_log=False",
            "--dataset=race",
        ]
        command += [
            "--batch_size=30",
            "--gradient_accumulation_steps=16",
            "--log_interval=1",
            "--eval_iters=1",
        ]
        environment = environment | {"TORCHINDUCTOR_CACHE_DIR": f"{scratch}/cache"}

        def train(steps: int) -> tuple[float, list[tuple[float, str]]]:
            words = [f"--max_iters={steps}", f"--lr_decay_iters={steps}", f"--eval_interval={steps}"]
            words += [f"--warmup_iters={steps // 10}", f"--learning_rate={rate}", f"--min_lr={rate / 10}"]
            return timed([*command, *words], folder, environment)

        steps = options.nanogpt_steps or steps_in(options.minutes, _nanogpt_curve(train(10)[1])[0])
        process_s, lines = train(steps)
        step_s, curve = _nanogpt_curve(lines)
        spec = {
            "nanogpt_dir": str(folder),
            "checkpoint": str(folder / "out" / "ckpt.pt"),
            "shards": str(shards),
        }
        (measured,) = in_processes(__file__, [spec])
    if "failed" in measured:
        raise SystemExit(measured["failed"])
    kept = {name: measured[name] for name in ("loss", "parameters")}
    seconds = {"steps_s": steps * step_s, "process_s": process_s}
    return {"tokens": steps * NANOGPT_STEP, "curve": curve, **seconds, **kept}


def _nanogpt_curve(lines: list[tuple[float, str]]) -> tuple[float, list[tuple[float, float]]]:
    """Median seconds of a step, and (seconds of steps, training loss) of each."""
    found = [re.match(r"iter \d+: loss ([\d.]+), time ([\d.]+)ms", line) for _, line in lines]
    rows = [(float(match[1]), float(match[2]) / 1000) for match in found if match]
    step_s = median(seconds for _, seconds in rows)
    return step_s, [(number * step_s, loss) for number, (loss, _) in enumerate(rows, start=1)]


def nanochat(options, shards: Path, environment: dict) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        for_nanochat(shards, base)
        path = os.pathsep.join([str(base), environment.get("PYTHONPATH", "")])
        environment = environment | {
            "NANOCHAT_BASE_DIR": str(base), "PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/cache"
        }  # fmt: skip
        command = [sys.executable, "-u", "-m", "scripts.base_train", "--depth=12", f"--max-seq-len={CONTEXT}"]
        command += ["--window-pattern=L", "--device-batch-size=32", f"--total-batch-size={NANOCHAT_STEP}"]
        whole = len(ids_of(shards, "validation")) // (32 * CONTEXT) * 32 * CONTEXT
        command += ["--core-metric-every=-1", "--sample-every=-1", f"--eval-tokens={whole}"]

        def train(steps: int) -> tuple[float, list[tuple[float, str]]]:
            words = [f"--num-iterations={steps}", f"--eval-every={steps}"]
            return timed([*command, *words], Path(options.nanochat_dir), environment)

        steps = options.nanochat_steps or steps_in(options.minutes, _nanochat_curve(train(20)[1])[0])
        process_s, lines = train(steps)
    step_s, curve = _nanochat_curve(lines)
    words = "\n".join(line for _, line in lines)
    bits = re.findall(r"Validation bpb: ([\d.]+)", words)
    parameters = re.search(r"^total\s*: ([\d,]+)", words, re.M)
    return {
        "bits_per_byte": float(bits[-1]), "tokens": steps * NANOCHAT_STEP, "steps_s": steps * step_s,
        "process_s": process_s, "curve": curve, "parameters": int(parameters[1].replace(",", "")) if parameters else None,
    }  # fmt: skip


def _nanochat_curve(lines: list[tuple[float, str]]) -> tuple[float, list[tuple[float, float]]]:
    found = [re.match(r"step \d+/\d+ .*loss: ([\d.]+) .*dt: ([\d.]+)ms", line) for _, line in lines]
    rows = [(float(match[1]), float(match[2]) / 1000) for match in found if match]
    step_s = median(seconds for _, seconds in rows)
    return step_s, [(number * step_s, loss) for number, (loss, _) in enumerate(rows, start=1)]


def steps_in(minutes: float, step_s: float) -> int:
    return max(1, round(60 * minutes / step_s))


def ours(shards: Path, tokens: float, words: list[str], environment: dict) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        command = [
            sys.executable,
            str(ROOT / "recipes" / "pretrain.py"),
            "--corpus",
            str(shards),
            "--preset",
            "gpt2",
        ]
        command += ["--train_tokens", str(tokens), "--output_dir", str(run), *words]
        process_s, _ = timed(command, ROOT, environment | {"TQDM_DISABLE": "1"})
        text = (run / "metrics.jsonl").read_text(encoding="utf-8")
        parameters = sum(math.prod(shape) for shape in _shapes(run / "model.safetensors"))
    rows = [json.loads(line) for line in text.splitlines()]
    rates = [row["tokens_per_s"] for row in rows if "tokens_per_s" in row]
    rate = median(rates[len(rates) // 2 :])  # the first half's windows are short, and faster
    curve = [(row["tokens_seen"] / rate, row["train_loss"]) for row in rows if "train_loss" in row]
    last = rows[-1]
    return {
        "loss": last["eval_loss"], "tokens": last["tokens_seen"], "steps_s": last["tokens_seen"] / rate,
        "training_s": last["elapsed_s"], "process_s": process_s, "curve": curve, "parameters": parameters,
    }  # fmt: skip


def _shapes(weights: Path) -> list[list[int]]:
    from safetensors import safe_open

    with safe_open(weights, "pt") as file:
        return [file.get_slice(name).get_shape() for name in file.keys()]  # no dict: it has keys() alone


def evaluate_nanogpt(spec: dict) -> dict:
    """The loss of a checkpoint of nanoGPT over the held-out tokens, in the windows that ours is measured in."""
    import numpy as np

    from nanogpt_hf.data.token_stream import TokenStream

    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = nanogpt_model(spec["nanogpt_dir"])
    saved = torch.load(spec["checkpoint"], map_location=device, weights_only=False)
    model = module.GPT(module.GPTConfig(**saved["model_args"])).to(device).eval()
    weights = {name.removeprefix("_orig_mod."): weight for name, weight in saved["model"].items()}
    model.load_state_dict(weights)
    torch.set_float32_matmul_precision("high")
    stream = TokenStream(ids_of(Path(spec["shards"]), "validation").astype(np.int64), CONTEXT, device)
    nats = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, stream.windows(), 8):
        x, y = stream.window_batch(np.arange(start, min(start + 8, stream.windows())))
        with torch.no_grad():
            logits = model(x, y.clamp(min=0))[0]
        nats += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), y.flatten(), ignore_index=-100, reduction="sum"
        )
    return {"loss": nats.item() / (len(stream) - 1), "parameters": sum(p.numel() for p in model.parameters())}


def jobs_of(options, shards: Path) -> list[tuple[str, Callable[[dict], dict]]]:
    """Every training of the race: a name, and what runs it in an environment."""
    jobs = []
    if options.nanogpt_dir:
        for rate in options.nanogpt_rates:
            jobs.append((f"nanoGPT, {rate:g}", partial(nanogpt, options, shards, rate)))
    if options.nanochat_dir:
        jobs.append(("nanochat", partial(nanochat, options, shards)))
    for name, words in OURS.items():
        for tokens in options.ours_tokens or [6e5 * options.minutes]:
            for seed in options.seeds:
                flags = [*words, "--seed", str(seed), *options.ours.split()]
                jobs.append((f"{name}, seed {seed}", partial(ours, shards, tokens, flags)))
    return [(name, job) for name, job in jobs if re.search(options.only, name)]


def run(jobs: list[tuple[str, Callable[[dict], dict]]]) -> list[dict]:
    """The results of all jobs, one after the other on each GPU that there is."""
    gpus: queue.Queue[str] = queue.Queue()
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    for gpu in visible or map(str, range(torch.cuda.device_count() or 1)):
        gpus.put(gpu)

    def work(named: tuple[str, Callable[[dict], dict]]) -> dict:
        name, job = named
        gpu = gpus.get()
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        try:
            result = {"contender": name} | job({"CUDA_VISIBLE_DEVICES": gpu, "PYTHONPATH": path})
        except SystemExit as error:  # the others go on
            result = {"contender": name, "failed": str(error)}
        finally:
            gpus.put(gpu)
        print(
            json.dumps({key: value for key, value in result.items() if key != "curve"}),
            file=sys.stderr,
            flush=True,
        )
        return result

    with ThreadPoolExecutor(gpus.qsize()) as pool:
        return list(pool.map(work, jobs))


def compare(results: list[dict], bits_per_nat: float) -> None:
    """Adds bits per byte to each result, and to ours how many times sooner it was as good as the best of each peer."""
    for result in results:
        if "loss" in result:
            result["bits_per_byte"] = result["loss"] * bits_per_nat
    for peer in ("nanoGPT", "nanochat"):
        theirs = [
            result for result in results if result["contender"].startswith(peer) and "failed" not in result
        ]
        best = min(theirs, key=lambda result: result["bits_per_byte"], default=None)
        for result in results:
            reached = best and result.get("bits_per_byte", math.inf) <= best["bits_per_byte"]
            if reached and result["contender"].startswith("ours"):
                result[f"of_{peer}"] = best["steps_s"] / result["steps_s"]


def draw(path: str, results: list[dict]) -> None:
    """Training loss over seconds of steps."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(8, 5), layout="constrained")).subplots()
    for result in results:
        if "curve" in result:
            seconds, losses = zip(*result["curve"], strict=True)
            axes.plot(seconds, losses, label=result["contender"], linewidth=1.2)
    axes.set(xscale="log", xlabel="seconds of steps", ylabel="training loss, nats per token")
    axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        result = evaluate_nanogpt(json.loads(sys.argv[2]))
        Path(sys.argv[3]).write_text(json.dumps(result), encoding="utf-8")
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", help="shards of GPT-2's tokens, or any text")
    parser.add_argument("--packages", nargs="+", default=PACKAGES, help="Debian packages, without --corpus")
    parser.add_argument("--tokenizer", default="openai-community/gpt2", help="GPT-2's, to make shards with")
    parser.add_argument("--work_dir", default="data/race", help="where packages and shards are kept")
    parser.add_argument("--minutes", type=float, default=4.0, help="of steps, for nanoGPT and nanochat each")
    parser.add_argument("--nanogpt_dir", help="a checkout; without it nanoGPT is left out")
    parser.add_argument("--nanogpt_rates", nargs="+", type=float, default=[6e-4, 1.2e-3, 1.8e-3])
    parser.add_argument(
        "--nanogpt_steps", type=int, help="instead of minutes; saves the measuring of its rate"
    )
    parser.add_argument("--nanochat_dir", help="a checkout; without it nanochat is left out")
    parser.add_argument("--nanochat_steps", type=int, help="instead of minutes")
    parser.add_argument(
        "--ours_tokens", nargs="+", type=float, help="budgets; default 0.6 million for a minute"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1337])
    parser.add_argument("--ours", default="", help="more flags for the recipe")
    parser.add_argument("--only", default="", help="regular expression: contenders whose names match it")
    parser.add_argument("--output", help="JSON file")
    parser.add_argument("--picture", help="PNG file")
    options = parser.parse_args()
    shards, work = Path(options.corpus or ""), Path(options.work_dir)
    if not (options.corpus and (shards / "index.json").exists()):
        corpus = options.corpus or str(texts_of_packages(options.packages, work))
        shards = make_shards(corpus, options.tokenizer, work / "shards")
    results = run(jobs_of(options, shards.resolve()))
    compare(results, bits_per_nat(shards))
    if options.picture:
        draw(options.picture, results)
    columns = {
        "contender": "{}", "parameters": "{:,}", "tokens": "{:,}", "loss": "{:.4f}", "bits_per_byte": "{:.4f}",
        "steps_s": "{:.1f}", "training_s": "{:.1f}", "process_s": "{:.1f}", "of_nanoGPT": "{:.1f}", "of_nanochat": "{:.2f}",
    }  # fmt: skip
    report(results, columns, options.output, corpus=str(shards))


def bits_per_nat(shards: Path) -> float:
    """Bits per byte of the held-out text for a loss of one nat per token."""
    from nanogpt_hf.data.tokenization import load_tokenizer

    ids = ids_of(shards, "validation")
    tokenizer = load_tokenizer(str(shards))
    text = tokenizer.decode(ids[ids != tokenizer.eos_token_id].tolist())
    return (len(ids) - 1) / math.log(2) / len(text.encode())


if __name__ == "__main__":
    main()
