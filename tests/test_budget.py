"""How long a pretraining run is, the batch that follows from it, and the plain checkpoint at its end."""

import json
import sys
from itertools import count

import pytest
import torch
import yaml
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

import nanogpt_hf
from nanogpt_hf import NanoGPTForCausalLM, preset_config
from nanogpt_hf.common.cli import parse
from nanogpt_hf.common.errors import UserError
from nanogpt_hf.common.running import run_recipe
from nanogpt_hf.common.settings import TrainingSettings
from nanogpt_hf.data.token_stream import TokenStream
from nanogpt_hf.runs import run as runs
from nanogpt_hf.runs.budget import sequences_per_step
from nanogpt_hf.training import timing
from nanogpt_hf.training.objectives import LanguageModeling
from recipes import pretrain_char
from recipes.pretrain import defaults, main

TINY = "--n_layer 1 --n_embd 32 --n_head 2 --n_positions 16 --use_cpu --sample_length 20".split()


def settings_for(*words):
    return parse(TrainingSettings, None, ["--preset", "gpt2", *words], defaults=defaults)


def batch_of(settings):
    return settings.per_device_train_batch_size * settings.gradient_accumulation_steps


def test_longer_runs_and_more_devices_take_larger_batches(monkeypatch):
    tokens = [1e6, 1e8, 1e10]
    batches = [batch_of(settings_for("--train_tokens", str(n))) for n in tokens]
    assert batches == sorted(set(batches)), "each longer run has a larger one"
    monkeypatch.setenv("WORLD_SIZE", "4")
    of_one = [batch_of(settings_for("--train_tokens", str(n))) for n in tokens]
    assert [4 * batch for batch in of_one] == [2 * batch for batch in batches], "a root of the devices"


@pytest.mark.parametrize("steps", [50, 3000, 10**6])
def test_steps_and_the_tokens_that_they_make_give_the_same_batch(steps):
    batch = sequences_per_step(None, steps, 1024, 1)
    rounded_apart = sequences_per_step(steps * batch * 1024, None, 1024, 1) / batch
    assert rounded_apart in (0.5, 1, 2)
    assert sequences_per_step(None, steps, 512, 1) == 2 * batch, "the same tokens in shorter sequences"


def test_a_batch_that_is_given_stays():
    settings = settings_for("--train_tokens", "1e10", "--per_device_train_batch_size", "4")
    assert settings.per_device_train_batch_size == 4
    assert batch_of(settings) == batch_of(settings_for("--train_tokens", "1e10"))


def test_without_a_length_it_is_twenty_tokens_a_parameter():
    settings = settings_for()
    with torch.device("meta"):
        model = NanoGPTForCausalLM(preset_config("gpt2", bos_token_id=0, eos_token_id=0))
    assert settings.train_tokens == pytest.approx(20 * model.num_parameters(), rel=0.02)
    assert settings.max_steps is None


def test_gpt2s_own_block_has_rates_of_its_own_and_what_is_given_counts():
    usual, exactly = settings_for(), settings_for("--architecture", "gpt2")
    given = settings_for("--architecture", "gpt2", "--vector_learning_rate", "0.02")
    assert exactly.muon_learning_rate > usual.muon_learning_rate == 0.02
    assert exactly.vector_learning_rate < given.vector_learning_rate == 0.02 < usual.vector_learning_rate


def test_the_first_windows_are_an_eighth_of_the_context_where_it_can_be_divided(tmp_path):
    assert settings_for().short_positions == 128
    assert settings_for("--n_positions", "512").short_positions == 64
    assert settings_for("--n_positions", "500").short_positions is None
    assert settings_for("--n_positions", "64").short_positions is None  # in pieces of 8 it would learn little
    assert settings_for("--model_name_or_path", "a/base").short_positions is None


@pytest.mark.parametrize("preset, words", [("gpt2", []), ("gpt2", ["--n_layer", "3"]), ("cpu", [])])
def test_the_ends_of_residual_branches_move_as_gpt2_starts_them(preset, words):
    recipe = pretrain_char.DEFAULTS[preset] if preset == "cpu" else vars(settings_for(*words))
    depth = {"n_layer": int(words[1])} if words else {}
    block = NanoGPTForCausalLM(
        preset_config(preset, n_embd=192, vocab_size=9, bos_token_id=0, eos_token_id=0, **depth)
    ).transformer.h[0]
    ratio = block.mlp.c_proj.weight.std() / block.mlp.c_fc.weight.std()
    assert recipe["muon_residual_scale"] == pytest.approx(ratio.item(), rel=0.02)


