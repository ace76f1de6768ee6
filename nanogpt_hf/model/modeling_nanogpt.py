"""The network: a GPT of GPT-2's block, Qwen3's or Llama's, chosen by the switches of its config.

Shapes: B batch, T time (tokens), C channels (n_embd), H heads, K heads of keys and values (n_kv_head), D head size
(head_dim), V vocabulary.
This file and configuration_nanogpt.py travel with every checkpoint, so they import nothing but torch,
transformers and its safetensors.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F
from transformers import (
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_nanogpt import NanoGPTConfig


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm (Zhang and Sennrich 2019), computed in float32 whatever comes in, as Qwen3's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


def make_norm(config: NanoGPTConfig, size: int) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(size, eps=config.layer_norm_epsilon)
    return nn.LayerNorm(size, eps=config.layer_norm_epsilon, bias=config.bias)


def make_projection(config: NanoGPTConfig, inputs: int, outputs: int) -> nn.Module:
    """GPT-2's checkpoints hold Conv1D's transposed weights and a bias; without a bias it is a plain Linear."""
    return Conv1D(outputs, inputs) if config.bias else nn.Linear(inputs, outputs, bias=False)


def rotation_angles(config: NanoGPTConfig, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of the rotary positions (Su et al. 2021), each B 1 T D in float32.

    Computed at every call: a buffer would come back from `from_pretrained` uninitialised.
    """
    D = config.head_dim
    frequencies = config.rope_theta ** (-torch.arange(0, D, 2, device=position_ids.device).float() / D)  # D/2
    angles = position_ids[:, None, :, None].float() * frequencies  # B 1 T D/2
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair of channels (d, d + D/2) of x (B H T D) by the angle of its position."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same attention as the fused kernels, written out: B H T D and B K T D in, B T H D and weights B H T T out."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


class NanoGPTAttention(nn.Module):
    """Causal self-attention of H heads, in groups of H / K with one head of keys and values each."""

    def __init__(self, config: NanoGPTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.head_dim = config.head_dim
        self.heads = (config.n_head, config.n_kv_head, config.n_kv_head)  # of queries, keys and values
        if config.n_kv_head < config.n_head:
            self.num_key_value_groups = config.n_head // config.n_kv_head  # transformers' kernels ask for it
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scaling /= layer_idx + 1
        self.c_attn = make_projection(config, config.n_embd, sum(self.heads) * self.head_dim)
        self.c_proj = make_projection(config, config.n_head * self.head_dim, config.n_embd)
        self.c_proj.ends_residual_branch = True
        if config.qk_norm:
            self.q_norm = make_norm(config, self.head_dim)
            self.k_norm = make_norm(config, self.head_dim)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        B, T, _ = hidden_states.shape
        projected = self.c_attn(hidden_states).view(B, T, -1, self.head_dim)
        query, key, value = projected.split(self.heads, dim=2)  # B T H D, B T K D twice
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
        )  # B H T D, B K T D
        if rotation is not None:
            query, key = rotate(query, *rotation), rotate(key, *rotation)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # B K (past + T) D
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        mixed, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=self.config.attn_pdrop if self.training else 0.0,
            **kwargs,
        )  # B T H D
        return self.resid_dropout(self.c_proj(mixed.reshape(B, T, -1))), weights


# transformers' activation -> the argument of F.gelu that is the same function, in one kernel instead of eight.
GELU = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}


class NanoGPTMLP(nn.Module):
    """GELU: c_proj(gelu(c_fc x)). SwiGLU (Shazeer 2020): c_fc holds gate and value side by side."""

    def __init__(self, config: NanoGPTConfig):
        super().__init__()
        self.gated = config.mlp == "swiglu"
        self.c_fc = make_projection(config, config.n_embd, config.inner_size * (2 if self.gated else 1))
        self.c_proj = make_projection(config, config.inner_size, config.n_embd)
        self.c_proj.ends_residual_branch = True
        name = config.activation_function
        self.activation = partial(F.gelu, approximate=GELU[name]) if name in GELU else ACT2FN[name]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = self.c_fc(hidden_states)
        if self.gated:
            gate, value = hidden_states.chunk(2, dim=-1)
            hidden_states = F.silu(gate) * value
        else:
            hidden_states = self.activation(hidden_states)
        return self.dropout(self.c_proj(hidden_states))


