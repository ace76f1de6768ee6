"""Tokenizers trained on a corpus, character by character or in byte-level BPE; both lossless on any Unicode."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
CHUNK = 10_000  # characters; the tokenizers library is slow on one long text and parallel over many
FIRST_LETTER = 0x10000  # from here on there are more code points than tokens, and no surrogates
BATCH = 1_000  # chunks; what the library returns takes many times the memory of the ids


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
        ValueError: vocab_size does not hold the 256 bytes and the end-of-text token.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise ValueError(
            f"--vocab_size is {vocab_size}, a byte-level BPE needs at least {len(alphabet) + 1}."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # The end-of-text token comes last, as in GPT-2's vocabulary.
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([END_OF_TEXT])
    return _wrap(tokenizer)


def extend_tokenizer(
    tokenizer: PreTrainedTokenizerFast, texts: Iterable[str], count: int
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with up to `count` more tokens, its merges followed by more that are learned from the texts.

    Texts that hold none of the new tokens keep their ids. The library cannot go on with the merges of a tokenizer,
    but it can begin with any alphabet: here its letters are the tokens that there are.

    Raises:
        ValueError: the tokenizer is not a byte-level BPE.
    """
    backend = tokenizer.backend_tokenizer
    if not _splits_words(backend) or not isinstance(backend.model, models.BPE):
        raise ValueError(
            "--extend_vocabulary needs a base with a byte-level BPE as GPT-2's, which this base's tokenizer is not."
        )
    splits = (backend.pre_tokenizer.pre_tokenize_str(piece) for text in texts for piece in _pieces(text))
    words = Counter(word for split in splits for word, _ in split)
    letters = {
        word: "".join(chr(FIRST_LETTER + t.id) for t in backend.model.tokenize(word)) for word in words
    }
    alphabet = set().union(*letters.values())
    learner = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + count, limit_alphabet=len(alphabet), min_frequency=2, show_progress=False
    )
    learner.train_from_iterator((letters[word] for word in words.elements()), trainer)

    def spell(token: str) -> str:
        return "".join(backend.id_to_token(ord(letter) - FIRST_LETTER) for letter in token)

    merges = [tuple(map(spell, pair)) for pair in json.loads(learner.to_str())["model"]["merges"]]
    spec = json.loads(backend.to_str())
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
        **tokenizer.special_tokens_map,
    )


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerFast:
    """A tokenizer from a folder or the Hub, without running code that lies beside it.

    Raises:
        ValueError: there is none, or it has no end-of-text token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except Exception as error:  # a damaged tokenizer.json has as many exceptions as it has keys
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise ValueError(
            f"no tokenizer can be loaded from {name_or_path!r}: give a folder with tokenizer.json, or a Hub id "
            f"({reason[:200]})."
        ) from error
    # Where a folder has no tokenizer, transformers makes up an empty one of the model's type.
    if not tokenizer.is_fast or tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False) < 2:
        raise ValueError(
            f"{name_or_path!r} holds no tokenizer in tokenizer.json: save the model's tokenizer there."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {name_or_path!r} has no end-of-text token: use another.")
    return tokenizer


def make_tokenizer(
    kind: str, train: Sequence[str], vocab_size: int, validation: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """The tokenizer that `--tokenizer` asks for: char and bpe are trained on the texts, all else is loaded.

    A char tokenizer has the alphabet of both splits, which tells a model nothing of the text that it will be
    tested on; the merges of a bpe tokenizer would, so they are learned from the training split alone.

    Raises:
        ValueError: nothing can be loaded, or vocab_size is too small for bpe.
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
    texts = [text for text in map(tokenizer.decode, ids) if "\N{REPLACEMENT CHARACTER}" not in text]
    return sorted(dict.fromkeys(texts), key=len, reverse=True)[:count]


def _pieces(text: str) -> list[str]:
    """Cut before a space or newline that follows a word: no token of a GPT-2-style tokenizer spans such a place.

    Python's white space, which tells where a word ends, holds all that the tokenizers library takes for it.
    """
    place, cuts = re.compile(r"(?<=\S)[ \n]"), [0]
    while cuts[-1] + CHUNK < len(text) and (cut := place.search(text, cuts[-1] + CHUNK)):
        cuts.append(cut.start())
    return [text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def _splits_words(backend: Tokenizer) -> bool:
    """Whether it cuts text into words as GPT-2's tokenizer does, before anything else."""
    splitter = backend.pre_tokenizer
    if not isinstance(splitter, pre_tokenizers.ByteLevel) or backend.normalizer is not None:
        return False
    return splitter.use_regex and not splitter.add_prefix_space


def _character_encoder(backend: Tokenizer) -> Callable[[str], np.ndarray] | None:
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
        ids = table[points]
        unknown = ids < 0
        if unknown.any():
            spelt = points[unknown].tobytes().decode("utf-32-le").encode()
            n_bytes = 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF)
            repeats = np.where(unknown, n_bytes, 1)
            ids = np.repeat(ids, repeats)
            ids[ids < 0] = spelling[np.frombuffer(spelt, dtype=np.uint8)]
        return ids

    return encode_text


def _library_ids(backend: Tokenizer, pieces: Sequence[str]) -> Iterator[np.ndarray]:
    """The ids of each piece, with special tokens that are spelt out in it taken for ordinary text."""
    before = backend.encode_special_tokens
    for start in range(0, len(pieces), BATCH):
        backend.encode_special_tokens = True
        encodings = backend.encode_batch_fast(pieces[start : start + BATCH], add_special_tokens=False)
        backend.encode_special_tokens = before
        yield from (np.array(encoding.ids, dtype=np.int32) for encoding in encodings)


def _encode_each(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[np.ndarray]:
    backend = tokenizer.backend_tokenizer
    encode_text = _character_encoder(backend)
    if encode_text is not None:
        return [encode_text(text) for text in texts]
    pieces = [_pieces(text) if _splits_words(backend) else [text] for text in texts]
    ids = _library_ids(backend, list(chain.from_iterable(pieces)))
    return [np.concatenate([next(ids) for _ in parts]) for parts in pieces]


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> np.ndarray:
    """The ids of a text, as an int32 array; a special token spelt out in the text stays ordinary text.

    A table look-up where tokens are characters (hundreds of millions a second, against 9 million of the
    tokenizers library on 2 cores), the library elsewhere.
    """
    return _encode_each(tokenizer, [text])[0]


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: Sequence[str]) -> np.ndarray:
    """The ids of all documents, as an int32 array, with the end-of-text token between each two."""
    end = np.array([tokenizer.eos_token_id], dtype=np.int32)
    return np.concatenate([part for ids in _encode_each(tokenizer, documents) for part in (end, ids)][1:])


def encode_with_spans(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The ids of a text as of `encode`, and the characters (first, past the last) that each token stands for.

    Together the tokens cover every character; the pieces of one character all have that character's span.
    """
    backend = tokenizer.backend_tokenizer
    before, backend.encode_special_tokens = backend.encode_special_tokens, True
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
