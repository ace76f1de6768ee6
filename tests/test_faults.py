"""Whatever stops a run, at most the work since its last checkpoint is repeated, and the end is the same to the bit.

Kills come at random moments and at chosen ones: at the n-th opening, renaming or deleting of a file. In the short
form there are 3 of each; NANOGPT_HF_KILLS=50 gives the long form.
"""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from processes import (
    ROOT,
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
from safetensors.torch import load_file

from nanogpt_hf.training import heartbeat
from nanogpt_hf.training.checkpoints import damage, list_checkpoints, newest_good, read_progress, step_of
from nanogpt_hf.training.hardware import settle

resource = pytest.importorskip("resource", reason="kills and limits are injected the POSIX way")
pytestmark = pytest.mark.faults
KILLS = int(os.environ.get("NANOGPT_HF_KILLS", 3))
LONG = KILLS > 5
GO_ON = ("--resume_from_checkpoint", "last")
WRITING_MUCH = ("--save_steps", "2", "--eval_steps", "2", "--logging_steps", "1")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    """The run that the disturbed ones have to equal; it and they write at every second step."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    finished(training_words(folder, corpus, *WRITING_MUCH))
    return folder


def go_on_or_begin(folder: Path) -> tuple:
    """What a person adds to the command after a kill."""
    if newest_good(folder / "checkpoints")[0]:
        return GO_ON
    return ("--overwrite_output_dir",) if folder.exists() else ()


def must_equal(folder: Path, other: Path) -> None:
    assert digests(folder) == digests(other)
    assert without_times(metrics(folder)) == without_times(metrics(other))
    left = [path.name for path in folder.rglob("*") if path.name.startswith(".")]
    assert not left, f"left behind: {left}"


# --- kill -9 ---


def test_kills_at_random_moments(corpus, undisturbed, tmp_path):
    rng, folder = random.Random(1), tmp_path / "run"
    begun = time.monotonic()
    finished(training_words(folder, corpus, *WRITING_MUCH))
    duration = time.monotonic() - begun
    shutil.rmtree(folder)
    kills = runs = 0
    while kills < KILLS or folder.exists():
        run = Run(training_words(folder, corpus, *WRITING_MUCH, *go_on_or_begin(folder)))
        if kills < KILLS:
            run.process.join(rng.uniform(0.2, 1) * duration)
        if kills < KILLS and run.process.is_alive():
            run.signal(signal.SIGKILL)
        if run.wait() == 128 + signal.SIGKILL:
            kills += 1
            continue
        assert run.wait() == 0, run.said()
        must_equal(folder, undisturbed)
        shutil.rmtree(folder)
        runs += 1
    print(f"{kills} kills at random moments in {runs} runs, which all ended as the undisturbed one")


def count_files_touched(folder: str, counts: str | None, kill_at: int | None) -> None:
    """From now on in this process, count the calls that open, rename or delete a file of the run."""
    number = 0

    def hook(event, args):
        nonlocal number
        if event.startswith(("open", "os.", "shutil.")) and args and folder in str(args[0]):
            number += 1
            if counts is not None:
                Path(counts).write_text(str(number)) if number % 10 == 0 else None
            if number == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def test_kills_at_the_writing_of_every_file(corpus, undisturbed, tmp_path):
    """The n-th file operation of a run, spread over the whole of it, is the last thing that it does."""
    folder, counts = tmp_path / "run", tmp_path / "counts"
    words = training_words(folder, corpus, *WRITING_MUCH)
    finished(words, prepare=(count_files_touched, str(folder), str(counts), None))
    shutil.rmtree(folder)
    operations = int(counts.read_text())
    assert operations > 500
    for number in sorted(random.Random(2).sample(range(1, operations), KILLS)):
        run = Run(words, prepare=(count_files_touched, str(folder), None, number))
        assert run.wait() == 128 + signal.SIGKILL, run.said()
        finished([*words, *go_on_or_begin(folder)])
        must_equal(folder, undisturbed)
        shutil.rmtree(folder)
    print(f"{KILLS} kills at {operations} file operations, all ended as the undisturbed run")


def test_a_kill_while_the_last_checkpoint_takes_the_place_of_an_older_one_leaves_nothing(
    corpus, undisturbed, tmp_path
):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    oldest = min((folder / "checkpoints").iterdir(), key=step_of)
    shutil.copytree(oldest, folder / "checkpoints" / f".unfinished-{oldest.name}")
    finished(training_words(folder, corpus, *WRITING_MUCH, *GO_ON))
    must_equal(folder, undisturbed)


# --- disks ---


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own, mounted; `small_disk(options)` mounts it again with others."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*words):
        done = subprocess.run(["mount", *words, str(folder)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting a disk is not permitted here: {done.stderr.strip()}")
        return folder

    mount("-t", "tmpfs", "-o", "size=100M", "tmpfs")
    yield lambda options: mount("-o", f"remount,{options}")
    subprocess.run(["umount", "-l", str(folder)], check=True)


def one_sentence(run: Run, status: int) -> str:
    """The error with which a run must end."""
    assert run.wait() == status, (run.wait(), run.said())
    errors = [line for line in run.said().splitlines() if not line.startswith("step ")]
    assert len(errors) == 1 and errors[0].startswith("error: "), run.said()
    return errors[0]


@pytest.mark.parametrize("kib", range(16, 736, 8) if LONG else (200, 330, 460))
def test_full_disk(corpus, undisturbed, small_disk, tmp_path, kib):
    """Full at one moment or another of writing: the last good checkpoint stays, and with more room all is well."""
    folder = small_disk(f"size={kib}k") / "run"
    words = training_words(folder, corpus, *WRITING_MUCH, "--save_total_limit", "3")
    run = Run(words, log=tmp_path / "log")
    if run.wait() != 2:  # so small that not even run.yaml found room
        said = one_sentence(run, 1)
        assert "No space left on device" in said and "what was saved before this is whole" in said
        complete = list_checkpoints(folder / "checkpoints")
        assert [damage(path) for path in complete] == [None] * len(complete)
        assert all(math.isfinite(row["train_loss"]) for row in metrics_that_are_whole(folder))
    small_disk("size=100M")
    finished([*words, *go_on_or_begin(folder)], log=tmp_path / "log2")
    shutil.rmtree(folder / "checkpoints" / "step-26")  # kept by the larger --save_total_limit
    must_equal(folder, undisturbed)


def metrics_that_are_whole(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def test_read_only_folder(corpus, small_disk, tmp_path):
    folder = small_disk("ro") / "run"
    run = Run(training_words(folder, corpus), log=tmp_path / "log")
    assert "Read-only file system" in one_sentence(run, 2)
    small_disk("rw")
    folder.mkdir()
    finished(training_words(folder, corpus, "--max_steps", "5"), log=tmp_path / "log2")
    small_disk("ro")
    run = Run(training_words(folder, corpus, *GO_ON), log=tmp_path / "log3")
    assert "Read-only file system" in one_sentence(run, 2)
    assert damage(folder / "checkpoints" / "step-5") is None


def test_folder_that_becomes_read_only(corpus, small_disk, tmp_path):
    folder = small_disk("rw") / "run"
    run = Run(training_words(folder, corpus, "--max_steps", "100000"), log=tmp_path / "log")
    run.wait_for(folder / "checkpoints" / "step-10")
    for _ in range(1000):  # refused for as long as a file is open for writing
        if (
            subprocess.run(["mount", "-o", "remount,ro", str(folder.parent)], capture_output=True).returncode
            == 0
        ):
            break
    assert "Read-only file system" in one_sentence(run, 1)
    assert newest_good(folder / "checkpoints")[0] is not None


# --- damaged checkpoints ---


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a bit flipped": flip_a_bit,
    "lengthened": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_checkpoints_are_named_and_passed_over(undisturbed, tmp_path, how):
    checkpoints = tmp_path / "checkpoints"
    for name in [path.name for path in (undisturbed / "checkpoints" / "step-30").iterdir()]:
        shutil.copytree(undisturbed / "checkpoints", checkpoints)
        DAMAGES[how](checkpoints / "step-30" / name)
        good, (complaint,) = newest_good(checkpoints)
        assert good == checkpoints / "step-28"
        assert "step-30 is damaged" in complaint and "passed over" in complaint
        # A bit of the manifest may be one of another file's SHA-256.
        assert name in complaint or (name, how) == ("manifest.json", "a bit flipped")
        shutil.rmtree(checkpoints)


def test_going_on_from_before_the_damage(corpus, undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    flip_a_bit(folder / "checkpoints" / "step-30" / "optimizer.safetensors")
    words = training_words(folder, corpus, *WRITING_MUCH)
    asked_for_it = Run([*words, "--resume_from_checkpoint", folder / "checkpoints" / "step-30"])
    assert "step-30 is damaged (optimizer.safetensors does not have the SHA-256" in one_sentence(
        asked_for_it, 2
    )
    assert "warning: " in finished([*words, *GO_ON], log=tmp_path / "log")
    must_equal(folder, undisturbed)


# --- stops ---


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_with_a_checkpoint(corpus, undisturbed, tmp_path, number, status):
    folder = tmp_path / "run"
    run = Run(training_words(folder, corpus, *WRITING_MUCH))
    run.wait_for(folder / "checkpoints" / "step-4")
    run.signal(number)
    assert run.wait() == status
    newest = newest_good(folder / "checkpoints")[0]
    assert run.said().splitlines()[-2:] == [
        f"stopped at step {step_of(newest)} with a checkpoint",
        "go on with      the same command and --resume_from_checkpoint last",
    ]
    assert step_of(newest) < 30 and "Traceback" not in run.said()
    assert ("stopping, with a checkpoint; Ctrl-C once more" in run.said()) == (number == signal.SIGINT)
    finished(training_words(folder, corpus, *WRITING_MUCH, *GO_ON))
    assert without_times(metrics(folder)) == without_times(metrics(undisturbed))
    assert digests(folder) == digests(undisturbed)


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_it_at_once(corpus, tmp_path, number, status):
    folder = tmp_path / "run"
    long_steps = "--per_device_train_batch_size 1 --gradient_accumulation_steps 1000 --max_steps 100".split()
    run = Run(training_words(folder, corpus, *long_steps, "--logging_steps", "1", "--eval_on_start"))
    run.wait_for(folder / "model.safetensors")
    time.sleep(0.2)
    run.signal(signal.SIGINT)
    while "stopping, with a checkpoint" not in run.said():
        assert run.process.is_alive()
    run.signal(number)
    assert run.wait() == status
    said = "\nended at once; what was saved before is whole\n"
    assert run.said().endswith(said) == (number == signal.SIGINT)
    assert "stopped" not in run.said() and not list_checkpoints(folder / "checkpoints")


def test_ctrl_c_before_the_first_step(corpus, tmp_path):
    run = Run(training_words(tmp_path / "run", corpus), prepare=(interrupt_soon,))
    assert one_sentence(run, 130) == "error: interrupted."


def interrupt_soon() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    signal.signal(signal.SIGALRM, lambda number, frame: os.kill(os.getpid(), signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, 0.02)


def test_sigusr1_asks_for_a_checkpoint(corpus, tmp_path):
    folder = tmp_path / "run"
    run = Run(
        training_words(folder, corpus, "--max_steps", "2000", "--save_steps", "100000", "--eval_on_start")
    )
    run.wait_for(folder / "model.safetensors")
    run.signal(signal.SIGUSR1)
    while not list_checkpoints(folder / "checkpoints"):
        assert run.process.is_alive()
    (asked_for,) = list_checkpoints(folder / "checkpoints")
    assert step_of(asked_for) < 1900 and damage(asked_for) is None
    run.signal(signal.SIGTERM)
    assert run.wait() == 143
    assert f"checkpoint at step {step_of(asked_for)}, as asked" in run.said()
    assert step_of(newest_good(folder / "checkpoints")[0]) > step_of(asked_for)


def test_max_minutes(corpus, undisturbed, tmp_path):
    folder = tmp_path / "run"
    said = finished(training_words(folder, corpus, *WRITING_MUCH, "--max_minutes", "0.002"))
    newest = newest_good(folder / "checkpoints")[0]
    assert f"--max_minutes 0.002 passed at step {step_of(newest)} of 30" in said
    assert "--resume_from_checkpoint last --max_minutes 0.004" in said
    assert metrics(folder)[-1]["step"] == step_of(newest) < 30 and "eval_loss" in metrics(folder)[-1]
    finished(training_words(folder, corpus, *WRITING_MUCH, *GO_ON))
    assert digests(folder) == digests(undisturbed)


# --- memory ---


def fail_above(sequences: int):
    """A model's memory ends where a batch has more sequences of the whole context than that."""

    held = []

    def hook(module, args, kwargs):
        assert not any(memory() is not None for memory in held), "what a failed try took was not given back"
        B, T = kwargs["input_ids"].shape
        if module.training and B > sequences and T == module.config.n_positions:
            memory = torch.zeros(1)
            held.append(weakref.ref(memory))
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"
            )

    return lambda model: model.register_forward_pre_hook(hook, with_kwargs=True)