class NanoGPTBlock(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: NanoGPTConfig, layer_idx: int):
        super().__init__()
        self.ln_1 = make_norm(config, config.n_embd)
        self.attn = NanoGPTAttention(config, layer_idx)
        self.ln_2 = make_norm(config, config.n_embd)
        self.mlp = NanoGPTMLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        hidden_states = hidden_states + self.attn(self.ln_1(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class NanoGPTPreTrainedModel(PreTrainedModel):
    config: NanoGPTConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NanoGPTBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": NanoGPTBlock,
        "attentions": OutputRecorder(NanoGPTAttention, index=1, layer_name=".attn"),
    }
    # OpenAI's checkpoints store the causal mask of every layer.
    _keys_to_ignore_on_load_unexpected = [r"h\.\d+\.attn\.(masked_)?bias$"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """GPT-2's initialisation: normal of std 0.02, and 1/sqrt(2 n_layer) of it where a residual branch ends."""
        super()._init_weights(module)
        if isinstance(module, (Conv1D, nn.Linear)):
            std = self.config.initializer_range
            if getattr(module, "ends_residual_branch", False):
                std /= math.sqrt(2 * self.config.n_layer)
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)


def fits_context(config: NanoGPTConfig, tokens: int, position_ids: torch.LongTensor | None) -> bool:
    """Whether so many tokens, the past ones among them, have places; of texts packed into a row each begins at 0."""
    if tokens <= config.n_positions or position_ids is None:
        return tokens <= config.n_positions
    # Asking stalls the device, but only here, and the mask of packed texts asks it too.
    return torch.compiler.is_compiling() or bool((position_ids < config.n_positions).all())


class NanoGPTModel(NanoGPTPreTrainedModel):
    """Token ids (B T) to the last hidden states (B T C)."""

    def __init__(self, config: NanoGPTConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.positions == "learned":
            self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([NanoGPTBlock(config, layer_idx) for layer_idx in range(config.n_layer)])
        self.ln_f = make_norm(config, config.n_embd)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.wte

    def set_input_embeddings(self, new_embeddings: nn.Module) -> None:
        self.wte = new_embeddings

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Raises ValueError when past and present tokens together are more than n_positions."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give either input_ids or inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)  # B T C
        T = inputs_embeds.shape[1]
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        # A static cache counts in a tensor and bounds its own length; asking it would stall the device.
        if not fits_context(self.config, T + (past if isinstance(past, int) else 0), position_ids):
            raise ValueError(
                f"The sequence has {T + past} tokens, more than the model's context of {self.config.n_positions} "
                "(n_positions): shorten it, or generate with nanogpt_hf.generation, which slides the window."
            )
        given_positions = position_ids
        if position_ids is None:
            position_ids = (torch.arange(T, device=inputs_embeds.device) + past).unsqueeze(0)  # 1 T

        rotation = None
        if self.config.positions == "learned":
            inputs_embeds = inputs_embeds + self.wpe(position_ids)
        else:
            rotation = rotation_angles(self.config, position_ids)
        if torch.is_autocast_enabled(inputs_embeds.device.type):
            # The sums of the residual branches in the branches' own dtype halve what moves between the kernels.
            inputs_embeds = inputs_embeds.to(torch.get_autocast_dtype(inputs_embeds.device.type))
        mask = None
        given = (attention_mask, past_key_values, given_positions)
        if self.config._attn_implementation != "sdpa" or any(part is not None for part in given):
            mask = create_causal_mask(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                # To look for packed sequences in them stalls the device; in those made here there are none.
                position_ids=given_positions,
            )  # else the kernel masks what is to come by itself, and a CUDA graph can record it
        hidden_states = self.drop(inputs_embeds)
        for block in self.h:
            hidden_states = block(
                hidden_states,
                attention_mask=mask,
                past_key_values=past_key_values,
                rotation=rotation,
                position_ids=position_ids,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(hidden_states), past_key_values=past_key_values if use_cache else None
        )


class NanoGPTForCausalLM(NanoGPTPreTrainedModel, GenerationMixin):
    """The network with its language-modelling head, tied to the token embedding.

    Attributes:
        readers: model type -> what makes a model of another family's checkpoint, as `from_pretrained` does and with
            its loading info. nanogpt_hf fills it in.
    """

    readers: ClassVar[dict[str, Callable[..., Any]]] = {}
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: NanoGPTConfig):
        super().__init__(config)
        self.transformer = NanoGPTModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        shift_labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B T V), and the loss in nats when there are labels.

        Args:
            labels: the input ids (B T); shifted by one here. -100 is left out of the loss.
            shift_labels: the next tokens (B T), already shifted; used instead of labels.
            logits_to_keep: compute the logits of the last so many positions only; 0 means all.
            num_items_in_batch: divide the summed loss by this many tokens instead of by this batch's own, so
                that the losses of accumulated micro-batches add up to the loss of the whole batch.
        """
        output = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None or shift_labels is not None:
            loss = self.loss_function(
                logits,
                labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
                shift_labels=shift_labels,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *args: Any,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Reads a native or a plain gpt2 checkpoint, or one of the families in `readers`, from a folder or the Hub.

        Only safetensors are read, unless use_safetensors=False asks for pickles.

        Raises:
            ValueError: the weights are missing, damaged, or not those that the config describes.
            OSError: there is no such checkpoint, or it cannot be reached.
        """
        name = pretrained_model_name_or_path
        kwargs.setdefault("use_safetensors", True)
        plain = {} if name is None else PreTrainedConfig.get_config_dict(name, **kwargs)[0]
        named = str(plain.get("transformers_weights") or "model.safetensors")
        if kwargs["use_safetensors"] and not named.endswith((".safetensors", ".safetensors.index.json")):
            raise ValueError(f"{name} names {named} for its weights, and pickles are not read.")
        load = cls.readers.get(plain.get("model_type"), super().from_pretrained)
        verbosity = logging.get_verbosity()
        logging.set_verbosity(
            max(verbosity, logging.ERROR)
        )  # a table of keys is what the errors here replace
        try:
            model, info = load(name, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
        except SafetensorError as error:
            raise ValueError(
                f"the weights of {name} are damaged or incomplete ({error}): copy them again."
            ) from error
        except OSError as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"{name} has no weights in safetensors, and pickles are not read: {reason}"
            ) from error
        finally:
            logging.set_verbosity(verbosity)
        mismatch = describe_mismatch(info, ignore_mismatched_sizes)
        if mismatch:
            fault = "its config.json does not describe its weights" if plain else "it has no config.json"
            raise ValueError(f"the checkpoint {name} cannot be read: {fault} ({mismatch}).")
        return (model, info) if output_loading_info else model


