"""Objectives: one of one's own, twenty lines beside the loop, which is not touched; and R-Drop against its paper."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.distributions import Categorical, kl_divergence
from torch.nn import functional as F

from nanogpt_hf import NanoGPTConfig, NanoGPTForCausalLM
from nanogpt_hf.common.cli import parse
from nanogpt_hf.common.settings import TrainingSettings
from nanogpt_hf.data.corpora import load_corpus
from nanogpt_hf.data.token_stream import TokenStream
from nanogpt_hf.data.tokenization import train_char_tokenizer
from nanogpt_hf.training.evaluation import SplitLoss
from nanogpt_hf.training.loop import train
from nanogpt_hf.training.objectives import Objective, RDrop


class Copying(Objective):
    """The second half of a row repeats the first; it alone is learned."""

    tokens_per_step = 8 * 16

    def batch(self, step, rows):
        half = np.random.default_rng(step).integers(97, 101, (8, 8))[rows]
        return (torch.from_numpy(np.concatenate((half, half), axis=1)),)

    def count(self, batch):
        return torch.tensor(batch[0][:, 8:].numel())

    def loss(self, model, batch, num_items):
        logits = model(input_ids=batch[0]).logits[:, 7:-1]
        return F.cross_entropy(logits.flatten(0, 1), batch[0][:, 8:].flatten(), reduction="sum") / num_items

    def evaluate(self, model):
        batch = self.batch(10**6, np.arange(8))
        return SplitLoss(self.loss(model, batch, torch.tensor(1)).item(), 64, 64)

    def measured(self):
        return {"seen": 1.0}


@pytest.mark.usefixtures("own_accelerate_state")
def test_the_loop_trains_what_it_has_never_heard_of(tmp_path):
    from nanogpt_hf.training.hardware import make_accelerator

    (tmp_path / "text.txt").write_text("abcd efgh. " * 40)
    words = ["--corpus", str(tmp_path / "text.txt"), "--output_dir", str(tmp_path / "run"), "--use_cpu"]
    words += ["--max_steps", "60", "--eval_steps", "30", "--learning_rate", "1e-2", "--warmup_steps", "2"]
    words += [
        "--per_device_train_batch_size",
        "4",
        "--gradient_accumulation_steps",
        "2",
        "--n_positions",
        "16",
    ]
    settings = parse(TrainingSettings, "", words)
    tokenizer = train_char_tokenizer(["abcd"])
    torch.manual_seed(0)
    config = NanoGPTConfig(
        vocab_size=320, n_positions=16, n_embd=32, n_layer=2, n_head=2, architecture="qwen3"
    )
    model = NanoGPTForCausalLM(config)
    progress = train(
        make_accelerator(settings), settings, load_corpus(settings.corpus), tokenizer, model, Copying()
    )
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert progress.step == 60 and progress.best_loss < 1.6 < rows[0]["train_loss"]
    assert rows[-1]["seen"] == 1.0


@pytest.mark.usefixtures("own_accelerate_state")
@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_r_drop_is_its_papers_loss_halved(alpha):
    """Equation 4 of Liang et al. (2021), by torch's distributions; what is reported is the cross-entropy alone."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = NanoGPTForCausalLM(NanoGPTConfig(**sizes, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3))
    stream = TokenStream(np.random.default_rng(0).integers(0, 50, 500), 16)
    objective = RDrop(alpha, accelerator=Accelerator(cpu=True), train=stream, batch_size=4, seed=0)
    batch = objective.batch(0, np.arange(4))
    torch.manual_seed(1)
    loss = objective.loss(model, batch, objective.count(batch))
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]

    model.zero_grad()
    torch.manual_seed(1)
    inputs, targets = batch
    p, q = (Categorical(logits=half) for half in model(input_ids=inputs.repeat(2, 1)).logits.chunk(2))
    nats = -(p.log_prob(targets) + q.log_prob(targets))
    papers = nats + alpha / 2 * (kl_divergence(p, q) + kl_divergence(q, p))
    (papers.mean() / 2).backward()
    assert kl_divergence(p, q).min() > 1e-4  # two readings differ
    torch.testing.assert_close(loss, nats.mean() / 2)
    torch.testing.assert_close(gradients, [parameter.grad for parameter in model.parameters()])
