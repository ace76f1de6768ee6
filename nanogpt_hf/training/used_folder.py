"""What lies in the folder of a run before it begins, looked at before torch is imported, which takes seconds."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..common.errors import UserError
from ..common.files import MANIFEST, UNFINISHED
from ..common.settings import RunSettings

# What a run makes beside run.yaml; --overwrite_output_dir deletes these and nothing else.
MADE_BY_A_RUN = (
    "checkpoints trackers wandb README.md metrics.jsonl loss_curve.png samples.txt config.json generation_config.json "
    "model.safetensors adapter_config.json adapter_model.safetensors tokenizer.json tokenizer_config.json "
    "special_tokens_map.json configuration_nanogpt.py modeling_nanogpt.py samples_before.txt merged progress.json "
    f"chat_template.jinja verse.json verse.md {MANIFEST}"
).split()


def check_usable(settings: RunSettings) -> bool:
    """Whether there is something in the run folder already, which these settings go on with or overwrite.

    Raises:
        UserError: they do neither, or the folder cannot be used.
    """
    folder = Path(settings.folder())
    with readable(folder):
        used = check_folder(folder, settings.overwrite_output_dir)
        if settings.overwrite_output_dir and settings.model_name_or_path:
            check_base_stays(Path(settings.model_name_or_path), folder)
    if used and settings.resume_from_checkpoint is None and not settings.overwrite_output_dir:
        raise UserError(
            f"--output_dir {folder} is not empty: go on with --resume_from_checkpoint last, replace it with "
            "--overwrite_output_dir, or choose another folder."
        )
    return used


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--output_dir {folder} cannot be read ({error.strerror}): give another folder."
        ) from error


def check_folder(folder: Path, overwrite: bool) -> bool:
    """Whether there is something in the folder.

    Raises:
        UserError: it is no folder, leads elsewhere, or overwriting it would delete what no run has made.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file: give a folder.")
    if (folder / "checkpoints").is_symlink() and not overwrite:
        raise UserError(
            f"{folder / 'checkpoints'} is a symbolic link: put the folder itself there, or let --output_dir be on "
            "the other disk."
        )
    made = [name for name in MADE_BY_A_RUN if (folder / name).exists()]
    if overwrite and made and not (folder / "run.yaml").exists():
        raise UserError(
            f"--output_dir {folder} holds {made[0]} but no run.yaml, so no run has made it: it is not overwritten, "
            "choose another folder."
        )
    return folder.exists() and any(not path.name.startswith(UNFINISHED) for path in folder.iterdir())


def check_base_stays(base: Path, folder: Path) -> None:
    """Raises UserError when to overwrite the folder would delete the base that the run starts from."""
    base, folder = base.resolve(), folder.resolve()
    deleted = {folder / name for name in MADE_BY_A_RUN}
    if base == folder or deleted & {base, *base.parents}:
        raise UserError(
            f"--overwrite_output_dir would delete the base {base.name}: give another --output_dir."
        )
