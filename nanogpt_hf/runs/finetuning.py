"""Fine-tuning from a command line: a base, an adapter on it (or all its weights), and the way of every run."""

import os
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..common.errors import UserError
from ..common.settings import FinetuningSettings
from ..data.conversations import Conversations, add_chat_template
from ..data.corpora import AnyCorpus
from ..data.tokenization import extend_tokenizer, load_tokenizer
from ..model.bases import local_checkpoint
from ..model.loading import base_sha256, check_vocabulary, context_length
from ..training.causal_attention import leave_masks_out
from ..training.checkpoints import Progress
from ..training.loop import train
from ..training.lora import (
    add_adapter,
    describe_trained,
    embed_new_tokens,
    extend_embedding,
    load_base,
)
from ..training.run_folder import alone_in
from .pretraining import settle_generation
from .run import describe, finish, language_modeling, make_ready, resolve, settle_length, start
from .showing import Showing

LONGEST_CONTEXT = 1024  # tokens, unless more is asked for: bases of today see tens of thousands


def finetune(settings: FinetuningSettings) -> Progress:
    """Everything from settings to a finished run folder, with an adapter or a whole model in it.

    Raises:
        UserError: for a user's mistake, before anything is written.
    """
    check_that_others_can_load(settings)
    accelerator, corpus = start(settings)
    settings, tokenizer, model, base, lines = ready_base(settings, accelerator, corpus)
    objective = language_modeling(accelerator, settings, corpus, tokenizer)
    settings = settle_length(accelerator, settings, model, objective)
    describe(accelerator, settings, corpus, tokenizer, model, objective, lines)
    show = Showing(accelerator, settings, corpus)
    with alone_in(accelerator, Path(settings.folder())):
        progress = train(accelerator, settings, corpus, tokenizer, model, objective, show, base)
        finish(accelerator, settings, corpus, progress, show)
    return progress


def ready_base(
    settings: FinetuningSettings, accelerator: Accelerator, corpus: AnyCorpus
) -> tuple[FinetuningSettings, PreTrainedTokenizerFast, PreTrainedModel, dict[str, str], list[str]]:
    """Resolved settings, and what `adapt_base` gives, ready for the loop."""
    tokenizer, model, base, lines = adapt_base(settings, corpus)
    context = settings.n_positions or min(context_length(model), LONGEST_CONTEXT)
    settings = resolve(replace(settings, n_positions=context), accelerator, corpus, tokenizer, model)
    make_ready(settings, model)
    if accelerator.device.type == "cuda":
        leave_masks_out(model)
    return settings, tokenizer, model, base, lines


def check_that_others_can_load(settings: FinetuningSettings) -> None:
    """Raises UserError where an adapter would be uploaded whose base nobody else has."""
    base = settings.model_name_or_path
    if settings.push_to_hub and os.path.isdir(base) and not settings.full and not settings.merge:
        raise UserError(
            f"--push_to_hub would share an adapter whose base, {base}, is a folder of this machine: push the base and "
            "give its Hub id, or give --merge."
        )


def adapt_base(
    settings: FinetuningSettings, corpus: AnyCorpus | Conversations
) -> tuple[PreTrainedTokenizerFast, PreTrainedModel, dict[str, str], list[str]]:
    """The tokenizer, the base as it will train, digests of what stays as it is of it, and what to say of them on the
    first screen.

    Raises:
        UserError: base, tokenizer and settings do not fit together.
    """
    name = settings.model_name_or_path
    model = load_base(name, whole=settings.full, **settings.dropouts())
    tokenizer = load_tokenizer(local_checkpoint(name))
    check_vocabulary(tokenizer, model)
    # A stage that compares itself with its start needs the same start to go on.
    base = {} if settings.full and not settings.DECIDES else base_sha256(model)
    lines, new_tokens = [], []
    if isinstance(corpus, Conversations):
        if corpus.chat and (new_tokens := add_chat_template(tokenizer)):
            embed_new_tokens(model, new_tokens)
            lines.append(f"chat       new tokens {', '.join(tokenizer.convert_ids_to_tokens(new_tokens))}")
    else:
        lines.append(format_token_rate("the base's tokenizer", tokenizer, corpus))
    if settings.extend_vocabulary:
        extended = extend_tokenizer(tokenizer, corpus.train, settings.extend_vocabulary)
        new_tokens = extend_embedding(model, tokenizer, extended)
        tokenizer = extended
        lines.append(format_token_rate(f"with {len(new_tokens):,} more tokens", tokenizer, corpus))
    if not settings.full:
        add_adapter(model, settings, new_tokens)
    settle_generation(tokenizer, model, corpus, new=False)
    return tokenizer, model, base, [f"trains     {describe_trained(model)}", *lines]


def format_token_rate(whose: str, tokenizer: PreTrainedTokenizerFast, corpus: AnyCorpus) -> str:
    """How many tokens per character of the validation split takes."""
    share = len(corpus.ids("validation", tokenizer)) / corpus.characters("validation")
    return f"text       {share:.2f} tokens per character, {whose}"
