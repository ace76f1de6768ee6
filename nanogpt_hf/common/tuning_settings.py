"""Settings of the second stage: completions, rewards, preferences; each is a fine-tuning with a group of its own."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from .errors import UserError
from .fields import Settings, changed, setting
from .settings import (
    AdapterSettings,
    BaseSettings,
    DataSettings,
    FinetuningSettings,
    LengthSettings,
    OptimizerSettings,
    Schedule,
    default_folder,
)


@dataclass(frozen=True)
class RewardGroup(Settings):
    """Rewards"""

    reward: list[str] = setting(
        ["metre", "rhyme", "lines"],
        "metre, feet (how near a line comes to the metre), endings (feminine and masculine, where the scheme has both), "
        "rhyme, lines (as many as the form has), or module:function, a function of a text to a number",
        essential=True,
    )
    reward_weights: list[float] = setting([], "their weights, in the same order; default: all the same")
    guards: list[str] = setting(
        ["originality", "variety", "spelling"],
        "what a line's worth is multiplied with: against copies, repetition, words that are made up and, with stresses, "
        "lines of short words, which are in any metre (for onegin the recipe takes all four)",
    )
    form: Literal["onegin", "sonnet"] = setting("onegin", "what the poems are to be")
    foot: str | None = setting(None, "iamb, trochee, dactyl, amphibrach or anapaest instead of the form's")
    feet: int | None = setting(None, "feet of a line instead of the form's", ge=1)
    scheme: str | None = setting(
        None, "rhymes instead of the form's, as in 'abab'; upper case wants a feminine end"
    )
    lines: int | None = setting(
        None, "lines of a text, the given one among them; default: the form's; fewer are written faster", ge=2
    )
    num_generations: int = setting(16, "texts for one prompt, that are compared with each other", ge=2)
    drill_steps: float = setting(
        0.5,
        "steps at the start (below 1: this share of the run) that are drills in rhyme: stanzas of the corpus in which other "
        "words rhyme each time; afterwards one step in three is one; 0: no drills",
        ge=0,
    )
    temperature: float = setting(0.8, "at which they are written", gt=0)
    beta: float = setting(0.02, "weight of the divergence from the model at the start (KL)", ge=0)
    text_coef: float = setting(
        0.3, "weight of what is forgotten of the corpus (KL), which keeps the language", ge=0
    )
    eval_texts: int = setting(64, "texts that an evaluation looks at", ge=1)
    table_texts: int = setting(500, "texts of the table before and after; 0: no table", ge=0)
    reward_processes: int | None = setting(None, "that scan texts; default: the cores that are left", ge=0)


@dataclass(frozen=True)
class TuningSettings(FinetuningSettings):
    """Settings of the second stage; all weights train unless --full false asks for an adapter."""

    KIND: ClassVar[str] = "tuned"

    model_name_or_path: str | None = changed(
        BaseSettings, "model_name_or_path", None, help="the model to tune, a folder or a Hub id"
    )
    full: bool = changed(AdapterSettings, "full", True)
    lora_r: int = changed(AdapterSettings, "lora_r", 16)
    lora_alpha: float = changed(AdapterSettings, "lora_alpha", 32)
    lora_dropout: float = changed(AdapterSettings, "lora_dropout", 0.0)
    num_train_epochs: float | None = changed(LengthSettings, "num_train_epochs", None)
    dropout: float | None = changed(BaseSettings, "dropout", 0.0)
    early_stopping_patience: int | None = changed(LengthSettings, "early_stopping_patience", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_steps is None and self.num_train_epochs is None and self.train_tokens is None:
            raise UserError(
                "the run has no number of steps: give --max_steps or --num_train_epochs; --max_minutes only cuts it short."
            )

    def folder(self) -> str:
        return self.output_dir or default_folder(self.corpus, self.model_name_or_path or "", self.KIND)


@dataclass(frozen=True)
class RewardSettings(RewardGroup, TuningSettings):
    """Settings of tuning by rewards."""

    KIND = "verse"
    BEFORE = TuningSettings.BEFORE | {"drill_steps": 0}
    DECIDES = (
        *("reward", "reward_weights", "guards", "form", "foot", "feet", "scheme", "lines"),
        *("num_generations", "temperature", "beta", "text_coef", "drill_steps"),
    )

    corpus: str = changed(DataSettings, "corpus", "tiny_pushkin")
    max_steps: int | None = changed(LengthSettings, "max_steps", 1240)
    per_device_train_batch_size: int = changed(LengthSettings, "per_device_train_batch_size", 128)
    gradient_accumulation_steps: int = changed(LengthSettings, "gradient_accumulation_steps", 1)
    optim: Literal["adamw", "muon"] = changed(OptimizerSettings, "optim", "muon")
    muon_learning_rate: float = changed(OptimizerSettings, "muon_learning_rate", 0.01)
    learning_rate: float = changed(OptimizerSettings, "learning_rate", 1e-3)
    lr_scheduler_type: Schedule = changed(OptimizerSettings, "lr_scheduler_type", "warmup_stable_decay")
    warmup_steps: float = changed(OptimizerSettings, "warmup_steps", 10)
    logging_steps: int = changed(LengthSettings, "logging_steps", 5)
    eval_steps: int = changed(LengthSettings, "eval_steps", 310)
    save_steps: int = changed(LengthSettings, "save_steps", 310)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward_weights and len(self.reward_weights) != len(self.reward):
            raise UserError(
                f"--reward names {len(self.reward)} rewards and --reward_weights gives {len(self.reward_weights)} weights: "
                "give one for each."
            )
        if self.per_device_train_batch_size % self.num_generations:
            raise UserError(
                f"--per_device_train_batch_size {self.per_device_train_batch_size} is not a multiple of "
                f"--num_generations {self.num_generations}: the texts of a prompt are compared with each other."
            )

    def weights(self) -> dict[str, float]:
        """Of each reward."""
        return dict(zip(self.reward, self.reward_weights or [1.0] * len(self.reward), strict=True))


@dataclass(frozen=True)
class CompletionSettings(TuningSettings):
    """Settings of tuning on completions (SFT)."""

    KIND = "sft"

    corpus: str = changed(
        DataSettings,
        "corpus",
        "dialogues.jsonl",
        help="a .jsonl file or a Hub dataset: messages, prompt and completion, or instruction and output",
    )
    max_steps: int | None = changed(LengthSettings, "max_steps", None)
    num_train_epochs: float | None = changed(LengthSettings, "num_train_epochs", 3.0)
    learning_rate: float = changed(OptimizerSettings, "learning_rate", 5e-4)


@dataclass(frozen=True)
class PreferenceSettings(TuningSettings):
    """Settings of tuning on preferences (DPO)."""

    KIND = "dpo"
    DECIDES = ("dpo_beta",)

    corpus: str = changed(
        DataSettings,
        "corpus",
        "preferences.jsonl",
        help="a .jsonl file or a Hub dataset with prompt, chosen and rejected",
    )
    dpo_beta: float = setting(0.1, "how dear it is to leave the model at the start", gt=0)
    max_steps: int | None = changed(LengthSettings, "max_steps", 100)
    learning_rate: float = changed(OptimizerSettings, "learning_rate", 1e-4)
    eval_steps: int = changed(LengthSettings, "eval_steps", 25)
