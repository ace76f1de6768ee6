"""The second stage from a command line: completions, rewards or preferences, and the way of every run."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..analysis.verse_table import VERSE_COLUMNS, measure_written, whole_stanzas
from ..common.errors import UserError
from ..common.files import files_written_whole
from ..common.tables import table
from ..common.tuning_settings import CompletionSettings, PreferenceSettings, RewardSettings
from ..data.conversations import load_conversations
from ..data.corpora import AnyCorpus
from ..data.token_stream import TokenStream
from ..data.tokenization import encode
from ..model.loading import load_model_and_tokenizer
from ..training.checkpoints import Progress
from ..training.completions import Completions, PackedWindows
from ..training.evaluation import evaluate_split, validation_stream
from ..training.loop import train
from ..training.policy_gradient import GroupRelativePolicy, Writer
from ..training.preferences import Pairs, Preferences
from ..training.reporting import say
from ..training.run_folder import alone_in
from ..training.stepping import global_batch_size
from ..verse.line_rewards import LineRewards, scan_lines, spare_cores
from ..verse.metre import Metre
from ..verse.rhyme import Scheme
from ..verse.scansion import FORMS, Form
from .finetuning import adapt_base, check_that_others_can_load
from .run import describe, finish, make_ready, resolve, start, start_with
from .showing import Showing

HELD_OUT = 10  # every so many-th first line is kept for evaluation
LEAST_PROMPTS = 20


def tune_completions(settings: CompletionSettings) -> Progress:
    """From settings to a finished run folder of a model that answers prompts.

    Raises:
        UserError: for a user's mistake, before anything is written.
    """
    check_that_others_can_load(settings)
    percent = settings.validation_split_percentage
    accelerator, corpus = start_with(settings, lambda: load_conversations(settings.corpus, percent))
    tokenizer, model, base, lines = adapt_base(settings, corpus)
    settings = resolve(settings, accelerator, corpus, tokenizer, model)
    make_ready(settings, model)
    windows = [
        PackedWindows(
            corpus.examples(split, tokenizer),
            settings.n_positions,
            tokenizer.eos_token_id,
            accelerator.device,
            f"the {split} rows of {corpus.name}",
        )
        for split in ("train", "validation")
    ]
    objective = Completions(
        accelerator,
        windows[0],
        windows[1],
        global_batch_size(settings, accelerator),
        settings.seed,
        corpus.characters("validation"),
    )
    lines.append(
        f"packed     {len(corpus.rows['train']):,} rows in {len(windows[0]):,} windows; {windows[0].cut:,} are cut to the "
        f"context, {windows[0].left_out:,} left out, which hold nothing to learn then"
    )
    describe(accelerator, settings, corpus, tokenizer, model, objective, lines)
    show = Showing(accelerator, settings, corpus)
    with alone_in(accelerator, Path(settings.folder())):
        progress = train(accelerator, settings, corpus, tokenizer, model, objective, show, base)
        finish(accelerator, settings, corpus, progress, show)
    return progress


def tune_preferences(settings: PreferenceSettings) -> Progress:
    """From settings to a finished run folder of a model that prefers what was chosen.

    Raises:
        UserError: for a user's mistake, before anything is written.
    """
    check_that_others_can_load(settings)
    percent = settings.validation_split_percentage
    columns = ("prompt", "chosen", "rejected")
    accelerator, corpus = start_with(settings, lambda: load_conversations(settings.corpus, percent, columns))
    tokenizer, model, base, lines = adapt_base(settings, corpus)
    settings = resolve(settings, accelerator, corpus, tokenizer, model)
    make_ready(settings, model)
    model.to(accelerator.device)
    sides = [
        Pairs(
            corpus.pairs(split, tokenizer),
            settings.n_positions,
            tokenizer.eos_token_id,
            accelerator.device,
            f"the {split} rows of {corpus.name}",
        )
        for split in ("train", "validation")
    ]
    for pairs in sides:
        pairs.remember(model, settings.per_device_train_batch_size)
    objective = Preferences(
        accelerator,
        sides[0],
        sides[1],
        global_batch_size(settings, accelerator),
        settings.seed,
        settings.dpo_beta,
        corpus.characters("validation"),
    )
    lines.append(f"pairs      {len(sides[0]):,}, and {len(sides[1]):,} for validation")
    describe(accelerator, settings, corpus, tokenizer, model, objective, lines)
    show = Showing(accelerator, settings, corpus)
    with alone_in(accelerator, Path(settings.folder())):
        progress = train(accelerator, settings, corpus, tokenizer, model, objective, show, base)
        finish(accelerator, settings, corpus, progress, show)
    return progress


def tune_rewards(settings: RewardSettings) -> Progress:
    """From settings to a finished run folder of a model whose texts are worth more.

    Raises:
        UserError: for a user's mistake, before anything is written.
    """
    check_that_others_can_load(settings)
    form = form_of(settings)
    accelerator, corpus = start(settings)
    processes = spare_cores() if settings.reward_processes is None else settings.reward_processes
    rewards = LineRewards(
        first_of(form, settings.lines), settings.weights(), settings.guards, corpus.train, processes
    )
    tokenizer, model, base, lines = adapt_base(settings, corpus)
    settings = resolve(settings, accelerator, corpus, tokenizer, model)
    make_ready(settings, model)
    model.to(accelerator.device)
    objective = rewards_objective(accelerator, settings, corpus, tokenizer, model, form, rewards)
    found = sum(map(len, objective.prompts))
    lines.append(
        f"prompts    first lines of {found} stanzas, each continued {settings.num_generations} times"
    )
    describe(accelerator, settings, corpus, tokenizer, model, objective, lines)
    show = Showing(accelerator, settings, corpus)
    with alone_in(accelerator, Path(settings.folder())):
        progress = train(accelerator, settings, corpus, tokenizer, model, objective, show, base)
        if settings.table_texts and accelerator.is_main_process:
            compare_verse(accelerator, settings, corpus, objective, form)
        finish(accelerator, settings, corpus, progress, show)
    return progress


def form_of(settings: RewardSettings) -> Form:
    """The form that the settings name, with what they change of it.

    Raises:
        UserError: there is no such metre or scheme.
    """
    form = FORMS[settings.form]
    changes = settings.given("foot", "feet")
    metre = Metre(**changes) if "foot" in changes else replace(form.metre, **changes)
    return replace(form, metre=metre, scheme=Scheme(settings.scheme) if settings.scheme else form.scheme)


def first_of(form: Form, lines: int | None) -> Form:
    """A form of the first lines of another one."""
    return replace(form, scheme=Scheme(form.scheme.stanza[:lines])) if lines else form


def first_lines(corpus: AnyCorpus, form: Form) -> tuple[list[str], list[str], list[str]]:
    """First lines of the corpus's stanzas in the form, to tune on and to evaluate on, and the stanzas.

    Raises:
        UserError: there are too few.
    """
    stanzas = whole_stanzas(corpus.train, form)
    scanned = scan_lines(stanzas, form)
    stanzas = [stanza for stanza, lines in zip(stanzas, scanned, strict=True) if np.mean(lines.rhyme) >= 0.5]
    if len(stanzas) < LEAST_PROMPTS:
        raise UserError(
            f"{corpus.name} holds {len(stanzas)} stanzas of {form.scheme.letters}, and their first lines are the "
            f"prompts: give a corpus with {LEAST_PROMPTS} or more, or another --form or --scheme."
        )
    lines = [stanza.partition("\n")[0].strip() for stanza in stanzas]
    held_out = lines[HELD_OUT - 1 :: HELD_OUT]
    return [line for line in lines if line not in held_out], held_out, stanzas


def rewards_objective(
    accelerator: Accelerator,
    settings: RewardSettings,
    corpus: AnyCorpus,
    tokenizer: PreTrainedTokenizerFast,
    model: PreTrainedModel,
    form: Form,
    rewards: LineRewards,
) -> GroupRelativePolicy:
    """The objective of a run on rewards.

    Raises:
        UserError: the corpus has too few stanzas of the form, or its text is too short.
    """
    prompts, held_out, stanzas = first_lines(corpus, form)
    write = writer_of(tokenizer, stanzas, len(rewards.form.scheme.stanza), settings.temperature)
    T = settings.n_positions
    return GroupRelativePolicy(
        accelerator,
        model,
        write,
        rewards,
        prompts,
        held_out,
        TokenStream(corpus.ids("train", tokenizer), T, accelerator.device, corpus.name),
        validation_stream(tokenizer, corpus, T, accelerator.device),
        corpus.characters("validation"),
        batch_size=global_batch_size(settings, accelerator),
        group=settings.num_generations,
        beta=settings.beta,
        text_coef=settings.text_coef,
        seed=settings.seed,
        eval_texts=settings.eval_texts,
        micro_batch=settings.per_device_train_batch_size,
    )


def writer_of(
    tokenizer: PreTrainedTokenizerFast, stanzas: Sequence[str], lines: int, temperature: float
) -> Writer:
    """A writer of texts of so many lines, and as long as in these stanzas.

    Few stanzas are much longer than the others, and the longest one would decide how much is computed for each.
    """
    rests = ["\n".join(stanza.split("\n")[1:lines]) for stanza in stanzas]
    longest = int(np.quantile([len(encode(tokenizer, rest)) for rest in rests], 0.98))
    return Writer(tokenizer, lines, longest + 8, temperature)


def write_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[str],
    form: Form,
    samples: int,
    seed: int = 1337,
) -> Iterator[dict[str, str]]:
    """Preferences of the scanner: for each first line the best and the worst text of a model, by metre and rhyme."""
    real = whole_stanzas(documents, form)
    write = writer_of(tokenizer, real, len(form.scheme.stanza), 0.8)
    for prompts in write.by_length([stanza.partition("\n")[0] for stanza in real]):
        texts = write(model, np.repeat(prompts, samples, axis=0), seed).texts
        worth = [
            float((lines.metre + lines.rhyme)[1:].sum()) / len(form.scheme.stanza)
            for lines in scan_lines(texts, form)
        ]
        for group in range(0, len(texts), samples):
            ranked = sorted(range(group, group + samples), key=worth.__getitem__)
            first, _, best = texts[ranked[-1]].partition("\n")
            worst = texts[ranked[0]].partition("\n")[2]
            if best and worst and worth[ranked[-1]] > worth[ranked[0]]:
                yield {"prompt": f"\n\n{first}\n", "chosen": best, "rejected": worst}


def compare_verse(
    accelerator: Accelerator,
    settings: RewardSettings,
    corpus: AnyCorpus,
    objective: GroupRelativePolicy,
    form: Form,
) -> None:
    """The table before and after, over texts that begin with lines not tuned on, beside real stanzas."""
    folder = Path(settings.folder())
    after = load_model_and_tokenizer(str(folder))[0].to(accelerator.device)
    real = whole_stanzas(corpus.train, form)
    write = writer_of(objective.write.tokenizer, real, len(form.scheme.stanza), settings.temperature)
    options = {"write": write, "texts": settings.table_texts, "seed": settings.seed + 1}
    texts = {
        "before": objective.write_held_out(objective.start, **options),
        "after": objective.write_held_out(after, **options),
    }
    rows = []
    size = sum(len(document.encode()) for document in corpus.validation)
    for name, model in {"before": objective.start, "after": after}.items():
        row = measure_written(name, texts[name], form, corpus.train)
        split = evaluate_split(model, objective.validation, size, 64, accelerator)
        rows.append(row | {"bits_per_byte": split.bits_per_char})
    rows.append(measure_written("real stanzas", real, form))
    text = table(rows, VERSE_COLUMNS)
    with files_written_whole(folder) as staging:
        (staging / "verse.md").write_text(text, encoding="utf-8")
        content = json.dumps({"rows": rows, "texts": texts}, ensure_ascii=False, indent=1)
        (staging / "verse.json").write_text(content, encoding="utf-8")
    say(accelerator, "", *text.splitlines(), "", *(f"{text}\n" for text in texts["after"][:2]))
