"""Tokens per second: ours, nanoGPT's GPT.generate, transformers' generate on GPT2LMHeadModel and CTranslate2, side by side.

    python benchmarks/generate.py --nanogpt_dir ../nanoGPT --output generate.json
    python benchmarks/generate.py --sizes tiny --batch_sizes 1 2 --repeats 1          # seconds, on any CPU
    python benchmarks/generate.py --loss_of runs/mine --corpus my_text.txt            # what 8 bits cost, in nats a token

Random weights of one size, sampling with top-k 50 from a prompt of one token; bfloat16 on a GPU, float32 on a CPU.
Every variant lives in a process of its own; they are asked in turn, so that whatever else the machine does meets all.
A time is of a whole call, the start of its cache and graph included, after a short call to warm up. On a GPU the peers,
whose tokens take longer there than ours by far and all the same time, write a quarter of the tokens. On a CPU with
weights in 8 bits too, ours and CTranslate2's, where it is installed; rounding and converting them is not timed.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import Tokenizer, models
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from nanogpt_hf import NanoGPTConfig, NanoGPTForCausalLM
from nanogpt_hf.common.cli import parse
from nanogpt_hf.common.errors import UserError
from nanogpt_hf.common.fields import setting
from nanogpt_hf.common.running import run_recipe
from nanogpt_hf.data.corpora import load_corpus
from nanogpt_hf.generation.decoding import StaticDecoder
from nanogpt_hf.generation.text import generate_ids
from nanogpt_hf.model.loading import load_model_and_tokenizer
from nanogpt_hf.training.hardware import device_type

# n_layer, n_head, n_embd, n_positions, vocab_size; new tokens on a GPU, on a CPU, and there in large batches
SIZES = {
    "tiny": ((2, 2, 32, 16, 64), (12, 12, 12)),
    "0.8M": ((4, 4, 128, 64, 128), (56, 56, 56)),
    "10.7M": ((6, 6, 384, 256, 128), (240, 240, 56)),
    "124M": ((12, 12, 768, 1024, 50257), (240, 64, 16)),
}
PEERS = ("nanoGPT", "transformers")
OURS = ("ours, gpt2", "ours, qwen3")
ON_A_CPU = ("CTranslate2", "CTranslate2 int8", "ours, gpt2 int8")


@dataclass
class GenerateSettings:
    nanogpt_dir: str | None = setting(None, "a checkout of nanoGPT; without one it is left out")
    sizes: list[str] = setting(["0.8M", "10.7M", "124M"], f"of {', '.join(SIZES)}")
    batch_sizes: list[int] = setting([1, 64], "rows written at once")
    repeats: int = setting(3, "timed calls of each; on a GPU the peers are timed once")
    use_cpu: bool = setting(False, "leave a GPU alone")
    loss_of: str | None = setting(None, "a model whose loss to measure in float32 and with weights in 8 bits")
    corpus: str = setting(
        "tiny_shakespeare", "for --loss_of: the text, of which the validation split is read"
    )
    windows: int = setting(20, "for --loss_of: how many windows of 256 tokens to read")
    output: str | None = setting(None, "file for the results in JSON")

    def __post_init__(self):
        for size in self.sizes:
            if size not in SIZES:
                raise UserError(f"--sizes {size}: there is no such size, use {', '.join(SIZES)}.")
        if self.nanogpt_dir is not None and not Path(self.nanogpt_dir, "model.py").is_file():
            raise UserError(
                f"--nanogpt_dir {self.nanogpt_dir} holds no model.py: give a checkout of nanoGPT."
            )
        if min(self.repeats, *self.batch_sizes) < 1:
            raise UserError("--repeats and --batch_sizes must be at least 1.")


def make_writer(variant: str, size: str, device: str) -> Callable[[torch.Tensor, int], None]:
    """A function that samples so many tokens after a prompt (B T)."""
    n_layer, n_head, n_embd, n_positions, vocab_size = SIZES[size][0]
    shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "vocab_size": vocab_size}
    place = {"device": device, "dtype": torch.bfloat16 if device == "cuda" else torch.float32}
    torch.manual_seed(0)
    if variant == "nanoGPT":
        from model import GPT, GPTConfig  # of --nanogpt_dir

        peer = GPT(GPTConfig(block_size=n_positions, dropout=0.0, **shape)).to(**place).eval()
        return lambda ids, count: peer.generate(ids, count, top_k=50)
    shape |= {"n_positions": n_positions, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    if variant == "transformers":
        model = GPT2LMHeadModel(GPT2Config(**shape)).to(**place).eval()
        options = {"do_sample": True, "top_k": 50}
        return lambda ids, count: model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **options
        )
    if variant.startswith("CTranslate2"):
        return make_ctranslate2(GPT2Config(**shape), int8=variant.endswith("int8"))
    architecture = variant.split()[1]
    model = NanoGPTForCausalLM(NanoGPTConfig(architecture=architecture, **shape)).to(**place).eval()
    options = {"temperature": 1.0, "top_k": 50, "int8": variant.endswith("int8")}
    return lambda ids, count: list(generate_ids(model, ids, count, **options))


def make_ctranslate2(config: GPT2Config, int8: bool) -> Callable[[torch.Tensor, int], None]:
    """The same of a GPT-2 that CTranslate2 has converted; its tokens need names."""
    import ctranslate2

    names = [f"<{i}>" for i in range(config.vocab_size)]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges=[], unk_token=names[0]))
    special = {"unk_token": names[0], "bos_token": names[0], "eos_token": names[0]}
    with TemporaryDirectory() as folder:
        GPT2LMHeadModel(config).save_pretrained(f"{folder}/plain")
        PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(f"{folder}/plain")
        converter = ctranslate2.converters.TransformersConverter(f"{folder}/plain")
        converter.convert(f"{folder}/converted", quantization="int8" if int8 else None)
        generator = ctranslate2.Generator(
            f"{folder}/converted",
            intra_threads=torch.get_num_threads(),
            compute_type="int8" if int8 else "float32",
        )

    def write(ids: torch.Tensor, count: int) -> None:
        start = [[names[1]]] * len(ids)
        options = {"max_length": count, "min_length": count, "sampling_topk": 50}
        generator.generate_batch(start, include_prompt_in_result=False, **options)

    return write


@torch.inference_mode()
def measure_loss(name: str, corpus: str, windows: int) -> dict[str, float]:
    """Nats a token of the validation split, read token by token as text is written, in float32 and with int8 weights."""
    model, tokenizer = load_model_and_tokenizer(name, to_write=True)
    ids = torch.from_numpy(load_corpus(corpus).ids("validation", tokenizer)).long()
    T = min(256, model.config.n_positions)
    rows = ids[: len(ids) // T * T].view(-1, T)[:windows]  # B T
    losses = {}
    for kind in ("float32", "int8"):
        nats = []

        def next_of_the_text(logits, nats=nats):
            position = len(nats) + 1
            nats.append(F.cross_entropy(logits.float(), rows[:, position]).item())
            return rows[:, position]

        decoder = StaticDecoder(model, next_of_the_text, len(rows), T, int8=kind == "int8")
        list(islice(decoder.continue_(rows[:, :1], T - 1), T - 1))
        losses[kind] = statistics.fmean(nats)
    return losses


def work(variant: str, device: str, nanogpt_dir: str | None, pipe) -> None:
    """Answer (size, rows, tokens) with the seconds of one call, until None comes."""
    if nanogpt_dir is not None:
        sys.path.insert(0, nanogpt_dir)
    sys.stdout = open(os.devnull, "w")  # nanoGPT reports its size
    known, writer = None, None
    while (case := pipe.recv()) is not None:
        size, rows, tokens = case
        ids = torch.ones(rows, 1, dtype=torch.long, device=device)
        if known != case:
            writer = None if known is None or known[0] != size else writer
            writer = writer or make_writer(variant, size, device)
            writer(ids, min(tokens, 8))
            known = case
        synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
        synchronize()
        start = time.perf_counter()
        writer(ids, tokens)
        synchronize()
        pipe.send(time.perf_counter() - start)


def measure(settings: GenerateSettings, device: str) -> list[dict]:
    """A row for each variant, size and batch: tokens, seconds, and tokens per second (the median)."""
    variants = [name for name in PEERS + OURS if name != "nanoGPT" or settings.nanogpt_dir]
    if device == "cpu":
        variants += [name for name in ON_A_CPU if "CTranslate2" not in name or find_spec("ctranslate2")]
    quickest = "forkserver" if "forkserver" in get_all_start_methods() else "spawn"
    context, pipes, rows = get_context(quickest), {}, []
    for variant in variants:
        pipes[variant], theirs = context.Pipe()
        words = (variant, device, settings.nanogpt_dir, theirs)
        context.Process(target=work, args=words, daemon=True).start()
        theirs.close()  # so that a worker that dies is an EOFError here
    for size in settings.sizes:
        on_gpu, on_cpu, in_batches = SIZES[size][1]
        for batch in settings.batch_sizes:
            tokens = on_gpu if device == "cuda" else on_cpu if batch < 16 else in_batches
            seconds = {variant: [] for variant in variants}
            for repeat in range(settings.repeats):
                for variant in variants:
                    slow = device == "cuda" and variant in PEERS
                    if repeat == 0 or not slow:
                        count = tokens // 4 if slow else tokens
                        pipes[variant].send((size, batch, count))
                        seconds[variant].append(pipes[variant].recv() / (batch * count))
            rows += [
                {
                    "size": size,
                    "batch": batch,
                    "variant": variant,
                    "tokens": tokens // 4 if device == "cuda" and variant in PEERS else tokens,
                    "seconds_per_token": times,
                    "tokens_per_s": 1 / statistics.median(times),
                }
                for variant, times in seconds.items()
            ]
            print(line(rows[-len(variants) :]), flush=True)
    for pipe in pipes.values():
        pipe.send(None)
    return rows


def line(rows: list[dict]) -> str:
    """One size and batch: tokens per second of each variant, and how many times a peer's rate ours are."""
    rates = {row["variant"]: row["tokens_per_s"] for row in rows}
    ratios = [
        f"{ours} / {peer} {rates[ours] / rates[peer]:.1f}" for ours in OURS for peer in PEERS if peer in rates
    ]
    cells = [f"{variant} {rate:,.0f}" for variant, rate in rates.items()]
    return f"{rows[0]['size']} x {rows[0]['batch']}: {'; '.join(cells)} tokens/s; {'; '.join(ratios)}"


def main() -> None:
    settings = parse(GenerateSettings, __doc__)
    device = device_type(settings.use_cpu)
    device = device if device == "cuda" else "cpu"
    if settings.loss_of:
        losses = measure_loss(settings.loss_of, settings.corpus, settings.windows)
        print(f"float32 {losses['float32']:.4f}, int8 {losses['int8']:.4f} nats a token of {settings.corpus}")
        return
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    rows = measure(settings, device)
    if settings.output:
        results = {
            "device": name,
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "rows": rows,
        }
        Path(settings.output).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_recipe(main)
