"""Training tools of others on our own class: peft with its defaults, and TRL's trainers."""

import math

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import IA3Config, LoraConfig, VeraConfig, get_peft_model
from processes import ROOT, stranger
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

from nanogpt_hf import NanoGPTConfig, NanoGPTForCausalLM, NanoGPTForSequenceClassification
from nanogpt_hf.analysis.comparison import measure
from nanogpt_hf.data.corpora import load_corpus
from nanogpt_hf.data.tokenization import train_char_tokenizer

TEXT = (
    "Мой дядя самых честных правил, когда не в шутку занемог.\nTo be, or not to be: that is the question.\n"
)
ARCHITECTURES = ("gpt2", "qwen3")


@pytest.fixture(autouse=True)
def no_progress_bars():
    logging.disable_progress_bar()


@pytest.fixture(scope="module")
def tokenizer():
    return train_char_tokenizer([TEXT])


def make(architecture, tokenizer, n_positions=64):
    end = tokenizer.eos_token_id
    special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "vocab_size": len(tokenizer)}
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": n_positions}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    torch.manual_seed(0)
    return NanoGPTForCausalLM(NanoGPTConfig(architecture=architecture, **sizes | special | dropout)).eval()


# --- peft ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", [LoraConfig, IA3Config, VeraConfig])
def test_peft_needs_no_names_of_layers(method, architecture, tokenizer):
    adapted = get_peft_model(make(architecture, tokenizer), method(task_type="CAUSAL_LM"))
    names = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert names and all("c_attn" in name or "c_proj" in name or "vera" in name for name in names)
    ids = torch.tensor([tokenizer(TEXT[:40]).input_ids])
    adapted(input_ids=ids, labels=ids).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in adapted.parameters())


# --- lm-eval ---


@pytest.mark.parametrize("length", [40, 64, 129, 10 * len(TEXT)])
def test_lm_eval_has_the_same_bits_per_byte(length, tokenizer, tmp_path, own_accelerate_state):
    harness = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed")
    instance = pytest.importorskip("lm_eval.api.instance")
    model, text = make("qwen3", tokenizer), (TEXT * 10)[:length]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    corpus = load_corpus(str(tmp_path / "text.txt"), validation_split_percentage=100)
    ours = measure(model, tokenizer, corpus, Accelerator(cpu=True))["bits_per_byte"]
    theirs = harness.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    asked = instance.Instance("loglikelihood_rolling", {}, (text,), 0)
    (logarithm,) = theirs.loglikelihood_rolling([asked], disable_tqdm=True)
    assert ours == pytest.approx(-logarithm / math.log(2) / len(text.encode()), rel=1e-5)


# --- texts packed into a row ---


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_texts_longer_than_the_context_do_not_see_one_another(architecture, tokenizer):
    model = make(architecture, tokenizer, n_positions=32)
    ids = torch.tensor([tokenizer(TEXT).input_ids[:60]])
    lengths = (30, 10, 20)
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = model(ids, position_ids=places, use_cache=False).logits
    apart = torch.cat([model(part).logits for part in ids.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, apart, atol=1e-5, rtol=0)
    for given in ({}, {"position_ids": torch.arange(60)[None]}):
        with pytest.raises(ValueError, match="60 tokens, more than the model's context of 32"):
            model(ids, **given)


# --- a score for a text ---


@torch.no_grad()
def test_a_language_model_becomes_a_classifier_that_others_load(tokenizer, tmp_path):
    expected = []
    for architecture in ARCHITECTURES:
        model = make(architecture, tokenizer)
        model.save_pretrained(tmp_path / "language")
        scorer = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "language", num_labels=3
        ).eval()
        assert type(scorer) is NanoGPTForSequenceClassification
        weights = model.transformer.state_dict()
        for name, weight in scorer.transformer.state_dict().items():
            assert torch.equal(weights[name], weight)
        batch = tokenizer(["To be", "or not to be:"], padding=True, padding_side="right", return_tensors="pt")
        scores = scorer(**batch).logits
        for score, text in zip(scores, ["To be", "or not to be:"], strict=True):
            alone = model.transformer(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1]
            torch.testing.assert_close(score, scorer.score(alone), atol=1e-5, rtol=0)
        scorer.save_pretrained(tmp_path / architecture)
        logits = scorer(torch.tensor([[5, 6, 7]])).logits.tolist()
        expected.append(f"NanoGPTForSequenceClassification {logits}")
    reader = (
        "import sys, torch\n"
        "from transformers import AutoModelForSequenceClassification\n"
        "for name in sys.argv[1:]:\n"
        "    scorer = AutoModelForSequenceClassification.from_pretrained(name, trust_remote_code=True)\n"
        "    print(type(scorer).__name__, scorer(torch.tensor([[5, 6, 7]])).logits.tolist())\n"
    )
    said = stranger(reader, *ARCHITECTURES, folder=tmp_path).splitlines()
    assert [line for line in said if line.startswith("NanoGPT")] == expected


