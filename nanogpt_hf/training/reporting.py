"""What a run says: the progress bar, metrics.jsonl, trackers, the loss curve and run.yaml."""

import errno
import hashlib
import json
import math
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TextIO

import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from ..common.errors import UserError
from ..common.files import files_written_whole, sync
from ..common.settings import RunSettings, public_values
from ..common.text import printable
from .checkpoints import Progress, list_checkpoints, step_of
from .gpus import peak_of
from .progress_bar import ProgressBar

LIBRARIES = "torch transformers tokenizers datasets accelerate peft safetensors huggingface_hub".split()

PROJECT = "nanogpt_hf"  # of all trackers


def say(accelerator: Accelerator, *lines: str) -> None:
    """Print from the first process, above the progress bar if there is one. Where nobody reads any more, go on."""
    if accelerator.is_main_process:
        try:
            for line in lines:
                tqdm.write(printable(line), file=sys.stdout)
            sys.stdout.flush()
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            nobody_reads(sys.stdout)


def nobody_reads(stream: TextIO) -> None:
    """What is written into the stream from now on goes nowhere."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def library_versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("nanogpt_hf", *LIBRARIES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError for a tracker that is not installed."""
    installed = [str(getattr(name, "value", name)) for name in get_available_trackers()]
    for name in names:
        if name not in installed:
            raise UserError(f"--report_to {name} is not installed: pip install {name}.")


def write_yaml(folder: Path, settings: dict, record: dict) -> None:
    """run.yaml: every setting, so that `--config run.yaml` repeats the run, and under `record` what it met."""
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    text += yaml.safe_dump({"record": record}, sort_keys=False, allow_unicode=True)
    with files_written_whole(folder) as staging:
        (staging / "run.yaml").write_text(text, encoding="utf-8")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl, without those that cannot be read."""
    return [row for line in _read_lines(path) if (row := _as_row(line)) is not None]


def evaluated_at(rows: Sequence[dict[str, float]], step: int) -> dict[str, float]:
    """The last line of a step with its evaluation; empty if there is none."""
    return next((row for row in reversed(rows) if row["step"] == step and "eval_loss" in row), {})


OF_TOKENS, OF_PAIRS, OF_REWARDS = "nats a token", "nats a pair", "below a reward of 1"


def loss_unit(row: Mapping[str, float]) -> str:
    """What a run's losses are in, told from a line of its metrics.jsonl: preferences and rewards do not count tokens."""
    if "eval_accuracy" in row:
        return OF_PAIRS
    return OF_REWARDS if any(name.startswith("eval_reward") for name in row) else OF_TOKENS


