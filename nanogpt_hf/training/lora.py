"""Adapters on any causal language model, through peft: what is adapted, added words, and merging.

The adapted model stays of its own class, its projections wrapped by peft without PeftModel around it, so that the loop,
the compiler and generation treat it as any other.

An adapter must load on its base for those who do not have this package, so it is trained on the class that the base's
own config.json names: GPT-2 and ours are held in our class, whose modules have the names of GPT2LMHeadModel's; a plain
Qwen3 or Llama in transformers' own, where queries, keys and values are three modules and not one.

The base's weights stay in float32, and are not trained: bfloat16 would save 2 bytes a weight (0.25 of 22 GiB for
GPT-2 at batch 16, context 1,024), but validation would no longer measure what is saved.
"""

import os
import warnings
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from ..common.errors import UserError
from ..common.paths import asks_the_hub, check_model_name
from ..common.recipes import command
from ..common.settings import FinetuningSettings
from ..common.text import first_line, nearest, without_home
from ..model.bases import PACKAGED, local_checkpoint
from ..model.checking import find_file
from ..model.conversion import as_native
from ..model.loading import load_causal_lm, load_native, put_on_base, suppress_padding

# A short name of --target_modules -> what the path of a projection has in it, in all families.
SHORT_NAMES = {"attention": ("attn", "attention"), "mlp": ("mlp", "ffn", "feed_forward"), "all": ("",)}


@asks_the_hub
def load_base(name: str, whole: bool = False, **options: Any) -> PreTrainedModel:
    """The base of a fine-tuning in float32, by its name, from a folder or the Hub.

    Args:
        whole: all of it is to be trained, so that no adapter has to load on it.
        options: of `from_pretrained`; dropouts only where our class holds the base.

    Raises:
        UserError: it is not there, it is no causal language model, or it has no dropout that could be set.
    """
    check_model_name(name)
    folder = local_checkpoint(name)
    if find_file(folder, "adapter_config.json") is not None:
        raise UserError(
            f"{name} holds an adapter, and a base is a whole model: merge it first ({command('share')} --merge), or go "
            "on with its run by --resume_from_checkpoint."
        )
    try:
        config = PreTrainedConfig.get_config_dict(folder)[0]
    except OSError as error:
        advice = "" if os.path.isdir(name) else f"; without the Hub, give a folder or {' or '.join(PACKAGED)}"
        raise UserError(f"the base {name} cannot be loaded: {first_line(error)}{advice}.") from error
    kind = (config.get("architectures") or [""])[0]
    if config.get("model_type") in ("gpt2", "nanogpt") and (
        "For" not in kind or kind.endswith("ForCausalLM")
    ):
        return load_native(folder, dtype=torch.float32, **options)
    dropouts = {key: options.pop(key) for key in [*options] if key.endswith("_pdrop")}
    model = load_causal_lm(folder, torch.float32, **options)
    model = as_native(model, **dropouts) if whole else model
    if any(getattr(model.config, key, None) != value for key, value in dropouts.items()):
        raise UserError(
            f"{name} is trained as a {type(model).__name__}, which has no {' and no '.join(dropouts)} to set: leave "
            "--dropout out, --lora_dropout is the adapter's own."
        )
    return model


def find_targets(model: PreTrainedModel, names: list[str]) -> list[str]:
    """The modules that `--target_modules` means, as peft takes them: ends of names.

    Raises:
        UserError: one matches no projection that an adapter can be put on, or is an embedding that the head shares.
    """
    projections = {name for name, module in model.named_modules() if isinstance(module, (Conv1D, nn.Linear))}
    head = {name for name, module in model.named_modules() if module is model.get_output_embeddings()}
    blocks = called_projections(model) - head
    if "mamba" in model.config.model_type:
        blocks = {name for name in blocks if not name.endswith("out_proj")}  # which peft refuses
    targets = set()
    for name in names:
        parts = SHORT_NAMES.get(name)
        if parts:
            found = {module for module in blocks if any(part in module for part in parts)}
            ends = {".".join(module.split(".")[-2:]) for module in found}
        else:
            ends = {name} if any(f".{module}".endswith(f".{name}") for module in projections) else set()
        if not ends:
            known = {".".join(module.split(".")[-n:]) for module in blocks for n in (1, 2)}
            known = sorted([*SHORT_NAMES, *(end for end in known if not end[0].isdigit())])
            near = nearest(name, known)
            raise UserError(
                f"--target_modules {name} matches no projection of the base: use "
                f"{', '.join([near] if near else known)}."
            )
        if model.config.tie_word_embeddings and ends & {module.split(".")[-1] for module in head}:
            raise UserError(
                f"--target_modules {name} cannot be merged, because the head's weights are the embedding's too: "
                "leave it out."
            )
        targets |= ends
    return sorted(targets)


