"""Our checkpoints in the hands of others: processes without this package, and tools that we did not write."""

import json

import pytest
import torch
from processes import stranger
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.utils import logging

from nanogpt_hf import NanoGPTConfig, NanoGPTForCausalLM
from nanogpt_hf.data.tokenization import train_bpe_tokenizer, train_char_tokenizer
from nanogpt_hf.sharing.export import export

# To be learned by heart. The char tokenizer has never seen ё, so the text has bytes in it.
PASSAGE = (
    "Now is the winter of our discontent made glorious summer by this sun of York.\r\nЕщё не всё: её весёлый счёт, "
    "зелёный клён и тёмный мёд, далёкий гром, тяжёлый плёс, и звёздный свет, и шёпот рос.\nNow are our brows bound "
    "with victorious wreaths; our bruised arms hung up for monuments; our stern alarums changed to merry meetings, "
    "our dreadful marches to delightful measures.\n"
)
PROMPT = "Now is the winter of "
FORMATS = {
    "gpt2": ("gpt2", "char"),
    "qwen3": ("qwen3", "char"),
    "llama": ("llama", "char"),
    "gpt2 in BPE": ("gpt2", "bpe"),
    "nanogpt": ("qwen3", "char"),
}


@pytest.fixture(autouse=True)
def no_progress_bars():
    logging.disable_progress_bar()


