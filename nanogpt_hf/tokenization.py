"""Tokenizers trained on a corpus, character by character or in byte-level BPE; both lossless on any Unicode."""

import re
from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
CHUNK = 10_000  # characters; the tokenizers library is slow on one long text and parallel over many


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def train_char_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A token for every character of the texts, and for each of the 256 bytes to spell all others with.

    Ids: the bytes, the characters in code-point order, then the end-of-text token.
    """
    characters = sorted(set().union(*map(set, texts)))
    names = [f"<0x{byte:02X}>" for byte in range(256)] + characters
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([END_OF_TEXT])
    return _wrap(tokenizer)


def train_bpe_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's (Radford et al. 2019), its merges learned from the texts.

    Raises:
        ValueError: vocab_size does not hold the 256 bytes and the end-of-text token.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise ValueError(f"--vocab_size is {vocab_size}, a byte-level BPE needs at least {len(alphabet) + 1}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # The end-of-text token comes last, as in GPT-2's vocabulary.
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([END_OF_TEXT])
    return _wrap(tokenizer)


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerFast:
    """A tokenizer from a folder or the Hub.

    Raises:
        ValueError: there is none, or it has no end-of-text token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"no tokenizer can be loaded from {name_or_path!r}: give char, bpe, a folder with tokenizer.json, or a "
            f"Hub id ({reason[:200]})."
        ) from error
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {name_or_path!r} has no fast version or no end-of-text token: use another.")
    return tokenizer


def make_tokenizer(kind: str, texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """The tokenizer that `--tokenizer` asks for: char and bpe are trained on the texts, all else is loaded."""
    if kind == "char":
        return train_char_tokenizer(texts)
    if kind == "bpe":
        return train_bpe_tokenizer(texts, vocab_size)
    return load_tokenizer(kind)


def _pieces(text: str) -> list[str]:
    """Cut before white space that follows a word: no token of a GPT-2-style tokenizer spans such a place."""
    cuts = [0]
    while cuts[-1] + CHUNK < len(text):
        place = re.compile(r"(?<=\S)\s").search(text, cuts[-1] + CHUNK)
        if place is None:
            break
        cuts.append(place.start())
    return [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def _character_ids(tokenizer: Tokenizer) -> np.ndarray:
    """Id of every code point, -1 for those that are spelt in bytes."""
    table = np.full(0x110000, -1, dtype=np.int32)
    for token, number in tokenizer.get_vocab(with_added_tokens=False).items():
        if len(token) == 1:
            table[ord(token)] = number
    return table


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> np.ndarray:
    """The ids of a text, as an int32 array; a special token spelt out in the text stays ordinary text.

    A table look-up where every character is a token (319 million characters a second, against 9 million of
    the tokenizers library on 2 cores), the library elsewhere.
    """
    backend = tokenizer.backend_tokenizer
    by_character = isinstance(backend.model, models.BPE) and backend.pre_tokenizer is None
    if by_character:
        ids = _character_ids(backend)[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)]
        if not (ids < 0).any():
            return ids
    by_word = isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel)
    specials, backend.encode_special_tokens = backend.encode_special_tokens, True
    try:
        pieces = _pieces(text) if by_character or by_word else [text]
        encoded = backend.encode_batch_fast(pieces, add_special_tokens=False)
    finally:
        backend.encode_special_tokens = specials
    return np.concatenate([np.array(piece.ids, dtype=np.int32) for piece in encoded])


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> np.ndarray:
    """The ids of all documents, with the end-of-text token between each two."""
    parts = []
    for document in documents:
        parts += [[tokenizer.eos_token_id], encode(tokenizer, document)]
    return np.concatenate(parts[1:]).astype(np.int32)
