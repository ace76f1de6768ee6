"""Pretraining: a tokenizer and a new model, or one that goes on, and the way of every run."""

import math
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from ..common.errors import UserError
from ..common.presets import find_preset
from ..common.settings import TrainingSettings
from ..common.text import counted
from ..data.corpora import AnyCorpus
from ..model import NanoGPTForCausalLM
from ..model.bases import local_checkpoint
from ..model.loading import check_vocabulary, context_length, load_native, make_config, suppress_padding
from ..training.checkpoints import Progress
from ..training.loop import train
from ..training.objectives import ShortWindows
from ..training.reporting import say
from ..training.run_folder import alone_in
from ..training.stepping import global_batch_size
from .budget import dropout_of, planned_tokens
from .command_line import SHAPE, earlier
from .run import (
    describe,
    finish,
    language_modeling,
    make_ready,
    part_of,
    resolve,
    settle_length,
    start,
    tokens_asked,
)
from .showing import Showing

PART_THAT_HELPED = 0.75  # of a run; a model that is best later may be so by chance
NEVER_WHOLE = (
    "NOTE: the run has ended within its first {}, in pieces of {} tokens: the model has not learned to use its context "
    "of {}."
)
LATER_STEPS_HURT = (
    "NOTE: validation got worse after step {}: fewer --max_steps or a higher --dropout may help."
)


def pretrain(settings: TrainingSettings) -> Progress:
    """Everything from settings to a finished run folder, with a new model or one that goes on.

    Raises:
        UserError: for a user's mistake, before anything is written.
    """
    accelerator, corpus = start(settings)
    tokenizer = make_tokenizer(settings, corpus)
    settings = settle_dropout(settings, accelerator, corpus, tokenizer)
    model = make_model(settings, corpus, tokenizer)
    lines = vocabulary_words(settings, tokenizer)
    settings = resolve(settings, accelerator, corpus, tokenizer, model)
    check_short_windows(settings)
    make_ready(settings, model)
    alpha, words = find_rdrop(settings, model)
    lines += words
    objective = language_modeling(accelerator, settings, corpus, tokenizer, alpha)
    settings = settle_short_windows(settle_length(accelerator, settings, model, objective))
    objective.short = short_windows(settings)
    describe(accelerator, settings, corpus, tokenizer, model, objective, lines)
    show = Showing(accelerator, settings, corpus)
    with alone_in(accelerator, Path(settings.folder())):
        progress = train(accelerator, settings, corpus, tokenizer, model, objective, show)
        finish(accelerator, settings, corpus, progress, show)
    if progress.step <= objective.short.steps:
        length, steps = objective.short
        say(accelerator, NEVER_WHOLE.format(counted(steps, "step"), length, settings.n_positions))
    elif 0 < (progress.best_step or 0) < PART_THAT_HELPED * progress.step:
        say(accelerator, LATER_STEPS_HURT.format(progress.best_step))
    return progress


def check_short_windows(settings: TrainingSettings) -> None:
    """Raises UserError where resolved settings ask for windows that do not divide the context."""
    length, T = settings.short_positions, settings.n_positions
    if length and settings.short_steps and T % length:
        raise UserError(
            f"--short_positions is {length}, which does not divide the context of {T}: give a divisor of it, or "
            "--short_steps 0."
        )


def settle_short_windows(settings: TrainingSettings) -> TrainingSettings:
    """Settings of a known length with the number of steps that have short windows; without any, no length of these."""
    whole = settings.max_steps or 0
    steps = min(part_of(whole, settings.short_steps), whole)
    if not steps or settings.short_positions in (None, settings.n_positions):
        return replace(settings, short_positions=None)
    return replace(settings, short_steps=steps)


def short_windows(settings: TrainingSettings) -> ShortWindows:
    """What settled settings say of them."""
    length = settings.short_positions
    return ShortWindows(length, int(settings.short_steps)) if length else ShortWindows()


def make_tokenizer(settings: TrainingSettings, corpus: AnyCorpus) -> PreTrainedTokenizerFast:
    """A tokenizer of the corpus, or the one of --tokenizer or --model_name_or_path.

    Raises:
        UserError: it is not there, or cannot be read.
    """
    base = settings.model_name_or_path
    return corpus.make_tokenizer(local_checkpoint(base) if base else settings.tokenizer, settings.vocab_size)


def settle_dropout(
    settings: TrainingSettings,
    accelerator: Accelerator,
    corpus: AnyCorpus,
    tokenizer: PreTrainedTokenizerFast,
) -> TrainingSettings:
    """Settings with a dropout, where none is given: by how often the run reads its text."""
    if settings.dropout is not None:
        return settings
    if settings.resume_from_checkpoint:
        return replace(settings, dropout=earlier(type(settings), vars(settings)).get("dropout"))
    if settings.max_steps is not None:
        T = settings.n_positions or find_context(settings)
        tokens = settings.max_steps * global_batch_size(settings, accelerator) * T
    else:
        size = find_preset(settings.preset or "gpt2")
        minutes = {"max_minutes": settings.max_minutes}
        tokens = tokens_asked(settings, corpus, tokenizer)
        tokens = tokens or planned_tokens(minutes, size, accelerator.device.type)
    return replace(settings, dropout=dropout_of(tokens / max(1, len(corpus.ids("train", tokenizer)))))


