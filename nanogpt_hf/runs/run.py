"""The way of every run: what comes before the training loop and after it, whatever makes the model."""

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..common.errors import UserError
from ..common.files import delete, files_written_whole
from ..common.recipes import command
from ..common.settings import RunSettings, public_values
from ..common.text import counted
from ..data.corpora import AnyCorpus, load_corpus
from ..data.token_stream import TokenStream
from ..data.tokenization import describe_tokens
from ..model.loading import context_length
from ..sharing.export import choose_format, export_run
from ..sharing.hub import check_push, push
from ..training.best_model import show_best
from ..training.checkpoints import Progress
from ..training.evaluation import validation_stream
from ..training.hardware import asks_for_checkpointing, describe_device, make_accelerator
from ..training.lora import adapter_size
from ..training.objectives import LanguageModeling, Objective, RDrop
from ..training.reporting import check_trackers, evaluated_at, loss_unit, read_metrics, say
from ..training.stepping import global_batch_size
from ..training.timing import steps_in_time
from ..training.used_folder import check_usable
from .showing import BETWEEN, NEW_LINE, Showing, sample_base

R = TypeVar("R", bound=RunSettings)
C = TypeVar("C")

MANY_PASSES = 100
AGAIN_AND_AGAIN = (
    "a model learns a text by heart that it reads so often: give more text or fewer --max_steps, or fine-tune a model "
    "that has read more ({})."
)

NOTHING_BETTER = (
    "NOTE: the model was never better than before its first step: a lower learning rate may help."
)


def start(settings: RunSettings) -> tuple[Accelerator, AnyCorpus]:
    """The devices and the text of a run, once it is clear that its trackers and the Hub can be had."""
    return start_with(
        settings,
        lambda: load_corpus(
            settings.corpus,
            settings.validation_split_percentage,
            document_end=settings.document_end,
            **settings.reading_options(),
        ),
    )


def start_with(settings: RunSettings, load: Callable[[], C]) -> tuple[Accelerator, C]:
    """The devices, and what a run reads, loaded by one process first.

    Raises:
        UserError: for a user's mistake, before anything is written.
    """
    if not settings.dry_run:
        check_usable(settings)
    check_trackers(settings.report_to)
    accelerator = make_accelerator(settings)
    if settings.push_to_hub and accelerator.is_main_process:
        check_push(hub_name(settings), settings.hub_private_repo)
    with accelerator.main_process_first():
        corpus = load()
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
    context = context_length(model)
    T = settings.n_positions or context
    if T > context:
        raise UserError(f"--n_positions is {T}, more than the base's context of {context}.")
    changes: dict[str, Any] = {"output_dir": settings.folder(), "n_positions": T}
    if hasattr(settings, "vocab_size"):
        changes["vocab_size"] = len(tokenizer)
        if base := settings.model_name_or_path:  # which brings its own
            changes["tokenizer"] = base
    if settings.push_to_hub:
        changes["hub_model_id"] = hub_name(settings)
    if asks_for_checkpointing():
        changes["gradient_checkpointing"] = True
    settings = replace(settings, **changes)
    tokens = tokens_asked(settings, corpus, tokenizer)
    if settings.max_steps is None and tokens is not None:
        return of_length(settings, math.ceil(tokens / (global_batch_size(settings, accelerator) * T)))
    if settings.max_steps is None and settings.max_minutes is None:
        raise UserError(
            "the run has no end: give --max_steps, --train_tokens, --num_train_epochs or --max_minutes."
        )
    return settings if settings.max_steps is None else of_length(settings, settings.max_steps)


def tokens_asked(
    settings: RunSettings, corpus: AnyCorpus, tokenizer: PreTrainedTokenizerFast
) -> float | None:
    """How many tokens a run is to read by its settings; None where they do not say it in tokens or epochs."""
    if settings.num_train_epochs is not None:
        return settings.num_train_epochs * len(corpus.ids("train", tokenizer))
    return settings.train_tokens


