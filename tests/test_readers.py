"""Readers: every format's text comes through as it stands, and what is not read is told with what to do."""

import gzip
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from nanogpt_hf.common.errors import UserError
from nanogpt_hf.data.corpora import load_corpus
from nanogpt_hf.data.readers import Reading, read_file

TEXTS = ["first\r\nline", '2020-01-01, "quoted"', "NA", "ё" * 90, "a;b\tc"]
FOX = "Съешь же ещё этих мягких французских булок, да выпей чаю.\n" * 3


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def parquet(path: Path, **columns: list) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def documents(path: Path, column: str = "text") -> list[str]:
    reading = Reading()
    found = ["".join(parts) for parts in read_file(path, column, reading)]
    assert reading.done == path.stat().st_size
    return found


def refusal(path: Path, **options) -> str:
    """The sentence in which a corpus is refused."""
    with pytest.raises(UserError) as refused:
        load_corpus(str(path), **options)
    message = str(refused.value)
    assert re.fullmatch(r"\S[^\n]*\S", message) and not re.search(r"[.!?] [A-Z]", message), message
    return message


def quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def rows_of(kind: str, texts: list[str]) -> bytes:
    if kind == ".jsonl":
        return "\r\n".join(json.dumps({"id": 1, "text": text}) for text in texts).encode()
    separator = {".csv": ",", ".tsv": "\t"}[kind]
    lines = [f"id{separator}text", "", *(f"1{separator}{quoted(text)}" for text in texts)]
    return "\r\n".join(lines).encode("utf-8-sig")


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_rows_are_documents_exactly(tmp_path, kind, compressed):
    path = tmp_path / f"we[i]rd*{kind}"
    if kind == ".parquet":
        parquet(path, id=[1] * 6, text=[*TEXTS, None])
    else:
        path.write_bytes(rows_of(kind, TEXTS))
    if compressed:
        path = write(tmp_path / f"{path.name}.gz", gzip.compress(path.read_bytes()))
    assert documents(path) == TEXTS


@pytest.mark.parametrize(
    "name", ["a.txt", "a.md", "a.py", "a.rs", "Makefile", "a.c.gz", "a.txt.gz", "notes.v2"]
)
def test_any_utf8_text_is_read_whatever_its_name(tmp_path, name):
    text = "def f(x):\n\treturn x\n" * 50_000 + "ё👩‍👩‍👧\x00z"[: 8 if name == "a.txt" else 4]
    content = text.encode()
    path = write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    assert documents(path) == [text]


def test_tables_with_semicolons_and_with_long_fields(tmp_path):
    assert documents(write(tmp_path / "a.csv", "id;text\n1;1,5\n2;zwei\n")) == ["1,5", "zwei"]
    assert documents(write(tmp_path / "b.csv", f'text\n"{"a" * 200_000}"\n')) == ["a" * 200_000]


def test_conversations_are_what_was_said(tmp_path):
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "Bye"},
    ]
    chat = write(
        tmp_path / "a.jsonl", json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns[:1]})
    )
    assert documents(chat) == ["Hi\n\nBye", "Hi"]
    assert documents(parquet(tmp_path / "a.parquet", talk=[turns]), "talk") == ["Hi\n\nBye"]
    corpus = load_corpus(str(chat), 20)
    assert "documents  of conversations, what was said in them, without the roles" in corpus.reading
    pictures = [{"role": "user", "content": [{"type": "image"}]}]
    assert "has a list in the column 'messages', not text" in refusal(
        write(tmp_path / "b.jsonl", json.dumps({"messages": pictures}))
    )


@pytest.mark.parametrize("encoding", ["utf-16", "cp1251", "koi8-r"])
@pytest.mark.parametrize("name", ["a b.txt", "a.log", "a.csv", "a.jsonl", "a.txt.gz"])
def test_another_encoding_is_refused_with_the_command_that_converts(tmp_path, encoding, name):
    rows = {"a.csv": f"text\n{quoted(FOX)}\n", "a.jsonl": json.dumps({"text": FOX}, ensure_ascii=False)}
    content = rows.get(name, FOX).encode(encoding)
    message = refusal(write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content))
    assert f"{name} is not UTF-8" in message and f"iconv -f {encoding.upper()} -t UTF-8" in message
    command = message.partition("convert it: ")[2]
    subprocess.run(command, shell=True, check=True)
    assert documents(Path(shlex.split(command)[-1])) == [FOX]


