"""The ONNX format: its logits in onnxruntime are torch's, and transformers.js writes what transformers writes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_interop import PASSAGE, PROMPT, greedy, learn_by_heart
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

from nanogpt_hf.common.errors import UserError
from nanogpt_hf.sharing import onnx
from nanogpt_hf.sharing.export import export, export_run
from nanogpt_hf.sharing.onnx import add_onnx

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra onnx)")
pytest.importorskip("onnx", reason="onnx is not installed (extra onnx)")

MODULES = os.environ.get("NANOGPT_HF_NODE_MODULES")
needs_node = pytest.mark.skipif(
    not (MODULES and Path(MODULES, "@huggingface/transformers").is_dir() and shutil.which("node")),
    reason="NANOGPT_HF_NODE_MODULES names no node_modules with @huggingface/transformers, or there is no node",
)
SIZES = dict(vocab_size=96, bos_token_id=0, eos_token_id=0)
ROTARY = SIZES | dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
PLAIN = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(num_key_value_heads=2, head_dim=12, tie_word_embeddings=True, **ROTARY)
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(num_key_value_heads=1, tie_word_embeddings=False, **ROTARY)
    ),
}


@pytest.fixture(autouse=True)
def no_progress_bars():
    logging.disable_progress_bar()


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """Models that know a passage by heart, each with its folder, made once."""
    made = {}

    def get(architecture, kind):
        if (architecture, kind) not in made:
            folder = tmp_path_factory.mktemp("onnx") / "model"
            model, tokenizer = learn_by_heart(architecture, kind)
            assert export(model, tokenizer, folder, "onnx") == "onnx"
            made[architecture, kind] = model, tokenizer, folder
        return made[architecture, kind]

    return get


class Graph:
    """An ONNX file fed as transformers.js feeds it."""

    def __init__(self, path):
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.past = {
            i.name: i.shape for i in self.session.get_inputs() if i.name.startswith("past_key_values.")
        }

    def __call__(self, ids, mask, past=None):
        """Logits of ids (B T) after a past, and the past that follows; mask (B P+T) is 0 on padding."""
        if past is None:
            past = {
                name: np.zeros((len(ids), heads, 0, size), np.float32)
                for name, (_, heads, _, size) in self.past.items()
            }
        positions = (mask.cumsum(-1) - 1).clip(min=0)[:, -ids.shape[1] :]
        feed = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "position_ids": positions.numpy()}
        logits, *present = self.session.run(None, feed | past)
        return torch.from_numpy(logits), dict(zip(past, present, strict=True))


@pytest.mark.parametrize("family", PLAIN)
def test_logits_are_torchs_with_a_past_in_batches_and_behind_padding(family, tmp_path):
    torch.manual_seed(0)
    model = PLAIN[family]().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    add_onnx(tmp_path)
    graph = Graph(tmp_path / "onnx" / "model.onnx")
    for rows, padding, lengths in [(1, 0, (7, 1, 1, 5)), (3, 4, (9, 1, 6)), (1, 0, (1, 1))]:
        ids = torch.randint(0, 96, (rows, sum(lengths)))
        mask = torch.ones_like(ids)
        mask[0, :padding] = 0
        positions = (mask.cumsum(-1) - 1).clip(min=0)
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        found, past, read = [], None, 0
        for length in lengths:
            seen = mask[:, : read + length]
            logits, past = graph(ids[:, read : read + length], seen, past)
            found.append(logits)
            read += length
        counts = mask.bool()
        torch.testing.assert_close(torch.cat(found, 1)[counts], expected[counts], atol=1e-4, rtol=0)


def test_eight_bits_cost_little(learned):
    model, tokenizer, folder = learned("gpt2", "char")
    sizes = {name: (folder / "onnx" / name).stat().st_size for name in ("model.onnx", "model_quantized.onnx")}
    assert (
        sizes["model_quantized.onnx"] < 0.6 * sizes["model.onnx"]
    )  # the operators of so small a model weigh as much
    ids = torch.tensor([tokenizer(PASSAGE).input_ids[:256]])
    losses = []
    for name in sizes:
        logits, _ = Graph(folder / "onnx" / name)(ids, torch.ones_like(ids))
        losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).item())
    assert losses[0] == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), abs=1e-4)
    assert losses[1] < losses[0] + 0.05


def test_the_folder_is_still_a_plain_checkpoint(learned):
    model, tokenizer, folder = learned("qwen3", "bpe")
    ids = torch.tensor([tokenizer(PROMPT).input_ids])
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert type(plain) is Qwen3ForCausalLM
    torch.testing.assert_close(plain(ids).logits, model(ids).logits, atol=1e-5, rtol=0)


PUSH = """
import sys
from nanogpt_hf.sharing.hub import push