def of_length(settings: R, steps: int) -> R:
    """The settings of a run of so many steps, with its warm-up in steps."""
    steps = max(1, steps)
    return replace(
        settings, max_steps=steps, warmup_steps=min(part_of(steps, settings.warmup_steps), steps // 2)
    )


def part_of(steps: int, asked: float) -> int:
    """So many of a run's steps as a setting asks for: a number, or below 1 a share of them."""
    return round(asked if asked >= 1 else asked * steps)


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
    # Without a limit a pipeline's 256 new tokens run past the context. transformers warns of it beside max_new_tokens=, but
    # max_new_tokens here would bound no prompt and overrule a caller's max_length=.
    model.generation_config.max_length = context_length(model)
    with suppress(ValueError):  # of a base whose class has its own attention only, or none
        model.set_attn_implementation(settings.attn_implementation)
    if settings.gradient_checkpointing:
        # Renamed in transformers 5.2x.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def language_modeling(
    accelerator: Accelerator,
    settings: RunSettings,
    corpus: AnyCorpus,
    tokenizer: PreTrainedTokenizerFast,
    rdrop_alpha: float = 0.0,
) -> LanguageModeling:
    """The objective of a run on a text.

    Args:
        settings: resolved.
        rdrop_alpha: R-Drop's, where it is above 0.

    Raises:
        UserError: the text is shorter than one window, or there is nothing to validate on.
    """
    T = settings.n_positions
    kind = partial(RDrop, rdrop_alpha) if rdrop_alpha else LanguageModeling
    return kind(
        accelerator=accelerator,
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
    objective: Objective,
    lines: Sequence[str] = (),
) -> None:
    """The first screen: what will happen.

    Args:
        settings: resolved.
        lines: what is to be said beside, of the size or of the adapter.

    Raises:
        SystemExit: 0, after --dry_run.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    heads = f"{counted(heads, 'head')}, " if heads else ""
    own = model.num_parameters() - adapter_size(model)
    rate = f"{settings.optim}, learning rate {settings.learning_rate:g}"
    if settings.optim == "muon":
        rate = (
            f"muon, learning rates {settings.muon_learning_rate:g} and, of AdamW, {settings.learning_rate:g}"
        )
    if settings.vector_learning_rate is not None:
        rate += f", of vectors {settings.vector_learning_rate:g}"
    dropouts = settings.dropouts().values()
    most = f"{'up to ' * (len({*dropouts}) > 1)}{max(dropouts):g}" if any(dropouts) else ""
    passes = 0.0
    if isinstance(objective, LanguageModeling):
        passes = settings.max_steps * objective.tokens_per_step / len(objective.train)
    say(
        accelerator,
        *([f"NOTE: {corpus.notice}"] if corpus.notice else []),
        f"hardware   {describe_device(accelerator)}",
        *corpus.reading,
        f"tokenizer  {settings.model_name_or_path or settings.tokenizer}, {describe_tokens(tokenizer)}",
        *corpus.remarks(tokenizer),
        f"model      {getattr(config, 'architecture', config.model_type)}, {own / 1e6:.2f}M parameters: "
        f"{counted(config.num_hidden_layers, 'layer')}, {heads}width {config.hidden_size}, context "
        f"{context_length(model)}",
        *lines,
        f"training   {settings.max_steps:,} steps of {global_batch_size(settings, accelerator)} x {settings.n_positions} tokens"
        f"{f', {passes:.3g} times the text' if passes else ''}"
        f"{f', the first {objective.short.steps:,} in pieces of {objective.short.length}' if objective.short.steps else ''}"
        f"{f', dropout {most}' if most else ''}; validation every {settings.eval_steps}",
        *([f"warning: {AGAIN_AND_AGAIN.format(command('finetune_lora'))}"] if passes > MANY_PASSES else []),
        f"optimiser  {rate}, warm-up {settings.warmup_steps} steps, then {settings.lr_scheduler_type}",
        f"output     {settings.output_dir}",
    )
    if settings.dry_run:
        say(
            accelerator,
            *refusals(settings),
            "",
            yaml.safe_dump(public_values(settings), sort_keys=False, allow_unicode=True).rstrip(),
        )
        raise SystemExit(0)


def refusals(settings: RunSettings) -> list[str]:
    """What the run itself, without --dry_run, would say of a folder that it cannot use as it is."""
    try:
        check_usable(settings)
    except UserError as error:
        return [f"NOTE: {error}"]
    return []


def bits_words(rows: Sequence[Mapping], best: Mapping, corpus: AnyCorpus) -> list[str]:
    """The losses of a base before the first step and of the best model, in a unit that any tokenizer shares."""
    first = rows[0] if rows else {}
    if first.get("step") != 0 or "eval_bits_per_char" not in first.keys() & best.keys():
        return []
    text = "".join(corpus.validation)
    before, after = (row["eval_bits_per_char"] * len(text) / len(text.encode()) for row in (first, best))
    return [f"bits per byte     {before:.4f} before the first step, {after:.4f} of the best model"]


def memory_words(device: torch.device) -> list[str]:
    if device.type != "cuda":
        return []
    return [f"peak memory     {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"]


def finish(
    accelerator: Accelerator, settings: RunSettings, corpus: AnyCorpus, progress: Progress, show: Showing
) -> None:
    """Samples of the best model and of its base, the loss curve, the card and the last screen; then the upload."""
    merge = getattr(settings, "merge", False)
    if accelerator.is_main_process:
        folder = Path(settings.folder())
        if (
            settings.model_name_or_path
            and (text := sample_base(accelerator, settings, show.prompt)) is not None
        ):
            with files_written_whole(folder) as staging:
                (staging / "samples_before.txt").write_text(text, encoding="utf-8")
        show.ended = True
        show_best(folder, show)
        describe_result(accelerator, corpus, progress, folder, show.prompt)
        if merge:
            delete(folder / "merged")
            export_run(folder, folder / "merged", settings.hub_format, merge=True)
            say(accelerator, f"merged          {folder / 'merged'}")
        if settings.push_to_hub:
            options = {"private": settings.hub_private_repo, "format": settings.hub_format, "merge": merge}
            say(accelerator, f"shared          {push(folder, settings.hub_model_id, **options)}")
    accelerator.end_training()


def describe_result(
    accelerator: Accelerator, corpus: AnyCorpus, progress: Progress, folder: Path, prompt: str
) -> None:
    """The last screen."""
    samples = folder / "samples.txt"
    text = samples.read_text(encoding="utf-8") if samples.exists() else ""
    rows = read_metrics(folder / "metrics.jsonl")
    best = evaluated_at(rows, progress.best_step)
    more = f"{command('sample')} --model {shlex.quote(str(folder))}"
    if prompt != NEW_LINE:
        prompt = prompt.replace("\n", "\\n")  # as --prompt takes it
        more += f" --prompt {shlex.quote(prompt)}"
    say(
        accelerator,
        "",
        text.split(BETWEEN)[0].strip(),
        "",
        f"validation loss {progress.best_loss:.4f} {loss_unit(best)}, best at step {progress.best_step} of {progress.step}; "
        f"{progress.elapsed_s / 60:.1f} minutes",
        *([NOTHING_BETTER] if progress.best_step == 0 else []),
        *bits_words(rows, best, corpus),
        *memory_words(accelerator.device),
        f"run folder      {folder}",
        f"more samples    {more}",
    )
