"""Prompts from files, and the texts that are written on them into one."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..common.files import files_written_whole
from ..common.text import first_line, without_home
from ..data.readers import json_lines
from .sampling_settings import SamplingSettings


def read_prompt(name: str) -> str:
    """The whole of a file, or of standard input where its name is -.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return (sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt_file {name} cannot be read ({first_line(error)}).") from error


def read_prompts(name: str) -> list[str]:
    """The prompts of a .jsonl, each `{"prompt": "…"}` or the text alone.

    Raises:
        UserError: it cannot be read, or a line holds no prompt.
    """
    return [_prompt_of(value, where) for where, value in json_lines(Path(name))]


def _prompt_of(value: Any, where: str) -> str:
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise UserError(f'{where} is not {{"prompt": "…"}}.')
    return prompt


def write_texts(
    path: Path, writers: Sequence, prompts: Sequence[str], sampling: SamplingSettings, count: int = 1
) -> int:
    """Texts on all prompts into a file, which is there once it is whole.

    A .jsonl gets each text with all that is needed to have it again, any other file the texts alone.

    Args:
        writers: `Writer`s; each writes on every prompt.
        count: texts on each prompt, written at once.

    Returns:
        How many texts were written.
    """
    number = 0
    with (
        files_written_whole(path.parent) as staging,
        (staging / path.name).open("w", encoding="utf-8") as file,
    ):
        for number, record in enumerate(_records(writers, prompts, sampling, count), start=1):
            if path.suffix == ".jsonl":
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            else:
                opening = "" if record["chat"] else record["prompt"]
                rule = "---\n" if number > 1 else ""
                file.write(f"{rule}{opening}{record['text']}\n")
    return number


def _records(
    writers: Sequence, prompts: Sequence[str], sampling: SamplingSettings, count: int
) -> Iterator[dict]:
    from tqdm import tqdm

    for words in tqdm(prompts, disable=None if len(prompts) > 1 else True):
        seeded = sampling.seeded()
        for writer in writers:
            for index, text in enumerate(writer.write(writer.prompt(words), seeded, count)):
                yield {
                    "model": without_home(writer.name),
                    "chat": writer.chats,
                    "prompt": words,
                    "text": text,
                    **seeded.options(),
                    "index": index,
                    "num_return_sequences": count,
                }
