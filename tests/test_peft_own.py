"""peft's own tests of decoder models, on ours: an optional job of some two thousand tests.

PEFT_TESTS names an unpacked source distribution of peft, of the version installed
(`pip download --no-deps --no-binary :all: peft==0.21.2`). Left out are its tests of one named model of the Hub.
"""

import atexit
import importlib
import os
import shutil
import sys
import tempfile
import types
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict

from nanogpt_hf import NanoGPTConfig, NanoGPTForCausalLM
from nanogpt_hf.data.tokenization import train_char_tokenizer

SOURCE = Path(os.environ.get("PEFT_TESTS", "/nowhere"), "tests")
if not SOURCE.is_dir():
    pytest.skip("PEFT_TESTS names no source of peft", allow_module_level=True)
warnings.simplefilter("default")  # theirs are not ours to mend, from here on
pytestmark = pytest.mark.filterwarnings("default")


def tiny_models() -> list[str]:
    """Folders with a model of each architecture, which stay while the tests run."""
    torch.manual_seed(0)  # one of its tests bounds an error that grows with the weights
    parent = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, parent)
    tokenizer = train_char_tokenizer(["".join(map(chr, range(32, 127)))])
    end = tokenizer.eos_token_id
    special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "vocab_size": len(tokenizer)}
    # By this name peft knows whose layers are Conv1D, which not all of its methods adapt.
    folders = {"gpt2": parent / "tiny-random-GPT2LMHeadModel", "modern": parent / "modern"}
    sizes = {"n_layer": 4, "n_head": 4, "n_embd": 32, "n_positions": 512}
    for architecture, folder in folders.items():
        NanoGPTForCausalLM(NanoGPTConfig(architecture=architecture, **sizes | special)).save_pretrained(
            folder
        )
        tokenizer.save_pretrained(folder)
    return list(map(str, folders.values()))


def load() -> types.ModuleType:
    """peft's test_decoder_models, told of our models where it names its own."""
    package = sys.modules.setdefault("peft_tests", types.ModuleType("peft_tests"))
    package.__path__ = [str(SOURCE)]
    diffusers = types.ModuleType("diffusers")  # asked only whether a model is one of its pipelines
    diffusers.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
    sys.modules.setdefault("diffusers", diffusers)
    module = importlib.import_module("peft_tests.test_decoder_models")
    module.PEFT_DECODER_MODELS_TO_TEST[:] = module.SMALL_GRID_MODELS[:] = tiny_models()
    quotes = Dataset.from_list([{"quote": "To be, or not to be"}] * 16)
    module.load_dataset_english_quotes = lambda: DatasetDict(train=quotes)
    # It adapts the bias of a value projection of its own, and has no default for GPT-2's fused one either.
    module.ALL_CONFIGS[:] = [pair for pair in module.ALL_CONFIGS if pair[0] is not module.BeftConfig]
    for _, arguments in module.ALL_CONFIGS:
        if "tokenizer_name_or_path" in arguments:
            arguments["tokenizer_name_or_path"] = module.PEFT_DECODER_MODELS_TO_TEST[0]
    return module


def takes_a_model(test) -> bool:
    return any(
        "model_id" in mark.args[0] for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"
    )


theirs = load().TestDecoderModels
TestDecoderModels = type(
    "TestDecoderModels",
    (theirs,),
    {
        name: None
        for name in dir(theirs)
        if name.startswith("test_") and not takes_a_model(getattr(theirs, name))
    },
)
