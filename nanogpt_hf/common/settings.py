"""Every setting of a training run, in groups that runs are composed of.

A settings object does not change: what a run has made of it is another object, by `dataclasses.replace`.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from .errors import UserError
from .fields import Settings, changed, setting
from .reading_options import ReadingOptions
from .recipes import command
from .text import without_home

# Settings that say where and how a run is started, and not what it is.
OF_A_START = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "dry_run")


@dataclass(frozen=True)
class TextSettings(Settings):
    """Text"""

    corpus: str = setting(
        "tiny_shakespeare",
        "tiny_shakespeare, tiny_pushkin, a file, folder or glob, or a Hub dataset",
        essential=True,
    )
    text_column: str = setting(
        "text", "column of a .jsonl, .csv, .parquet or Hub dataset that holds the text"
    )
    validation_file: str | None = setting(
        None, "a file, folder or glob that is held out for validation, all of it"
    )
    validation_split_percentage: int = setting(
        10,
        "percent of the text, at the end of each file, that is held out where nothing else is",
        ge=1,
        le=99,
    )
    keep_carriage_returns: bool = setting(False, "keep CRLF and CR as they are; else each is one newline")
    special_tokens_in_text: Literal["document_ends", "tokens", "text"] = setting(
        "document_ends",
        "special tokens that the text spells. document_ends: <|endoftext|> alone on a line ends a document, all else "
        "is ordinary text; tokens: each is the tokenizer's token; text: all are ordinary text",
    )

    def reading_options(self) -> ReadingOptions:
        """Those of the settings that say how the text is read, as `load_corpus` and `prepare` take them."""
        return {
            "text_column": self.text_column,
            "validation_file": self.validation_file,
            "keep_carriage_returns": self.keep_carriage_returns,
            "special_tokens_in_text": self.special_tokens_in_text,
        }


@dataclass(frozen=True)
class DataSettings(TextSettings):
    """Text"""

    # What runs did whose run.yaml does not know these settings.
    BEFORE: ClassVar[dict[str, Any]] = {"keep_carriage_returns": True, "special_tokens_in_text": "text"}

    document_end: str | None = setting(
        None, "regular expression: a document ends after each match, so that a model learns where to stop"
    )


@dataclass(frozen=True)
class TokenizerSettings(DataSettings):
    """Tokenizer"""

    tokenizer: str = setting(
        "char", "char or bpe (trained on the corpus), a tokenizer's folder, or a Hub id", essential=True
    )
    vocab_size: int = setting(1024, "tokens of a bpe tokenizer trained here", ge=1)
    pad_to_multiple_of: int = setting(64, "round the model's vocabulary up to a multiple of this", ge=1)


@dataclass(frozen=True)
class BaseSettings(Settings):
    """Model"""

    model_name_or_path: str | None = setting(
        None, "start from this checkpoint (folder or Hub id), with its tokenizer", essential=True
    )
    n_positions: int | None = setting(None, "context length, in tokens", ge=1)
    dropout: float | None = setting(None, "sets resid_pdrop, embd_pdrop and attn_pdrop together", ge=0, lt=1)
    resid_pdrop: float | None = setting(None, "dropout at the end of every residual branch", ge=0, lt=1)
    embd_pdrop: float | None = setting(None, "dropout after the embeddings", ge=0, lt=1)
    attn_pdrop: float | None = setting(None, "dropout of the attention weights", ge=0, lt=1)
    attn_implementation: Literal["sdpa", "eager"] = setting(
        "sdpa", "attention kernel: torch's fused one, or plain matmuls"
    )
    gradient_checkpointing: bool = setting(
        False, "recompute activations in the backward pass: less memory, slower"
    )

    def dropouts(self) -> dict[str, float]:
        """The model's three dropouts, as far as they are given."""
        names = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
        together = {} if self.dropout is None else dict.fromkeys(names, self.dropout)
        return together | self.given(*names)


