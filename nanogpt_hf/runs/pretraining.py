"""Pretraining: a tokenizer and a new model, or one that goes on, and the way of every run."""

import math
from collections.abc import Mapping, Callable

from transformers import PreTrainedTokenizerFast

from ..common.cli import parse
from ..common.errors import UserError
from ..common.settings import TrainingSettings
from ..data.corpora import Corpus
from ..model import NanoGPTForCausalLM
from ..model.loading import check_vocabulary, load_native, make_config, suppress_padding
from ..training.checkpoints import Progress
from ..training.hardware import choose_defaults, device_type
from .run import carry_out, default_folder

SIZES = "architecture n_layer n_head n_embd n_inner n_positions".split()


def pretrain(settings: TrainingSettings, reason: str | None = None) -> Progress:
    """Everything from settings to a finished run folder, with a new model or one that goes on.

    Args:
        reason: why a recipe chose the size it did, for the first screen.

    Raises:
        UserError: for a user's mistake, before anything is written.
    """
    settings.output_dir = settings.output_dir or default_folder(settings)
    size = [f"size       {reason}"] if reason else []
    return carry_out(settings, lambda corpus: (*make_tokenizer_and_model(settings, corpus), size))


def pretrain_from_command_line(
    description: str | None, by_preset: Mapping[str, Mapping] | Callable[[Mapping], Mapping]
) -> Progress:
    """`pretrain` with the settings of the command line, and a recipe's defaults for the hardware.

    Args:
        description: the recipe's docstring, for --help.
        by_preset: the recipe's defaults by size, as `choose_defaults` takes them, or what makes them of what is said.
    """
    asked = {}

    def defaults(said: Mapping) -> Mapping:
        asked.update(said)
        return (by_preset if callable(by_preset) else choose_defaults(by_preset))(said)

    settings = parse(TrainingSettings, description, defaults=defaults)
    found = "no GPU is used" if device_type(settings.use_cpu) == "cpu" else "a GPU was found"
    why = "as asked" if "preset" in asked else f"because {found} (--preset takes another)"
    return pretrain(settings, f"preset {settings.preset}, {why}")


def given_dropouts(settings: TrainingSettings) -> dict[str, float]:
    names = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    together = {} if settings.dropout is None else dict.fromkeys(names, settings.dropout)
    return together | settings.given(*names)


def make_tokenizer_and_model(
    settings: TrainingSettings, corpus: Corpus
) -> tuple[PreTrainedTokenizerFast, NanoGPTForCausalLM]:
    """A new model, or the one of --model_name_or_path with its own tokenizer.

    Raises:
        UserError: settings that contradict each other, or a tokenizer with more tokens than the model.
    """
    base = settings.model_name_or_path
    tokenizer = corpus.make_tokenizer(base or settings.tokenizer, settings.vocab_size)
    if base:
        model = load_native(base, **given_dropouts(settings))
    else:
        vocab_size = math.ceil(len(tokenizer) / settings.pad_to_multiple_of) * settings.pad_to_multiple_of
        end = tokenizer.eos_token_id
        fields = {
            "vocab_size": vocab_size,
            "bos_token_id": end,
            "eos_token_id": end,
            "pad_token_id": end,
        }
        fields |= settings.given(*SIZES) | given_dropouts(settings)
        model = NanoGPTForCausalLM(make_config(settings.preset, **fields))
    check_vocabulary(tokenizer, model)
    settle_generation(tokenizer, model, corpus, new=not base)
    return tokenizer, model


def settle_generation(
    tokenizer: PreTrainedTokenizerFast, model: NanoGPTForCausalLM, corpus: Corpus, new: bool
) -> None:
    """How the model will generate, saved with it.

    What training never shows a new model, it never samples: padding, bytes and, where no document ends, the end of
    text. Of a base that goes on, only what it did not sample before either.
    """
    tokenizer.model_max_length = model.config.n_positions
    generation = model.generation_config
    generation.do_sample = True
    generation.bos_token_id = generation.eos_token_id = generation.pad_token_id = tokenizer.eos_token_id
    candidates = range(model.config.vocab_size) if new else generation.suppress_tokens
    if candidates:  # or there is no need to read the text
        unseen = corpus.unseen_ids(tokenizer, model.config.vocab_size)
        generation.suppress_tokens = sorted({*unseen} & {*candidates}) or None
    suppress_padding(tokenizer, model)  # a base from elsewhere may not say it
