"""Checkpoints of somebody else's: what they could make us run, hold or show is refused in a sentence."""

import ast
import json
import re
import runpy
import shutil
import sys
from functools import partial

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelInfo, constants
from processes import ROOT, TEXT, write_corpus
from safetensors.torch import load_file

from nanogpt_hf import NanoGPTConfig, NanoGPTForCausalLM, preset_config
from nanogpt_hf.analysis.report import in_words
from nanogpt_hf.common.errors import UserError
from nanogpt_hf.common.running import run_recipe, tell
from nanogpt_hf.common.text import first_line
from nanogpt_hf.data.tokenization import (
    describe_tokens,
    encode,
    encode_with_spans,
    load_tokenizer,
    train_bpe_tokenizer,
    train_char_tokenizer,
)
from nanogpt_hf.model.loading import load_causal_lm, load_model_and_tokenizer, load_native
from nanogpt_hf.sharing.export import export, export_run
from nanogpt_hf.sharing.hub import check_push, push
from nanogpt_hf.sharing.model_card import make_card

SIZES = {"vocab_size": 320, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny checkpoint with its tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer = train_char_tokenizer([TEXT])
    end = tokenizer.eos_token_id
    NanoGPTForCausalLM(NanoGPTConfig(**SIZES, bos_token_id=end, eos_token_id=end)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(action, *words) -> str:
    """The one sentence in which it is refused."""
    with pytest.raises(ValueError) as caught:
        action(*words)
    sentence = str(caught.value)
    assert "\n" not in sentence and "Traceback" not in sentence
    return sentence


# --- weights ---


@pytest.fixture
def opened(monkeypatch):
    """What torch.load was asked for; nothing, if all goes well."""
    asked, load = [], torch.load
    monkeypatch.setattr(
        torch, "load", lambda file, *args, **options: asked.append(file) or load(file, *args, **options)
    )
    return asked


DOORS = {
    "sampling": lambda folder: load_model_and_tokenizer(str(folder)),
    "a base": lambda folder: load_native(folder),
    "any model": lambda folder: load_causal_lm(str(folder), torch.float32),
    "our class": NanoGPTForCausalLM.from_pretrained,
}


@pytest.mark.parametrize("door", DOORS)
def test_a_config_cannot_name_a_pickle_for_the_weights(model, opened, door):
    torch.save(load_file(model / "model.safetensors"), model / "adapter_model.bin")
    edit_json(model / "config.json", transformers_weights="adapter_model.bin")
    said = refusal(DOORS[door], model)
    assert "adapter_model.bin" in said and "weights_only" not in said
    assert not opened


@pytest.mark.parametrize("file", ["shard.bin", "../model.safetensors", "/etc/x.safetensors", 7])
def test_an_index_names_nothing_but_safetensors_beside_it(model, opened, file):
    weights = load_file(model / "model.safetensors")
    torch.save(weights, model / "shard.bin")
    (model / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, file)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert repr(file) in refusal(load_native, model)
    assert repr(file) in refusal(load_model_and_tokenizer, str(model))
    assert not opened


def test_a_config_may_name_safetensors(model):
    (model / "model.safetensors").rename(model / "other.safetensors")
    edit_json(model / "config.json", transformers_weights="other.safetensors")
    assert load_native(model).config.n_layer == 2


# --- sizes ---


@pytest.fixture
def nothing_is_built(monkeypatch):
    def built(*args, **options):
        raise AssertionError("a model of that size would have been built")

    monkeypatch.setattr(NanoGPTForCausalLM, "__init__", built)


@pytest.mark.parametrize("field", ["n_layer", "n_embd", "vocab_size", "n_inner"])
def test_a_size_that_the_weights_do_not_have_is_refused_at_once(model, nothing_is_built, field):
    edit_json(model / "config.json", **{field: 10**9})
    for door in (load_native, lambda folder: load_model_and_tokenizer(str(folder))):
        assert f"asks for {field} 1,000,000,000" in refusal(door, model)


@pytest.fixture
def adapter(model, tmp_path):
    """An adapter on the tiny model, as peft saves it."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path / "adapter"
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    peft_model = get_peft_model(load_native(model), config)
    peft_model.peft_config["default"].base_model_name_or_path = str(model)
    peft_model.save_pretrained(folder)
    return folder


def test_an_adapter_that_fits_is_read(adapter):
    assert load_model_and_tokenizer(str(adapter))


@pytest.mark.parametrize("changes", [{"r": 10**7}, {"rank_pattern": {"c_attn": 10**7}}])
def test_a_rank_that_the_adapter_does_not_have_is_refused_at_once(adapter, nothing_is_built, changes):
    edit_json(adapter / "adapter_config.json", **changes)
    assert "a rank of 10,000,000" in refusal(load_model_and_tokenizer, str(adapter))


@pytest.mark.parametrize("content", ["[1]", "1", "{", '{"base_model_name_or_path": 3}', "{}"])
def test_an_adapter_config_that_is_none(adapter, content, tmp_path):
    (adapter / "adapter_config.json").write_text(content)
    assert "adapter" in refusal(load_model_and_tokenizer, str(adapter))
    assert "adapter" in refusal(export_run, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- generation ---


@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("tokens", [["a"], [10**9], [-1], [1.5], [True], 3, "a", [[1]], {"a": 1}])
def test_tokens_that_there_are_not_cannot_be_suppressed(model, place, tokens):
    edit_json(model / place, suppress_tokens=tokens)
    for door in (load_native, lambda folder: load_model_and_tokenizer(str(folder))):
        assert "suppress_tokens" in refusal(door, model)


def test_tokens_that_there_are_may_be_suppressed(model):
    (model / "generation_config.json").write_text('{"suppress_tokens": [5, 319]}')
    loaded, _ = load_model_and_tokenizer(str(model))
    assert {5, 319} <= {*loaded.generation_config.suppress_tokens}


@pytest.mark.parametrize("content", ["[1]", "3", "{", '"a"'])
def test_a_generation_config_that_is_none(model, content):
    (model / "generation_config.json").write_text(content)
    for door in (load_native, lambda folder: load_model_and_tokenizer(str(folder))):
        assert "generation_config.json" in refusal(door, model)


# --- tokenizers ---


def test_a_pattern_that_explodes_ends_in_a_sentence(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    edit_json(folder / "tokenizer.json", pre_tokenizer=split)
    tokenizer, text = load_tokenizer(str(folder)), "a" * 40 + "b"
    for use in (encode, encode_with_spans):
        assert "tokenizer.json" in refusal(use, tokenizer, text)


# --- the terminal ---

CLEAR = "\x1b[2J\x9b31m\u202e"
DRIVING = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def recipe(name):
    return runpy.run_path(str(ROOT / "recipes" / f"{name}.py"))


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.py")), ids=lambda path: path.name)
def test_recipes_print_through_one_safe_door(path):
    calls = [
        node.func
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]
    assert "print" not in map(ast.unparse, calls)


def test_that_door_spells_out_what_drives_a_terminal(capsys):
    tell(CLEAR, "да\tнет")
    said = capsys.readouterr().out
    assert not DRIVING.search(said) and said.splitlines()[0].startswith("\\x1b[2J") and "да\tнет" in said


def test_train_tokenizer_shows_an_alphabet_of_controls(tmp_path, capsys):
    path = write_corpus(tmp_path, f"{CLEAR} to be\n" * 50)
    for kind in ("char", "bpe"):
        words = [
            "--corpus",
            str(path),
            "--kind",
            kind,
            "--vocab_size",
            "300",
            "--output_dir",
            str(tmp_path / f"{CLEAR}{kind}"),
        ]
        recipe("train_tokenizer")["main"](words)
    said = capsys.readouterr().out
    assert "\\x1b" in said and not DRIVING.search(said)


def test_a_table_holds_what_its_cells_say():
    rows = [{"model": f"runs/{CLEAR}a|b\nc", "loss": 1.0}]
    split = {"corpus": CLEAR, "part": "whole text", "validation_characters": 3}
    words = in_words(split, rows)
    assert not DRIVING.search(words)
    assert words.splitlines()[-1].replace(r"\|", "").count("|") == 3


def test_share_names_its_folder_safely(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["share.py", "--model", str(saved), "--output_dir", str(tmp_path / CLEAR)]
    )
    recipe("share")["main"]()
    said = capsys.readouterr().out
    assert "written to" in said and not DRIVING.search(said)


# --- the Hub ---

TOKEN = "hf_fakesecretfakesecret"


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


USER = {"name": "ann", "orgs": [], "auth": {"accessToken": {"role": "write"}}}


@pytest.mark.parametrize(
    "answer",
    [[1, 2], 3, "ann", None, {"name": "ann", "orgs": 3}, {"name": "ann", "auth": [1]}, USER],
    ids=str,
)
def test_an_answer_that_no_hub_gives_is_no_traceback(token, monkeypatch, answer):
    """Of whoami; for a good one it is model_info that answers with a list."""
    said = []
    monkeypatch.setattr(HfApi, "whoami", lambda self: answer)
    monkeypatch.setattr(HfApi, "model_info", lambda self, name, timeout: ModelInfo(*[1, 2]))
    check_push("thing", tell=said.append)
    assert len(said) == 1 and "is not known" in said[0]


def test_a_push_to_such_a_hub_ends_in_a_sentence(token, monkeypatch, saved):
    monkeypatch.setattr(HfApi, "whoami", lambda self: [1, 2])
    assert "try again with" in refusal(lambda: push(saved, "thing", pauses=(), tell=lambda line: None))


def raised(error):
    raise error


def test_an_error_that_echoes_the_token_is_printed_without(token, capsys):
    echo = f"401 Client Error: no {TOKEN} here, Authorization: Bearer hf_anotheranother"
    for error in (UserError(echo), OSError(echo), UserError(f"it says: {first_line(ValueError(echo))}")):
        with pytest.raises(SystemExit):
            run_recipe(partial(raised, error))
        said = capsys.readouterr().err
        assert said.startswith("error: ") and "Client Error" in said and "hf_" not in said


# --- a base that is a folder ---


@pytest.mark.parametrize(
    "facts", [{"model_type": "gpt2"}, None], ids=["noted by its run", "of an earlier version"]
)
def test_a_folder_is_never_published_as_a_hub_id(model, facts, tmp_path, monkeypatch):
    """Whatever lies where one stands at that moment."""
    (model / "run.yaml").write_text(
        yaml.safe_dump({"model_name_or_path": "runs/base", "record": {"base": facts, "corpus": CORPUS}})
    )
    monkeypatch.chdir(tmp_path)
    card = make_card(model, name="ann/thing")
    assert card.data.base_model is None and "runs/base" not in str(card) and "`base`" in str(card)


@pytest.mark.parametrize("here", ["nowhere", "runs", "tok"])
def test_a_tokenizer_and_a_text_are_called_the_same_wherever_the_card_is_written(
    model, here, tmp_path, monkeypatch
):
    """A folder by its last part, what is on the Hub by its id, as the run has noted it."""
    (tmp_path / here).mkdir()
    monkeypatch.chdir(tmp_path)
    values = {"tokenizer": "runs/tok", "record": {"corpus": CORPUS | {"name": "runs/text"}}}
    (model / "run.yaml").write_text(yaml.safe_dump(values))
    card = str(make_card(model, name="ann/thing"))
    assert "runs/" not in card and "tokenizer: tok\n" in card and "on `text`" in card
    of_the_hub = {"name": "runs/text:en", "source": f"runs/text@{'0' * 40}"}
    values["record"] = {"corpus": CORPUS | of_the_hub, "tokenizer_hub_id": "runs/tok"}
    (model / "run.yaml").write_text(yaml.safe_dump(values))
    card = str(make_card(model, name="ann/thing"))
    assert "tokenizer: runs/tok\n" in card and "on `runs/text:en`" in card


@pytest.mark.parametrize("here", ["nowhere", "base"])
def test_an_adapters_card_says_that_its_base_is_a_folder(adapter, here, tmp_path, monkeypatch):
    (tmp_path / here).mkdir()
    monkeypatch.chdir(tmp_path)
    values = {"model_name_or_path": "runs/base", "record": {"base": {"model_type": "gpt2"}, "corpus": CORPUS}}
    (adapter / "run.yaml").write_text(yaml.safe_dump(values))
    assert 'from_pretrained("base")  # the folder of the base' in make_card(adapter).text


def test_an_adapter_on_a_folder_is_not_shared_from_anywhere(adapter, tmp_path, monkeypatch, capsys):
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="runs/base")
    (adapter / "run.yaml").write_text(
        yaml.safe_dump({"model_name_or_path": "runs/base", "record": {"base": {"model_type": "nanogpt"}}})
    )
    monkeypatch.chdir(tmp_path)
    assert "runs/base, is a folder" in refusal(
        lambda: export_run(adapter, tmp_path / "out", name="ann/thing")
    )
    monkeypatch.setattr(sys, "argv", ["share.py", "--model", str(adapter), "--output_dir", "out"])
    recipe("share")["main"]()
    assert "NOTE: it is an adapter on the folder runs/base" in capsys.readouterr().out


def test_the_lines_of_a_card_work_where_it_lies(model, monkeypatch, capsys):
    edit_json(model / "generation_config.json", max_length=SIZES["n_positions"])  # as every run writes it
    block = re.search("```python\n(.*?)```", make_card(model).text, re.S)[1]
    monkeypatch.chdir(model)
    exec(block.replace("trust_remote_code=True", ""), {})  # nanogpt_hf is imported here
    assert capsys.readouterr().out.strip()


# --- run.yaml and metrics.jsonl ---

CORPUS = {"name": "text.txt", "source": "a file", "sha256": "0" * 64}
DAMAGE = {
    "a number for the source": {"record": {"corpus": CORPUS | {"source": 3}}},
    "a list for the name": {"record": {"corpus": CORPUS | {"name": ["a"]}}},
    "no name": {"record": {"corpus": {"source": "a file", "sha256": "0"}}},
    "words for a number": {"record": {"corpus": CORPUS | {"characters": "many"}}},
    "a list for the record": {"record": [1]},
    "a number for the corpus": {"record": {"corpus": 3}},
    "a number for the versions": {"record": {"versions": 3}},
    "a list for the base": {"record": {"base": ["gpt2"]}},
    "a number for a licence": {"record": {"base": {"license": 3}}},
    "a list for the identity": {"record": {"identity": [1]}},
    "a number for the command": {"record": {"command": 3}},
    "a number for the history": {"record": {"history": 3}},
    "a number for the base's name": {"model_name_or_path": 3},
    "a list for the tokenizer": {"tokenizer": [1]},
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_yaml_that_no_run_has_written(model, damage, tmp_path):
    (model / "run.yaml").write_text(yaml.safe_dump(DAMAGE[damage]))
    assert "run.yaml" in refusal(export_run, model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("record", [{"corpus": CORPUS}, {"corpus": None}, None, {}], ids=str)
def test_a_run_yaml_that_says_little(model, record):
    (model / "run.yaml").write_text(yaml.safe_dump({"record": record}))
    assert make_card(model).text


@pytest.mark.parametrize("value", ['"x"', "[1]", "null", "true", "{}", "1e999", "NaN"])
def test_a_loss_that_is_no_number_is_not_told(model, value):
    (model / "metrics.jsonl").write_text(f'{{"step": 1, "eval_loss": {value}, "train_loss": {value}}}\n')
    (model / "run.yaml").write_text(yaml.safe_dump({"record": {"corpus": CORPUS}}))
    assert "## Result" not in make_card(model).text


# --- who may read what is written ---


def test_the_weights_are_read_by_whom_the_umask_lets(saved, tmp_path):
    export_run(saved, tmp_path / "shared", "nanogpt")
    export(*load_model_and_tokenizer(str(saved)), tmp_path / "exported")
    (tmp_path / "other").touch()
    for folder in ("shared", "exported"):
        assert (tmp_path / folder / "model.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


# --- numbers that are explained ---


def test_the_plan_of_a_small_preset_has_its_vocabulary(capsys):
    """10.7M is what README says of baby: with a character vocabulary, as pretrain_char.py trains it."""
    recipe("plan")["main"](["--preset", "baby"])
    said = capsys.readouterr().out
    parameters = int(re.search(r"([\d,]+) parameters", said)[1].replace(",", ""))
    config = preset_config("baby", architecture="gpt2", vocab_size=384)
    assert parameters == NanoGPTForCausalLM(config).num_parameters() and 10.5e6 < parameters < 11e6
    assert "a vocabulary of 384 tokens, a text's characters" in said


def test_the_tokens_of_a_character_tokenizer_are_explained():
    assert (
        describe_tokens(train_char_tokenizer(["abc"]))
        == "260 tokens: 3 characters, 256 bytes that spell all others, and 1 special"
    )
    assert describe_tokens(train_bpe_tokenizer(["to be or not to be"], 260)) == "260 tokens"
