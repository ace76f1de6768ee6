"""Models measured one after another: their tables, all numbers, and the page of surprisal."""

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..common.comparison_settings import ComparisonSettings
from ..common.errors import UserError
from ..common.files import files_written_whole
from ..common.running import tell
from ..common.tables import table
from ..common.text import printable
from ..data.corpora import AnyCorpus, load_corpus
from ..data.named_corpora import NAMES
from ..data.shards import is_shards
from ..generation.stanza_writer import StanzaWriter
from ..model.loading import load_model_and_tokenizer
from ..training.hardware import device_type, settle, use_all_cores
from ..training.reporting import library_versions, say
from ..verse.scansion import FORMS, Form
from ..verse.stanzas import FirstLines, first_lines, whole_stanzas
from .comparison import (
    COLUMNS,
    SAMPLE_COLUMNS,
    choose_passage,
    context_of,
    measure,
    measure_samples,
    percentage_held_out,
    sample_texts,
    short_names,
)
from .surprisal import ALTERNATIVES, surprisal, surprisal_page
from .verse_page import verse_page
from .verse_table import VERSE_COLUMNS, measure_written

STANZAS = 100  # that each model writes, unless it is said how many
SHOWN = 12  # of them on the page


def measure_models(settings: ComparisonSettings) -> None:
    """Print the table of models, and write it with the page; every process calls it."""
    use_all_cores()
    accelerator = Accelerator(cpu=device_type(settings.use_cpu) == "cpu")
    with accelerator.main_process_first():
        usual = 10 if settings.corpus in NAMES or is_shards(settings.corpus) else 100
        percent = settings.validation_split_percentage or usual
        corpus = load_corpus(settings.corpus, percent, **settings.reading_options())
    say(accelerator, *([f"NOTE: {corpus.notice}"] if corpus.notice else []), *corpus.reading)
    text, start = choose_passage(corpus.validation, settings.passage_start, settings.passage_length)
    form = FORMS[settings.verse] if settings.verse else None
    documents = corpus.train or corpus.validation
    poems = first_lines(documents, corpus.name, form) if form else None
    rows, panels = [], {}
    for name, given in zip(short_names(settings.model), settings.model, strict=True):
        say(accelerator, f"measuring {name}", *known_text(name, given, corpus))
        model, tokenizer = load_model_and_tokenizer(given)
        model.to(accelerator.device)
        row: dict[str, Any] = {"model": name} | measure(
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
        if accelerator.is_main_process and (settings.samples or poems):
            row |= measure_written_texts(name, model, tokenizer, corpus, settings, form, poems)
        if accelerator.is_main_process and settings.output_dir:
            context = context_of(model, settings.n_positions)
            panels[name] = surprisal(model, tokenizer, text, start, context, ALTERNATIVES)
    if accelerator.is_main_process:
        split = {
            "corpus": Path(corpus.name).name,  # without folders of this machine
            "source": corpus.source,
            "sha256": corpus.sha256,
            "part": "validation split" if corpus.characters("train") else "whole text",
            "validation_characters": sum(map(len, corpus.validation)),
            "validation_bytes": sum(len(document.encode()) for document in corpus.validation),
        }
        if form:
            real = whole_stanzas(documents, form)
            rows.append(measure_written("real stanzas", real, form) | {"samples": real})
        words = in_words(split, rows)
        tell("", words.rstrip("\n"))
        if settings.output_dir:
            title = f"Surprisal in {split['corpus']}, {split['part']}, from character {start:,}"
            pages = {"surprisal.html": surprisal_page(title, text[start:], panels)}
            if form:
                shown = {row["model"]: row["samples"][:SHOWN] for row in rows}
                pages["verse.html"] = verse_page(f"Stanzas on first lines of {split['corpus']}", shown, form)
            write(settings.output_dir, words, rows, split, pages)
    accelerator.end_training()


def measure_written_texts(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    corpus: AnyCorpus,
    settings: ComparisonSettings,
    form: Form | None,
    poems: FirstLines | None,
) -> dict[str, Any]:
    """Cells of a model's row for texts that it writes: stanzas where first lines are given, else samples."""
    if form is None or poems is None:
        sampling = {"temperature": settings.temperature, "seed": settings.seed}
        texts = sample_texts(model, tokenizer, settings.samples, settings.sample_length, **sampling)
        return measure_samples(texts, corpus) | {"samples": texts}
    write = StanzaWriter.like(poems.stanzas, tokenizer, len(form.scheme.stanza), settings.temperature)
    texts = write.write_on(model, poems.held_out, settings.samples or STANZAS, settings.seed)
    return measure_written(name, texts, form, corpus.train) | {"samples": texts}


def known_text(name: str, model: str, corpus: AnyCorpus) -> list[str]:
    """What to say of a model that was trained on some of the text that it is measured on."""
    held_out = percentage_held_out(model, corpus)
    if held_out is None or corpus.characters("train"):  # then what is measured was held out
        return []
    return [
        f"NOTE: {name} was trained on this text; --validation_split_percentage {held_out} measures only what it has not "
        "seen."
    ]


def in_words(split: dict, rows: list[dict]) -> str:
    """The tables: of losses, and of verse or samples where there are any."""
    title = f"{split['corpus']}, {split['part']} of {split['validation_characters']:,} characters"
    tables = [table([row for row in rows if "loss" in row], COLUMNS)]
    if any("metre" in row for row in rows):
        tables.append(table(rows, VERSE_COLUMNS))
    elif any("samples" in row for row in rows):
        tables.append(table(rows, SAMPLE_COLUMNS))
    return "\n".join([f"{printable(title)}\n", *tables])


def write(folder: str, words: str, rows: list[dict], split: dict, pages: dict[str, str]) -> None:
    """The tables, all numbers and the pages (file name -> HTML) into a folder."""
    results = split | {"models": rows, "versions": library_versions()}
    try:
        with files_written_whole(Path(folder)) as staging:
            (staging / "results.md").write_text(words, encoding="utf-8")
            (staging / "results.json").write_text(as_json(results), encoding="utf-8")
            for name, page in pages.items():
                (staging / name).write_text(page, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written ({error.strerror}).") from error
    tell("", f"written to {folder}: {', '.join(['results.md', 'results.json', *pages])}")


def as_json(results: dict) -> str:
    """In JSON, which has no number for what is infinite or undefined: null."""
    finite = json.loads(json.dumps(results), parse_constant=lambda name: None)
    return json.dumps(finite, ensure_ascii=False, indent=1) + "\n"
