"""A run that is watched: the bar at validation, the picture while it runs, where its trackers can be seen."""

import io
import re
import time
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from matplotlib.figure import Figure
from processes import TINY, metrics, write_corpus
from transformers import AutoModelForCausalLM

from nanogpt_hf.common.cli import parse
from nanogpt_hf.common.settings import TrainingSettings
from nanogpt_hf.runs import pretraining
from nanogpt_hf.runs.showing import first_lines
from nanogpt_hf.training import best_model, evaluation
from nanogpt_hf.training.gpus import flops_per_token
from nanogpt_hf.training.progress_bar import ProgressBar
from nanogpt_hf.training.reporting import describe_trackers, draw_loss_curve


class Terminal(io.StringIO):
    def isatty(self):
        return True


def a_terminal(monkeypatch):
    """What is drawn from here on; pytest sets its own stderr when a test begins."""
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    return screen


@pytest.mark.parametrize(
    "steps, done, every, validating, expected",
    [
        (100, 0, 10, False, 100 * 2 + 10 * 30),
        (100, 10, 10, False, 90 * 2 + 9 * 30),
        (100, 10, 10, True, 90 * 2 + 10 * 30),
        (100, 99, 10, False, 2 + 30),
        (105, 100, 10, False, 5 * 2 + 30),
        (105, 105, 10, True, 30),
        (100, 100, 10, False, 0),
    ],
)
def test_time_left_counts_the_evaluations_to_come(steps, done, every, validating, expected, monkeypatch):
    terminal = a_terminal(monkeypatch)
    bar = ProgressBar(steps, done, every, shown=True)
    assert bar.seconds_left() is None
    bar.step_s, bar.evaluation_s, bar.validating = 2.0, 30.0, validating
    assert bar.seconds_left() == expected
    bar.refresh()
    bar.close()
    assert f"<{ProgressBar.format_interval(expected)}" in terminal.getvalue()


def test_the_bar_says_that_it_validates(monkeypatch):
    terminal = a_terminal(monkeypatch)
    bar = ProgressBar(10, 0, 5, shown=True)
    bar.tell("loss 1.234")
    with bar.while_validating():
        assert "loss 1.234, validating" in terminal.getvalue().split("\r")[-1]
        time.sleep(0.01)
    assert bar.evaluation_s >= 0.01
    bar.refresh()
    assert "validating" not in terminal.getvalue().split("\r")[-1]
    bar.close()


