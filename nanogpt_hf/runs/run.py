"""The way of every run: what comes before the training loop and after it, whatever makes the model."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..common.errors import UserError
from ..common.files import files_written_whole
from ..common.recipes import command
from ..common.settings import RunSettings
from ..common.text import first_line, printable
from ..data.corpora import AnyCorpus, load_corpus
from ..data.token_stream import TokenStream
from ..data.tokenization import load_tokenizer
from ..generation.text import generate_text
from ..model.loading import load_model_and_tokenizer, load_native
from ..sharing.export import choose_format, export_run
from ..sharing.hub import check_push, push
from ..sharing.model_card import write_card
from ..training.checkpoints import Progress
from ..training.evaluation import validation_stream
from ..training.hardware import asks_for_checkpointing, describe_device, make_accelerator
from ..training.objectives import LanguageModeling, Objective
from ..training.reporting import check_trackers, draw_loss_curve, read_metrics, say
from ..training.stepping import global_batch_size
from ..training.timing import steps_in_time

R = TypeVar("R", bound=RunSettings)


def start(settings: RunSettings) -> tuple[Accelerator, AnyCorpus]:
    """The devices and the text of a run, once it is clear that its trackers and the Hub can be had.

    Raises:
        UserError: for a user's mistake, before anything is written.
    """
    check_trackers(settings.report_to)
    accelerator = make_accelerator(settings)
    if settings.push_to_hub and accelerator.is_main_process:
        check_push(hub_name(settings), settings.hub_private_repo)
    with accelerator.main_process_first():
        corpus = load_corpus(
            settings.corpus,
            settings.validation_split_percentage,
            settings.text_column,
            settings.document_end,
        )
    set_seed(settings.seed)
    return accelerator, corpus


def hub_name(settings: RunSettings) -> str:
    return settings.hub_model_id or Path(settings.folder()).name


def resolve(
    settings: R,
    accelerator: Accelerator,
    corpus: AnyCorpus,
    tokenizer: PreTrainedTokenizerFast,
    model: PreTrainedModel,
) -> R:
    """The settings as the run will have them: no default left open that decides a length, a rate or a name.

    Only max_steps is still None where nothing but max_minutes says how long the run is.

    Raises:
        UserError: they ask for what the model or the text cannot give.
    """
    context = model.config.max_position_embeddings
    T = settings.n_positions or context
    if T > context:
        raise UserError(f"--n_positions is {T}, more than the base's context of {context}.")
    changes = {"output_dir": settings.folder(), "n_positions": T}
    tokens = settings.train_tokens
    if settings.num_train_epochs is not None:
        tokens = settings.num_train_epochs * len(corpus.ids("train", tokenizer))
    if hasattr(settings, "vocab_size"):
        changes["vocab_size"] = len(tokenizer)
    if settings.push_to_hub:
        changes["hub_model_id"] = hub_name(settings)
    if asks_for_checkpointing():
        changes["gradient_checkpointing"] = True
    settings = replace(settings, **changes)
    if settings.max_steps is None and tokens is not None:
        return of_length(settings, math.ceil(tokens / (global_batch_size(settings, accelerator) * T)))
    if settings.max_steps is None and settings.max_minutes is None:
        raise UserError(
            "the run has no end: give --max_steps, --train_tokens, --num_train_epochs or --max_minutes."
        )
    return settings if settings.max_steps is None else of_length(settings, settings.max_steps)


def of_length(settings: R, steps: int) -> R:
    """The settings of a run of so many steps, with its warm-up in steps."""
    steps = max(1, steps)
    warmup = settings.warmup_steps if settings.warmup_steps >= 1 else settings.warmup_steps * steps
    return replace(settings, max_steps=steps, warmup_steps=min(round(warmup), steps // 2))


def settle_length(accelerator: Accelerator, settings: R, model: PreTrainedModel, objective: Objective) -> R:
    """Resolved settings with a number of steps, where nothing but max_minutes has said how long the run is."""
    if settings.max_steps is not None:
        return settings
    return of_length(settings, steps_in_time(accelerator, settings, model, objective))


def make_ready(settings: RunSettings, model: PreTrainedModel) -> None:
    """What the model itself has to know of resolved settings.

    Raises:
        UserError: it cannot be written in the format that is asked for.
    """
    if settings.push_to_hub or getattr(settings, "merge", False):
        choose_format(model.config, settings.hub_format)
    # Without a limit of its own a pipeline's default runs past the context.
    model.generation_config.max_length = model.config.n_positions
    model.set_attn_implementation(settings.attn_implementation)
    if settings.gradient_checkpointing:
        # Renamed in transformers 5.2x.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def language_modeling(
    accelerator: Accelerator, settings: RunSettings, corpus: AnyCorpus, tokenizer: PreTrainedTokenizerFast
) -> LanguageModeling:
    """The objective of a run on a text.

    Args:
        settings: resolved.

    Raises:
        UserError: the text is shorter than one window, or there is nothing to validate on.
    """
    T = settings.n_positions
    return LanguageModeling(
        accelerator,
        train=TokenStream(corpus.ids("train", tokenizer), T, accelerator.device, corpus.name),
        validation=validation_stream(tokenizer, corpus, T, accelerator.device),
        batch_size=global_batch_size(settings, accelerator),
        seed=settings.seed,
        eval_batch_size=settings.per_device_eval_batch_size,
        characters=corpus.characters("validation"),
    )


def describe(
    accelerator: Accelerator,
    settings: RunSettings,
    corpus: AnyCorpus,
    tokenizer: PreTrainedTokenizerFast,
    model: PreTrainedModel,
    lines: Sequence[str] = (),
) -> None:
    """The first screen: what will happen.

    Args:
        settings: resolved.
        lines: what is to be said beside, of the size or of the adapter.
    """
    config = model.config
    rate = f"{settings.optim}, learning rate {settings.learning_rate:g}"
    if settings.optim == "muon":
        rate = (
            f"muon, learning rates {settings.muon_learning_rate:g} and, of AdamW, {settings.learning_rate:g}"
        )
    if settings.vector_learning_rate is not None:
        rate += f", of norms and biases {settings.vector_learning_rate:g}"
    say(
        accelerator,
        *([f"NOTE: {corpus.notice}"] if corpus.notice else []),
        f"hardware   {describe_device(accelerator)}",
        f"corpus     {corpus.name}: {corpus.characters('train'):,} characters, and {corpus.characters('validation'):,} for validation",
        f"tokenizer  {settings.model_name_or_path or settings.tokenizer}, {len(tokenizer):,} tokens",
        f"model      {config.architecture}, {model.num_parameters() / 1e6:.2f}M parameters: {config.n_layer} layers, "
        f"{config.n_head} heads, width {config.n_embd}, context {config.n_positions}",
        *lines,
        f"training   {settings.max_steps:,} steps of {global_batch_size(settings, accelerator)} x {settings.n_positions} tokens; "
        f"validation every {settings.eval_steps}",
        f"optimiser  {rate}, warm-up {settings.warmup_steps} steps, then {settings.lr_scheduler_type}",
        f"output     {settings.output_dir}",
    )


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int) -> str:
    samples = generate_text(
        model, tokenizer, "\n", num_return_sequences=3, max_new_tokens=500, temperature=0.8, seed=seed
    )
    return printable("\n\n---\n\n".join(sample.strip() for sample in samples) + "\n")


def sample_base(accelerator: Accelerator, settings: RunSettings) -> str | None:
    """What the base writes without training, if it can still be had."""
    base = settings.model_name_or_path
    try:
        model = load_native(base).to(accelerator.device)
        return sample(model, load_tokenizer(base), settings.seed)
    except UserError as error:
        say(accelerator, f"warning: no samples of the base, {first_line(error)}.")
        return None


def bits_words(rows: Sequence[Mapping], corpus: AnyCorpus) -> list[str]:
    """A base's validation loss before the first step and the best one, in a unit that any tokenizer shares."""
    measured = [row for row in rows if "eval_bits_per_char" in row]
    if not measured or measured[0]["step"] > 0:
        return []
    text = "".join(corpus.validation)
    before, *after = (row["eval_bits_per_char"] * len(text) / len(text.encode()) for row in measured)
    return [f"bits per byte     {before:.4f} before the first step, {min(after, default=before):.4f} at best"]


