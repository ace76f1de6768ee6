"""Going on: the end is the same to the bit, and only the same run goes on."""

import json
import math
import shutil
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from processes import (
    Run,
    digests,
    finished,
    metrics,
    ring,
    train_here,
    training_words,
    without_times,
    write_corpus,
)

from nanogpt_hf import pretrain
from nanogpt_hf.common.files import MANIFEST
from nanogpt_hf.common.settings import TrainingSettings
from nanogpt_hf.training.checkpoints import (
    list_checkpoints,
    read_progress,
)

GO_ON = ("--resume_from_checkpoint", "last")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def drop_after(folder: Path, step: int) -> None:
    """As if the run had been stopped for good right after the checkpoint of a step."""
    for checkpoint in list_checkpoints(folder / "checkpoints"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(folder / "checkpoints")]


def refusal(words) -> str:
    with pytest.raises(ValueError) as refused:
        train_here(words)
    message = str(refused.value)
    assert "\n" not in message
    return message


# --- the same end ---


@pytest.mark.parametrize(
    "options",
    [
        (
            "--optim",
            "muon",
            "--architecture",
            "qwen3",
            "--rdrop_alpha",
            "2",
            "--short_positions",
            "4",
            "--bf16",
            "false",
        ),
        (
            "--optim",
            "adamw",
            "--architecture",
            "gpt2",
            "--gradient_accumulation_steps",
            "3",
            "--bf16",
            "true",
        ),
    ],
    ids=["muon", "adamw"],
)
def test_a_run_in_two_parts_ends_as_one_run(corpus, tmp_path, options):
    keep = ("--save_total_limit", "9", *options)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finished(training_words(whole, corpus, *keep))
    shutil.copytree(whole, parts)
    first_part = read_progress(parts / "checkpoints" / "step-10")
    drop_after(parts, 10)
    shutil.rmtree(parts / "trackers", ignore_errors=True)
    said = finished(training_words(parts, corpus, *keep, *GO_ON))
    assert f"goes on    from step 10 of 30: {parts / 'checkpoints' / 'step-10'}" in said
    assert digests(parts) == digests(whole)
    assert len(digests(whole)) == 6 * 2 + 1
    assert without_times(metrics(parts)) == without_times(metrics(whole))
    assert [row["step"] for row in metrics(parts)] == list(range(3, 31, 3))
    elapsed = [row["elapsed_s"] for row in metrics(parts)]
    assert elapsed == sorted(elapsed)
    top = read_progress(parts)
    of_rows = {row["step"]: row["elapsed_s"] for row in metrics(parts)}  # in milliseconds
    assert round(top.elapsed_s, 3) >= of_rows[top.step]
    ends = [read_progress(folder / "checkpoints" / "step-30") for folder in (whole, parts)]
    assert ends[1].run_id == first_part.run_id and ends[1].elapsed_s > first_part.elapsed_s
    of_this_course = {"elapsed_s": 0, "run_id": "", "metrics_sha256": ""}  # metrics.jsonl holds the times
    assert asdict(ends[0]) | of_this_course == asdict(ends[1]) | of_this_course


@pytest.mark.usefixtures("own_accelerate_state")
def test_a_dropout_that_the_run_has_chosen_stays_when_it_goes_on_longer(corpus, tmp_path):
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 16, "per_device_train_batch_size": 8}
    settings = TrainingSettings(
        corpus=str(corpus),
        output_dir=str(tmp_path / "run"),
        max_steps=200,
        save_steps=200,
        use_cpu=True,
        **sizes,
    )
    pretrain(settings)
    pretrain(replace(settings, max_steps=300, resume_from_checkpoint="last"))
    assert yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())["dropout"] == 0.08
    assert read_progress(tmp_path / "run" / "checkpoints" / "step-300").step == 300


