"""What the page answers, as HTML and words: texts, surprisal, verse, a run's curve and card. Nothing here knows gradio."""

import base64
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

from ..analysis.comparison import context_of, short_names
from ..analysis.html_page import escaped
from ..analysis.surprisal import ALTERNATIVES, coloured, legend, mean_words, scale_of, surprisal
from ..analysis.verse_page import LEGEND, article_of
from ..common.errors import UserError
from ..common.text import printable
from ..generation.sampling_settings import SamplingSettings
from ..generation.writer import Prompt, Writer, as_text, written_on
from ..verse.scansion import FORMS, scan

LONGEST_PROMPT = 100_000  # characters; a model sees no more of them than its context
LONGEST_ANALYSIS = 5_000  # characters that are coloured or scanned at once
LONGEST_TEXT = 5_000  # tokens
LOOK_EVERY = 0.05  # seconds between two looks at a text that grows


@dataclass(frozen=True)
class Written:
    """Texts of one or two models on one prompt, as far as they are.

    Attributes:
        names: of the models; `prompts` and `texts` are in their order.
        sampling: with the seed that they have.
    """

    names: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    texts: tuple[str, ...]
    sampling: SamplingSettings
    tokens: int = 0
    seconds: float = 0.0

    def whole(self) -> list[str]:
        """Each text with its prompt, as it is kept."""
        return [as_text(written_on(*pair)) for pair in zip(self.prompts, self.texts, strict=True)]

    def as_html(self) -> list[str]:
        """Each text as it is shown, what was there before it in bold."""
        return [
            f'{_whose(name, self.names)}<div class="poem" dir="auto"><b>{escaped(_before(prompt))}</b>{escaped(text)}</div>'
            for name, prompt, text in zip(self.names, self.prompts, self.texts, strict=True)
        ]

    def in_words(self) -> str:
        """How to have them again."""
        return f"seed {self.sampling.seed} · {self.tokens} tokens in {self.seconds:.1f} s"


def _whose(name: str, names: Sequence[str]) -> str:
    return f'<p class="whose">{escaped(name)}</p>' if len(names) > 1 else ""


def _before(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return "".join(f"{message['content']}\n\n" for message in prompt)


class Answers:
    """The models of a page, and what it does with them.

    Args:
        writers: any number; the page calls them by as little of their name as tells them apart.
    """

    def __init__(self, writers: Sequence[Writer]):
        self.writers = dict(zip(short_names([writer.name for writer in writers]), writers, strict=True))

    def _writer(self, name: str) -> Writer:
        if name not in self.writers:
            raise UserError(f"there is no model {name!r} on this page: reload it.")
        return self.writers[name]

    def write(self, names: Sequence[str], words: str, sampling: SamplingSettings) -> Iterator[Written]:
        """Texts of the models on the same words and seed, as they grow.

        Raises:
            UserError: there are too many words, or too long a text is wanted.
        """
        if len(words) > LONGEST_PROMPT:
            raise UserError(
                f"the prompt has {len(words):,} characters: give at most {LONGEST_PROMPT:,}; a model sees no more of "
                "its end than its context."
            )
        prompts = tuple(self._writer(name).prompt(words or "\n") for name in names)
        return self._grow(Written(tuple(names), prompts, ("",) * len(names), sampling.seeded()))

    def go_on(self, before: Written | None, sampling: SamplingSettings) -> Iterator[Written]:
        """The same texts, longer.

        Raises:
            UserError: there are none.
        """
        if before is None:
            raise UserError("there is no text yet: write one first.")
        prompts = tuple(written_on(*pair) for pair in zip(before.prompts, before.texts, strict=True))
        return self._grow(Written(before.names, prompts, ("",) * len(prompts), sampling.seeded()))

    def _grow(self, written: Written) -> Iterator[Written]:
        if written.sampling.max_new_tokens > LONGEST_TEXT:
            raise UserError(
                f"a text of {written.sampling.max_new_tokens:,} tokens is too long for this page: give at most "
                f"{LONGEST_TEXT:,}, and go on from there."
            )
        streams = [
            self._writer(name).stream(prompt, written.sampling)
            for name, prompt in zip(written.names, written.prompts, strict=True)
        ]
        started = looked = time.perf_counter()
        texts = [""] * len(streams)
        tokens = 0
        for tokens, pieces in enumerate(zip_longest(*streams, fillvalue=[""]), start=1):
            texts = [text + piece for text, (piece,) in zip(texts, pieces, strict=True)]
            now = time.perf_counter()
            if now - looked >= LOOK_EVERY:
                looked = now
                yield replace(written, texts=tuple(texts), tokens=tokens, seconds=now - started)
        yield replace(written, texts=tuple(texts), tokens=tokens, seconds=time.perf_counter() - started)

    def colour(self, names: Sequence[str], text: str) -> list[str]:
        """What the colours say, and the text in those of its surprisal to each model.

        Raises:
            UserError: it is too long, or there is none.
        """
        _check_length(text)
        panels = []
        for name in names:
            writer = self._writer(name)
            context = context_of(writer.model, None)
            panels.append(surprisal(writer.model, writer.tokenizer, text, 0, context, ALTERNATIVES))
        scale = scale_of(panels)
        shown = [
            f"{_whose(name, names)}<p>{mean_words(cells)}</p>{coloured(text, cells, scale)}"
            for name, cells in zip(names, panels, strict=True)
        ]
        return [legend(scale), *shown]

    def scan(self, text: str, form: str) -> str:
        """The text as verse: its stresses, feet and rhymes.

        Args:
            form: of `FORMS`.

        Raises:
            UserError: it is too long, there is none, or what knows the stresses is not installed.
        """
        _check_length(text)
        if form not in FORMS:
            raise UserError(f"there is no form {form!r}: use one of {', '.join(FORMS)}.")
        (poem,) = scan([text], FORMS[form])
        lines = [line.in_metre for line in poem.lines]
        pairs = [pair.rhymed for pair in poem.pairs]
        found = f"{sum(lines)} of {len(lines)} lines in metre, {sum(pairs)} of {len(pairs)} pairs rhymed"
        return f"<p>{found}</p><article>{article_of(text, poem, FORMS[form])}</article>{LEGEND}"

    def run(self, name: str) -> tuple[str, str]:
        """The loss curve of the run that a model is from, in HTML, and its card in Markdown; or why there is none."""
        folder, curve, card = Path(self._writer(name).name), "", ""
        try:
            picture = base64.b64encode((folder / "loss_curve.png").read_bytes()).decode()
            curve = f'<img class="curve" alt="loss over the steps" src="data:image/png;base64,{picture}">'
            card = (folder / "README.md").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):  # whose words name a place on this machine to whoever visits
            card = f"{printable(name)} has no curve or no card that can be read here."
        # Without what only the Hub reads.
        return curve, re.sub(r"\A---\n.*?\n---\n|!\[[^]]*\]\(loss_curve\.png\)", "", card, flags=re.S)


def _check_length(text: str) -> None:
    if not text.strip():
        raise UserError("there is no text: write or paste one first.")
    if len(text) > LONGEST_ANALYSIS:
        raise UserError(f"the text has {len(text):,} characters: give at most {LONGEST_ANALYSIS:,}.")


def kept_as_html(kept: Sequence[dict]) -> str:
    """The poems that a visitor has kept."""
    if not kept:
        return '<p class="note">Nothing is kept yet. What is kept stays in this browser.</p>'
    return "".join(
        f'<div class="poem" dir="auto">{escaped(str(one["text"]))}</div><p class="note">{escaped(str(one["note"]))}</p>'
        for one in kept
    )