EXACT = "--dropout 0 --bf16 false --per_device_train_batch_size 12 --logging_steps 1 --max_steps 12".split()


@pytest.mark.parametrize("short", [[], ["--short_positions", "4"]])
def test_out_of_memory_names_the_setting(corpus, tmp_path, short):
    """Before the first step, also where the first windows are shorter and would fit."""
    with pytest.raises(ValueError, match="12 sequences at once: lower --per_device_train_batch_size"):
        train_here(training_words(tmp_path / "run", corpus, *EXACT, *short), change_model=fail_above(4))
    rows = tmp_path / "run" / "metrics.jsonl"
    assert not rows.exists() or not rows.read_text()


@pytest.mark.parametrize("compiled", [[], ["--torch_compile", "--torch_compile_backend", "eager"]])
@pytest.mark.parametrize("short", [[], ["--short_positions", "4"]])
def test_auto_find_batch_size_keeps_the_mathematics(corpus, tmp_path, compiled, short):
    same = (*EXACT, "--auto_find_batch_size", *short)
    words = [training_words(tmp_path / name, corpus, *same) for name in "ab"]
    words[1] += compiled
    train_here(words[0])
    train_here(words[1], change_model=fail_above(4))
    for name in ("train_loss", "grad_norm", "eval_loss"):
        values = [[row[name] for row in metrics(tmp_path / folder) if name in row] for folder in "ab"]
        assert values[0] == pytest.approx(values[1], abs=1e-5)
    weights = [load_file(tmp_path / folder / "model.safetensors") for folder in "ab"]
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("words", [["--short_steps", "12"], ["--max_steps", "5"]])
def test_windows_that_a_run_never_reads_need_no_memory(corpus, tmp_path, words):
    words = training_words(
        tmp_path / "run", corpus, *EXACT, "--short_positions", "4", "--short_steps", "9", *words
    )
    assert train_here(words, change_model=fail_above(4)).step == int(words[-1])


