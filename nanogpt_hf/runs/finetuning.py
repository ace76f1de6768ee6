"""Fine-tuning from a command line: a base, an adapter on it (or all its weights), and the way of every run."""

import math
import os

from transformers import PreTrainedTokenizerFast

from ..common.errors import UserError
from ..training.checkpoints import Progress
from ..data.corpora import Corpus
from ..training.hardware import device_type
from ..model.loading import check_vocabulary
from ..training.lora import add_adapter, describe_trained, extend_embedding, load_base, quantization
from .pretraining import given_dropouts, settle_generation
from .run import Made, carry_out, default_folder
from ..common.settings import FinetuningSettings
from ..data.tokenization import extend_tokenizer, load_tokenizer


def finetune(settings: FinetuningSettings) -> Progress:
    """Everything from settings to a finished run folder, with an adapter or a whole model in it.

    Raises:
        UserError: for a user's mistake, before anything is written.
    """
    base = settings.model_name_or_path
    kind = "full" if settings.full else "lora"
    settings.output_dir = settings.output_dir or default_folder(settings, base, kind)
    if settings.push_to_hub and os.path.isdir(base) and not settings.full and not settings.merge:
        raise UserError(
            f"--push_to_hub would share an adapter whose base, {base}, is a folder of this machine: push the base and "
            "give its Hub id, or give --merge."
        )
    return carry_out(settings, lambda corpus: make(settings, corpus), settings.merge)


def make(settings: FinetuningSettings, corpus: Corpus) -> Made:
    """The base as it will train, its tokenizer, and what to say of them. Fills in n_positions and max_steps.

    Raises:
        UserError: base, tokenizer and settings do not fit together.
    """
    name = settings.model_name_or_path
    options = given_dropouts(settings) | quantization(settings, device_type(settings.use_cpu))
    model = load_base(name, whole=settings.full, **options)
    tokenizer = load_tokenizer(name)
    check_vocabulary(tokenizer, model)
    lines = [tokens_words("the base's tokenizer", tokenizer, corpus)]
    new_tokens = []
    if settings.extend_vocabulary:
        extended = extend_tokenizer(tokenizer, corpus.train, settings.extend_vocabulary)
        new_tokens = extend_embedding(model, tokenizer, extended)
        tokenizer = extended
        lines.append(tokens_words(f"with {len(new_tokens):,} more tokens", tokenizer, corpus))
    if not settings.full:
        add_adapter(model, settings, new_tokens)
    settle_generation(tokenizer, model, corpus, new=False)
    settings.n_positions = settings.n_positions or model.config.n_positions
    if settings.max_steps is None:
        batch = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
        tokens = batch * int(os.environ.get("WORLD_SIZE", "1")) * settings.n_positions
        settings.max_steps = math.ceil(
            settings.num_train_epochs * len(corpus.ids("train", tokenizer)) / tokens
        )
    return tokenizer, model, [f"trains     {describe_trained(model)}", *lines]


def tokens_words(whose: str, tokenizer: PreTrainedTokenizerFast, corpus: Corpus) -> str:
    """How many tokens a character of the validation split takes."""
    share = len(corpus.ids("validation", tokenizer)) / corpus.characters("validation")
    return f"text       {share:.2f} tokens a character, {whose}"