class NanoGPTForSequenceClassification(GenericForSequenceClassification, NanoGPTPreTrainedModel):
    """The network with num_labels scores for a text (B num_labels), read off its last token that is no padding."""

    base_model_prefix = "transformer"

    def __init__(self, config: NanoGPTConfig):
        # Not the generic one: it asks AutoModel for the network, which knows none that came with a checkpoint.
        NanoGPTPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.transformer = NanoGPTModel(config)
        self.score = nn.Linear(config.n_embd, config.num_labels, bias=False)
        self.post_init()


def describe_mismatch(info: dict, ignore_mismatched_sizes: bool) -> str | None:
    """What transformers found wrong while it loaded weights, in a few words, or None."""
    for key, saved, wanted in sorted(info["mismatched_keys"]):
        if not ignore_mismatched_sizes:
            return f"{key} has the shape {list(saved)} and should have {list(wanted)}"
    if info["missing_keys"]:
        return f"it lacks {len(info['missing_keys'])} weights, {min(info['missing_keys'])} among them"
    # Other heads may lie beside ours, but all of the network itself must have found its place.
    stray = [
        key
        for key in info["unexpected_keys"]
        if key.split(".")[0] in ("transformer", "model", "h", "wte", "wpe")
    ]
    return f"it has {len(stray)} weights more, {min(stray)} among them" if stray else None


NanoGPTModel.register_for_auto_class("AutoModel")
NanoGPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
NanoGPTForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = ["NanoGPTForCausalLM", "NanoGPTForSequenceClassification", "NanoGPTModel", "NanoGPTPreTrainedModel"]
