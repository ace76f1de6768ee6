"""A page that writes in the visitor's browser: one HTML file with the model and transformers.js beside it, no server
behind it. The folder is the content of a static Space, too."""

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import SpaceCard, SpaceCardData
from jinja2 import Environment, StrictUndefined

from ..common.files import files_written_whole
from ..common.text import printable
from .export import export_run
from .model_card import read_run, read_samples
from .transformers_js import find_transformers_js

TEMPLATE = Path(__file__).with_name("static_page.html")
MODEL_FILES = "config.json generation_config.json tokenizer.json tokenizer_config.json".split()
