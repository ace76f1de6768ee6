"""A checkpoint in a format that others read: transformers' own gpt2, qwen3 and llama, GGUF, or ours with its code.

A new format is a name in common/settings.py, its room beside this one, and its call in `export`.
"""

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import get_args

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from ..common.errors import UserError
from ..common.files import MANIFEST, as_umask_says, check_whole, folder_written_whole
from ..common.paths import is_hub_id
from ..common.settings import CheckpointFormat, Format
from ..common.text import first_line
from ..data.tokenization import load_tokenizer
from ..model import NanoGPTConfig, NanoGPTForCausalLM
from ..model.checking import read_adapter_config
from ..model.conversion import FAMILIES, as_native, family_of, native_config, to_plain
from ..model.loading import (
    is_of_a_model,
    load_causal_lm,
    load_model_and_tokenizer,
    load_native,
    where_models_are,
)
from ..training.lora import load_merged
from .gguf import export_gguf
from .model_card import make_card, read_run
from .onnx import add_onnx, check_onnx

DERIVED = [
    name for name in get_args(Format) if name not in get_args(CheckpointFormat)
]  # made of the plain format
ADAPTER_FILES = (
    "adapter_config.json adapter_model.safetensors generation_config.json tokenizer.json tokenizer_config.json"
).split()


def choose_format(config: PreTrainedConfig, format: str = "auto") -> str:
    """The format that a model is written in: its model type, where our class does not hold it.

    Raises:
        UserError: there is no such format, or the model cannot be written in it.
    """
    if not isinstance(config, NanoGPTConfig):
        model_type, config = config.model_type, native_config(config)
        if config is None:
            if format not in ("auto", model_type):
                raise UserError(f"a model of type {model_type} is written as it is: use the format auto.")
            return model_type
    plain = family_of(config)
    if format == "auto":
        return plain or "nanogpt"
    if format not in get_args(Format):
        raise UserError(f"there is no format {format!r}: use one of {', '.join(get_args(Format))}.")
    possible = ("auto", "nanogpt", *((plain, *DERIVED) if plain else ()))
    if format not in possible:
        raise UserError(
            f"a model of the {config.architecture} architecture cannot be written in the format {format}: use one of "
            f"{', '.join(possible)}."
        )
    return format


def export(
    model: NanoGPTForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    folder: str | os.PathLike,
    format: str = "auto",
    quantization: str = "f32",
    name: str | None = None,
) -> str:
    """Write model, tokenizer and generation config into a folder, as one complete checkpoint.

    Args:
        format: gpt2, qwen3 and llama, for the architecture of that name, need no code of ours to be read; nanogpt
            ships it; gguf is the plain one for llama.cpp; onnx is the plain one with its graph in onnx/, for
            transformers.js; auto takes the plain format of the architecture, nanogpt if it has none.
        quantization: of a GGUF: f32, bf16 or q8_0.
        name: of a GGUF, by default the folder's.

    Returns:
        The format written.

    Raises:
        UserError: the model cannot be written in that format, or is not a NanoGPTForCausalLM.
    """
    if type(model).__name__ != "NanoGPTForCausalLM":
        raise UserError(
            f"export takes a NanoGPTForCausalLM, not a {type(model).__name__}: merge an adapter first, and read other "
            "checkpoints with NanoGPTForCausalLM.from_pretrained."
        )
    format, folder = choose_format(model.config, format), Path(folder)
    if format == "gguf":
        export_gguf(to_plain(model), tokenizer, folder, quantization, name)
        return format
    if format == "onnx":
        check_onnx(model)
        export(model, tokenizer, folder)
        add_onnx(folder)
        return format
    generation = copy.deepcopy(model.generation_config)
    generation._from_model_config = False
    generation.max_length = model.config.n_positions  # as runs.run.make_ready does, and why
    plain = model if format == "nanogpt" else to_plain(model)
    plain.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        as_umask_says(path)
    generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if format != "nanogpt":
        _make_tokenizer_plain(folder, tokenizer, model.config.vocab_size)
        asked_for = _fields_asked_for(model.config, format)
        _edit_json(folder / "config.json", lambda config: config | asked_for)
    return format


def _fields_asked_for(config: NanoGPTConfig, format: str) -> dict:
    """What transformers 5 does not write but others read: llama.cpp's converter (gpt2), transformers 4 (qwen3, llama)."""
    if format == "gpt2":
        return {"n_ctx": config.n_positions, "n_inner": config.inner_size}
    return {"rope_theta": float(config.rope_theta)}


