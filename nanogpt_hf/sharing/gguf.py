"""A plain checkpoint as one GGUF file, for llama.cpp and what is built on it: Ollama, LM Studio and others.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What it cannot hold: the choice of tokens that
are never sampled (`suppress_tokens`); of those only the padding of the embedding is left out, with its rows.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from ..common.errors import UserError
from ..common.files import files_written_whole
from .gguf_tokenizer import add_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

QUANTIZATIONS = {
    "f32": "ALL_F32",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
}  # -> its name as a file's type

# llama.cpp knows GELU in its tanh form alone. The exact one differs from it by less than 5e-4, as does the table in
# float16 that llama.cpp computes either of them from.
GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu")

OLLAMA_NAMES = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repeat_penalty",
    "penalty_last_n": "repeat_last_n",
}


def export_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: str | os.PathLike,
    quantization: str = "f32",
    name: str | None = None,
) -> str:
    """`write_gguf` into a folder, with the Modelfile by which Ollama takes it in.

    Args:
        name: of the model, a Hub id among others; by default the folder's.

    Returns:
        The name of the GGUF file: the model's, and how it is quantised.

    Raises:
        UserError: as write_gguf.
    """
    name = (name or Path(folder).resolve().name).split("/")[-1]
    name = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.") or "model"
    file = f"{name}-{quantization.upper()}.gguf"
    with files_written_whole(Path(folder)) as staging:
        write_gguf(model, tokenizer, staging / file, quantization, name)
        (staging / "Modelfile").write_text(modelfile(model, tokenizer, file), encoding="utf-8")
    return file


def modelfile(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, file: str) -> str:
    """Ollama's Modelfile: it does not read the sampling settings of a GGUF, and would wrap a text as a chat."""
    sampling, context = sampling_settings(model), model.config.max_position_embeddings
    lines = [f"FROM ./{file}"]
    if not tokenizer.chat_template:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    lines += [f"PARAMETER {theirs} {sampling[ours]:g}" for ours, theirs in OLLAMA_NAMES.items()]
    # A model that was never shown the end of a text goes on for ever.
    lines += [f"PARAMETER num_ctx {context}", f"PARAMETER num_predict {context}"]
    return "\n".join(lines) + "\n"


