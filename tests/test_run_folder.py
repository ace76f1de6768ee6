"""A run's folder tells the truth at every moment: one writer, one state at its top, and what was damaged is mended."""

import io
import json
import os
import pty
import re
import shutil
import signal
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from processes import (
    ROOT,
    Run,
    digests,
    finished,
    metrics,
    run_here,
    take_terminal,
    training_words,
    without_times,
    write_corpus,
)
from safetensors.torch import load_file, save_file

from nanogpt_hf.common import files
from nanogpt_hf.common.files import MANIFEST, delete_left_overs, files_written_whole
from nanogpt_hf.training.commands import command_line, going_on

pytest.importorskip("fcntl", reason="signals and kills are sent the POSIX way")
pytestmark = pytest.mark.faults
GO_ON = ("--resume_from_checkpoint", "last")
PRETRAIN = {"recipe": "pretrain_char.py"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A finished run, which tests copy; its best model is not its last one."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    finished(training_words(folder, corpus, "--save_total_limit", "9"), **PRETRAIN)
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run"))


def one_sentence(run: Run, status: int = 2) -> str:
    assert run.wait() == status, (run.wait(), run.said())
    errors = [line for line in run.said().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in run.said(), run.said()
    return errors[0]


def called(recipe: str, *words, status: int = 0) -> str:
    """What a recipe says on both streams, run in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        ended = run_here(recipe, *words)
    assert ended == status, (ended, said.getvalue())
    errors = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
    assert len(errors) == (status == 2) and "Traceback" not in said.getvalue(), said.getvalue()
    return said.getvalue()


def sampled(model: Path, status: int = 0) -> str:
    """What sample.py says with a model."""
    words = ("--model", model, "--prompt", "To", "--seed", 1, "--max_new_tokens", 30)
    said = called("sample.py", *words, status=status)
    assert status or len(said) > 20
    return said


def flip_a_bit(path: Path, at: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 4
    path.write_bytes(content)


def state_of_the_top(folder: Path) -> tuple[int, float | None]:
    """The step that all at the top of a run folder is of, and its loss; they must agree."""
    assert files.damage(folder) is None
    progress = json.loads((folder / "progress.json").read_text())
    step, loss = progress["step"], progress["best_loss"]
    card = (folder / "README.md").read_text(encoding="utf-8")
    if loss is None:
        assert f"The model of step {step}, before the first validation" in card
    else:
        assert progress["best_step"] == step
        assert f"Validation loss {loss:.4f} nats" in card and f" at step {step} of " in card
    weights = load_file(folder / "model.safetensors")
    for other in (folder / "checkpoints").glob(f"step-{step}"):
        assert all(
            torch.equal(tensor, weights[name])
            for name, tensor in load_file(other / "model.safetensors").items()
        )
    if (folder / "samples.txt").exists():
        quoted = (folder / "samples.txt").read_text(encoding="utf-8")[:200].strip("\n")
        assert quoted in card
    return step, loss


# --- one writer ---


def test_of_two_starts_at_once_one_runs_and_the_other_is_told(corpus, tmp_path):
    folder = tmp_path / "run"
    rare = ("--logging_steps", "100", "--eval_steps", "300", "--save_steps", "300")
    words = training_words(folder, corpus, "--max_steps", "300", *rare)
    runs = [Run(words, log=tmp_path / f"{n}.log", **PRETRAIN) for n in range(2)]
    refused, ran = sorted(runs, key=lambda run: run.wait() == 0)
    said = one_sentence(refused)
    assert f"{folder} is being written by process {ran.process.pid} of " in said
    assert ran.wait() == 0 and [row["step"] for row in metrics(folder)] == [100, 200, 300]


def test_going_on_beside_a_live_run_leaves_it_alone(corpus, tmp_path):
    folder = tmp_path / "run"
    words = training_words(folder, corpus, "--max_steps", "100000")
    live = Run(words, **PRETRAIN)
    live.wait_for(folder / "checkpoints" / "step-10")
    for more in (GO_ON, ("--overwrite_output_dir",)):
        second = Run([*words, *more], log=tmp_path / "second.log", **PRETRAIN)
        assert f"is being written by process {live.process.pid} of " in one_sentence(second)
        (tmp_path / "second.log").unlink()
    assert live.process.is_alive()
    live.signal(signal.SIGTERM)
    assert live.wait() == 143
    steps = [row["step"] for row in metrics(folder)]
    assert steps == sorted(set(steps))


def test_the_lock_of_a_dead_run_does_not_stay(corpus, tmp_path):
    folder = tmp_path / "run"
    words = training_words(folder, corpus)
    run = Run([*words, "--max_steps", "100000"], **PRETRAIN)
    run.wait_for(folder / "checkpoints" / "step-10")
    run.signal(signal.SIGKILL)
    run.wait()
    finished([*words, "--overwrite_output_dir"], **PRETRAIN)
    assert not [path.name for path in folder.rglob(".*")]


def test_only_what_dead_processes_left_is_deleted(tmp_path):
    """A stranger's folder of a similar name, and what a living process is writing, stay."""
    mine = tmp_path / ".unfinished-novel"
    mine.mkdir()
    (mine / "chapter").write_text("It was")
    dead = Run(
        ["--output_dir", tmp_path / "x"], prepare=(die_while_writing, str(tmp_path)), log=tmp_path / "log"
    )
    assert dead.wait() == 128 + signal.SIGKILL, dead.said()
    left = [path for path in tmp_path.glob(".*") if path != mine]
    assert left
    with files_written_whole(tmp_path) as living:
        (living / "b").write_text("b")
        delete_left_overs(tmp_path)
        assert (living / "b").exists() and not any(path.exists() for path in left)
    assert (tmp_path / "b").read_text() == "b" and (mine / "chapter").read_text() == "It was"
    assert not [path for path in tmp_path.glob(".*") if path != mine] and not (tmp_path / "a").exists()


def die_while_writing(folder: str) -> None:
    with files_written_whole(Path(folder)) as staging:
        (staging / "a").write_text("a")
        os.kill(os.getpid(), signal.SIGKILL)


def test_files_of_one_state_are_replaced_together(tmp_path):
    """Killed after the first of three files has taken its place: the next writer puts the others in theirs."""
    for name in "abc":
        (tmp_path / name).write_text("old")
    dead = Run(
        ["--output_dir", tmp_path / "x"], prepare=(die_while_moving, str(tmp_path)), log=tmp_path / "log"
    )
    assert dead.wait() == 128 + signal.SIGKILL, dead.said()
    assert sorted((tmp_path / name).read_text() for name in "abc") == ["new", "old", "old"]
    delete_left_overs(tmp_path)
    assert [(tmp_path / name).read_text() for name in "abc"] == ["new"] * 3
    assert not list(tmp_path.glob(".*"))


def die_while_moving(folder: str) -> None:
    def hook(event, args):
        if event == "os.rename" and str(args[1]).endswith("/b"):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    with files_written_whole(Path(folder)) as staging:
        for name in "abc":
            (staging / name).write_text("new")


def test_an_evaluation_into_a_live_run_does_no_harm(corpus, whole, tmp_path):
    folder = tmp_path / "run"
    live = Run(training_words(folder, corpus, "--max_steps", "100000"), **PRETRAIN)
    live.wait_for(folder / "checkpoints" / "step-10")
    words = ["--model", whole, "--corpus", corpus, "--output_dir", folder]
    called("compare.py", *words)
    assert live.process.is_alive() and (folder / "results.json").exists()
    live.signal(signal.SIGTERM)
    assert live.wait() == 143


@pytest.mark.parametrize("recipe", ["compare.py", "plan.py"])
def test_files_of_others_are_not_replaced_unasked(corpus, whole, tmp_path, recipe):
    folder = tmp_path / "mine"
    (folder / ".unfinished-novel").mkdir(parents=True)
    name = {"compare.py": "results.md", "plan.py": "plan.json"}[recipe]
    (folder / name).write_text("my own")
    words = ["--output_dir", folder] + (
        ["--model", whole, "--corpus", corpus] if recipe == "compare.py" else ["--preset", "cpu"]
    )
    assert f"holds {name}" in called(recipe, *words, status=2)
    assert (folder / name).read_text() == "my own"
    called(recipe, *words, "--overwrite_output_dir")
    assert (folder / name).read_text() != "my own" and (folder / ".unfinished-novel").is_dir()


# --- one state ---


def test_after_a_resume_and_a_stop_the_top_is_of_one_state(corpus, tmp_path):
    """The run's best is of its second part, and what is shared says so everywhere."""
    folder = tmp_path / "run"
    words = training_words(folder, corpus, "--max_steps", "12")
    finished(words, **PRETRAIN)
    assert state_of_the_top(folder)[0] == 12
    more = Run([*words, *GO_ON, "--max_steps", "100000"], log=tmp_path / "more.log", **PRETRAIN)
    while json.loads((folder / "progress.json").read_text())["step"] < 30:
        assert more.process.is_alive()
    more.signal(signal.SIGINT)
    assert more.wait() == 130
    step, loss = state_of_the_top(folder)
    assert step >= 30
    called("share.py", "--model", folder, "--output_dir", tmp_path / "plain")
    card = (tmp_path / "plain" / "README.md").read_text(encoding="utf-8")
    assert (
        f"Validation loss {loss:.4f} nats" in card
        and f"at step {step} of {metrics(folder)[-1]['step']}" in card
    )


def test_a_stop_before_the_first_validation_leaves_a_model(corpus, tmp_path):
    folder = tmp_path / "run"
    run = Run(training_words(folder, corpus, "--max_steps", "100000", "--eval_steps", "90000"), **PRETRAIN)
    run.wait_for(folder / "checkpoints" / "step-10")
    run.signal(signal.SIGINT)
    assert run.wait() == 130
    newest = max(int(path.name[5:]) for path in (folder / "checkpoints").iterdir())
    assert state_of_the_top(folder) == (newest, None)
    sampled(folder)


def test_a_kill_before_the_first_validation_leaves_the_model_of_the_newest_checkpoint(corpus, tmp_path):
    folder = tmp_path / "run"
    run = Run(training_words(folder, corpus, "--max_steps", "100000", "--eval_steps", "90000"), **PRETRAIN)
    run.wait_for(folder / "checkpoints" / "step-10")
    run.signal(signal.SIGKILL)
    run.wait()
    sampled(folder)


def test_another_course_from_an_older_checkpoint(corpus, copied, tmp_path):
    """What the left course had at the top is not passed off as the new one's best."""
    words = training_words(
        copied, corpus, "--save_total_limit", "9", "--max_steps", "40", "--learning_rate", "0"
    )
    words += ["--muon_learning_rate", "0", "--eval_steps", "100"]
    at_20 = copied / "checkpoints" / "step-20"
    run = Run([*words, "--resume_from_checkpoint", at_20], log=tmp_path / "log", **PRETRAIN)
    assert run.wait() == 0
    assert "is of step 30, of a course that is left" in run.said()
    step, loss = state_of_the_top(copied)
    assert (step, loss) == (40, metrics(copied)[-1]["eval_loss"])
    top, start = load_file(copied / "model.safetensors"), load_file(at_20 / "model.safetensors")
    assert all(torch.equal(top[name], start[name]) for name in top), (
        "with rates of 0 nothing has been learned"
    )


# --- what a run says of itself ---


def test_the_command_is_the_one_that_ran_and_outlives_a_resume(corpus, tmp_path):
    folder = tmp_path / "run"
    words = training_words(folder, corpus, "--max_steps", "10")
    finished(words, **PRETRAIN)
    more = [
        "--output_dir",
        folder,
        "--resume_from_checkpoint",
        "last",
        "--max_steps",
        "20",
        "--eval_steps",
        "5",
    ]
    said = finished(more, log=tmp_path / "log", **PRETRAIN)
    assert "changed    max_steps from 10 to 20" in said and "changed    eval_steps from 6 to 5" in said
    record = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))["record"]
    first = f"python recipes/pretrain_char.py --corpus {corpus.name} --output_dir run --architecture qwen3"
    assert record["command"].startswith(first)
    (later,) = record["history"]
    assert later["step"] == 10 and later["changed"] == {"max_steps": [10, 20], "eval_steps": [6, 5]}
    assert later["command"].startswith("python recipes/pretrain_char.py --output_dir run --resume_")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert first in card and f"# from step 10:\n{later['command']}" in card
    assert str(tmp_path) not in card
    assert metrics(folder)[-1]["step"] == 20 and "n_layer: 1" in card, "what was not said comes from the run"