def find_context(settings: TrainingSettings) -> int:
    """The context of a model that is not made or loaded yet; 0 where a base does not tell, which loading it answers."""
    if not settings.model_name_or_path:
        return make_config(settings.preset).n_positions
    with suppress(OSError, ValueError):
        fields = PreTrainedConfig.get_config_dict(local_checkpoint(settings.model_name_or_path))[0]
        return fields.get("n_positions") or fields.get("max_position_embeddings") or 0
    return 0


def make_model(
    settings: TrainingSettings, corpus: AnyCorpus, tokenizer: PreTrainedTokenizerFast
) -> NanoGPTForCausalLM:
    """A new model, or the one of --model_name_or_path.

    Raises:
        UserError: settings that contradict each other, or a tokenizer with more tokens than the model.
    """
    base = settings.model_name_or_path
    if base:
        model = load_native(base, dtype=torch.float32, **settings.dropouts())
        if (
            settings.resume_from_checkpoint is None
        ):  # what goes on has been checked, or is of an earlier version
            check_shape(settings, model)
    else:
        vocab_size = math.ceil(len(tokenizer) / settings.pad_to_multiple_of) * settings.pad_to_multiple_of
        end = tokenizer.eos_token_id
        fields = {
            "vocab_size": vocab_size,
            "bos_token_id": end,
            "eos_token_id": end,
            "pad_token_id": end,
        }
        fields |= settings.given(*SHAPE, "n_positions") | settings.dropouts()
        model = NanoGPTForCausalLM(make_config(settings.preset, **fields))
    check_vocabulary(tokenizer, model)
    settle_generation(tokenizer, model, corpus, new=not base)
    return model


def check_shape(settings: TrainingSettings, base: NanoGPTForCausalLM) -> None:
    """Raises UserError where the settings ask for another shape, or another tokenizer, than a base brings with it."""
    for name, value in settings.given(*SHAPE).items():
        if value != (own := getattr(base.config, name)):
            raise UserError(f"--{name} is {value}, and the base has its own, {own}: leave it out.")
    if settings.tokenizer not in ("char", settings.model_name_or_path):
        raise UserError(f"--tokenizer is {settings.tokenizer}, and the base has its own: leave it out.")


def vocabulary_words(settings: TrainingSettings, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """What to say of a --vocab_size that a tokenizer trained here does not have."""
    kind, asked, tokens = settings.tokenizer, settings.vocab_size, len(tokenizer)
    why = {"char": "it has the text's characters and all bytes", "bpe": "the text has merges for no more"}
    if settings.model_name_or_path or kind not in why or asked == tokens:
        return []
    if kind == "char" and asked == TrainingSettings.vocab_size:  # nobody has asked for any
        return []
    return [f"NOTE: the tokenizer has {tokens:,} tokens and not --vocab_size {asked:,}: {why[kind]}."]


def find_rdrop(settings: TrainingSettings, model: PreTrainedModel) -> tuple[float, list[str]]:
    """The weight of R-Drop's divergence, and what to say of it; 0 for a model whose two readings would be the same."""
    alpha, config = settings.rdrop_alpha, model.config
    if not alpha:
        return 0.0, []
    if not (config.resid_pdrop or config.embd_pdrop or config.attn_pdrop):
        return 0.0, [
            "NOTE: each window is read once: there is no dropout, so R-Drop would find no difference."
        ]
    return alpha, [
        f"R-Drop     each window is read twice, with other dropout; their divergence counts {alpha:g}"
    ]


def settle_generation(
    tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel, corpus: AnyCorpus, new: bool
) -> None:
    """How the model will generate, saved with it.

    What training never shows a new model, it never samples: padding, bytes and, where no document ends, the end of
    text. Of a base that goes on, only what it did not sample before either.
    """
    tokenizer.model_max_length = context_length(model)
    rows = model.get_input_embeddings().weight.shape[0]
    generation = model.generation_config
    generation.do_sample = True
    generation.bos_token_id = generation.eos_token_id = generation.pad_token_id = tokenizer.eos_token_id
    candidates = range(rows) if new else generation.suppress_tokens
    if candidates:  # or there is no need to read the text
        unseen = corpus.unseen_ids(tokenizer, rows)
        generation.suppress_tokens = sorted({*unseen} & {*candidates}) or None
    suppress_padding(tokenizer, model)  # a base from elsewhere may not say it