def test_memory_is_tried_in_the_mode_that_training_has(corpus, tmp_path):
    """Of a base, which comes in the other one, where checkpointing does nothing."""
    modes = []

    def change(model):
        model.eval().register_forward_pre_hook(lambda module, args: modes.append(module.training))

    words = training_words(tmp_path / "run", corpus, *EXACT, "--short_positions", "4", "--max_steps", "2")
    train_here(words, change_model=change)
    assert modes[0]


def limit_memory(spare: int) -> None:
    """This process gets so many bytes more and then none."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, used + spare))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="there is no /proc to measure memory in")
@pytest.mark.parametrize("where", ["train", "eval"])
def test_memory_that_really_ends(corpus, tmp_path, where):
    huge = training_words(
        tmp_path / "run", corpus, f"--per_device_{where}_batch_size", "200000", "--eval_on_start"
    )
    if where == "eval":
        huge += [
            "--corpus",
            str(write_corpus(tmp_path, "To be, or not to be, that is the question. " * 100_000)),
        ]
    said = one_sentence(Run(huge, prepare=(limit_memory, 300_000_000)), 2 if where == "train" else 1)
    assert "out of memory" in said and f"--per_device_{where}_batch_size" in said


# --- what else goes wrong around a run ---


def test_a_corpus_that_changes_under_the_run(undisturbed, tmp_path):
    folder, corpus = tmp_path / "run", write_corpus(tmp_path)
    run = Run(training_words(folder, corpus, *WRITING_MUCH))
    run.wait_for(folder / "checkpoints" / "step-4")
    corpus.write_text("Changed while it was being learned. " * 200)
    assert run.wait() == 0
    must_equal(folder, undisturbed)
    going_on = Run(training_words(folder, corpus, *GO_ON), log=tmp_path / "log")
    assert "belongs to another run: corpus was " in one_sentence(going_on, 2)


class Failing(GeneralTracker):
    """A tracker that takes a few lines and then fails."""

    name, requires_logging_directory, tracker = "failing", False, None

    def __init__(self, lines: int):
        super().__init__()
        self.left = lines

    def log(self, values, step, **kwargs):
        self.left -= 1
        if self.left < 0:
            raise ConnectionError("the tracker's server does not answer")

    def finish(self):
        raise ConnectionError("the tracker's server does not answer")


def test_a_failing_tracker_does_not_end_the_run(corpus, undisturbed, tmp_path, capfd):
    folder = tmp_path / "run"
    tracker = Failing(lines=3)
    words = training_words(folder, corpus, *WRITING_MUCH, "--report_to", "tensorboard")
    accelerators = []

    def make_accelerator(settings):
        accelerators.append(Accelerator(cpu=True, log_with=[tracker]))
        return accelerators[0]

    train_here(words, make_accelerator=make_accelerator)
    accelerators[0].end_training()  # as recipes do at their end
    assert tracker.left == -1
    assert capfd.readouterr().out.count("warning: a tracker failed and is given up (ConnectionError") == 1
    assert [row["step"] for row in metrics(folder)] == list(range(1, 31))


def test_a_tracker_that_cannot_begin(corpus, tmp_path):
    folder = tmp_path / "run"
    words = training_words(folder, corpus, "--report_to", "tensorboard")
    finished([*words, "--max_steps", "5"])
    shutil.rmtree(folder / "trackers")
    (folder / "trackers").write_text("in its way")
    assert "warning: a tracker failed" in finished([*words, *GO_ON])
    assert metrics(folder)[-1]["step"] == 30


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_of_two_processes_dies_the_other_says_so_and_ends(corpus, tmp_path, victim):
    folder = tmp_path / "run"
    words = training_words(folder, corpus, "--max_steps", "100000", "--eval_steps", "10000")
    runs = ring([words] * 2, tmp_path)
    runs[0].wait_for(folder / "checkpoints" / "step-10")
    runs[victim].signal(signal.SIGKILL)
    assert "another process of this run has ended" in one_sentence(runs[1 - victim], 1)
    assert newest_good(folder / "checkpoints")[0] is not None


def less_patience() -> None:
    heartbeat.BEAT_SECONDS, heartbeat.PATIENCE = 0.1, 15


@pytest.mark.parametrize("victim", [0, 1])  # the first one holds the store
def test_when_one_of_two_processes_hangs_the_other_says_so_and_ends(corpus, tmp_path, victim):
    folder = tmp_path / "run"
    words = training_words(folder, corpus, "--max_steps", "100000", "--eval_steps", "10000")
    runs = ring([words] * 2, tmp_path, prepare=(less_patience,))
    runs[0].wait_for(folder / "checkpoints" / "step-10")
    runs[victim].signal(signal.SIGSTOP)
    assert "another process of this run has been silent for 1.5 seconds" in one_sentence(runs[1 - victim], 1)
    runs[victim].signal(signal.SIGKILL)
    assert newest_good(folder / "checkpoints")[0] is not None


def work_alone() -> None:
    """The first process works for twice as long as the second one's patience, which waits for it."""
    less_patience()
    accelerator = Accelerator(cpu=True)
    with heartbeat.Heartbeat(accelerator):
        time.sleep(3 * accelerator.is_main_process)
    settle(accelerator)
    sys.exit(0)


