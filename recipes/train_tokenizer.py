"""Train a tokenizer on a corpus; `--tokenizer FOLDER` gives it to a pretraining recipe.

    python recipes/train_tokenizer.py --kind bpe --vocab_size 1024             # Shakespeare, a second on a laptop
    python recipes/train_tokenizer.py --kind char --corpus tiny_pushkin
    python recipes/train_tokenizer.py --corpus my_text.txt --vocab_size 4096 --output_dir tokenizers/mine

It prints what a token holds, as a row of the table in tokenizers/README.md. The same text gives the same bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nanogpt_hf.common.cli import parse
from nanogpt_hf.common.errors import UserError
from nanogpt_hf.common.fields import changed, setting
from nanogpt_hf.common.files import files_written_whole
from nanogpt_hf.common.running import run_recipe, tell
from nanogpt_hf.common.settings import TextSettings, as_file_name, short_name
from nanogpt_hf.data.sources import check_corpora

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from nanogpt_hf.data.corpora import AnyCorpus

HEADER = (
    "| tokenizer | tokens | characters a token, training | validation | longest tokens |\n"
    "| --- | ---: | ---: | ---: | --- |"
)


@dataclass(frozen=True)
class TokenizerSettings(TextSettings):
    """Tokenizer"""

    validation_split_percentage: int = changed(
        TextSettings,
        "validation_split_percentage",
        10,
        help="percent of the text, at the end of each file, from which bpe learns nothing",
    )
    kind: Literal["char", "bpe"] = setting(
        "bpe", "char: a token per character; bpe: byte-level BPE as GPT-2's", essential=True
    )
    vocab_size: int = setting(
        1024,
        "tokens of a bpe tokenizer, the 256 bytes and the end-of-text token among them",
        essential=True,
        ge=1,
    )
    output_dir: str | None = setting(
        None, "folder; default tokenizers/CORPUS-KIND, for bpe with its vocab_size", essential=True
    )
    overwrite_output_dir: bool = setting(False, "replace the tokenizer that is in the folder")

    def folder(self) -> Path:
        size = [str(self.vocab_size)] if self.kind == "bpe" else []
        name = as_file_name(short_name(self.corpus), self.kind, *size)
        return Path(self.output_dir or Path("tokenizers", name))


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(TokenizerSettings, __doc__, argv)
    folder = settings.folder()
    if folder.exists() and not (folder.is_dir() and settings.overwrite_output_dir):
        raise UserError(
            f"--output_dir {folder} exists: give another, or --overwrite_output_dir for a folder."
        )
    check_corpora(settings.corpus, settings.validation_file)
    from nanogpt_hf.data.corpora import load_corpus  # with torch, which takes seconds
    from nanogpt_hf.data.tokenization import make_tokenizer

    corpus = load_corpus(settings.corpus, settings.validation_split_percentage, **settings.reading_options())
    tell(*([f"NOTE: {corpus.notice}"] if corpus.notice else []), *corpus.reading)
    tokenizer = make_tokenizer(settings.kind, corpus.train, settings.vocab_size, corpus.validation)
    if settings.kind == "bpe" and len(tokenizer) < settings.vocab_size:
        tell(f"NOTE: the text has merges for {len(tokenizer):,} tokens only.")
    try:
        with files_written_whole(folder, manifest=True) as staging:
            tokenizer.save_pretrained(staging)
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written ({error.strerror}).") from error
    tell(HEADER, row(folder.name, tokenizer, corpus))


def row(name: str, tokenizer: "PreTrainedTokenizerFast", corpus: "AnyCorpus") -> str:
    """A row of the table: name, vocabulary, characters a token on both splits, longest tokens decoded.

    Where every token is one character, these are the corpus's alphabet, 40 at a time.
    """
    from nanogpt_hf.data.tokenization import longest_tokens

    splits = ("train", "validation")
    per_token = [corpus.characters(split) / len(corpus.ids(split, tokenizer)) for split in splits]
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
