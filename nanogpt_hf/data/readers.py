"""From one file to its documents: a table from suffix to reader, and what to say of a file that none takes.

A new format is a line of READERS and its function. Every reader streams, and gives each document in parts that follow
one another.
"""

import codecs
import csv
import gzip
import io
import json
import shlex
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

from ..common.errors import UserError
from ..common.text import first_line

Text = Iterable[str]  # a document, in parts
File = IO[bytes] | gzip.GzipFile
Reader = Callable[[File, Path, str, "Reading"], Iterator[Text]]

PART = 2**20  # bytes of a text that are read at once
SAMPLE = 2**16  # bytes that tell text from what is none
ROWS_OR_A_LIST = ".json"  # which its content tells, where it is given by its name
CHAT = "messages"  # the column of a conversation in the datasets of the field
AROUND = 2000  # bytes before one that is not UTF-8, which help to tell what it is
# Encodings that texts come in, of those that would give the same text the likelier first.
ENCODINGS = (
    "cp1252 cp1251 cp1250 cp1253 cp1254 cp1255 cp1256 cp1257 cp1258 koi8_r koi8_u cp866 cp437 cp850 iso8859_5 "
    "mac_roman mac_cyrillic gb18030 big5 shift_jis euc_jp cp949"
).split()


@dataclass
class Reading:
    """How much of a source has been read, and what came up meanwhile.

    Attributes:
        finished: bytes of the files, or rows of the dataset, that have been read.
        file: the one that is being read.
        carriage_returns: how many were taken for parts of newlines.
        marks: how many lines were nothing but the mark of the end of a text.
        conversations: whether there were any.
    """

    finished: int = 0
    file: IO[bytes] | None = None
    carriage_returns: int = 0
    marks: int = 0
    conversations: bool = False

    @property
    def done(self) -> int:
        return self.finished + (self.file.tell() if self.file else 0)


def kind_of(path: Path) -> str:
    """The suffix that decides how a file is read, that of its content where it is compressed."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def read_file(path: Path, text_column: str, reading: Reading) -> Iterator[Text]:
    """The documents of one file.

    Args:
        text_column: of formats with rows, the column that holds the text.
        reading: is kept up to date while the documents are read.

    Raises:
        UserError: no reader takes it, or it is not what its suffix says.
    """
    read = read_jsonl if kind_of(path) == ROWS_OR_A_LIST else READERS.get(kind_of(path), read_text)
    with _opened(path, reading) as file:
        yield from read(file, path, text_column, reading)


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each line of a .jsonl file stands, and what it holds.

    Raises:
        UserError: the file cannot be read, or a line is not JSON.
    """
    with _opened(path, Reading()) as file:
        yield from _json_lines(file, path)


@contextmanager
def _opened(path: Path, reading: Reading) -> Iterator[File]:
    """The content of a file, decompressed if need be."""
    with _refusals(path):
        if path.exists() and not path.is_dir() and kind_of(path) != ROWS_OR_A_LIST and why_unread(path):
            raise _refusal(path)
        with path.open("rb") as raw:
            reading.file = raw
            try:
                yield gzip.GzipFile(fileobj=raw) if path.name.lower().endswith(".gz") else raw
            finally:
                reading.file = None
        reading.finished += path.stat().st_size