def test_a_process_at_work_is_not_silent(tmp_path):
    runs = ring([[], []], tmp_path, prepare=(work_alone,))
    assert [run.wait() for run in runs] == [0, 0], [run.said() for run in runs]


def test_both_of_two_processes_stop_at_the_same_step(corpus, tmp_path):
    folder = tmp_path / "run"
    words = training_words(folder, corpus, "--max_steps", "100000", "--eval_steps", "10000")
    runs = ring([words] * 2, tmp_path, prepare=(less_patience,))
    runs[0].wait_for(folder / "checkpoints" / "step-10")
    for run in runs:  # Ctrl-Z first, for longer than anyone's patience
        run.signal(signal.SIGSTOP)
    time.sleep(2)
    for run in runs:
        run.signal(signal.SIGCONT)
    runs[1].signal(signal.SIGTERM)
    assert [run.wait() for run in runs] == [143, 143], [run.said() for run in runs]
    assert "stopped at step" in runs[0].said() and runs[1].said() == ""


def test_a_run_whose_launcher_is_killed_stops(corpus, undisturbed, tmp_path):
    folder = tmp_path / "run"
    words = training_words(folder, corpus, *WRITING_MUCH, "--max_steps", "100000")
    launcher = Run(
        words, log=tmp_path / "launcher.log", prepare=(launch_itself,), ACCELERATE_MIXED_PRECISION="no"
    )
    launcher.wait_for(folder / "checkpoints" / "step-4")
    launcher.signal(signal.SIGTERM)
    assert launcher.wait() == 143
    end = time.monotonic() + 60
    while "stopped at step" not in launcher.said():
        assert time.monotonic() < end, launcher.said()
        time.sleep(0.01)
    newest = newest_good(folder / "checkpoints")[0]
    assert f"stopped at step {step_of(newest)} with a checkpoint" in launcher.said()


