"""A tokenizer in a GGUF, as llama.cpp then gives the same ids for every text; what it would read otherwise is refused."""

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerFast

from ..common.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFWriter

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_WORDS = _BYTES | {"use_regex": True}


def _split(digits: str) -> dict:
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        rf"{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


# llama.cpp's name of a way to cut text into words -> the same in tokenizer.json.
PRE_TOKENIZERS = {
    "gpt-2": _WORDS,
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, _WORDS],
    },
    "qwen2": {"type": "Sequence", "pretokenizers": [_split(r"\p{N}"), _BYTES]},
    "llama-bpe": {"type": "Sequence", "pretokenizers": [_split(r"\p{N}{1,3}"), _BYTES]},
}


def add_tokenizer(writer: "GGUFWriter", tokenizer: PreTrainedTokenizerFast, rows: int) -> None:
    """Write the first `rows` tokens with what they are, how text is cut into them, and the chat template.

    Raises:
        UserError: llama.cpp has no tokenizer that gives the same ids.
    """
    from gguf import TokenType

    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["id"]: token for token in spec["added_tokens"]}
    names = {id: token for token, id in tokenizer.get_vocab().items()}
    tokens = [names.get(id, f"[PAD{id}]") for id in range(rows)]
    types = [TokenType.NORMAL if id in names else TokenType.UNUSED for id in range(rows)]
    _check_added(added.values())
    if is_of_characters(spec):
        writer.add_tokenizer_model("llama")  # SentencePiece's
        writer.add_token_scores([0.0] * rows)
        writer.add_add_space_prefix(False)
        writer.add_remove_extra_whitespaces(False)
        for byte in range(256):
            types[spec["model"]["vocab"][f"<0x{byte:02X}>"]] = TokenType.BYTE
        # llama.cpp spells a space as U+2581, which a text may hold itself: both are found before that.
        for character in (" ", "\u2581"):
            if character in spec["model"]["vocab"]:
                types[spec["model"]["vocab"][character]] = TokenType.USER_DEFINED
    else:
        writer.add_tokenizer_model("gpt2")  # byte-level BPE
        writer.add_tokenizer_pre(pre_tokenizer_name(spec))
        writer.add_token_merges(
            [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
        )
    for id, token in added.items():
        types[id] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _add_special_tokens(writer, tokenizer)


def _check_added(added: Iterable[dict]) -> None:
    for token in added:
        flags = [flag for flag in ("lstrip", "rstrip", "single_word") if token[flag]]
        if flags:
            raise UserError(
                f"the token {token['content']!r} has {' and '.join(flags)} set, which a GGUF cannot hold: share the model "
                "in its plain format."
            )


def is_of_characters(spec: dict) -> bool:
    """Whether a tokenizer.json is one of single characters, all others spelt in bytes.

    Raises:
        UserError: it is, but llama.cpp would read it otherwise.
    """
    model = spec["model"]
    bare = spec["normalizer"] is None and spec["pre_tokenizer"] is None
    if not (bare and model["type"] == "BPE" and model["byte_fallback"] and not model["merges"]):
        return False
    if not all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256)):
        return False
    if "\0" in model["vocab"]:
        raise UserError(
            "the tokenizer has the character NUL, at which llama.cpp ends a token: train it on a text without."
        )
    # llama.cpp joins any two neighbours that are a token together, merge or no merge.
    pair = next((token for token in model["vocab"] if len(token) == 2), None)
    if pair is not None:
        raise UserError(
            f"the tokenizer of single characters has a token of two, {pair!r}, which llama.cpp would use."
        )
    return True


def pre_tokenizer_name(spec: dict) -> str:
    """llama.cpp's name of how a byte-level BPE cuts text into words.

    Raises:
        UserError: it has none, or the tokenizer is no byte-level BPE.
    """

    def plainly(part: Any) -> Any:
        """Without the setting that changes offsets only, not ids."""
        if isinstance(part, list):
            return [plainly(item) for item in part]
        if isinstance(part, dict):
            return {key: plainly(value) for key, value in part.items() if key != "trim_offsets"}
        return part

    found = plainly(spec["pre_tokenizer"])
    name = next((name for name, known in PRE_TOKENIZERS.items() if plainly(known) == found), None)
    model = spec["model"]
    # Qwen's own GGUFs leave its normalizer out too.
    normalizers = [None, {"type": "NFC"}] if name == "qwen2" else [None]
    whole_words_first = model.get("ignore_merges", False)
    if (
        name is None
        or model["type"] != "BPE"
        or not model["merges"]
        or spec["normalizer"] not in normalizers
        or whole_words_first != (name == "llama-bpe")
    ):
        raise UserError(
            "this tokenizer is none that llama.cpp would read alike: GGUF is written for characters, and for byte-level "
            "BPE that cuts text as the tokenizers of GPT-2, SmolLM, Qwen and Llama 3 do."
        )
    return name


def _add_special_tokens(writer: "GGUFWriter", tokenizer: PreTrainedTokenizerFast) -> None:
    alone, marked = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    if marked not in (alone, [tokenizer.bos_token_id, *alone]):
        raise UserError(
            "this tokenizer puts tokens around a text other than one at its beginning, which a GGUF cannot say."
        )
    writer.add_add_bos_token(marked != alone)
    for kind in ("bos", "eos", "pad", "unk"):
        id = getattr(tokenizer, f"{kind}_token_id")
        if id is not None:
            getattr(writer, f"add_{kind}_token_id")(id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
