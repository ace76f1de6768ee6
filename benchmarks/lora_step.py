"""LoRA: tokens per second and peak memory of this project's loop and of peft with transformers' Trainer.

    PYTHONPATH=. python benchmarks/lora_step.py                    # GPT-2 124M, 16 x 1,024, rank 16, bfloat16, one GPU
    PYTHONPATH=. python benchmarks/lora_step.py --base smollm2-135m
    PYTHONPATH=. python benchmarks/lora_step.py --variants ours trainer trainer_compiled --repeats 3
    PYTHONPATH=. python benchmarks/lora_step.py --tiny             # seconds on a CPU, to see that it works

Every variant runs in processes of its own, `--repeats` of them in turn, on the same base (random weights of GPT-2's
shape, made here, or any base that is to be had) and the same text (random characters, or tiny Pushkin), with adapters on
all projections. A variant's number is the median over its steps after the warm-up. No network is needed. Evaluation,
checkpoints and samples are not timed.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

VARIANTS = ("ours", "trainer", "trainer_compiled")
LOGGED = 2  # steps between two reports of ours: each waits for the device
RANK, ALPHA = 16, 32
CONTEXT = 1024  # tokens, or the base's
CHARACTERS = [chr(code) for code in range(0x4E00, 0x4E00 + 50_000) if not 0xD800 <= code < 0xE000]
GPT2 = dict(n_layer=12, n_head=12, n_embd=768, n_positions=1024, vocab_size=50257)
TINY = dict(n_layer=1, n_head=2, n_embd=32, n_positions=32, vocab_size=384)


def make_base(folder: Path, tiny: bool) -> None:
    """A GPT-2 of random weights whose tokens are characters, and a text of them, each as likely as the other."""
    from nanogpt_hf import NanoGPTConfig, NanoGPTForCausalLM
    from nanogpt_hf.data.tokenization import train_char_tokenizer
    from nanogpt_hf.sharing.export import export

    sizes = TINY if tiny else GPT2
    characters = CHARACTERS[: sizes["vocab_size"] - 257]  # beside them 256 bytes and the end of text
    tokenizer = train_char_tokenizer(characters)
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    config = NanoGPTConfig(**sizes, bos_token_id=end, eos_token_id=end)
    export(NanoGPTForCausalLM(config), tokenizer, folder / "base")
    length = 2000 if tiny else 2_000_000
    text = "".join(characters[i] for i in torch.randint(len(characters), (length,)).tolist())
    (folder / "text.txt").write_text(text, encoding="utf-8")


def fetch_base(name: str, folder: Path) -> None:
    """A base and tiny Pushkin, put where `make_base` puts its own."""
    from nanogpt_hf.data.corpora import load_corpus
    from nanogpt_hf.model.bases import local_checkpoint

    (folder / "base").symlink_to(Path(local_checkpoint(name)).resolve())
    corpus = load_corpus("tiny_pushkin")
    (folder / "text.txt").write_text("".join(corpus.train + corpus.validation), encoding="utf-8")


def time_ours(folder: Path, batch: int, steps: int) -> tuple[list[float], int]:
    """Seconds of every step, as the loop reports the mean of each LOGGED of them, and the context."""
    from nanogpt_hf.common.settings import FinetuningSettings
    from nanogpt_hf.data.corpora import load_corpus
    from nanogpt_hf.runs.finetuning import ready_base
    from nanogpt_hf.runs.run import language_modeling
    from nanogpt_hf.training.hardware import make_accelerator
    from nanogpt_hf.training.loop import train

    settings = FinetuningSettings(
        corpus=str(folder / "text.txt"),
        validation_split_percentage=5,
        model_name_or_path=str(folder / "base"),
        output_dir=str(folder / "run"),
        overwrite_output_dir=True,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=4,  # the one evaluation, at the end, is not to make the peak
        max_steps=steps,
        logging_steps=LOGGED,
        eval_steps=steps,
        save_steps=steps,
        eval_on_start=False,
        lora_r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,  # as peft's default, which the other has
    )
    accelerator = make_accelerator(settings)
    corpus = load_corpus(settings.corpus, settings.validation_split_percentage)
    settings, tokenizer, model, *_ = ready_base(settings, accelerator, corpus)
    objective = language_modeling(accelerator, settings, corpus, tokenizer)
    train(accelerator, settings, corpus, tokenizer, model, objective)
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    T = settings.n_positions
    return [batch * T / row["tokens_per_s"] for row in rows for _ in range(LOGGED)], T


def time_trainer(folder: Path, batch: int, steps: int, compiled: bool) -> tuple[list[float], int]:
    """Seconds of every step of transformers' Trainer on peft's model, its data loading included as ours is, and the
    context."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from nanogpt_hf.data.tokenization import encode, load_tokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    T, cuda = min(model.config.max_position_embeddings, CONTEXT), torch.cuda.is_available()
    ids = torch.from_numpy(
        encode(load_tokenizer(str(folder / "base")), (folder / "text.txt").read_text(encoding="utf-8"))
    ).long()
    rows = [{"input_ids": row, "labels": row} for row in ids[: len(ids) // T * T].view(-1, T)]
    transposed = model.config.model_type == "gpt2"
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=RANK,
        lora_alpha=ALPHA,
        target_modules="all-linear",
        fan_in_fan_out=transposed,
    )
    times = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            self.last = now(cuda)

        def on_step_end(self, *args, **kwargs):
            end = now(cuda)
            times.append(end - self.last)
            self.last = end

    arguments = TrainingArguments(
        folder / "trainer",
        per_device_train_batch_size=batch,
        max_steps=steps,
        bf16=cuda,
        torch_compile=compiled,
        use_cpu=not cuda,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    Trainer(get_peft_model(model, config), arguments, train_dataset=rows, callbacks=[Clock()]).train()
    return times, T


def now(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(variant: str, folder: Path, batch: int, steps: int, warmup: int) -> dict:
    """One variant in this process."""
    if variant == "ours":
        times, T = time_ours(folder, batch, steps)
    else:
        times, T = time_trainer(folder, batch, steps, compiled=variant == "trainer_compiled")
    step = statistics.median(times[warmup:])
    cuda = torch.cuda.is_available()
    peak = (
        torch.cuda.max_memory_allocated()
        if cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return {
        "variant": variant,
        "tokens_per_s": batch * T / step,
        "step_ms": 1000 * step,
        "peak_gib": peak / 2**30,
        "device": torch.cuda.get_device_name() if cuda else "CPU",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["trainer", "ours"])
    parser.add_argument(
        "--base", help="a base's name, folder or Hub id; default: random weights of GPT-2's shape"
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=20, help="steps at the start that are not counted")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("lora_step.json"))
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # a variant, in this process
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        options.batch, options.steps, options.warmup = 2, 6, 2
    if options.measure:
        result = measure(options.measure, options.folder, options.batch, options.steps, options.warmup)
        options.output.write_text(json.dumps(result))
        return
    results = []
    with TemporaryDirectory() as folder:
        fetch_base(options.base, Path(folder)) if options.base else make_base(Path(folder), options.tiny)
        for _ in range(options.repeats):
            for variant in options.variants:
                answer = Path(folder) / "answer.json"
                words = [sys.executable, __file__, *sys.argv[1:]]
                words += ["--measure", variant, "--folder", folder, "--output", str(answer)]
                subprocess.run(words, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=sys.stderr)
                results.append(json.loads(answer.read_text()))
                print(json.dumps(results[-1]))
    summary = {}
    for variant in options.variants:
        mine = [result for result in results if result["variant"] == variant]
        summary[variant] = {
            key: statistics.median(result[key] for result in mine)
            for key in ("tokens_per_s", "step_ms", "peak_gib")
        }
    first = options.variants[0]
    base = options.base or "GPT-2 124M"
    print(f"\n{base}, {results[0]['device']}, batch {options.batch}, rank {RANK}, torch {torch.__version__}")
    print(
        "| variant | tokens/s | step, ms | peak, GiB | times the first |\n| --- | ---: | ---: | ---: | ---: |"
    )
    for variant, row in summary.items():
        row["ratio"] = row["tokens_per_s"] / summary[first]["tokens_per_s"]
        print(
            f"| {variant} | {row['tokens_per_s']:,.0f} | {row['step_ms']:.1f} | {row['peak_gib']:.2f} | "
            f"{row['ratio']:.2f} |"
        )
    options.output.write_text(json.dumps({"summary": summary, "runs": results}, indent=1))


if __name__ == "__main__":
    main()
