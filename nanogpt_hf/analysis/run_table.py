"""All runs in one table, the best first, with the settings in which they differ. Nothing is measured anew."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..common.errors import UserError
from ..common.running import tell
from ..common.tables import table
from ..common.text import first_line
from ..training.reporting import OF_TOKENS, loss_unit, read_metrics
from .comparison import short_names

# Settings that say where a run went, not what it was.
NOT_COMPARED = (
    "output_dir overwrite_output_dir resume_from_checkpoint report_to push_to_hub hub_model_id hub_private_repo hub_format"
).split()
COLUMNS = {
    "run": ("run", "{}"),
    "loss": ("nats/token", "{:.4f}"),
    "bits_per_character": ("bits/char", "{:.4f}"),
    "best_step": ("at step", "{:,}"),
    "step": ("of", "{:,}"),
    "minutes": ("minutes", "{:.1f}"),
}
PAGE = 100  # characters


def read_run(folder: Path, name: str) -> dict[str, Any]:
    """A row of the table, and the settings of the run.

    Args:
        name: to call the run by.

    Raises:
        UserError: the folder holds no run, or one that has measured nothing yet.
    """
    try:
        settings = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
        record = settings.pop("record")
        settings["corpus"] = f"{settings['corpus']} ({record['corpus']['sha256'][:6]})"
    except FileNotFoundError as error:
        raise UserError(f"{name} holds no run.yaml") from error
    except Exception as error:  # a damaged file has as many exceptions as it has keys
        raise UserError(f"{name} has a run.yaml that cannot be read ({first_line(error)})") from error
    rows = read_metrics(folder / "metrics.jsonl")
    measured = [row for row in rows if math.isfinite(row.get("eval_loss", math.nan))]
    if not measured:
        raise UserError(f"{name} has not been validated yet")
    best = min(measured, key=lambda row: row["eval_loss"])
    return {
        "run": name,
        "loss": best["eval_loss"] if loss_unit(best) == OF_TOKENS else math.nan,
        "bits_per_character": best.get("eval_bits_per_char", math.nan),
        "best_step": best["step"],
        "step": rows[-1]["step"],
        "minutes": rows[-1].get("elapsed_s", math.nan) / 60,
        "settings": {key: value for key, value in settings.items() if key not in NOT_COMPARED},
    }


def differences(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """The settings in which the runs differ, each with its value in every row."""
    names = dict.fromkeys(name for row in rows for name in row["settings"])
    spelt = {name: [str(row["settings"].get(name, "")) for row in rows] for name in names}
    return {name: values for name, values in spelt.items() if len(set(values)) > 1}


def run_table(rows: Sequence[dict[str, Any]], width: int = PAGE) -> str:
    """The runs, the best first, by the loss in a unit that tokenizers share.

    Args:
        rows: as `read_run` gives them.
        width: characters of a line. Settings that find no room in the table follow it.
    """
    rows = sorted(rows, key=lambda row: (row["bits_per_character"], row["loss"]))
    columns, beside = dict(COLUMNS), []
    for name, values in differences(rows).items():
        wider = columns | {name: (name, "{}")}
        shown = [row | {name: value} for row, value in zip(rows, values, strict=True)]
        if len(table(shown, wider).split("\n")[0]) <= width:
            rows, columns = shown, wider
        else:
            beside.append(name)
    lines = [f"\n{name}: " + _by_value(rows, name) for name in beside]
    note = "\nThe runs have read different texts: their losses do not compare.\n"
    texts = {row["settings"].get("corpus") for row in rows}
    return table(rows, columns) + "".join(lines) + "\n" * bool(lines) + (note if len(texts) > 1 else "")


def _by_value(rows: Sequence[dict[str, Any]], name: str) -> str:
    runs: dict[str, list[str]] = {}
    for row in rows:
        runs.setdefault(str(row["settings"].get(name, "")), []).append(row["run"])
    return "; ".join(f"{value or 'none'} ({', '.join(names)})" for value, names in runs.items())


def list_runs(names: Sequence[str]) -> None:
    """Print the table of run folders; what is no run is said and left out.

    Raises:
        UserError: none is a run.
    """
    rows = []
    folders = [name for name in names if Path(name).is_dir()]
    for name, folder in zip(short_names(folders), folders, strict=True) if folders else ():
        try:
            rows.append(read_run(Path(folder), name))
        except UserError as error:
            tell(f"left out: {error}")
    if not rows:
        raise UserError(f"none of {', '.join(names)} is the folder of a run: give run folders, as runs/*.")
    tell(run_table(rows).rstrip("\n"))
