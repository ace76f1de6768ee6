"""Pretraining from a command line: corpus, tokenizer and model are made, trained, sampled and described."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedTokenizerFast

from .checkpoints import Progress, files_written_whole
from .corpora import Corpus, load_corpus
from .generation import generate_text
from .hardware import choose_defaults, describe_device, device_type, make_accelerator
from .hub import check_push, choose_format, push, write_card
from .loading import check_vocabulary, load_model_and_tokenizer, suppress_padding
from .model import NanoGPTConfig, NanoGPTForCausalLM, preset_config
from .reporting import check_trackers, draw_loss_curve, read_metrics, say
from .safe_text import printable
from .settings import TrainingSettings, parse
from .tokenization import encode_documents, make_tokenizer
from .training import train

CONFIG_FIELDS = (
    "architecture n_layer n_head n_embd n_inner n_positions resid_pdrop embd_pdrop attn_pdrop".split()
)


def pretrain(settings: TrainingSettings, reason: str | None = None) -> Progress:
    """Everything from settings to a finished run folder.

    Args:
        reason: why a recipe chose the size it did, for the first screen.

    Raises:
        ValueError: for a user's mistake, before anything is written.
    """
    check_trackers(settings.report_to)
    settings.output_dir = settings.output_dir or default_folder(settings)
    accelerator = make_accelerator(settings)
    if settings.push_to_hub:
        settings.hub_model_id = settings.hub_model_id or Path(settings.output_dir).name
        if accelerator.is_main_process:
            check_push(settings.hub_model_id, settings.hub_private_repo)
    with accelerator.main_process_first():
        corpus = load_corpus(settings.corpus, settings.validation_split_percentage, settings.text_column)
    set_seed(settings.seed)
    tokenizer, model = make_tokenizer_and_model(settings, corpus)
    if settings.push_to_hub:
        choose_format(model.config, settings.hub_format)
    model.generation_config.max_length = (
        model.config.n_positions
    )  # or a pipeline's default runs past the context
    model.set_attn_implementation(settings.attn_implementation)
    if settings.gradient_checkpointing:
        getattr(
            model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
        )()  # renamed in 5.2x
    describe(accelerator, settings, corpus, tokenizer, model, reason)
    progress = train(accelerator, settings, corpus, tokenizer, model)
    finish(accelerator, settings, corpus, tokenizer, model, progress)
    accelerator.end_training()
    return progress


def pretrain_from_command_line(description: str | None, by_preset: Mapping[str, Mapping]) -> Progress:
    """`pretrain` with the settings of the command line, and a recipe's defaults for the hardware.

    Args:
        description: the recipe's docstring, for --help.
        by_preset: the recipe's defaults by size, as `choose_defaults` takes them.
    """
    asked = {}

    def defaults(said: Mapping) -> Mapping:
        asked.update(said)
        return choose_defaults(by_preset)(said)

    settings = parse(TrainingSettings, description, defaults=defaults)
    found = "no GPU is used" if device_type(settings.use_cpu) == "cpu" else "a GPU was found"
    why = "as asked" if "preset" in asked else f"because {found} (--preset takes another)"
    return pretrain(settings, f"preset {settings.preset}, {why}")


def default_folder(settings: TrainingSettings) -> str:
    name = Path(settings.corpus.rstrip("/*")).stem or "corpus"
    tokenizer = Path(settings.tokenizer).name
    return str(Path("runs") / re.sub(r"[^\w.-]+", "-", f"{name}-{tokenizer}"))


def make_tokenizer_and_model(
    settings: TrainingSettings, corpus: Corpus
) -> tuple[PreTrainedTokenizerFast, NanoGPTForCausalLM]:
    """A new model, or the one of --model_name_or_path with its own tokenizer.

    Raises:
        ValueError: settings that contradict each other, or a tokenizer with more tokens than the model.
    """
    base = settings.model_name_or_path
    sizes = settings.given(*CONFIG_FIELDS)
    if settings.dropout is not None:
        sizes = {
            "resid_pdrop": settings.dropout,
            "embd_pdrop": settings.dropout,
            "attn_pdrop": settings.dropout,
        } | sizes
    tokenizer = make_tokenizer(
        base or settings.tokenizer, corpus.train, settings.vocab_size, corpus.validation
    )
    if base:
        dropouts = {name: value for name, value in sizes.items() if name.endswith("_pdrop")}
        model = NanoGPTForCausalLM.from_pretrained(base, **dropouts)
    else:
        vocab_size = math.ceil(len(tokenizer) / settings.pad_to_multiple_of) * settings.pad_to_multiple_of
        end = tokenizer.eos_token_id
        fields = {
            "vocab_size": vocab_size,
            "bos_token_id": end,
            "eos_token_id": end,
            "pad_token_id": end,
        } | sizes
        model = NanoGPTForCausalLM(
            preset_config(settings.preset, **fields) if settings.preset else NanoGPTConfig(**fields)
        )
    check_vocabulary(tokenizer, model)
    tokenizer.model_max_length = model.config.n_positions
    generation = model.generation_config
    generation.do_sample = True
    generation.bos_token_id = generation.eos_token_id = generation.pad_token_id = tokenizer.eos_token_id
    if not base:
        # What training never shows is never sampled: padding, bytes and, where no document ends, the end of text.
        unseen = np.setdiff1d(np.arange(model.config.vocab_size), encode_documents(tokenizer, corpus.train))
        generation.suppress_tokens = unseen.tolist() or None
    suppress_padding(tokenizer, model)  # a base from elsewhere may not say it
    return tokenizer, model


def describe(
    accelerator: Accelerator, settings, corpus: Corpus, tokenizer, model, reason: str | None
) -> None:
    """The first screen: what will happen."""
    config = model.config
    characters = sum(map(len, corpus.train)) + sum(map(len, corpus.validation))
    batch = (
        settings.per_device_train_batch_size
        * settings.gradient_accumulation_steps
        * accelerator.num_processes
    )
    if corpus.notice:
        say(accelerator, f"NOTE: {corpus.notice}")
    say(
        accelerator,
        f"hardware   {describe_device(accelerator)}",
        *([f"size       {reason}"] if reason else []),
        f"corpus     {corpus.name}: {characters:,} characters, the last {settings.validation_split_percentage}% for validation",
        f"tokenizer  {settings.model_name_or_path or settings.tokenizer}, {len(tokenizer):,} tokens",
        f"model      {config.architecture}, {model.num_parameters() / 1e6:.2f}M parameters: {config.n_layer} layers, "
        f"{config.n_head} heads, width {config.n_embd}, context {config.n_positions}",
        f"training   {settings.max_steps:,} steps of {batch} x {config.n_positions} tokens, {settings.optim}; "
        f"validation every {settings.eval_steps}",
        f"output     {settings.output_dir}",
    )


def finish(accelerator: Accelerator, settings, corpus: Corpus, tokenizer, model, progress: Progress) -> None:
    """Samples of the best model, the loss curve and the last screen."""
    if not accelerator.is_main_process:
        return
    folder = Path(settings.output_dir)
    model, _ = load_model_and_tokenizer(str(folder))  # whole, where the trained one may be sharded
    model.to(accelerator.device)
    samples = generate_text(
        model,
        tokenizer,
        "\n",
        num_return_sequences=3,
        max_new_tokens=500,
        temperature=0.8,
        seed=settings.seed,
    )
    text = "\n\n---\n\n".join(sample.strip() for sample in samples) + "\n"
    with files_written_whole(folder) as staging:
        (staging / "samples.txt").write_text(printable(text), encoding="utf-8")
    title = f"{Path(corpus.name).name}, {Path(settings.tokenizer).name}"  # without folders of this machine
    draw_loss_curve(folder / "loss_curve.png", read_metrics(folder / "metrics.jsonl"), title)
    say(
        accelerator,
        "",
        printable(samples[0].strip()),
        "",
        f"validation loss {progress.best_loss:.4f} nats a token, best at step {progress.best_step} of {progress.step}; "
        f"{progress.elapsed_s / 60:.1f} minutes",
        f"run folder      {folder}",
        f"more samples    python recipes/sample.py --model {folder}",
    )
    write_card(folder)
    if settings.push_to_hub:
        url = push(
            folder, settings.hub_model_id, private=settings.hub_private_repo, format=settings.hub_format
        )
        say(accelerator, f"shared          {url}")
