"""Several processes: DDP and FSDP2 make the same run, and each goes on from the other's checkpoints.

accelerate shards on GPUs only. Here its FSDP2 runs on two gloo processes all the same: they are told that they
are a multi-GPU launch, and all else is as accelerate_configs/gpus_fsdp2.yaml has it.
"""

import json
import os
import runpy
import shutil
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from processes import ROOT, digests, metrics, ring, run_here, train_here, training_words, write_corpus
from safetensors.torch import load_file
from torch.distributed.fsdp import OffloadPolicy
from transformers import AutoModelForCausalLM

from nanogpt_hf import NanoGPTForCausalLM
from nanogpt_hf.common.running import run_recipe
from nanogpt_hf.training import hardware
from nanogpt_hf.training.hardware import (
    asks_for_checkpointing,
    check_launch,
    make_accelerator,
    shard_parameters,
)

CONFIGS = ROOT / "accelerate_configs"
SAME = "--n_layer 2 --dropout 0 --bf16 false --logging_steps 1 --max_steps 12 --eval_steps 4 --save_steps 4 --save_total_limit 9"
GO_ON = ("--resume_from_checkpoint", "last")
ONE = "--per_device_train_batch_size 4 --gradient_accumulation_steps 2"


def launched_with(name: str) -> dict[str, str]:
    """The variables that accelerate launch gives to the processes of a file of launch settings."""
    args = launch_command_parser().parse_args(["--config_file", str(CONFIGS / f"{name}.yaml"), "script.py"])
    args, _, _ = _validate_launch_command(args)
    return {key: value for key, value in prepare_multi_gpu_env(args).items() if os.environ.get(key) != value}


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
    prepare = () if layout == "ddp" else (train_sharded, words)
    runs = ring([words] * 2, tmp_path, prepare=prepare, **launched_with(config))
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


@pytest.fixture(scope="module")
def by_one(corpus, tmp_path_factory):
    """optim -> a run of one process, with each of its checkpoints, and the options that made it."""
    runs = {}
    for optim, architecture in (("adamw", "gpt2"), ("muon", "qwen3")):
        folder = tmp_path_factory.mktemp("runs") / optim
        options = ["--optim", optim, "--architecture", architecture]
        train(folder.parent, "one", folder, corpus, *options)
        runs[optim] = folder, options
    return runs


@pytest.fixture(scope="module")
def by_layout(by_one, corpus, tmp_path_factory):
    """(layout, optim) -> a run of it, made once."""
    runs = {("one", optim): folder for optim, (folder, _) in by_one.items()}

    def get(layout: str, optim: str) -> Path:
        if (layout, optim) not in runs:
            runs[layout, optim] = tmp_path_factory.mktemp("runs") / "run"
            train(runs[layout, optim].parent, layout, runs[layout, optim], corpus, *by_one[optim][1])
        return runs[layout, optim]

    return get


@pytest.mark.parametrize(
    "layout, optim",
    [
        ("ddp", "muon"),
        ("fsdp2", "muon"),
        ("accumulating fsdp2", "adamw"),
        ("checkpointing fsdp2", "adamw"),
    ],
)
def test_every_layout_makes_the_same_run(by_one, by_layout, layout, optim):
    (folder, _), run = by_one[optim], by_layout(layout, optim)
    assert losses(run) == pytest.approx(losses(folder), abs=2e-5)
    assert digests(run).keys() == digests(folder).keys()
    for name in digests(folder):
        ours, theirs = (load_file(place / name) for place in (run, folder))
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    for name in ("config.json", "modeling_nanogpt.py"):
        assert (run / name).read_text() == (folder / name).read_text()
    assert isinstance(AutoModelForCausalLM.from_pretrained(run), NanoGPTForCausalLM)


@pytest.mark.parametrize(
    "first, second, optim", [("one", "fsdp2", "adamw"), ("fsdp2", "ddp", "muon"), ("ddp", "one", "muon")]
)
def test_a_checkpoint_of_one_layout_goes_on_under_another(
    by_one, by_layout, corpus, tmp_path, first, second, optim
):
    whole, options = by_one[optim]
    folder = shutil.copytree(by_layout(first, optim), tmp_path / "run")
    for step in (8, 12):
        shutil.rmtree(folder / "checkpoints" / f"step-{step}")
    train(tmp_path, second, folder, corpus, *options, *GO_ON)
    assert losses(folder) == pytest.approx(losses(whole), abs=2e-5)


def test_sharded_weights_are_whole_after_an_evaluation_that_is_not_the_best(corpus, tmp_path):
    options = (
        "--optim adamw --learning_rate 0 --eval_on_start true --max_steps 4 --eval_steps 2 --save_steps 2"
    )
    train(tmp_path, "fsdp2", tmp_path / "run", corpus, *options.split())
    values = [row["eval_loss"] for row in metrics(tmp_path / "run") if "eval_loss" in row]
    assert values[0] == values[1] == values[2]


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("no", None)])
def test_sharding_keeps_sums_in_float32(precision, dtype):
    policy = shard_parameters(precision).mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (dtype, torch.float32, None)


# --- launch settings ---


