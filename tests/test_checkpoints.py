"""What a checkpoint holds, what is refused as one, and which of them are kept."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from nanogpt_hf import NanoGPTConfig, NanoGPTForCausalLM
from nanogpt_hf.common.files import folder_written_whole
from nanogpt_hf.common.settings import FinetuningSettings, TrainingSettings
from nanogpt_hf.data.tokenization import make_tokenizer
from nanogpt_hf.training.checkpoints import (
    Progress,
    damage,
    list_checkpoints,
    load_checkpoint,
    newest_good,
    prune,
    read_progress,
    save_checkpoint,
    write_progress,
)
from nanogpt_hf.training.lora import add_adapter
from nanogpt_hf.training.optimization import make_optimizers

TOKENIZER = make_tokenizer("char", ["abc"], 0)


def begun(seed=0, optim="adamw", adapter=False, learning_rate=0.01, **sizes):
    """A tiny model and its optimisers before their first step."""
    torch.manual_seed(seed)
    fields = dict(vocab_size=len(TOKENIZER), n_positions=8, n_embd=16, n_layer=1, n_head=2) | sizes
    model = NanoGPTForCausalLM(NanoGPTConfig(**fields, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    if adapter:
        add_adapter(model, FinetuningSettings(lora_r=2, lora_dropout=0.0), [])
    return model, make_optimizers(model, TrainingSettings(optim=optim, learning_rate=learning_rate))


def take_steps(model, optimizers, seed, count=3):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        ids = torch.randint(0, len(TOKENIZER), (2, 8), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def save(model, optimizers, folder, progress=None):
    save_checkpoint(Accelerator(cpu=True), model, optimizers, TOKENIZER, progress or Progress(), folder)
    return folder


@pytest.mark.parametrize(
    "kind",
    [{}, {"optim": "muon"}, {"adapter": True}, {"tie_word_embeddings": False, "architecture": "qwen3"}],
)
def test_what_was_saved_goes_on_to_the_bit(kind, tmp_path):
    run = begun(**kind)
    take_steps(*run, seed=1)
    progress = Progress(3, 1.5, 2, 1, 0.25, {"scale": 2.0}, identity={"architecture": "gpt2"})
    folder = save(*run, tmp_path / "step-3", progress)
    assert damage(folder) is None and read_progress(folder) == progress
    other = begun(
        **kind, seed=0 if "adapter" in kind else 7, learning_rate=0.5
    )  # the base is not in the checkpoint
    load_checkpoint(*other, folder)
    for optimizer, loaded in zip(run[1], other[1], strict=True):
        for group, new in zip(optimizer.param_groups, loaded.param_groups, strict=True):
            assert new["lr"] == (0.5 if isinstance(optimizer, torch.optim.AdamW) else group["lr"])
            new["lr"] = group["lr"]  # a setting, and no state
    torch.testing.assert_close(take_steps(*other, seed=2), take_steps(*run, seed=2), rtol=0, atol=0)


def test_a_class_that_saves_its_weights_under_other_names_than_it_has(tmp_path):
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = MixtralConfig(vocab_size=len(TOKENIZER), num_key_value_heads=1, num_local_experts=2, **sizes)
    models = [MixtralForCausalLM(config) for _ in range(2)]
    runs = [(model, make_optimizers(model, TrainingSettings(optim="adamw"))) for model in models]
    folder = save(*runs[0], tmp_path / "step-0")
    assert load_file(folder / "model.safetensors").keys() != models[0].state_dict().keys()
    load_checkpoint(*runs[1], folder)
    torch.testing.assert_close(models[1].state_dict(), models[0].state_dict(), rtol=0, atol=0)


def test_an_adapter_is_saved_alone_and_not_to_be_trained_by_who_loads_it(tmp_path):
    folder = save(*begun(adapter=True), tmp_path / "step-0")
    assert not (folder / "model.safetensors").exists()
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers wants it
        assert all(name.startswith("base_model.model.transformer.h.0.") for name in file.keys())
    assert json.loads((folder / "adapter_config.json").read_text())["inference_mode"] is True


@pytest.mark.parametrize(
    "kind, message",
    [
        ({"n_layer": 2}, r"model.safetensors holds the weights of another model \(transformer.h.1"),
        ({"n_embd": 32}, "model.safetensors cannot be loaded into this model"),
        ({"optim": "muon"}, "holds the state of other optimisers"),
    ],
)
def test_a_checkpoint_of_another_model_or_optimiser_is_refused(kind, message, tmp_path):
    run = begun()
    take_steps(*run, seed=1)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(*begun(**kind), save(*run, tmp_path / "step-3"))


def test_an_adapter_of_another_model_is_refused(tmp_path):
    folder = save(*begun(adapter=True), tmp_path / "step-0")
    with pytest.raises(ValueError, match="adapter_model.safetensors holds the weights of another model"):
        load_checkpoint(*begun(adapter=True, n_layer=2), folder)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_bytes(b"no tensors")])
def test_a_file_that_cannot_be_read_is_named(name, spoil, tmp_path):
    folder = save(*begun(), tmp_path / "step-0")
    spoil(folder / name)
    with pytest.raises(
        ValueError, match="model.safetensors cannot" if name[0] == "m" else "step-0 holds the state"
    ):
        load_checkpoint(*begun(), folder)
    assert name in damage(folder)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        '{"step": -1}',
        '{"step": "3"}',
        '{"steps": 3}',
        '{"best_loss": "x"}',
        '{"scaler": []}',
        "[" * 10**5,
    ],
)
def test_a_progress_that_is_none_is_refused(text, tmp_path):
    (tmp_path / "progress.json").write_text(text)
    with pytest.raises(ValueError, match="has no progress.json of this version"):
        read_progress(tmp_path)


def test_a_progress_of_an_earlier_version_is_read(tmp_path):
    (tmp_path / "progress.json").write_text('{"step": 0, "identity": {"architecture": "modern", "seed": 1}}')
    progress = read_progress(tmp_path)
    assert (progress.step, progress.best_loss, progress.evaluations_since_best, progress.elapsed_s) == (
        0,
        None,
        0,
        0,
    )
    assert progress.identity == {"architecture": "qwen3", "seed": 1}
    assert len({Progress().run_id for _ in range(20)}) == 20  # trackers tell runs apart by it


def test_damaged_checkpoints_are_passed_over_with_a_sentence_each(tmp_path):
    paths = [write_checkpoint(tmp_path, step) for step in (0, 5, 10)]
    assert newest_good(tmp_path) == (paths[2], [])
    for path in paths[1:]:
        break_it(path)
    found, complaints = newest_good(tmp_path)
    assert found == paths[0] and len(complaints) == 2
    for path, complaint in zip(reversed(paths), complaints, strict=False):
        assert (
            complaint.startswith(f"{path} is damaged (optimizer.safetensors") and "passed over" in complaint
        )
    break_it(paths[0])
    assert newest_good(tmp_path)[0] is None and len(newest_good(tmp_path)[1]) == 3
    with folder_written_whole(tmp_path / "step-20") as staging:
        write_progress(Progress(step=20), staging)
    assert "optimizer.safetensors" in damage(tmp_path / "step-20")  # which its manifest does not miss


# --- which checkpoints are kept ---


def write_checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"step-{step}"
    with folder_written_whole(path) as staging:
        (staging / "optimizer.safetensors").write_bytes(bytes(range(256)))
        (staging / "progress.json").write_text(json.dumps(asdict(Progress(step=step))))
    return path


def break_it(checkpoint: Path) -> None:
    (checkpoint / "optimizer.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    "present, broken, newest, keep, left",
    [
        ([10, 20], [], 30, 2, [20, 30]),
        ([10, 20], [20], 30, 2, [10, 20, 30]),  # what is left would be one good checkpoint
        ([10, 20], [20], 30, 1, [30]),
        ([10, 20, 30], [30], 25, 1, [25]),  # the run went on from 20: 30 is of a course it has left
        ([10, 20, 30], [], 25, 2, [20, 25]),
        ([5, 10, 20], [10, 20], 30, 3, [5, 10, 20, 30]),
        ([5, 10, 20, 25], [10], 30, 3, [20, 25, 30]),
    ],
)
def test_the_limit_counts_good_checkpoints(tmp_path, present, broken, newest, keep, left):
    for step in present:
        write_checkpoint(tmp_path, step)
    for step in broken:
        break_it(tmp_path / f"step-{step}")
    prune(write_checkpoint(tmp_path, newest), keep)
    assert [int(path.name.removeprefix("step-")) for path in list_checkpoints(tmp_path)] == left
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"step-{step}" for step in left)
    assert newest_good(tmp_path) == (tmp_path / f"step-{newest}", [])


def test_names_that_only_look_like_checkpoints_are_left_alone(tmp_path):
    for name in ("step-05", "step-", "step-x", "step-1-backup", "step-²"):
        (tmp_path / name).mkdir()
    prune(write_checkpoint(tmp_path, 30), 1)
    assert len(list(tmp_path.iterdir())) == 6


def test_a_checkpoint_of_the_same_step_replaces_the_other(tmp_path):
    break_it(write_checkpoint(tmp_path, 10))
    write_checkpoint(tmp_path, 10)
    assert damage(tmp_path / "step-10") is None and len(list(tmp_path.iterdir())) == 1
