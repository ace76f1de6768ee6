"""Checkpoints that are whole or not there, verified when read, and enough to go on exactly.

A checkpoint folder holds the model as transformers saves it, the optimisers' state in safetensors, the progress
of the run in JSON, and a manifest of every file's size and SHA-256. It is written under another name and renamed.

Writing waits for the disk in the training loop: in the recipes' run for a CPU (0.9M parameters, 4 minutes) 4
checkpoints of 34 ms and 16 best models of 23 ms are 0.2% of the time, too little for a thread of their own.
"""

import copy
import json
import secrets
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedTokenizerFast

from ..common import files
from ..common.errors import UserError
from ..common.files import delete_at_once, folder_written_whole
from ..common.text import first_line
from ..model import NanoGPTForCausalLM
from ..model.configuration_nanogpt import FORMER_NAMES

NEEDED = ("optimizer.safetensors", "progress.json")  # the weights' file has several names
ADAPTER_PREFIX = "base_model.model."  # peft's name for the model inside PeftModel
FULL_ON_CPU = StateDictOptions(full_state_dict=True, cpu_offload=True)  # for the first process only
FULL = StateDictOptions(full_state_dict=True)


@dataclass
class Progress:
    """Where a run is. Batches, learning rates and random numbers follow from `step`, so it is all there is."""

    step: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    elapsed_s: float = 0.0
    scaler: dict = field(default_factory=dict)  # float16's loss scaling
    # Names the run to trackers, so that going on is not a second run there.
    run_id: str = field(default_factory=lambda: secrets.token_hex(4))
    # What must be the same to go on: corpus, tokenizer, model, seed, tokens a step.
    identity: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)  # earlier versions kept them in run.yaml alone
    metrics_sha256: str | None = None  # of the lines of metrics.jsonl until then


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    return files.damage(folder, NEEDED)


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint, -1 for all other names."""
    number = folder.name.removeprefix("step-")
    return (
        int(number) if number.isascii() and number.isdigit() and folder.name == f"step-{int(number)}" else -1
    )


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders in a folder, oldest first."""
    return sorted((path for path in folder.glob("step-*") if step_of(path) >= 0), key=step_of)


def newest_good(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint in a folder, and a sentence for each damaged one that is newer."""
    complaints: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        reason = damage(path)
        if reason is None:
            return path, complaints
        complaints.append(f"{path} is damaged ({reason}) and was passed over.")
    return None, complaints


def prune(newest: Path, keep: int) -> None:
    """Delete the checkpoints beside the one just written, all but the `keep` newest good ones of this run.

    A damaged one does not count as one that is kept. Those of later steps are of a course that the run has left
    by going on from an earlier one.
    """
    older = []
    for path in reversed(list_checkpoints(newest.parent)):
        if step_of(path) > step_of(newest):
            delete_at_once(path)
        elif path != newest:
            older.append(path)
    kept = 1
    for number, path in enumerate(older):
        if kept == keep:
            delete_at_once(path)
        elif len(older) - number <= keep - kept:
            break  # few enough are left, good or not
        elif damage(path) is None:
            kept += 1


def save_model(
    accelerator: Accelerator, model: nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Model and tokenizer as transformers (or peft) saves them. Every process calls it, the first one writes."""
    state = accelerator.get_state_dict(model)  # whole tensors, whatever the layout
    if accelerator.is_main_process:
        model = _under_its_own_class(accelerator.unwrap_model(model))
        if hasattr(model, "peft_config"):
            _save_adapter(model, state, folder)
        else:
            if accelerator.is_fsdp2 and model.config.tie_word_embeddings:  # gathered twice, saved once
                state |= {key: state[source] for key, source in (model._tied_weights_keys or {}).items()}
            model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)


def _under_its_own_class(model: nn.Module) -> nn.Module:
    """The same model; FSDP2 has put another class over its own, whose name and file would be saved with it."""
    if not isinstance(model, FSDPModule):
        return model
    classes = type(model).__mro__
    own = classes[classes.index(FSDPModule) + 1]
    plain = own.__new__(own)
    plain.__dict__.update(model.__dict__)
    return plain


