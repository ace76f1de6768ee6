"""The second stage: what completions and preferences count, and that each run goes on exactly."""

import gzip
import json
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from small_tuning import ROWS, TEXT, in_two_parts, make, saved, words
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from nanogpt_hf.common.cli import parse
from nanogpt_hf.common.errors import UserError
from nanogpt_hf.common.tuning_settings import CompletionSettings, PreferenceSettings
from nanogpt_hf.data.conversations import (
    add_chat_template,
    encode_row,
    load_conversations,
    render,
)
from nanogpt_hf.data.tokenization import train_char_tokenizer
from nanogpt_hf.training.completions import Completions, PackedWindows, pack
from nanogpt_hf.training.preferences import Pairs, Preferences, log_p
from nanogpt_hf.training.stepping import accumulate_gradients


@pytest.fixture(scope="module")
def tokenizer():
    return train_char_tokenizer([TEXT])


@pytest.fixture
def base(tmp_path, tokenizer):
    return saved(tmp_path / "base", tokenizer)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def of_rows(tokenizer, rows, T=64):
    examples = [encode_row(tokenizer, row) for row in rows]
    return examples, PackedWindows(examples, T, tokenizer.eos_token_id, torch.device("cpu"), "rows")


# --- completions ---


@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
def test_packed_completions_lose_what_transformers_says_of_each_alone(tokenizer, architecture):
    model, accelerator = make(tokenizer, architecture=architecture).eval(), Accelerator(cpu=True)
    examples, windows = of_rows(tokenizer, ROWS[:12])
    assert len(windows) < len(examples)  # there are several in a window
    objective = Completions(accelerator, windows, windows, len(windows), 0, 1)
    batch = windows.take(np.arange(len(windows)))
    packed = accumulate_gradients(accelerator, model, objective, [batch])
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    ids = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(e.ids) for e in examples], batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(
        [torch.from_numpy(np.where(e.learned, e.ids, -100)) for e in examples], True, -100
    )
    padded = model(input_ids=ids, labels=labels).loss
    padded.backward()
    torch.testing.assert_close(packed, padded.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(gradients, [p.grad for p in model.parameters()], atol=1e-5, rtol=1e-4)
    assert objective.evaluate(model).loss == pytest.approx(padded.item(), abs=1e-5)


@pytest.mark.parametrize("T", [64, 12])
def test_characters_that_the_context_cuts_off_are_not_counted(tokenizer, T):
    """Each completion has a token for each of its characters, and one for its end."""
    model, device = make(tokenizer), torch.device("cpu")
    (example,), windows = of_rows(tokenizer, [{"prompt": "ab", "completion": "c" * 20}], T)
    found = Completions(Accelerator(cpu=True), windows, windows, 1, 0, characters=20).evaluate(model)
    assert found.tokens == min(21, T - 1)
    assert found.bits_per_char == pytest.approx(found.loss / math.log(2) * 21 / 20)
    pairs = Pairs([(example, example), (example, example)], T, 0, device, "rows")
    assert pairs.share == windows.share == found.tokens / 21


def test_accumulated_windows_are_the_whole_batch(tokenizer):
    accelerator, results = Accelerator(cpu=True), []
    _, windows = of_rows(tokenizer, ROWS)
    for size in (8, 3):
        model = make(tokenizer)
        objective = Completions(accelerator, windows, windows, 8, 0, 1)
        rows = np.arange(8)
        batches = [objective.batch(5, rows[start : start + size]) for start in range(0, 8, size)]
        loss = accumulate_gradients(accelerator, model, objective, batches)
        results.append((loss, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-7)


def test_an_epoch_sees_every_window_once(tokenizer):
    _, windows = of_rows(tokenizer, ROWS)
    objective = Completions(Accelerator(cpu=True), windows, windows, 1, 7, 1)
    seen = [tuple(objective.batch(step, np.arange(1))[0][0].tolist()) for step in range(2 * len(windows))]
    one, two = seen[: len(windows)], seen[len(windows) :]
    assert sorted(one) == sorted(two) == sorted(tuple(row) for row in windows.tensors[0].tolist())
    assert one != two


def test_no_room_is_overfull_and_nothing_is_lost():
    lengths = np.random.default_rng(0).integers(1, 50, 200).tolist()
    plan = pack(lengths, 50)
    assert sorted(number for room in plan for number in room) == list(range(200))
    assert max(sum(lengths[number] for number in room) for room in plan) <= 50
    assert len(plan) <= 1.1 * sum(lengths) / 50


def test_what_is_longer_than_the_context_is_cut_and_counted(tokenizer):
    rows = [{"prompt": "a", "completion": "b" * 100}, {"prompt": "a" * 100, "completion": "b"}]
    _, windows = of_rows(tokenizer, rows)
    assert (windows.cut, windows.left_out, len(windows)) == (1, 1, 1)
    with pytest.raises(UserError, match="longer context"):
        of_rows(tokenizer, rows[1:])


CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one <|assistant|> two?"},
    {"role": "assistant", "content": "three."},
    {"role": "user", "content": "and?"},
    {"role": "assistant", "content": "four."},
]


def test_a_conversation_is_learned_where_the_assistant_speaks(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    own = AutoTokenizer.from_pretrained(tmp_path)
    new = add_chat_template(own)
    assert own.convert_ids_to_tokens(new) == ["<|system|>", "<|user|>", "<|assistant|>"]
    assert add_chat_template(own) == []
    ids, learned = encode_row(own, {"messages": CHAT})
    said = "three.<|endoftext|>four.<|endoftext|>"
    assert own.decode(ids[learned]) == said
    assert ids.tolist() == own.apply_chat_template(CHAT, return_dict=False)
    own.save_pretrained(tmp_path)
    asked = own.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    reader = AutoTokenizer.from_pretrained(tmp_path)
    answer = reader.parse_response("three.<|endoftext|>", prefix=asked)  # as transformers serve does
    assert answer == {"role": "assistant", "content": "three."}
    own.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match="writes a conversation anew"):
        render(own, CHAT)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "has the columns text"),
        ({"messages": [{"role": "user", "content": "a"}]}, "one of the assistant's"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages must be"),
        ({"prompt": "a", "completion": 3}, "no text in 'completion'"),
        ({"instruction": "", "output": "b"}, "no text in 'instruction'"),
        ({"prompt": "a", "completion": "b\ud83d"}, "half of a surrogate pair"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path, row, message):
    path = write_rows(tmp_path / "rows.jsonl", [ROWS[0], row])
    with pytest.raises(UserError, match=message) as refused:
        load_conversations(str(path), 10)
    assert "line 2 of rows.jsonl" in str(refused.value)


def test_rows_are_read_as_texts_are(tmp_path):
    """Compressed, from Windows, and in files that are called .json."""
    lines = "".join(json.dumps(row) + "\r\n" for row in ROWS * 4)
    for name in ("rows.jsonl.gz", "rows.json"):
        content = lines.encode("utf-8-sig")
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        assert sum(map(len, load_conversations(str(tmp_path / name), 10).rows.values())) == len(ROWS) * 4
    for text in (json.dumps(ROWS), json.dumps(ROWS, indent=1)):
        (tmp_path / "list.json").write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=r"convert it: jq -c '\.\[\]' .*list.json > .*list.jsonl"):
            load_conversations(str(tmp_path / "list.json"), 10)
    (tmp_path / "other.jsonl").write_text(lines, encoding="utf-16")
    with pytest.raises(UserError, match="convert it: iconv -f UTF-16"):
        load_conversations(str(tmp_path / "other.jsonl"), 10)