def launch_itself() -> None:
    """What accelerate launch does: the parent waits, the child trains."""
    if child := os.fork():
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


@pytest.mark.skipif(not LONG, reason="the launcher's processes take long to start: NANOGPT_HF_KILLS=50")
def test_when_one_of_two_launched_processes_dies_all_end(corpus, tmp_path):
    folder = tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = [*launcher, "recipes/pretrain_char.py", *training_words(folder, corpus, "--max_steps", "1000000")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    while not (folder / "checkpoints" / "step-10").exists():
        assert process.poll() is None
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    begun = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "SIGKILL" in said or "Signal 9" in said
    print(f"the launcher ended {time.monotonic() - begun:.1f} s after the kill")
    assert newest_good(folder / "checkpoints")[0] is not None


def turn_the_clock_back() -> None:
    now = [time.time()]

    def backwards() -> float:
        now[0] -= 3600
        return now[0]

    time.time = backwards


def test_a_clock_that_goes_backwards(corpus, undisturbed, tmp_path):
    folder = tmp_path / "run"
    finished(
        training_words(folder, corpus, *WRITING_MUCH, "--max_minutes", "5"), prepare=(turn_the_clock_back,)
    )
    must_equal(folder, undisturbed)
    elapsed = [row["elapsed_s"] for row in metrics(folder)]
    assert elapsed == sorted(elapsed) and 0 < elapsed[0] and elapsed[-1] < 60
    assert all(row["tokens_per_s"] > 0 for row in metrics(folder))


def poison_gradients(at_step: int):
    """The gradient of one weight becomes NaN at a step, counted from 1."""
    steps = 0

    def hook(gradient):
        nonlocal steps
        steps += 1
        return gradient * math.nan if steps == at_step else gradient

    return lambda model: model.transformer.h[0].mlp.c_fc.weight.register_hook(hook)


def test_gradients_that_are_not_finite(corpus, tmp_path):
    folder, whole = tmp_path / "run", tmp_path / "whole"
    rhythm = ("--logging_steps", "4", "--save_steps", "3", "--eval_steps", "6", "--save_total_limit", "9")
    train_here(training_words(whole, corpus, *rhythm))
    with pytest.raises(ValueError, match="gradient was not finite at step 7: try half the learning rate"):
        train_here(training_words(folder, corpus, *rhythm), change_model=poison_gradients(at_step=7))
    assert [step_of(path) for path in list_checkpoints(folder / "checkpoints")] == [3, 6]
    for path in folder.rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path
    assert read_progress(folder / "checkpoints" / "step-6").best_step == 6
    train_here(training_words(folder, corpus, *rhythm, *GO_ON))
    must_equal(folder, whole)


def test_weights_that_are_not_finite_are_never_the_best(corpus, tmp_path):
    folder = tmp_path / "run"

    def poison(model):
        with torch.no_grad():
            model.lm_head.weight[0] = math.nan

    with pytest.raises(ValueError, match="validation loss was not finite at step 0"):
        train_here(training_words(folder, corpus, "--eval_on_start"), change_model=poison)
    assert not list(folder.rglob("*.safetensors"))