@pytest.mark.parametrize(
    "environment, command",
    [
        ({}, "python recipes/pretrain_char.py"),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, "accelerate launch recipes/pretrain_char.py"),
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "WORLD_SIZE": "2"},
            "accelerate launch --num_processes 2 recipes/pretrain_char.py",
        ),
        (
            {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2"},
            "torchrun --nproc_per_node 2 recipes/pretrain_char.py",
        ),
    ],
)
def test_the_launcher_is_the_one_that_was_used(environment, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HOME", "/home/ann")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    words = (
        "--corpus=/home/ann/my.txt --corpus ../../x/*.txt --output_dir runs/a --document_end /home/ann/end"
    )
    monkeypatch.setattr(sys, "argv", ["recipes/pretrain_char.py", *words.split()])
    shown = "--corpus=my.txt --corpus '*.txt' --output_dir runs/a --document_end '~/end'"
    assert command_line() == f"{command} {shown}"
    goes_on = "python recipes/pretrain_char.py --output_dir 'my runs' --resume_from_checkpoint last"
    if "WORLD_SIZE" in environment:  # nobody tells a process of several how they were launched
        goes_on = "the same command and --resume_from_checkpoint last"
    assert going_on(Path("my runs")) == goes_on


def test_settings_that_had_no_effect_are_not_in_the_card(whole, corpus, tmp_path):
    card = (whole / "README.md").read_text(encoding="utf-8")
    assert "muon_learning_rate: " in card and "tokens_per_step: 64" in card and "warmup_steps: 5" in card
    folder = tmp_path / "run"
    words = training_words(folder, corpus, "--max_steps", "6", "--warmup_steps", "50", "--optim", "adamw")
    finished(words, **PRETRAIN)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "muon_learning_rate" not in card and "warmup_steps: 3\n" in card
    assert yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))["warmup_steps"] == 3


