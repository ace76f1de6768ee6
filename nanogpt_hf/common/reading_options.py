"""How the text of a corpus is read."""

from typing import Literal, TypedDict


class ReadingOptions(TypedDict, total=False):
    """What the settings of the same names say.

    Attributes:
        text_column: of the formats with rows.
        validation_file: a file, folder or glob that is held out, all of it.
        keep_carriage_returns: read CRLF and CR as they are, and not as one newline.
        special_tokens_in_text: "document_ends": a line that is nothing but <|endoftext|> ends a document; "tokens":
            every special token of the tokenizer that the text spells is the token; "text": all is ordinary text.
    """

    text_column: str
    validation_file: str | None
    keep_carriage_returns: bool
    special_tokens_in_text: Literal["document_ends", "tokens", "text"]


USUAL_READING: ReadingOptions = {
    "text_column": "text",
    "validation_file": None,
    "keep_carriage_returns": False,
    "special_tokens_in_text": "document_ends",
}
