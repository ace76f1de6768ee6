"""The second stage: what completions, preferences and rewards count, and that each run goes on exactly."""

import gzip
import hashlib
import json
import math
import shlex
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, pipeline

from nanogpt_hf import NanoGPTConfig, NanoGPTForCausalLM
from nanogpt_hf.common.cli import parse
from nanogpt_hf.common.errors import UserError
from nanogpt_hf.common.tuning_settings import CompletionSettings, PreferenceSettings, RewardSettings
from nanogpt_hf.data.conversations import (
    add_chat_template,
    encode_row,
    load_conversations,
    render,
)
from nanogpt_hf.data.tokenization import train_char_tokenizer
from nanogpt_hf.generation.stanza_writer import StanzaWriter
from nanogpt_hf.training.completions import Completions, PackedWindows, pack
from nanogpt_hf.training.policy_gradient import GroupRelativePolicy
from nanogpt_hf.training.preferences import Pairs, Preferences, log_p
from nanogpt_hf.training.stepping import accumulate_gradients
from nanogpt_hf.verse.drills import Drill

ROWS = [
    {"prompt": f"What is {a} and {b}?\n", "completion": f"It is {a + b}." * (1 + a % 3)}
    for a in range(6)
    for b in range(5)
]
TEXT = "".join(row["prompt"] + row["completion"] for row in ROWS) + "<abcdefghijklmnopqrstuvwxyz>"