def test_utf8_with_a_bad_byte_is_not_called_another_encoding(tmp_path):
    path = write(tmp_path / "a.txt", FOX.encode() * 2000 + b"\xff" + FOX.encode())
    message = refusal(path)
    assert f"at byte {len(FOX.encode()) * 2000}" in message and "iconv -c -f UTF-8 -t UTF-8" in message
    cut = refusal(write(tmp_path / "b.txt", ("Привет. " * 40).encode()[:-1] + "я".encode()[:1]))
    assert "iconv -c -f UTF-8 -t UTF-8" in cut
    assert "it looks like CP1252" in refusal(
        write(tmp_path / "c.txt", b"plain text " * 40 + "café".encode("cp1252"))
    )


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"\xff\0\xff", "a.txt is not UTF-8 at byte 0, nor in an encoding that can be told"),
        ("a.png", b"\x89PNG\r\n\x1a\n\0\0", "a.png is not UTF-8 at byte 0, nor in an encoding"),
        ("a.dat", b"\0\1\2", "a.dat is not text"),
        (
            "a.epub",
            b"PK",
            "a.epub is not read as it is, convert it: pandoc .*a.epub -t plain -o .*a.epub.txt",
        ),
        ("a.html", b"<p>", "pandoc"),
        ("a.pdf", b"%PDF", "pdftotext"),
        ("a.json", b"[]", r"jq -c '.\[\]' .*a.json > .*a.jsonl"),
        ("a.zip", b"PK", "unzip"),
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'{"text": null}\n{"text": " "}\n', "holds no text"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"', "line 3 of a.jsonl is not JSON"),
        ("a.jsonl", b"[1]", "line 1 of a.jsonl is not a JSON object"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b", "id": 1}', "line 2 .* no column 'text'.* body, id"),
        ("a.jsonl", b'{"text": 1}', "has a int in the column 'text'"),
        ("a.jsonl", b'{"text": "\\ud800 alone"}', "half of a surrogate pair"),
        ("a.csv", b"", "no column 'text'"),
        ("a.csv", b"id,body\n1,a\n", "a.csv has no column 'text'; set --text_column to one of: id, body"),
        ("a.csv", b"id,text\n1\n", "the row that ends in line 2 of a.csv has 1 columns, the first row 2"),
        ("a.csv", b'text\n"a', "a.csv cannot be read as a table near line 2"),
        ("a.parquet", b"PAR1 no", "a.parquet cannot be read as parquet"),
        ("a.parquet", b"", "a.parquet cannot be read as parquet"),
        ("a.txt.gz", b"no", "a.txt.gz is damaged"),
        ("a.txt.gz", gzip.compress(b"text" * 1000, mtime=0)[:-9], "a.txt.gz is damaged"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}', mtime=0)[:-9], "a.jsonl.gz is damaged"),
    ],
)
def test_bad_content_is_refused(tmp_path, capfd, name, content, says):
    message = refusal(write(tmp_path / name, content))
    assert re.search(says, message), message
    assert capfd.readouterr() == ("", "")


def test_bad_parquet_columns_are_refused(tmp_path):
    path = parquet(tmp_path / "a.parquet", body=["a"], id=[1])
    assert "a.parquet has no column 'text'; set --text_column to one of: body, id" in refusal(path)
    assert "a.parquet has a int in the column 'id'" in refusal(path, text_column="id")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_what_may_never_end_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    assert "pipe.txt is a pipe or a device" in refusal(tmp_path / "pipe.txt")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    assert "zeros is a pipe or a device" in refusal(tmp_path / "zeros")
    assert "holds no file that can be read; not read: pipe.txt (a pipe or a device)" in refusal(
        tmp_path / "p*"
    )
    (tmp_path / "loop").symlink_to("loop")
    assert "is a link that leads nowhere" in refusal(tmp_path / "loop")
    (tmp_path / "index.json").unlink(missing_ok=True)
    os.mkfifo(tmp_path / "index.json")  # where shards would have their index
    write(tmp_path / "a.txt", "text " * 99)
    (tmp_path / "zeros").unlink()
    corpus = load_corpus(str(tmp_path))
    assert "".join(corpus.train + corpus.validation) == "text " * 99


def test_a_folder_says_what_it_does_not_read(tmp_path):
    write(tmp_path / "a.py", "print('a')\n" * 9)
    write(tmp_path / "doc" / "b.md", "# b\n" * 9)
    for name, content in {
        "c.epub": b"PK",
        "x/d.html": b"<p>",
        "e.png": b"\x89PNG\0",
        "f.pyc": b"\xcb\r\r\n\0",
    }.items():
        write(tmp_path / name, content)
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    corpus = load_corpus(str(tmp_path))
    assert corpus.source == "a.py, b.md"
    (line,) = [line for line in corpus.reading if line.startswith("not read")]
    assert "e.png, f.pyc (not text in UTF-8)" in line
    assert f"c.epub, {os.path.join('x', 'd.html')} (pandoc FILE -t plain -o FILE.txt)" in line
    assert "gone (a link out of the folder or to nothing)" in line
    assert corpus.reading[0].endswith("135 characters in 2 files (1 .py, 1 .md)")
