"""Train and fine-tune small GPTs; everything made is an ordinary transformers checkpoint.

Importing the package registers its model with transformers' auto classes, as soon as those are imported: torch, which
they need, takes seconds, and a command line has to answer before.
"""

from . import common  # noqa: F401, I001  first, for it answers Ctrl-C while all else is imported

from importlib import import_module
from types import ModuleType
from typing import Any

import wrapt

__version__ = "0.1.0"

_HOMES = {
    "DataSettings": "common.settings",
    "FinetuningSettings": "common.settings",
    "NanoGPTConfig": "model",
    "NanoGPTForCausalLM": "model",
    "NanoGPTForSequenceClassification": "model",
    "NanoGPTModel": "model",
    "TrainingSettings": "common.settings",
    "UserError": "common.errors",
    "export": "sharing.export",
    "finetune": "runs.finetuning",
    "generate_text": "generation.text",
    "load_model_and_tokenizer": "model.loading",
    "preset_config": "model",
    "pretrain": "runs.pretraining",
    "stream_text": "generation.text",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


@wrapt.when_imported("transformers.models.auto.modeling_auto")
def _register(auto: ModuleType) -> None:
    # Which registers at its end. It may be what imports transformers, and then be half imported at this moment.
    import_module(f"{__name__}.model")


@wrapt.when_imported("peft.utils.constants")
def _set_defaults_of_peft(constants: ModuleType) -> None:
    """What peft adapts in a model whose layers it is not told: the layers have GPT-2's names, so what it does in GPT-2."""
    for mapping in vars(constants).values():
        if isinstance(mapping, dict) and "gpt2" in mapping:
            mapping.setdefault("nanogpt", mapping["gpt2"])