for _ in range(2):
    push(sys.argv[1], "user/model", format="onnx")
"""


@pytest.mark.slow
def test_the_hub_gets_the_graphs_too_and_only_once(hub, learned, tmp_path):
    _, _, folder = learned("gpt2", "char")
    done = subprocess.run(
        [sys.executable, "-c", PUSH, folder],
        env=hub.env(home=tmp_path) | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [commit.title for commit in hub.commits("user/model")] == ["initial commit", "Upload model"]
    files = hub.files("user/model")
    assert {"config.json", "model.safetensors", "tokenizer.json", "onnx/model_quantized.onnx"} < set(files)
    assert files["onnx/model.onnx"] == (folder / "onnx" / "model.onnx").read_bytes()


# --- transformers.js ---


@needs_node
@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_transformers_js_has_the_same_ids_and_says_the_same_200_tokens(architecture, kind, learned):
    model, tokenizer, folder = learned(architecture, kind)
    new_tokens = 200 if kind == "char" else 100
    prompts = [PROMPT, "Ещё не всё: ", "\n\n  дважды 👩‍💻\r\nи\u2581ещё\t"]
    task = {
        "modules": MODULES,
        "folder": str(folder),
        "dtype": "fp32",
        "prompts": prompts,
        "new_tokens": new_tokens,
    }
    done = subprocess.run(
        ["node", Path(__file__).with_name("transformers_js.mjs"), json.dumps(task)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["ids"] == tokenizer(prompt).input_ids
        assert answer["follow"] == greedy(model, tokenizer, new_tokens, prompt)
    assert len(answers[0]["follow"]) == new_tokens


@needs_node
def test_the_lines_of_the_card_run(learned, tmp_path):
    model, tokenizer, _ = learned("gpt2", "char")
    run = tmp_path / "run"
    model.save_pretrained(run)
    tokenizer.save_pretrained(run)
    (run / "samples.txt").write_text(f"{PROMPT}\n", encoding="utf-8")
    export_run(run, tmp_path / "out", "onnx", name="OWNER/NAME")
    lines = (tmp_path / "out" / "README.md").read_text(encoding="utf-8").split("```js\n")[1].split("```")[0]
    (tmp_path / "node_modules").symlink_to(MODULES)
    script = tmp_path / "card.mjs"
    script.write_text(lines.replace("OWNER/NAME", str(tmp_path / "out")), encoding="utf-8")
    done = subprocess.run(["node", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(PROMPT[:20]) and len(done.stdout) > 128


# --- what cannot be ---


def test_a_model_that_no_file_can_hold(learned, tmp_path, monkeypatch):
    model, tokenizer, _ = learned("gpt2", "char")
    monkeypatch.setattr(onnx, "LARGEST", 2**16)
    with pytest.raises(UserError, match="another format"):
        export(model, tokenizer, tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()


def test_without_the_packages(learned, tmp_path, monkeypatch):
    model, tokenizer, _ = learned("gpt2", "char")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"\[onnx\]"):
        export(model, tokenizer, tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()


def test_an_adapter_alone_has_no_graph(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "gpt2"}')
    with pytest.raises(UserError, match="--merge"):
        export_run(tmp_path, tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()