# --- TRL ---


def train_with_trl(name, model, tokenizer, rows, tmp_path, options=None, **others):
    trl = pytest.importorskip("trl", reason="trl is not installed (extra trl)")
    arguments = getattr(trl, f"{name}Config")(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, **options or {},
    )  # fmt: skip
    before = {key: weight.clone() for key, weight in model.state_dict().items()}
    trainer = getattr(trl, f"{name}Trainer")(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        **others,
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert any(not torch.equal(before[key], weight) for key, weight in model.state_dict().items())
    assert all(weight.isfinite().all() for weight in model.state_dict().values())


@pytest.mark.usefixtures("own_accelerate_state")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("packing", [False, True])
def test_trl_sft(packing, architecture, tokenizer, tmp_path):
    rows = [{"text": TEXT[start : start + 30]} for start in range(0, 60, 3)]
    options = {"packing": packing, "max_length": 50}
    if packing:
        options["packing_strategy"] = "bfd"
    train_with_trl("SFT", make(architecture, tokenizer, 40), tokenizer, rows, tmp_path, options)


@pytest.mark.usefixtures("own_accelerate_state")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_trl_dpo(architecture, tokenizer, tmp_path):
    rows = [{"prompt": "To be", "chosen": ", or not to be", "rejected": " or maybe"}] * 8
    make(architecture, tokenizer).save_pretrained(
        tmp_path / "base"
    )  # the reference is loaded from where it lies
    model = NanoGPTForCausalLM.from_pretrained(tmp_path / "base")
    train_with_trl("DPO", model, tokenizer, rows, tmp_path)


@pytest.mark.usefixtures("own_accelerate_state")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_trl_grpo(architecture, tokenizer, tmp_path):
    def the_later_the_better(completions, **kwargs):
        return [float(number) for number, _ in enumerate(completions)]

    options = {"num_generations": 2, "max_completion_length": 16}
    rows = [{"prompt": "To be"}] * 8
    train_with_trl(
        "GRPO",
        make(architecture, tokenizer),
        tokenizer,
        rows,
        tmp_path,
        options,
        reward_funcs=the_later_the_better,
    )


@pytest.mark.usefixtures("own_accelerate_state")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_trl_reward(architecture, tokenizer, tmp_path):
    make(architecture, tokenizer).save_pretrained(tmp_path / "base")
    scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    rows = [{"chosen": "To be, or not to be", "rejected": "To be or maybe"}] * 8
    train_with_trl("Reward", scorer, tokenizer, rows, tmp_path)


# --- lm-eval ---


@pytest.mark.usefixtures("own_accelerate_state")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lm_eval_measures_the_same_bits_a_byte(architecture, tokenizer, tmp_path):
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed")
    from accelerate import Accelerator
    from lm_eval.api.instance import Instance

    from nanogpt_hf.analysis.comparison import measure
    from nanogpt_hf.data.corpora import Corpus

    text = (TEXT * 7)[
        : 64 * 10
    ]  # whole windows: lm-eval's last one reaches back, ours begins where the one before ends
    model = make(architecture, tokenizer)
    corpus = Corpus("poems", [text], [text], "", "", None, None, None)
    found = measure(model, tokenizer, corpus, Accelerator(cpu=True))
    judge = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu")
    request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
    bits = -judge.loglikelihood_rolling([request], disable_tqdm=True)[0] / math.log(2)
    assert found["bits_per_byte"] == pytest.approx(bits / len(text.encode()), rel=1e-5)
    assert found["tokens"] == len(text)


# --- what is registered with others ---


PREPARED = f"""
import sys
assert not {{"transformers.models.auto.modeling_auto", "peft"}} & {{*sys.modules}}
del sys.modules["nanogpt_hf"]
sys.path.insert(0, {str(ROOT)!r})
"""
CLASSES = """
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
config = AutoConfig.for_model("nanogpt", n_layer=1, n_head=1, n_embd=8, vocab_size=8)
for auto in (AutoModelForCausalLM, AutoModelForSequenceClassification):
    print(type(auto.from_config(config)).__name__)
"""
PEFT = """
import nanogpt_hf
from nanogpt_hf import NanoGPTConfig
assert "peft" not in sys.modules
import peft.utils.constants as constants
mapping = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
assert mapping["nanogpt"] == mapping["gpt2"]
"""


@pytest.mark.parametrize(
    "order",
    [
        "import nanogpt_hf; from transformers import AutoModelForCausalLM",
        "from nanogpt_hf import NanoGPTForCausalLM; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import nanogpt_hf",
    ],
)
def test_the_auto_classes_know_our_model_whatever_is_imported_first(order, tmp_path):
    said = stranger(PREPARED + order + CLASSES, folder=tmp_path)
    assert said.split() == ["NanoGPTForCausalLM", "NanoGPTForSequenceClassification"]


def test_peft_knows_our_model_when_it_is_imported_later(tmp_path):
    stranger(PREPARED + PEFT, folder=tmp_path)