def learn_by_heart(architecture, kind):
    tokenizer = (
        train_char_tokenizer([PASSAGE.replace("ё", "")])
        if kind == "char"
        else train_bpe_tokenizer([PASSAGE], 300)
    )
    torch.manual_seed(0)
    end, vocab_size = tokenizer.eos_token_id, -(-len(tokenizer) // 64) * 64
    special = dict(bos_token_id=end, eos_token_id=end, pad_token_id=end, vocab_size=vocab_size)
    dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    config = NanoGPTConfig(
        architecture=architecture, n_layer=2, n_head=4, n_kv_head=4 if architecture == "gpt2" else 2, n_embd=64,
        n_positions=256, **special, **dropout,
    )  # fmt: skip
    model = NanoGPTForCausalLM(config)
    model.generation_config.suppress_tokens = list(range(len(tokenizer), vocab_size))
    x = torch.tensor([tokenizer(PASSAGE).input_ids[:256]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=150)
    for _ in range(150):
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    said = tokenizer.decode(greedy(model.eval(), tokenizer))
    assert "glorious summer" in said and "звёздный свет" in said, (architecture, kind, said)
    assert kind == "bpe" or "ё" not in tokenizer.get_vocab()
    return model, tokenizer


@pytest.fixture(scope="module")
def trained():
    """The models of both architectures, each trained once."""
    made = {}

    def get(architecture, kind="char"):
        if (architecture, kind) not in made:
            made[architecture, kind] = learn_by_heart(architecture, kind)
        return made[architecture, kind]

    return get


def greedy(model, tokenizer, new_tokens=200, prompt=PROMPT):
    ids = torch.tensor([tokenizer(prompt).input_ids])
    return model.generate(ids, max_new_tokens=new_tokens, do_sample=False)[0, ids.shape[1] :].tolist()


# --- a process without nanogpt_hf ---

READER = """
import json, sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

prompt, names = json.loads(sys.argv[1])
answers = {}
for name in names:
    trust = {"trust_remote_code": True} if name.endswith("nanogpt") else {}
    config = AutoConfig.from_pretrained(name, **trust)
    tokenizer = AutoTokenizer.from_pretrained(name, **trust)
    model = AutoModelForCausalLM.from_pretrained(name, **trust)
    ids = torch.tensor([tokenizer(prompt).input_ids])
    hidden = AutoModel.from_pretrained(name, **trust)(ids).last_hidden_state
    assert torch.equal(hidden, model(ids, output_hidden_states=True).hidden_states[-1])
    torch.manual_seed(7)
    texts = [tokenizer.decode(model.generate(ids, max_length=60, do_sample=s)[0]) for s in (False, True)]
    model.save_pretrained("saved")
    again = AutoModelForCausalLM.from_pretrained("saved", **trust)
    assert torch.equal(again(ids).logits, model(ids).logits)
    answers[name] = [type(model).__name__, config.model_type, texts]
try:
    import nanogpt_hf
except ImportError:
    print(json.dumps(answers))
"""


def test_a_process_without_this_package_writes_the_same_text(hub, trained, tmp_path):
    expected = {}
    for format in ("gpt2", "qwen3", "llama", "nanogpt"):
        model, tokenizer = trained(*FORMATS[format])
        export(model, tokenizer, tmp_path / format, format)
        hub.add_folder(f"user/{format}", tmp_path / format)
        ids = torch.tensor([tokenizer(PROMPT).input_ids])
        torch.manual_seed(7)
        texts = [
            tokenizer.decode(model.generate(ids, max_length=60, do_sample=sample)[0])
            for sample in (False, True)
        ]
        model_class = {
            "gpt2": "GPT2LMHeadModel",
            "qwen3": "Qwen3ForCausalLM",
            "llama": "LlamaForCausalLM",
            "nanogpt": "NanoGPTForCausalLM",
        }[format]
        expected[f"user/{format}"] = [model_class, format, texts]
    (tmp_path / "reader").mkdir()
    asked, environment = json.dumps([PROMPT, list(expected)]), hub.env(home=tmp_path / "home")
    said = stranger(READER, asked, folder=tmp_path / "reader", environment=environment)
    assert json.loads(said.splitlines()[-1]) == expected
    assert hub.unknown == []


# --- transformers ---


@pytest.mark.parametrize("format", ["gpt2", "qwen3", "llama", "nanogpt"])
def test_a_pipeline_ends_at_the_context_and_at_the_end_of_text(format, trained, tmp_path, capfd):
    model, tokenizer = trained(*FORMATS[format])
    export(model, tokenizer, tmp_path, "nanogpt" if format == "nanogpt" else "auto")
    generate = pipeline("text-generation", str(tmp_path))
    prompts = [PASSAGE[:200], PASSAGE[:190]]
    lengths = [len(tokenizer(prompt).input_ids) for prompt in prompts]
    alone = generate(prompts[0], do_sample=False)[0]["generated_text"]
    assert alone == prompts[0] + tokenizer.decode(greedy(model, tokenizer, 256 - lengths[0], prompts[0]))
    together = generate(prompts, batch_size=2, do_sample=False)
    for prompt, found in zip(prompts, together, strict=True):
        expected = prompt + tokenizer.decode(greedy(model, tokenizer, 256 - max(lengths), prompt))
        assert found[0]["generated_text"] == expected
    assert generate.tokenizer.pad_token_id == generate.model.generation_config.eos_token_id
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("own_accelerate_state")
@pytest.mark.parametrize("format", ["gpt2", "qwen3", "llama", "nanogpt"])
def test_trainer_trains_saves_and_loads_it(format, trained, tmp_path):
    model, tokenizer = trained(*FORMATS[format])
    export(model, tokenizer, tmp_path / "base", format)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ids = tokenizer(PASSAGE).input_ids
    rows = [
        {"input_ids": ids[start : start + 64], "labels": ids[start : start + 64]}
        for start in range(0, 256, 64)
    ]
    arguments = TrainingArguments(
        tmp_path / "out", max_steps=2, per_device_train_batch_size=2, learning_rate=1e-3, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(base, arguments, train_dataset=rows, processing_class=tokenizer)
    assert trainer.train().global_step == 2
    trainer.save_model(tmp_path / "tuned")
    tuned, x = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned"), torch.tensor([ids[:50]])
    assert type(tuned) is type(base)
    torch.testing.assert_close(tuned(x).logits, base.eval()(x).logits)
    assert not torch.allclose(tuned(x).logits, model(x).logits, atol=1e-3)
    assert NanoGPTForCausalLM.from_pretrained(tmp_path / "tuned").config.architecture == FORMATS[format][0]


# --- others ---


@pytest.mark.parametrize("format", ["gpt2", "qwen3", "llama", "gpt2 in BPE"])
def test_ctranslate2_says_the_same_200_tokens(format, trained, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2", reason="ctranslate2 is not installed (extra interop)")
    model, tokenizer = trained(*FORMATS[format])
    export(model, tokenizer, tmp_path / "plain")
    ctranslate2.converters.TransformersConverter(str(tmp_path / "plain")).convert(str(tmp_path / "converted"))
    generator = ctranslate2.Generator(str(tmp_path / "converted"), device="cpu", intra_threads=1)
    reader = AutoTokenizer.from_pretrained(tmp_path / "plain")
    start = reader.convert_ids_to_tokens(reader(PROMPT).input_ids)
    found = generator.generate_batch([start], max_length=200, sampling_topk=1, include_prompt_in_result=False)
    expected = greedy(model, tokenizer)
    assert len(expected) == 200 and found[0].sequences_ids[0] == expected
    if format != "gpt2 in BPE":
        # Its vocabulary has kept the bytes apart from the characters.
        start = reader.convert_ids_to_tokens(reader("звёздный свет").input_ids)
        assert "<0xD1>" in start and "ё" not in start
        scored = generator.score_batch([start])[0].log_probs
        ids = torch.tensor([reader("звёздный свет").input_ids])
        ours = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(scored), ours.detach(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("format", ["gpt2", "qwen3"])
def test_optimums_onnx_has_the_same_logits(format, trained, tmp_path):
    onnx = pytest.importorskip(
        "optimum.onnxruntime",
        reason="optimum's ONNX exporter is not installed: optimum-onnx 0.1.0 cannot be imported beside transformers 5",
    )
    model, tokenizer = trained(*FORMATS[format])
    export(model, tokenizer, tmp_path)
    exported = onnx.ORTModelForCausalLM.from_pretrained(tmp_path, export=True)
    inputs = AutoTokenizer.from_pretrained(tmp_path)(PASSAGE[:200], return_tensors="pt")
    torch.testing.assert_close(exported(**inputs).logits, model(**inputs).logits, atol=1e-3, rtol=0)