def _read_lines(path: Path) -> list[str]:
    """The lines of a metrics.jsonl, without a last one that was cut short by a crash."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return text.split("\n")[:-1]


def _as_row(line: str) -> dict[str, float] | None:
    with suppress(ValueError, RecursionError):
        row = json.loads(line)
        if isinstance(row, dict) and type(row.get("step")) is int:
            if all(type(value) in (int, float) for value in row.values()):
                return row
    return None


def take_up_metrics(path: Path, progress: Progress) -> tuple[str, str | None]:
    """Drop the lines of metrics.jsonl of later steps than a run goes on from, which will be written again.

    Returns:
        What is left, and what is wrong with it in one sentence, or None. The damaged file is kept under another name.
    """
    rows = [(line, _as_row(line)) for line in _read_lines(path)]
    kept = "".join(f"{line}\n" for line, row in rows if row is not None and row["step"] <= progress.step)
    unreadable = sum(row is None for _, row in rows)
    damaged = unreadable > 0 or progress.metrics_sha256 not in (None, text_sha256(kept))
    aside = f"metrics.damaged-{len([*path.parent.glob('metrics.damaged-*')]) + 1}.jsonl"
    with files_written_whole(path.parent) as staging:
        (staging / path.name).write_text(kept, encoding="utf-8")
        if damaged and path.exists():
            shutil.copy(path, staging / aside)
    if not damaged:
        return kept, None
    cannot = f", {unreadable} of its lines cannot be read" if unreadable else ""
    where = f"; it is kept as {aside}" if (path.parent / aside).exists() else ""
    return kept, f"{path} is not what the run had written until step {progress.step}{cannot}{where}."


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def not_finite(what: str, step: int, folder: str) -> str:
    """The sentence that ends a run whose numbers are no longer finite."""
    saved = list_checkpoints(Path(folder) / "checkpoints")
    return (
        f"the {what} was not finite at step {step}: try half the learning rate, more --warmup_steps, or without "
        f"--fp16; {f'the checkpoints up to step {step_of(saved[-1])} are good' if saved else 'nothing was saved'}."
    )


def same_run(settings: RunSettings, progress: Progress) -> dict[str, dict]:
    """What makes each tracker go on with the run that it knows, where it can, instead of beginning another."""
    name = f"{Path(settings.folder()).name}-{progress.run_id}"
    return {
        "trackio": {"name": name, "resume": "allow"},
        "wandb": {"name": name, "id": progress.run_id, "resume": "allow", "dir": settings.output_dir},
        "tensorboard": {"purge_step": progress.step + 1} if progress.step else {},
    }


def describe_trackers(settings: RunSettings) -> list[str]:
    """How to look at what the trackers get."""
    words = {
        "trackio": f"trackio show --project {PROJECT}",
        "tensorboard": f"tensorboard --logdir {Path(settings.output_dir) / 'trackers'}",
        "wandb": "WANDB_MODE=offline keeps it on this machine; `wandb sync` sends it later",
    }
    return [f"{name:<10} {words[name]}" for name in settings.report_to if name in words]


class RunLog:
    """Losses on their way to the progress bar, metrics.jsonl and the trackers; only the first process writes.

    Args:
        progress: where the run goes on; later lines of metrics.jsonl are dropped, to be written again.
        flops_per_token: of forward and backward up to a step, for the share of the GPUs' peak (MFU) where both are known.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        settings: RunSettings,
        tokens_per_step: int,
        progress: Progress,
        flops_per_token: Callable[[int], float | None] = lambda step: None,
    ):
        self.accelerator, self.settings, self.tokens_per_step = accelerator, settings, tokens_per_step
        self.path = Path(settings.folder()) / "metrics.jsonl"
        self.losses: list[torch.Tensor] = []
        self.shown: dict[str, float] = {}
        self.started = time.perf_counter() - progress.elapsed_s
        self.interval_start, self.interval_steps = time.perf_counter(), 0
        if accelerator.is_main_process:
            kept, damage = take_up_metrics(self.path, progress)
            self.digest = hashlib.sha256(kept.encode())
            say(accelerator, *([f"warning: {damage}"] if damage else []))
        self.bar = ProgressBar(
            settings.max_steps, progress.step, settings.eval_steps, shown=accelerator.is_main_process
        )
        self.flops_per_token = flops_per_token
        self.trackers = bool(settings.report_to)
        if self.trackers:
            config = {k: v for k, v in public_values(settings).items() if isinstance(v, (int, float, str))}
            self._tracked(
                lambda: accelerator.init_trackers(
                    PROJECT, None if progress.step else config, same_run(settings, progress)
                )
            )
        if self.trackers:
            say(accelerator, *describe_trackers(settings))

    def _tracked(self, action: Callable[[], object]) -> None:
        """A tracker that fails is given up with a sentence; the run goes on."""
        try:
            action()
        except Exception as error:
            self.trackers = False
            self.accelerator.trackers = []
            say(
                self.accelerator,
                f"warning: a tracker failed and is given up ({type(error).__name__}: {error}).",
            )

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self.started

    def add(self, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Note a step's loss and gradient norm, still on their device."""
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
        self.losses.append(torch.stack((loss.detach().float(), grad_norm.detach().float())))
        self.interval_steps += 1
        self.bar.update()

    def check(self, step: int) -> dict[str, float]:
        """train_loss (over all processes) and grad_norm of the newest step, and tokens_per_s since the last line.

        Raises:
            UserError: a loss or gradient since the last check was not finite. In float16 a gradient may be so:
                the step was left out, and the loss is scaled less from then on.
        """
        values = self.accelerator.reduce(torch.stack(self.losses), reduction="sum").tolist()
        first = step - len(values) + 1
        self.losses.clear()
        for number, (loss, grad_norm) in enumerate(values):
            if not math.isfinite(loss) or not math.isfinite(grad_norm) and self.accelerator.scaler is None:
                what = "loss" if not math.isfinite(loss) else "gradient"
                raise UserError(not_finite(what, first + number, self.settings.output_dir))
        loss, grad_norm = values[-1]
        self.bar.step_s = (time.perf_counter() - self.interval_start) / self.interval_steps
        tokens_per_s = self.tokens_per_step / self.bar.step_s
        return {
            "train_loss": loss,
            **({"grad_norm": grad_norm / self.accelerator.num_processes} if math.isfinite(grad_norm) else {}),
            "tokens_per_s": tokens_per_s,
            **self._utilization(tokens_per_s, self.flops_per_token(step)),
        }

    def _utilization(self, tokens_per_s: float, flops_per_token: float | None) -> dict[str, float]:
        peak = peak_of(self.accelerator.device)
        if peak is None or flops_per_token is None or self.accelerator.mixed_precision == "no":
            return {}
        return {"mfu": tokens_per_s * flops_per_token / (peak * self.accelerator.num_processes)}

    def write(self, step: int, **values: float) -> None:
        """One line of metrics.jsonl, and the same for the bar and the trackers."""
        row = {
            "step": step,
            "tokens_seen": step * self.tokens_per_step,
            "elapsed_s": round(self.elapsed_s, 3),
        } | values
        self.restart_clock()
        if not self.accelerator.is_main_process:
            return
        line = json.dumps(row) + "\n"
        self.digest.update(line.encode())
        # Closed each time: a full disk is met here and not at exit.
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
        self.shown |= values
        labels = {
            "train_loss": "loss {:.3f}",
            "eval_loss": "val {:.3f}",
            "tokens_per_s": "{:,.0f} tok/s",
            "mfu": "{:.0%} MFU",
        }
        shown = ", ".join(
            text.format(self.shown[name]) for name, text in labels.items() if name in self.shown
        )
        self.bar.tell(shown)
        if self.bar.disable and "eval_loss" in values:
            say(self.accelerator, f"step {step}/{self.settings.max_steps}: {shown}")
        if self.trackers:
            self._tracked(lambda: self.accelerator.log(values, step=step))

    def sync(self, progress: Progress) -> None:
        """Put the lines on the disk, so that a checkpoint written after them never survives without them."""
        progress.elapsed_s = self.elapsed_s
        if self.accelerator.is_main_process:
            progress.metrics_sha256 = self.digest.hexdigest()
            sync(self.path)

    def restart_clock(self) -> None:
        """Leave what has happened since the last line out of tokens_per_s."""
        self.interval_start, self.interval_steps = time.perf_counter(), 0

    def close(self) -> None:
        self.bar.close()
        if self.trackers:
            self._tracked(self.accelerator.end_training)


def draw_loss_curve(path: Path, rows: list[dict], title: str) -> None:
    """A picture of training and validation loss over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    best = min((row for row in rows if "eval_loss" in row), key=lambda row: row["eval_loss"], default=None)
    unit = loss_unit(best or {})
    curves = [("train_loss", "training, one batch", "-"), ("eval_loss", "validation, whole split", "o-")]
    if unit == OF_REWARDS:  # what is minimised in training is no measure of them
        curves = [("eval_loss", "texts on held-out lines", "o-")]
    for key, label, style in curves:
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            faint = key == "train_loss"
            axes.plot(*zip(*points, strict=True), style, label=label, alpha=0.45 if faint else 1, lw=1, ms=3)
    if best:
        label = f"best {best['eval_loss']:.4f} at step {best['step']}"
        axes.axhline(best["eval_loss"], ls=":", lw=1, color="gray", label=label)
    axes.set(xlabel="step", ylabel=f"loss, {unit}")
    axes.set_title(printable(title), parse_math=False)  # of names, in which $ is a letter
    if axes.get_lines():  # a run may stop before its first losses
        axes.legend()
    axes.grid(alpha=0.3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a name in a script that the font lacks
        figure.savefig(path, dpi=120)
