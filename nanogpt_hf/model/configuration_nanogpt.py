"""The settings of a NanoGPT model: GPT-2's, and what turns GPT-2's block into Qwen3's or Llama's.

This file and modeling_nanogpt.py travel with every checkpoint, so they import nothing but transformers.
"""

from collections.abc import Callable
from typing import Any, ClassVar

from transformers import GPT2Config
from transformers.activations import ACT2FN

ARCHITECTURES = {
    "gpt2": {"norm": "layernorm", "positions": "learned", "qk_norm": False, "mlp": "gelu", "bias": True},
    "qwen3": {"norm": "rmsnorm", "positions": "rotary", "qk_norm": True, "mlp": "swiglu", "bias": False},
    "llama": {"norm": "rmsnorm", "positions": "rotary", "qk_norm": False, "mlp": "swiglu", "bias": False},
}
FORMER_NAMES = {"modern": "qwen3"}  # of older checkpoints and run folders
CHOICES = {"norm": ("layernorm", "rmsnorm"), "positions": ("learned", "rotary"), "mlp": ("gelu", "swiglu")}


class NanoGPTConfig(GPT2Config):
    """GPT2Config with the switches of the block.

    Args:
        architecture: "gpt2", "qwen3" or "llama", each exactly the block of that family; it sets every switch below
            that is not given. What matches none reads back as "custom", which only the native format can hold.
        norm: "layernorm" or "rmsnorm".
        positions: "learned" (a table of n_positions rows) or "rotary".
        qk_norm: normalise every query and key head before the rotation.
        mlp: "gelu" (n_inner defaults to 4 n_embd) or "swiglu" (to 8/3 n_embd, rounded up to a multiple of 64).
        bias: biases in the projections and LayerNorms.
        rope_theta: base of the rotary frequencies.
        n_kv_head: heads of keys and values, each shared by n_head / n_kv_head heads of queries (grouped-query
            attention, Ainslie et al. 2023); n_head by default.
        head_dim: size of a head; n_embd / n_head by default.

    Every other field is GPT2Config's. Field types are strict: a wrong type is an error.

    Attributes:
        readers: model type -> what makes our fields of another family's config. nanogpt_hf fills it in; a checkpoint
            alone reads nanogpt and gpt2.

    Raises:
        ValueError: for values that do not fit together, in one sentence.
    """

    model_type = "nanogpt"
    attribute_map = GPT2Config.attribute_map | {"num_key_value_heads": "n_kv_head"}
    readers: ClassVar[dict[str, Callable[[dict], dict]]] = {}

    architecture: str = "gpt2"
    norm: str | None = None
    positions: str | None = None
    qk_norm: bool | None = None
    mlp: str | None = None
    bias: bool | None = None
    rope_theta: float | int = 10_000.0
    n_kv_head: int | None = None
    head_dim: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.architecture = FORMER_NAMES.get(self.architecture, self.architecture)
        if self.architecture not in (*ARCHITECTURES, "custom"):
            raise ValueError(f"architecture is {self.architecture!r}, use one of {', '.join(ARCHITECTURES)}.")
        for switch, value in ARCHITECTURES.get(self.architecture, ARCHITECTURES["gpt2"]).items():
            if getattr(self, switch) is None:
                setattr(self, switch, value)
        self._check()
        if self.n_kv_head is None:
            self.n_kv_head = self.n_head
        if self.head_dim is None:
            self.head_dim = self.n_embd // self.n_head
        switches = {switch: getattr(self, switch) for switch in ARCHITECTURES["gpt2"]}
        self.architecture = next(
            (name for name, preset in ARCHITECTURES.items() if preset == switches), "custom"
        )
        if self.architecture == "gpt2" and (self.n_kv_head, self.head_dim * self.n_head) != (
            self.n_head,
            self.n_embd,
        ):
            self.architecture = "custom"
        # AutoModel cannot be written by save_pretrained of the head class, so all are named here.
        self.auto_map = {
            "AutoConfig": "configuration_nanogpt.NanoGPTConfig",
            "AutoModel": "modeling_nanogpt.NanoGPTModel",
            "AutoModelForCausalLM": "modeling_nanogpt.NanoGPTForCausalLM",
            "AutoModelForSequenceClassification": "modeling_nanogpt.NanoGPTForSequenceClassification",
        }
        kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        for switch, allowed in CHOICES.items():
            if getattr(self, switch) not in allowed:
                raise ValueError(f"{switch} is {getattr(self, switch)!r}, use one of {', '.join(allowed)}.")
        if self.activation_function not in ACT2FN:
            raise ValueError(
                f"activation_function is {self.activation_function!r}, which transformers does not have."
            )
        for field in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_kv_head", "head_dim"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field} is {value}, it must be at least 1.")
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head}).")
        if self.n_kv_head is not None and self.n_head % self.n_kv_head:
            raise ValueError(f"n_head ({self.n_head}) must be a multiple of n_kv_head ({self.n_kv_head}).")
        head_dim = self.head_dim or self.n_embd // self.n_head
        if self.positions == "rotary" and head_dim % 2:
            raise ValueError(f"rotary positions need an even head size, it is {head_dim}.")
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
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """Also reads the configs of GPT-2 and of the families in `readers`.

        Raises:
            ValueError: the checkpoint is of another model type, or has a part that ours does not.
        """
        config, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_type = config.get("model_type", cls.model_type)
        if model_type == "gpt2":
            config = config | {"architecture": "gpt2", "architectures": None}
        elif model_type in cls.readers:
            config = cls.readers[model_type](config)
        elif model_type != cls.model_type:
            known = ", ".join([cls.model_type, "gpt2", *cls.readers])
            more = "" if cls.readers else " (qwen3 and llama too after `import nanogpt_hf`)"
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a {model_type!r} model, which NanoGPT cannot read: "
                f"give a checkpoint of model type {known}{more}."
            )
        return config | {"model_type": cls.model_type}, unused


NanoGPTConfig.register_for_auto_class()

__all__ = ["NanoGPTConfig"]
