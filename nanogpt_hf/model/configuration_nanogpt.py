"""The settings of a NanoGPT model: GPT-2's, and five switches that turn GPT-2's block into Qwen3's.

This file and modeling_nanogpt.py travel with every checkpoint, so they import nothing but transformers.
"""

from transformers import GPT2Config
from transformers.activations import ACT2FN

ARCHITECTURES = {
    "gpt2": {"norm": "layernorm", "positions": "learned", "qk_norm": False, "mlp": "gelu", "bias": True},
    "modern": {"norm": "rmsnorm", "positions": "rotary", "qk_norm": True, "mlp": "swiglu", "bias": False},
}
CHOICES = {"norm": ("layernorm", "rmsnorm"), "positions": ("learned", "rotary"), "mlp": ("gelu", "swiglu")}


class NanoGPTConfig(GPT2Config):
    """GPT2Config with the switches of the block.

    Args:
        architecture: "gpt2" (GPT-2 exactly) or "modern" (a Qwen3 block exactly); it sets every switch below that
            is not given. Switches that match neither read back as "custom", which only the native format can hold.
        norm: "layernorm" or "rmsnorm".
        positions: "learned" (a table of n_positions rows) or "rotary".
        qk_norm: normalise every query and key head before the rotation.
        mlp: "gelu" (n_inner defaults to 4 n_embd) or "swiglu" (to 8/3 n_embd, rounded up to a multiple of 64).
        bias: biases in the projections and LayerNorms.
        rope_theta: base of the rotary frequencies.

    Every other field is GPT2Config's. Field types are strict: a wrong type is an error.

    Raises:
        ValueError: for values that do not fit together, in one sentence.
    """

    model_type = "nanogpt"

    architecture: str = "gpt2"
    norm: str | None = None
    positions: str | None = None
    qk_norm: bool | None = None
    mlp: str | None = None
    bias: bool | None = None
    rope_theta: float | int = 10_000.0

    def __post_init__(self, **kwargs):
        if self.architecture not in (*ARCHITECTURES, "custom"):
            raise ValueError(f"architecture is {self.architecture!r}, use one of {', '.join(ARCHITECTURES)}.")
        for switch, value in ARCHITECTURES.get(self.architecture, ARCHITECTURES["gpt2"]).items():
            if getattr(self, switch) is None:
                setattr(self, switch, value)
        switches = {switch: getattr(self, switch) for switch in ARCHITECTURES["gpt2"]}
        self.architecture = next(
            (name for name, preset in ARCHITECTURES.items() if preset == switches), "custom"
        )
        # AutoModel cannot be written by save_pretrained of the head class, so all are named here.
        self.auto_map = {
            "AutoConfig": "configuration_nanogpt.NanoGPTConfig",
            "AutoModel": "modeling_nanogpt.NanoGPTModel",
            "AutoModelForCausalLM": "modeling_nanogpt.NanoGPTForCausalLM",
            "AutoModelForSequenceClassification": "modeling_nanogpt.NanoGPTForSequenceClassification",
        }
        kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)
        self._check()

    def _check(self):
        for switch, allowed in CHOICES.items():
            if getattr(self, switch) not in allowed:
                raise ValueError(f"{switch} is {getattr(self, switch)!r}, use one of {', '.join(allowed)}.")
        if self.activation_function not in ACT2FN:
            raise ValueError(
                f"activation_function is {self.activation_function!r}, which transformers does not have."
            )
        for field in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}, it must be at least 1.")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head}).")
        if self.positions == "rotary" and (self.n_embd // self.n_head) % 2:
            raise ValueError(
                f"rotary positions need an even head size, n_embd / n_head is {self.n_embd // self.n_head}."
            )
        for field in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}, it must be at least 0 and under 1.")
        if self.add_cross_attention:
            raise ValueError(
                "add_cross_attention is set, but this is a decoder without an encoder: unset it."
            )

    @property
    def inner_size(self) -> int:
        """Width of the MLP's hidden layer."""
        if self.n_inner is not None:
            return self.n_inner
        return 4 * self.n_embd if self.mlp == "gelu" else -(-8 * self.n_embd // 3 // 64) * 64

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """Also reads the configs of the two plain formats, GPT-2's and Qwen3's.

        Raises:
            ValueError: the checkpoint is of another model type, or uses a part of Qwen3 that we do not have.
        """
        config, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config.get("model_type", cls.model_type)
        if model_type == "gpt2":
            config = config | {"architecture": "gpt2", "architectures": None}
        elif model_type == "qwen3":
            config = _fields_from_qwen3(config)
        elif model_type != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a {model_type!r} model, which NanoGPT cannot read: "
                "give a checkpoint of model type nanogpt, gpt2 or qwen3."
            )
        return config | {"model_type": cls.model_type}, unused


# Qwen3's name of a field -> ours; what both name alike (vocab_size, the special tokens, …) is kept as it is.
QWEN3_FIELDS = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "rms_norm_eps": "layer_norm_epsilon",
    "attention_dropout": "attn_pdrop",
}
SHARED_FIELDS = (
    "vocab_size initializer_range tie_word_embeddings use_cache dtype bos_token_id eos_token_id pad_token_id"
).split()


def _fields_from_qwen3(config: dict) -> dict:
    # Before transformers 5 the base of the rotary frequencies was a field of its own.
    rope = {"rope_theta": config.get("rope_theta", 10_000.0)} | (config.get("rope_parameters") or {})
    heads, layer_types = config.get("num_attention_heads"), config.get("layer_types") or []
    odd = [
        name
        for name, differs in {
            "num_key_value_heads": config.get("num_key_value_heads") != heads,
            "head_dim": heads is None or config.get("head_dim", 128) * heads != config.get("hidden_size"),
            "hidden_act": config.get("hidden_act", "silu") != "silu",
            "attention_bias": config.get("attention_bias", False),
            "layer_types": any(kind != "full_attention" for kind in layer_types),
            "rope_parameters": rope.get("rope_type", "default") != "default" or config.get("rope_scaling"),
        }.items()
        if differs
    ]
    if odd:
        raise ValueError(f"this Qwen3 checkpoint differs from the modern architecture in {', '.join(odd)}.")
    fields = {ours: config[theirs] for theirs, ours in QWEN3_FIELDS.items() if theirs in config}
    fields |= {name: config[name] for name in SHARED_FIELDS if name in config}
    return fields | {
        "architecture": "modern",
        "rope_theta": rope["rope_theta"],
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
    }


def qwen3_fields(config: NanoGPTConfig) -> dict:
    """The arguments of the Qwen3Config that describes the same network as a modern NanoGPTConfig."""
    fields = {theirs: getattr(config, ours) for theirs, ours in QWEN3_FIELDS.items()}
    fields |= {name: getattr(config, name) for name in SHARED_FIELDS}
    if fields["pad_token_id"] not in range(config.vocab_size):
        fields["pad_token_id"] = None  # Qwen3's embedding insists on a row for it
    return fields | {
        "intermediate_size": config.inner_size,
        "num_key_value_heads": config.n_head,
        "head_dim": config.n_embd // config.n_head,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": float(config.rope_theta)},
        "architectures": ["Qwen3ForCausalLM"],
    }


NanoGPTConfig.register_for_auto_class()

__all__ = ["NanoGPTConfig"]
