"""Checkpoints in and out, model cards, and uploads to a Hub that fails in every way it knows."""

import io
import json
import os
import re
import shutil
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout, suppress

import pytest
import torch
import yaml
from hub_server import HubServer
from huggingface_hub import ModelCard, constants
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Run, run_here, warm_interpreter
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

from nanogpt_hf import NanoGPTConfig, NanoGPTForCausalLM
from nanogpt_hf.common.errors import UserError
from nanogpt_hf.common.paths import asks_the_hub
from nanogpt_hf.common.settings import TrainingSettings
from nanogpt_hf.data.tokenization import (
    END_OF_TEXT,
    encode,
    load_tokenizer,
    train_bpe_tokenizer,
    train_char_tokenizer,
)
from nanogpt_hf.model.bases import describe_base
from nanogpt_hf.model.loading import load_model_and_tokenizer, load_native
from nanogpt_hf.runs.pretraining import pretrain
from nanogpt_hf.sharing.export import choose_format, export, export_run
from nanogpt_hf.sharing.hub import check_push, push
from nanogpt_hf.sharing.model_card import make_card
from nanogpt_hf.training.lora import load_base

TEXT = (
    "Мой дядя самых честных правил,\nкогда не в шутку занемог. To be, or not to be\t— that's 1,234!\r\n" * 40
)
CODE = {"configuration_nanogpt.py", "modeling_nanogpt.py"}
PLAIN = {"gpt2": GPT2LMHeadModel, "qwen3": Qwen3ForCausalLM, "llama": LlamaForCausalLM}


@pytest.fixture(autouse=True)
def no_progress_bars():
    logging.disable_progress_bar()


