"""nanoGPT's checkpoints as ours: forged ones, and with NANOGPT naming a checkout those that nanoGPT itself trains."""

import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_here
from transformers import AutoModelForCausalLM, AutoTokenizer

import nanogpt_hf  # noqa: F401, registers the model
from nanogpt_hf.common.errors import UserError
from nanogpt_hf.data.tokenization import train_bpe_tokenizer
from nanogpt_hf.sharing.export import export_run
from nanogpt_hf.sharing.nanogpt_import import (
    find_characters,
    import_nanogpt,
    read_checkpoint,
    read_plain_pickle,
)

TEXT = (
    "Мой дядя самых честных правил, когда не в шутку занемог.\nTo be, or not to be: that is the question.\n"
    * 60
)
CHARACTERS = sorted(set(TEXT))
CHECKOUT = os.environ.get("NANOGPT")
needs_nanogpt = pytest.mark.skipif(
    not (CHECKOUT and Path(CHECKOUT, "train.py").is_file()),
    reason="no nanoGPT: name a checkout of it in the environment variable NANOGPT",
)


def meta(characters=CHARACTERS):
    return {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": {c: i for i, c in enumerate(characters)},
    }


def forged(folder, bias=True, n_embd=64, prefix="", **changes):
    """What nanoGPT's train.py saves, with random weights."""
    vocabulary = len(CHARACTERS)
    generator = torch.Generator().manual_seed(0)
    sizes = {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": n_embd,
        "block_size": 32,
        "bias": bias,
        "vocab_size": vocabulary,
    }
    shapes = {
        "transformer.wte": (vocabulary, n_embd),
        "transformer.wpe": (32, n_embd),
        "transformer.ln_f": (n_embd,),
    }
    for layer in range(2):
        block = f"transformer.h.{layer}"
        shapes |= {f"{block}.{norm}": (n_embd,) for norm in ("ln_1", "ln_2")}
        shapes |= {f"{block}.attn.c_attn": (3 * n_embd, n_embd), f"{block}.attn.c_proj": (n_embd, n_embd)}
        shapes |= {f"{block}.mlp.c_fc": (4 * n_embd, n_embd), f"{block}.mlp.c_proj": (n_embd, 4 * n_embd)}
    weights = {}
    for name, shape in shapes.items():
        weights[f"{name}.weight"] = 0.2 * torch.randn(shape, generator=generator) + (len(shape) == 1)
        if bias and not name.endswith(("wte", "wpe")):
            weights[f"{name}.bias"] = 0.2 * torch.randn(shape[0], generator=generator)
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32)  # older torch: the mask
    checkpoint = {
        "model": {prefix + name: tensor for name, tensor in weights.items()},
        "optimizer": {"state": {}, "param_groups": []},
        "model_args": sizes | {"dropout": 0.2},
        "iter_num": 20,
        "best_val_loss": torch.tensor(2.5),
        "config": {"dataset": "poems"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint | changes, folder / "ckpt.pt")
    return checkpoint


# --- forged checkpoints ---


@torch.no_grad()
@pytest.mark.parametrize("bias, prefix", [(True, ""), (False, "_orig_mod.")])
def test_tokens_that_nanogpt_did_not_have_take_no_probability(bias, prefix, tmp_path):
    weights = forged(tmp_path / "out", bias=bias, prefix=prefix)["model"]
    (tmp_path / "out" / "meta.pkl").write_bytes(pickle.dumps(meta()))
    model = import_nanogpt(tmp_path / "out", tmp_path / "run").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    ids = tokenizer(TEXT[:32], return_tensors="pt").input_ids
    output = model(ids, output_hidden_states=True)
    known = tokenizer.convert_tokens_to_ids(CHARACTERS)
    rows = weights[f"{prefix}transformer.wte.weight"]
    bias_before = weights.get(f"{prefix}transformer.ln_f.bias", torch.zeros(64))
    hidden = output.hidden_states[-1] - model.transformer.ln_f.bias + bias_before
    torch.testing.assert_close(output.logits[..., known], hidden @ rows.T, atol=1e-5, rtol=0)
    others = sorted({*range(model.config.vocab_size)} - {*known})
    torch.testing.assert_close(
        output.logits[..., others], torch.full((1, 32, len(others)), -30.0), atol=1e-3, rtol=0
    )
    assert model.generation_config.suppress_tokens == others
    # The folder is one like any other.
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    assert torch.equal(again(ids).logits, output.logits)
    export_run(tmp_path / "run", tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    torch.testing.assert_close(plain(ids).logits, output.logits, atol=1e-5, rtol=0)
    assert plain.config.activation_function == "gelu" and plain.config.model_type == "gpt2"


def test_more_characters_than_channels(tmp_path):
    forged(tmp_path / "out", n_embd=32)
    (tmp_path / "poems.txt").write_text(TEXT, encoding="utf-8")
    model = import_nanogpt(tmp_path / "out", tmp_path / "run", text=tmp_path / "poems.txt")
    assert (
        len(CHARACTERS) > 32
        and not model.transformer.wte.weight[model.generation_config.suppress_tokens].any()
    )


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_characters_are_read_from_every_pickle_of_them(protocol, tmp_path):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta() | {"size": 70_000}, protocol))
    assert read_plain_pickle(tmp_path / "meta.pkl") == meta() | {"size": 70_000}


