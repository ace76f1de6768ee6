"""The page of `recipes/play.py` as a Gradio Space: a folder that starts with `python app.py`, on the Hub or here."""

import os
import re
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from huggingface_hub import SpaceCard, SpaceCardData

from ..common.errors import UserError
from ..common.files import files_written_whole
from ..common.text import printable
from .export import export_run

PACKAGE = Path(__file__).parents[1]
# What the page imports, and what marks verse where it is installed. Each brings its own requirements.
REQUIREMENTS = (
    "gradio torch transformers tokenizers accelerate safetensors huggingface_hub numpy regex pyyaml tqdm wrapt"
).split()
OF_VERSE = ("silero-stress", "pronouncing")
APP = '''"""The page of this Space; `python app.py` opens it on this machine."""

from pathlib import Path

from nanogpt_hf.generation.writer import Writer
from nanogpt_hf.runs.page import serve
from nanogpt_hf.training.hardware import device_for_writing

model = Path(__file__).parent / "model" / "{name}"
serve([Writer.load(str(model), *device_for_writing())])
'''
README = """
# {title}

A page to play with a small GPT: texts that stream, what each token surprised it, verse, and the run that made it. The
folder is complete: the model lies in `model/`, the code in `nanogpt_hf/`.

```bash
pip install -r requirements.txt && python app.py
```
"""


def write_space(folder: str | os.PathLike, target: str | os.PathLike) -> None:
    """The best model of a run folder, or any checkpoint of ours, with the page as a Space; an adapter merged.

    Raises:
        UserError: as export_run, or what the page needs is not installed.
    """
    needed = pins()
    title = printable(Path(folder).resolve().name)
    name = re.sub(r"[^\w.-]+", "-", title, flags=re.ASCII).strip(".-") or "model"
    with files_written_whole(Path(target)) as space:
        export_run(folder, space / "model" / name, merge=True)
        ignored = shutil.ignore_patterns("__pycache__", "recipes", "accelerate_configs")
        shutil.copytree(PACKAGE, space / "nanogpt_hf", ignore=ignored)
        (space / "app.py").write_text(APP.format(name=name), encoding="utf-8")
        (space / "requirements.txt").write_text("".join(f"{pin}\n" for pin in needed), encoding="utf-8")
        data = SpaceCardData(
            title=title,
            emoji="🪶",
            colorFrom="red",
            colorTo="yellow",
            sdk="gradio",
            sdk_version=version("gradio"),
            python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
            app_file="app.py",
        )
        SpaceCard(f"---\n{data.to_yaml()}\n---\n{README.format(title=title)}").save(space / "README.md")


def pins() -> list[str]:
    """The versions that are installed here, as pip takes them anywhere.

    Raises:
        UserError: what the page needs is not installed.
    """
    found = []
    for name in (*REQUIREMENTS, *OF_VERSE):
        try:
            found.append(
                f"{name}=={version(name).partition('+')[0]}"
            )  # a build of torch, as +cpu, is of one index
        except PackageNotFoundError as error:
            if name in REQUIREMENTS:
                raise UserError(f"the page needs {name}: pip install 'nanogpt_hf[play]'.") from error
    return found
