"""What a run says of its text before it begins: what is read, held out, left out, and how."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
from transformers import PreTrainedTokenizerFast

from ..common.recipes import command
from .readers import Reading, kind_of
from .sources import Source, list_skipped
from .splits import END_OF_TEXT


def lines_on_files(name: str, source: Source, characters: Mapping[str, int] | None = None) -> list[str]:
    """What is read and what is not.

    Args:
        name: of the corpus.
        characters: of each split, once they have been read.
    """
    kinds = Counter(kind_of(path) or "without a suffix" for path in source.files)
    files = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    what = [f"{sum(characters.values()):,} characters"] if characters else []
    what += [f"{len(source.files):,} files ({files})"] if len(source.files) > 1 else []
    size = f"{characters['validation']:,} of these characters: " if characters else ""
    lines = [
        f"corpus     {name}: {' in '.join(what)}" if what else f"corpus     {name}",
        f"validation {size}{source.held_out}",
    ]
    if source.skipped:
        lines.append(f"not read   {list_skipped(source.skipped)}")
    return lines


def lines_on_text(reading: Reading) -> list[str]:
    """What was read otherwise than it stands in the files."""
    lines = []
    if reading.conversations:
        lines.append("documents  of conversations, what was said in them, without the roles")
    if reading.marks:
        lines.append(
            f"documents  end at {reading.marks:,} lines {END_OF_TEXT}; --special_tokens_in_text text reads them as text"
        )
    if reading.carriage_returns:
        lines.append(
            f"newlines   {reading.carriage_returns:,} CRLF or CR are one newline each; --keep_carriage_returns keeps them"
        )
    return lines


def line_on_special_tokens(spelt: Counter[str], as_tokens: bool) -> str:
    """How the special tokens are read that a text spells."""
    shown = ", ".join(f"{token} ({count:,})" for token, count in spelt.most_common(5))
    more = f" and {len(spelt) - 5:,} more" if len(spelt) > 5 else ""
    if as_tokens:
        return f"special    the text spells {shown}{more}: each is the tokenizer's token"
    return (
        f"warning: the text spells special tokens of the tokenizer, {shown}{more}, and they are read as ordinary text; "
        "--special_tokens_in_text tokens makes them the tokens."
    )


def special_tokens_spelt(tokenizer: PreTrainedTokenizerFast, documents: Iterable[str]) -> Counter[str]:
    """How often the documents spell each special token of the tokenizer."""
    special = [
        token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content
    ]
    if not special:
        return Counter()
    # Of two that begin alike the longer one is meant.
    pattern = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
    return Counter(match for document in documents for match in pattern.findall(document))


def misfit(tokenizer: PreTrainedTokenizerFast, ids: np.ndarray, characters: int) -> str | None:
    """What to say of a tokenizer that cannot spell a text well; None for one that can.

    Args:
        ids: of the text.
        characters: of the text.
    """
    unknown = tokenizer.unk_token_id
    lost = 0 if unknown in (None, tokenizer.eos_token_id) else np.count_nonzero(ids == unknown) / len(ids)
    if lost > 0.001:
        return (
            f"the tokenizer has no token for {lost:.1%} of the text, which is lost: train one on it, with --tokenizer "
            f"char or bpe or by {command('train_tokenizer')}."
        )
    if len(ids) > 1.05 * characters:
        return (
            f"the tokenizer takes {len(ids) / characters:.2f} tokens per character of this text: --tokenizer char takes "
            f"one, bpe and {command('train_tokenizer')} learn from the text, and fine-tuning has --extend_vocabulary."
        )
    return None
