"""The folder of a run: what may be written there, where to go on, and what lies in it at the end."""

import hashlib
import math
import shutil
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from .checkpoints import Progress, damage, newest_good, read_progress
from .corpora import Corpus
from .reporting import library_versions, say, write_yaml
from .settings import TrainingSettings

# Everything that a run makes; --overwrite_output_dir deletes these and nothing else.
MADE_BY_A_RUN = (
    "checkpoints README.md run.yaml metrics.jsonl loss_curve.png samples.txt config.json generation_config.json "
    "model.safetensors adapter_config.json adapter_model.safetensors tokenizer.json tokenizer_config.json "
    "special_tokens_map.json configuration_nanogpt.py modeling_nanogpt.py"
).split()


def identity_of(
    settings: TrainingSettings,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    model: PreTrainedModel,
    tokens_per_step: int,
) -> dict:
    """What must be the same for a run to go on as the same run."""
    config = model.config.to_diff_dict()
    sizes = {key: config[key] for key in ("architecture", "n_layer", "n_head", "n_embd", "n_positions") if key in config}
    return {
        "corpus": corpus.sha256,
        "validation_split_percentage": settings.validation_split_percentage,
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "model": " ".join(f"{key}={value}" for key, value in sizes.items()),
        "optim": settings.optim,
        "seed": settings.seed,
        "tokens_per_step": tokens_per_step,
    }


def find_start(accelerator: Accelerator, settings: TrainingSettings, identity: dict) -> tuple[Progress, Path | None]:
    """Where the run begins: at step 0, or at a checkpoint to load. Nothing is written.

    Raises:
        ValueError: the folder cannot be written, holds something else, or holds another run than the one asked for.
    """
    folder = Path(settings.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file: give a folder.")
    if settings.resume_from_checkpoint is None:
        if folder.exists() and any(folder.iterdir()) and not settings.overwrite_output_dir:
            raise ValueError(
                f"--output_dir {folder} is not empty: go on with --resume_from_checkpoint last, replace it with "
                "--overwrite_output_dir, or choose another folder."
            )
        return Progress(identity=identity), None

    if settings.resume_from_checkpoint == "last":
        checkpoint, complaints = newest_good(folder / "checkpoints")
        say(accelerator, *(f"warning: {complaint}" for complaint in complaints))
        if checkpoint is None:
            raise ValueError(f"{folder / 'checkpoints'} holds no good checkpoint: start without --resume_from_checkpoint.")
    else:
        checkpoint = Path(settings.resume_from_checkpoint)
        reason = damage(checkpoint)
        if reason is not None:
            raise ValueError(f"the checkpoint {checkpoint} is damaged ({reason}): use --resume_from_checkpoint last.")
    progress = read_progress(checkpoint)
    for key, value in identity.items():
        if progress.identity.get(key) != value:
            raise ValueError(
                f"{checkpoint} belongs to another run: its {key} was {progress.identity.get(key)}, now it is {value}."
            )
    if progress.step > settings.max_steps:
        raise ValueError(
            f"{checkpoint} is at step {progress.step}, past --max_steps {settings.max_steps}: give more --max_steps."
        )
    return progress, checkpoint


def open_run_folder(
    settings: TrainingSettings, corpus: Corpus, tokenizer: PreTrainedTokenizerFast, identity: dict, fresh: bool
) -> None:
    """Make the folder, emptied of an earlier run if that was asked for, and write run.yaml into it.

    Raises:
        ValueError: it cannot be made or written.
    """
    folder = Path(settings.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if fresh and settings.overwrite_output_dir:
            for name in MADE_BY_A_RUN:
                path = folder / name
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        values = asdict(settings) | {"resume_from_checkpoint": None, "overwrite_output_dir": False}
        record = {
            "corpus": {
                "name": corpus.name,
                "source": corpus.source,
                "sha256": corpus.sha256,
                "license": corpus.license,
                "notice": corpus.notice,
                "characters": sum(map(len, corpus.train)) + sum(map(len, corpus.validation)),
            },
            "identity": identity,
            "tokenizer_tokens": len(tokenizer),
            "versions": library_versions(),
        }
        write_yaml(folder / "run.yaml", values, record)
    except OSError as error:
        raise ValueError(f"--output_dir {folder} cannot be written ({error.strerror}): give another folder.") from error


def note_evaluation(progress: Progress, loss: float) -> bool:
    """Count an evaluation; True when it is the best so far."""
    better = progress.best_loss is None or loss < progress.best_loss
    if better and math.isfinite(loss):
        progress.best_loss, progress.best_step, progress.evaluations_since_best = loss, progress.step, 0
        return True
    progress.evaluations_since_best += 1
    return False
