"""The second stage from a command line: completions, rewards or preferences, and the way of every run."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..analysis.verse_table import VERSE_COLUMNS, measure_written
from ..common.files import files_written_whole
from ..common.tables import table
from ..common.tuning_settings import CompletionSettings, PreferenceSettings, RewardSettings
from ..data.conversations import load_conversations
from ..data.corpora import AnyCorpus
from ..data.token_stream import TokenStream
from ..generation.stanza_writer import StanzaWriter
from ..model.loading import load_model_and_tokenizer
from ..training.checkpoints import Progress
from ..training.completions import Completions, PackedWindows
from ..training.evaluation import evaluate_split, validation_stream
from ..training.loop import train
from ..training.policy_gradient import DRILL_EVERY, GroupRelativePolicy
from ..training.preferences import Pairs, Preferences
from ..training.reporting import say
from ..training.run_folder import alone_in
from ..training.stepping import global_batch_size
from ..verse.drills import Drills
from ..verse.metre import Metre
from ..verse.rewards import Rewards, scan_lines, spare_cores
from ..verse.rhyme import Scheme
from ..verse.scansion import FORMS, Form
from ..verse.stanzas import FirstLines, first_lines, prompt_of, whole_stanzas
from .finetuning import adapt_base, check_that_others_can_load
from .run import describe, finish, make_ready, part_of, resolve, start, start_with
from .showing import Showing


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
    nothing = windows[0].left_out
    left_out = f", {nothing:,} left out, which hold nothing to learn then" if nothing else ""
    lines.append(
        f"packed     {len(corpus.rows['train']):,} rows in {len(windows[0]):,} windows; {windows[0].cut:,} are cut to the context"
        + left_out
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
    rewards = Rewards(
        first_of(form, settings.lines), settings.weights(), settings.guards, corpus.train, processes
    )
    tokenizer, model, base, lines = adapt_base(settings, corpus)
    settings = resolve(settings, accelerator, corpus, tokenizer, model)
    settings = replace(settings, drill_steps=part_of(settings.max_steps or 0, settings.drill_steps))
    make_ready(settings, model)
    model.to(accelerator.device)
    first = first_lines(corpus.train, corpus.name, form)
    objective = rewards_objective(accelerator, settings, corpus, tokenizer, model, first, rewards)
    found = sum(map(len, objective.prompts))
    lines.append(
        f"prompts    first lines of {found} stanzas, each continued {settings.num_generations} times"
    )
    if settings.drill_steps:
        lines.append(f"drills     the first {settings.drill_steps:,} steps, then one step in {DRILL_EVERY}")
    describe(accelerator, settings, corpus, tokenizer, model, objective, lines)
    show = Showing(accelerator, settings, corpus, prompt=prompt_of(first.held_out[0]))
    with alone_in(accelerator, Path(settings.folder())):
        progress = train(accelerator, settings, corpus, tokenizer, model, objective, show, base)
        if settings.table_texts and accelerator.is_main_process:
            compare_verse(accelerator, settings, corpus, objective, form, first)
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


def rewards_objective(
    accelerator: Accelerator,
    settings: RewardSettings,
    corpus: AnyCorpus,
    tokenizer: PreTrainedTokenizerFast,
    model: PreTrainedModel,
    first: FirstLines,
    rewards: Rewards,
) -> GroupRelativePolicy:
    """The objective of a run on rewards.

    Raises:
        UserError: the corpus's text is too short.
    """
    lines = len(rewards.form.scheme.stanza)
    write = StanzaWriter.like(first.stanzas, tokenizer, lines, settings.temperature)
    context: int = settings.n_positions
    longest = write.by_length([*first.to_learn, *first.held_out])[-1].shape[1] + write.max_new_tokens
    learnt = [stanza for stanza in first.stanzas if stanza.partition("\n")[0].strip() not in first.held_out]
    T = min(context, -(-longest // 64) * 64)  # no window is longer than the texts are
    return GroupRelativePolicy(
        accelerator,
        model,
        write,
        rewards,
        first.to_learn,
        first.held_out,
        TokenStream(corpus.ids("train", tokenizer), T, accelerator.device, corpus.name),
        validation_stream(tokenizer, corpus, context, accelerator.device),
        corpus.characters("validation"),
        Drills(learnt, rewards.form) if settings.drill_steps else None,
        batch_size=global_batch_size(settings, accelerator),
        group=settings.num_generations,
        beta=settings.beta,
        text_coef=settings.text_coef,
        seed=settings.seed,
        eval_texts=settings.eval_texts,
        micro_batch=settings.per_device_train_batch_size,
        drill_steps=int(settings.drill_steps),
    )


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
    write = StanzaWriter.like(real, tokenizer, len(form.scheme.stanza), 0.8)
    for prompts in write.by_length([stanza.partition("\n")[0] for stanza in real]):
        texts = write(model, np.repeat(prompts, samples, axis=0), seed).texts
        worth = [
            float((lines.metre + 2 * lines.rhyme)[1:].sum())
            / len(form.scheme.stanza)  # a rhyme is of two lines
            for lines in scan_lines(texts, form)
        ]
        for group in range(0, len(texts), samples):
            ranked = sorted(range(group, group + samples), key=worth.__getitem__)
            first, _, best = texts[ranked[-1]].partition("\n")
            worst = texts[ranked[0]].partition("\n")[2]
            if best and worst and worth[ranked[-1]] > worth[ranked[0]]:
                yield {"prompt": prompt_of(first), "chosen": best, "rejected": worst}


def compare_verse(
    accelerator: Accelerator,
    settings: RewardSettings,
    corpus: AnyCorpus,
    objective: GroupRelativePolicy,
    form: Form,
    first: FirstLines,
) -> None:
    """The table before and after, over texts that begin with lines not tuned on, beside real stanzas."""
    folder = Path(settings.folder())
    models = {
        "before": objective.start,
        "after": load_model_and_tokenizer(str(folder))[0].to(accelerator.device),
    }
    write = StanzaWriter.like(
        first.stanzas, objective.write.tokenizer, len(form.scheme.stanza), settings.temperature
    )
    size = sum(len(document.encode()) for document in corpus.validation)
    rows, texts = [], {}
    for name, model in models.items():
        texts[name] = write.write_on(model, first.held_out, settings.table_texts, settings.seed + 1)
        split = evaluate_split(model, objective.validation, size, 64, accelerator)
        row = measure_written(name, texts[name], form, corpus.train)
        rows.append(row | {"bits_per_byte": split.bits_per_char})
    rows.append(measure_written("real stanzas", whole_stanzas(corpus.train, form), form))
    text = table(rows, VERSE_COLUMNS)
    with files_written_whole(folder) as staging:
        (staging / "verse.md").write_text(text, encoding="utf-8")
        content = json.dumps({"rows": rows, "texts": texts}, ensure_ascii=False, indent=1)
        (staging / "verse.json").write_text(content, encoding="utf-8")
    say(accelerator, "", *text.splitlines(), "", *(f"{text}\n" for text in texts["after"][:2]))
