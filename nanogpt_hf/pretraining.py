"""From settings to a finished run folder: corpus, tokenizer and model are made, trained, sampled and described.

`carry_out` is the way of every run; what pretraining adds is how its tokenizer and model are made.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedTokenizerFast

from .checkpoints import Progress, files_written_whole
from .corpora import Corpus, load_corpus
from .generation import generate_text
from .hardware import choose_defaults, describe_device, device_type, make_accelerator
from .hub import check_push, choose_format, export_run, push, write_card
from .loading import check_vocabulary, first_line, load_model_and_tokenizer, suppress_padding
from .model import NanoGPTConfig, NanoGPTForCausalLM, preset_config
from .reporting import check_trackers, draw_loss_curve, read_metrics, say
from .safe_text import printable
from .settings import TrainingSettings, parse
from .stepping import global_batch_size
from .tokenization import load_tokenizer
from .training import train

SIZES = "architecture n_layer n_head n_embd n_inner n_positions".split()
Made = tuple[PreTrainedTokenizerFast, NanoGPTForCausalLM, Sequence[str]]


def pretrain(settings: TrainingSettings, reason: str | None = None) -> Progress:
    """Everything from settings to a finished run folder, with a new model or one that goes on.

    Args:
        reason: why a recipe chose the size it did, for the first screen.

    Raises:
        ValueError: for a user's mistake, before anything is written.
    """
    settings.output_dir = settings.output_dir or default_folder(settings)
    size = [f"size       {reason}"] if reason else []
    return carry_out(settings, lambda corpus: (*make_tokenizer_and_model(settings, corpus), size))


def carry_out(settings: TrainingSettings, make: Callable[[Corpus], Made], merge: bool = False) -> Progress:
    """A run in its folder, output_dir.

    Args:
        make: of a corpus its tokenizer, the model, and lines for the first screen. It may resolve settings.
        merge: at the end, write the adapter merged into its base as well, and push that.

    Raises:
        ValueError: for a user's mistake, before anything is written.
    """
    check_trackers(settings.report_to)
    accelerator = make_accelerator(settings)
    if settings.push_to_hub:
        settings.hub_model_id = settings.hub_model_id or Path(settings.output_dir).name
        if accelerator.is_main_process:
            check_push(settings.hub_model_id, settings.hub_private_repo)
    with accelerator.main_process_first():
        corpus = load_corpus(
            settings.corpus,
            settings.validation_split_percentage,
            settings.text_column,
            settings.document_end,
        )
    set_seed(settings.seed)
    tokenizer, model, lines = make(corpus)
    context = model.config.max_position_embeddings
    if (settings.n_positions or 0) > context:
        raise ValueError(
            f"--n_positions is {settings.n_positions}, more than the base's context of {context}."
        )
    if settings.push_to_hub or merge:
        choose_format(model.config, settings.hub_format)
    model.generation_config.max_length = (
        model.config.n_positions
    )  # or a pipeline's default runs past the context
    model.set_attn_implementation(settings.attn_implementation)
    if settings.gradient_checkpointing:
        getattr(
            model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
        )()  # renamed in 5.2x
    describe(accelerator, settings, corpus, tokenizer, model, lines)
    progress = train(accelerator, settings, corpus, tokenizer, model)
    finish(accelerator, settings, corpus, tokenizer, model, progress, merge)
    accelerator.end_training()
    return progress


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


def default_folder(settings: TrainingSettings, *parts: str) -> str:
    corpus = Path(settings.corpus.rstrip("/*")).stem or "corpus"
    names = [corpus, *(Path(part).name for part in parts or [settings.tokenizer])]
    return str(Path("runs") / re.sub(r"[^\w.-]+", "-", "-".join(names)))


def given_dropouts(settings: TrainingSettings) -> dict[str, float]:
    names = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    together = {} if settings.dropout is None else dict.fromkeys(names, settings.dropout)
    return together | settings.given(*names)


def make_tokenizer_and_model(
    settings: TrainingSettings, corpus: Corpus
) -> tuple[PreTrainedTokenizerFast, NanoGPTForCausalLM]:
    """A new model, or the one of --model_name_or_path with its own tokenizer.

    Raises:
        ValueError: settings that contradict each other, or a tokenizer with more tokens than the model.
    """
    base = settings.model_name_or_path
    tokenizer = corpus.make_tokenizer(base or settings.tokenizer, settings.vocab_size)
    if base:
        model = NanoGPTForCausalLM.from_pretrained(base, **given_dropouts(settings))
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
        model = NanoGPTForCausalLM(
            preset_config(settings.preset, **fields) if settings.preset else NanoGPTConfig(**fields)
        )
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


def describe(
    accelerator: Accelerator, settings, corpus: Corpus, tokenizer, model, lines: Sequence[str]
) -> None:
    """The first screen: what will happen."""
    config = model.config
    batch = global_batch_size(settings, accelerator)
    if corpus.notice:
        say(accelerator, f"NOTE: {corpus.notice}")
    say(
        accelerator,
        f"hardware   {describe_device(accelerator)}",
        *lines,
        f"corpus     {corpus.name}: {corpus.characters('train'):,} characters, and {corpus.characters('validation'):,} for validation",
        f"tokenizer  {settings.model_name_or_path or settings.tokenizer}, {len(tokenizer):,} tokens",
        f"model      {config.architecture}, {model.num_parameters() / 1e6:.2f}M parameters: {config.n_layer} layers, "
        f"{config.n_head} heads, width {config.n_embd}, context {config.n_positions}",
        f"training   {settings.max_steps:,} steps of {batch} x {settings.n_positions or config.n_positions} tokens, {settings.optim}; "
        f"validation every {settings.eval_steps}",
        f"output     {settings.output_dir}",
    )


def sample(model, tokenizer, seed: int) -> str:
    samples = generate_text(
        model, tokenizer, "\n", num_return_sequences=3, max_new_tokens=500, temperature=0.8, seed=seed
    )
    return printable("\n\n---\n\n".join(sample.strip() for sample in samples) + "\n")


def sample_base(accelerator: Accelerator, settings: TrainingSettings) -> str | None:
    """What the base writes without training, if it can still be had."""
    base = settings.model_name_or_path
    try:
        model = NanoGPTForCausalLM.from_pretrained(base).to(accelerator.device)
        return sample(model, load_tokenizer(base), settings.seed)
    except (OSError, ValueError) as error:
        say(accelerator, f"warning: no samples of the base, {first_line(error)}.")
        return None


def bits_words(rows: Sequence[Mapping], corpus: Corpus) -> list[str]:
    """A base's validation loss before the first step and the best one, in a unit that any tokenizer shares."""
    measured = [row for row in rows if "eval_bits_per_char" in row]
    if not measured or measured[0]["step"] > 0:
        return []
    text = "".join(corpus.validation)
    before, *after = (row["eval_bits_per_char"] * len(text) / len(text.encode()) for row in measured)
    return [f"bits a byte     {before:.4f} before the first step, {min(after, default=before):.4f} at best"]


def memory_words(device: torch.device) -> list[str]:
    if device.type != "cuda":
        return []
    return [f"peak memory     {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"]


def finish(
    accelerator: Accelerator, settings, corpus: Corpus, tokenizer, model, progress: Progress, merge: bool
) -> None:
    """Samples of the best model and of its base, the loss curve and the last screen."""
    if not accelerator.is_main_process:
        return
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
        f"validation loss {progress.best_loss:.4f} nats a token, best at step {progress.best_step} of {progress.step}; "
        f"{progress.elapsed_s / 60:.1f} minutes",
        *bits_words(rows, corpus),
        *memory_words(accelerator.device),
        f"run folder      {folder}",
        f"more samples    python recipes/sample.py --model {folder}",
    )
    write_card(folder)
    if merge:
        export_run(folder, folder / "merged", settings.hub_format, merge=True)
        say(accelerator, f"merged          {folder / 'merged'}")
    if settings.push_to_hub:
        url = push(
            folder,
            settings.hub_model_id,
            private=settings.hub_private_repo,
            format=settings.hub_format,
            merge=merge,
        )
        say(accelerator, f"shared          {url}")
