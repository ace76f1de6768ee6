"""A page that writes in the visitor's browser: one HTML file with the model and transformers.js beside it, no server
behind it. The folder is the content of a static Space, too."""

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import SpaceCard, SpaceCardData
from jinja2 import Environment, StrictUndefined

from ..common.files import MANIFEST, files_written_whole
from ..common.text import printable
from .export import export_run
from .model_card import count_parameters, first_words, name_of, read_run, read_samples
from .transformers_js import FILES, find_transformers_js

TEMPLATE = Path(__file__).with_name("static_page.html")
LARGEST_FLOAT = 64e6  # bytes; a graph that is larger travels in 8 bits, which change the text a little
README = """
# {title}

A model that writes in the visitor's browser, by [transformers.js](https://github.com/huggingface/transformers.js). The
folder is complete: `lib/` holds {libraries} (Apache-2.0 and MIT).

```bash
python -m http.server --bind 127.0.0.1                   # in this folder, then open http://127.0.0.1:8000
hf repos create NAME --type space --space-sdk static     # or put it on the Hub
hf upload NAME . --type space
```
"""


def write_page(folder: str | os.PathLike, target: str | os.PathLike) -> None:
    """The best model of a run folder, or any checkpoint of ours, as a page; an adapter merged into its base.

    index.html, README.md with a Space's metadata, model/ (config, tokenizer and graph) and lib/ (transformers.js).

    Raises:
        UserError: as export_run with format onnx, or transformers.js is not to be had.
    """
    folder, target = Path(folder), Path(target)
    libraries = find_transformers_js()
    with TemporaryDirectory() as temporary, files_written_whole(target) as page:
        exported = Path(temporary) / "model"
        export_run(folder, exported, "onnx", merge=True)
        (page / "lib").mkdir()
        for path in libraries:
            shutil.copy(path, page / "lib")
        (page / "model" / "onnx").mkdir(parents=True)
        graph, dtype = exported / "onnx" / "model.onnx", "fp32"
        if graph.stat().st_size > LARGEST_FLOAT:
            graph, dtype = graph.with_name("model_quantized.onnx"), "q8"
        shutil.copy(graph, page / "model" / "onnx")
        for path in exported.glob("*.json"):
            if path.name != MANIFEST:
                shutil.copy(path, page / "model")
        title = printable(folder.resolve().name)
        values = _words(folder, exported) | {"title": title, "dtype": dtype}
        template = Environment(autoescape=True, undefined=StrictUndefined).from_string(
            TEMPLATE.read_text(encoding="utf-8")
        )
        (page / "index.html").write_text(template.render(values), encoding="utf-8")
        data = SpaceCardData(title=title, emoji="🪶", colorFrom="red", colorTo="yellow", sdk="static")
        words = README.format(title=title, libraries=" and ".join(f"`{package}`" for package in FILES))
        SpaceCard(f"---\n{data.to_yaml()}\n---\n{words}").save(page / "README.md")


def _words(folder: Path, exported: Path) -> dict[str, str | None]:
    """What the page says of a model: whatever its run folder knows."""
    settings = read_run(folder / "run.yaml")
    corpus = (settings.get("record") or {}).get("corpus") or {}
    samples = read_samples(folder / "samples.txt")
    description = f"A GPT of {count_parameters(exported) / 1e6:.2f}M parameters"
    if corpus:
        description += f", trained on {printable(name_of(corpus))}"
    return {
        "description": f"{description}.",
        "lang": corpus.get("language"),
        "prompt": first_words(samples, settings),
        "sample": samples.split("\n---\n")[0].strip("\n"),
    }
