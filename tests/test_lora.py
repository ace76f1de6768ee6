"""Fine-tuning: a small GPT-2 that knows Shakespeare, served by a Hub as OpenAI serves theirs, learns Pushkin."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st
from processes import digests, finished, metrics, stranger, without_times
from processes import run_here as run
from safetensors.torch import load_file, save_file
from test_recipes import RUSSIAN
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2ForSequenceClassification

from nanogpt_hf import NanoGPTConfig, NanoGPTForCausalLM
from nanogpt_hf.data.corpora import load_corpus
from nanogpt_hf.data.named_corpora import DOCUMENT_ENDS
from nanogpt_hf.data.tokenization import (
    encode,
    extend_tokenizer,
    load_tokenizer,
    train_bpe_tokenizer,
    train_char_tokenizer,
)
from nanogpt_hf.model.loading import load_model_and_tokenizer
from nanogpt_hf.sharing.export import export
from nanogpt_hf.training.lora import extend_embedding, load_base, load_merged

ROOT = Path(__file__).parents[1]
ENGLISH = "Now is the winter of our discontent\nMade glorious summer by this sun of York;\n" * 40
POEMS = "".join(
    f"Песнь {number}\n\nМой дядя самых честных правил,\nКогда не в шутку занемог,\nОн уважать себя заставил\n\n"
    "И лучше выдумать не мог.\nЕго пример другим наука.\n\n"
    for number in range(40)
)
RHYTHM = "--max_steps 12 --warmup_steps 2 --eval_steps 6 --save_steps 6 --logging_steps 3 --use_cpu --sample_length 20".split()
SMALL = [*RHYTHM, "--per_device_train_batch_size", "4", "--document_end", DOCUMENT_ENDS["tiny_pushkin"]]


def in_openai_style(folder: Path) -> None:
    """Rename the weights of a plain checkpoint as in OpenAI's: no prefix, a causal mask in every layer."""
    weights = load_file(folder / "model.safetensors")
    weights = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    for layer in range(2):
        weights[f"h.{layer}.attn.bias"] = torch.ones(32, 32).tril()[None, None]
    weights.pop("lm_head.weight", None)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The base in a folder, and the poems in a file."""
    folder = tmp_path_factory.mktemp("lora")
    (folder / "english.txt").write_text(ENGLISH, encoding="utf-8")
    (folder / "poems.txt").write_text(POEMS, encoding="utf-8")
    sizes = "--vocab_size 320 --architecture gpt2 --n_layer 2 --n_embd 32 --n_head 2 --n_positions 32".split()
    words = [*sizes, *RHYTHM, "--max_steps", 40, "--optim", "adamw", "--learning_rate", "1e-2"]
    status = run(
        "pretrain_bpe.py", "--corpus", folder / "english.txt", "--output_dir", folder / "run", *words
    )
    assert status == 0
    export(*load_model_and_tokenizer(str(folder / "run")), folder / "base")
    in_openai_style(folder / "base")
    return folder


@pytest.fixture
def finetune(places, tmp_path):
    """finetune(*words) -> its run folder."""

    def start(*words, base=places / "base", folder=tmp_path / "tuned"):
        words = ["--corpus", places / "poems.txt", "--model_name_or_path", base, *SMALL, *words]
        AcceleratorState._reset_state(reset_partial_state=True)
        assert run("finetune_lora.py", "--output_dir", folder, *words) == 0
        return folder

    return start


@pytest.fixture(scope="module")
def adapter(places):
    words = ["--corpus", places / "poems.txt", "--model_name_or_path", places / "base", *SMALL]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert run("finetune_lora.py", "--output_dir", places / "adapter", *words) == 0
    return places / "adapter"


@torch.no_grad()
def logits(model, tokenizer):
    ids = torch.from_numpy(encode(tokenizer, POEMS)[:30]).long()[None]
    return model.eval()(ids).logits


# --- the whole way ---

READER = """
import json, sys, torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