def memory_words(device: torch.device) -> list[str]:
    if device.type != "cuda":
        return []
    return [f"peak memory     {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"]


def finish(
    accelerator: Accelerator,
    settings: RunSettings,
    corpus: AnyCorpus,
    tokenizer: PreTrainedTokenizerFast,
    progress: Progress,
) -> None:
    """Samples of the best model and of its base, the loss curve, the card and the last screen; then the upload."""
    merge = getattr(settings, "merge", False)
    if accelerator.is_main_process:
        _describe_result(accelerator, settings, corpus, tokenizer, progress)
        folder = Path(settings.output_dir)
        write_card(folder)
        if merge:
            export_run(folder, folder / "merged", settings.hub_format, merge=True)
            say(accelerator, f"merged          {folder / 'merged'}")
        if settings.push_to_hub:
            options = {"private": settings.hub_private_repo, "format": settings.hub_format, "merge": merge}
            say(accelerator, f"shared          {push(folder, settings.hub_model_id, **options)}")
    accelerator.end_training()


def _describe_result(
    accelerator: Accelerator,
    settings: RunSettings,
    corpus: AnyCorpus,
    tokenizer: PreTrainedTokenizerFast,
    progress: Progress,
) -> None:
    folder = Path(settings.output_dir)
    model, _ = load_model_and_tokenizer(str(folder))  # whole, where the trained one may be sharded
    model.to(accelerator.device)
    texts = {"samples.txt": sample(model, tokenizer, settings.seed)}
    if settings.model_name_or_path:
        texts["samples_before.txt"] = sample_base(accelerator, settings)
    with files_written_whole(folder) as staging:
        for name, text in texts.items():
            if text is not None:
                (staging / name).write_text(text, encoding="utf-8")
    source, rows = settings.model_name_or_path or settings.tokenizer, read_metrics(folder / "metrics.jsonl")
    title = f"{Path(corpus.name).name}, {Path(source).name}"  # without folders of this machine
    draw_loss_curve(folder / "loss_curve.png", rows, title)
    say(
        accelerator,
        "",
        texts["samples.txt"].split("\n\n---\n\n")[0].strip(),
        "",
        f"validation loss {progress.best_loss:.4f} nats per token, best at step {progress.best_step} of {progress.step}; "
        f"{progress.elapsed_s / 60:.1f} minutes",
        *bits_words(rows, corpus),
        *memory_words(accelerator.device),
        f"run folder      {folder}",
        f"more samples    {command('sample')} --model {folder}",
    )