def write_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    path: str | os.PathLike,
    quantization: str = "f32",
    name: str | None = None,
) -> None:
    """Write a model with its tokenizer, its sampling settings and its chat template, if it has one.

    Args:
        model: a GPT2LMHeadModel, Qwen3ForCausalLM or LlamaForCausalLM.
        quantization: of the matrices; f32, bf16, or q8_0 (8 bits a weight, in blocks of 32 with one scale).
        name: what programs show, by default that of the file.

    Raises:
        UserError: the model or its tokenizer is nothing that llama.cpp computes alike, or pip `gguf` is missing.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            "writing GGUF needs the package gguf: pip install -c constraints.txt -e '.[gguf]'."
        ) from error
    check_representable(model.config)
    rows = vocabulary_rows(model, tokenizer)
    writer = gguf.GGUFWriter(path, model.config.model_type)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name or Path(path).stem)
    writer.add_file_type(gguf.LlamaFileType[QUANTIZATIONS[quantization]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(writer, model.config, rows)
    _add_sampling(writer, sampling_settings(model))
    add_tokenizer(writer, tokenizer, rows)
    _add_weights(writer, model, rows, gguf.GGMLQuantizationType[quantization.upper()])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_representable(config: PreTrainedConfig) -> None:
    """Raises UserError where llama.cpp would compute something else than the model does."""
    rope = getattr(config, "rope_parameters", None) or {}
    layers = getattr(config, "layer_types", None) or []
    if config.model_type == "gpt2":
        differs = {
            "activation_function": config.activation_function not in GELUS,
            "scale_attn_weights": not config.scale_attn_weights,
            "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        }
    elif config.model_type in ("qwen3", "llama"):
        differs = {
            "hidden_act": config.hidden_act != "silu",
            "attention_bias": config.attention_bias,
            "mlp_bias": getattr(config, "mlp_bias", False),
            "layer_types": any(kind != "full_attention" for kind in layers),
            "rope_parameters": rope.get("rope_type", "default") != "default",
        }
    else:
        raise UserError(
            f"GGUF is written for gpt2, qwen3 and llama models, and this is a {config.model_type}."
        )
    odd = [field for field, fault in differs.items() if fault]
    if odd:
        raise UserError(
            f"this {config.model_type} model differs from what llama.cpp computes in {', '.join(odd)} "
            f"({', '.join(str(getattr(config, field)) for field in odd)}): share it in its plain format."
        )


# --- settings ---


def _add_shape(writer: "GGUFWriter", config: PreTrainedConfig, rows: int) -> None:
    writer.add_vocab_size(rows)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    head_dim = _head_dim(config)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def sampling_settings(model: PreTrainedModel) -> dict[str, float | int]:
    """How the model's generation config draws the next token, in llama.cpp's terms.

    All of them, as llama.cpp has defaults of its own. A temperature of 0 takes the likeliest token.
    """
    generation = model.generation_config

    def given(field: str, otherwise: float) -> float:
        value = getattr(generation, field)
        return otherwise if value is None else value

    return {
        "temp": given("temperature", 1.0) if generation.do_sample else 0.0,
        "top_k": given("top_k", 50),  # where a generation config says nothing, transformers takes the top 50
        "top_p": given("top_p", 1.0),
        "min_p": given("min_p", 0.0),
        "penalty_repeat": given("repetition_penalty", 1.0),
        "penalty_last_n": -1,  # the whole context
    }


def _add_sampling(writer: "GGUFWriter", settings: dict[str, float | int]) -> None:
    for setting, value in settings.items():
        getattr(writer, f"add_sampling_{setting}")(value)


# --- weights ---


def vocabulary_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> int:
    """Rows of the embedding up to the last that is a token; the padding after it is none, and never sampled."""
    never = {*(model.generation_config.suppress_tokens or [])} - {*tokenizer.added_tokens_decoder}
    return 1 + max(id for id in tokenizer.get_vocab().values() if id not in never)


def _add_weights(writer: "GGUFWriter", model: PreTrainedModel, rows: int, kind: Any) -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import quantize

    block = GGML_QUANT_SIZES[kind][0]
    for name, weight in _named_weights(model, rows):
        # Vectors and the table of positions are few and are added, not multiplied.
        multiplied = weight.ndim == 2 and not name.startswith("position_embd")
        if multiplied and weight.shape[1] % block:
            raise UserError(
                f"{kind.name.lower()} takes weights in blocks of {block}, and a row of {name} has {weight.shape[1]}: "
                "use --quantization bf16."
            )
        own = kind if multiplied else GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(np.ascontiguousarray(weight), own), raw_dtype=own)


def _named_weights(model: PreTrainedModel, rows: int) -> Iterator[tuple[str, np.ndarray]]:
    """Every weight (outputs, inputs) in float32 under llama.cpp's name."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    config = model.config
    arch = next(arch for arch in MODEL_ARCH if MODEL_ARCH_NAMES[arch] == config.model_type)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name, weight = names.get_name(key, (".weight", ".bias")), tensor.detach().float().cpu().numpy()
        assert name is not None, f"llama.cpp has no place for {key}"
        if key in transposed:
            weight = weight.T
        if name in ("token_embd.weight", "output.weight"):
            weight = weight[:rows]
        if config.model_type == "llama" and key.endswith((".q_proj.weight", ".k_proj.weight")):
            weight = _interleave(weight, _head_dim(config))
        yield name, weight


def _interleave(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of every head in the order that llama.cpp rotates them in for a llama: 0, D/2, 1, D/2 + 1 …"""
    halves = weight.reshape(-1, 2, head_dim // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)