@torch.no_grad()
def called_projections(model: PreTrainedModel) -> set[str]:
    """The projections that a training step calls as modules: what only lends its weight (some of Mamba's, whose
    kernel is one function) would pass an adapter by."""
    called, hooks = set(), []
    for name, module in model.named_modules():
        if isinstance(module, (Conv1D, nn.Linear)):
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: called.add(name)))
    was_training = model.training
    try:
        with torch.random.fork_rng():  # dropout must not change what an adapter begins with
            model.train()(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return called


def add_adapter(model: PreTrainedModel, settings: FinetuningSettings, new_tokens: list[int]) -> None:
    """Put a fresh adapter on the model, in place; nothing else of it trains any more.

    Args:
        new_tokens: ids whose embeddings are trained and saved with the adapter.

    Raises:
        UserError: --target_modules names what the model does not have, or peft refuses it.
    """
    from peft import LoraConfig

    targets = find_targets(model, settings.target_modules)
    embeddings = [model.get_input_embeddings()]
    embeddings += [] if model.config.tie_word_embeddings else [model.get_output_embeddings()]
    named = {module: name.split(".")[-1] for name, module in model.named_modules()}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        use_dora=settings.use_dora,
        use_rslora=settings.use_rslora,
        trainable_token_indices={named[module]: new_tokens for module in embeddings} if new_tokens else None,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # peft sets it by each module's class
        try:
            model.add_adapter(config)
        except ValueError as error:
            raise UserError(f"peft puts no adapter on this base: {first_line(error)}.") from error
    config.base_model_name_or_path = public_base(settings.model_name_or_path)
    for module in model.modules():
        # Autocast turns inputs into bfloat16; peft would turn them into the adapter's float32 before.
        if hasattr(module, "lora_A"):
            module.cast_input_dtype_enabled = False


def public_base(name: str) -> str:
    """What an adapter calls its base: a Hub id, or a folder as seen from here, without the user's home."""
    if not os.path.isdir(name):
        return name
    inside = os.path.relpath(name)
    return without_home(inside if not inside.startswith(os.pardir) else os.path.abspath(name))


def extend_embedding(
    model: PreTrainedModel, before: PreTrainedTokenizerFast, after: PreTrainedTokenizerFast
) -> list[int]:
    """Give the tokens that `after` has beyond `before` an embedding: the mean of the pieces they replace.

    Returns:
        Their ids.
    """
    known = before.get_vocab()
    new = {id: token for token, id in after.get_vocab().items() if token not in known}
    rows = max(model.get_input_embeddings().weight.shape[0], max(new, default=0) + 1)
    model.resize_token_embeddings(rows, mean_resizing=False)
    pieces = {
        id: [piece.id for piece in before.backend_tokenizer.model.tokenize(token)]
        for id, token in new.items()
    }
    for module in {model.get_input_embeddings(), model.get_output_embeddings()}:
        weight = module.weight.data
        for id, parts in pieces.items():
            weight[id] = weight[parts].mean(dim=0)
    return sorted(new)


@torch.no_grad()
def embed_new_tokens(model: PreTrainedModel, ids: list[int]) -> None:
    """Give tokens that no text has had yet a row in embedding and head, the mean of all others, and let them be sampled."""
    if max(ids) >= model.config.vocab_size:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    for module in {model.get_input_embeddings(), model.get_output_embeddings()}:
        module.weight[ids] = module.weight[: min(ids)].mean(dim=0)
    suppressed = {*(model.generation_config.suppress_tokens or [])} - {*ids}
    model.generation_config.suppress_tokens = sorted(suppressed) or None


def adapter_size(model: PreTrainedModel) -> int:
    """Parameters of the adapter on a model, which is frozen beside it; 0 where the model itself trains."""
    trained = model.num_parameters(only_trainable=True)
    return trained if trained < model.num_parameters() else 0


def describe_trained(model: PreTrainedModel) -> str:
    """What trains: parameters, share, and the memory of weights, gradients and AdamW."""
    adapter = adapter_size(model)
    own = model.num_parameters() - adapter
    what = (
        f"an adapter of {adapter:,} parameters, {adapter / own:.2%} of the model's"
        if adapter
        else "all of it"
    )
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    more = sum(p.numel() * (p.element_size() + 8) for p in model.parameters() if p.requires_grad)
    return f"{what}; weights {held / 2**20:,.1f} MiB, gradients and AdamW {more / 2**20:,.1f} MiB, activations come on top"


def load_merged(folder: str | os.PathLike) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The base of a folder's adapter in float32 with the adapter merged into it, and its tokenizer.

    Raises:
        UserError: the adapter or its base cannot be read, or it is another base than it was trained on.
    """
    adapted, tokenizer = put_on_base(str(folder), load_base)
    model = adapted.merge_and_unload()
    suppress_padding(tokenizer, model)
    return model.eval(), tokenizer