def test_best_so_far_and_early_stopping_count_go_on(corpus, tmp_path):
    folder = tmp_path / "run"
    restless = (
        "--architecture gpt2 --optim adamw --learning_rate 0.3 --max_steps 90 --eval_steps 3 --dropout 0"
    )
    patience = "--early_stopping_patience 5 --save_total_limit 99"
    words = training_words(folder, corpus, *restless.split(), *patience.split())
    train_here(words)
    end = steps(folder)[-1]
    assert end < 90
    rows, weights = metrics(folder), digests(folder)
    middle = [
        step
        for step in steps(folder)
        if read_progress(folder / "checkpoints" / f"step-{step}").evaluations_since_best
    ]
    assert middle[0] < end, "no checkpoint lies between the best model and the end"
    drop_after(folder, middle[0])
    train_here([*words, *GO_ON])
    assert steps(folder)[-1] == end and digests(folder) == weights
    assert without_times(metrics(folder)) == without_times(rows)


def test_two_processes_then_one_with_another_micro_batch(corpus, tmp_path):
    both, parts = tmp_path / "both", tmp_path / "parts"
    same = "--dropout 0 --bf16 false --logging_steps 1 --max_steps 20 --save_total_limit 9".split()
    words = training_words(both, corpus, *same, "--per_device_train_batch_size", "6")
    runs = ring([words] * 2, tmp_path)
    assert [run.wait() for run in runs] == [0, 0], runs[0].said() + runs[1].said()
    shutil.copytree(both, parts)
    drop_after(parts, 10)
    one = ("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "3")
    train_here(training_words(parts, corpus, *same, *one, *GO_ON))
    assert [row["step"] for row in metrics(parts)] == list(range(1, 21))
    for name in ("train_loss", "eval_loss"):
        losses = [[row[name] for row in metrics(folder) if name in row] for folder in (both, parts)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_loss_scaling_of_float16_goes_on(corpus, tmp_path):
    """The scale grows every 4 steps and is halved by a gradient that is not finite; that step is left out."""

    def with_scaler(settings):
        accelerator = Accelerator(cpu=True)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=4)
        return accelerator

    def overflow(model):
        losses = iter(range(1000))
        weight = model.lm_head.weight
        weight.register_hook(lambda gradient: gradient * math.inf if next(losses) == 5 else gradient)

    folder = tmp_path / "run"
    words = training_words(
        folder, corpus, "--optim", "adamw", "--bf16", "false", "--fp16", "--save_total_limit", "9"
    )
    train_here(words, change_model=overflow, make_accelerator=with_scaler)
    ends = [digests(folder), read_progress(folder / "checkpoints" / "step-30").scaler]
    assert ends[1]["scale"] == 8 * 2**1 / 2 * 2**6
    assert [row["step"] for row in metrics(folder) if "grad_norm" not in row] == [6]
    drop_after(folder, 10)
    train_here([*words, *GO_ON], make_accelerator=with_scaler)
    assert [digests(folder), read_progress(folder / "checkpoints" / "step-30").scaler] == ends


def test_a_finished_run_has_nothing_left_to_do(corpus, tmp_path):
    words = training_words(tmp_path / "run", corpus, "--max_steps", "6")
    train_here(words)
    before = digests(tmp_path / "run"), metrics(tmp_path / "run")
    train_here([*words, *GO_ON])
    assert (digests(tmp_path / "run"), metrics(tmp_path / "run")) == before


def test_a_checkpoint_before_the_first_evaluation_can_be_the_end(corpus, tmp_path):
    folder = tmp_path / "run"
    train_here(training_words(folder, corpus, "--max_steps", "10"))
    drop_after(folder, 5)
    (folder / "model.safetensors").unlink()
    progress = train_here(training_words(folder, corpus, "--max_steps", "5", *GO_ON))
    assert progress.step == 5 and progress.best_loss is not None and (folder / "model.safetensors").exists()


def test_a_checkpoint_of_another_folder_begins_a_new_one(corpus, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    train_here(training_words(old, corpus, "--save_total_limit", "9"))
    before = digests(old)
    source = old / "checkpoints" / "step-20"
    train_here(training_words(new, corpus, "--resume_from_checkpoint", source))
    assert digests(old) == before
    assert (
        digests(new)["checkpoints/step-30/model.safetensors"]
        == before["checkpoints/step-30/model.safetensors"]
    )
    assert (new / "model.safetensors").exists()
    assert metrics(new)[0]["step"] == 21
    assert "not one of the checkpoints" in refusal(
        training_words(new, corpus, "--resume_from_checkpoint", source)
    )


# --- only the same run ---


@pytest.fixture(scope="module")
def short_run(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "short"
    train_here(training_words(folder, corpus, "--max_steps", "10"))
    return folder


@pytest.mark.parametrize(
    "changed, message",
    [
        (("--tokenizer", "bpe", "--vocab_size", "300"), "tokenizer was "),
        (("--n_layer", "2"), "n_layer was 1 and is now 2"),
        (("--architecture", "gpt2"), "architecture was qwen3 and is now gpt2"),
        (("--n_inner", "24"), "n_inner was None and is now 24"),
        (("--optim", "adamw"), "optim was muon and is now adamw"),
        (("--per_device_train_batch_size", "8"), "tokens_per_step was 64 and is now 128"),
        (("--seed", "1"), "seed was 1337 and is now 1"),
        (("--validation_split_percentage", "20"), "validation_split_percentage was 10 and is now 20"),
        (("--max_steps", "4"), "is at step 10, past --max_steps 4"),
        (("--short_positions", "4"), "short_positions was None and is now 4"),
    ],
)
def test_what_is_not_the_same_run_is_refused_and_left_alone(corpus, short_run, changed, message):
    before = {path: path.read_bytes() for path in short_run.rglob("*") if path.is_file()}
    assert message in refusal(training_words(short_run, corpus, *changed, *GO_ON))
    assert {path: path.read_bytes() for path in short_run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("noted, steps", [(True, "3"), (False, "7")])
def test_the_short_windows_of_a_run_stay_and_an_earlier_version_had_none(corpus, tmp_path, noted, steps):
    words = training_words(tmp_path / "run", corpus, "--short_positions", "4", "--short_steps", "7")
    train_here([*words, "--max_steps", "10"])
    newest = tmp_path / "run" / "checkpoints" / "step-10"
    if not noted:
        values = json.loads((newest / "progress.json").read_text())
        for name in ("short_positions", "short_steps"):
            del values["identity"][name]
        content = json.dumps(values).encode()
        (newest / "progress.json").write_bytes(content)
        manifest = json.loads((newest / MANIFEST).read_text())
        manifest["progress.json"] = {"bytes": len(content), "sha256": sha256(content).hexdigest()}
        (newest / MANIFEST).write_text(json.dumps(manifest))
    said = refusal([*words, "--short_steps", steps, *GO_ON])
    assert ("short_steps was 7 and is now 3" if noted else "short_positions was None and is now 4") in said


def test_a_changed_corpus_is_refused(short_run, tmp_path):
    other = write_corpus(tmp_path, "To be, or not to be, that is the question: " * 60)
    said = refusal(training_words(short_run, other, *GO_ON))
    assert "corpus was " in said and "tokenizer was " in said and len(said) < 500


def test_where_there_is_no_checkpoint(corpus, short_run, tmp_path):
    nowhere = tmp_path / "nowhere"
    assert "start without" in refusal(training_words(nowhere, corpus, *GO_ON))
    assert "there is no checkpoint" in refusal(
        training_words(nowhere, corpus, "--resume_from_checkpoint", short_run / "step-1")
    )
    assert not nowhere.exists()
    killed_early = tmp_path / "killed_early"
    killed_early.mkdir()
    (killed_early / "run.yaml").write_text("{}")
    assert "--overwrite_output_dir" in refusal(training_words(killed_early, corpus, *GO_ON))


# --- the folder ---


def test_overwriting_deletes_what_a_run_has_made_and_nothing_else(corpus, tmp_path):
    folder = tmp_path / "run"
    train_here(training_words(folder, corpus))
    (folder / "notes.txt").write_text("mine")
    (folder / ".unfinished-novel").mkdir()
    assert "not empty" in refusal(training_words(folder, corpus))
    train_here(training_words(folder, corpus, "--max_steps", "3", "--overwrite_output_dir"))
    assert "tokenizer_hub_id" not in (folder / "run.yaml").read_text(encoding="utf-8")
    assert steps(folder) == [3] and [row["step"] for row in metrics(folder)] == [3]
    assert (folder / "notes.txt").read_text() == "mine" and (folder / ".unfinished-novel").is_dir()


def test_what_no_run_has_made_is_not_overwritten(corpus, tmp_path):
    (tmp_path / "README.md").write_text("my project")
    said = refusal(training_words(tmp_path, corpus, "--overwrite_output_dir"))
    assert "README.md but no run.yaml" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md"]


def test_run_yaml_repeats_the_run(corpus, short_run, tmp_path):
    train_here(["--config", str(short_run / "run.yaml"), "--output_dir", str(tmp_path / "again")])
    assert digests(tmp_path / "again") == digests(short_run)


def test_processes_that_read_different_texts_do_not_train(corpus, tmp_path):
    changed = write_corpus(tmp_path, "The corpus has been changed while the processes were starting. " * 60)
    runs = ring([training_words(tmp_path / "run", text) for text in (corpus, changed)], tmp_path)
    assert [run.wait() for run in runs] == [2, 2]
    assert "have read different texts" in runs[0].said() and not (tmp_path / "run").exists()


# --- trackers ---


def test_tensorboard_goes_on_with_the_same_run(corpus, tmp_path):
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    folder = tmp_path / "run"
    words = training_words(folder, corpus, "--report_to", "tensorboard", "--save_total_limit", "9")
    train_here(words)
    drop_after(folder, 10)
    train_here([*words, *GO_ON])
    board = EventMultiplexer().AddRunsFromDirectory(str(folder / "trackers"))
    board.Reload()
    runs = [name for name, tags in board.Runs().items() if "train_loss" in tags["scalars"]]
    assert len(runs) == 1
    assert [event.step for event in board.Scalars(runs[0], "train_loss")] == list(range(3, 31, 3))
    assert len(board.Runs()) == 2  # accelerate keeps the settings in a run of their own, once


def test_trackio_goes_on_with_the_same_run(corpus, tmp_path):
    folder = tmp_path / "run"
    words = training_words(folder, corpus, "--report_to", "trackio", "--save_total_limit", "9")
    place = {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    finished(words, **place)
    drop_after(folder, 15)
    finished([*words, *GO_ON], **place)
    shown = Run([*words], prepare=(show_trackio, tmp_path / "shown.json"), log=tmp_path / "show.log", **place)
    assert shown.wait() == 0, shown.said()
    (runs,) = json.loads((tmp_path / "shown.json").read_text()).values()
    progress = read_progress(folder / "checkpoints" / "step-30")
    assert list(runs) == [f"run-{progress.run_id}"]
    assert set(runs[f"run-{progress.run_id}"]) == set(range(3, 31, 3))


def show_trackio(path: Path) -> None:
    """The steps of all runs of all projects, into a file."""
    import trackio.sqlite_storage as storage

    found = {
        project: {
            run: [row["step"] for row in storage.SQLiteStorage.get_logs(project, run)]
            for run in storage.SQLiteStorage.get_runs(project)
        }
        for project in storage.SQLiteStorage.get_projects()
    }
    path.write_text(json.dumps(found))
    raise SystemExit(0)
