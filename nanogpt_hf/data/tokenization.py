"""Tokenizers trained on a corpus, character by character or in byte-level BPE; both lossless on any Unicode."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ..common.errors import UserError
from ..common.files import check_whole
from ..common.paths import asks_the_hub
from ..common.text import first_line
from .splits import END_OF_TEXT

CHUNK = 4_000  # characters of a piece of a long text, whose ids come as a list of Python's
BATCH = 1_000  # texts; what the tokenizers library returns takes many times the memory of the ids
LONG_WORD = (
    1_000  # characters; the library's trainer takes time that grows with the square of a word's length
)

# The words of GPT-2's tokenizer, as tiktoken writes them.
_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# Byte-level BPE spells bytes as characters that can be seen; these are the bytes that are not their own.
_UNSEEN = [byte for byte in range(256) if not (33 <= byte < 127 or 161 <= byte < 173 or 174 <= byte)]
SPELLING = {byte: 256 + number for number, byte in enumerate(_UNSEEN)}
FIRST_LETTER = 0x10000  # from here on there are more code points than tokens, and no surrogates


TextEncoder = Callable[[str], np.ndarray]


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
    tokenizer = Tokenizer(
        models.BPE({name: i for i, name in enumerate(names)}, merges=[], byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([END_OF_TEXT])
    return _wrap(tokenizer)


def train_bpe_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's (Radford et al. 2019), its merges learned from the texts.

    A text with too little to merge gives a smaller vocabulary.

    Raises:
        UserError: vocab_size does not hold the 256 bytes and the end-of-text token.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise UserError(f"--vocab_size is {vocab_size}, a byte-level BPE needs at least {len(alphabet) + 1}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # The end-of-text token comes last, as in GPT-2's vocabulary.
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(chain.from_iterable(map(short_words, texts)), trainer)
    tokenizer.add_special_tokens([END_OF_TEXT])
    return _wrap(tokenizer)


def short_words(text: str) -> Iterator[str]:
    """The text in pieces for a trainer: cut where no token spans the place, and within words that are too long."""
    for piece in pieces(text, LONG_WORD):
        # Only a long word makes a piece so much longer than asked for.
        size = LONG_WORD if len(piece) > 2 * LONG_WORD else 2 * LONG_WORD
        yield from (piece[start : start + size] for start in range(0, len(piece), size))


def extend_tokenizer(
    tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], count: int
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with up to `count` more tokens, its merges followed by more that are learned from the texts.

    Texts that hold none of the new tokens keep their ids. The library cannot go on with the merges of a tokenizer,
    but it can begin with any alphabet: here its letters are the tokens that there are.

    Raises:
        UserError: the tokenizer is not a byte-level BPE.
    """
    backend = tokenizer.backend_tokenizer
    spec = json.loads(backend.to_str())
    splitter = spec["pre_tokenizer"] or {"type": None}
    last = splitter.get("pretokenizers", [splitter])[-1]
    if last["type"] != "ByteLevel" or not isinstance(backend.model, models.BPE):
        raise UserError(
            "--extend_vocabulary needs a base with a byte-level BPE as GPT-2's, which this base's tokenizer is not."
        )
    normalize = backend.normalizer.normalize_str if backend.normalizer else str
    parts = (normalize(piece) for text in texts for piece in pieces(text))
    splits = map(backend.pre_tokenizer.pre_tokenize_str, parts)
    words = Counter(word for split in splits for word, _ in split)
    letters = {
        word: "".join(chr(FIRST_LETTER + t.id) for t in backend.model.tokenize(word)) for word in words
    }
    alphabet = set().union(*letters.values())
    learner = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + count, limit_alphabet=len(alphabet), min_frequency=2, show_progress=False
    )
    learner.train_from_iterator(
        (part for word in words.elements() for part in short_words(letters[word])), trainer
    )

    def spell(token: str) -> str:
        return "".join(backend.id_to_token(ord(letter) - FIRST_LETTER) or "" for letter in token)

    merges = [tuple(map(spell, pair)) for pair in json.loads(learner.to_str())["model"]["merges"]]
    # Special tokens too: those that the vocabulary lacks would come after the new ones.
    known = spec["model"]["vocab"] = backend.get_vocab()
    first = max(known.values()) + 1
    new = dict.fromkeys(left + right for left, right in merges if left + right not in known)
    known |= {token: first + number for number, token in enumerate(new)}
    spec["model"]["merges"] += merges
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=tokenizer.chat_template,
        **tokenizer.special_tokens_map,
    )