@dataclass(frozen=True)
class ModelSettings(BaseSettings):
    """Model"""

    preset: str | None = setting(
        None, "named size: cpu, baby, gpt2 … gpt2-xl, gpt3-small … gpt3-175b", essential=True
    )
    architecture: Literal["gpt2", "qwen3", "llama", "modern"] | None = setting(
        None, "gpt2, qwen3 or llama: the block of that family (modern is qwen3's old name)"
    )
    n_layer: int | None = setting(None, "blocks", ge=1)
    n_head: int | None = setting(None, "attention heads", ge=1)
    n_kv_head: int | None = setting(None, "heads of keys and values, shared by groups of heads", ge=1)
    head_dim: int | None = setting(None, "size of a head; default: n_embd / n_head", ge=1)
    n_embd: int | None = setting(None, "width, in channels", ge=1)
    n_inner: int | None = setting(None, "width of the MLP's hidden layer", ge=1)
    short_positions: int | None = setting(
        None,
        "sequence-length warm-up: the first steps' windows are cut into pieces of so many tokens (it divides n_positions)",
        ge=1,
    )
    short_steps: float = setting(
        0.5,
        "how many steps these are; less than 1: this part of the run; 0: none; early stopping counts from their end",
        ge=0,
    )
    rdrop_alpha: float = setting(
        0.0,
        "R-Drop: read each window twice, with other dropout, and draw the two predictions together by this much; for "
        "small texts and vocabularies: a step takes twice the time and memory",
        ge=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.architecture == "modern":
            object.__setattr__(self, "architecture", "qwen3")


@dataclass(frozen=True)
class LengthSettings(Settings):
    """Run"""

    output_dir: str | None = setting(None, "run folder; default runs/CORPUS-TOKENIZER", essential=True)
    overwrite_output_dir: bool = setting(False, "replace the run that is in the folder")
    dry_run: bool = setting(False, "print the first screen and every setting, and end; nothing is written")
    resume_from_checkpoint: str | None = setting(
        None,
        "'last', or a checkpoint folder: go on from there, exactly",
        essential=True,
        excludes=["overwrite_output_dir"],
    )
    max_steps: int | None = setting(2000, "optimiser steps", essential=True, ge=1)
    num_train_epochs: float | None = setting(
        None, "passes over the training split, instead of max_steps", gt=0
    )
    train_tokens: float | None = setting(None, "tokens to train on, instead of max_steps", gt=0)
    max_minutes: float | None = setting(
        None,
        "stop after this many minutes, with a checkpoint; where nothing else says how long, the schedule ends there",
        gt=0,
    )
    per_device_train_batch_size: int = setting(32, "sequences per device and micro-batch", ge=1)
    gradient_accumulation_steps: int = setting(1, "micro-batches per step", ge=1)
    per_device_eval_batch_size: int = setting(
        64,
        "sequences per device in evaluation, fewer where the vocabulary is large; does not change the loss",
        ge=1,
    )
    logging_steps: int = setting(10, "steps between two lines of metrics.jsonl", ge=1)
    eval_steps: int = setting(250, "steps between two evaluations of the whole validation split", ge=1)
    eval_on_start: bool = setting(False, "evaluate before the first step too")
    sample_length: int = setting(500, "tokens of each of the three texts in samples.txt", ge=1)
    sample_on_eval: bool | None = setting(
        None, "samples and loss curve at every evaluation; default: of small models, if it takes little time"
    )
    save_steps: int = setting(500, "steps between two checkpoints", ge=1)
    save_total_limit: int = setting(2, "checkpoints kept (the best model is kept beside them)", ge=1)
    early_stopping_patience: int | None = setting(
        None, "stop after this many evaluations without a better loss", ge=1
    )
    seed: int = setting(1337, "decides initial weights, order of the batches and dropout", ge=0, lt=2**32)


# Those of transformers that depend on the step alone.
Schedule = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
]


