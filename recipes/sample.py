"""Write text with a model: a run folder, any causal language model's folder, or a Hub id.

    python recipes/sample.py runs/tiny_shakespeare-char                       # in a terminal: a prompt that stays
    python recipes/sample.py runs/tiny_shakespeare-char --prompt "ROMEO:" --max_new_tokens 2000
    python recipes/sample.py runs/tiny_shakespeare-char --compare runs/tiny_shakespeare-bpe --seed 1
    python recipes/sample.py runs/mine --prompt "Once" --num_return_sequences 3 --stop "\\n\\n"
    python recipes/sample.py runs/mine --prompts prompts.jsonl --output_file texts.jsonl

Texts may be longer than the model's context: its window slides. In --prompt and --stop, \\n is a new line.
"""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from nanogpt_hf.common.cli import Values, parse
from nanogpt_hf.common.errors import UserError
from nanogpt_hf.common.fields import setting
from nanogpt_hf.common.paths import check_model_name
from nanogpt_hf.common.running import run_recipe, tell
from nanogpt_hf.common.text import counted, spelt_out
from nanogpt_hf.generation.prompt_files import read_prompt, read_prompts, write_texts
from nanogpt_hf.generation.sampling_settings import SamplingSettings


@dataclass(frozen=True)
class SampleSettings(SamplingSettings):
    """Texts"""

    model: str | None = setting(None, "folder or Hub id", essential=True)
    compare: str | None = setting(
        None, "a second model, whose texts stand beside the first one's", essential=True
    )
    prompt: str | None = setting(
        None, "text to go on with; without any, a terminal asks for it", essential=True
    )
    prompt_file: str | None = setting(None, "file that holds the prompt, or - for what is piped in")
    prompts: str | None = setting(None, 'file of prompts, one a line: {"prompt": "…"}')
    num_return_sequences: int = setting(1, "texts for each prompt, written at once", ge=1)
    output_file: str | None = setting(
        None, "new file for the texts; .jsonl: one a line, with its seed and settings", essential=True
    )
    chat: bool | None = setting(
        None, "take prompts as messages; default: where the model has a chat template"
    )
    use_cpu: bool = setting(False, "leave a GPU alone")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is None:
            raise UserError("there is no model: give a run folder or a Hub id.")
        given = [name for name in ("prompt", "prompt_file", "prompts") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UserError(f"--{given[0]} and --{given[1]} exclude each other: give one of them.")
        if self.prompt == "":
            raise UserError("the prompt is empty: give at least one character (a newline will do).")
        if self.output_file and os.path.lexists(self.output_file):
            raise UserError(f"--output_file {self.output_file} is there already: give another name.")


def check(said: Values) -> None:
    """Raises UserError where a model that the user has named cannot be one."""
    for name in ("model", "compare"):
        if said.get(name):
            check_model_name(said[name])


def prompts_of(settings: SampleSettings) -> list[str] | None:
    """The prompts that the settings name; None where a user at a terminal is to be asked for them."""
    if settings.prompt is not None:
        return [spelt_out(settings.prompt)]
    if settings.prompt_file:
        return [read_prompt(settings.prompt_file)]
    if settings.prompts:
        return read_prompts(settings.prompts)
    in_terminal = sys.stdin.isatty() and sys.stdout.isatty() and not settings.output_file
    return None if in_terminal else ["\n"]


def main() -> None:
    settings = parse(SampleSettings, __doc__, check=check, positional="model")
    settings = replace(settings, stop=[*map(spelt_out, settings.stop)])
    prompts = prompts_of(settings)
    from nanogpt_hf.generation.showing import show  # with torch, which takes seconds
    from nanogpt_hf.generation.terminal import Terminal
    from nanogpt_hf.generation.writer import Writer
    from nanogpt_hf.training.hardware import device_for_writing

    names = [name for name in (settings.model, settings.compare) if name]
    writers = [Writer.load(name, *device_for_writing(settings.use_cpu), settings.chat) for name in names]
    count = settings.num_return_sequences
    if prompts is None:
        Terminal(writers, settings).run()
    elif settings.output_file:
        number = write_texts(Path(settings.output_file), writers, prompts, settings, count)
        tell(f"written to {settings.output_file}: {counted(number, 'text')}")
    else:
        for words in prompts:
            asked = [writer.prompt(words) for writer in writers]
            for _ in show(writers, asked, settings.seeded(), count):
                pass


if __name__ == "__main__":
    run_recipe(main)
