"""The graph of a plain checkpoint as ONNX, named as transformers.js 4 expects it; onnxruntime runs it anywhere.

Shapes: B rows, T new tokens, P past tokens, H key-value heads, D head size, V vocabulary.
"""

import os
import warnings
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import cast

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..common.errors import UserError

LARGEST = 2**31 - 2**24  # bytes; a protobuf ends at 2 GiB, and the graph itself takes a few MB


class _CachedStep(torch.nn.Module):
    """A causal language model whose cache comes and goes as tensors, as a graph needs it."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        *past: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """input_ids (B T), attention_mask (B P+T), position_ids (B T), past: keys and values of each layer (B H P D);
        logits (B T V), then keys and values (B H P+T D)."""
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
        )
        layers = cast(list[DynamicLayer], cache.layers)
        return output.logits, *chain.from_iterable((layer.keys, layer.values) for layer in layers)


def check_onnx(model: PreTrainedModel) -> None:
    """Raises UserError where `add_onnx` could not work: the packages are missing, or the model is too large."""
    if not all(map(find_spec, ("onnx", "onnxruntime"))):
        raise UserError('ONNX needs two more packages: pip install -c constraints.txt -e ".[onnx]".')
    head = model.config.vocab_size * model.config.hidden_size
    size = 4 * (model.num_parameters() + head * model.config.tie_word_embeddings)  # bytes
    if size > LARGEST:
        raise UserError(
            f"the model is {size / 2**30:.1f} GiB as ONNX, whose files end at 2 GiB: share it in another format."
        )


def add_onnx(folder: str | os.PathLike) -> None:
    """Write onnx/model.onnx (float32) and onnx/model_quantized.onnx (8 bits) into the folder of a plain checkpoint.

    A head that is tied to the embedding has its own place in the graph: what is transposed is not quantised.

    Raises:
        UserError: as check_onnx.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    check_onnx(model)
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic

    target = Path(folder) / "onnx"
    target.mkdir()
    exact, quantized = target / "model.onnx", target / "model_quantized.onnx"
    _trace(model.eval(), exact)
    quant_pre_process(exact, exact, skip_symbolic_shape=True)  # folds half of the traced operators away
    # 7 of the 8 bits: processors without VNNI saturate where they add two products of 8 bits.
    quantize_dynamic(exact, quantized, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)


def _trace(model: PreTrainedModel, path: Path) -> None:
    config = model.config
    H = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    D = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    B, T, P = 2, 2, 3  # any sizes: the axes named below stay open
    past = torch.zeros(2 * config.num_hidden_layers, B, H, P, D).unbind()
    ids = torch.zeros(B, T, dtype=torch.long)
    positions = torch.arange(P, P + T).expand(B, T)
    parts = [f"{layer}.{part}" for layer in range(config.num_hidden_layers) for part in ("key", "value")]
    axes = {
        "input_ids": {0: "batch_size", 1: "sequence_length"},
        "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
        "position_ids": {0: "batch_size", 1: "sequence_length"},
        "logits": {0: "batch_size", 1: "sequence_length"},
    }
    inputs, outputs = [*axes][:3], [*axes][3:]
    for part in parts:
        axes[f"past_key_values.{part}"] = {0: "batch_size", 2: "past_sequence_length"}
        axes[f"present.{part}"] = {0: "batch_size", 2: "total_sequence_length"}
    with torch.no_grad(), warnings.catch_warnings():
        # What the tracer warns of does not depend on sizes; the tests compare others than the traced ones.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _CachedStep(model).eval(),
            (ids, torch.ones(B, P + T, dtype=torch.long), positions, *past),
            path,
            input_names=inputs + [f"past_key_values.{part}" for part in parts],
            output_names=outputs + [f"present.{part}" for part in parts],
            dynamic_axes=axes,
            opset_version=17,
            dynamo=False,  # transformers.js 4.3 cannot run the other exporter's graph
        )
