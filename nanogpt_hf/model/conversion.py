"""GPT-2, Qwen3 and Llama as transformers has them, to our class and back: fields of the config, names of the weights.

Importing this module makes NanoGPTForCausalLM.from_pretrained read plain Qwen3 and Llama checkpoints; GPT-2's have our
names already. A checkpoint's own two files do without it.
"""

from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ..common.errors import UserError
from .configuration_nanogpt import NanoGPTConfig
from .modeling_nanogpt import NanoGPTForCausalLM

# Model type, which is the architecture's name here and the export format's too -> transformers' own classes.
FAMILIES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "gpt2": (GPT2Config, GPT2LMHeadModel),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
# A field of Qwen3's and Llama's configs -> ours; what all name alike is kept as it is.
FIELDS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "rms_norm_eps": "layer_norm_epsilon",
    "attention_dropout": "attn_pdrop",
}
SHARED_FIELDS = (
    "head_dim vocab_size initializer_range tie_word_embeddings use_cache dtype bos_token_id eos_token_id pad_token_id"
).split()
# Inside one block: our name -> Qwen3's and Llama's, several where ours holds them stacked along the output dimension.
BLOCK = {
    "ln_1": ("input_layernorm",),
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.q_norm": ("self_attn.q_norm",),
    "attn.k_norm": ("self_attn.k_norm",),
    "attn.c_proj": ("self_attn.o_proj",),
    "ln_2": ("post_attention_layernorm",),
    "mlp.c_fc": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.c_proj": ("mlp.down_proj",),
}


def family_of(config: NanoGPTConfig) -> str | None:
    """The family whose own class is the same network as a model of ours, None where there is none."""
    family = config.architecture if config.architecture in FAMILIES else None
    if family in ("qwen3", "llama"):
        odd_scale = not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx
        odd_width = family == "llama" and config.n_embd % config.n_head  # which LlamaConfig refuses
        return None if odd_scale or odd_width else family
    return family


