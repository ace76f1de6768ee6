"""A small model, its texts, and a run of the second stage in one part and in two."""

import hashlib
import shutil

import torch

from nanogpt_hf import NanoGPTConfig, NanoGPTForCausalLM
from nanogpt_hf.common.cli import parse

ROWS = [
    {"prompt": f"What is {a} and {b}?\n", "completion": f"It is {a + b}." * (1 + a % 3)}
    for a in range(6)
    for b in range(5)
]
TEXT = "".join(row["prompt"] + row["completion"] for row in ROWS) + "<abcdefghijklmnopqrstuvwxyz>"


def make(tokenizer, context=64, architecture="modern"):
    torch.manual_seed(0)
    config = NanoGPTConfig(
        architecture=architecture,
        vocab_size=-(-len(tokenizer) // 64) * 64,
        n_positions=context,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    model = NanoGPTForCausalLM(config)
    model.generation_config.suppress_tokens = list(range(len(tokenizer), config.vocab_size))
    return model


def saved(folder, tokenizer):
    """The small model as a base in a folder."""
    make(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def words(base, corpus, folder, *more):
    return [
        *(
            "--model_name_or_path",
            str(base),
            "--corpus",
            str(corpus),
            "--output_dir",
            str(folder),
            "--use_cpu",
        ),
        *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--eval_steps", "3"),
        *("--max_steps", "6", "--save_steps", "3", "--save_total_limit", "9", "--logging_steps", "1"),
        *("--torch_compile", "false", "--sample_length", "20", *more),
    ]


def digests(folder):
    files = sorted((folder / "checkpoints" / "step-6").glob("*.safetensors"))
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in [*files, folder / files[0].name]]


def in_two_parts(run, settings, base, corpus, tmp_path, *more):
    """A run that was stopped after step 3 and went on ends in the weights of one that was not."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(parse(settings, "", words(base, corpus, whole, *more)))
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "step-6")
    run(parse(settings, "", words(base, corpus, parts, *more, "--resume_from_checkpoint", "last")))
    assert digests(whole) == digests(parts)
    return whole
