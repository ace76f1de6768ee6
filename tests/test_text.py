"""Texts from tokens as they come: what the library's decode would give, where they end, and how they are shown."""

import unicodedata

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)

from nanogpt_hf.common.text import printable
from nanogpt_hf.data.tokenization import encode, make_tokenizer
from nanogpt_hf.generation.text import Continuation, generate_ids, generate_text, stream_text

TEXT = "Мой дядя самых честных правил, the quick brown fox; когда не в шутку\n" * 5


def llama_tokenizer():
    """As Llama 2's: a word begins with the sign of its space, and bytes spell what the vocabulary lacks."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += sorted(set(TEXT) - {" "})
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "д"), ("▁д", "я")]
    pieces += [left + right for left, right in merges]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: id for id, piece in enumerate(pieces)},
            merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "char": make_tokenizer("char", [TEXT], 0),
    "bpe": make_tokenizer("bpe", [TEXT], 300),
    "llama": llama_tokenizer(),
}
words = st.text(st.sampled_from("theдя \n\t") | st.characters(codec="utf-8"), max_size=12)


def written(tokenizer, prompt, ids, **options):
    row, pieces = Continuation(tokenizer, prompt, **options), []
    for token in ids:
        row.add(token)
        pieces.append(row.news())
    row.finish()
    return "".join([*pieces, row.news()])


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(words, words)
@example("the", " дядя the the ")
@example("ё", "ё😀")
@example("日本", "語 the")
@example("the\ufffd", "\ufffd the")
def test_a_text_in_pieces_is_what_the_library_decodes(kind, prompt, text):
    tokenizer = TOKENIZERS[kind]
    before, ids = encode(tokenizer, prompt or " ").tolist(), encode(tokenizer, text).tolist()
    decode = tokenizer.backend_tokenizer.decode
    whole = decode(before + ids)
    assert written(tokenizer, prompt or " ", ids) == whole[len(decode(before)) :]


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_tokens_are_some_text(kind, data):
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    text = written(tokenizer, "the", ids)
    text.encode("utf-8")
    whole = tokenizer.backend_tokenizer.decode(encode(tokenizer, "the").tolist() + ids)
    assert text == whole[3:] or "\ufffd" in whole


def test_bytes_that_make_no_character_do_not_take_the_whole_ones_with_them():
    tokenizer = TOKENIZERS["char"]
    t, euro = encode(tokenizer, "t")[0], list("€".encode())
    assert written(tokenizer, "t", [*euro, euro[0], t, *euro]) == "€\ufffdt€"
    assert written(tokenizer, "t", [*euro, euro[0]]) == "€\ufffd"


@settings(max_examples=200, deadline=None)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_a_text_ends_before_the_first_stop_string(text, stop):
    tokenizer = make_tokenizer("char", ["ab"], 0)
    until = next((n for n in range(len(text) + 1) if any(word in text[:n] for word in stop)), None)
    expected = text if until is None else text[: min(text[:until].find(w) for w in stop if w in text[:until])]
    assert written(tokenizer, "a", encode(tokenizer, text).tolist(), stop=stop) == expected


def test_of_a_stop_string_twice_in_one_token_the_first_counts():
    tokenizer = make_tokenizer("bpe", ["haha" * 50], 259)
    ids = encode(tokenizer, "haha").tolist()
    assert len(ids) == 1 and written(tokenizer, "a", ids, stop=["a"]) == "h"


def fixed(logits):
    """A GPT-2 that gives every position the same logits, and a tokenizer of its size."""
    tokenizer = make_tokenizer("char", ["abcd"], 0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_layer=1, n_head=1, n_embd=8, n_positions=16)
    )
    model.lm_head = torch.nn.Linear(8, len(tokenizer), bias=True)
    torch.nn.init.zeros_(model.lm_head.weight)
    torch.nn.init.constant_(model.lm_head.bias, -1e4)
    for letter, logit in logits.items():
        model.lm_head.bias.data[encode(tokenizer, letter)[0]] = logit
    return model.eval(), tokenizer


def sampled(logits, count=60, **options):
    return generate_text(*fixed(logits), "a", max_new_tokens=count, **options)[0]


class TestEdges:
    LOGITS = {"a": 1.0, "b": 2.0, "c": 1.5}

    @pytest.mark.parametrize("temperature", [0, 1e-320, 1e-45, 1e-38, 1e-9, 1e-6, 1e-3])
    def test_a_temperature_towards_zero_is_greedy(self, temperature):
        for seed in (0, 2**32 - 1):
            assert sampled(self.LOGITS, temperature=temperature, seed=seed) == "b" * 60
            assert sampled({"a": 1e4, "b": 3e4}, temperature=temperature, seed=seed) == "b" * 60

    def test_a_temperature_without_end_draws_all_alike(self):
        model, _ = fixed(self.LOGITS)
        tokens = list(generate_ids(model, torch.ones(100, 1, dtype=torch.long), 10, temperature=1e30, seed=1))
        assert len(torch.cat(tokens).unique()) > 200

    @pytest.mark.parametrize("options", [{"top_p": 0}, {"top_p": 1e-50}, {"top_k": 1}, {"top_p": 1e-9}])
    def test_of_one_candidate_there_is_no_choice(self, options):
        assert sampled(self.LOGITS, temperature=1, seed=3, **options) == "b" * 60

    def test_of_two_candidates_both_are_drawn(self):
        assert set(sampled(self.LOGITS, temperature=1, seed=3, top_k=2)) == set("bc")

    def test_all_of_the_probability_and_more_than_the_vocabulary_change_nothing(self):
        plain = sampled(self.LOGITS, temperature=1, seed=5)
        assert set(plain) == set("abc")
        assert sampled(self.LOGITS, temperature=1, seed=5, top_p=1) == plain
        many = [sampled(self.LOGITS, temperature=1, seed=5, top_k=k) for k in (261, 262, 10**9)]
        assert len({*many}) == 1 and set(many[0]) == set("abc")

    def test_seeds_at_their_ends(self):
        texts = [sampled(self.LOGITS, temperature=1, seed=seed) for seed in (0, 1, 2**32 - 1, 0)]
        assert texts[0] == texts[3] and len({*texts}) == 3


def test_a_text_ends_at_what_the_generation_config_calls_an_end():
    model, tokenizer = fixed({"b": 2.0})
    assert generate_text(model, tokenizer, "a", max_new_tokens=9, temperature=0) == ["b" * 9]
    model.generation_config.eos_token_id = [encode(tokenizer, "b")[0], encode(tokenizer, "c")[0]]
    assert generate_text(model, tokenizer, "a", max_new_tokens=9, temperature=0) == [""]


def test_each_of_several_texts_goes_on_to_its_own_end():
    model, tokenizer = fixed({"b": 2.0})
    model.lm_head.bias.data[tokenizer.eos_token_id] = 1.0
    options = dict(num_return_sequences=8, max_new_tokens=30, temperature=1, seed=1)
    texts = generate_text(model, tokenizer, "a", **options)
    assert len(texts) == 8 and len({*texts}) > 3 and all(set(text) <= {"b"} for text in texts)
    pieces = list(stream_text(model, tokenizer, "a", **options))
    assert ["".join(of_one) for of_one in zip(*pieces, strict=True)] == texts
    assert len(pieces) == min(30, max(map(len, texts)) + 1)  # nothing is computed after the last one's end


@pytest.mark.parametrize("character", ["ё", "€", "😀"])
def test_a_character_of_several_bytes_is_given_out_whole_or_at_the_end_as_none(character):
    tokenizer, ids = TOKENIZERS["char"], list(character.encode())
    row, news = Continuation(tokenizer, "t"), []
    for token in ids * 2:
        row.add(token)
        news.append(row.news())
    assert news == [*[""] * (len(ids) - 1), character] * 2
    model, tokenizer = fixed({})
    model.lm_head.bias.data[ids[0]] = 1.0  # no second byte follows
    assert generate_text(model, tokenizer, "a", max_new_tokens=1, temperature=0) == ["\ufffd"]


def test_a_special_token_that_ends_nothing_is_not_shown():
    tokenizer = TOKENIZERS["char"]
    t = int(encode(tokenizer, "t")[0])
    assert written(tokenizer, "t", [t, tokenizer.eos_token_id, t]) == "tt"


def test_what_may_become_a_stop_string_is_held_back():
    tokenizer = make_tokenizer("char", ["abc"], 0)
    row, news = Continuation(tokenizer, "a", stop=["abc", "b"]), []
    for token in encode(tokenizer, "caacab"):
        row.add(int(token))
        news.append(row.news())
    assert news == ["", "", "c", "a", "a", "ca"] and row.ended
    row.add(int(encode(tokenizer, "c")[0]))
    row.finish()
    assert row.news() == "" and row.text == "caaca"


@pytest.mark.parametrize("prompt", ["a\ud800", "\udfff"])
def test_a_prompt_that_is_no_unicode_is_refused(prompt):
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        next(stream_text(*fixed({}), prompt))


def test_a_text_is_what_the_model_makes_of_its_prompt():
    torch.manual_seed(0)
    tokenizer = TOKENIZERS["char"]
    sizes = dict(
        vocab_size=len(tokenizer), n_layer=1, n_head=1, n_embd=8, n_positions=16, initializer_range=2.0
    )
    model = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    ids = torch.cat(
        list(generate_ids(model, torch.from_numpy(encode(tokenizer, "the"))[None].long(), 9, temperature=0))
    )
    assert len(ids.unique()) > 3
    expected = written(tokenizer, "the", ids.tolist(), ends={tokenizer.eos_token_id})
    assert generate_text(model, tokenizer, "the", max_new_tokens=9, temperature=0) == [expected]


def test_ids_are_a_prompt_too_with_special_tokens_for_what_they_are():
    torch.manual_seed(0)
    model, tokenizer = fixed({"a": 1.0, "b": 2.0})
    ids = [*encode(tokenizer, "ab").tolist(), tokenizer.eos_token_id]
    assert generate_text(model, tokenizer, ids, max_new_tokens=4, temperature=0) == ["bbbb"]
    assert generate_text(model, tokenizer, ids, max_new_tokens=4, temperature=0, stop=["bbb"]) == [""]
    with pytest.raises(ValueError, match="the prompt is empty"):
        next(stream_text(model, tokenizer, []))


class OfSomebody(GPT2LMHeadModel):
    """It knows no cache and no argument beside its text."""

    def forward(self, input_ids, use_cache=None):
        return super().forward(input_ids, use_cache=False)


MODELS = {
    "of somebody": lambda: OfSomebody(GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=2)),
    "bloom": lambda: BloomForCausalLM(
        BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=2, tie_word_embeddings=False)
    ),
    "mamba": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, state_size=4)
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_models_of_other_kinds_write_too(kind):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    for parameter in model.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    text = torch.tensor([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])
    found = torch.stack(list(generate_ids(model, text, 20, temperature=0)), dim=1)
    with torch.no_grad():
        for _ in range(20):
            text = torch.cat((text, model(text).logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(found, text[:, 5:]) and len(found.unique()) > 1


# --- what is shown ---


@pytest.mark.parametrize(
    "text",
    [
        "می‌رود",  # Persian's zero-width non-joiner
        "👩‍💻 👨‍👩‍👧 ❤️ 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
        "क्‍ष co\u00adop a\u200bb \u200fא\u200e \ufeffx",
        "one\n\ttwo\u2028three\u00a0four\ue000",
    ],
)
def test_what_a_model_wrote_is_shown_as_it_is(text):
    assert printable(text) == text


@settings(max_examples=200)
@given(st.text())
@example("\x1b]0;title\x07 \x9b31m \u202etxt.exe\u202c \u2066a\u2069 \r \ud800")
def test_nothing_that_is_shown_drives_a_terminal(text):
    shown = printable(text)
    shown.encode("utf-8")
    for character in shown:
        assert unicodedata.category(character) not in ("Cc", "Cs") or character in "\n\t"
        assert unicodedata.bidirectional(character) not in "LRE RLE LRO RLO PDF LRI RLI FSI PDI".split()


def test_a_line_of_windows_is_one_line():
    assert printable("one\r\ntwo\rthree") == "one\ntwo\\rthree"
    tokenizer = TOKENIZERS["char"]
    row, shown = Continuation(tokenizer, "a"), ""
    for token in [*encode(tokenizer, "t\r\ne\r").tolist()]:
        row.add(token)
        shown += printable(row.news())
    assert shown == "t\ne"
    row.finish()
    assert printable(row.news()) == "\\r"