def test_what_prompts_fill_is_named_by_its_split(tokenizer):
    long = encode_row(tokenizer, {"prompt": "a" * 99, "completion": "b"})
    with pytest.raises(UserError, match="of none of the validation rows of x does the context of 16 tokens"):
        PackedWindows([long], 16, 0, torch.device("cpu"), "the validation rows of x")


# --- runs ---


@pytest.mark.usefixtures("own_accelerate_state")
@pytest.mark.parametrize("adapter", [(), ("--full", "false")], ids=["full", "lora"])
def test_completions_resume_exactly_and_load_anywhere(base, tmp_path, adapter):
    from nanogpt_hf.runs.tuning import tune_completions

    rows = [{"instruction": row["prompt"].strip(), "output": row["completion"]} for row in ROWS]
    corpus = write_rows(tmp_path / "chat.jsonl", rows)
    folder = in_two_parts(tune_completions, CompletionSettings, base, corpus, tmp_path, *adapter)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer.apply_chat_template(CHAT[1:2], add_generation_prompt=True, return_dict=False)) \
        == "<|user|>one <|assistant|> two?<|assistant|>"  # fmt: skip
    if not adapter:
        answer = pipeline("text-generation", str(folder))(CHAT[1:2], max_new_tokens=5)[0]["generated_text"]
        assert answer[-1]["role"] == "assistant"


