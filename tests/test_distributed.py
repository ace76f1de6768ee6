"""Several processes: DDP and FSDP2 make the same run, and each goes on from the other's checkpoints.

accelerate shards on GPUs only. Here its FSDP2 runs on two gloo processes all the same: they are told that they
are a multi-GPU launch, and all else is as accelerate_configs/gpus_fsdp2.yaml has it.
"""

import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from processes import ROOT, Run, digests, metrics, train_here, training_words, write_corpus
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nanogpt_hf import NanoGPTForCausalLM, hardware
from nanogpt_hf.hardware import make_accelerator
from nanogpt_hf.settings import run_recipe

CONFIGS = ROOT / "accelerate_configs"
SAME = "--n_layer 2 --dropout 0 --bf16 false --logging_steps 1 --max_steps 12 --eval_steps 4 --save_steps 4 --save_total_limit 9"
ONE = "--per_device_train_batch_size 4 --gradient_accumulation_steps 2"


def launched_with(name: str) -> dict[str, str]:
    """The variables that accelerate launch gives to the processes of a file of launch settings."""
    args = launch_command_parser().parse_args(["--config_file", str(CONFIGS / f"{name}.yaml"), "script.py"])
    args, _, _ = _validate_launch_command(args)
    return {key: value for key, value in prepare_multi_gpu_env(args).items() if os.environ.get(key) != value}


def ring(tmp_path, words, config: str, prepare=lambda words: (), processes: int = 2) -> list[Run]:
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        port = any_port.getsockname()[1]
    size = dict(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
    place = size | dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)) | launched_with(config)
    logs = [tmp_path / f"{config}-{port}-{rank}.log" for rank in range(processes)]
    return [
        Run(words, log=log, prepare=prepare(words), RANK=str(rank), LOCAL_RANK=str(rank), **place)
        for rank, log in enumerate(logs)
    ]


def sharded_on_cpu(settings):
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    accelerator = make_accelerator(settings)
    assert accelerator.is_fsdp2 and accelerator.num_processes == 2
    return accelerator


def train_sharded(words) -> None:
    hardware.check_launch = lambda *launch: None
    run_recipe(lambda: train_here(words, make_accelerator=sharded_on_cpu) and None)
    raise SystemExit(0)


def train(tmp_path, layout: str, folder: Path, corpus: Path, *options) -> None:
    """A run of 8 sequences a step on one process, two of DDP or two of FSDP2."""
    words = training_words(folder, corpus, *SAME.split(), *ONE.split(), *options)
    if layout == "one":
        train_here(words)
        return
    words += ["--gradient_accumulation_steps", "1"]
    if layout == "accumulating fsdp2":
        words += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    config = {"ddp": "cpu_2_processes", "checkpointing fsdp2": "gpus_fsdp2_checkpointing"}.get(
        layout, "gpus_fsdp2"
    )
    prepare = (lambda words: ()) if layout == "ddp" else (lambda words: (train_sharded, words))
    runs = ring(tmp_path, words, config, prepare)
    assert [run.wait() for run in runs] == [0, 0], runs[0].said() + runs[1].said()


def losses(folder: Path) -> list[float]:
    return [
        row[name]
        for row in metrics(folder)
        for name in ("train_loss", "eval_loss", "grad_norm")
        if name in row
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module", params=["adamw", "muon"])
def by_one(request, corpus, tmp_path_factory):
    """A run of one process, with each of its checkpoints, and the options that made it."""
    options = ["--optim", request.param]
    options += ["--architecture", "gpt2" if request.param == "adamw" else "modern"]
    folder = tmp_path_factory.mktemp("runs") / request.param
    train(folder.parent, "one", folder, corpus, *options)
    return folder, options


@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "accumulating fsdp2", "checkpointing fsdp2"])
def test_every_layout_makes_the_same_run(by_one, corpus, tmp_path, layout):
    folder, options = by_one
    train(tmp_path, layout, tmp_path / "run", corpus, *options)
    assert losses(tmp_path / "run") == pytest.approx(losses(folder), abs=2e-5)
    assert digests(tmp_path / "run").keys() == digests(folder).keys()
    for name in digests(folder):
        ours, theirs = (load_file(place / name) for place in (tmp_path / "run", folder))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    for name in ("config.json", "modeling_nanogpt.py"):
        assert (tmp_path / "run" / name).read_text() == (folder / name).read_text()
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "run"), NanoGPTForCausalLM)


@pytest.mark.parametrize(
    "first, second", [("one", "fsdp2"), ("fsdp2", "ddp"), ("ddp", "one"), ("fsdp2", "one")]
)
def test_a_checkpoint_of_one_layout_goes_on_under_another(by_one, corpus, tmp_path, first, second):
    whole, options = by_one
    folder = tmp_path / "run"
    train(tmp_path, first, folder, corpus, *options)
    for step in (8, 12):
        shutil.rmtree(folder / "checkpoints" / f"step-{step}")
    train(tmp_path, second, folder, corpus, *options, "--resume_from_checkpoint", "last")
    assert losses(folder) == pytest.approx(losses(whole), abs=2e-5)