def _make_tokenizer_plain(folder: Path, tokenizer: PreTrainedTokenizerFast, rows: int) -> None:
    """What readers of plain checkpoints expect: a token for every row of the embedding, an unknown token (CTranslate2
    has no model without), a class that transformers 4 knows. The ids of texts stay the same: a token that no merge
    makes is never chosen."""
    known = tokenizer.get_vocab()

    def fill(spec: dict) -> dict:
        if spec["model"]["type"] == "BPE":
            unused = {f"<|unused_{i}|>": i for i in range(rows) if i not in known.values()}
            spec["model"]["vocab"] |= known | unused
        return spec

    def settle(spec: dict) -> dict:
        if spec["tokenizer_class"] == "TokenizersBackend":
            spec["tokenizer_class"] = "PreTrainedTokenizerFast"
        # transformers 4 would add token_type_ids, and its GPT-2 embed them.
        inputs = ["input_ids", "attention_mask"]
        return {"unk_token": tokenizer.eos_token, "model_input_names": inputs} | spec

    _edit_json(folder / "tokenizer.json", fill)
    _edit_json(folder / "tokenizer_config.json", settle)


def _edit_json(path: Path, edit: Callable[[dict], dict]) -> None:
    content = edit(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def export_run(
    folder: str | os.PathLike,
    target: str | os.PathLike,
    format: str = "auto",
    name: str | None = None,
    merge: bool = False,
    quantization: str = "f32",
) -> None:
    """`export` of the best model of a run folder, or of any checkpoint of ours, with its card and loss curve.

    As GGUF also of any GPT-2, Qwen3 or Llama that transformers loads, with a tokenizer that llama.cpp has. The target
    is there only when everything is written; an earlier export in its place is replaced.

    Args:
        name: what the card's lines load, a Hub id; by default the target's name.
        merge: merge an adapter into its base; without, an adapter is copied as it is.
        quantization: of a GGUF: f32, bf16 or q8_0.

    Raises:
        UserError: the folder holds no checkpoint that can be read, or none that can be written in that format, or the
            target holds something else.
    """
    folder, target = Path(folder), Path(target)
    is_adapter = (folder / "adapter_config.json").exists()
    if is_adapter and format in DERIVED and not merge:
        raise UserError(f"{folder} holds an adapter, and {format} holds a whole model: merge it (--merge).")
    if target.is_dir() and any(target.iterdir()) and not (target / MANIFEST).exists():
        raise UserError(f"{target} is not empty: choose another folder.")
    before, title = _state(folder), name or target.resolve().name
    with folder_written_whole(target) as staging:
        if is_adapter and not merge:
            written = _copy_adapter(folder, staging, for_others=name is not None)
        else:
            written = _export_whole(folder, staging, format, quantization, title)
        make_card(folder, weights=staging, format=written, name=name, title=title).save(staging / "README.md")
        if (folder / "loss_curve.png").exists():
            shutil.copy(folder / "loss_curve.png", staging)
        if _state(folder) != before:
            raise UserError(f"the run has replaced the model in {folder} meanwhile: run the same again.")


def _state(folder: Path) -> bytes | None:
    """What changes with the model at the top of a run folder."""
    return (folder / MANIFEST).read_bytes() if (folder / MANIFEST).exists() else None


def base_of(folder: Path) -> tuple[str, bool]:
    """What an adapter calls its base, and whether that is a folder: as its run has noted when it began, for a name such as
    runs/base is a Hub id from where there is no such folder; of an adapter from elsewhere, as seen from here."""
    base, record = (
        read_adapter_config(str(folder)).base_model_name_or_path,
        read_run(folder / "run.yaml").get("record"),
    )
    facts = (record or {}).get("base")
    return base, not facts.get("hub_id") if facts else not is_hub_id(base)


def _copy_adapter(folder: Path, target: Path, for_others: bool) -> str:
    check_whole(folder, is_of_a_model)
    base, is_folder = base_of(folder)
    if for_others and is_folder:
        raise UserError(
            f"{folder} holds an adapter whose base, {base}, is a folder of this machine: nobody could load it from "
            "the Hub; merge it (--merge)."
        )
    for file in ADAPTER_FILES:
        if (folder / file).exists():
            shutil.copy(folder / file, target)
    return "adapter"


def _export_whole(folder: Path, target: Path, format: str, quantization: str, name: str) -> str:
    if (folder / "adapter_config.json").exists():
        model, tokenizer = load_merged(folder)
    elif format == "gguf":
        model, tokenizer = load_model_and_tokenizer(str(folder))
    elif (folder / "config.json").is_file():
        model, tokenizer = _load_whole(folder), load_tokenizer(str(folder))
    else:
        raise UserError(f"{folder} holds no config.json: {where_models_are(folder)}.")
    model = model if format == "gguf" else as_native(model)
    written = choose_format(model.config, format)
    if isinstance(model, NanoGPTForCausalLM):
        return export(model, tokenizer, target, format, quantization, name)
    if written == "gguf":
        export_gguf(model, tokenizer, target, quantization, name)
    else:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    return written


def _load_whole(folder: Path) -> PreTrainedModel:
    check_whole(folder, lambda name: name == "config.json")
    try:
        kind = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
    except OSError as error:
        raise UserError(f"{folder} has a config.json that cannot be read: {first_line(error)}.") from error
    if kind in (NanoGPTConfig.model_type, *FAMILIES):
        return load_native(folder)
    return load_causal_lm(str(folder), "auto")