@contextmanager
def _refusals(path: Path) -> Iterator[None]:
    """A file that cannot be read, or not to its end, is the user's to mend."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path.name} is damaged: {first_line(error)}.") from error
    except OSError as error:
        raise UserError(f"{path.name} cannot be read: {error.strerror or first_line(error, 2)}.") from error


# --- the readers ---


def read_text(file: File, path: Path, text_column: str, reading: Reading) -> Iterator[Text]:
    """The whole file is one document."""
    yield _decoded(file, path)


def _decoded(file: File, path: Path) -> Iterator[str]:
    decoder, ended, start = codecs.getincrementaldecoder("utf-8")(), False, 0
    with _refusals(path):
        try:
            while not ended:
                start = file.tell() - len(decoder.getstate()[0])  # a character may be cut in two
                block = file.read(PART)
                ended = not block
                yield decoder.decode(block, final=ended)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, f"at byte {start + error.start}", error) from error


def read_jsonl(file: File, path: Path, text_column: str, reading: Reading) -> Iterator[Text]:
    """Each line is a JSON object, and its text a document."""
    # Not through datasets, which (5.2.0) takes texts that look like dates for dates: when a block of a file
    # holds only such, "2020-01-01" silently becomes "2020-01-01 00:00:00".
    for where, row in _json_lines(file, path):
        if not isinstance(row, dict):
            raise UserError(f"{where} is not a JSON object.")
        column = column_of(row, text_column, where)
        yield from texts([row[column]], column, where, reading)


def _json_lines(file: File, path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, start=1):
        if line.isspace():
            continue
        where = f"line {number} of {path.name}"
        try:
            value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            if b"\\ud" in line.lower():
                json.dumps(value, ensure_ascii=False).encode()
        except UnicodeDecodeError as error:
            raise _not_utf8(path, f"in line {number}", error) from error
        except UnicodeEncodeError as error:
            raise UserError(f"{where} holds half of a surrogate pair, which is not Unicode text.") from error
        except (ValueError, RecursionError) as error:
            if kind_of(path) == ROWS_OR_A_LIST:
                raise _refusal(path) from error
            raise UserError(f"{where} is not JSON.") from error
        if isinstance(value, list) and kind_of(path) == ROWS_OR_A_LIST:
            raise _refusal(path)
        yield where, value


def read_csv(file: File, path: Path, text_column: str, reading: Reading) -> Iterator[Text]:
    """The first row names the columns; each other row's text is a document, exactly as it stands."""
    csv.field_size_limit(2**31 - 1)  # for the whole process; the default of 131,072 is less than a document
    lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    rows = None
    try:
        header = lines.readline()
        # Tables of countries with a decimal comma have semicolons.
        delimiter = "\t" if kind_of(path) == ".tsv" else ";" if "," not in header and ";" in header else ","
        rows = csv.reader(chain([header], lines), delimiter=delimiter, strict=True)
        columns = next(rows, [])
        column = columns.index(column_of(columns, text_column, path.name))
        for row in filter(None, rows):
            if len(row) <= column:
                where = f"the row that ends in line {rows.line_num} of {path.name}"
                raise UserError(f"{where} has {len(row)} columns, the first row {len(columns)}.")
            yield [row[column]]
    except csv.Error as error:
        line = rows.line_num if rows else 1
        raise UserError(
            f"{path.name} cannot be read as a table near line {line}: {first_line(error)}."
        ) from error
    except UnicodeDecodeError as error:
        raise _not_utf8(path, f"near line {rows.line_num if rows else 1}", error) from error
    finally:
        lines.detach()  # or it would close the file


def read_parquet(file: File, path: Path, text_column: str, reading: Reading) -> Iterator[Text]:
    """Each row's text is a document."""
    import pyarrow
    import pyarrow.parquet

    if isinstance(file, gzip.GzipFile):
        file = io.BytesIO(file.read())  # parquet is read from its end
    try:
        table = pyarrow.parquet.ParquetFile(file)
        column = column_of(table.schema_arrow.names, text_column, path.name)
        for batch in table.iter_batches(batch_size=1000, columns=[column]):
            yield from texts(batch.column(0).to_pylist(), column, path.name, reading)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path.name} cannot be read as parquet: {first_line(error, 2)}.") from error


READERS: dict[str, Reader] = {
    ".txt": read_text,
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}


def column_of(columns: Iterable[str], text_column: str, where: str) -> str:
    """The column of the text: the one that is asked for, or where there is no "text" the conversations.

    Raises:
        UserError: there is neither.
    """
    columns = list(columns)
    if text_column in columns:
        return text_column
    if text_column == "text" and CHAT in columns:
        return CHAT
    raise UserError(
        f"{where} has no column {text_column!r}; set --text_column to one of: {', '.join(columns)}."
    )


def texts(values: Iterable[object], text_column: str, where: str, reading: Reading) -> Iterator[Text]:
    """The documents in a column's values; of a conversation what was said, with an empty line between turns.

    Raises:
        UserError: a value is no text.
    """
    for value in values:
        if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
            reading.conversations = True
            value = _joined(value)
        if value is None:
            continue
        if not isinstance(value, str):
            raise UserError(f"{where} has a {type(value).__name__} in the column {text_column!r}, not text.")
        yield [value]


def _joined(turns: list[dict[str, Any]]) -> object:
    contents = [turn.get("content") for turn in turns]
    if all(isinstance(content, str | None) for content in contents) and any(contents):
        return "\n\n".join(filter(None, contents))
    return turns


# --- what no reader takes ---

