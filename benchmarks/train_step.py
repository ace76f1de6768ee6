"""Tokens per second of a training step: ours, transformers' GPT2LMHeadModel, and nanoGPT, in one run on one machine.

    python benchmarks/train_step.py --nanogpt_dir ~/nanoGPT                    # GPT-2 124M, 64 x 1,024, on a GPU
    python benchmarks/train_step.py --preset baby --batch_size 64 --block_size 256 --nanogpt_dir ~/nanoGPT
    python benchmarks/train_step.py --preset cpu --batch_size 12 --block_size 64 --steps 20   # on a CPU

A step is forward, backward, clipping and a fused AdamW, in bfloat16 autocast on a GPU, on random tokens.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import torch
from peers import in_processes, nanogpt_model, report

from nanogpt_hf.model import preset_config

VARIANTS = ("ours", "transformers eager", "transformers compiled", "nanogpt compiled")


def ours(config, spec, device):
    import numpy as np
    from accelerate import Accelerator

    from nanogpt_hf import NanoGPTForCausalLM
    from nanogpt_hf.common.settings import TrainingSettings
    from nanogpt_hf.data.token_stream import TokenStream
    from nanogpt_hf.training.objectives import LanguageModeling
    from nanogpt_hf.training.optimization import make_optimizers
    from nanogpt_hf.training.stepping import Stepper, global_batch_size

    torch.set_float32_matmul_precision("high")
    settings = TrainingSettings(per_device_train_batch_size=spec["batch_size"])  # AdamW, clipping at 1
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="bf16" if device == "cuda" else "no")
    ids = np.random.default_rng(0).integers(0, config.vocab_size, spec["block_size"] * 4096 + 1)
    stream = TokenStream(ids, spec["block_size"], accelerator.device)
    objective = LanguageModeling(accelerator, stream, global_batch_size(settings, accelerator), seed=0)
    model = NanoGPTForCausalLM(config)
    model, *optimizers = accelerator.prepare(model, *make_optimizers(model, settings))
    optimizers = [optimizer.optimizer for optimizer in optimizers]
    take_step = Stepper(accelerator, settings, model, optimizers, objective, lambda step: 1.0)
    numbers = iter(range(10**9))
    return lambda: take_step(next(numbers))


def peer(name, config, spec, device):
    B, T, V = spec["batch_size"], spec["block_size"], config.vocab_size
    torch.set_float32_matmul_precision("high")
    if name == "nanogpt compiled":
        module = nanogpt_model(spec["nanogpt_dir"])
        fields = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd, "bias": True}
        dropout = config.resid_pdrop
        model = module.GPT(module.GPTConfig(block_size=T, vocab_size=V, dropout=dropout, **fields)).to(device)
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), device)
    else:
        from transformers import GPT2Config, GPT2LMHeadModel

        fields = {key: value for key, value in config.to_dict().items() if key in GPT2Config().to_dict()}
        fields = {key: value for key, value in fields.items() if key not in ("model_type", "architectures")}
        model = GPT2LMHeadModel(GPT2Config(**fields)).to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    call = torch.compile(model) if name.endswith("compiled") else model
    data = torch.randint(0, V, (16, B, T + 1), device=device)
    numbers = iter(range(10**9))

    def step():
        block = data[next(numbers) % len(data)]
        x, y = block[:, :-1].contiguous(), block[:, 1:].contiguous()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            if name == "nanogpt compiled":
                loss = call(x, y)[1]
            else:
                loss = call(input_ids=x, labels=x, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def worker(spec: dict) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), spec["dropout"])
    sizes = {"n_positions": spec["block_size"], "vocab_size": spec["vocab_size"]}
    config = preset_config(spec["preset"], **sizes, **dropouts, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    began = time.perf_counter()
    if spec["variant"] == "ours":
        step = ours(config, spec, device)
    else:
        step = peer(spec["variant"], config, spec, device)
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    for _ in range(spec["warmup"]):
        step()
    synchronize()
    start_s = time.perf_counter() - began
    times = []
    for _ in range(spec["repeats"]):
        synchronize()
        begin = time.perf_counter()
        for _ in range(spec["steps"]):
            result = step()
        synchronize()
        times.append((time.perf_counter() - begin) / spec["steps"])
    tokens = spec["batch_size"] * spec["block_size"]
    loss = result[0] if isinstance(result, tuple) else result
    result = {"tokens_per_s": tokens / median(times), "ms": 1000 * median(times), "start_s": start_s}
    result["loss"] = float(loss)
    if device == "cuda":
        matrices = config.n_layer * 12 * config.n_embd**2 + config.vocab_size * config.n_embd
        attention = 6 * config.n_layer * config.n_embd * spec["block_size"]  # causal: half of 12 L C T
        flops = 6 * matrices + attention
        ceiling = matmul_ceiling()
        result |= {
            "share_of_ceiling": result["tokens_per_s"] * flops / ceiling,
            "ceiling_tflops": ceiling / 1e12,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        }
    return result


def matmul_ceiling() -> float:
    """FLOP/s of a bfloat16 product of 8192 x 8192 x 8192 on random data, median of 20."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(23):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return 2 * 8192**3 / median(times[3:])


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        result = worker(json.loads(sys.argv[2]))
        Path(sys.argv[3]).write_text(json.dumps(result), encoding="utf-8")
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="gpt2")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--block_size", type=int, default=1024)
    parser.add_argument("--vocab_size", type=int, default=50304)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=10, help="steps a repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--nanogpt_dir", help="a checkout of nanoGPT; without it nanoGPT is left out")
    parser.add_argument("--output", help="JSON file")
    options = vars(parser.parse_args())
    names, output = options.pop("variants"), options.pop("output")
    names = [name for name in names if not name.startswith("nanogpt") or options["nanogpt_dir"]]
    results = in_processes(__file__, [options | {"variant": name} for name in names])
    best_peer = max((r.get("tokens_per_s", 0) for r in results if r["variant"] != "ours"), default=0)
    for result in results:
        if best_peer and "tokens_per_s" in result:
            result["of_best_peer"] = result["tokens_per_s"] / best_peer
    columns = {
        "variant": "{}", "tokens_per_s": "{:,.0f}", "ms": "{:.2f}", "share_of_ceiling": "{:.1%}", "peak_gib": "{:.1f}",
        "of_best_peer": "{:.2f}", "start_s": "{:.1f}", "loss": "{:.3f}",
    }  # fmt: skip
    report(
        results,
        columns,
        output,
        preset=options["preset"],
        batch=options["batch_size"],
        context=options["block_size"],
    )


if __name__ == "__main__":
    main()
