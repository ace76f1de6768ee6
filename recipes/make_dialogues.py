"""Make a task for the second stage of a corpus: first lines and stanzas, cues and speeches, or pairs of verse.

    python recipes/make_dialogues.py                                            # first line of a stanza -> its others
    python recipes/make_dialogues.py --kind speeches --corpus tiny_shakespeare  # a cue -> the speech that answers it
    python recipes/make_dialogues.py --kind verse_pairs --model runs/tiny_pushkin-char --use_cpu --samples 64

stanzas gives prompt and completion, speeches gives messages, for finetune_sft.py; verse_pairs lets a model write and
the scanner choose (prompt, chosen, rejected), for tune_preferences.py.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from nanogpt_hf.common.cli import parse
from nanogpt_hf.common.errors import UserError
from nanogpt_hf.common.fields import Settings, setting
from nanogpt_hf.common.files import files_written_whole
from nanogpt_hf.common.paths import check_model_name
from nanogpt_hf.common.running import run_recipe, tell
from nanogpt_hf.data.sources import check_corpus
from nanogpt_hf.verse.scansion import FORMS


@dataclass(frozen=True)
class DialogueSettings(Settings):
    kind: Literal["stanzas", "speeches", "verse_pairs"] = setting("stanzas", "what a row is")
    corpus: str = setting("tiny_pushkin", "tiny_pushkin, tiny_shakespeare, or a text of one's own")
    output_file: str | None = setting(None, "default: dialogues.jsonl, or preferences.jsonl for pairs")
    form: Literal["onegin", "sonnet"] = setting("onegin", "of stanzas: how many lines, and which rhyme")
    model: str | None = setting(None, "for pairs: what writes them")
    samples: int = setting(16, "for pairs: texts that are written for each prompt", ge=2)
    use_cpu: bool = setting(False, "do not use a GPU")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "verse_pairs" and self.model is None:
            raise UserError("--model is missing: give the run folder of the model that writes the pairs.")


def stanzas(documents: Sequence[str], settings: DialogueSettings) -> Iterator[dict]:
    """A stanza's first line and its others."""
    from nanogpt_hf.verse.stanzas import whole_stanzas

    for stanza in whole_stanzas(documents, FORMS[settings.form]):
        first, _, others = stanza.partition("\n")
        yield {"prompt": f"{first}\n", "completion": others}


def speeches(documents: Sequence[str], settings: DialogueSettings) -> Iterator[dict]:
    """A speech and the one that answers it, each without the name of who speaks."""
    for document in documents:
        spoken = re.findall(r"^([A-Z][^\n:]*):\n(.+?)(?=\n\n|\Z)", document, flags=re.MULTILINE | re.DOTALL)
        for (cue_by, cue), (by, speech) in pairwise(spoken):
            if by != cue_by:
                roles = zip(("user", "assistant"), (cue, speech), strict=True)
                yield {"messages": [{"role": role, "content": text} for role, text in roles]}


def verse_pairs(documents: Sequence[str], settings: DialogueSettings) -> Iterator[dict]:
    """For each first line the best and the worst of some stanzas that a model writes, by metre and rhyme."""
    from nanogpt_hf.model.loading import load_model_and_tokenizer
    from nanogpt_hf.runs.tuning import write_pairs
    from nanogpt_hf.training.hardware import device_type

    model, tokenizer = load_model_and_tokenizer(settings.model)
    model.to(device_type(settings.use_cpu))
    yield from write_pairs(model, tokenizer, documents, FORMS[settings.form], settings.samples)


def main() -> None:
    settings = parse(DialogueSettings, __doc__)
    kinds = {"stanzas": stanzas, "speeches": speeches, "verse_pairs": verse_pairs}
    default = "preferences.jsonl" if settings.kind == "verse_pairs" else "dialogues.jsonl"
    file = Path(settings.output_file or default)
    if file.exists():
        raise UserError(f"--output_file {file} is there already: give another name, or remove it.")
    check_corpus(settings.corpus)
    if settings.model:
        check_model_name(settings.model)
    from nanogpt_hf.data.corpora import load_corpus  # with torch, which takes seconds

    rows = [*kinds[settings.kind](load_corpus(settings.corpus).train, settings)]
    if not rows:
        raise UserError(
            f"{settings.corpus} holds no {settings.kind} that could be found: give another --kind."
        )
    with files_written_whole(file.parent) as staging:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (staging / file.name).write_text(text, encoding="utf-8")
    tell(f"{len(rows):,} rows in {file}")


if __name__ == "__main__":
    run_recipe(main)