@dataclass(frozen=True)
class OptimizerSettings(Settings):
    """Optimiser"""

    optim: Literal["adamw", "muon"] = setting(
        "adamw", "muon: Muon for the blocks' matrices, AdamW for the rest"
    )
    learning_rate: float = setting(1e-3, "peak learning rate of AdamW", ge=0)
    vector_learning_rate: float | None = setting(
        None,
        "peak learning rate of AdamW for norms, biases and learned positions; default: learning_rate",
        ge=0,
    )
    muon_learning_rate: float = setting(0.02, "peak learning rate of Muon", ge=0)
    muon_momentum: float = setting(0.95, "momentum of Muon; runs of few steps want less", ge=0, lt=1)
    muon_residual_scale: float = setting(
        1.0,
        "factor on Muon's rate for the matrices that end a residual branch (c_proj of NanoGPT's blocks; not of adapters)",
        ge=0,
    )
    weight_decay: float = setting(0.1, "decay of matrices (norms and biases have none)", ge=0)
    adam_beta1: float = setting(0.9, "decay of AdamW's first moment", ge=0, lt=1)
    adam_beta2: float = setting(0.99, "decay of AdamW's second moment", ge=0, lt=1)
    adam_epsilon: float = setting(1e-8, "AdamW's epsilon", ge=0)
    max_grad_norm: float = setting(1.0, "clip the gradient to this norm; 0 does not clip", ge=0)
    lr_scheduler_type: Schedule = setting(
        "linear", "schedule after warm-up, as transformers names it (linear: to zero)"
    )
    warmup_steps: float = setting(
        100, "steps of linear warm-up, at most half of the run; less than 1: this part of the run", ge=0
    )


@dataclass(frozen=True)
class HardwareSettings(Settings):
    """Hardware"""

    use_cpu: bool = setting(False, "do not use a GPU")
    bf16: bool | None = setting(
        None, "bfloat16 autocast; default: where the hardware is faster in it", excludes=["fp16"]
    )
    fp16: bool = setting(False, "float16 autocast, for GPUs without bfloat16")
    torch_compile: bool | None = setting(None, "compile the model; default: on CUDA")
    torch_compile_backend: str = setting("inductor", "backend of torch.compile")
    auto_find_batch_size: bool = setting(
        False, "out of memory: halve the micro-batch and double the accumulation"
    )


Tracker = Literal[
    "trackio", "tensorboard", "wandb", "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab"
]
CheckpointFormat = Literal["auto", "gpt2", "qwen3", "llama", "nanogpt"]
Format = Literal[CheckpointFormat, "gguf", "onnx"]  # with what share.py makes of a checkpoint


@dataclass(frozen=True)
class SharingSettings(Settings):
    """Sharing"""

    report_to: list[Tracker] = setting([], f"trackers: {', '.join(get_args(Tracker))}")
    push_to_hub: bool = setting(False, "upload the run's best model when training has ended")
    hub_model_id: str | None = setting(
        None, "name on the Hub, NAME or OWNER/NAME; default: the run folder's name"
    )
    hub_private_repo: bool = setting(False, "make the Hub repository private")
    hub_format: CheckpointFormat = setting("auto", "checkpoint format on the Hub")


