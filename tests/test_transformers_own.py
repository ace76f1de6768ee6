"""transformers' own common tests of a model and of a config, on ours: an optional job.

TRANSFORMERS_TESTS names an unpacked source distribution of transformers, of the version installed
(`pip download --no-deps --no-binary :all: transformers==5.23.0`); pip `parameterized` must be there too.
"""

import importlib
import os
import sys
import types
import unittest
import warnings
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import transformers

import nanogpt_hf  # noqa: F401, registers the model
from nanogpt_hf import NanoGPTConfig, NanoGPTForCausalLM, NanoGPTForSequenceClassification, NanoGPTModel

SOURCE = Path(os.environ.get("TRANSFORMERS_TESTS", "/nowhere"), "tests")
if not SOURCE.is_dir():
    pytest.skip("TRANSFORMERS_TESTS names no source of transformers", allow_module_level=True)
pytest.importorskip("parameterized")
warnings.simplefilter("default")  # theirs are not ours to mend, from here on
pytestmark = pytest.mark.filterwarnings("default")


# What the tests import of folders that the distribution lacks: the tests in those are not run.
MISSING = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {"config_common_kwargs": {}},
}


def load(name: str) -> types.ModuleType:
    """A module of transformers' tests, as part of a package that the relative imports in it find."""
    package = sys.modules.setdefault("transformers_tests", types.ModuleType("transformers_tests"))
    package.__path__ = [str(SOURCE)]
    for missing, content in MISSING.items():
        if not SOURCE.joinpath(*missing.split(".")).with_suffix(".py").is_file():
            for module in (missing.split(".")[0], missing):
                stand_in = types.ModuleType(f"transformers_tests.{module}")
                vars(stand_in).update(content, __path__=[])
                sys.modules[stand_in.__name__] = stand_in
    # The tests of configs load transformers a second time, by its place beside them.
    with patch.object(transformers.utils, "direct_transformers_import", lambda _: transformers):
        return importlib.import_module(f"transformers_tests.{name}")


common, configuration = load("test_modeling_common"), load("test_configuration_common")


def register_as_transformers_own() -> None:
    """The tests tell a causal language model by transformers' own list of names."""
    from transformers.models.auto import modeling_auto

    for mapping, name in (
        ("MODEL_MAPPING_NAMES", "NanoGPTModel"),
        ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "NanoGPTForCausalLM"),
        ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", "NanoGPTForSequenceClassification"),
    ):
        getattr(modeling_auto, mapping).setdefault("nanogpt", name)


register_as_transformers_own()


class Tester:
    """Tiny models and batches, as transformers' tests ask for them."""

    batch_size, seq_length, hidden_size, num_hidden_layers, num_attention_heads = 3, 7, 32, 2, 4
    is_training = True

    def __init__(self, parent, architecture):
        self.parent, self.architecture = parent, architecture

    def get_config(self):
        return NanoGPTConfig(
            architecture=self.architecture, vocab_size=99, n_positions=512, n_embd=self.hidden_size,
            n_layer=self.num_hidden_layers, n_head=self.num_attention_heads, bos_token_id=98, eos_token_id=98,
            pad_token_id=98,
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self):
        ids = common.ids_tensor([self.batch_size, self.seq_length], 97)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class CommonTests(common.ModelTesterMixin):
    all_model_classes = (NanoGPTModel, NanoGPTForCausalLM, NanoGPTForSequenceClassification)
    all_generative_model_classes = ()
    architecture: str

    def setUp(self):
        self.model_tester = Tester(self, self.architecture)
        self.config_tester = configuration.ConfigTester(self, config_class=NanoGPTConfig, n_embd=37, n_head=1)

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_model_weights_reload_no_missing_tied_weights(self):
        """It reads a checkpoint without most of the weights, which our class refuses."""
        with self.assertRaisesRegex(ValueError, "it lacks 29 weights|it lacks 19 weights"):
            super().test_model_weights_reload_no_missing_tied_weights()


class GPT2BlockTests(CommonTests, unittest.TestCase):
    architecture = "gpt2"


class ModernBlockTests(CommonTests, unittest.TestCase):
    architecture = "qwen3"
