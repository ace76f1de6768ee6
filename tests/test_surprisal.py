"""Surprisal: it adds up to the loss, keeps together what is read as one, and its page shows any text."""

import html
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nanogpt_hf import NanoGPTConfig, NanoGPTForCausalLM
from nanogpt_hf.analysis.surprisal import Cell, bits_of_characters, scale_of, surprisal, surprisal_page
from nanogpt_hf.data.token_stream import TokenStream
from nanogpt_hf.data.tokenization import encode, make_tokenizer
from nanogpt_hf.training.evaluation import token_losses

TEXT = "Мороз и солнце; день чудесный! The frost, the sun: a 😀 day.\n" * 20
T = 16


@pytest.fixture(scope="module", params=["char", "bpe"])
def model_and_tokenizer(request):
    tokenizer = make_tokenizer(request.param, [TEXT], 300)
    torch.manual_seed(1)
    config = NanoGPTConfig(
        vocab_size=len(tokenizer), n_layer=1, n_head=2, n_embd=32, n_positions=T, initializer_range=0.3
    )
    return NanoGPTForCausalLM(config).eval(), tokenizer


def test_it_adds_up_to_the_loss_of_the_tokens(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    text = "To 😀👩‍👩‍👧 День \r\n\0<|endoftext|> the sun\n" * 3
    losses = token_losses(model, TokenStream(encode(tokenizer, text), T), 4, T // 2)
    bits = bits_of_characters(surprisal(model, tokenizer, text, 0, T))
    assert bits.shape == (len(text),)
    assert np.nansum(bits) == pytest.approx(losses.nats.sum() / math.log(2), rel=1e-6)
    assert np.isnan(bits).nonzero()[0].tolist() == [0]
    later = bits_of_characters(surprisal(model, tokenizer, text, 60, T))
    assert later.shape == (len(text) - 60,)
    assert np.isfinite(later).all()


def test_alternatives_are_the_models_likeliest_tokens(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    text = "the sun; frost"
    ids = encode(tokenizer, text)
    with torch.no_grad():
        probabilities = model(torch.tensor(ids)[None].long()).logits[0].softmax(-1)
    first, *cells = surprisal(model, tokenizer, text, 0, len(ids), 3)
    assert math.isnan(first.bits) and first.alternatives == ()
    for cell, id, p in zip(cells, ids[1:], probabilities, strict=False):
        assert 2**-cell.bits == pytest.approx(p[id].item(), rel=1e-4)
        best = p.topk(3)
        assert [share for _, share in cell.alternatives] == pytest.approx(best.values.tolist(), rel=1e-4)
        spelt = tokenizer.decode(best.indices[:1])
        assert cell.alternatives[0][0] == (spelt if "\ufffd" not in spelt else cell.alternatives[0][0])


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30), st.integers(0, 40))
@example("e\u0301👩‍👩‍👧क्ष\r\n", 0)
@example("<script>alert('\"')</script>&#10;\x1b[31m\u202e", 0)
def test_any_text_is_shown_as_it_is_and_whole(model_and_tokenizer, text, start):
    model, tokenizer = model_and_tokenizer
    start = min(start, max(0, len(text) - 1))
    cells = surprisal(model, tokenizer, text, start, T, 2) if text else []
    assert "".join(text[start:][cell.start : cell.end] for cell in cells) == text[start:]
    page = surprisal_page("title <b>", text[start:], {"a<b": cells})
    assert "<script" not in page and "\x1b" not in page and "\u202e" not in page
    body = re.search(r'<div class="surprisal" dir="auto">(.*?)</div></section>', page, re.S)[1]
    shown = html.unescape(re.sub(r"<i>↵</i>|<[^>]*>", "", body))
    plain = text[start:].replace("\r\n", "\n")
    if plain.isprintable() or not plain.strip("\n"):
        assert shown == plain


def test_what_is_read_as_one_is_one_cell(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    text = "the e\u0301👩‍👩‍👧 the"
    parts = [text[cell.start : cell.end] for cell in surprisal(model, tokenizer, text, 0, T)]
    assert any("e\u0301" in part for part in parts) and any("👩‍👩‍👧" in part for part in parts)


def test_colours_are_on_one_scale_of_the_best_model():
    text = "abcd"
    good = [Cell(n, n + 1, bits) for n, bits in enumerate((math.nan, 1.0, 2.0, 4.0))]
    bad = [Cell(0, 1, math.nan), Cell(1, 4, 60.0)]
    assert scale_of([good, bad]) == 4
    page = surprisal_page("t", text, {"good": good, "bad": bad})
    assert re.findall(r'style="--s:([\d.]+)" data', page) == ["0", "0.25", "0.50", "1.00", "0", "1.00"]
    assert "2.33 bits per character here" in page and "20.00 bits per character here" in page
    assert "c   2.0 bits, probability 25%" in page
    assert scale_of([[Cell(0, 1, math.nan)]]) == 1
    assert "nothing to predict" in surprisal_page("t", "a", {"x": [Cell(0, 1, math.nan)]})