plain, extended, text, answer = json.loads(sys.argv[1])
def read(load, folder):
    model = load.from_pretrained(folder).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(text).input_ids[:30]])
    with torch.no_grad():
        return type(model).__name__, model(ids).logits
answers = {"plain": read(AutoPeftModelForCausalLM, plain), "extended": read(AutoPeftModelForCausalLM, extended)}
answers |= {"auto": read(AutoModelForCausalLM, plain), "merged": read(AutoModelForCausalLM, extended + "/merged")}
words = pipeline("text-generation", extended + "/merged")("Мой", max_new_tokens=8)[0]["generated_text"]
save_file({name: logits for name, (_, logits) in answers.items()}, answer)
print(json.dumps([{name: kind for name, (kind, _) in answers.items()}, words]))
"""


def test_a_base_of_the_hub_learns_pushkin_and_others_load_what_it_made(places, hub, tmp_path):
    hub.add_folder("openai-community/gpt2", places / "base")
    environment = hub.env(home=tmp_path / "home")

    def start(*words, **more):
        return finished(words, recipe="finetune_lora.py", **environment | more)

    poems = ["--corpus", places / "poems.txt", *SMALL]
    extended, plain = tmp_path / "extended", tmp_path / "plain"
    share = ["--merge", "--extend_vocabulary", 60, "--push_to_hub", "--hub_model_id", "mine"]
    said = start(*poems, "--output_dir", extended, *share)
    assert "trains " in said and "tokens per character, with 60 more tokens" in said
    assert "bits per byte" in said
    hub_saw = len(hub.requests)
    start(*poems, "--output_dir", plain, HF_HUB_OFFLINE="1")  # the base is in the cache
    assert len(hub.requests) == hub_saw

    for folder in (extended, plain):
        written = json.loads((folder / "adapter_config.json").read_text())
        assert written["base_model_name_or_path"] == "openai-community/gpt2"
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert "base_model: openai-community/gpt2" in card and "library_name: peft" in card
        assert "| before, the base | after |" in card
        rows = [row for row in metrics(folder) if "eval_loss" in row]
        assert [row["step"] for row in rows] == [0, 6, 12]
        assert rows[-1]["eval_loss"] < rows[0]["eval_loss"] - 0.1
    pushed = hub.files("user/mine") if ("model", "user/mine") in hub.repos else hub.files("mine")
    assert "model.safetensors" in pushed and "adapter_config.json" not in pushed
    assert b"base_model: openai-community/gpt2" in pushed["README.md"]

    answer = tmp_path / "logits.safetensors"
    asked = json.dumps([str(plain), str(extended), POEMS, str(answer)])
    said = stranger(READER, asked, folder=tmp_path, environment=environment)
    kinds, words = json.loads(said.splitlines()[-1])
    assert kinds == {
        "plain": "PeftModelForCausalLM",
        "extended": "PeftModelForCausalLM",
        "auto": "GPT2LMHeadModel",
        "merged": "GPT2LMHeadModel",
    }
    assert words.startswith("Мой") and len(words) > 3
    read = load_file(answer)
    assert torch.equal(read["plain"], read["auto"])
    torch.testing.assert_close(read["merged"], read["extended"], atol=1e-4, rtol=0)
    assert read["extended"].shape[-1] == read["plain"].shape[-1] + 60
    # What is trained here is what the others read there.
    edit = json.loads((plain / "adapter_config.json").read_text())
    edit["base_model_name_or_path"] = str(places / "base")
    (plain / "adapter_config.json").write_text(json.dumps(edit))
    (plain / "manifest.json").unlink()  # which would call that damage
    torch.testing.assert_close(
        logits(*load_model_and_tokenizer(str(plain))), read["plain"], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    "words, adapted",
    [
        (
            [
                "--target_modules",
                "attention",
                "--use_dora",
                "--extend_vocabulary",
                "60",
                "--lora_dropout",
                "0.1",
            ],
            4,
        ),
        (
            [
                "--target_modules",
                "mlp",
                "h.0.attn.c_attn",
                "--use_rslora",
                "--lora_r",
                "4",
                "--optim",
                "muon",
            ],
            5,
        ),
        (["--gradient_checkpointing", "--bf16", "true"], 8),
    ],
    ids=["dora", "rslora", "checkpointing"],
)
def test_an_adapter_and_what_it_is_merged_into_are_equal(words, adapted, finetune):
    folder = finetune(*words, "--merge")
    model, tokenizer = load_model_and_tokenizer(str(folder))
    merged, _ = load_model_and_tokenizer(str(folder / "merged"))
    torch.testing.assert_close(logits(merged, tokenizer), logits(model, tokenizer), atol=1e-4, rtol=0)
    rows = [row for row in metrics(folder) if "eval_loss" in row]
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]
    names = load_file(folder / "adapter_model.safetensors")
    assert len({name.split(".lora_A")[0] for name in names if "lora_A" in name}) == adapted


def test_a_model_of_ours_is_a_base_too(places, finetune, tmp_path):
    words = "--architecture qwen3 --n_layer 1 --n_embd 32 --n_head 2 --n_positions 32".split()
    base = tmp_path / "qwen3"
    AcceleratorState._reset_state(reset_partial_state=True)
    assert (
        run("pretrain_char.py", "--corpus", places / "poems.txt", "--output_dir", base, *words, *RHYTHM) == 0
    )
    folder = finetune(base=base)
    (model, tokenizer), (merged, _) = load_model_and_tokenizer(str(folder)), load_merged(folder)
    torch.testing.assert_close(logits(merged, tokenizer), logits(model, tokenizer), atol=1e-4, rtol=0)
    assert run("share.py", "--model", folder, "--merge", "--output_dir", tmp_path / "plain") == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert theirs.config.model_type == "qwen3"
    torch.testing.assert_close(logits(theirs, tokenizer), logits(model, tokenizer), atol=1e-4, rtol=0)


def test_full_fine_tuning_leaves_a_whole_model(places, finetune):
    folder = finetune("--full")
    assert not (folder / "adapter_config.json").exists()
    before, after = (
        NanoGPTForCausalLM.from_pretrained(path).state_dict() for path in (places / "base", folder)
    )
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert (folder / "samples_before.txt").exists()


def test_an_interrupted_fine_tuning_ends_as_one_run(finetune, tmp_path):
    words = ["--extend_vocabulary", "60", "--lora_dropout", "0.1", "--target_modules", "mlp"]
    whole = finetune(*words)
    parts = shutil.copytree(whole, tmp_path / "parts")
    shutil.rmtree(parts / "checkpoints" / "step-12")
    (parts / "adapter_model.safetensors").unlink()
    finetune(*words, "--resume_from_checkpoint", "last", folder=parts)
    assert digests(parts) == digests(whole) and len(digests(whole)) == 5
    assert without_times(metrics(parts)) == without_times(metrics(whole))


# --- documents and tokens ---


@given(st.lists(st.sampled_from(["Песнь\n\n", "раз\nдва\n\n", "раз\n", "\n"]), min_size=40))
@example_settings(max_examples=50, deadline=None)
def test_poems_are_cut_without_losing_a_character(tmp_path_factory, parts):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_text("начало\n" + "".join(parts) + "конец", encoding="utf-8")
    whole = load_corpus(str(path))
    cut = load_corpus(str(path), document_end=DOCUMENT_ENDS["tiny_pushkin"])
    assert "".join(cut.train) == whole.train[0] and "".join(cut.validation) == whole.validation[0]


def test_every_poem_is_a_document(places):
    corpus = load_corpus(str(places / "poems.txt"), document_end=DOCUMENT_ENDS["tiny_pushkin"])
    assert [document.split("\n")[0] for document in corpus.train] == [
        f"Песнь {n}" for n in range(len(corpus.train))
    ]


@pytest.fixture(scope="module")
def tokenizers():
    """GPT-2's in small, and the same with 80 tokens more."""
    before = train_bpe_tokenizer([ENGLISH], 320)
    return before, extend_tokenizer(before, [RUSSIAN, POEMS], 80)


