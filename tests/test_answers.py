"""What the page answers: the right text for its seed, safe HTML, and a sentence for what cannot be done."""

import html
import re
import shutil

import pytest
import torch

import nanogpt_hf
from nanogpt_hf import NanoGPTConfig, NanoGPTForCausalLM
from nanogpt_hf.common.errors import UserError
from nanogpt_hf.data.tokenization import make_tokenizer
from nanogpt_hf.generation.sampling_settings import SamplingSettings
from nanogpt_hf.generation.writer import Writer
from nanogpt_hf.runs.answers import LONGEST_TEXT, Answers, kept_as_html

TEXT = "Мой дядя самых честных правил, <b>когда</b> & не в шутку\n" * 5
CARD = "---\nlicense: mit\n---\n\n# The card\n\n![loss over the steps](loss_curve.png)\n\nA model.\n"


def plain(page):
    return html.unescape(re.sub("<[^>]*>", "", page))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two run folders."""
    tokenizer, made = make_tokenizer("char", [TEXT], 0), []
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        end = tokenizer.eos_token_id
        config = NanoGPTConfig(
            vocab_size=len(tokenizer),
            n_layer=1,
            n_head=2,
            n_embd=32,
            n_positions=32,
            initializer_range=0.3,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
        )
        model = NanoGPTForCausalLM(config)
        model.generation_config.suppress_tokens = [*range(256), end]
        folder = tmp_path_factory.mktemp("runs") / name
        nanogpt_hf.export(model, tokenizer, folder, "nanogpt")
        (folder / "README.md").write_text(CARD, encoding="utf-8")
        (folder / "loss_curve.png").write_bytes(b"\x89PNG")
        made.append(str(folder))
    return made


@pytest.fixture(scope="module")
def writers(folders):
    return [Writer.load(folder, "cpu", torch.float32) for folder in folders]


@pytest.fixture
def answers(writers):
    return Answers(writers)


def test_two_models_write_on_the_same_seed_and_go_on(answers, writers):
    sampling = SamplingSettings(max_new_tokens=40, seed=7)
    *_, written = answers.write(["one", "two"], "Мой", sampling)
    assert [*written.texts] == [writer.write("Мой", sampling)[0] for writer in writers]
    assert written.tokens == 40 and "seed 7 · 40 tokens" in written.in_words()
    assert written.whole() == ["Мой" + text for text in written.texts]
    *_, longer = answers.go_on(written, sampling)
    assert [*longer.texts] == [
        writer.write(whole, sampling)[0] for writer, whole in zip(writers, written.whole(), strict=True)
    ]


def test_a_text_grows_while_it_is_watched(answers, monkeypatch):
    monkeypatch.setattr("nanogpt_hf.runs.answers.LOOK_EVERY", 0)
    *looks, last = [
        written.texts[0]
        for written in answers.write(["one"], "М", SamplingSettings(max_new_tokens=30, seed=1))
    ]
    assert len(looks) == 30 and all(last.startswith(look) for look in looks)


def test_without_a_seed_every_text_has_another(answers):
    seeds = {
        [*answers.write(["one"], "М", SamplingSettings(max_new_tokens=1))][-1].sampling.seed for _ in range(4)
    }
    assert len(seeds) == 4


def test_what_is_shown_is_text_and_no_markup(answers):
    prompt = "<script>alert('a')</script>&amp;\x1b[31m\n"
    *_, written = answers.write(["one"], prompt, SamplingSettings(max_new_tokens=30, seed=1))
    (shown,) = written.as_html()
    assert re.findall("<[^>]*>", shown) == ['<div class="poem" dir="auto">', "<b>", "</b>", "</div>"]
    assert plain(shown) == prompt.replace("\x1b", "\\x1b") + written.texts[0]
    kept = kept_as_html([{"text": prompt, "note": "<i>"}])
    assert "<script" not in kept and "<i>" not in kept and "Nothing is kept" in kept_as_html([])
    legend, panel = answers.colour(["one"], "<script>Мой</script>")
    assert "<script" not in legend + panel and "bits per character" in legend


def test_what_cannot_be_done_is_a_sentence_at_once(answers):
    short = SamplingSettings(max_new_tokens=1)
    for action, message in [
        (lambda: next(answers.write(["one"], "a" * 1_000_000, short)), "1,000,000 characters"),
        (
            lambda: next(answers.write(["one"], "a", SamplingSettings(max_new_tokens=LONGEST_TEXT + 1))),
            "too long",
        ),
        (lambda: next(answers.write(["three"], "a", short)), "no model 'three'"),
        (lambda: next(answers.go_on(None, short)), "no text yet"),
        (lambda: answers.colour(["one"], " \n"), "there is no text"),
        (lambda: answers.colour(["one"], "a" * 10_000), "at most 5,000"),
        (lambda: answers.scan("a" * 10_000, "onegin"), "at most 5,000"),
        (lambda: answers.scan("a", "limerick"), "no form 'limerick'"),
    ]:
        with pytest.raises(UserError, match=message):
            action()
    assert [*answers.write(["one"], "", short)][-1].prompts == ("\n",)


def test_a_model_that_is_deleted_goes_on_writing_and_has_no_run(folders, tmp_path):
    folder = shutil.copytree(folders[0], tmp_path / "gone")
    answers = Answers([Writer.load(str(folder), "cpu", torch.float32)])
    curve, card = answers.run("gone")
    assert 'src="data:image/png;base64,iVBORw=="' in curve
    assert card.strip() == "# The card\n\n\n\nA model."
    shutil.rmtree(folder)
    curve, card = answers.run("gone")
    assert (
        curve == ""
        and "gone has no curve or no card that can be read here" in card
        and str(tmp_path) not in card
    )
    assert [*answers.write(["gone"], "М", SamplingSettings(max_new_tokens=5, seed=1))][-1].tokens == 5


def test_verse_is_scanned(answers):
    pytest.importorskip("silero_stress", reason="silero-stress is not installed (extra verse)")
    stanza = "Мой дядя самых честных правил,\nКогда не в шутку занемог,\nОн уважать себя заставил\nИ лучше выдумать не мог."
    marked = answers.scan(stanza, "onegin")
    assert "4 of 4 lines in metre, 2 of 2 pairs rhymed" in marked
    assert 'class="stress"' in marked