def run(folder, tmp_path, *words):
    """A tiny run through all of it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    words = ["--corpus", str(write_corpus(tmp_path)), "--output_dir", str(folder), *TINY, *words]
    return pretraining.pretrain(parse(TrainingSettings, None, words))


def test_the_curve_goes_on_at_every_evaluation_and_is_always_whole(tmp_path, monkeypatch, capsys):
    """Looked at whenever the run evaluates: what the last evaluation has left is there, and whole."""
    folder, seen, evaluate = tmp_path / "run", [], evaluation.evaluate_split

    def look(*arguments, **options):
        curve, samples = folder / "loss_curve.png", folder / "samples.txt"
        if curve.exists():
            content = curve.read_bytes()
            assert content.startswith(b"\x89PNG") and content.endswith(b"IEND\xaeB`\x82")
            seen.append((content, samples.read_text(encoding="utf-8")))
        return evaluate(*arguments, **options)

    monkeypatch.setattr("nanogpt_hf.training.objectives.evaluate_split", look)
    run(
        folder,
        tmp_path,
        "--learning_rate",
        "0",
        "--muon_learning_rate",
        "0",
        "--sample_on_eval",
        "true",
        "--save_steps",
        "30",
    )
    evaluations = [row for row in metrics(folder) if "eval_loss" in row]
    assert len({row["eval_loss"] for row in evaluations}) == 1  # the first is the best: all others only go on
    assert len(seen) == len(evaluations) - 1 >= 4
    assert len({content for content, _ in seen}) == len(seen)
    first = next(line for line in seen[0][1].splitlines() if line.strip())
    assert f"  {first[:100]}\n" in capsys.readouterr().out
    assert [text.count("\n---\n") for _, text in seen] == [0] * len(seen)  # one text, and three in the end
    assert (folder / "samples.txt").read_text(encoding="utf-8").count("\n---\n") == 2


def test_who_watches_sees_the_beginning_of_one_sample():
    assert first_lines("\nTo be\n\n---\n\nor not\n") == ["  To be"]


def test_a_curve_has_any_name_for_its_title_and_its_best_in_the_legend(tmp_path, recwarn, monkeypatch):
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **o: drawn.append(self) or save(self, *a, **o))
    rows = [{"step": 1, "train_loss": 2.0, "eval_loss": 1.0}]
    for number, name in enumerate(("红楼梦, char", "a\x1b[31m$b_{, char", "$5_$6")):
        draw_loss_curve(tmp_path / f"{number}.png", rows, name)
        assert (tmp_path / f"{number}.png").stat().st_size > 0
    draw_loss_curve(tmp_path / "none.png", [], "stopped before its first losses")
    assert not [warning for warning in recwarn if re.search("Glyph|legend", str(warning.message))]
    assert drawn[1].axes[0].get_title() == "a\\x1b[31m$b_{, char"
    labels = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert labels == ["training, one batch", "validation, whole split", "best 1.0000 at step 1"]


def test_what_a_run_of_a_gpu_and_a_tracker_says_of_itself(tmp_path, monkeypatch, capsys):
    """A CPU taken for a GPU of a billion FLOPs: in bfloat16, whose rate that is."""
    pytest.importorskip("tensorboard")
    monkeypatch.setattr("nanogpt_hf.training.reporting.peak_of", lambda device: 1e9)
    folder = tmp_path / "run"
    run(
        folder,
        tmp_path,
        "--bf16",
        "true",
        "--report_to",
        "tensorboard",
        "--rdrop_alpha",
        "1",
        "--dropout",
        "0.1",
        "--short_positions",
        "4",
        "--short_steps",
        "0.5",
    )
    rows = [row for row in metrics(folder) if "tokens_per_s" in row]
    model = AutoModelForCausalLM.from_pretrained(folder)
    half = rows[-1]["step"] / 2
    assert rows[0]["step"] <= half
    for row in rows:
        flops = flops_per_token(model, 4 if row["step"] <= half else 16, passes=2)
        assert row["mfu"] == pytest.approx(row["tokens_per_s"] * flops / 1e9)
    (shown,) = re.findall(r"^tensorboard tensorboard --logdir (.*)$", capsys.readouterr().out, re.M)
    assert shown == str(folder / "trackers") and [*Path(shown).rglob("events.out.*")]
    settings = parse(
        TrainingSettings, None, ["--output_dir", "x", "--report_to", "wandb", "trackio", "mlflow"]
    )
    words = describe_trackers(settings)
    assert (
        len(words) == 2
        and "WANDB_MODE=offline" in words[0]
        and "trackio show --project nanogpt_hf" in words[1]
    )


def test_a_run_in_float32_has_no_mfu_and_samples_at_its_end_where_that_is_asked_for(tmp_path, monkeypatch):
    folder, seen, replace = tmp_path / "run", [], best_model.replace_best

    def look(*arguments):
        replace(*arguments)
        seen.append((folder / "samples.txt").exists())

    monkeypatch.setattr("nanogpt_hf.training.loop.replace_best", look)
    monkeypatch.setattr("nanogpt_hf.training.reporting.peak_of", lambda device: 1e9)
    run(folder, tmp_path, "--sample_on_eval", "false", "--bf16", "false", "--eval_steps", "15")
    assert seen and not any(seen)
    assert (folder / "samples.txt").exists()
    assert not any("mfu" in row for row in metrics(folder))