def make(architecture="gpt2", tokenizer=None, **fields):
    tokenizer = tokenizer or train_char_tokenizer([TEXT])
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    sizes = dict(vocab_size=-(-len(tokenizer) // 64) * 64, n_positions=48, n_embd=32, n_layer=2, n_head=2)
    special = dict(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    model = NanoGPTForCausalLM(NanoGPTConfig(architecture=architecture, **sizes | special | fields)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.do_sample = True
    model.generation_config.suppress_tokens = list(range(len(tokenizer), model.config.vocab_size))
    return model, tokenizer


def ids(rows=2, length=40, vocabulary=300):
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_equal_logits(ours, theirs):
    torch.testing.assert_close(ours(ids()).logits, theirs(ids()).logits, atol=1e-5, rtol=0)


# --- out ---


@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize(
    "architecture, fields",
    [
        ("gpt2", {}),
        ("gpt2", {"activation_function": "relu", "scale_attn_by_inverse_layer_idx": True, "n_inner": 48}),
        ("gpt2", {"tie_word_embeddings": False}),
        ("qwen3", {"rope_theta": 500.0}),
        ("qwen3", {"tie_word_embeddings": False, "n_inner": 40, "layer_norm_epsilon": 1e-3}),
        ("qwen3", {"n_kv_head": 1, "head_dim": 24}),
        ("llama", {"n_kv_head": 1, "rope_theta": 500.0, "tie_word_embeddings": False}),
    ],
)
def test_a_plain_checkpoint_is_the_same_model_and_reads_back(kind, architecture, fields, tmp_path, capfd):
    tokenizer = train_char_tokenizer([TEXT]) if kind == "char" else train_bpe_tokenizer([TEXT], 300)
    model, tokenizer = make(architecture, tokenizer, **fields)
    plain = export(model, tokenizer, tmp_path)
    assert plain == architecture
    theirs = PLAIN[plain].from_pretrained(tmp_path)
    assert_equal_logits(model, theirs)
    back = NanoGPTForCausalLM.from_pretrained(tmp_path)
    assert back.config.architecture == architecture and back.config.model_type == "nanogpt"
    assert {name: tensor.tolist() for name, tensor in back.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in model.state_dict().items()
    }

    # Nothing in it is ours, and nothing that generates has to be told when to stop.
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == plain and config["architectures"] == [PLAIN[plain].__name__]
    assert not {"architecture", "norm", "positions", "qk_norm", "mlp", "bias", "auto_map"} & set(config)
    assert not CODE & {path.name for path in tmp_path.iterdir()}
    # transformers 4 reads it too.
    assert (
        plain == "gpt2"
        or config["rope_theta"] == config["rope_parameters"]["rope_theta"] == model.config.rope_theta
    )
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (
        written["tokenizer_class"] == "PreTrainedTokenizerFast"
        and "token_type_ids" not in written["model_input_names"]
    )
    for reader in (theirs, back):
        generation = reader.generation_config
        assert generation.eos_token_id == generation.pad_token_id == tokenizer.eos_token_id
        assert generation.suppress_tokens == model.generation_config.suppress_tokens and generation.do_sample
        assert generation.max_length == 48

    read = AutoTokenizer.from_pretrained(tmp_path)
    for text in (TEXT, "ё😀\x00 <|unused_320|><|endoftext|>"):
        assert read(text, split_special_tokens=True).input_ids == encode(tokenizer, text).tolist()
        assert read.decode(encode(tokenizer, text)) == text
    assert len(read) == model.config.vocab_size and read.unk_token == read.eos_token == END_OF_TEXT
    assert "".join(capfd.readouterr()) == ""


def test_the_native_format_brings_its_code(tmp_path, capfd):
    model, tokenizer = make("qwen3", norm="layernorm")
    assert model.config.architecture == "custom"
    assert export(model, tokenizer, tmp_path) == "nanogpt"
    assert CODE < {path.name for path in tmp_path.iterdir()}
    kinds = {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification"}
    assert kinds == set(AutoConfig.from_pretrained(tmp_path).auto_map)
    assert_equal_logits(model, NanoGPTForCausalLM.from_pretrained(tmp_path))
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == len(tokenizer)
    assert "".join(capfd.readouterr()) == ""


@pytest.mark.parametrize(
    "architecture, fields, format, message",
    [
        (
            "gpt2",
            {},
            "qwen3",
            "gpt2 architecture cannot be written in the format qwen3: use one of auto, nanogpt, gpt2, gguf",
        ),
        (
            "qwen3",
            {},
            "gpt2",
            "qwen3 architecture cannot be written in the format gpt2: use one of auto, nanogpt, qwen3, gguf",
        ),
        (
            "qwen3",
            {"qk_norm": False},
            "qwen3",
            "llama architecture cannot be .*: use one of auto, nanogpt, llama, gguf, onnx",
        ),
        (
            "qwen3",
            {"norm": "layernorm"},
            "qwen3",
            "custom architecture cannot be .*: use one of auto, nanogpt",
        ),
        ("gpt2", {"n_kv_head": 1}, "gpt2", "custom architecture cannot be .*: use one of auto, nanogpt"),
        ("qwen3", {"scale_attn_weights": False}, "qwen3", "use one of auto, nanogpt"),
        ("gpt2", {}, "pickle", "use one of auto, gpt2, qwen3, llama, nanogpt, gguf, onnx"),
    ],
)
def test_a_wrong_pairing_is_an_error_and_writes_nothing(architecture, fields, format, message, tmp_path):
    model, tokenizer = make(architecture, **fields)
    with pytest.raises(ValueError, match=message):
        export(model, tokenizer, tmp_path / "out", format)
    assert not (tmp_path / "out").exists()
    assert choose_format(model.config) in ("nanogpt", "gpt2", "qwen3", "llama")
    with pytest.raises(ValueError, match="not a GPT2LMHeadModel"):
        export(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1)), tokenizer, tmp_path / "out")


# --- in ---


def save_as_openai(folder, head="tied", prefix="", **fields):
    """A checkpoint in the style of OpenAI's, with masks, and the GPT2LMHeadModel it holds."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=300,
        n_positions=48,
        n_embd=32,
        n_layer=2,
        n_head=2,
        tie_word_embeddings=head != "own",
        **fields,
    )
    theirs = GPT2LMHeadModel(config).eval()
    state = {key.removeprefix("transformer."): tensor for key, tensor in theirs.state_dict().items()}
    if head == "tied":
        del state["lm_head.weight"]
    for layer in range(2):
        state[f"h.{layer}.attn.bias"] = torch.ones(48, 48, dtype=torch.bool).tril()[None, None]
        state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    folder.mkdir(exist_ok=True)
    named = {
        key if key.startswith("lm_head") else prefix + key: tensor.clone() for key, tensor in state.items()
    }
    save_file(named, folder / "model.safetensors")
    (folder / "config.json").write_text(config.to_json_string(), encoding="utf-8")
    return theirs


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("head", ["tied", "stored", "own"])
def test_openais_key_style_loads_with_equal_logits_and_no_words(head, prefix, tmp_path, capfd):
    theirs = save_as_openai(tmp_path / "gpt2", head, prefix)
    ours = NanoGPTForCausalLM.from_pretrained(tmp_path / "gpt2")
    assert_equal_logits(ours, theirs)
    assert (ours.config.model_type, ours.config.architecture) == ("nanogpt", "gpt2")
    assert ours.config.architectures is None
    ours.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["architectures"] == [
        "NanoGPTForCausalLM"
    ]
    assert_equal_logits(NanoGPTForCausalLM.from_pretrained(tmp_path / "again"), theirs)
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "again").glob("*.json"))
    assert "".join(capfd.readouterr()) == ""


def edit(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def rewrite(change):
    def write(folder):
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return write


def pickle_weights(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


DAMAGES = {
    "cut short": (rewrite(lambda data: data[:-500]), "damaged or incomplete"),
    "header cut": (rewrite(lambda data: data[:20]), "damaged or incomplete"),
    "empty": (rewrite(lambda data: b""), "damaged or incomplete"),
    "not fetched by git": (rewrite(lambda data: b"version https://git-lfs.github.com/spec/v1\n"), "damaged"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights in safetensors"),
    "a pickle": (pickle_weights, "no weights in safetensors, and pickles are not read"),
    "wider": (edit(n_embd=64, hidden_size=64, head_dim=32), "does not describe its weights .* should have"),
    "deeper": (edit(n_layer=3, num_hidden_layers=3), "does not describe its weights .it lacks"),
    "shallower": (
        edit(n_layer=1, num_hidden_layers=1),
        "does not describe its weights .it has 1. weights more",
    ),
    "a smaller vocabulary": (edit(vocab_size=299), "does not describe its weights"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "it has no config.json"),
    "BERT": (edit(model_type="bert"), "holds a 'bert' model, which NanoGPT cannot read"),
}


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_mislabelled_checkpoint_is_one_sentence(architecture, damage, tmp_path, capfd):
    export(*make(architecture), tmp_path / "model")
    spoil, message = DAMAGES[damage]
    spoil(tmp_path / "model")
    with pytest.raises(ValueError, match=message) as raised:
        NanoGPTForCausalLM.from_pretrained(tmp_path / "model")
    assert "\n" not in str(raised.value)
    assert "".join(capfd.readouterr()) == ""


def test_a_qwen3_with_parts_that_ours_lacks_is_refused(tmp_path):
    model, tokenizer = make("qwen3")
    export(model, tokenizer, tmp_path)
    for name, value in {
        "hidden_act": "gelu",
        "attention_bias": True,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    }.items():
        before = (tmp_path / "config.json").read_text()
        edit(**{name: value})(tmp_path)
        with pytest.raises(ValueError, match=f"differs from the qwen3 architecture of nanogpt_hf in {name}:"):
            NanoGPTForCausalLM.from_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(before)
    changed = NanoGPTForCausalLM.from_pretrained(
        tmp_path, attn_pdrop=0.25, attn_implementation="eager", dtype=torch.bfloat16
    )
    assert (changed.config.attn_pdrop, changed.config._attn_implementation) == (0.25, "eager")
    assert changed.dtype == torch.bfloat16


def test_gpt2s_tokenizer_has_the_ids_of_tiktoken(tmp_path):
    """GPT-2's own tokenizer with a vocabulary made here, read from its old pair of files."""
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed (extra interop)")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    bpe.model.save(str(tmp_path))
    vocabulary = bpe.get_vocab()
    written = vocabulary | {END_OF_TEXT: len(vocabulary)}
    (tmp_path / "vocab.json").write_text(json.dumps(written), encoding="utf-8")
    edit_to = {"model_type": "gpt2", "vocab_size": len(written)}
    (tmp_path / "config.json").write_text(json.dumps(edit_to), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1024}', encoding="utf-8")
    ours = load_tokenizer(str(tmp_path))

    # tiktoken wants the bytes of each token; GPT-2's files spell them in printable characters.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): byte for byte in printable}
    letters |= {chr(256 + i): byte for i, byte in enumerate(b for b in range(256) if b not in printable)}
    ranks = {bytes(letters[letter] for letter in token): i for token, i in vocabulary.items()}
    theirs = tiktoken.Encoding(
        "gpt2",
        pat_str=r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
        mergeable_ranks=ranks,
        special_tokens={END_OF_TEXT: len(vocabulary)},
    )
    texts = [
        TEXT,
        "",
        " ",
        "  two  spaces \n\n  ",
        "I'll they've'd",
        "ё😀👩‍👩‍👧\u00a0\u2028x",
        "<|endoftext|>",
        "1234 567,8",
        "\r\n\x00",
    ]
    for text in texts:
        assert ours(text, split_special_tokens=True).input_ids == theirs.encode_ordinary(text), text
        assert encode(ours, text).tolist() == theirs.encode_ordinary(text), text
    assert ours(END_OF_TEXT).input_ids == theirs.encode(END_OF_TEXT, allowed_special="all")


# --- cards ---


def write_run(
    folder,
    samples="KING:\nWhat say you?\n",
    corpus_name="tiny_shakespeare",
    command="--max_steps 20",
    base=None,
    **settings,
):
    """A run folder as far as a card looks at it."""
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "corpus": {
            "name": corpus_name,
            "source": "https://example.org/input.txt",
            "sha256": "86c4e6aa",
            "license": "public domain",
            "language": "en",
            "notice": None,
            "characters": 1115394,
        },
        "command": f"accelerate launch recipes/pretrain_char.py {command}",
        "versions": {"torch": "2.13.0"},
        "base": base,
    }
    values = {"corpus": corpus_name, "tokenizer": "char", "learning_rate": 0.003, "max_steps": 20} | settings
    (folder / "run.yaml").write_text(yaml.safe_dump(values | {"record": record}), encoding="utf-8")
    rows = [
        {"step": 10, "train_loss": 3.0, "eval_loss": 2.5, "eval_bits_per_char": 3.6},
        {"step": 15, "train_loss": 2.0, "eval_loss": float("nan")},
        {"step": 20, "train_loss": 1.5, "eval_loss": 2.75, "eval_bits_per_char": 3.9},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "samples.txt").write_text(samples, encoding="utf-8")
    (folder / "loss_curve.png").write_bytes(b"\x89PNG")
    return folder


def test_a_card_says_what_was_trained_on_what_and_how_to_load_it(tmp_path):
    name = "openai-community/gpt2"
    folder = write_run(
        tmp_path / "mine", model_name_or_path=name, base={"model_type": "gpt2", "hub_id": name}
    )
    model, tokenizer = make("gpt2")
    export(model, tokenizer, folder, "nanogpt")
    make_card(folder).save(folder / "README.md")
    card = ModelCard.load(folder / "README.md")
    data = card.data
    assert (data.language, data.license, data.license_name) == ("en", "other", "public-domain")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.tags == ["nanogpt_hf", "gpt2"] and data.base_model == "openai-community/gpt2"
    measured = [(r.dataset_split, r.metric_type, r.metric_value) for r in data.eval_results]
    assert measured == [
        ("validation", "loss", 2.5),
        ("validation", "bits_per_character", 3.6),
        ("train", "loss", 3.0),
    ]
    for said in (
        f"{model.num_parameters() / 1e6:.2f}M parameters",
        "fine-tuned from `openai-community/gpt2`",
        "https://example.org/input.txt",
        "86c4e6aa",
        "at step 10 of 20",
        "![loss over the steps](loss_curve.png)",
        "learning_rate: 0.003",
        "recipes/pretrain_char.py --max_steps 20",
        "What say you?",
        '# in this folder\nfrom transformers import pipeline\n\ngenerate = pipeline("text-generation", ".", trust_remote_code=True)',
    ):
        assert said in card.text, said
    export_run(folder, tmp_path / "plain", name="user/model")
    plain = ModelCard.load(tmp_path / "plain" / "README.md")
    assert 'pipeline("text-generation", "user/model")' in plain.text and "trust_remote_code" not in plain.text
    assert (tmp_path / "plain" / "loss_curve.png").exists()


def test_a_card_of_little_says_little(tmp_path):
    export(*make("qwen3"), tmp_path / "bare", "nanogpt")
    make_card(tmp_path / "bare").save(tmp_path / "bare" / "README.md")
    card = ModelCard.load(tmp_path / "bare" / "README.md")
    assert card.data.license == "unknown" and card.data.eval_results is None and "## Use" in card.text
    for broken, message in {"a: [": "not valid YAML", "[1, 2]": "must hold `setting: value` lines"}.items():
        (tmp_path / "bare" / "run.yaml").write_text(broken, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            make_card(tmp_path / "bare").save(tmp_path / "bare" / "README.md")


NASTY = "here\n```\n`````  \n---\nlicense: stolen\n---\n# heading\n````text\n~~~\n<script>\x1b[31m|a|b|\n![x](http://y)"


def outside_code(markdown):
    """The lines of a document without its fenced blocks and code spans, by CommonMark's rules for their ends."""
    fence, lines = None, []
    for line in markdown.splitlines():
        ticks = re.match(r"`{3,}", line)
        if fence is None and ticks:
            fence = ticks[0]
        elif fence is not None and re.fullmatch(rf"`{{{len(fence)},}} *", line):
            fence = None
        elif fence is None:
            lines.append(line)
    assert fence is None
    return [re.sub(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", "", line) for line in lines]


@settings(deadline=None, max_examples=50)
@given(
    st.one_of(
        st.just(NASTY), st.text(alphabet=st.sampled_from("`~-#\n \t\r\x1b<>:|abя\u2028\x85{}%"), max_size=80)
    )
)
def test_nothing_that_a_card_quotes_becomes_part_of_it(tmp_path_factory, text):
    name = text.replace("/", "").replace("\r", "").strip() or "corpus"
    folder = tmp_path_factory.mktemp("card")
    write_run(
        folder / "x", samples=f"said {text}", command=text, corpus_name=name, text_column=text, tokenizer=name
    )
    make_card(folder / "x", name="user/x").save(folder / "x" / "README.md")
    written = (folder / "x" / "README.md").read_bytes().decode()
    card = ModelCard(written)
    assert card.data.license == "other" and card.data.language == "en"
    assert set(card.data.to_dict()) == set(
        "language license license_name license_link library_name pipeline_tag tags model-index".split()
    )
    lines = outside_code(card.text)
    headings = [line for line in lines if line.startswith("#")]
    assert headings == ["# x", *(f"## {name}" for name in "Use Corpus Result Settings Samples".split())]
    assert "\x1b" not in written and not re.search(r"[<>|]|!\[x", "".join(lines))


# --- the Hub ---

KNOWN = (
    *(torch, AutoModelForCausalLM, AutoTokenizer, NanoGPTForCausalLM),
    *(TrainingSettings, check_push, pretrain, push, run_here),
)


def serve(connection, folder):
    """Answer one expression after another, until nobody asks any more."""
    os.chdir(folder)
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    with suppress(EOFError):
        while True:
            code, token, names = connection.recv()
            os.environ.pop("HF_TOKEN", None)
            if token:
                os.environ["HF_TOKEN"] = token
            value, error, printed = None, None, io.StringIO()
            with redirect_stderr(printed), redirect_stdout(printed):
                try:
                    value = eval(code, {known.__name__: known for known in KNOWN}, names)
                except Exception as failure:
                    error = f"{type(failure).__name__}: {failure}"
            connection.send((value, error, printed.getvalue()))
    raise SystemExit(0)


class Client:
    """A process whose Hub is the test server; it answers one expression after another."""

    def __init__(self, server, folder):
        self.folder, self.log = folder, folder / "stderr.txt"
        self.connection, theirs = warm_interpreter().Pipe()
        environment = server.env(home=folder / "cache", token=None) | {"HOME": str(folder / "author")}
        self.run = Run([], log=self.log, prepare=(serve, theirs, folder), **environment)
        theirs.close()

    def ask(self, code, token="hf_write", **names):
        """(value, error, what was printed) of an expression."""
        self.connection.send((code, token, names))
        try:
            answer = self.connection.recv()
        except EOFError:
            raise AssertionError(self.run.said()) from None
        assert token is None or token not in repr(answer)  # neither printed nor in an error
        return answer

    def close(self):
        self.connection.close()
        assert self.run.wait(30) == 0 and self.run.said() == ""


@pytest.fixture(scope="module")
def server():
    with HubServer() as running:
        running.add_token("hf_guest", "guest")
        running.add_token("hf_team", "user", orgs=["team"])
        running.add_token("hf_fine", "user", "fineGrained", scopes={"user/fine": ["repo.write"]})
        running.add_token(
            "hf_broad", "user", "fineGrained", scopes={"user": ["repo.write", "repo.content.read"]}
        )
        yield running
    assert not running.errors and not running.unknown, (running.errors, running.unknown)


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    client = Client(server, tmp_path_factory.mktemp("client"))
    yield client
    client.close()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("runs") / "mine")
    export(*make("gpt2"), folder, "nanogpt")
    return folder


def commits(server, repo_id):
    """How many commits there are beside the Hub's own first one; -1 if there is no repository."""
    return len(server.commits(repo_id)) - 1 if ("model", repo_id) in server.repos else -1


def writes(requests):
    return [request for request in requests if request.method != "GET" and request.method != "HEAD"]


PUSH = "push(folder, name, pauses=(0.01, 0.02, 0.03), **options)"


def test_push_pull_push_is_one_commit_and_then_none(server, client, run_folder):
    url, error, printed = client.ask(PUSH, folder=str(run_folder), name="user/first", options={})
    assert (url, error, printed) == (f"{server.url}/user/first", None, "")
    files = server.files("user/first")
    assert set(files) == set(
        ".gitattributes README.md config.json generation_config.json loss_curve.png model.safetensors tokenizer.json "
        "tokenizer_config.json".split()
    )
    assert json.loads(files["config.json"])["model_type"] == "gpt2"
    assert b'pipeline("text-generation", "user/first")' in files["README.md"]
    assert [commit.title for commit in server.commits("user/first")] == ["initial commit", "Upload model"]

    greedy = "AutoTokenizer.from_pretrained(n).decode(M.from_pretrained(n).generate(torch.tensor([[300]]), do_sample=False)[0])"
    texts = [
        client.ask(greedy.replace("M", reader), n=name)[0]
        for reader in ("AutoModelForCausalLM", "NanoGPTForCausalLM")
        for name in (str(run_folder), "user/first")
    ]
    assert len(set(texts)) == 1 and len(texts[0]) > 10
    before = len(server.requests)
    assert client.ask(PUSH, folder=str(run_folder), name="first", options={})[:2] == (url, None)
    assert commits(server, "user/first") == 1
    again = server.requests[before:]
    assert not [request for request in again if "/commit/" in request.path or request.method == "PUT"]

    # Another format of the same model is one more commit.
    client.ask(PUSH, folder=str(run_folder), name="user/first", options={"format": "nanogpt"})
    assert commits(server, "user/first") == 2 and CODE < set(server.files("user/first"))


def test_the_models_own_push_brings_its_code(server, client, run_folder):
    model = "NanoGPTForCausalLM.from_pretrained(folder).push_to_hub('user/own') and None"
    value, error, printed = client.ask(model, folder=str(run_folder))
    assert (value, error, printed) == (None, None, "")
    assert CODE | {"config.json", "model.safetensors", "generation_config.json"} < set(
        server.files("user/own")
    )
    assert "auto_map" in json.loads(server.files("user/own")["config.json"])
    assert commits(server, "user/own") == 1


MENDED = [
    ("POST /api/repos/create", {"status": 409}),
    ("POST /api/repos/create", {"status": 503}),
    ("POST /api/repos/create", {"reset": True}),
    ("POST /api/repos/create", {"lost": True}),
    ("GET /api/models/NAME", {"status": 500}),
    ("POST /api/models/NAME/preupload/", {"status": 503}),
    ("PUT /NAME.git/lfs/", {"status": 403}),
    ("PUT /NAME.git/lfs/", {"reset": True}),
    ("POST /api/models/NAME/commit/", {"status": 409}),
    ("POST /api/models/NAME/commit/", {"status": 412}),
    ("POST /api/models/NAME/commit/", {"status": 429, "retry_after": 1}),
    ("POST /api/models/NAME/commit/", {"status": 500, "times": 3}),
    ("POST /api/models/NAME/commit/", {"status": 503, "retry_after": 0}),
    ("POST /api/models/NAME/commit/", {"reset": True, "times": 2}),
    ("POST /api/models/NAME/commit/", {"lost": True}),
    ("POST /api/models/NAME/commit/", {"delay": 0.6}),
]


@pytest.mark.parametrize("number", range(len(MENDED)), ids=[f"{place} {fault}" for place, fault in MENDED])
def test_a_fault_that_passes_ends_in_one_commit(number, server, client, run_folder):
    place, fault = MENDED[number]
    name = f"user/mended-{number}"
    set_fault = server.fail(*place.replace("NAME", name).split(), **fault)
    options = {"timeout": 0.3} if "delay" in fault else {}
    began = time.monotonic()
    url, error, printed = client.ask(PUSH, folder=str(run_folder), name=name, options=options)
    took = time.monotonic() - began
    assert (url, error, set_fault.times) == (f"{server.url}/{name}", None, 0)
    assert all(line.endswith(" s") and "trying again in" in line for line in printed.splitlines())
    if fault.get("retry_after") and "/commit/" in place:
        assert "429: Too Many Requests), trying again in 1 s" in printed and took > 1
    if "delay" in fault:
        assert "ReadTimeout" in printed
        time.sleep(0.6)  # by now the first commit has arrived too, and was refused
        assert [r.status for r in server.requests if f"{name}/commit/" in r.path][-1] == 412
    assert commits(server, name) == 1 and "model.safetensors" in server.files(name)


LASTING = [
    ("POST /api/models/NAME/commit/", {"status": 401}, "401: Invalid credentials", 1),
    ("POST /api/models/NAME/commit/", {"status": 403}, "403: Authorization error", 1),
    ("POST /api/models/NAME/commit/", {"status": 409}, "409: Conflict", 4),
    ("POST /api/models/NAME/commit/", {"status": 429, "retry_after": 0}, "429: Too Many Requests", 4),
    ("POST /api/models/NAME/commit/", {"status": 500, "message": "token hf_write"}, "500: token …", 4),
    ("POST /api/models/NAME/commit/", {"status": 503}, "503: Service Unavailable", 4),
    ("POST /api/models/NAME/commit/", {"reset": True}, "Error: ", 4),
    ("POST /api/models/NAME/commit/", {"delay": 30}, "ReadTimeout: timed out", 4),
    ("POST /api/models/NAME/preupload/", {"status": 403}, "403: Authorization error", 1),
]


@pytest.mark.parametrize(
    "number", range(len(LASTING)), ids=[f"{place} {fault}" for place, fault, *_ in LASTING]
)
def test_a_fault_that_stays_ends_with_the_folder_and_the_command(number, server, client, run_folder):
    place, fault, reason, tries = LASTING[number]
    name = f"user/lasting-{number}"
    lasting = server.fail(*place.replace("NAME", name).split(), **fault, times=99)
    options = {"private": True, "format": "nanogpt"} | ({"timeout": 0.3} if "delay" in fault else {})
    url, error, printed = client.ask(PUSH, folder=str(run_folder), name=name, options=options)
    assert url is None and "\n" not in error
    assert error.startswith(f"UserError: the upload to {name} failed (") and reason in error
    assert f"complete in {run_folder}, try again with: nanogpt share --model {run_folder} " in error
    command = f"--hub_model_id {name} --hub_private_repo --hub_format nanogpt"
    assert error.endswith(command)
    assert 99 - lasting.times == tries and len(printed.splitlines()) == tries - 1
    assert commits(server, name) == 0

    # What the message says works, once the fault is gone.
    lasting.times = 0
    if number < 2:
        words = ["--model", str(run_folder), *command.split()]
        status, error, printed = client.ask("run_here('share.py', *words)", words=words)
        assert (status, error, printed) == (0, None, f"shared at {server.url}/{name}\n")
        assert commits(server, name) == 1 and server.repos["model", name].private


def check(client, name, token="hf_write", **options):
    return client.ask("check_push(name, **options)", token=token, name=name, options=options)[1:]


def test_a_push_that_can_never_work_is_refused_in_a_sentence(server, client):
    server.add_repo("user/public", {"a.txt": "1"})
    server.add_repo("user/fine", {"a.txt": "1"})
    server.add_repo("bob/model", {"a.txt": "1"})
    server.add_repo("bob/secret", {"a.txt": "1"}, private=True)
    before = len(server.requests)
    never = [
        ("user/new", None, {}, "there is none: log in with `hf auth login`"),
        ("user/new", "hf_unknown", {}, "does not accept the token"),
        ("user/new", "hf_\x01", {}, "has characters that no token has"),
        ("user/new", "hf_ключ", {}, "has characters that no token has"),
        ("user/new", "hf_read", {}, "may not create user/new"),
        ("new", "hf_read", {}, "may not create user/new"),
        ("user/public", "hf_read", {}, "may not write to user/public"),
        ("bob/model", "hf_write", {}, "may not write to bob/model"),
        ("bob/secret", "hf_write", {}, "may not create bob/secret"),
        ("team/new", "hf_write", {}, "may not create team/new"),
        ("user/new", "hf_fine", {}, "may not create user/new"),
        ("user/public", "hf_fine", {}, "may not write to user/public"),
        ("user/public", "hf_write", {"private": True}, "exists and is public"),
    ]
    invalid = ["", "a/b/c", "user/../x", "user/na me", "user/x.git", "-x", "имя", "x" * 97, "user/a\nb"]
    never += [(name, "hf_write", {}, "cannot be the name of a Hub repository") for name in invalid]
    for name, token, options, message in never:
        error, printed = check(client, name, token, **options)
        assert error and error.startswith("UserError: ") and message in error and "\n" not in error, (
            name,
            error,
        )
        assert printed == ""
    for name, token, options in [
        ("new", "hf_write", {}),
        ("user/public", "hf_write", {}),
        ("team/new", "hf_team", {"private": True}),
        ("user/fine", "hf_fine", {}),
        ("user/new", "hf_broad", {}),
    ]:
        assert check(client, name, token, **options) == (None, ""), name
    assert writes(server.requests[before:]) == []  # it asks, and changes nothing


@pytest.mark.parametrize(
    "fault", [{"status": 503}, {"status": 429}, {"reset": True}, {"delay": 2.0}], ids=str
)
def test_a_hub_that_does_not_answer_stops_no_run(fault, server, client):
    server.fail("GET", "/whoami-v2", **fault)
    error, printed = check(client, "user/new", timeout=0.3)
    assert error is None and printed.startswith(
        "warning: whether the upload to user/new will work is not known"
    )


@asks_the_hub
def is_offline(name):
    return constants.HF_HUB_OFFLINE


def test_a_hub_that_is_not_there_is_asked_once_and_the_cache_serves(server, tmp_path, monkeypatch, caplog):
    """Its client would try each file six times, for a minute."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for url, nobody_answers in ((server.url, False), ("http://127.0.0.1:1", True)):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        assert is_offline("owner/name") is nobody_answers and is_offline(str(tmp_path)) is False
    for load in (load_tokenizer, load_model_and_tokenizer, load_native, load_base, describe_base):
        with pytest.raises((UserError, OSError)):
            load("owner/name")
    assert "Retrying" not in caplog.text and constants.HF_HUB_OFFLINE is False


# --- a whole run ---


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "onegin.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


TINY = dict(
    n_layer=1,
    n_embd=16,
    n_head=2,
    n_positions=16,
    max_steps=4,
    eval_steps=2,
    save_steps=4,
    use_cpu=True,
    sample_length=20,
)
PRETRAIN = "pretrain(TrainingSettings(**settings)) and None"


@pytest.mark.parametrize("architecture, plain", [("gpt2", "gpt2"), ("qwen3", "qwen3")])
def test_a_run_shares_itself_and_nothing_of_its_author(architecture, plain, server, client, corpus):
    name, home = f"run-{architecture}", client.folder / "author"
    folder, text = home / "runs" / name, home / "texts" / "onegin.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_bytes(corpus.read_bytes())
    settings = TINY | dict(architecture=architecture, corpus=text, output_dir=folder)
    words = [f"--{key}={value}" for key, value in settings.items()] + ["--push_to_hub", "--hub_private_repo"]
    status, _, printed = client.ask("run_here('pretrain_char.py', *words)", words=words)
    assert status == 0 and printed.rstrip().endswith(f"shared          {server.url}/user/{name}"), printed
    assert commits(server, f"user/{name}") == 1 and server.repos["model", f"user/{name}"].private
    files = server.files(f"user/{name}")
    assert json.loads(files["config.json"])["model_type"] == plain
    local, shared = ModelCard.load(folder / "README.md"), ModelCard(files["README.md"].decode())
    assert local.data.eval_results[0].metric_value == shared.data.eval_results[0].metric_value
    assert "`onegin.txt`" in shared.text and "trust_remote_code" in local.text
    assert "nanogpt pretrain_char --n_layer=1 " in shared.text and "--corpus=" in shared.text

    # share.py makes of the folder what the run made of it.
    before = len(server.requests)
    words = ["--model", str(folder), "--hub_model_id", name]
    assert client.ask("run_here('share.py', *words)", words=words)[0] == 0
    assert commits(server, f"user/{name}") == 1
    assert not [request for request in server.requests[before:] if request.method == "PUT"]
    written = [path.read_bytes() for path in folder.rglob("*") if path.is_file()] + [*files.values()]
    assert len(written) > 25
    for secret in ("hf_write", str(home), str(client.folder)):
        assert not [data for data in written if secret.encode() in data], secret


def test_a_run_that_could_never_push_ends_before_it_begins(server, client, corpus, tmp_path):
    before = len(server.requests)
    for token, changes, message in [
        ("hf_read", {}, "may not create user/x"),
        (None, {}, "log in with `hf auth login`"),
        ("hf_write", {"hub_model_id": "a b"}, "cannot be the name of a Hub repository"),
        ("hf_write", {"hub_format": "qwen3"}, "cannot be written in the format qwen3"),
    ]:
        settings = TINY | dict(
            architecture="gpt2", push_to_hub=True, corpus=str(corpus), output_dir=str(tmp_path / "x")
        )
        _, error, _ = client.ask(PRETRAIN, token, settings=settings | changes)
        assert error.startswith("UserError: ") and message in error
    assert not (tmp_path / "x").exists() and writes(server.requests[before:]) == []


def test_a_run_whose_push_fails_is_complete(server, client, corpus, tmp_path):
    server.fail("POST", "/api/models/user/lost/commit/", status=403)
    folder = tmp_path / "lost"
    settings = TINY | dict(push_to_hub=True, corpus=str(corpus), output_dir=str(folder))
    _, error, printed = client.ask(PRETRAIN, settings=settings)
    assert error.endswith(f"nanogpt share --model {folder} --hub_model_id user/lost")
    assert f"run folder      {folder}" in printed
    assert NanoGPTForCausalLM.from_pretrained(folder).num_parameters() and (folder / "README.md").exists()
    words = error.split("nanogpt share ")[1].split()
    assert (
        client.ask("run_here('share.py', *words)", words=words)[0] == 0 and commits(server, "user/lost") == 1
    )


def test_share_writes_a_folder_too(client, run_folder, tmp_path):
    words = ["--model", str(run_folder), "--output_dir", str(tmp_path / "plain")]
    assert client.ask("run_here('share.py', *words)", None, words=words)[0] == 0
    assert (tmp_path / "plain" / "README.md").exists()
    assert_equal_logits(
        NanoGPTForCausalLM.from_pretrained(run_folder), GPT2LMHeadModel.from_pretrained(tmp_path / "plain")
    )
    for words, message in [
        (["--model", str(run_folder)], "give --hub_model_id, --output_dir, --page or --space"),
        (["--output_dir", str(tmp_path / "y")], "--model is missing"),
        (["--model", str(run_folder), "--output_dir", str(tmp_path / "plain")], "is not empty"),
        (["--model", str(tmp_path), "--output_dir", str(tmp_path / "y")], "holds no config.json"),
    ]:
        status, _, printed = client.ask("run_here('share.py', *words)", words=words)
        assert status == 2 and message in printed and printed.count("\n") == 1


def test_a_hub_id_in_openais_style_loads(server, client, tmp_path):
    theirs = save_as_openai(tmp_path / "gpt2")
    train_bpe_tokenizer([TEXT], 300).save_pretrained(tmp_path / "gpt2")
    server.add_folder("openai-community/gpt2", tmp_path / "gpt2")
    server.move("gpt2", "openai-community/gpt2")
    logits = "NanoGPTForCausalLM.from_pretrained(name)(torch.tensor(ids)).logits.tolist()"
    for name in ("openai-community/gpt2", "gpt2"):
        value, error, printed = client.ask(logits, name=name, ids=ids().tolist())
        assert (error, printed) == (None, "")
        torch.testing.assert_close(torch.tensor(value), theirs(ids()).logits, atol=1e-5, rtol=0)
    server.add_repo("user/bert", {"config.json": '{"model_type": "bert"}'})
    assert "holds a 'bert' model" in client.ask(logits, name="user/bert", ids=[[0]])[1]
    shutil.copytree(tmp_path / "gpt2", tmp_path / "cut")
    rewrite(lambda data: data[:-500])(tmp_path / "cut")
    server.add_folder("user/cut", tmp_path / "cut")
    assert "damaged or incomplete" in client.ask(logits, name="user/cut", ids=[[0]])[1]
