"""A prompt that stays: what is typed is written on, and commands change how."""

import shutil
import textwrap
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..common.cli import parse
from ..common.errors import UserError
from ..common.text import nearest, printable, spelt_out
from .sampling_settings import SEEDS, SamplingSettings
from .showing import say_faintly, show
from .writer import Prompt, Writer, as_text, written_on

with suppress(ImportError):  # Windows has none, and its console keeps a history by itself
    import readline  # noqa: F401  (input() edits its line and goes back in history once this is there)

COMMANDS = {
    "/retry": "the same prompt again, with another seed",
    "/more": "go on where the last text has ended",
    "/save FILE": "write the last text into a new file",
    "/forget": "begin a new conversation",
    "/help": "this list",
    "/quit": "the end, as Ctrl-D; Ctrl-C ends a text",
}


class Terminal:
    """A user at a prompt, and the models that write for them.

    Args:
        writers: one, or two whose texts stand side by side.
        sampling: where its seed is None, every text has another.
    """

    def __init__(self, writers: Sequence[Writer], sampling: SamplingSettings):
        self.writers = writers
        self.sampling = replace(SamplingSettings(), **sampling.options())
        self.prompts: list[Prompt] = []  # what the last texts were written on
        self.texts: list[str] = []
        self.seed: int | None = None  # of the last texts

    def run(self) -> None:
        """Until the user ends it."""
        for writer in self.writers:
            print(printable(writer.describe()))
        print("Type a beginning and press Enter; /help lists what else there is.")
        while True:
            try:
                line = input("\n> ")
                if line.strip() in ("/quit", "/exit"):
                    return
                self.answer(line)
            except EOFError:
                return print()
            except KeyboardInterrupt:
                say_faintly("\nCtrl-D or /quit ends this")
            except (UserError, OSError) as error:
                print(printable(str(error).replace("--", "/")))

    def answer(self, line: str) -> None:
        """Do what a line says: a command, or words to write on; words that begin with / are typed with two.

        Raises:
            UserError: a mistake in the line.
            OSError: a file that cannot be written.
        """
        name, _, value = line.strip().partition(" ")
        if not line.startswith("/") or line.startswith("//"):
            words = spelt_out(line.removeprefix("/") if line.startswith("//") else line) or "\n"
            before: Sequence[Prompt | None] = self.written() or [None] * len(self.writers)
            self.prompts = [w.prompt(words, said) for w, said in zip(self.writers, before, strict=True)]
            self.write(self.sampling.seeded())
        elif name in ("/retry", "/more"):
            if self.seed is None:
                raise UserError("there is no text yet: type a beginning first.")
            if name == "/more":
                self.prompts = self.written()
            elif self.seed == self.sampling.seed:
                self.sampling = replace(self.sampling, seed=(self.seed + 1) % SEEDS)
            self.write(self.sampling.seeded())
        elif name == "/save":
            self.save(value.strip())
        elif name == "/forget":
            self.prompts, self.texts, self.seed = [], [], None
        elif name == "/help":
            self.help()
        else:
            self.set(name.removeprefix("/"), value)

    def written(self) -> list[Prompt]:
        """The last prompts with what was written on them."""
        return [written_on(prompt, text) for prompt, text in zip(self.prompts, self.texts, strict=True)]

    def write(self, sampling: SamplingSettings) -> None:
        """Texts on the prompts, until they have ended or Ctrl-C is pressed."""
        self.seed, started, tokens = sampling.seed, time.perf_counter(), 0
        self.texts = [""] * len(self.writers)
        try:
            for texts in show(self.writers, self.prompts, sampling):
                tokens += 1
                self.texts = [text for (text,) in texts]
        except KeyboardInterrupt:
            print()
        seconds = time.perf_counter() - started
        say_faintly(f"seed {self.seed}, {tokens} tokens in {seconds:.1f} s")

    def save(self, name: str) -> None:
        """The last texts into a file that is not there yet."""
        if not name or self.seed is None:
            raise UserError("/save takes the name of a file, once there is a text: /save poem.txt")
        path = Path(name).expanduser()
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write("\n\n---\n\n".join(map(as_text, self.written())) + "\n")
        except FileExistsError as error:
            raise UserError(f"{name} is there already: give another name.") from error
        say_faintly(f"saved as {path}")

    def set(self, name: str, value: str) -> None:
        """Change one setting, or show it where there is no value."""
        known = [item.name for item in fields(SamplingSettings)]
        if name not in known:
            near = nearest(
                f"/{name}", [*(command.split()[0] for command in COMMANDS), *(f"/{n}" for n in known)]
            )
            hint = f"did you mean {near}?" if near else f"a text that begins so is typed as //{name}"
            raise UserError(f"there is no command /{name}: {hint}")
        new: Any
        if name == "stop" and value:
            new = [] if value == "none" else [spelt_out(value)]
        elif value:
            new = getattr(parse(SamplingSettings, None, [f"--{name}={value.strip()}"]), name)
        else:
            new = getattr(self.sampling, name)
        self.sampling = replace(self.sampling, **{name: new})
        say_faintly(f"{name} {_spelt(new)}")

    def help(self) -> None:
        """The commands and the settings, in the width of the terminal."""
        width = min(100, shutil.get_terminal_size().columns)
        rows = {c: help for c, help in COMMANDS.items() if c != "/forget" or self.writers[0].chats}
        for item in fields(SamplingSettings):
            rows[f"/{item.name} {_spelt(getattr(self.sampling, item.name))}"] = item.metadata["help"]
        print(textwrap.fill(r"What is typed is written on; \n in it is a new line.", width))
        for command, words in rows.items():
            print(textwrap.fill(words, width, initial_indent=f"  {command:<22} ", subsequent_indent=" " * 25))


def _spelt(value: object) -> str:
    """A value of a setting as a user would type it."""
    if isinstance(value, list):
        return (
            " ".join(
                word.encode("unicode_escape").decode() if not word.isprintable() else word for word in value
            )
            or "none"
        )
    return "none" if value is None else str(value)