@given(st.text())
@example_settings(max_examples=50, deadline=None)
def test_an_extended_tokenizer_is_lossless_and_leaves_other_texts_alone(tokenizers, text):
    before, after = tokenizers
    ids = encode(after, text)
    assert after.decode(ids) == text
    if ids.size and ids.max() < len(before):
        assert ids.tolist() == encode(before, text).tolist()


def test_new_tokens_are_learned_after_the_old_and_survive_saving(tokenizers, tmp_path):
    before, after = tokenizers
    assert len(after) == len(before) + 80 and after.eos_token_id == before.eos_token_id
    assert len(encode(after, RUSSIAN)) < len(encode(before, RUSSIAN)) / 3
    assert encode(after, ENGLISH).tolist() == encode(before, ENGLISH).tolist()
    after.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(RUSSIAN).input_ids == encode(after, RUSSIAN).tolist()


def test_a_new_token_begins_as_the_mean_of_its_pieces(places):
    base = str(places / "base")
    model, before = load_base(base), load_tokenizer(base)
    after = extend_tokenizer(before, [RUSSIAN], 30)
    new = extend_embedding(model, before, after)
    assert new == list(range(len(before), len(before) + 30)) and model.config.vocab_size == len(after)
    for token in new:
        pieces = encode(before, after.decode([token])).tolist()
        if "\ufffd" not in after.decode([token]):
            mean = model.transformer.wte.weight[pieces].mean(dim=0)
            torch.testing.assert_close(model.lm_head.weight[token], mean)