def test_shards_are_not_read_more_than_four_times(tmp_path):
    index = {
        "format": "nanogpt_hf shards, version 1",
        "splits": {"train": {"shards": [{"tokens": 900}, {"tokens": 100}]}},
    }
    (tmp_path / "index.json").write_text(json.dumps(index), encoding="utf-8")
    assert settings_for("--corpus", str(tmp_path)).train_tokens == 4000


@pytest.mark.parametrize("words", [("--max_steps", "9"), ("--train_tokens", "9"), ("--max_minutes", "9"), ("--num_train_epochs", "9")])  # fmt: skip
def test_what_the_user_says_of_the_length_is_all_that_is_said(words):
    settings = settings_for(*words)
    given = settings.given("max_steps", "train_tokens", "max_minutes", "num_train_epochs")
    assert given == {words[0][2:]: 9}


def test_two_lengths_exclude_each_other():
    with pytest.raises(UserError, match="--max_steps and --train_tokens exclude each other"):
        settings_for("--max_steps", "3", "--train_tokens", "1e6")


def test_steps_that_fit_into_a_time(monkeypatch, own_accelerate_state):
    """Every look at the clock is a second later: eight steps take one, an evaluation takes one."""
    ticks = count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(ticks)))
    sizes = dict(n_layer=1, n_embd=32, n_head=2, n_positions=16, vocab_size=50)
    model = NanoGPTForCausalLM(preset_config("gpt2", **sizes, bos_token_id=0, eos_token_id=0))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    accelerator = Accelerator(cpu=True)
    stream = TokenStream(torch.arange(3000).remainder(50).numpy(), 16)
    objective = LanguageModeling(accelerator, stream, 2, seed=0, validation=stream, characters=1)
    settings = TrainingSettings(
        max_steps=None, max_minutes=1, eval_steps=8, warmup_steps=0.05, per_device_train_batch_size=2
    )
    settings = runs.settle_length(accelerator, settings, model, objective)
    assert settings.max_steps == int((0.97 * 60 - 1) / (1 / 8 + 1 / 8))
    assert settings.warmup_steps == round(0.05 * settings.max_steps)
    torch.testing.assert_close(list(model.parameters()), before, rtol=0, atol=0)


@pytest.mark.parametrize("architecture, name", [("qwen3", "Qwen3ForCausalLM"), ("gpt2", "GPT2LMHeadModel")])
def test_a_run_ends_with_its_tokens_and_its_checkpoint_is_a_plain_one(
    architecture, name, tmp_path, monkeypatch, own_accelerate_state
):
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question.\n" * 60, encoding="utf-8")
    words = ["--corpus", text, "--tokenizer", "char", "--architecture", architecture, "--train_tokens", 1000]
    words += [
        "--preset",
        "gpt2",
        "--per_device_train_batch_size",
        4,
        "--logging_steps",
        1,
        "--output_dir",
        tmp_path / "run",
    ]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *TINY, *map(str, words)])
    run_recipe(main)
    settings = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open(encoding="utf-8")]
    tokens_per_step = rows[0]["tokens_seen"]
    assert rows[-1]["step"] == settings["max_steps"] and 0 <= rows[-1]["tokens_seen"] - 1000 < tokens_per_step
    peak = max(row["muon_learning_rate"] for row in rows)
    wanted = settings_for("--architecture", architecture).muon_learning_rate
    assert peak == pytest.approx(wanted) and rows[-1]["muon_learning_rate"] < 2 * peak / len(rows)

    model = NanoGPTForCausalLM.from_pretrained(tmp_path / "run").eval()
    nanogpt_hf.export(model, AutoTokenizer.from_pretrained(tmp_path / "run"), tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert type(plain).__name__ == name
    with torch.no_grad():
        logits, plain_logits = (reader(torch.arange(16)[None]).logits for reader in (model, plain))
    torch.testing.assert_close(plain_logits, logits, rtol=0, atol=1e-5)
