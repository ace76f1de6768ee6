"""Adapters on GPT-2 and on our own models, through peft: what is adapted, added words, and merging.

The adapted model stays a NanoGPTForCausalLM whose projections peft has wrapped, without PeftModel around it, so that
the loop, the compiler and generation treat it as any other. Its modules have the names of GPT2LMHeadModel's: what is
saved loads with peft on the plain base.

The base's weights stay in float32, and are not trained: bfloat16 would save 2 bytes a weight (0.25 of 22 GiB for
GPT-2 at batch 16, context 1,024), but validation would no longer measure what is saved. Where memory is short,
load_in_4bit and load_in_8bit save more.
"""

import importlib.util
import os
import warnings

import torch
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

from ..common.errors import UserError
from ..common.paths import check_model_name
from ..common.recipes import command
from ..common.settings import FinetuningSettings
from ..common.text import first_line, nearest, without_home
from ..model import NanoGPTForCausalLM
from ..model.loading import find_file, load_native, put_on_base, suppress_padding

SHORT_NAMES = {
    "attention": ["c_attn", "attn.c_proj"],
    "mlp": ["c_fc", "mlp.c_proj"],
    "all": ["c_attn", "c_proj", "c_fc"],
}


def load_base(name: str, whole: bool = False, **options) -> NanoGPTForCausalLM:
    """The base of a fine-tuning in float32, from a folder or the Hub.

    Args:
        whole: all of it is to be trained, so that no adapter has to load on it.
        options: of `from_pretrained`.

    Raises:
        UserError: it is not there, not a causal GPT-2 or model of ours, or no adapter of it could be loaded.
    """
    check_model_name(name)
    if find_file(name, "adapter_config.json") is not None:
        raise UserError(
            f"{name} holds an adapter, and a base is a whole model: merge it first ({command('share')} --merge), or go "
            "on with its run by --resume_from_checkpoint."
        )
    try:
        config = PreTrainedConfig.get_config_dict(name)[0]
        kind = (config.get("architectures") or [config.get("model_type") or "model of no known kind"])[0]
        causal = "For" not in kind or kind.endswith("ForCausalLM")
        if config.get("model_type") not in ("gpt2", "nanogpt", "qwen3") or not causal:
            raise UserError(
                f"{name} holds a {kind}, but a base is a causal GPT-2 or a model of nanogpt_hf: give another."
            )
        if config["model_type"] == "qwen3" and not whole:
            raise UserError(
                f"{name} is a plain qwen3 checkpoint, and an adapter trained here would not load on it: its queries, "
                "keys and values are three modules, here they are one; give the run folder that it came from, or --full."
            )
        return load_native(name, dtype=torch.float32, **options)
    except OSError as error:
        raise UserError(f"the base {name} cannot be loaded: {first_line(error)}.") from error


def quantization(settings: FinetuningSettings, device_type: str) -> dict:
    """The arguments of `from_pretrained` for a base in 4 or 8 bits; none for one in float32.

    Raises:
        UserError: there is no CUDA, or bitsandbytes is not installed.
    """
    if not (settings.load_in_4bit or settings.load_in_8bit):
        return {}
    flag = "--load_in_4bit" if settings.load_in_4bit else "--load_in_8bit"
    if device_type != "cuda":
        raise UserError(f"{flag} needs a CUDA GPU, and none is used: leave it out.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{flag} needs bitsandbytes, which is not installed: pip install bitsandbytes.")
    config = BitsAndBytesConfig(
        load_in_4bit=settings.load_in_4bit,
        load_in_8bit=settings.load_in_8bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}


def find_targets(model: nn.Module, names: list[str]) -> list[str]:
    """The modules that `--target_modules` means, as peft takes them: ends of names.

    Raises:
        UserError: one matches no projection, or is an embedding that the head shares.
    """
    projections = [name for name, module in model.named_modules() if isinstance(module, (Conv1D, nn.Linear))]
    targets = []
    for name in names:
        for target in SHORT_NAMES.get(name, [name]):
            if not any(f".{module}".endswith(f".{target}") for module in projections):
                ends = {".".join(module.split(".")[-n:]) for module in projections for n in (1, 2)}
                ends -= {"lm_head"} if model.config.tie_word_embeddings else set()
                known = sorted([*SHORT_NAMES, *(end for end in ends if not end[0].isdigit())])
                near = nearest(target, known)
                near = [near] if near else known
                raise UserError(
                    f"--target_modules {name} matches no projection of the base: use {', '.join(near)}."
                )
            if target.split(".")[-1] == "lm_head" and model.config.tie_word_embeddings:
                raise UserError(
                    "--target_modules lm_head cannot be merged, because the head's weights are the embedding's too: "
                    "leave it out."
                )
            targets.append(target)
    return sorted(set(targets))


def add_adapter(model: NanoGPTForCausalLM, settings: FinetuningSettings, new_tokens: list[int]) -> None:
    """Put a fresh adapter on the model, in place; nothing else of it trains any more.

    Args:
        new_tokens: ids whose embeddings are trained and saved with the adapter.

    Raises:
        UserError: --target_modules names what the model does not have.
    """
    from peft import LoraConfig

    targets = find_targets(model, settings.target_modules)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        use_dora=settings.use_dora,
        use_rslora=settings.use_rslora,
        fan_in_fan_out=model.config.bias,  # then it is Conv1D, which holds its weight transposed
        trainable_token_indices={"wte": new_tokens} if new_tokens else None,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="fan_in_fan_out"
        )  # where Conv1D and Linear are both adapted
        model.add_adapter(config)
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
    return inside if not inside.startswith(os.pardir) else without_home(os.path.abspath(name))


def extend_embedding(
    model: NanoGPTForCausalLM, before: PreTrainedTokenizerFast, after: PreTrainedTokenizerFast
) -> list[int]:
    """Give the tokens that `after` has beyond `before` an embedding: the mean of the pieces they replace.

    Returns:
        Their ids.
    """
    known = before.get_vocab()
    new = {id: token for token, id in after.get_vocab().items() if token not in known}
    rows = max(model.config.vocab_size, max(new, default=0) + 1)
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


def describe_trained(model: PreTrainedModel) -> str:
    """What trains: parameters, share, and the memory of weights, gradients and AdamW."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    more = sum(p.numel() * (p.element_size() + 8) for p in model.parameters() if p.requires_grad)
    return (
        f"{trained:,} of {total:,} parameters ({trained / total:.2%}); weights {held / 2**20:,.1f} MiB, gradients and "
        f"AdamW {more / 2**20:,.1f} MiB, activations come on top"
    )


def load_merged(folder: str | os.PathLike) -> tuple[NanoGPTForCausalLM, PreTrainedTokenizerFast]:
    """The base of a folder's adapter in float32 with the adapter merged into it, and its tokenizer.

    Raises:
        UserError: the adapter or its base cannot be read, or it is another base than it was trained on.
    """
    adapted, tokenizer = put_on_base(str(folder), load_base)
    model = adapted.merge_and_unload()
    suppress_padding(tokenizer, model)
    return model.eval(), tokenizer