# --- mistakes ---


def bad_inputs(places, tmp_path, adapter):
    bases = {name: tmp_path / name for name in ("classifier", "encoder", "tokens", "char")}
    tokenizer = AutoTokenizer.from_pretrained(places / "base")
    for base in bases.values():
        tokenizer.save_pretrained(base)
    sizes = dict(n_layer=1, n_embd=32, n_head=2, n_positions=32, vocab_size=320)
    GPT2ForSequenceClassification(GPT2Config(**sizes)).save_pretrained(bases["classifier"])
    (bases["encoder"] / "config.json").write_text(
        '{"model_type": "bert", "architectures": ["BertForMaskedLM"]}'
    )
    model = NanoGPTForCausalLM.from_pretrained(places / "base")
    model.resize_token_embeddings(100)
    export(model, tokenizer, bases["tokens"], "nanogpt")
    chars = train_char_tokenizer([POEMS])
    fields = sizes | {"vocab_size": len(chars), "eos_token_id": 1, "bos_token_id": 1}
    export(NanoGPTForCausalLM(NanoGPTConfig(**fields)), chars, bases["char"])

    def base(name):
        return ["--model_name_or_path", bases[name]]

    return [
        (base("classifier"), "GPT2ForSequenceClassification"),
        (base("encoder"), "BertForMaskedLM"),
        (base("tokens"), "has 100 in suppress_tokens"),
        (["--model_name_or_path", adapter], "holds an adapter"),
        (["--model_name_or_path", tmp_path / "nowhere"], "there is no folder"),
        ([*base("char"), "--extend_vocabulary", "9"], "byte-level BPE"),
        (["--target_modules", "c_atn"], "c_attn"),
        (["--target_modules", "lm_head"], "embedding's too"),
        (["--target_modules", "wte"], "matches no projection"),
        (["--n_positions", "64"], "context of 32"),
        (["--n_positions", "0"], "--n_positions is 0"),
        (["--n_layer", "3"], "there is no setting --n_layer"),
        (["--tokenizer", "char"], "there is no setting --tokenizer"),
        (["--lora_r", "0"], "at least 1"),
        (["--lora_dropout", "1"], "less than 1"),
        (["--lora_alpha", "0"], "more than 0"),
        (["--load_in_4bit"], "there is no setting --load_in_4bit"),
        (["--merge", "--full"], "share.py"),
        (["--document_end", "("], "no regular expression"),
        (["--merge", "--hub_format", "qwen3"], "cannot be written in the format qwen3"),
        (["--push_to_hub"], "a folder of this machine"),
        (["--lora_rank", "3"], "--lora_r"),
    ]