@asks_the_hub
def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerFast:
    """A tokenizer from a folder or the Hub, without running code that lies beside it.

    Raises:
        UserError: there is none, or it has no end-of-text token.
    """
    if os.path.isdir(name_or_path):
        check_whole(name_or_path, lambda file: file.startswith(("tokenizer", "special_tokens")))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:  # a damaged tokenizer.json has as many exceptions as it has keys
        raise UserError(
            f"no tokenizer can be loaded from {name_or_path!r}: give a folder with tokenizer.json, or a Hub id "
            f"({first_line(error)})."
        ) from error
    # Where a folder has no tokenizer, transformers makes up an empty one of the model's type.
    if (
        not isinstance(tokenizer, PreTrainedTokenizerFast)
        or tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False) < 2
    ):
        raise UserError(
            f"{name_or_path!r} holds no tokenizer in tokenizer.json: save the model's tokenizer there."
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer {name_or_path!r} has no end-of-text token: use another.")
    return tokenizer


def make_tokenizer(
    kind: str, train: Sequence[str], vocab_size: int, validation: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """The tokenizer that `--tokenizer` asks for: char and bpe are trained on the texts, all else is loaded.

    A char tokenizer has the alphabet of both splits, which tells a model nothing of the text that it will be
    tested on; the merges of a bpe tokenizer would, so they are learned from the training split alone.

    Raises:
        UserError: nothing can be loaded, or vocab_size is too small for bpe.
    """
    if kind == "char":
        return train_char_tokenizer([*train, *validation])
    if kind == "bpe":
        return train_bpe_tokenizer(train, vocab_size)
    return load_tokenizer(kind)


def longest_tokens(tokenizer: PreTrainedTokenizerFast, count: int) -> list[str]:
    """The tokens of most characters, as the text that they stand for; of equals those of the lower ids.

    Tokens that are pieces of a character are no text.
    """
    ids = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    texts = [text for text in map(str, map(tokenizer.decode, ids)) if "\N{REPLACEMENT CHARACTER}" not in text]
    return sorted(dict.fromkeys(texts), key=len, reverse=True)[:count]


def pieces(text: str, size: int = CHUNK) -> list[str]:
    """Cut, each `size` characters or a little more, before a space or newline that follows a word: no token of a GPT-2-style tokenizer spans such a place.

    Python's white space, which tells where a word ends, holds all that the tokenizers library takes for it.
    """
    place, cuts = re.compile(r"(?<=\S)[ \n]"), [0]
    while cuts[-1] + size < len(text) and (cut := place.search(text, cuts[-1] + size)):
        cuts.append(cut.start())
    return [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def describe_tokens(tokenizer: PreTrainedTokenizerFast) -> str:
    """How many tokens there are, and of a tokenizer of characters what they are."""
    backend, count = tokenizer.backend_tokenizer, f"{len(tokenizer):,} tokens"
    if _character_encoder(backend) is None:
        return count
    plain = backend.get_vocab_size(with_added_tokens=False)
    special = len(tokenizer) - plain
    return f"{count}: {plain - 256:,} characters, 256 bytes that spell all others, and {special} special"


def _splits_words(backend: Tokenizer) -> bool:
    """Whether it is a BPE that cuts text into words as GPT-2's tokenizer does, before anything else."""
    splitter = backend.pre_tokenizer
    if not isinstance(splitter, pre_tokenizers.ByteLevel) or backend.normalizer is not None:
        return False
    no_words_added = all(token.special for token in backend.get_added_tokens_decoder().values())
    is_bpe = isinstance(backend.model, models.BPE) and no_words_added
    return is_bpe and splitter.use_regex and not splitter.add_prefix_space


def _character_encoder(backend: Tokenizer) -> TextEncoder | None:
    """Text to ids by table, for a tokenizer of single characters and of bytes that spell the others."""
    plain = (
        isinstance(backend.model, models.BPE) and backend.pre_tokenizer is None and backend.normalizer is None
    )
    vocabulary = backend.get_vocab(with_added_tokens=False) if plain and backend.model.byte_fallback else {}
    spelling = np.array([vocabulary.pop(f"<0x{byte:02X}>", -1) for byte in range(256)], dtype=np.int32)
    if (spelling < 0).any() or any(len(token) > 1 for token in vocabulary):
        return None
    table = np.full(0x110000, -1, dtype=np.int32)  # by code point
    table[[ord(token) for token in vocabulary]] = list(vocabulary.values())

    def encode_text(text: str) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        ids: np.ndarray = table[points]
        unknown = ids < 0
        if unknown.any():
            spelt = points[unknown].tobytes().decode("utf-32-le").encode()
            n_bytes = 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF)
            repeats = np.where(unknown, n_bytes, 1)
            ids = np.repeat(ids, repeats)
            ids[ids < 0] = spelling[np.frombuffer(spelt, dtype=np.uint8)]
        return ids

    return encode_text


def _subword_encoder(backend: Tokenizer) -> TextEncoder | None:
    """Text to ids by tiktoken, for a byte-level BPE that cuts text into words as GPT-2's does.

    tiktoken merges the pair whose bytes are the earliest token, the library the pair that was learned earliest. That
    is the same where every token has one merge and comes out of its own letters as a whole: else None.
    """
    import tiktoken

    spec = json.loads(backend.to_str())["model"]
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges", "byte_fallback")
    merged = ["".join(pair) for pair in spec["merges"]]
    letters = [chr(SPELLING.get(byte, byte)) for byte in range(256)]
    known = all(token in spec["vocab"] for token in letters)
    if any(spec.get(option) for option in options) or not known or len({*merged}) < len(merged):
        return None
    if any([token.value for token in backend.model.tokenize(token)] != [token] for token in merged):
        return None
    bytes_of = {letter: byte for byte, letter in enumerate(letters)}
    ranks = {bytes(map(bytes_of.__getitem__, token)): rank for rank, token in enumerate(letters + merged)}
    encoding = tiktoken.Encoding("", pat_str=_WORDS, mergeable_ranks=ranks, special_tokens={})
    ids = np.array([spec["vocab"][token] for token in letters + merged], dtype=np.int32)

    def encode_text(text: str) -> np.ndarray:
        parts = [np.array(encoding.encode_ordinary(piece), dtype=np.int64) for piece in pieces(text)]
        found: np.ndarray = ids[np.concatenate(parts)]
        return found

    return encode_text


@contextmanager
def _panics_answered() -> Iterator[None]:
    """The library panics where a pattern in a tokenizer.json, such as (a+)+$, takes too long on a text."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"the tokenizer cannot encode this text ({first_line(error)}): a pattern in its tokenizer.json gives up on it; "
            "use another tokenizer."
        ) from error


def _library_ids(
    backend: Tokenizer, texts: Sequence[str], special_tokens: bool = False
) -> Iterator[np.ndarray]:
    """The ids of each text; special tokens that are spelt out in it are ordinary text, or the tokens."""
    before = backend.encode_special_tokens
    for start in range(0, len(texts), BATCH):
        backend.encode_special_tokens = not special_tokens
        with _panics_answered():
            encodings = backend.encode_batch_fast(texts[start : start + BATCH], add_special_tokens=False)
        backend.encode_special_tokens = before
        yield from (np.array(encoding.ids, dtype=np.int32) for encoding in encodings)


def text_encoder(tokenizer: PreTrainedTokenizerFast) -> TextEncoder | None:
    """What `encode` does, for a tokenizer whose texts may be cut into `pieces`.

    None for all others, which the tokenizers library encodes as a whole.
    """
    backend = tokenizer.backend_tokenizer
    if _splits_words(backend):
        return _subword_encoder(backend)
    return _character_encoder(backend)


def encode_each(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], special_tokens: bool = False
) -> Iterator[np.ndarray]:
    """The ids of each text (int32), as `encode` gives them.

    Args:
        special_tokens: take those that are spelt out in the text for the tokens.
    """
    encode_text = None if special_tokens else text_encoder(tokenizer)
    if encode_text is None:
        return _library_ids(tokenizer.backend_tokenizer, texts, special_tokens)
    return map(encode_text, texts)


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> np.ndarray:
    """The ids of a text, as an int32 array; a special token spelt out in the text stays ordinary text."""
    return next(encode_each(tokenizer, [text]))


def encode_documents(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[str], special_tokens: bool = False
) -> np.ndarray:
    """The ids of all documents, as an int32 array, with the end-of-text token between each two.

    Args:
        special_tokens: as for `encode_each`.
    """
    end = np.array([tokenizer.eos_token_id], dtype=np.int32)
    each = encode_each(tokenizer, documents, special_tokens)
    return np.concatenate([np.zeros(0, dtype=np.int32), *[part for ids in each for part in (end, ids)][1:]])


def encode_with_spans(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The ids of a text as of `encode`, and the characters (first, past the last) that each token stands for.

    Together the tokens cover every character; the pieces of one character all have that character's span.
    """
    backend = tokenizer.backend_tokenizer
    before, backend.encode_special_tokens = backend.encode_special_tokens, True
    with _panics_answered():
        encoding = backend.encode(text, add_special_tokens=False)
    backend.encode_special_tokens = before
    spans, covered = [], 0
    for start, end in encoding.offsets:
        # Some tokenizers leave a leading space out of the offsets, and some give empty ones to pieces.
        start = min(start, covered)
        end = min(max(end, start + 1), len(text))
        spans.append((start, end))
        covered = max(covered, end)
    return np.array(encoding.ids, dtype=np.int32), spans