# --- stops ---


def test_a_hangup_stops_with_a_checkpoint(corpus, tmp_path):
    folder = tmp_path / "run"
    heed = (signal.signal, signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    run = Run(training_words(folder, corpus, "--max_steps", "100000"), prepare=heed)
    run.wait_for(folder / "checkpoints" / "step-10")
    run.signal(signal.SIGHUP)
    run.signal(signal.SIGHUP)  # as the kernel and a shell do
    assert run.wait() == 129
    newest = max(int(path.name[5:]) for path in (folder / "checkpoints").iterdir())
    assert metrics(folder)[-1]["step"] <= newest < 100000


def test_a_hangup_that_was_ignored_stays_ignored(corpus, tmp_path):
    folder = tmp_path / "run"
    ignore = (signal.signal, signal.SIGHUP, signal.SIG_IGN)
    run = Run(training_words(folder, corpus, "--max_steps", "60"), prepare=ignore)
    run.wait_for(folder / "checkpoints" / "step-10")
    run.signal(signal.SIGHUP)
    assert run.wait() == 0 and metrics(folder)[-1]["step"] == 60


def test_a_terminal_that_is_closed(corpus, tmp_path):
    """The run's output is a terminal that goes away: it stops with a checkpoint all the same."""
    folder = tmp_path / "run"
    terminal, its_end = pty.openpty()
    words = training_words(folder, corpus, "--max_steps", "100000", "--eval_steps", "50000")
    run = Run(words, prepare=(take_terminal, os.ttyname(its_end)), **PRETRAIN)
    threading.Thread(target=read_until_closed, args=(terminal,), daemon=True).start()
    run.wait_for(folder / "checkpoints" / "step-5")
    os.close(its_end)
    run.signal(signal.SIGHUP)  # what the kernel does to whoever has the terminal
    os.close(terminal)
    assert run.wait() == 129
    newest = max(int(path.name[5:]) for path in (folder / "checkpoints").iterdir())
    assert metrics(folder)[-1]["step"] <= newest < 100000


def read_until_closed(terminal: int) -> None:
    try:
        while os.read(terminal, 1000):
            pass
    except OSError:
        pass


def test_output_that_nobody_reads_does_not_end_a_run(corpus, tmp_path):
    folder = tmp_path / "run"
    run = Run(training_words(folder, corpus), prepare=(break_stdout,), **PRETRAIN)
    assert run.wait() == 0, run.said()
    assert metrics(folder)[-1]["step"] == 30 and (folder / "README.md").exists()


def break_stdout() -> None:
    read, write = os.pipe()
    os.dup2(write, 1)
    os.close(read)
    os.close(write)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # not the file that it was


def test_a_broken_pipe_says_that_what_was_saved_is_whole(whole, tmp_path):
    words = ["--model", whole, "--max_new_tokens", "30"]
    run = Run(words, recipe="sample.py", prepare=(break_stdout,), log=tmp_path / "log")
    assert "what was saved before this is whole" in one_sentence(run, 141)


# --- pictures ---


def test_no_picture_costs_anything_else(corpus, tmp_path):
    folder = tmp_path / "run"
    run = Run(training_words(folder, corpus), prepare=(no_pictures,), **PRETRAIN)
    assert run.wait() == 0, run.said()
    assert run.said().count("warning: loss_curve.png is left out (TypeError: no picture can be drawn)") >= 1
    assert not (folder / "loss_curve.png").exists() and (folder / "samples.txt").exists()
    assert "loss_curve" not in (folder / "README.md").read_text(encoding="utf-8")


def no_pictures() -> None:
    from matplotlib.figure import Figure

    def savefig(*args, **kwargs):
        raise TypeError("no picture can be drawn")

    Figure.savefig = savefig


# --- metrics.jsonl ---


def go_on(folder: Path, corpus: Path, tmp_path: Path, *words) -> str:
    said = finished(
        training_words(folder, corpus, "--save_total_limit", "9", "--max_steps", "33", *GO_ON, *words),
        log=tmp_path / "going_on.log",
    )
    assert metrics(folder)[-1]["step"] == 33
    return said


def test_a_bit_flipped_in_metrics_costs_that_line_alone(corpus, copied, tmp_path):
    path = copied / "metrics.jsonl"
    before = path.read_bytes()
    flip_a_bit(path, at=before.index(b"\n") + 2)
    damaged = path.read_bytes()
    said = go_on(copied, corpus, tmp_path)
    assert (
        f"warning: {path} is not what the run had written until step 30, 1 of its lines cannot be read"
        in said
    )
    assert (copied / "metrics.damaged-1.jsonl").read_bytes() == damaged
    assert [row["step"] for row in metrics(copied)] == [3, *range(9, 34, 3)]


@pytest.mark.parametrize(
    "how", ["emptied", "missing", "cut in the middle", "a number changed", "another run's"]
)
def test_lost_metrics_are_said(corpus, copied, tmp_path, how):
    path = copied / "metrics.jsonl"
    text = path.read_text()
    if how == "missing":
        path.unlink()
    elif how == "another run's":
        path.write_text(re.sub(r'"elapsed_s": [\d.]+', '"elapsed_s": 1.5', text))
    else:
        number = re.sub(r'("eval_loss": \d)\.', r"\g<1>9.", text, count=1)
        path.write_text({"emptied": "", "cut in the middle": text[: len(text) // 2]}.get(how, number))
    said = go_on(copied, corpus, tmp_path)
    assert f"warning: {path} is not what the run had written until step 30" in said
    assert (copied / "metrics.damaged-1.jsonl").exists() == (how != "missing")


def test_a_last_line_that_was_cut_short_is_no_damage(corpus, copied, tmp_path):
    with (copied / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "tok')
    assert "warning" not in go_on(copied, corpus, tmp_path)
    assert [row["step"] for row in metrics(copied)] == list(range(3, 34, 3))


# --- damage at the top, and run.yaml ---


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"]
)
def test_damage_at_the_top_is_refused_and_mended_by_going_on(corpus, whole, copied, tmp_path, name):
    best = json.loads((whole / "progress.json").read_text())
    flip_a_bit(copied / name) if name == "model.safetensors" else os.truncate(
        copied / name, (copied / name).stat().st_size // 2
    )
    said = sampled(copied, status=2)
    assert f"{copied} is damaged ({name}" in said and "--resume_from_checkpoint last" in said
    words = ("--model", copied, "--output_dir", tmp_path / "plain")
    assert "is damaged" in called("share.py", *words, status=2)
    assert not (tmp_path / "plain").exists()
    assert "is damaged" in called("compare.py", "--model", copied, "--corpus", corpus, status=2)
    words = training_words(copied, corpus, "--save_total_limit", "9", *GO_ON)
    said = finished(words, log=tmp_path / "going_on.log", **PRETRAIN)
    assert "warning: the best model in " in said
    assert files.damage(copied) is None and digests(copied) == digests(whole)
    assert json.loads((copied / "progress.json").read_text())["best_loss"] == best["best_loss"]
    sampled(copied)


def test_a_damaged_best_model_that_is_in_no_checkpoint(corpus, copied, tmp_path):
    """The best one is lost then, and that of the newest checkpoint takes its place."""
    progress = json.loads((copied / "progress.json").read_text())
    shutil.rmtree(copied / "checkpoints" / f"step-{progress['best_step']}", ignore_errors=True)
    flip_a_bit(copied / "model.safetensors")
    words = training_words(copied, corpus, "--save_total_limit", "9", *GO_ON)
    assert "warning: the best model in " in finished(words, log=tmp_path / "log", **PRETRAIN)
    assert state_of_the_top(copied)[0] == 30


def test_what_a_kill_before_the_last_pruning_has_left_goes_when_the_run_is_taken_up(corpus, copied, tmp_path):
    words = training_words(copied, corpus, "--save_total_limit", "2", *GO_ON)
    finished(words, log=tmp_path / "log", **PRETRAIN)
    assert sorted(path.name for path in (copied / "checkpoints").iterdir()) == ["step-25", "step-30"]


def test_a_zeroed_run_yaml(corpus, whole, copied, tmp_path):
    path = copied / "run.yaml"
    path.write_bytes(bytes(path.stat().st_size))
    words = ("--model", copied, "--output_dir", tmp_path / "plain")
    assert "run.yaml is not valid YAML" in called("share.py", *words, status=2)
    assert not (tmp_path / "plain").exists()
    finished(["--output_dir", copied, *GO_ON], log=tmp_path / "log2", **PRETRAIN)
    assert yaml.safe_load(path.read_text())["n_layer"] == 1 and digests(copied) == digests(whole)


def test_a_folder_without_a_model_names_its_checkpoint(copied, tmp_path):
    for name in ("model.safetensors", "config.json", MANIFEST):
        (copied / name).unlink()
    assert f"give its checkpoint {copied / 'checkpoints' / 'step-30'}" in sampled(copied, status=2)


def test_a_file_that_was_changed_on_purpose_is_taken_without_the_manifest(copied, tmp_path):
    path = copied / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.5}))
    assert f"delete its {MANIFEST}" in sampled(copied, status=2)
    (copied / MANIFEST).unlink()
    sampled(copied)


# --- weights ---


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: change(name, tensor) for name, tensor in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    (folder / MANIFEST).unlink(missing_ok=True)


def test_weights_that_are_not_numbers_are_refused(corpus, copied, tmp_path):
    change_weights(copied, lambda name, tensor: tensor * float("nan") if "c_fc" in name else tensor)
    assert "holds weights that are not finite numbers (transformer.h.0.mlp.c_fc" in sampled(copied, status=2)
    for recipe, words in [
        ("share.py", ["--model", copied, "--output_dir", tmp_path / "plain"]),
        ("compare.py", ["--model", copied, "--corpus", corpus]),
        ("pretrain_char.py", training_words(tmp_path / "on", corpus, "--model_name_or_path", copied)),
        (
            "finetune_lora.py",
            ["--corpus", corpus, "--output_dir", tmp_path / "on", "--model_name_or_path", copied],
        ),
    ]:
        assert "not finite numbers" in called(recipe, *words, status=2)
    assert not (tmp_path / "plain").exists() and not (tmp_path / "on").exists()


def test_a_base_in_bfloat16_is_trained_in_float32(corpus, copied, tmp_path):
    change_weights(copied, lambda name, tensor: tensor.bfloat16())
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    words = training_words(tmp_path / "on", corpus, "--model_name_or_path", copied, "--learning_rate", "1e-5")
    finished([*words, "--muon_learning_rate", "1e-5"])
    before, after = (load_file(folder / "model.safetensors") for folder in (copied, tmp_path / "on"))
    assert yaml.safe_load((tmp_path / "on" / "run.yaml").read_text())["tokenizer"] == str(copied)
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    moved = sum((after[name] != tensor.float()).sum().item() for name, tensor in before.items())
    assert moved > 0.5 * sum(tensor.numel() for tensor in before.values())


def test_the_modes_of_files_are_those_of_the_user(whole):
    for path in whole.rglob("*.safetensors"):
        assert path.stat().st_mode & 0o777 == (whole / "run.yaml").stat().st_mode & 0o777


def test_a_kill_in_the_middle_and_the_same_end(corpus, whole, tmp_path):
    folder = tmp_path / "run"
    words = training_words(folder, corpus, "--save_total_limit", "9")
    run = Run(words, **PRETRAIN)
    run.wait_for(folder / "checkpoints" / "step-15")
    run.signal(signal.SIGKILL)
    run.wait()
    delete_left_overs(folder)  # as the next writer does
    state_of_the_top(folder)
    finished([*words, *GO_ON], log=tmp_path / "log", **PRETRAIN)
    assert digests(folder) == digests(whole) and without_times(metrics(folder)) == without_times(
        metrics(whole)
    )
    assert state_of_the_top(folder) == state_of_the_top(whole)
    assert (folder / "samples.txt").read_bytes() == (whole / "samples.txt").read_bytes()
