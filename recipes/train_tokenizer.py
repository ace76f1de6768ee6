"""Train a tokenizer on a corpus; `--tokenizer FOLDER` gives it to a pretraining recipe.

    python recipes/train_tokenizer.py --kind bpe --vocab_size 1024             # Shakespeare, a second on a laptop
    python recipes/train_tokenizer.py --kind char --corpus tiny_pushkin
    python recipes/train_tokenizer.py --corpus my_text.txt --vocab_size 4096 --output_dir tokenizers/mine

It prints what a token holds, as a row of the table in tokenizers/README.md. The same text gives the same bytes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerFast

from nanogpt_hf.common.cli import parse, run_recipe
from nanogpt_hf.common.errors import UserError
from nanogpt_hf.common.files import files_written_whole
from nanogpt_hf.common.settings import setting
from nanogpt_hf.data.corpora import Corpus, load_corpus
from nanogpt_hf.data.tokenization import encode_documents, longest_tokens, make_tokenizer

HEADER = (
    "| tokenizer | tokens | characters a token, training | validation | longest tokens |\n"
    "| --- | ---: | ---: | ---: | --- |"
)


@dataclass
class TokenizerSettings:
    corpus: str = setting(
        "tiny_shakespeare", "tiny_shakespeare, tiny_pushkin, a file, folder or glob, or a Hub dataset"
    )
    text_column: str = setting("text", "column of a .jsonl, .parquet or Hub dataset that holds the text")
    validation_split_percentage: int = setting(
        10, "percent of the text, at its end, from which bpe learns nothing"
    )
    kind: Literal["char", "bpe"] = setting("bpe", "char: a token a character; bpe: byte-level BPE as GPT-2's")
    vocab_size: int = setting(
        1024, "tokens of a bpe tokenizer, the 256 bytes and the end-of-text token among them"
    )
    output_dir: str | None = setting(
        None, "folder; default tokenizers/CORPUS-KIND, for bpe with its vocab_size"
    )
    overwrite_output_dir: bool = setting(False, "replace the tokenizer that is in the folder")

    def folder(self) -> Path:
        corpus = re.sub(r"[^\w.-]+", "-", Path(self.corpus.rstrip("/*")).stem) or "corpus"
        size = f"-{self.vocab_size}" if self.kind == "bpe" else ""
        return Path(self.output_dir or f"tokenizers/{corpus}-{self.kind}{size}")


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(TokenizerSettings, __doc__, argv)
    folder = settings.folder()
    if folder.exists() and not (folder.is_dir() and settings.overwrite_output_dir):
        raise UserError(
            f"--output_dir {folder} exists: give another, or --overwrite_output_dir for a folder."
        )
    corpus = load_corpus(settings.corpus, settings.validation_split_percentage, settings.text_column)
    if corpus.notice:
        print(f"NOTE: {corpus.notice}")
    tokenizer = make_tokenizer(settings.kind, corpus.train, settings.vocab_size, corpus.validation)
    if settings.kind == "bpe" and len(tokenizer) < settings.vocab_size:
        print(f"NOTE: the text has merges for {len(tokenizer):,} tokens only.")
    try:
        with files_written_whole(folder) as staging:
            tokenizer.save_pretrained(staging)
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written ({error.strerror}).") from error
    print(HEADER, row(folder.name, tokenizer, corpus), sep="\n")


def row(name: str, tokenizer: PreTrainedTokenizerFast, corpus: Corpus) -> str:
    """A row of the table: name, vocabulary, characters a token on both splits, longest tokens decoded.

    Where every token is one character, these are the corpus's alphabet, 40 at a time.
    """
    per_token = [
        sum(map(len, documents)) / len(encode_documents(tokenizer, documents))
        for documents in (corpus.train, corpus.validation)
    ]
    tokens = longest_tokens(tokenizer, 8)
    if len(tokens[0]) == 1:
        alphabet = "".join(sorted(set().union(*corpus.train, *corpus.validation)))
        tokens = [alphabet[start : start + 40] for start in range(0, len(alphabet), 40)]
    return f"| {name} | {len(tokenizer):,} | {per_token[0]:.2f} | {per_token[1]:.2f} | {' '.join(map(code, tokens))} |"


def code(token: str) -> str:
    """A token in Markdown's code style, its white space visible."""
    visible = token.replace(" ", "␣").replace("\n", "⏎").replace("|", r"\|")
    return f"`` {visible} ``" if "`" in visible else f"`{visible}`"


if __name__ == "__main__":
    run_recipe(main)