def test_bad_input_ends_in_one_sentence_with_nothing_written(places, adapter, tmp_path, capsys):
    cases = bad_inputs(places, tmp_path, adapter)
    capsys.readouterr()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    usual = ["--corpus", places / "poems.txt", "--model_name_or_path", places / "base", *SMALL]
    for words, message in cases:
        AcceleratorState._reset_state(reset_partial_state=True)
        status = run("finetune_lora.py", "--output_dir", tmp_path / "out", *usual, *words)
        said = capsys.readouterr().err.strip()
        assert status == 2, (words, status, said)
        assert said.startswith("error: ") and "\n" not in said and message in said, (words, said)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before, words


@pytest.fixture
def moved(places, adapter, tmp_path):
    """A copy of the adapter on a copy of its base: (adapter, base)."""
    base = shutil.copytree(places / "base", tmp_path / "base")
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    put_on(folder, base)
    return folder, Path(base)


def put_on(folder: Path, base: Path) -> None:
    edit = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(edit | {"base_model_name_or_path": str(base)}))
    (folder / "manifest.json").unlink()  # which would call that damage


def train_more(base: Path, name: str) -> None:
    weights = load_file(base / "model.safetensors")
    weights[name] += 1e-3
    save_file(weights, base / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("changed", ["h.0.mlp.c_fc.weight", "wte.weight"])
def test_an_adapter_is_refused_on_a_base_that_was_trained_on(places, moved, tmp_path, capsys, changed):
    """Wherever it is loaded: by share, by sample and compare, by going on."""
    folder, base = moved
    words = ["--corpus", places / "poems.txt", "--model_name_or_path", base, *SMALL]
    load_merged(folder)
    train_more(base, changed)
    for load in (load_merged, lambda folder: load_model_and_tokenizer(str(folder))):
        with pytest.raises(ValueError, match="another base.*other weights now"):
            load(folder)
    newest = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name[5:]))
    checkpoint = Path(shutil.copytree(newest, tmp_path / "newest"))
    put_on(checkpoint, base)
    for each in (folder, checkpoint):
        assert run("sample.py", "--model", each, "--max_new_tokens", 5) == 2
        assert "trained on another base" in capsys.readouterr().err
    AcceleratorState._reset_state(reset_partial_state=True)
    assert run("finetune_lora.py", "--output_dir", folder, *words, "--resume_from_checkpoint", "last") == 2
    assert "belongs to another run: base" in capsys.readouterr().err


def test_an_adapter_of_an_earlier_version_knows_less_of_its_base(moved):
    """It has noted nothing of the embeddings, in run.yaml alone."""
    folder, base = moved
    (folder / "progress.json").unlink()
    values = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
    del values["record"]["identity"]["base_embeddings"]
    (folder / "run.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    train_more(base, "wte.weight")
    load_merged(folder)
    train_more(base, "h.0.mlp.c_fc.weight")
    with pytest.raises(ValueError, match="another base.*other weights now"):
        load_merged(folder)


def test_an_adapter_on_a_base_of_another_shape_is_refused(moved):
    folder, base = moved
    config = NanoGPTForCausalLM.from_pretrained(base).config
    config.n_embd, config.head_dim = 16, 8
    export(NanoGPTForCausalLM(config), AutoTokenizer.from_pretrained(base), base)
    for name in ("run.yaml", "progress.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="cannot be put on its base"):
        load_merged(folder)


@pytest.mark.parametrize("variant", ["ours", "trainer"])
def test_the_benchmark_runs(variant, tmp_path, own_accelerate_state):
    bench = runpy.run_path(str(ROOT / "benchmarks" / "lora_step.py"))
    bench["make_base"](tmp_path, True)
    result = bench["measure"](variant, tmp_path, 2, 6, 2)
    assert (
        result["tokens_per_s"] == pytest.approx(2 * 32 / (result["step_ms"] / 1000))
        and result["peak_gib"] > 0
    )
