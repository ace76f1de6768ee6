"""The page to play with models on, laid out with gradio (extra `play`).

Everything is in memory before it opens; it listens on this machine alone unless it is told otherwise.
"""

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any

os.environ.setdefault(
    "GRADIO_ANALYTICS_ENABLED", "False"
)  # before gradio is imported: nothing is sent anywhere

import gradio as gr  # noqa: E402

from ..analysis import surprisal, verse_page  # noqa: E402
from ..analysis.html_page import COLOURS  # noqa: E402
from ..common.errors import UserError  # noqa: E402
from ..common.text import printable, unescaped  # noqa: E402
from ..generation.sampling_settings import SEEDS, SamplingSettings  # noqa: E402
from ..generation.writer import Writer  # noqa: E402
from ..verse.scansion import FORMS  # noqa: E402
from .answers import LONGEST_TEXT, Answers, Written, kept_as_html  # noqa: E402

AT_ONCE = 4  # texts that are written at once; who comes later waits in a line
WAITING = 100  # of at most so many
STYLE = (
    COLOURS
    + surprisal.STYLE
    + verse_page.STYLE
    + """
body { color-scheme: light; }
body.dark { color-scheme: dark; }
.poem { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; min-height: 12rem; padding: 0.75rem 1rem;
  border: 1px solid var(--edge); border-radius: 6px; font: 1.05rem/1.6 Georgia, "PT Serif", "DejaVu Serif", serif; }
#kept .poem { min-height: 0; margin-top: 1rem; }
.gradio-container .whose { font-weight: 700; margin: 0 0 0.25rem; }
.gradio-container :is(.note, article + p, .surprisal + p) { color: var(--dim); font-size: 0.85rem; }
.curve { max-width: 100%; background: #ffffff; border-radius: 6px; }
"""
)
# Ctrl+Enter writes and Esc stops, wherever one stands.
KEYS = """() => document.addEventListener("keydown", event => {
  const press = id => { event.preventDefault(); document.querySelector(id)?.click(); };
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) press("#write");
  if (event.key === "Escape") press("#stop");
})"""
DOWNLOAD = """kept => {
  const text = kept.map(one => one.text).join("\\n\\n---\\n\\n") + "\\n";
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], {type: "text/plain"}));
  link.download = "poems.txt";
  link.click();
}"""
NOBODY = "none"
EMPTY = '<div class="poem"></div>'


def answering(handler: Callable[..., Any]) -> Callable[..., Any]:
    """The handler, with a user's mistake as a sentence on the page."""

    @wraps(handler)
    def once(*arguments: Any) -> Any:
        try:
            return handler(*arguments)
        except UserError as error:
            raise gr.Error(printable(str(error)), print_exception=False) from error

    @wraps(handler)
    def as_it_grows(*arguments: Any) -> Iterator[Any]:
        try:
            yield from handler(*arguments)
        except UserError as error:
            raise gr.Error(printable(str(error)), print_exception=False) from error

    return as_it_grows if inspect.isgeneratorfunction(handler) else once


def read_controls(
    length: float, temperature: float, top_p: float, top_k: float, seed: float | None, stop: str
) -> SamplingSettings:
    """The settings of the page's controls. Raises UserError as SamplingSettings does."""
    return SamplingSettings(
        max_new_tokens=int(length),
        temperature=temperature,
        top_p=None if top_p >= 1 else top_p,
        top_k=int(top_k) or None,
        seed=None if seed is None else int(seed),
        stop=[unescaped(stop)] if stop else [],
    )


