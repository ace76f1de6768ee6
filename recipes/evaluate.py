"""Compare models on the whole validation split of a corpus, in units that do not depend on the tokenizer.

    python recipes/evaluate.py --model runs/tiny_shakespeare-char runs/tiny_shakespeare-bpe
    python recipes/evaluate.py --model runs/tiny_shakespeare-bpe openai-community/gpt2 --stride 32 --samples 8
    python recipes/evaluate.py --model runs/my_adapter --corpus my_text.txt --output_dir runs/comparison
    accelerate launch --multi_gpu recipes/evaluate.py --model runs/gpt2 --corpus my_text.txt

A model is a run folder, any causal language model's folder, a peft adapter or a Hub id, each with its own
tokenizer. --output_dir gets the table (results.md), the same and more as results.json, and surprise.png: a page
that colours each character by what it costs the models.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from nanogpt_hf.analysis.comparison import (
    choose_passage,
    context_of,
    draw_surprise,
    measure,
    measure_samples,
    sample_texts,
    short_names,
    surprise,
    table,
)
from nanogpt_hf.common.cli import parse, run_recipe
from nanogpt_hf.common.errors import UserError
from nanogpt_hf.common.files import files_written_whole
from nanogpt_hf.common.paths import check_model_name
from nanogpt_hf.common.settings import setting
from nanogpt_hf.data.corpora import load_corpus
from nanogpt_hf.model.loading import load_model_and_tokenizer
from nanogpt_hf.training.hardware import device_type, settle, use_all_cores
from nanogpt_hf.training.reporting import library_versions, say

# A script's folder comes first on the path, so that the library evaluate would be looked for in this very file.
sys.path = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]


@dataclass
class EvaluationSettings:
    model: list[str] = setting([], "folders or Hub ids, one or more")
    corpus: str = setting(
        "tiny_shakespeare", "tiny_shakespeare, tiny_pushkin, a file, folder or glob, or a Hub dataset"
    )
    text_column: str = setting("text", "column of a .jsonl, .parquet or Hub dataset that holds the text")
    validation_split_percentage: int = setting(
        10, "percent of the text, at its end, that the models have not seen"
    )
    n_positions: int | None = setting(None, "context in tokens; default: each model's own, up to 2,048")
    stride: int | None = setting(None, "tokens from one window to the next; default: the context, no overlap")
    per_device_eval_batch_size: int | None = setting(None, "windows at once; does not change the result")
    samples: int = setting(
        0, "texts to sample from each model, to see what is copied and how varied they are"
    )
    sample_length: int = setting(1000, "characters of each sample")
    temperature: float = setting(0.8, "of the samples")
    seed: int = setting(1337, "of the samples")
    passage_start: int = setting(0, "characters into the validation text where the page of surprise begins")
    passage_length: int = setting(900, "characters of that page")
    output_dir: str | None = setting(None, "folder for results.md, results.json and surprise.png")
    use_cpu: bool = setting(False, "do not use a GPU")

    def __post_init__(self):
        if not self.model:
            raise UserError("--model is missing: give one or more folders or Hub ids.")
        for name in (
            "n_positions",
            "stride",
            "per_device_eval_batch_size",
            "sample_length",
            "passage_length",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}, it must be at least 1.")
        for name in ("samples", "temperature", "passage_start"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name} is {getattr(self, name)}, it must not be negative.")


def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(EvaluationSettings, __doc__, argv)
    for name in settings.model:
        check_model_name(name)
    use_all_cores()
    accelerator = Accelerator(cpu=device_type(settings.use_cpu) == "cpu")
    with accelerator.main_process_first():
        corpus = load_corpus(settings.corpus, settings.validation_split_percentage, settings.text_column)
    say(accelerator, *([f"NOTE: {corpus.notice}"] if corpus.notice else []))
    text, start = choose_passage(corpus.validation, settings.passage_start, settings.passage_length)
    rows, page = [], {}
    for name, given in zip(short_names(settings.model), settings.model, strict=True):
        say(accelerator, f"measuring {name}")
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
            page[name] = surprise(model, tokenizer, text, start, context_of(model, settings.n_positions))
    if accelerator.is_main_process:
        split = {
            "corpus": Path(corpus.name).name,  # without folders of this machine
            "source": corpus.source,
            "sha256": corpus.sha256,
            "validation_characters": sum(map(len, corpus.validation)),
            "validation_bytes": sum(len(document.encode()) for document in corpus.validation),
        }
        title = f"{split['corpus']}, validation split of {split['validation_characters']:,} characters"
        print(f"\n{title}\n\n{table(rows)}", end="")
        if settings.output_dir:
            write(settings.output_dir, title, rows, split, text[start:], start, page)
    accelerator.end_training()


def write(
    folder: str, title: str, rows: list[dict], split: dict, passage: str, start: int, page: dict
) -> None:
    """The table, all numbers and the page of surprise into a folder."""
    results = split | {"models": rows, "versions": library_versions()}
    place = f"Surprise in {split['corpus']}, validation text from character {start:,}"
    try:
        with files_written_whole(Path(folder)) as staging:
            (staging / "results.md").write_text(f"{title}\n\n{table(rows)}", encoding="utf-8")
            (staging / "results.json").write_text(as_json(results), encoding="utf-8")
            draw_surprise(staging / "surprise.png", place, passage, page)
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written ({error.strerror}).") from error
    print(f"\nwritten to {folder}: results.md, results.json, surprise.png")


def as_json(results: dict) -> str:
    """In JSON, which has no number for what is infinite or undefined: null."""
    finite = json.loads(json.dumps(results), parse_constant=lambda name: None)
    return json.dumps(finite, ensure_ascii=False, indent=1) + "\n"


if __name__ == "__main__":
    run_recipe(main)
