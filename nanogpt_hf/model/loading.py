"""Any causal language model with its own tokenizer, from a folder or the Hub.

Ours, plain GPT-2, Qwen3 and Llama, whatever else transformers has, peft adapters, and what bases.py makes a checkpoint
of. Nothing that is loaded can run code: remote code is refused, and so are weights in pickles.
"""

import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ..common.errors import UserError
from ..common.files import check_whole
from ..common.paths import asks_the_hub, check_model_name, nearest_path
from ..common.text import first_line
from ..data.tokenization import load_tokenizer
from .bases import local_checkpoint
from .checking import check_adapter, check_checkpoint, check_generation, find_file
from .configuration_nanogpt import NanoGPTConfig
from .conversion import as_native
from .modeling_nanogpt import NanoGPTForCausalLM
from .presets import preset_config

NO_LIMIT = 2048  # tokens
# Words for a context in configs that do not say max_position_embeddings, by any of its aliases.
CONTEXT_FIELDS = ("max_position_embeddings", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")


@asks_the_hub
def load_model_and_tokenizer(
    name_or_path: str, dtype: torch.dtype = torch.float32, to_write: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A model ready for evaluation and sampling, and the tokenizer it was trained with.

    A folder of that name comes before the Hub. A peft adapter is put on its base, whose tokenizer serves where
    the adapter has none. Token ids that the tokenizer does not have are never sampled.

    Args:
        dtype: of the weights in memory, whatever it is in the file.
        to_write: merge an adapter, and hold the model in our class where that can be, which writes many times faster
            (generation/decoding.py); its logits agree to 1e-4.

    Raises:
        UserError: there is no such model, it is not a causal language model, it needs code of its own, its
            files do not belong together, or the tokenizer has ids that the model does not embed.
    """
    check_model_name(name_or_path)
    name = local_checkpoint(name_or_path)
    if find_file(name, "adapter_config.json") is None:
        model = load_causal_lm(name, dtype)
        tokenizer = load_tokenizer(name)
        check_vocabulary(tokenizer, model)
    else:
        # In float32: so it shows whether it is the base that the adapter was trained on, and what an adapter adds to a
        # weight is less than bfloat16 tells apart.
        model, tokenizer = put_on_base(name, lambda base: load_causal_lm(base, torch.float32))
        model = (model.merge_and_unload() if to_write else model).to(dtype)
    model = as_native(model) if to_write else model
    suppress_padding(tokenizer, model)
    return model.eval(), tokenizer


def put_on_base(name: str, load_base: Callable[[str], PreTrainedModel]) -> tuple:
    """The PeftModel of an adapter, on its base by `load_base`, and its tokenizer or else the base's.

    Raises:
        UserError: the adapter or its base cannot be read, or they do not belong together.
    """
    from peft import PeftModel

    weights = find_file(name, "adapter_model.safetensors")
    if weights is None:
        raise UserError(f"{name} holds no adapter_model.safetensors, and weights in pickles are not read.")
    check_whole(name, is_of_a_model)
    config = check_adapter(name, weights)
    try:
        base = local_checkpoint(config.base_model_name_or_path)
        model = load_base(base)
        check_base(Path(name), base, model)
        tokenizer = load_tokenizer(name if find_file(name, "tokenizer.json") else base)
        # An adapter may bring tokens of its own.
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        check_vocabulary(tokenizer, model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks by a name that transformers 6 drops
            adapted = PeftModel.from_pretrained(model, name)
        if find_file(name, "generation_config.json"):
            check_generation(name, model.get_input_embeddings().weight.shape[0])
            model.generation_config = GenerationConfig.from_pretrained(name)
    except Exception as error:
        raise UserError(
            f"the adapter {name} cannot be put on its base model: {first_line(error)}."
        ) from error
    return adapted, tokenizer


def base_sha256(model: PreTrainedModel) -> dict[str, str]:
    """SHA-256 of the weights that an adapter is to be trained on, as they were loaded: of all but the embeddings, and of
    those, which added tokens change."""
    digests = {"base": hashlib.sha256(), "base_embeddings": hashlib.sha256()}
    embeddings = [
        module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module
    ]
    embedded = {id(parameter) for module in embeddings for parameter in module.parameters()}
    for parameter in model.parameters():
        digest = digests["base_embeddings" if id(parameter) in embedded else "base"]
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return {name: digest.hexdigest() for name, digest in digests.items()}


def check_base(adapter: Path, base: str, model: PreTrainedModel) -> None:
    """Raises UserError where what lies beside an adapter says that its base had other weights.

    Args:
        base: what the adapter calls its base.
        model: the base, as it was loaded in float32.
    """
    identity = _identity_beside(adapter)
    if not identity.get("base") or identity.get("load_in_4bit") or identity.get("load_in_8bit"):
        return  # from elsewhere, or its base was never seen in float32, as an earlier version could
    for name, digest in base_sha256(model).items():
        if identity.get(name, digest) != digest:
            raise UserError(f"it was trained on another base, {base} has other weights now")


def _identity_beside(adapter: Path) -> dict:
    """What a run has noted beside an adapter of what it was trained on: progress.json, run.yaml in earlier versions."""
    for name, keys in (("progress.json", ["identity"]), ("run.yaml", ["record", "identity"])):
        try:
            values = yaml.safe_load((adapter / name).read_text(encoding="utf-8"))
            for key in keys:
                values = values[key]
            return values if isinstance(values, dict) else {}
        except (OSError, ValueError, KeyError, TypeError, RecursionError, yaml.YAMLError):
            continue
    return {}


def check_finite(model: PreTrainedModel, name: str | os.PathLike) -> None:
    """Raises UserError where a weight is not a finite number."""
    for key, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(
                f"{name} holds weights that are not finite numbers ({key}): its training had failed."
            )


def is_of_a_model(file: str) -> bool:
    """Whether loading a model reads that file of a folder; a checkpoint holds more."""
    return file.endswith((".safetensors", ".json")) and not file.startswith(("optimizer", "tokenizer"))


def where_models_are(folder: str) -> str:
    """What to give instead of a folder without a model."""
    configs = Path(folder).glob("checkpoints/step-*/config.json")
    newest = max(configs, key=lambda path: path.stat().st_mtime, default=None)
    return f"give its checkpoint {newest.parent}" if newest else "give a folder that a model was saved into"


@asks_the_hub
def load_causal_lm(name: str, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """A causal language model in transformers' own class for it, or ours, from a folder or the Hub.

    Args:
        options: of `from_pretrained`.

    Raises:
        UserError: it is none, it is not to be had, or its files do not belong together.
    """
    is_folder = os.path.isdir(name)
    if is_folder and find_file(name, "config.json") is None:
        raise UserError(f"{name} holds no config.json: {where_models_are(name)}.")
    if is_folder:
        check_whole(name, is_of_a_model)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        if "trust_remote_code" in str(error):
            reason = "needs code of its own, which is never run here: give a model that transformers knows"
        elif is_folder:
            reason = f"has a config.json that cannot be read ({first_line(error)})"
        else:
            near = nearest_path(name)
            reason = f"is no folder here, and the Hub does not give it ({first_line(error)})"
            reason += f"; did you mean {near}?" if near else ""
        raise UserError(f"{name} {reason}{'' if reason.endswith('?') else '.'}") from error
    # An encoder's checkpoint would load as a decoder that sees ahead.
    is_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if is_causal and config.architectures:
        is_causal = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__ in config.architectures
    if not is_causal:
        kind = (config.architectures or [config.model_type])[0]
        raise UserError(f"{name} holds a {kind}, but what is needed is a causal language model.")
    check_checkpoint(name)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    except Exception as error:
        raise UserError(f"the weights of {name} cannot be loaded: {first_line(error)}.") from error
    for key, saved, wanted in sorted(info["mismatched_keys"]):
        raise UserError(
            f"{name} contradicts itself: its weight {key} has the shape {list(saved)}, its config.json asks for "
            f"{list(wanted)}."
        )
    if info["missing_keys"]:
        raise UserError(
            f"{name} lacks {len(info['missing_keys'])} weights that its config.json asks for "
            f"({min(info['missing_keys'])} among them)."
        )
    check_finite(model, name)
    return model


def context_length(model: PreTrainedModel) -> int:
    """Tokens that a model is to see at once; NO_LIMIT where its config names none (ALiBi, recurrent models)."""
    config = model.config.get_text_config()
    lengths = (getattr(config, field, None) for field in CONTEXT_FIELDS)
    return next((length for length in lengths if length), NO_LIMIT)


def check_vocabulary(tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel) -> None:
    """Raises UserError when the tokenizer has ids that the model's embedding does not."""
    highest, rows = max(tokenizer.get_vocab().values()), model.get_input_embeddings().weight.shape[0]
    if highest >= rows:
        raise UserError(
            f"tokenizer and model do not belong together: the tokenizer has ids up to {highest}, the model embeds "
            f"{rows} tokens: use the tokenizer that the model was trained with."
        )


def suppress_padding(tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel) -> None:
    """Keep ids that are no token, the padding of the embedding, out of all that the model generates."""
    ids = range(max(tokenizer.get_vocab().values()) + 1, model.get_input_embeddings().weight.shape[0])
    if ids:
        known = model.generation_config.suppress_tokens or []
        model.generation_config.suppress_tokens = sorted({*known, *ids})


@asks_the_hub
def load_native(name_or_path: str | os.PathLike, **options: Any) -> NanoGPTForCausalLM:
    """A checkpoint of ours, or a plain one that our class holds, from a folder or the Hub.

    Args:
        options: of `from_pretrained`.

    Raises:
        UserError: there is none, or its files do not belong together.
    """
    if os.path.isdir(name_or_path):
        check_whole(name_or_path, is_of_a_model)
    folder = local_checkpoint(str(name_or_path))
    check_checkpoint(folder)
    try:
        model = NanoGPTForCausalLM.from_pretrained(folder, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"{first_line(error)}.") from error
    check_finite(model, name_or_path)
    return model


def make_config(preset: str | None, **fields: Any) -> NanoGPTConfig:
    """The configuration of a named size, or of GPT-2's where there is none, with these fields.

    Raises:
        UserError: fields that do not fit together.
    """
    try:
        return preset_config(preset, **fields) if preset else NanoGPTConfig(**fields)
    except ValueError as error:
        raise UserError(str(error)) from error