@dataclass(frozen=True)
class AdapterSettings(Settings):
    """Adapter"""

    full: bool = setting(False, "train all weights instead of an adapter", essential=True)
    lora_r: int = setting(64, "rank of the adapter", ge=1)
    lora_alpha: float = setting(128, "the adapter's output is scaled by lora_alpha / lora_r", gt=0)
    lora_dropout: float = setting(0.1, "dropout before the adapter", ge=0, lt=1)
    target_modules: list[str] = setting(["all"], "what is adapted: attention, mlp, all, or names of modules")
    use_dora: bool = setting(False, "DoRA: train the length of the weights apart from their direction")
    use_rslora: bool = setting(False, "rsLoRA: scale by lora_alpha / sqrt(lora_r) instead")
    extend_vocabulary: int = setting(0, "add this many subwords of the corpus to the base's tokenizer", ge=0)
    merge: bool = setting(
        False, "at the end, write OUTPUT_DIR/merged: a plain checkpoint, and push that instead of the adapter"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.full and self.merge:
            raise UserError(
                "--merge puts an adapter into its base, and --full trains none: leave it out, and for a plain checkpoint "
                f"give the run to {command('share')}."
            )


@dataclass(frozen=True)
class RunSettings(
    SharingSettings, HardwareSettings, OptimizerSettings, LengthSettings, BaseSettings, DataSettings
):
    """What every run has. Named as in transformers' TrainingArguments and GPT2Config wherever those have one."""

    BEFORE: ClassVar[dict[str, Any]] = DataSettings.BEFORE | {
        "vector_learning_rate": None, "muon_residual_scale": 1.0
    }  # fmt: skip

    def folder(self) -> str:
        """The run folder, output_dir or the default."""
        raise NotImplementedError


@dataclass(frozen=True)
class TrainingSettings(RunSettings, ModelSettings, TokenizerSettings):
    """Settings of pretraining."""

    dropout: float | None = changed(
        BaseSettings,
        "dropout",
        None,
        help="sets resid_pdrop, embd_pdrop and attn_pdrop together; where no default stands here: 0, and in a run that "
        "reads its text more than 4 times 0.007 for each time, up to 0.3 (by a guess of the speed where --max_minutes "
        "alone says how long)",
    )

    BEFORE: ClassVar[dict[str, Any]] = RunSettings.BEFORE | {"rdrop_alpha": 0.0, "short_positions": None}

    def folder(self) -> str:
        return self.output_dir or default_folder(self.corpus, self.tokenizer)


@dataclass(frozen=True)
class FinetuningSettings(AdapterSettings, RunSettings):
    """Settings of fine-tuning: a run's, and those of the adapter, named as in peft's LoraConfig.

    Attributes:
        DECIDES: settings of a kind of tuning that must be the same for a run to go on.
    """

    DECIDES: ClassVar[tuple[str, ...]] = ()
    RETIRED = (
        *("tokenizer", "vocab_size", "pad_to_multiple_of", "preset", "architecture"),
        *("n_layer", "n_head", "n_embd", "n_inner", "load_in_4bit", "load_in_8bit"),
    )

    corpus: str = changed(DataSettings, "corpus", "tiny_pushkin")
    model_name_or_path: str | None = changed(
        BaseSettings, "model_name_or_path", "openai-community/gpt2", help="the base, a folder or a Hub id"
    )
    num_train_epochs: float | None = changed(LengthSettings, "num_train_epochs", 3.0)
    max_steps: int | None = changed(LengthSettings, "max_steps", None)
    per_device_train_batch_size: int = changed(LengthSettings, "per_device_train_batch_size", 8)
    weight_decay: float = changed(OptimizerSettings, "weight_decay", 0.0)
    warmup_steps: float = changed(OptimizerSettings, "warmup_steps", 20)
    eval_steps: int = changed(LengthSettings, "eval_steps", 50)
    eval_on_start: bool = changed(LengthSettings, "eval_on_start", True)
    save_steps: int = changed(LengthSettings, "save_steps", 100)
    early_stopping_patience: int | None = changed(LengthSettings, "early_stopping_patience", 5)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model_name_or_path:
            raise UserError("--model_name_or_path is missing: give the base, a folder or a Hub id.")

    def folder(self) -> str:
        kind = "full" if self.full else "lora"
        return self.output_dir or default_folder(self.corpus, self.model_name_or_path or "", kind)


def default_folder(corpus: str, *parts: str) -> str:
    """Where a run goes that was given no folder: runs/CORPUS-PART-…"""
    return str(Path("runs") / as_file_name(short_name(corpus), *(Path(part).name for part in parts)))


def short_name(corpus: str) -> str:
    """What to call things that are made of a corpus: its last part that is no pattern, without its suffix."""
    plain = [part for part in Path(corpus).parts if not set("*?[/") & set(part)]
    return Path(plain[-1]).stem if plain else "corpus"


def as_file_name(*parts: str) -> str:
    return re.sub(r"[^\w.-]+", "-", "-".join(parts))


def public_values(settings: Settings) -> dict[str, Any]:
    """All settings as they may be stored and shown: no path of the user's home."""
    values = asdict(settings)
    return {name: without_home(value) if isinstance(value, str) else value for name, value in values.items()}