@pytest.mark.parametrize("name", ["gpus_fsdp2", "gpus_fsdp2_checkpointing"])
def test_every_key_of_fsdp_is_a_field_of_accelerates_plugin(name, monkeypatch):
    keys = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))["fsdp_config"]
    renamed = {
        "offload_params": "cpu_offload",
        "transformer_layer_cls_to_wrap": "transformer_cls_names_to_wrap",
    }
    known = {field.name for field in fields(FullyShardedDataParallelPlugin)}
    for key in keys.keys() - {"fsdp_version"}:
        name_there = key.removeprefix("fsdp_")
        assert renamed.get(name_there, name_there) in known, key
    for key, value in launched_with(name).items():
        monkeypatch.setenv(key, value)
    plugin = shard_parameters("bf16")
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert type(plugin.cpu_offload) is OffloadPolicy
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.activation_checkpointing is False  # transformers' own is used instead
    assert asks_for_checkpointing() is keys["fsdp_activation_checkpointing"]
    assert plugin.cpu_ram_efficient_loading is False


def test_two_nodes_are_two_times_eight_processes():
    args = launch_command_parser().parse_args(["--config_file", str(CONFIGS / "two_nodes.yaml"), "script.py"])
    args, _, _ = _validate_launch_command(args)
    prepare_multi_gpu_env(args)
    assert (args.nnodes, args.nproc_per_node, args.node_rank, args.multi_gpu) == ("2", "8", 0, True)
    assert args.rdzv_endpoint == f"{args.main_process_ip}:{args.main_process_port}"


# --- what does not fit ---


@pytest.mark.parametrize("name", ["gpus_ddp", "gpus_fsdp2", "gpus_fsdp2_checkpointing"])
def test_settings_for_gpus_on_a_machine_without(name, corpus, tmp_path, monkeypatch):
    """One sentence from the first process, nothing from the other, and no run folder."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    words = [word for word in training_words(tmp_path / "run", corpus) if word != "--use_cpu"]
    runs = ring([words] * 2, tmp_path, **launched_with(name))
    assert [run.wait() for run in runs] == [2, 2]
    said = [[line for line in run.said().splitlines() if "error" in line.lower()] for run in runs]
    assert (
        len(said[0]) == 1 and said[0][0].startswith("error: these launch settings are for ") and not said[1]
    )
    assert "accelerate_configs/cpu" in said[0][0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "device, variables, use_cpu, fits",
    [
        ("cpu", {}, False, True),
        ("cpu", {"LOCAL_WORLD_SIZE": "2"}, False, True),  # torchrun
        ("cpu", {"ACCELERATE_MIXED_PRECISION": "no"}, False, True),  # accelerate launch alone
        ("cpu", {"ACCELERATE_MIXED_PRECISION": "no", "CUDA_VISIBLE_DEVICES": "0"}, False, False),  # gpu.yaml
        ("cpu", {"ACCELERATE_MIXED_PRECISION": "no", "CUDA_VISIBLE_DEVICES": "0"}, True, True),
        ("mps", {"ACCELERATE_MIXED_PRECISION": "no", "CUDA_VISIBLE_DEVICES": "0"}, False, True),
        ("cpu", {"ACCELERATE_MIXED_PRECISION": "no", "LOCAL_WORLD_SIZE": "2"}, False, False),
        ("cpu", {"ACCELERATE_USE_FSDP": "true"}, True, False),
        ("cuda", {"LOCAL_WORLD_SIZE": "1000"}, False, False),
    ],
)
def test_whether_a_launch_fits_the_machine(device, variables, use_cpu, fits):
    with nullcontext() if fits else pytest.raises(ValueError, match="launch"):
        check_launch(device, variables, use_cpu)


def test_processes_that_do_not_divide_the_batch_of_a_run(by_one, corpus, tmp_path):
    folder, options = by_one["adamw"]
    before = digests(folder)
    words = training_words(folder, corpus, *SAME.split(), *options, *GO_ON)
    runs = ring([words] * 3, tmp_path, **launched_with("cpu_2_processes"))
    assert [run.wait() for run in runs] == [2, 2, 2]
    said = [[line for line in run.said().splitlines() if "error" in line.lower()] for run in runs]
    assert "3 processes do not divide its batch of 8 sequences" in said[0][0]
    assert [len(lines) for lines in said] == [1, 0, 0]
    with pytest.raises(ValueError, match="must be 8 on 1 process[.]"):
        train_here(words)
    assert digests(folder) == before


# --- the benchmarks ---


def test_scaling_measures_two_processes(tmp_path, capsys, monkeypatch):
    report = tmp_path / "report.json"
    words = ["--tiny", "--steps", "2", "--processes", "2", "--output", str(report)]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert run_here("benchmarks/scaling.py", *words) == 0
    (row,) = json.loads(report.read_text(encoding="utf-8"))["rows"]
    assert row["processes"] == 2 and row["peak_memory_gib"] > 0
    assert row["tokens_per_s"] == pytest.approx(2 * row["batch_per_device"] * 32 / row["seconds_a_step"])
    assert "| cpu | DDP | 2 | 4 |" in capsys.readouterr().out and "efficiency" not in row


def test_efficiency_is_against_one_process_of_the_same_layout():
    scaling = runpy.run_path(str(ROOT / "benchmarks" / "scaling.py"))
    measured = [("DDP", 1, 100.0), ("DDP", 2, 190.0), ("FSDP2", 2, 150.0), ("FSDP2", 4, None)]
    rows = [
        {"preset": "gpt2", "layout": layout, "processes": n}
        | ({"tokens_per_s": speed} if speed else {"error": "x"})
        for layout, n, speed in measured
    ]
    scaling["add_efficiency"](rows)
    assert [row.get("efficiency") for row in rows] == [None, 0.95, None, None]
    assert scaling["length"]([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == 4
