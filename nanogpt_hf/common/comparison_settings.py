"""Settings of a comparison of models, or of runs."""

from dataclasses import dataclass
from typing import Literal

from .errors import UserError
from .fields import changed, setting
from .settings import TextSettings

FILES = ("results.md", "results.json", "surprisal.html", "verse.html")


@dataclass(frozen=True)
class ComparisonSettings(TextSettings):
    """Settings"""

    validation_split_percentage: int | None = changed(  # type: ignore[assignment]  # None: it depends on the corpus
        TextSettings,
        "validation_split_percentage",
        None,
        help="percent of the text, at the end of each file, that is measured; default: all of it, or the validation "
        "split of a named corpus and of what has one of its own",
        bounds={"ge": 1, "le": 100},
    )
    runs: list[str] = setting(
        [], "run folders to list, as runs/*", essential=True, excludes=["model", "output_dir", "verse"]
    )
    model: list[str] = setting([], "folders or Hub ids to measure", essential=True)
    output_dir: str | None = setting(
        None,
        "folder for results.md, results.json, surprisal.html and, with --verse, verse.html",
        essential=True,
    )
    n_positions: int | None = setting(None, "context in tokens; default: each model's own, up to 2,048", ge=1)
    stride: int | None = setting(
        None, "tokens from one window to the next; default: the context, no overlap", ge=1
    )
    per_device_eval_batch_size: int | None = setting(
        None, "windows at once; does not change the result", ge=1
    )
    verse: Literal["onegin", "sonnet"] | None = setting(
        None, "have each model write 100 stanzas of this form (or --samples), and scan their metre and rhyme"
    )
    samples: int = setting(
        0, "texts to sample from each model, to see what is copied and how varied they are", ge=0
    )
    sample_length: int = setting(1000, "characters of each sample", ge=1)
    temperature: float = setting(0.8, "of the samples", ge=0)
    seed: int = setting(1337, "of the samples", ge=0, lt=2**32)
    passage_start: int = setting(
        0, "characters into the validation text where the page of surprisal begins", ge=0
    )
    passage_length: int = setting(900, "characters of that page", ge=1)
    overwrite_output_dir: bool = setting(False, "replace these files in the folder")
    use_cpu: bool = setting(False, "do not use a GPU")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model and not self.runs:
            raise UserError("there is nothing to compare: give run folders, or models with --model.")