def make_controls() -> list[gr.components.Component]:
    """What `read_controls` reads."""
    defaults = SamplingSettings()
    with gr.Accordion("Settings", open=False):
        length = gr.Slider(1, LONGEST_TEXT, defaults.max_new_tokens, step=1, label="Length, in tokens")
        temperature = gr.Slider(
            0, 2, defaults.temperature, step=0.05, label="Temperature", info="0: always the likeliest token"
        )
        top_p = gr.Slider(0, 1, 1, step=0.01, label="Top-p", info="share of probability to choose from")
        top_k = gr.Slider(0, 200, 0, step=1, label="Top-k", info="tokens to choose from; 0: all")
        seed = gr.Number(
            None,
            label="Seed",
            info="empty: another each time",
            precision=0,
            minimum=0,
            maximum=SEEDS - 1,
        )
        stop = gr.Textbox(label="Stop", info=r"end before this; \n is a new line", max_length=100)
    return [length, temperature, top_p, top_k, seed, stop]


def only_beside(name: str) -> dict[str, Any]:
    """What belongs to the second model is shown where there is one."""
    return gr.update(visible=name != NOBODY)


class Page:
    """The page's parts, and what happens when they are pressed.

    Args:
        answers: the models.
    """

    def __init__(self, answers: Answers):
        self.answers, self.names = answers, [*answers.writers]
        with gr.Blocks(title=f"nanogpt_hf: {', '.join(self.names)}", delete_cache=(600, 600)) as self.blocks:
            self.last = gr.State(None)  # what was written last, Written
            with gr.Row(visible=len(self.names) > 1):
                self.first = gr.Dropdown(self.names, value=self.names[0], label="Model")
                self.second = gr.Dropdown([NOBODY, *self.names], value=NOBODY, label="Beside it")
            with gr.Tab("Write"):
                self.make_writing()
            with gr.Tab("Surprisal"):
                self.make_surprisal()
            with gr.Tab("Verse"):
                self.make_verse()
            with gr.Tab("Kept"):
                self.make_kept()
            with gr.Tab("The run") as run:
                self.make_run(run)

    def make_writing(self) -> None:
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                prompt = gr.Textbox(
                    label="Beginning",
                    lines=4,
                    max_lines=12,
                    placeholder="Ctrl+Enter writes, Esc stops",
                    autofocus=True,
                )
                with gr.Row():
                    write = gr.Button("Write", variant="primary", elem_id="write", min_width=70)
                    more = gr.Button("More", min_width=70)
                    stop = gr.Button("Stop", elem_id="stop", min_width=70)
                    self.keep = gr.Button("Keep", min_width=70)
                controls = make_controls()
            with gr.Column(scale=3, min_width=300):
                with gr.Row():
                    texts = [gr.HTML(EMPTY, min_width=250), gr.HTML(EMPTY, visible=False, min_width=250)]
                words = gr.HTML()
        outputs = [*texts, words, self.last]
        chosen = [self.first, self.second]
        self.second.change(only_beside, self.second, texts[1], api_visibility="private")
        options: dict[str, Any] = {
            "show_progress": "hidden",
            "concurrency_limit": AT_ONCE,
            "concurrency_id": "texts",
        }
        started: list[Any] = [
            write.click(self.write, [*chosen, prompt, *controls], outputs, api_name="write", **options),
            more.click(self.go_on, [self.last, *controls], outputs, api_name="go_on", **options),
        ]
        stop.click(None, cancels=started)

    @staticmethod
    def _shown(written: Written) -> list[Any]:
        shown = written.as_html()
        return [
            shown[0],
            shown[1] if len(shown) > 1 else "",
            f'<p class="note">{written.in_words()}</p>',
            written,
        ]

    def _names(self, first: str, second: str) -> list[str]:
        return [first] if second == NOBODY else [first, second]

    @answering
    def write(self, first: str, second: str, prompt: str, *controls: Any) -> Iterator[list[Any]]:
        names = self._names(first, second)
        for written in self.answers.write(names, prompt, read_controls(*controls)):
            yield self._shown(written)

    @answering
    def go_on(self, last: Written | None, *controls: Any) -> Iterator[list[Any]]:
        for written in self.answers.go_on(last, read_controls(*controls)):
            yield self._shown(written)

    def make_surprisal(self) -> None:
        text = gr.Textbox(label="Text", lines=6, max_lines=20)
        with gr.Row():
            colour = gr.Button("Colour", variant="primary", min_width=70)
            take = gr.Button("Take what was written", min_width=70)
        scale = gr.HTML()
        with gr.Row():
            panels = [gr.HTML(min_width=250), gr.HTML(visible=False, min_width=250)]
        self.second.change(only_beside, self.second, panels[1], api_visibility="private")
        take.click(self.take, self.last, text, api_visibility="private")
        colour.click(self.colour, [self.first, self.second, text], [scale, *panels], api_name="surprisal")

    @answering
    def colour(self, first: str, second: str, text: str) -> list[str]:
        return [*self.answers.colour(self._names(first, second), text), ""][:3]

    def make_verse(self) -> None:
        text = gr.Textbox(label="Verse", lines=6, max_lines=20)
        form = gr.Radio([*FORMS], value=next(iter(FORMS)), label="Form")
        with gr.Row():
            scan = gr.Button("Scan", variant="primary", min_width=70)
            take = gr.Button("Take what was written", min_width=70)
        marked = gr.HTML()
        take.click(self.take, self.last, text, api_visibility="private")
        scan.click(answering(self.answers.scan), [text, form], marked, api_name="scan")

    @answering
    def take(self, last: Written | None) -> str:
        if last is None:
            raise UserError("there is no text yet: write one first.")
        return last.whole()[0]

    def make_kept(self) -> None:
        kept = gr.BrowserState([], storage_key="nanogpt_hf.kept", secret="kept in this browser alone")
        shown = gr.HTML(elem_id="kept")
        with gr.Row():
            download = gr.Button("Download", min_width=70)
            forget = gr.Button("Forget all", min_width=70)
        self.keep.click(self.keep_last, [self.last, kept], kept, api_visibility="private")
        download.click(None, kept, js=DOWNLOAD)
        forget.click(lambda: [], None, kept, api_visibility="private")
        for event in (kept.change, self.blocks.load):
            event(kept_as_html, kept, shown, api_visibility="private", show_progress="hidden")

    @answering
    def keep_last(self, last: Written | None, kept: list[dict[str, str]]) -> list[dict[str, str]]:
        if last is None:
            raise UserError("there is no text yet: write one first.")
        gr.Info("Kept in this browser.", duration=2)
        new = [
            {"text": text, "note": f"{name} · {last.in_words()}"}
            for name, text in zip(last.names, last.whole(), strict=True)
        ]
        return [*kept, *new]

    def make_run(self, tab: gr.Tab) -> None:
        look = gr.Button("Look again", min_width=70)
        curve, card = gr.HTML(), gr.Markdown()
        for event in (tab.select, look.click, self.first.change):
            event(self.answers.run, self.first, [curve, card], api_name="run", show_progress="hidden")


def make_page(writers: Sequence[Writer]) -> gr.Blocks:
    """The page as gradio's Blocks, whose queue bounds what is done at once.

    Args:
        writers: the models that its visitors may choose from, at least one.
    """
    return Page(Answers(writers)).blocks.queue(max_size=WAITING, default_concurrency_limit=AT_ONCE)


def serve(writers: Sequence[Writer], **options: Any) -> None:
    """Open the page and wait until it is stopped.

    Args:
        options: of gradio's launch; server_name is 127.0.0.1 unless it or GRADIO_SERVER_NAME says otherwise.
    """
    page = make_page(writers)
    theme = gr.themes.Default(
        primary_hue="orange",
        neutral_hue="stone",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    _, address, _ = page.launch(
        theme=theme,
        head=f"<style>{STYLE}</style>",
        js=KEYS,
        footer_links=[],
        ssr_mode=False,
        quiet=True,
        prevent_thread_lock=True,
        **options,
    )
    for writer in writers:
        print(printable(writer.describe()))
    print(f"the page is at {address}; Ctrl-C ends it", flush=True)
    page.block_thread()