class Trap:
    def __reduce__(self):
        return Path.touch, (Path("sprung"),)


@pytest.mark.parametrize(
    "content",
    [Trap(), {"itos": Trap()}, {"itos": [1]}, {"itos": b"1"}, {1: 2.5}, "a", 7, None],
    ids=["code", "code inside", "list", "bytes", "fraction", "text", "number", "none"],
)
def test_a_pickle_of_anything_else_is_refused(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("meta.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="is not a meta.pkl of nanoGPT's"):
        read_plain_pickle(Path("meta.pkl"))
    assert not Path("sprung").exists()


def test_a_damaged_pickle_is_a_sentence(tmp_path):
    whole, path = pickle.dumps(meta(CHARACTERS[:5])), tmp_path / "meta.pkl"
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError):
            read_plain_pickle(path)
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + b"\xff" + whole[place + 1 :])
        try:
            read_plain_pickle(path)
        except UserError:
            pass


def test_code_in_a_checkpoint_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    forged(tmp_path / "out", iter_num=Trap())
    with pytest.raises(UserError, match="no checkpoint of nanoGPT, or damaged"):
        read_checkpoint(tmp_path / "out")
    assert not Path("sprung").exists()


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_args": {"n_layer": 2}}, "it lacks n_head"),
        ({"model": None}, "it lacks the model"),
        ({"model_args": {"n_layer": 3, "n_head": 2, "n_embd": 64, "block_size": 32, "vocab_size": len(CHARACTERS)}}, "not those of a GPT of its sizes"),
    ],
)  # fmt: skip
def test_what_is_no_checkpoint_of_nanogpt_is_refused(changes, words, tmp_path):
    forged(tmp_path / "out", **changes)
    (tmp_path / "out" / "meta.pkl").write_bytes(pickle.dumps(meta()))
    with pytest.raises(UserError, match=words):
        import_nanogpt(tmp_path / "out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_where_the_characters_come_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    forged(tmp_path / "out")
    checkpoint = read_checkpoint(tmp_path / "out")
    with pytest.raises(UserError, match="give the text that it was trained on"):
        find_characters(tmp_path / "out", checkpoint, None)
    Path("other.txt").write_text("abc")
    with pytest.raises(UserError, match="has 3 different characters and the model"):
        find_characters(tmp_path / "out", checkpoint, "other.txt")
    Path("data/poems").mkdir(parents=True)
    Path("data/poems/meta.pkl").write_bytes(pickle.dumps(meta()))
    assert find_characters(tmp_path / "out", checkpoint, None) == CHARACTERS
    checkpoint["config"]["dataset"] = "../data/poems"  # leads nowhere
    with pytest.raises(UserError, match="give the text"):
        find_characters(tmp_path / "out", checkpoint, None)


def test_the_recipe_says_what_goes_together(tmp_path, capfd):
    assert run_here("share.py", "--from_nanogpt", tmp_path, "--hub_model_id", "a/b") == 2
    assert "--from_nanogpt goes with --output_dir alone" in capfd.readouterr().err
    assert run_here("share.py", "--from_nanogpt", tmp_path, "--output_dir", tmp_path / "run") == 2
    assert "holds no ckpt.pt" in capfd.readouterr().err


# --- what nanoGPT itself trains ---


def train_nanogpt(folder, kind, bias):
    """Twenty iterations of nanoGPT's train.py; its out_dir, and the tokenizer for subwords."""
    root = Path(CHECKOUT)
    data = folder / "data" / "poems"
    data.mkdir(parents=True)
    for file in ("train.py", "model.py", "configurator.py"):
        (folder / file).symlink_to(root.resolve() / file)
    if kind == "char":
        ids = [CHARACTERS.index(character) for character in TEXT]
        (data / "meta.pkl").write_bytes(pickle.dumps(meta()))
    else:
        tokenizer = train_bpe_tokenizer([TEXT], 300)
        tokenizer.save_pretrained(folder / "tokenizer")
        ids = tokenizer(TEXT).input_ids
    for split in ("train", "val"):
        np.array(ids, dtype=np.uint16).tofile(data / f"{split}.bin")
    options = {
        "dataset": "poems", "out_dir": "out", "device": "cpu", "compile": False, "eval_iters": 1, "eval_interval": 20,
        "log_interval": 10, "block_size": 32, "batch_size": 4, "n_layer": 2, "n_head": 2, "n_embd": 64, "max_iters": 20,
        "lr_decay_iters": 20, "warmup_iters": 2, "dropout": 0.0, "bias": bias, "gradient_accumulation_steps": 1,
        "always_save_checkpoint": True, "dtype": "float32",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "train.py", *(f"--{key}={value}" for key, value in options.items())],
        cwd=folder, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "out"


def load_nanogpt(out):
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(CHECKOUT, "model.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
    model = module.GPT(module.GPTConfig(**checkpoint["model_args"]))
    model.load_state_dict(checkpoint["model"])
    return model.eval()


@needs_nanogpt
@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_model_that_nanogpt_trained(kind, bias, tmp_path, capfd):
    out = train_nanogpt(tmp_path, kind, bias)
    words = ["--tokenizer", tmp_path / "tokenizer"] if kind == "bpe" else []
    status = run_here("share.py", "--from_nanogpt", out, "--output_dir", tmp_path / "run", *words)
    assert (status, capfd.readouterr().err) == (0, "")
    theirs = load_nanogpt(out)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    ids = tokenizer(TEXT, return_tensors="pt").input_ids[:, :32]
    if kind == "char":
        rows, their_ids = (
            tokenizer.convert_tokens_to_ids(CHARACTERS),
            [CHARACTERS.index(c) for c in TEXT[:32]],
        )
    else:
        rows, their_ids = list(range(50304)), ids[0].tolist()
    their_ids = torch.tensor([their_ids])
    expected, loss = theirs(their_ids, targets=their_ids)
    found = ours(ids).logits
    torch.testing.assert_close(found[..., rows], expected, atol=1e-5, rtol=0)
    # Not the logits alone: the probabilities, over all that it has tokens for.
    our_loss = torch.nn.functional.cross_entropy(found[0], ids[0])
    torch.testing.assert_close(our_loss, loss, atol=1e-5, rtol=0)
    # To the end of the context, where nanoGPT begins to move its window at every token.
    said = their_ids[:, :10]
    while said.shape[1] < 32:
        logits = theirs(said)[0][:, -1, : len(tokenizer)]
        said = torch.cat((said, logits.argmax(-1, keepdim=True)), dim=1)
    written = ours.generate(ids[:, :10], max_new_tokens=22, do_sample=False)[0].tolist()
    assert written == [rows[id] for id in said[0].tolist()]