@pytest.mark.usefixtures("own_accelerate_state")
def test_the_marks_of_the_roles_are_trained(base, tmp_path):
    from nanogpt_hf.runs.tuning import tune_completions

    corpus = write_rows(
        tmp_path / "chat.jsonl",
        [{"instruction": row["prompt"], "output": row["completion"]} for row in ROWS],
    )
    for adapter in ((), ("--full", "false")):
        folder = tmp_path / ("full" if not adapter else "lora")
        tune_completions(
            parse(CompletionSettings, "", words(base, corpus, folder, "--learning_rate", "1e-2", *adapter))
        )
        from nanogpt_hf.model.loading import load_model_and_tokenizer

        model, tokenizer = load_model_and_tokenizer(str(folder))
        rows = model.get_input_embeddings().weight
        mark = tokenizer.convert_tokens_to_ids("<|assistant|>")
        mean = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight[: mark - 2].mean(0)
        assert not torch.allclose(rows[mark], mean, atol=1e-3)


# --- preferences ---


def of_pairs(tokenizer, count=12):
    both = [
        tuple(encode_row(tokenizer, {"prompt": row["prompt"], "completion": text}) for text in (row["completion"], "No!"))
        for row in ROWS[:count]
    ]  # fmt: skip
    return Pairs(both, 64, tokenizer.eos_token_id, torch.device("cpu"), "pairs"), both


def test_the_loss_of_preferences_is_the_paper_s(tokenizer):
    accelerator, start, model = Accelerator(cpu=True), make(tokenizer), make(tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    pairs, both = of_pairs(tokenizer)
    pairs.remember(start, 5)

    def alone(network, example):
        ids, learned = torch.from_numpy(example.ids), torch.from_numpy(example.learned)
        logs = network(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        return logs[learned[1:]].sum()

    losses = []
    with torch.no_grad():
        for chosen, rejected in both:
            ratio = (
                alone(model, chosen) - alone(start, chosen) - alone(model, rejected) + alone(start, rejected)
            )
            losses.append(-F.logsigmoid(0.3 * ratio))
    objective = Preferences(accelerator, pairs, pairs, 12, 0, 0.3, 1)
    batch = objective.batch(0, np.arange(12))
    found = objective.loss(model, batch, objective.count(batch))
    torch.testing.assert_close(found.detach(), torch.stack(losses).mean(), atol=1e-5, rtol=0)
    assert objective.evaluate(model).loss == pytest.approx(found.item(), abs=1e-5)
    assert objective.evaluate(start).loss == pytest.approx(np.log(2), abs=1e-6)


@pytest.mark.usefixtures("own_accelerate_state")
def test_preferences_resume_exactly_and_are_learned(base, tmp_path):
    from nanogpt_hf.runs.tuning import tune_preferences

    rows = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "No!"} for row in ROWS]
    corpus = write_rows(tmp_path / "pairs.jsonl", rows)
    more = ("--learning_rate", "1e-2", "--warmup_steps", "0")
    folder = in_two_parts(tune_preferences, PreferenceSettings, base, corpus, tmp_path, *more)
    measured = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row for row in measured if "eval_accuracy" in row]
    assert evaluated[0]["step"] == 0 and evaluated[0]["eval_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert evaluated[-1]["eval_accuracy"] == 1.0 and evaluated[-1]["eval_loss"] < 0.5
    assert "nats a pair" in (folder / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(folder).config.model_type == "nanogpt"


def test_log_p_is_of_the_learned_tokens_alone(tokenizer):
    model = make(tokenizer).eval()
    pairs, _ = of_pairs(tokenizer, 2)
    inputs, targets = pairs.tensors
    nothing = torch.full_like(targets, -100)
    assert log_p(model, inputs, nothing).abs().max() == 0
    assert (log_p(model, inputs, targets) < 0).all()