def make(tokenizer, context=64, architecture="modern"):
    torch.manual_seed(0)
    config = NanoGPTConfig(
        architecture=architecture,
        vocab_size=-(-len(tokenizer) // 64) * 64,
        n_positions=context,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    model = NanoGPTForCausalLM(config)
    model.generation_config.suppress_tokens = list(range(len(tokenizer), config.vocab_size))
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return train_char_tokenizer([TEXT])


@pytest.fixture
def base(tmp_path, tokenizer):
    model = make(tokenizer)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


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


def words(base, corpus, folder, *more):
    return [
        *(
            "--model_name_or_path",
            str(base),
            "--corpus",
            str(corpus),
            "--output_dir",
            str(folder),
            "--use_cpu",
        ),
        *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--eval_steps", "3"),
        *("--max_steps", "6", "--save_steps", "3", "--save_total_limit", "9", "--logging_steps", "1"),
        *("--torch_compile", "false", "--sample_length", "20", *more),
    ]


def digests(folder):
    files = sorted((folder / "checkpoints" / "step-6").glob("*.safetensors"))
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in [*files, folder / files[0].name]]


def in_two_parts(run, settings, base, corpus, tmp_path, *more):
    """A run that was stopped after step 3 and went on ends in the weights of one that was not."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(parse(settings, "", words(base, corpus, whole, *more)))
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "step-6")
    run(parse(settings, "", words(base, corpus, parts, *more, "--resume_from_checkpoint", "last")))
    assert digests(whole) == digests(parts)
    return whole


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


# --- rewards ---


class Letters:
    """A stand-in for the scanner: a line is worth its share of small letters."""

    def by_name(self, texts):
        return {
            "a": [
                np.array(
                    [
                        sum("a" <= sign <= "z" for sign in line) / max(1, len(line))
                        for line in text.split("\n")
                    ]
                )
                for text in texts
            ]
        }

    weights = {"a": 1}

    def guarded(self, given):
        return given

    def combined(self, given):
        return given["a"]


def rewards_objective(tokenizer, model, context=64, lines=4, N=40, **more):
    from nanogpt_hf.data.token_stream import TokenStream

    accelerator = Accelerator(cpu=True)
    text = TokenStream(tokenizer(TEXT, return_tensors="np").input_ids[0], context)
    options = dict(batch_size=16, group=8, beta=0.0, text_coef=0.0, seed=3, eval_texts=8, micro_batch=16)
    write = StanzaWriter(tokenizer, lines, N, 1.0)
    return GroupRelativePolicy(
        accelerator, model, write, Letters(), ["an apple", "the cat ", "long ago, there"], ["an apple"],
        text, text, len(TEXT), **options | more,
    )  # fmt: skip


def test_a_text_ends_at_its_lines_an_empty_line_or_the_end_of_text(tokenizer):
    write = StanzaWriter(tokenizer, 3, 12, 1.0)
    prompt = write.encode("ab")
    texts = ["cd\nef\nghijkl", "cd\n\nefghijkl", "cdefg<|endoftext|>ijklmn"[:5] + "ijklmno", "\nabcdefghijk"]
    ids = np.stack([tokenizer(text).input_ids for text in texts])
    ids[2, 5] = tokenizer.eos_token_id
    written = write._cut(np.concatenate((np.tile(prompt, (4, 1)), ids), axis=1), len(prompt))
    assert written.lengths.tolist() == [6, 4, 6, 1]
    assert written.texts == ["ab\ncd\nef", "ab\ncd", "ab\ncdefg", "ab"]
    assert written.lines[0, :6].tolist() == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("context", [64, 24])
def test_the_windows_hold_each_written_token_once_with_the_past_that_the_decoder_had(tokenizer, context):
    model = make(tokenizer, context).eval()
    objective = rewards_objective(tokenizer, model, context)
    inputs, targets, advantages, at_start = objective._write(0)
    B, S, T = inputs.shape
    assert T == context and (S > 1) == (context == 24)
    prompts = np.repeat(objective.choose(0, 2), 8, axis=0)
    written = objective.write(model, prompts, objective._seed(0))
    P = prompts.shape[1]
    for row in range(B):
        counted = targets[row][targets[row] != -100].tolist()
        assert counted == written.ids[row, P : P + written.lengths[row]].tolist()
    # What the start thought of them is what the same network thinks now.
    own = objective._log_p(model(input_ids=inputs.flatten(0, 1)).logits, targets.flatten(0, 1))
    torch.testing.assert_close(own.view(at_start.shape), at_start, atol=1e-5, rtol=1e-4)
    assert (advantages[targets == -100] == 0).all()
    assert (advantages[targets != -100] ** 2).mean() == pytest.approx(1)  # in their own size


def test_the_gradient_is_that_of_advantage_times_log_p(tokenizer):
    model = make(tokenizer)
    objective = rewards_objective(tokenizer, model)
    batch = objective.batch(0, np.arange(16))
    objective.loss(model, batch, objective.count(batch)).backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    inputs, targets, advantages, *_ = batch
    logs = model(input_ids=inputs).logits.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    counted = targets != -100
    (-(advantages * logs)[counted].sum() / counted.sum()).backward()
    torch.testing.assert_close(found, [p.grad for p in model.parameters()], atol=1e-6, rtol=1e-4)


def test_divergence_is_nothing_at_the_start_and_grows(tokenizer):
    model = make(tokenizer)
    objective = rewards_objective(tokenizer, model, beta=1.0)
    batch = objective.batch(0, np.arange(16))
    flat = (*batch[:2], torch.zeros_like(batch[2]), *batch[3:])
    assert objective.loss(model, flat, objective.count(batch)).abs() < 1e-6
    with torch.no_grad():
        model.transformer.wte.weight += 0.05 * torch.randn_like(model.transformer.wte.weight)
    assert objective.loss(model, flat, objective.count(batch)) > 1e-3


def test_the_last_word_of_a_line_ends_it(tokenizer):
    write = StanzaWriter(tokenizer, 9, 40, 1.0)
    text = "is it one, two \nor three.\n\n"
    marks = write._closing(np.array([tokenizer(text).input_ids]))[0]
    assert "".join(sign for sign, closing in zip(text, marks, strict=True) if closing) == " two \n three.\n\n"


def test_a_writer_writes_as_long_as_the_stanzas_and_as_many_texts_as_are_asked_for(tokenizer):
    stanzas = ["a\nbcd\nefgh"] * 99 + ["a\n" + "b" * 60]
    write = StanzaWriter.like(stanzas, tokenizer, 2, 1.0)
    assert write.max_new_tokens == len("bcd") + 8  # the longest of a hundred does not decide
    model = make(tokenizer).eval()
    texts = write.write_on(model, ["ab", "c", "de"], 6, seed=1)
    assert sorted(text.split("\n")[0] for text in texts) == ["ab", "ab", "c", "c", "de", "de"]
    assert texts == write.write_on(model, ["ab", "c", "de"], 6, seed=1)
    assert len(write.write_on(model, ["ab", "c"], 1, seed=1)) == 2


def test_a_rare_reward_is_heard_beside_a_common_one(tokenizer):
    """Against the same line of the other texts, each reward in its own spread; what ends a line is its last word's."""
    objective = rewards_objective(tokenizer, make(tokenizer), lines=3)
    written = objective.write(objective.model, np.repeat(objective.choose(0, 2), 8, axis=0), 1)
    lines = np.tile(np.arange(written.lines.shape[1]) % 2 + 1, (16, 1))
    closing = np.arange(lines.shape[1]) >= 2
    written = written._replace(
        lines=lines, closing=np.tile(closing, (16, 1)), lengths=np.full(16, lines.shape[1])
    )
    common = [np.array([9.0, row % 2, 0.5]) for row in range(16)]
    rare = [np.array([9.0, 0.0, float(row == 3)]) for row in range(16)]
    objective.rewards.weights = {"metre": 1.0, "rhyme": 1.0}
    found = objective._advantages(written, {"metre": common, "rhyme": rare})
    assert (found[:, 0] > 0).tolist() == [row % 2 == 1 for row in range(16)]
    assert np.abs(found[:, 1]).max() == 0  # nobody's second line is in metre, and its last word has not begun
    assert found[3, 3] > 3 * found[1, 0] > 0 and (found[[0, 1, 2], 3] < 0).all()
    assert np.abs(found[8:, 3]).max() == 0  # the other prompt's texts do not rhyme at all


class TwoDrills:
    """A stand-in for drills: two stanzas, in which other lines answer."""

    def draw(self, count, seed):
        drills = [
            Drill("an old hat,\nthe cat.\nit is long", [1]),
            Drill("no\nmy dear\nso\nit is here", [2, 3]),
        ]
        return (drills * count)[:count]


@pytest.mark.parametrize("context", [64, 24])
def test_a_drill_teaches_the_words_that_answer_and_nothing_else(tokenizer, context):
    objective = rewards_objective(
        tokenizer, make(tokenizer, context), context, drills=TwoDrills(), drill_steps=2
    )
    inputs, targets, advantages, at_start = objective._drill(objective.drills, 0)
    for row, (whole, taught) in enumerate(
        [
            ("an old hat,\nthe cat.\nit is long\n\n", " cat.\n"),
            ("no\nmy dear\nso\nit is here\n", "so\n here\n"),
        ]
    ):
        learnt = targets[row][targets[row] != -100]
        assert tokenizer.decode(learnt) == whole
        worth = advantages[row][targets[row] != -100]
        assert tokenizer.decode(learnt[worth > 0]) == taught and (worth >= 0).all()
        assert len(worth[worth > 0].unique()) == 1
    assert inputs.shape == objective._write(2)[0].shape  # a recorded step takes both
    assert (at_start[targets != -100] < 0).all()


def test_a_drill_that_is_cut_off_teaches_no_half_word(tokenizer):
    write = StanzaWriter(tokenizer, 3, 40, 1.0)
    text = "an old hat,\nthe cat.\nit is long"
    for length in range(len("\n\nan old hat,\n") + 1, len(text) + 4):
        written = write.as_if_written([text], length)
        whole = written.texts[0].split("\n")
        assert whole == text.split("\n")[: len(whole)]
        new = written.ids[0, 2:][written.closing[0] & (np.arange(length - 2) < written.lengths[0])]
        assert set(tokenizer.decode(new).replace("<|endoftext|>", "").split()) <= {"hat,", "cat.", "long"}


def test_two_newlines_may_be_one_token():
    vocabulary = {sign: number for number, sign in enumerate(["a", "b", "c", "\n", "\n\n", "<end>"])}
    model = Tokenizer(BPE(vocabulary, [("\n", "\n")]))
    model.decoder = Fuse()
    merged = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>")
    write = StanzaWriter(merged, 3, 9, 1.0)
    assert write.encode("ab").tolist() == [4, 0, 1, 3]
    written = write.as_if_written(["ab\nca\nb", "ab\nc"], 12)
    assert written.texts == ["ab\nca\nb", "ab\nc"]
    assert written.lengths.tolist() == [len("ab\nca\nb") + 1, len("ab\nc") + 1]


def test_each_step_has_drills_of_its_own(tokenizer):
    objective = rewards_objective(tokenizer, make(tokenizer))
    seeds = []
    for objective.accelerator in (
        SimpleNamespace(num_processes=2, process_index=0),
        SimpleNamespace(num_processes=2, process_index=1),
    ):
        seeds += [objective._seed(step) for step in range(9)]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("drill_steps", [0, 2])
def test_drills_come_first_and_then_every_third_step(tokenizer, drill_steps):
    objective = rewards_objective(tokenizer, make(tokenizer), drills=TwoDrills(), drill_steps=drill_steps)
    drilled = []
    for step in range(8):
        objective.batch(step, np.arange(16))
        drilled.append(not objective.measured())  # nothing was written that could be worth anything
    assert drilled == [step < drill_steps or (step - drill_steps) % 3 == 0 for step in range(8)]


def test_what_is_forgotten_is_the_divergence_of_the_start(tokenizer):
    model = make(tokenizer).eval()
    objective = rewards_objective(tokenizer, model, text_coef=2.0)
    batch = objective.batch(0, np.arange(16))
    flat = (*batch[:2], torch.zeros_like(batch[2]), *batch[3:])
    before = model(input_ids=batch[4]).logits.log_softmax(-1).detach()
    with torch.no_grad():
        model.transformer.wte.weight += 0.05 * torch.randn_like(model.transformer.wte.weight)
    after = model(input_ids=batch[4]).logits.log_softmax(-1)
    divergence = (before.exp() * (before - after)).sum(-1).mean()
    assert divergence > 1e-3
    torch.testing.assert_close(objective.loss(model, flat, objective.count(batch)), 2 * divergence)


def test_what_is_rewarded_becomes_likelier(tokenizer):
    torch.manual_seed(0)
    model = make(tokenizer)
    objective = rewards_objective(tokenizer, model, batch_size=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = objective.evaluate(model).reward
    for step in range(20):
        batch = objective.batch(step, np.arange(32))
        objective.loss(model, batch, objective.count(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert objective.evaluate(model).reward > 2 * before


@pytest.mark.usefixtures("own_accelerate_state")
def test_rewards_resume_exactly(base, tmp_path, monkeypatch, capsys):
    from nanogpt_hf.runs.tuning import tune_rewards

    pytest.importorskip("pronouncing", reason="pronouncing is not installed (extra verse)")
    (tmp_path / "joy.py").write_text("def joy(text):\n    return text.count('a') / len(text)\n")
    monkeypatch.chdir(tmp_path)
    stanza = "The cat\nThe dog\nThe hat\nThe fog\n\n"
    poems = [stanza.replace("The", word) for word in ("A", "One", "My", "No", "This", "That", "Each", "Our")]
    corpus = tmp_path / "poems.txt"
    corpus.write_text("".join(poems * 5) + TEXT)
    more = ("--reward", "joy:joy", "--guards", "variety", "--form", "sonnet", "--scheme", "abab")
    more += ("--num_generations", "4", "--eval_texts", "4", "--table_texts", "8", "--reward_processes", "0")
    more += ("--drill_steps", "3")
    folder = in_two_parts(tune_rewards, RewardSettings, base, corpus, tmp_path, *more)
    assert "before" in (folder / "verse.md").read_text()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    best = min((row for row in rows if "eval_loss" in row), key=lambda row: row["eval_loss"])
    card = (folder / "README.md").read_text()
    assert (
        f"Validation loss {best['eval_loss']:.4f} below a reward of 1 ({best['eval_bits_per_char']:.4f} bits"
        in card
    )
    assert "over texts on held-out first lines" in card and "loss of one batch" not in card
    said = capsys.readouterr().out
    assert "below a reward of 1, best at step" in said and "nats" not in said
    assert "drills     the first 3 steps, then one step in 3" in said
    for name in ("samples.txt", "samples_before.txt"):  # a stanza on a line that it was not tuned on
        texts = (folder / name).read_text().split("\n\n---\n\n")
        assert len(texts) == 3 and all(text.startswith("One cat\n") for text in texts)
    hints = [line for line in said.splitlines() if line.startswith("more samples")]
    assert shlex.split(hints[-1])[-2:] == ["--prompt", r"\n\nOne cat\n"]
    bits = [row["eval_bits_per_char"] for row in (rows[0], best)]  # of letters that are a byte each
    assert f"{bits[0]:.4f} before the first step, {bits[1]:.4f} of the best model" in said