def native_fields(family: str, config: dict) -> dict:
    """The fields of a NanoGPTConfig for a Qwen3 or Llama config as its config.json holds it.

    Raises:
        UserError: our class has no place for a part of it; the message names the fields.
    """
    said = {name: value for name, value in config.items() if name != "layer_types"}
    theirs = FAMILIES[family][0].from_dict(said)
    rope, layer_types = (
        theirs.rope_parameters,
        config.get("layer_types") or getattr(theirs, "layer_types", []),
    )
    odd = {
        "hidden_act": theirs.hidden_act != "silu",
        "attention_bias": theirs.attention_bias,
        "mlp_bias": getattr(theirs, "mlp_bias", False),
        "layer_types": any(kind != "full_attention" for kind in layer_types),
        "rope_parameters": rope["rope_type"] != "default" or rope.get("partial_rotary_factor", 1) != 1,
    }
    if any(odd.values()):
        names = ", ".join(name for name, differs in odd.items() if differs)
        raise UserError(
            f"this {family} checkpoint differs from the {family} architecture of nanogpt_hf in {names}: only "
            "transformers' own class holds it."
        )
    fields = {ours: getattr(theirs, name) for name, ours in FIELDS.items()}
    fields |= {name: getattr(theirs, name) for name in SHARED_FIELDS}
    fields |= {"rope_theta": rope["rope_theta"], "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    return fields | {"architecture": family}


def native_config(plain: PreTrainedConfig) -> NanoGPTConfig | None:
    """Our config of the network that transformers' config describes, None where ours cannot hold it."""
    if plain.model_type not in FAMILIES:
        return None
    fields = plain.to_dict()
    if plain.model_type == "gpt2":
        named = {key: fields[key] for key in GPT2Config().to_dict() if key in fields}
        return NanoGPTConfig(**named | {"architectures": None})
    try:
        return NanoGPTConfig(**native_fields(plain.model_type, fields))
    except UserError:
        return None


def plain_config(config: NanoGPTConfig, family: str) -> PreTrainedConfig:
    """transformers' own config of the same network."""
    config_class, model_class = FAMILIES[family]
    if family == "gpt2":
        own = ("model_type", "architectures", "transformers_version")
        fields = {key: value for key, value in config.to_dict().items() if key not in own}
        return config_class(**{key: fields[key] for key in config_class().to_dict() if key in fields})
    fields = {theirs: getattr(config, ours) for theirs, ours in FIELDS.items()}
    fields |= {name: getattr(config, name) for name in SHARED_FIELDS}
    if fields["pad_token_id"] not in range(config.vocab_size):
        fields["pad_token_id"] = None  # their embeddings insist on a row for it
    return config_class(
        **fields
        | {
            "intermediate_size": config.inner_size,
            "hidden_act": "silu",
            "rope_parameters": {"rope_type": "default", "rope_theta": float(config.rope_theta)},
            "architectures": [model_class.__name__],
        }
    )


def weight_names(config: NanoGPTConfig) -> dict[str, list[str]]:
    """Every weight of a qwen3 or llama model of ours -> the weights of transformers' class that it stacks."""
    names = {
        "transformer.wte.weight": ["model.embed_tokens.weight"],
        "transformer.ln_f.weight": ["model.norm.weight"],
    }
    for layer in range(config.n_layer):
        for ours, theirs in BLOCK.items():
            if config.qk_norm or ours not in ("attn.q_norm", "attn.k_norm"):
                names[f"transformer.h.{layer}.{ours}.weight"] = [
                    f"model.layers.{layer}.{name}.weight" for name in theirs
                ]
    return names | {"lm_head.weight": ["lm_head.weight"]}


def plain_state_dict(model: NanoGPTForCausalLM) -> dict[str, torch.Tensor]:
    """The weights of a model of ours under the names of its family, the fused projections taken apart."""
    weights, config = model.state_dict(), model.config
    if family_of(config) == "gpt2":
        return weights
    heads = [rows * config.head_dim for rows in (config.n_head, config.n_kv_head, config.n_kv_head)]
    state: dict[str, torch.Tensor] = {}
    for ours, theirs in weight_names(config).items():
        sizes = heads if ours.endswith("c_attn.weight") else [len(weights[ours]) // len(theirs)] * len(theirs)
        parts = weights[ours].split(sizes)
        state |= {name: part.contiguous() for name, part in zip(theirs, parts, strict=True)}
    return state


def to_plain(model: NanoGPTForCausalLM) -> PreTrainedModel:
    """The same network in transformers' own class, its weights not copied; `family_of` says whether there is one."""
    family = family_of(model.config)
    with init_empty_weights():  # but with the buffers of its rotation
        plain = FAMILIES[family][1](plain_config(model.config, family))
    plain.load_state_dict(plain_state_dict(model), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain.eval()


def to_native(plain: PreTrainedModel, config: NanoGPTConfig) -> NanoGPTForCausalLM:
    """A model of transformers' own class in ours; only the projections that ours stacks are copied."""
    weights = plain.state_dict()
    with init_empty_weights():
        model = NanoGPTForCausalLM(config)
    if plain.config.model_type != "gpt2":
        for ours, theirs in weight_names(config).items():
            parts = [weights.pop(name) for name in theirs]
            weights[ours] = torch.cat(parts) if len(parts) > 1 else parts[0]
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.generation_config = plain.generation_config
    return model.eval()


def as_native(model: PreTrainedModel, **changes: Any) -> PreTrainedModel:
    """The model in our class, where it is one of transformers' that ours holds exactly; else as it is.

    Args:
        changes: fields of our config to set, dropouts for instance.
    """
    if type(model) not in [model_class for _, model_class in FAMILIES.values()]:
        return model
    config = native_config(model.config)
    if config is None:
        return model
    for name, value in changes.items():
        setattr(config, name, value)
    return to_native(model, config)


def _read(family: str, name: str, *args: Any, config: NanoGPTConfig | None = None, **kwargs: Any) -> tuple:
    """A model of ours and transformers' loading info, as `from_pretrained` gives them with output_loading_info."""
    places = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
    places = {key: kwargs[key] for key in places if key in kwargs}
    if config is None:
        config, kwargs = NanoGPTConfig.from_pretrained(name, return_unused_kwargs=True, **kwargs)
    theirs = plain_config(config, family)
    plain, info = FAMILIES[family][1].from_pretrained(name, *args, config=theirs, **kwargs | places)
    return to_native(plain, config), info


for _family in ("qwen3", "llama"):
    NanoGPTConfig.readers[_family] = partial(native_fields, _family)
    NanoGPTForCausalLM.readers[_family] = partial(_read, _family)
