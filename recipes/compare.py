"""Compare models on the whole validation split of a corpus, in units that do not depend on the tokenizer; or all runs.

    python recipes/compare.py runs/*                                          # what the runs have recorded
    python recipes/compare.py --model runs/tiny_shakespeare-char runs/tiny_shakespeare-bpe
    python recipes/compare.py --model runs/tiny_shakespeare-bpe openai-community/gpt2 --stride 32 --samples 8
    python recipes/compare.py --model runs/my_adapter --corpus my_text.txt --output_dir runs/comparison
    accelerate launch --multi_gpu recipes/compare.py --model runs/gpt2 --corpus my_text.txt

Run folders alone give a table of them, sorted by validation loss, with the settings in which they differ. A --model is
a run folder, any causal language model's folder, a peft adapter or a Hub id, each with its own tokenizer, and is measured
anew. --output_dir gets the table (results.md), the same and more as results.json, and surprisal.html: a page that
colours each character by what it costs the models.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nanogpt_hf.common.cli import parse, run_recipe, tell
from nanogpt_hf.common.errors import UserError
from nanogpt_hf.common.files import files_written_whole, written_if_possible
from nanogpt_hf.common.paths import check_model_name, check_unused
from nanogpt_hf.common.settings import TextSettings, changed, exclude, setting
from nanogpt_hf.common.tables import table
from nanogpt_hf.common.text import printable
from nanogpt_hf.data.sources import check_corpora

if TYPE_CHECKING:
    from nanogpt_hf.data.corpora import AnyCorpus

FILES = ("results.md", "results.json", "surprisal.html")


@dataclass(frozen=True)
class ComparisonSettings(TextSettings):
    """Settings"""

    validation_split_percentage: int | None = changed(
        TextSettings,
        "validation_split_percentage",
        None,
        help="percent of the text, at the end of each file, that is measured; default: all of it, or the validation "
        "split of a named corpus and of what has one of its own",
        bounds={"ge": 1, "le": 100},
    )
    runs: list[str] = setting([], "run folders to list, as runs/*", essential=True)
    model: list[str] = setting([], "folders or Hub ids to measure", essential=True)
    output_dir: str | None = setting(
        None, "folder for results.md, results.json and surprisal.html", essential=True
    )
    n_positions: int | None = setting(None, "context in tokens; default: each model's own, up to 2,048", ge=1)
    stride: int | None = setting(
        None, "tokens from one window to the next; default: the context, no overlap", ge=1
    )
    per_device_eval_batch_size: int | None = setting(
        None, "windows at once; does not change the result", ge=1
    )
    samples: int = setting(
        0, "texts to sample from each model, to see what is copied and how varied they are", ge=0
    )
    sample_length: int = setting(1000, "characters of each sample", ge=1)
    temperature: float = setting(0.8, "of the samples", ge=0)
    seed: int = setting(1337, "of the samples", ge=0, lt=2**32)
    passage_start: int = setting(
        0, "characters into the validation text where the page of surprisal begins", ge=0
    )
    passage_length: int = setting(900, "characters of that page", ge=1)
    overwrite_output_dir: bool = setting(False, "replace these files in the folder")
    use_cpu: bool = setting(False, "do not use a GPU")

    def __post_init__(self) -> None:
        super().__post_init__()
        exclude(self, "runs", "model")
        exclude(self, "runs", "output_dir")
        if not self.model and not self.runs:
            raise UserError("there is nothing to compare: give run folders, or models with --model.")


def list_runs(names: Sequence[str]) -> None:
    """Print the table of run folders; what is no run is said and left out.

    Raises:
        UserError: none is a run.
    """
    from nanogpt_hf.analysis.comparison import short_names
    from nanogpt_hf.analysis.run_table import read_run, run_table

    rows = []
    folders = [name for name in names if Path(name).is_dir()]
    for name, folder in zip(short_names(folders), folders, strict=True) if folders else ():
        try:
            rows.append(read_run(Path(folder), name))
        except UserError as error:
            tell(f"left out: {error}")
    if not rows:
        raise UserError(f"none of {', '.join(names)} is the folder of a run: give run folders, as runs/*.")
    tell(run_table(rows).rstrip("\n"))


def measure_models(settings: ComparisonSettings) -> None:
    """Print the table of models, and write it with the page; every process calls it."""
    from accelerate import Accelerator

    from nanogpt_hf.analysis.comparison import (
        choose_passage,
        context_of,
        measure,
        measure_samples,
        sample_texts,
        short_names,
    )
    from nanogpt_hf.analysis.surprisal import ALTERNATIVES, surprisal
    from nanogpt_hf.data.corpora import load_corpus
    from nanogpt_hf.data.named_corpora import NAMES
    from nanogpt_hf.data.shards import is_shards
    from nanogpt_hf.model.loading import load_model_and_tokenizer
    from nanogpt_hf.training.hardware import device_type, settle, use_all_cores
    from nanogpt_hf.training.reporting import say

    use_all_cores()
    accelerator = Accelerator(cpu=device_type(settings.use_cpu) == "cpu")
    with accelerator.main_process_first():
        usual = 10 if settings.corpus in NAMES or is_shards(settings.corpus) else 100
        percent = settings.validation_split_percentage or usual
        corpus = load_corpus(settings.corpus, percent, **settings.reading_options())
    say(accelerator, *([f"NOTE: {corpus.notice}"] if corpus.notice else []), *corpus.reading)
    text, start = choose_passage(corpus.validation, settings.passage_start, settings.passage_length)
    rows, panels = [], {}
    for name, given in zip(short_names(settings.model), settings.model, strict=True):
        say(accelerator, f"measuring {name}", *known_text(name, given, corpus))
        model, tokenizer = load_model_and_tokenizer(given)
        model.to(accelerator.device)
        row = {"model": name} | measure(
            model,
            tokenizer,
            corpus,
            accelerator,
            n_positions=settings.n_positions,
            stride=settings.stride,
            batch_size=settings.per_device_eval_batch_size,
        )
        settle(accelerator)
        rows.append(row)
        if accelerator.is_main_process and settings.samples:
            sampling = {"temperature": settings.temperature, "seed": settings.seed}
            texts = sample_texts(model, tokenizer, settings.samples, settings.sample_length, **sampling)
            row |= measure_samples(texts, corpus) | {"samples": texts}
        if accelerator.is_main_process and settings.output_dir:
            context = context_of(model, settings.n_positions)
            panels[name] = surprisal(model, tokenizer, text, start, context, ALTERNATIVES)
    if accelerator.is_main_process:
        split = {
            "corpus": Path(corpus.name).name,  # without folders of this machine
            "source": corpus.source,
            "sha256": corpus.sha256,
            "validation_characters": sum(map(len, corpus.validation)),
            "validation_bytes": sum(len(document.encode()) for document in corpus.validation),
        }
        words = in_words(split, rows)
        tell("", words.rstrip("\n"))
        if settings.output_dir:
            write(settings.output_dir, words, rows, split, text[start:], start, panels)
    accelerator.end_training()


def known_text(name: str, model: str, corpus: "AnyCorpus") -> list[str]:
    """What to say of a model that was trained on some of the text that it is measured on."""
    from nanogpt_hf.analysis.comparison import percentage_held_out

    held_out = percentage_held_out(model, corpus)
    if held_out is None or corpus.characters("train"):  # then what is measured was held out
        return []
    return [
        f"NOTE: {name} was trained on this text; --validation_split_percentage {held_out} measures only what it has not "
        "seen."
    ]


def in_words(split: dict, rows: list[dict]) -> str:
    """The tables: of losses, and of samples where there are any."""
    from nanogpt_hf.analysis.comparison import COLUMNS, SAMPLE_COLUMNS

    title = f"{split['corpus']}, validation split of {split['validation_characters']:,} characters"
    samples = f"\n{table(rows, SAMPLE_COLUMNS)}" if any("samples" in row for row in rows) else ""
    return f"{printable(title)}\n\n{table(rows, COLUMNS)}{samples}"


def write(
    folder: str, words: str, rows: list[dict], split: dict, passage: str, start: int, panels: dict
) -> None:
    """The tables, all numbers and the page of surprisal into a folder."""
    from nanogpt_hf.analysis.surprisal import surprisal_page
    from nanogpt_hf.training.reporting import library_versions

    results = split | {"models": rows, "versions": library_versions()}
    title = f"Surprisal in {split['corpus']}, validation text from character {start:,}"
    try:
        with files_written_whole(Path(folder)) as staging:
            (staging / "results.md").write_text(words, encoding="utf-8")
            (staging / "results.json").write_text(as_json(results), encoding="utf-8")
            written_if_possible(
                staging / "surprisal.html",
                lambda path: path.write_text(surprisal_page(title, passage, panels), encoding="utf-8"),
            )
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written ({error.strerror}).") from error
    tell("", f"written to {folder}: {', '.join(FILES)}")


def as_json(results: dict) -> str:
    """In JSON, which has no number for what is infinite or undefined: null."""
    finite = json.loads(json.dumps(results), parse_constant=lambda name: None)
    return json.dumps(finite, ensure_ascii=False, indent=1) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(ComparisonSettings, __doc__, argv, positional="runs")
    for name in settings.model:
        check_model_name(name)
    check_corpora(settings.corpus, settings.validation_file)
    if settings.output_dir and not settings.overwrite_output_dir:
        check_unused(settings.output_dir, FILES)
    if settings.runs:
        list_runs(settings.runs)
    else:
        measure_models(settings)


if __name__ == "__main__":
    run_recipe(main)