_PANDOC = "pandoc {file} -t plain -o {file}.txt"
_TO_CSV = "libreoffice --convert-to csv {file}"
CONVERSIONS = {
    **dict.fromkeys((".docx", ".epub", ".fb2", ".htm", ".html", ".odt", ".rtf"), _PANDOC),
    **dict.fromkeys((".ods", ".xls", ".xlsx"), _TO_CSV),
    ".pdf": "pdftotext {file} {file}.txt",
    ".ipynb": "jupyter nbconvert --to markdown {file}",
    ".json": "jq -c '.[]' {file} > {file}l",  # its rows
    ".zip": "unzip {file}",
    ".tar": "tar xf {file}",
    ".tgz": "tar xf {file}",
    ".7z": "7z x {file}",
    ".bz2": "bunzip2 -k {file}",
    ".xz": "unxz -k {file}",
    ".zst": "unzstd {file}",
}


def why_unread(path: Path) -> str | None:
    """Why no reader takes a file, in a few words; None for a file that one takes.

    A suffix that no table knows says nothing: what begins as UTF-8 is a text, whatever its name.
    """
    if not path.is_file():
        return "a pipe or a device"  # which may never end
    if kind_of(path) in CONVERSIONS:
        return CONVERSIONS[kind_of(path)].format(file="FILE")
    if kind_of(path) in READERS:
        return None
    try:
        sample = _sample(path)
        codecs.getincrementaldecoder("utf-8")().decode(sample)
    except UnicodeDecodeError:
        return "not text in UTF-8"
    except (OSError, EOFError, zlib.error) as error:
        return first_line(error) if not isinstance(error, OSError) else error.strerror or first_line(error)
    return "not text" if b"\0" in sample else None


def _refusal(path: Path) -> UserError:
    """What to say of a file that no reader takes, with the command that makes a text of it where there is one."""
    if not path.is_file():
        return UserError(f"{path.name} is a pipe or a device, no file: save what it gives into a file.")
    command = CONVERSIONS.get(kind_of(path))
    if command:
        command = command.format(file=shlex.quote(str(path)))
        return UserError(f"{path.name} is not read as it is, convert it: {command}")
    try:
        codecs.getincrementaldecoder("utf-8")().decode(_sample(path))
    except UnicodeDecodeError as error:
        return _not_utf8(path, f"at byte {error.start}", error)
    return UserError(f"{path.name} is not text: convert it to text in UTF-8.")


def _sample(path: Path) -> bytes:
    with path.open("rb") as raw:
        file = gzip.GzipFile(fileobj=raw) if path.name.lower().endswith(".gz") else raw
        return file.read(SAMPLE)


def _not_utf8(path: Path, where: str, error: UnicodeDecodeError) -> UserError:
    """What to say of a text in another encoding, with the command that converts it where one can be told."""
    cut = (
        error.reason == "unexpected end of data"
    )  # the last character's first bytes are all that the error holds
    sample = _sample(path) if cut else error.object[max(0, error.start - AROUND) :][:SAMPLE]
    message = f"{path.name} is not UTF-8 {where}"
    decoded = sample.decode(errors="replace")
    bad = decoded.count("\N{REPLACEMENT CHARACTER}")
    # Before a character that is cut one whole other is proof enough: in no other encoding would it look like UTF-8.
    if sum(character > "\x7f" for character in decoded) > (1 if cut else 10) * bad:
        return UserError(
            f"{message}, but elsewhere; this leaves out what is not: {_iconv('-c -f UTF-8', path)}"
        )
    encoding = _encoding_of(_sample(path), sample)
    if encoding is None:
        return UserError(f"{message}, nor in an encoding that can be told: convert it to UTF-8.")
    return UserError(f"{message}; it looks like {encoding}, convert it: {_iconv(f'-f {encoding}', path)}")


def _iconv(options: str, path: Path) -> str:
    """The command that makes a text in UTF-8 of a file, beside it."""
    plain = Path(path.name.removesuffix(".gz"))
    old, new = (shlex.quote(str(each)) for each in (path, path.with_name(f"{plain.stem}-utf8{plain.suffix}")))
    if plain.name != path.name:
        return f"gunzip -c {old} | iconv {options} -t UTF-8 > {new}"
    return f"iconv {options} -t UTF-8 {old} > {new}"


def _encoding_of(begin: bytes, sample: bytes) -> str | None:
    """The name, as iconv has it, of the encoding that bytes seem to be in; None when they seem to be no text.

    Args:
        begin: how the file begins.
        sample: of what is not UTF-8.
    """
    if begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    if b"\0" in begin:
        return None
    from charset_normalizer import from_bytes

    best = from_bytes(sample, cp_isolation=ENCODINGS).best()
    if best is None:
        return None
    likely = next((name for name in ENCODINGS if name in best.could_be_from_charset), best.encoding)
    return codecs.lookup(likely).name.upper().replace("_", "-")
