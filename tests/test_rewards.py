"""Rewards: what a writer writes, what is learned of it, drills, and that a run goes on exactly."""

import json
import shlex
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from small_tuning import TEXT, in_two_parts, make, saved
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from nanogpt_hf.common.tuning_settings import RewardSettings
from nanogpt_hf.data.tokenization import train_char_tokenizer
from nanogpt_hf.generation.stanza_writer import StanzaWriter
from nanogpt_hf.training.policy_gradient import GroupRelativePolicy
from nanogpt_hf.verse.drills import Drill


@pytest.fixture(scope="module")
def tokenizer():
    return train_char_tokenizer([TEXT])


@pytest.fixture
def base(tmp_path, tokenizer):
    return saved(tmp_path / "base", tokenizer)


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
    for name in (
        "samples.txt",
        "samples_before.txt",
    ):  # on a line that it was not tuned on, to the stanza's end
        texts = (folder / name).read_text().split("\n\n---\n\n")
        assert len(texts) == 3 and all(text.startswith("One cat\n") for text in texts)
        assert not any("\n\n" in text.strip() for text in texts)
    assert r'generate("\n\nOne cat\n")' in card
    hints = [line for line in said.splitlines() if line.startswith("more samples")]
    assert shlex.split(hints[-1])[-2:] == ["--prompt", r"\n\nOne cat\n"]
    bits = [row["eval_bits_per_char"] for row in (rows[0], best)]  # of letters that are a byte each
    assert f"{bits[0]:.4f} before the first step, {bits[1]:.4f} of the best model" in said
