"""The folder of a run: what may be written there, where to go on, and what lies in it at the end."""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..common.errors import UserError
from ..common.files import delete, delete_left_overs, one_writer
from ..common.paths import is_hub_id
from ..common.settings import OF_A_START, FinetuningSettings, RunSettings, public_values
from ..common.text import without_home
from ..data.corpora import AnyCorpus
from ..model import NanoGPTConfig
from ..model.bases import describe_base
from .checkpoints import Progress, damage, list_checkpoints, newest_good, prune, read_progress
from .commands import commands
from .reporting import library_versions, say, text_sha256, write_yaml
from .used_folder import MADE_BY_A_RUN, check_usable, readable

SHAPE = (
    "architecture norm positions qk_norm mlp bias n_layer n_head n_embd n_inner n_positions vocab_size rope_theta "
    "layer_norm_epsilon activation_function"
).split()
NONE_BEFORE = ("validation_text", "short_positions")  # of runs of earlier versions, which did not note them
ADAPTATION = (  # settings of a fine-tuning that decide what trains
    "n_positions full lora_r lora_alpha lora_dropout target_modules use_dora use_rslora extend_vocabulary"
).split()


def identity_of(
    settings: RunSettings,
    corpus: AnyCorpus,
    tokenizer: PreTrainedTokenizerFast,
    model: PreTrainedModel,
    tokens_per_step: int,
    base: Mapping[str, str],
) -> dict:
    """What must be the same for a run to go on as the same run.

    Args:
        base: digests of the weights that an adapter is trained on.
    """
    config, grouped, adaptation = model.config, {}, {}
    if isinstance(config, NanoGPTConfig):
        usual = {"n_kv_head": config.n_head, "head_dim": config.n_embd // config.n_head}
        grouped = {name: getattr(config, name) for name in usual if getattr(config, name) != usual[name]}
    if isinstance(settings, FinetuningSettings):
        adaptation = {name: getattr(settings, name) for name in ADAPTATION}
        adaptation |= {name: getattr(settings, name) for name in settings.DECIDES}
    return {
        "corpus": corpus.sha256,
        "validation_split_percentage": settings.validation_split_percentage,
        "validation_text": corpus.validation_sha256,
        "special_tokens_in_text": "tokens" if settings.special_tokens_in_text == "tokens" else None,
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        **{field: getattr(config, field) for field in SHAPE if hasattr(config, field)},
        **grouped,
        "optim": settings.optim,
        "seed": settings.seed,
        "tokens_per_step": tokens_per_step,
        "short_positions": (short := getattr(settings, "short_positions", None)),
        "short_steps": settings.short_steps if short else None,
        "document_end": settings.document_end and without_home(settings.document_end),
        **adaptation,
        **base,
    }


def find_start(
    accelerator: Accelerator, settings: RunSettings, identity: dict
) -> tuple[Progress, Path | None]:
    """Where the run begins: at step 0, or at a checkpoint to load. Nothing is written.

    Raises:
        UserError: the folder cannot be used, holds something else, or holds another run than the one asked for.
    """
    check_agreement(accelerator, identity)
    folder = Path(settings.folder())
    used = check_usable(settings)
    if settings.resume_from_checkpoint is None:
        return Progress(identity=identity), None
    with readable(folder):
        checkpoint = find_checkpoint(accelerator, settings.resume_from_checkpoint, folder, used)
    progress = read_progress(checkpoint)
    # What an earlier version did not note is not known to be another.
    changed = [
        _difference(key, progress.identity.get(key), value)
        for key, value in identity.items()
        if progress.identity.get(key, None if key in NONE_BEFORE else value) != value
    ]
    if changed:
        raise UserError(
            f"{checkpoint} belongs to another run: {', '.join(changed)}"
            f"{batch_advice(accelerator, progress.identity, identity)}."
        )
    if progress.step > settings.max_steps:
        raise UserError(
            f"{checkpoint} is at step {progress.step}, past --max_steps {settings.max_steps}: give more --max_steps."
        )
    if not used:
        progress.metrics_sha256 = text_sha256("")  # they begin anew
    return progress, checkpoint


def batch_advice(accelerator: Accelerator, before: dict, now: dict) -> str:
    """How this many processes make the batch that the run had, or why they cannot; nothing when they do."""
    context, tokens = now.get("n_positions"), before.get("tokens_per_step")
    if tokens in (None, now["tokens_per_step"]) or not context or tokens % context:
        return ""
    sequences, processes = tokens // context, accelerator.num_processes
    if sequences % processes:
        return f"; {processes} processes do not divide its batch of {sequences} sequences: use a number that does"
    return (
        "; --per_device_train_batch_size times --gradient_accumulation_steps must be "
        f"{sequences // processes} on {processes} process{'es' * (processes > 1)}"
    )


@contextmanager
def alone_in(accelerator: Accelerator, folder: Path) -> Iterator[None]:
    """A context in which no other run writes into the folder. The first process holds it for all.

    Raises:
        UserError: another one does, or the folder cannot be written.
    """
    with ExitStack() as stack:
        refusal = None
        if accelerator.is_main_process:
            try:
                stack.enter_context(one_writer(folder))
            except UserError as error:
                refusal = error
        refused = torch.tensor(int(refusal is not None), device=accelerator.device)
        if accelerator.reduce(refused, reduction="sum").item():
            raise refusal or UserError(f"{folder} cannot be used, as the first process says.")
        yield


def check_agreement(accelerator: Accelerator, identity: dict) -> None:
    """Raises UserError when the processes are not about to make the same run."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).digest()
    own = torch.tensor([int.from_bytes(digest[:7])], device=accelerator.device)
    if accelerator.num_processes > 1 and (accelerator.gather(own) != own).any():
        raise UserError(
            "the processes have read different texts, or were given different settings: start them again."
        )


def find_checkpoint(accelerator: Accelerator, asked: str, folder: Path, used: bool) -> Path:
    """The checkpoint that --resume_from_checkpoint asks for. Raises UserError when there is no good one."""
    if asked == "last":
        checkpoint, complaints = newest_good(folder / "checkpoints")
        say(accelerator, *(f"warning: {complaint}" for complaint in complaints))
        if checkpoint is None:
            again = (
                "start again with --overwrite_output_dir"
                if used
                else "start without --resume_from_checkpoint"
            )
            raise UserError(f"{folder / 'checkpoints'} holds no good checkpoint: {again}.")
        return checkpoint
    checkpoint = Path(asked)
    if not checkpoint.is_dir():
        raise UserError(f"there is no checkpoint {checkpoint}: give last, or the folder of one.")
    if used and checkpoint.resolve().parent != (folder / "checkpoints").resolve():
        raise UserError(
            f"{checkpoint} is not one of the checkpoints in --output_dir {folder}: give a new --output_dir to go on "
            "from it there."
        )
    reason = damage(checkpoint)
    if reason is not None:
        raise UserError(
            f"the checkpoint {checkpoint} is damaged ({reason}): use --resume_from_checkpoint last."
        )
    return checkpoint


def _difference(key: str, before: Any, now: Any) -> str:
    """How a part of a run's identity has changed, in words."""
    if key == "validation_text" and before is None:
        return "an earlier version held out other parts of these files for validation"
    return f"{key} was {_short(before)} and is now {_short(now)}"


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 24 else str(value)


def open_run_folder(
    settings: RunSettings,
    corpus: AnyCorpus,
    tokenizer: PreTrainedTokenizerFast,
    identity: dict,
    progress: Progress,
    checkpoint: Path | None,
) -> list[str]:
    """Make the folder, emptied of an earlier run if that was asked for, and write run.yaml into it.

    Args:
        progress: where the run begins; takes up its settings from there on.
        checkpoint: what it goes on from.

    Returns:
        What to say of a run that goes on: from where, and a line for each setting that it has changed.

    Raises:
        UserError: it cannot be made or written.
    """
    folder, source = Path(settings.folder()), getattr(settings, "tokenizer", "char")
    try:
        if checkpoint is None and settings.overwrite_output_dir:
            for name in MADE_BY_A_RUN:
                delete(folder / name)
        _delete_left_overs(folder)
        if checkpoint in list_checkpoints(folder / "checkpoints")[-1:]:
            prune(checkpoint, settings.save_total_limit)  # as it was about to do when it was killed
        values = public_values(settings) | {"resume_from_checkpoint": None, "overwrite_output_dir": False}
        earlier = None if checkpoint is None else _read_run_yaml(checkpoint.resolve().parents[1] / "run.yaml")
        changed = _changes(progress.settings or earlier or {}, values)
        progress.settings = {name: value for name, value in values.items() if name not in OF_A_START}
        record = {
            "corpus": {
                "name": without_home(corpus.name),
                "source": corpus.source,
                "sha256": corpus.sha256,
                "language": corpus.language,
                "license": corpus.license,
                "notice": corpus.notice,
                "characters": corpus.characters("train") + corpus.characters("validation"),
            },
            **({"base": describe_base(base)} if (base := settings.model_name_or_path) else {}),
            **commands(earlier, progress.step, changed),
            "identity": identity,
            "tokenizer_tokens": len(tokenizer),
            **({"tokenizer_hub_id": source} if source not in ("char", "bpe") and is_hub_id(source) else {}),
            "versions": library_versions(),
        }
        write_yaml(folder, values, record)
    except OSError as error:
        raise UserError(
            f"--output_dir {folder} cannot be written ({error.strerror}): give another folder."
        ) from error
    goes_on = checkpoint is not None and progress.step < (settings.max_steps or 0)
    return [
        *(
            [f"goes on    from step {progress.step:,} of {settings.max_steps:,}: {checkpoint}"]
            if goes_on
            else []
        ),
        *(f"changed    {name} from {old} to {new}" for name, (old, new) in changed.items()),
    ]


def _delete_left_overs(folder: Path) -> None:
    """What earlier processes of this run have left, of earlier versions too; this one writes alone here."""
    for place in (folder, folder / "checkpoints"):
        delete_left_overs(place)
        for path in place.glob(".unfinished-*"):
            if re.fullmatch(r"\.unfinished-(step-)?\d+", path.name):
                delete(path)


def _read_run_yaml(path: Path) -> dict:
    """What is in a run.yaml, nothing where it cannot be read."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _changes(earlier: dict, values: dict[str, Any]) -> dict[str, list]:
    """The settings that are no longer what they were, each with its value before and now."""
    return {
        name: [earlier[name], value]
        for name, value in values.items()
        if name not in OF_A_START and earlier.get(name, value) != value
    }


def note_evaluation(progress: Progress, loss: float) -> bool:
    """Count an evaluation; True when it is the best so far."""
    better = progress.best_loss is None or loss < progress.best_loss
    if better and math.isfinite(loss):
        progress.best_loss, progress.best_step, progress.evaluations_since_best = loss, progress.step, 0
        return True
    progress.evaluations_since_best += 1
    return False
