"""What lies around a run: variables and files that `accelerate config` and launchers leave behind."""

import re
from pathlib import Path

import accelerate
import pytest
import torch
from processes import TEXT, digests, finished, training_words, write_corpus

from nanogpt_hf.common.errors import UserError
from nanogpt_hf.common.settings import TrainingSettings
from nanogpt_hf.training.hardware import make_accelerator

SOURCES = [
    path
    for path in Path(accelerate.__file__).parent.rglob("*.py")
    if not {"commands", "test_utils"} & {*path.parts}
]
READ_BY_ACCELERATE = sorted(
    {
        name
        for path in SOURCES
        for name in re.findall(
            r"""["'](ACCELERATE_[A-Z0-9_]*[A-Z0-9])["']""", path.read_text(encoding="utf-8")
        )
    }
)


def test_accelerate_reads_variables_that_are_found_here():
    assert len(READ_BY_ACCELERATE) > 25 and "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" in READ_BY_ACCELERATE


@pytest.mark.parametrize("value", ["true", "4", "aot_eager"])
@pytest.mark.parametrize("name", READ_BY_ACCELERATE)
def test_a_variable_of_accelerate_is_overruled_or_refused(name, value, monkeypatch, own_accelerate_state):
    """Whatever is set: the accelerator is the one that the settings describe, or a sentence says why there is none."""
    monkeypatch.setenv(name, value)
    try:
        accelerator = make_accelerator(TrainingSettings(use_cpu=True, bf16=False))
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert accelerator.device == torch.device("cpu") and accelerator.num_processes == 1
    assert accelerator.gradient_accumulation_steps == 1 and accelerator.mixed_precision == "no"
    model, optimizer = accelerator.prepare(m := torch.nn.Linear(2, 2), torch.optim.SGD(m.parameters(), 1.0))
    assert model is m  # neither compiled nor wrapped
    (loss := model(torch.ones(1, 2)).sum()).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    accelerator.backward(model(torch.ones(1, 2)).sum())
    assert loss.isfinite() and all(map(torch.equal, expected, (p.grad for p in model.parameters())))


def test_weights_are_the_same_whatever_accelerate_was_told(tmp_path):
    corpus = write_corpus(tmp_path, TEXT)
    finished(training_words(tmp_path / "plain", corpus, "--max_steps", 6))
    finished(
        training_words(tmp_path / "told", corpus, "--max_steps", 6),
        ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4",
        ACCELERATE_DYNAMO_BACKEND="AOT_EAGER",
        ACCELERATE_GRADIENT_CLIPPING="0.001",
    )
    assert digests(tmp_path / "plain") == digests(tmp_path / "told")
