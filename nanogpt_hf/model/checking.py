"""What a checkpoint of somebody else's asks for, looked at before anything is read or built: only what cannot run code
is read, and nothing is made that the weights could not fill."""

import json
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from ..common.errors import UserError
from ..common.text import first_line

INDEX = ".safetensors.index.json"
# Fields of a config that each decide how many weights there are, or how many rows or columns one has.
LAYERS = ("n_layer", "num_hidden_layers", "num_layers")
WIDTHS = ("n_embd", "hidden_size", "n_inner", "intermediate_size", "vocab_size")


def find_file(name: str, file: str) -> str | None:
    """Path of one file of a folder or Hub repository, None if it is not to be had."""
    try:
        return cached_file(name, file)
    except OSError:
        return None


def check_checkpoint(name: str) -> None:
    """Look at a checkpoint before it is loaded. What has no config or no weights is left to the loader to refuse.

    Raises:
        UserError: its weights are named in anything but safetensors and their index, its config asks for a size that they
            do not have, or its generation config for tokens that there are not.
    """
    try:
        config = PreTrainedConfig.get_config_dict(name)[0]
    except Exception:  # the loader has its own sentence for what cannot be read
        return
    if not isinstance(config, dict):
        raise UserError(f"{name} has a config.json that is no configuration: it holds a {_kind(config)}.")
    shapes = _shapes(name, config.get("transformers_weights"))
    if not shapes:
        return
    largest = max((max(shape, default=0) for shape in shapes.values()), default=0)
    limits = dict.fromkeys(LAYERS, (len(shapes), "weights")) | dict.fromkeys(
        WIDTHS, (largest, "rows in any weight")
    )
    for field, (limit, what) in limits.items():
        asked = config.get(field)
        if isinstance(asked, int) and asked > limit and largest:
            raise UserError(
                f"{name} contradicts itself: its config.json asks for {field} {asked:,}, and there are only {limit:,} "
                f"{what}."
            )
    rows = config.get("vocab_size")
    check_generation(name, rows if isinstance(rows, int) else largest, config)


def _shapes(name: str, named: Any) -> dict[str, list[int]]:
    """The shape of each weight of a checkpoint, none where it has no safetensors.

    Args:
        named: the file that the config names for its weights, if it does.
    """
    if named is not None and not (isinstance(named, str) and _is_safe(named, (".safetensors", INDEX))):
        raise UserError(
            f"the config.json of {name} names {named!r} for its weights, which is no safetensors file: weights in pickles "
            "are not read; ask for the model in safetensors."
        )
    for file in [named] if named else ["model.safetensors", f"model{INDEX}"]:
        path = find_file(name, file)
        if path is not None:
            shards = _shards(name, path) if file.endswith(INDEX) else [path]
            break
    else:
        return {}
    shapes: dict[str, list[int]] = {}
    try:
        for path in shards:
            with safe_open(path, "pt") as weights:
                shapes |= {key: weights.get_slice(key).get_shape() for key in weights.keys()}
    except Exception as error:
        raise UserError(f"the weights of {name} cannot be loaded: {first_line(error)}.") from error
    return shapes


def _shards(name: str, index: str) -> list[str]:
    """The files that an index lists, all of them beside it."""
    try:
        files = sorted({*json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{name} has an index of its weights that cannot be read ({first_line(error)})."
        ) from error
    for file in files:
        if not (isinstance(file, str) and _is_safe(file, (".safetensors",))):
            raise UserError(
                f"the index of {name} names {file!r} for weights, which is no safetensors file beside it: weights in "
                "pickles are not read; ask for the model in safetensors."
            )
    return [path for file in files if (path := find_file(name, file))]


def _is_safe(file: str, endings: tuple[str, ...]) -> bool:
    return file.endswith(endings) and Path(file).name == file


def check_adapter(name: str, weights: str) -> Any:
    """The PeftConfig of an adapter, which never asks for more than its weights hold.

    Args:
        weights: the path of its safetensors.

    Raises:
        UserError: they cannot be read, or name a rank that no weight has.
    """
    config = read_adapter_config(name)
    ranks = [getattr(config, "r", None), *(getattr(config, "rank_pattern", None) or {}).values()]
    asked = max((rank for rank in ranks if isinstance(rank, int)), default=0)
    try:
        with safe_open(weights, "pt") as file:
            rows = [
                file.get_slice(key).get_shape()[0]
                for key in file.keys()
                if re.search("lora_(embedding_)?A", key)
            ]
    except Exception as error:
        raise UserError(
            f"the weights of the adapter {name} cannot be loaded: {first_line(error)}."
        ) from error
    if rows and asked > max(rows):
        raise UserError(
            f"the adapter {name} contradicts itself: its adapter_config.json asks for a rank of {asked:,}, its weights have "
            f"{max(rows):,}."
        )
    return config


def read_adapter_config(name: str) -> Any:
    """The PeftConfig of an adapter. Raises UserError where it holds no settings that peft knows, or names no base."""
    from peft import PeftConfig  # which takes a second

    try:
        config = PeftConfig.from_pretrained(name)
    except Exception as error:
        raise UserError(
            f"the adapter {name} has an adapter_config.json that cannot be read ({first_line(error)})."
        ) from error
    if not isinstance(config.base_model_name_or_path, str):
        raise UserError(f"the adapter {name} does not name its base: its adapter_config.json must.")
    return config


def check_generation(name: str, rows: int, config: dict | None = None) -> None:
    """Raises UserError where a generation_config.json, or the config itself, keeps back what are no tokens of the model.

    Args:
        rows: tokens that the model embeds.
    """
    path = find_file(name, "generation_config.json")
    try:
        generation = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{name} has a generation_config.json that cannot be read ({first_line(error)})."
        ) from error
    if not isinstance(generation, dict):
        raise UserError(
            f"{name} has a generation_config.json that is no configuration: it holds a {_kind(generation)}."
        )
    for source in (generation, config or {}):
        suppressed = source.get("suppress_tokens") or []
        ids = suppressed if isinstance(suppressed, list) else [suppressed]
        wrong = [id for id in ids if type(id) is not int or not 0 <= id < rows]
        if wrong or ids is not suppressed:
            raise UserError(
                f"the generation config of {name} has {(wrong or ids)[0]!r} in suppress_tokens, which must be a list of "
                f"token ids from 0 to {rows - 1:,}."
            )


def _kind(value: object) -> str:
    return type(value).__name__
