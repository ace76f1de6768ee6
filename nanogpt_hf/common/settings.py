"""Every setting of a training run."""

import os
from dataclasses import asdict, dataclass, field
from typing import Literal

from .errors import UserError
from .text import without_home


def setting(default, help: str):
    """A dataclass field whose help text is shown by --help."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class TrainingSettings:
    """Settings of a run. Named as in transformers' TrainingArguments and GPT2Config wherever those have one."""

    # Text
    corpus: str = setting(
        "tiny_shakespeare", "tiny_shakespeare, tiny_pushkin, a file, folder or glob, or a Hub dataset"
    )
    text_column: str = setting("text", "column of a .jsonl, .parquet or Hub dataset that holds the text")
    validation_split_percentage: int = setting(10, "percent of the text, at its end, kept for validation")
    document_end: str | None = setting(
        None, "regular expression: a document ends after each match, so that a model learns where to stop"
    )
    tokenizer: str = setting("char", "char or bpe (trained on the corpus), a tokenizer's folder, or a Hub id")
    vocab_size: int = setting(1024, "tokens of a bpe tokenizer trained here")
    pad_to_multiple_of: int = setting(64, "round the model's vocabulary up to a multiple of this")

    # Model
    model_name_or_path: str | None = setting(
        None, "start from this checkpoint (folder or Hub id), its tokenizer included"
    )
    preset: str | None = setting(None, "named size: cpu, baby, gpt2 … gpt2-xl, gpt3-small … gpt3-175b")
    architecture: Literal["gpt2", "modern"] | None = setting(None, "gpt2: GPT-2's block; modern: Qwen3's")
    n_layer: int | None = setting(None, "blocks")
    n_head: int | None = setting(None, "attention heads")
    n_embd: int | None = setting(None, "width, in channels")
    n_inner: int | None = setting(None, "width of the MLP's hidden layer")
    n_positions: int | None = setting(None, "context length, in tokens")
    dropout: float | None = setting(None, "sets resid_pdrop, embd_pdrop and attn_pdrop together")
    resid_pdrop: float | None = setting(None, "dropout at the end of every residual branch")
    embd_pdrop: float | None = setting(None, "dropout after the embeddings")
    attn_pdrop: float | None = setting(None, "dropout of the attention weights")
    attn_implementation: Literal["sdpa", "eager"] = setting(
        "sdpa", "attention kernel: torch's fused one, or plain matmuls"
    )
    gradient_checkpointing: bool = setting(
        False, "recompute activations in the backward pass: less memory, slower"
    )

    # Run folder
    output_dir: str | None = setting(None, "run folder; default runs/CORPUS-TOKENIZER")
    overwrite_output_dir: bool = setting(False, "replace the run that is in the folder")
    resume_from_checkpoint: str | None = setting(
        None, "'last', or a checkpoint folder: go on from there, exactly"
    )

    # Length and batches
    max_steps: int = setting(2000, "optimiser steps")
    max_minutes: float | None = setting(None, "stop after this many minutes, with a checkpoint")
    per_device_train_batch_size: int = setting(32, "sequences a device and micro-batch")
    gradient_accumulation_steps: int = setting(1, "micro-batches a step")
    per_device_eval_batch_size: int = setting(
        64, "sequences a device in evaluation, fewer where the vocabulary is large; does not change the loss"
    )

    # Optimiser
    optim: Literal["adamw", "muon"] = setting(
        "adamw", "muon: Muon for the blocks' matrices, AdamW for the rest"
    )
    learning_rate: float = setting(1e-3, "peak learning rate of AdamW")
    muon_learning_rate: float = setting(0.02, "peak learning rate of Muon")
    muon_momentum: float = setting(0.95, "momentum of Muon; less suits runs of few steps")
    weight_decay: float = setting(0.1, "decay of matrices (norms and biases have none)")
    adam_beta1: float = setting(0.9, "decay of AdamW's first moment")
    adam_beta2: float = setting(0.99, "decay of AdamW's second moment")
    adam_epsilon: float = setting(1e-8, "AdamW's epsilon")
    max_grad_norm: float = setting(1.0, "clip the gradient to this norm; 0 does not clip")
    lr_scheduler_type: str = setting(
        "linear", "schedule after warm-up, as transformers names it (linear: to zero)"
    )
    warmup_steps: int = setting(100, "steps of linear warm-up")

    # Rhythm
    logging_steps: int = setting(10, "steps between two lines of metrics.jsonl")
    eval_steps: int = setting(250, "steps between two evaluations of the whole validation split")
    eval_on_start: bool = setting(False, "evaluate before the first step too")
    save_steps: int = setting(500, "steps between two checkpoints")
    save_total_limit: int = setting(2, "checkpoints kept (the best model is kept beside them)")
    early_stopping_patience: int | None = setting(
        None, "stop after so many evaluations without a better loss"
    )
    seed: int = setting(1337, "decides initial weights, order of the batches and dropout")

    # Hardware
    use_cpu: bool = setting(False, "do not use a GPU")
    bf16: bool | None = setting(None, "bfloat16 autocast; default: where the GPU has it")
    fp16: bool = setting(False, "float16 autocast, for GPUs without bfloat16")
    torch_compile: bool | None = setting(None, "compile the model; default: on CUDA")
    torch_compile_backend: str = setting("inductor", "backend of torch.compile")
    auto_find_batch_size: bool = setting(
        False, "out of memory: halve the micro-batch and double the accumulation"
    )

    # Sharing
    report_to: list[str] = setting([], "trackers: trackio, tensorboard, wandb, … (what accelerate knows)")
    push_to_hub: bool = setting(False, "upload the run's best model when training has ended")
    hub_model_id: str | None = setting(
        None, "name on the Hub, NAME or OWNER/NAME; default: the run folder's name"
    )
    hub_private_repo: bool = setting(False, "make the Hub repository private")
    hub_format: Literal["auto", "gpt2", "qwen3", "nanogpt"] = setting("auto", "checkpoint format on the Hub")

    def __post_init__(self):
        for name in (
            "n_positions vocab_size pad_to_multiple_of max_steps per_device_train_batch_size gradient_accumulation_steps "
            "per_device_eval_batch_size logging_steps eval_steps save_steps save_total_limit"
        ).split():
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}, it must be at least 1.")
        for name in (
            "warmup_steps",
            "max_grad_norm",
            "weight_decay",
            "learning_rate",
            "muon_learning_rate",
            "seed",
        ):
            if not getattr(self, name) >= 0:
                raise UserError(f"--{name} is {getattr(self, name)}, it must not be negative.")
        for name in ("adam_beta1", "adam_beta2", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}, it must be at least 0 and less than 1.")
        if self.seed >= 2**32:
            raise UserError(f"--seed is {self.seed}, it must be less than {2**32}.")
        for name in ("max_minutes", "early_stopping_patience"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise UserError(f"--{name} is {getattr(self, name)}, it must be more than 0.")
        for name in ("output_dir", "resume_from_checkpoint", "tokenizer", "model_name_or_path"):
            if str(getattr(self, name)).startswith("~"):
                setattr(self, name, os.path.expanduser(getattr(self, name)))
        if self.bf16 and self.fp16:
            raise UserError("--bf16 and --fp16 exclude each other: give one of them.")
        if self.resume_from_checkpoint and self.overwrite_output_dir:
            raise UserError(
                "--resume_from_checkpoint and --overwrite_output_dir exclude each other: give one."
            )

    def given(self, *names: str) -> dict:
        """Those of the named settings that are not None."""
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass
class FinetuningSettings(TrainingSettings):
    """Settings of fine-tuning: a run's, and those of the adapter, named as in peft's LoraConfig."""

    corpus: str = setting(
        "tiny_pushkin", "tiny_shakespeare, tiny_pushkin, a file, folder or glob, or a Hub dataset"
    )
    model_name_or_path: str | None = setting(
        "openai-community/gpt2", "the base: any GPT-2-style checkpoint or one of ours, folder or Hub id"
    )
    output_dir: str | None = setting(None, "run folder; default runs/CORPUS-BASE-lora")
    n_positions: int | None = setting(None, "context to train with, in tokens; default: the base's")
    num_train_epochs: float = setting(3.0, "passes over the training split")
    max_steps: int | None = setting(None, "optimiser steps, instead of num_train_epochs")
    per_device_train_batch_size: int = setting(8, "sequences a device and micro-batch")
    learning_rate: float = setting(
        2e-3, "peak learning rate of AdamW; small bases bear more, --full bears less"
    )
    weight_decay: float = setting(0.0, "decay of matrices (norms and biases have none)")
    warmup_steps: int = setting(20, "steps of linear warm-up")
    eval_steps: int = setting(50, "steps between two evaluations of the whole validation split")
    eval_on_start: bool = setting(True, "evaluate before the first step too")
    save_steps: int = setting(100, "steps between two checkpoints")
    early_stopping_patience: int | None = setting(5, "stop after so many evaluations without a better loss")
    tokenizer: str = setting("", "not used: the base brings its own")

    # What trains
    full: bool = setting(False, "train all weights instead of an adapter")
    lora_r: int = setting(16, "rank of the adapter")
    lora_alpha: float = setting(32, "the adapter counts lora_alpha / lora_r times")
    lora_dropout: float = setting(0.0, "dropout before the adapter")
    target_modules: list[str] = setting(["all"], "what is adapted: attention, mlp, all, or names of modules")
    use_dora: bool = setting(False, "DoRA: train the length of the weights apart from their direction")
    use_rslora: bool = setting(False, "rsLoRA: the adapter counts lora_alpha / sqrt(lora_r) times")
    extend_vocabulary: int = setting(0, "add so many subwords of the corpus to the base's tokenizer")
    load_in_4bit: bool = setting(False, "keep the base in 4 bits (bitsandbytes, CUDA)")
    load_in_8bit: bool = setting(False, "keep the base in 8 bits (bitsandbytes, CUDA)")
    merge: bool = setting(
        False, "at the end, write OUTPUT_DIR/merged: a plain checkpoint, and push that instead of the adapter"
    )

    def __post_init__(self):
        super().__post_init__()
        for name, least in (("lora_r", 1), ("extend_vocabulary", 0), ("lora_dropout", 0)):
            if not getattr(self, name) >= least:
                raise UserError(f"--{name} is {getattr(self, name)}, it must be at least {least}.")
        for name in ("num_train_epochs", "lora_alpha"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"--{name} is {getattr(self, name)}, it must be more than 0.")
        if self.lora_dropout >= 1:
            raise UserError(f"--lora_dropout is {self.lora_dropout}, it must be less than 1.")
        if not self.model_name_or_path:
            raise UserError("--model_name_or_path is missing: give the base, a folder or a Hub id.")
        fixed = self.given(*"preset architecture n_layer n_head n_embd n_inner".split())
        if fixed or self.tokenizer:
            name = next(iter(fixed), "tokenizer")
            raise UserError(f"--{name} is set, but the base of a fine-tuning brings its own: leave it out.")
        if self.full and (self.load_in_4bit or self.load_in_8bit):
            raise UserError(
                "--full trains all weights, which --load_in_4bit and --load_in_8bit freeze: give one."
            )
        if self.full and self.merge:
            raise UserError(
                "--merge puts an adapter into its base, and --full trains none: leave it out, and give the run to "
                "recipes/share.py for a plain checkpoint."
            )
        if self.load_in_4bit and self.load_in_8bit:
            raise UserError("--load_in_4bit and --load_in_8bit exclude each other: give one of them.")


def public_values(settings) -> dict:
    """All settings as they may be stored and shown: no path of the user's home."""
    values = asdict(settings)
    return {name: without_home(value) if isinstance(value, str) else value for name, value in values.items()}