def _save_adapter(model: nn.Module, state: dict[str, torch.Tensor], folder: Path) -> None:
    """An adapter in peft's files. The save_pretrained of transformers and peft ask the Hub for the base's config."""
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(model, state, save_embedding_layers=False)
    weights = {f"{ADAPTER_PREFIX}{name}": tensor.contiguous() for name, tensor in weights.items()}
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True  # or who loads it would train it
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def load_weights(model: nn.Module, folder: Path) -> None:
    """The weights that `save_model` wrote, into a model of the same shape, sharded or not; every process calls it.

    Raises:
        UserError: they cannot be read, or are another model's.
    """
    adapter = (folder / "adapter_model.safetensors").exists()
    path = folder / ("adapter_model.safetensors" if adapter else "model.safetensors")
    try:
        if adapter:
            from peft import get_peft_model_state_dict, set_peft_model_state_dict

            weights = {name.removeprefix(ADAPTER_PREFIX): tensor for name, tensor in load_file(path).items()}
            wrong = set(weights) ^ set(get_peft_model_state_dict(model, save_embedding_layers=False))
            if not wrong:
                set_peft_model_state_dict(model, weights)
        else:
            state = _saved_state(model, path)
            wrong = state.keys() ^ model.state_dict().keys()
            if not wrong:
                set_model_state_dict(model, state, options=FULL)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{path} cannot be loaded into this model ({first_line(error)}).") from error
    if wrong:
        raise UserError(f"{path} holds the weights of another model ({min(wrong)}).")


def _saved_state(model: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    """The weights of a file under the names that the model has for them."""
    state = load_file(path)
    tied = {key: name for key, name in (model._tied_weights_keys or {}).items() if name in state}
    state = {key: state[name] for key, name in tied.items()} | state
    own_class = type(_under_its_own_class(model))
    if state.keys() != model.state_dict().keys() and own_class is not NanoGPTForCausalLM:
        # Some classes of transformers save under other names than they compute with, and know them when they load.
        with suppress(ValueError):
            return own_class.from_pretrained(path.parent, use_safetensors=True).state_dict()
    return state


def _unwrapped(optimizers: Iterable[Any]) -> list[torch.optim.Optimizer]:
    """Without accelerate's wrapper, whose step scales float16 gradients; reading a state takes an empty step."""
    return [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers]


def save_checkpoint(
    accelerator: Accelerator,
    model: nn.Module,
    optimizers: Iterable[Any],
    tokenizer: PreTrainedTokenizerFast,
    progress: Progress,
    folder: Path,
) -> None:
    """Everything to go on from progress.step. Every process calls it, the first one writes."""
    state = get_optimizer_state_dict(model, _unwrapped(optimizers), options=FULL_ON_CPU)
    if not accelerator.is_main_process:
        save_model(accelerator, model, tokenizer, folder)
        return
    with folder_written_whole(folder) as staging:
        save_model(accelerator, model, tokenizer, staging)
        tensors = {
            f"{parameter}/{name}": torch.as_tensor(value).contiguous()
            for parameter, values in state["state"].items()
            for name, value in values.items()
        }
        save_file(tensors, staging / "optimizer.safetensors")
        write_progress(progress, staging)


def write_progress(progress: Progress, folder: Path) -> None:
    (folder / "progress.json").write_text(json.dumps(asdict(progress), indent=1), encoding="utf-8")


def read_progress(folder: Path) -> Progress:
    """Raises UserError when the file is not one that this version writes."""
    try:
        progress = Progress(**json.loads((folder / "progress.json").read_text(encoding="utf-8")))
        fits = all(
            isinstance(getattr(progress, name), hint) for name, hint in get_type_hints(Progress).items()
        )
        if not fits or progress.step < 0:
            raise UserError("a value of the wrong type")
        if "architecture" in progress.identity:
            name = progress.identity["architecture"]
            progress.identity["architecture"] = FORMER_NAMES.get(name, name)
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{folder} has no progress.json of this version: it cannot be resumed.") from error
    return progress


def load_checkpoint(model: nn.Module, optimizers: Iterable[Any], folder: Path) -> None:
    """Put a checkpoint's weights and optimiser state into a prepared model and its optimisers.

    Learning rates and the like stay as the optimisers were made: they are settings, not state.

    Raises:
        UserError: weights or state are not of this model and these optimisers.
    """
    load_weights(model.module if hasattr(model, "module") else model, folder)
    optimizers = _unwrapped(optimizers)
    groups = get_optimizer_state_dict(model, optimizers)["param_groups"]
    state: dict[str, dict] = {}
    try:
        for key, tensor in load_file(folder / "optimizer.safetensors").items():
            parameter, name = key.rsplit("/", 1)
            state.setdefault(parameter, {})[name] = tensor
        saved: dict[str, Any] = {"state": state, "param_groups": groups}
        set_optimizer_state_dict(model, optimizers, saved, options=FULL)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder} holds the state of other optimisers ({first_line(error)}).") from error
