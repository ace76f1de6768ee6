"""Give a trained model away: on the Hub, or as a folder that other tools read.

    python recipes/share.py --model runs/tiny_shakespeare-char --hub_model_id my-name/shakespeare
    python recipes/share.py --model runs/tiny_shakespeare-char --hub_model_id shakespeare --hub_private_repo
    python recipes/share.py --model runs/tiny_shakespeare-char --output_dir plain
    python recipes/share.py --model runs/my_adapter --merge --output_dir plain
    python recipes/share.py --model runs/tiny_shakespeare-char --hub_format gguf --output_dir shakespeare-gguf
    python recipes/share.py --model runs/tiny_shakespeare-char --page page
    python recipes/share.py --model runs/tiny_shakespeare-char --space my-space --push_to_hub
    python recipes/share.py --from_nanogpt out-shakespeare-char --output_dir runs/from_nanogpt

The model is written as an ordinary GPT-2, Qwen3 or Llama checkpoint, which needs no code of this project, or as a GGUF for
llama.cpp, Ollama and LM Studio, or as ONNX for transformers.js; an adapter as it is, or with --merge as the whole
model. Uploading needs a token: `hf auth login`. Doing it again sends only what has changed. --page makes a folder with a
page that writes in the visitor's browser, for any web server or a static Space; --space the page of play.py as a Gradio
Space, and --push_to_hub uploads that. The other way, a checkpoint of nanoGPT
becomes a run folder, with which all else here works.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanogpt_hf.common.cli import parse
from nanogpt_hf.common.errors import UserError
from nanogpt_hf.common.fields import Settings, setting
from nanogpt_hf.common.paths import check_folder, check_model_name, check_repo_id
from nanogpt_hf.common.running import run_recipe, tell
from nanogpt_hf.common.settings import Format


@dataclass(frozen=True)
class ShareSettings(Settings):
    """Sharing"""

    model: str | None = setting(
        None, "run folder, or any folder with a checkpoint of ours; for gguf any GPT-2, Qwen3 or Llama"
    )
    hub_model_id: str | None = setting(None, "upload to this name on the Hub, NAME or OWNER/NAME")
    hub_private_repo: bool = setting(False, "make the Hub repository private")
    hub_format: Format = setting("auto", "checkpoint format")
    quantization: Literal["f32", "bf16", "q8_0"] = setting("f32", "of the matrices of a GGUF")
    merge: bool = setting(False, "merge an adapter into its base")
    output_dir: str | None = setting(None, "write the checkpoint into this folder")
    page: str | None = setting(None, "write a page that runs the model in the browser into this folder")
    space: str | None = setting(None, "write the page of play.py as a Gradio Space into this folder")
    push_to_hub: bool = setting(False, "upload that Space, to --hub_model_id or by its folder's name")
    from_nanogpt: str | None = setting(None, "nanoGPT's out_dir, whose ckpt.pt to write into --output_dir")
    text: str | None = setting(None, "the text that nanoGPT's characters are from, if there is no meta.pkl")
    tokenizer: str = setting("openai-community/gpt2", "that nanoGPT's subwords are from, a folder or Hub id")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.from_nanogpt and (self.model or self.hub_model_id or not self.output_dir):
            raise UserError(
                "--from_nanogpt goes with --output_dir alone: write the run folder first, then share it."
            )
        if self.model is None and self.from_nanogpt is None:
            raise UserError("--model is missing: give a run folder.")
        if not (self.hub_model_id or self.output_dir or self.page or self.space):
            raise UserError("there is nothing to do: give --hub_model_id, --output_dir, --page or --space.")
        if self.push_to_hub and not self.space:
            raise UserError("--push_to_hub uploads what --space writes: give a folder for it.")
        if self.quantization != "f32" and self.hub_format != "gguf":
            raise UserError(f"--quantization {self.quantization} is of a GGUF: add --hub_format gguf.")
        for flag, folder in (
            ("--output_dir", self.output_dir),
            ("--page", self.page),
            ("--space", self.space),
        ):
            if folder and Path(folder).is_file():
                raise UserError(f"{flag} {folder} is a file: give a folder.")
            if folder and Path(folder).is_dir() and any(Path(folder).iterdir()):
                raise UserError(f"{flag} {folder} is not empty: choose another folder.")


def main() -> None:
    settings = parse(ShareSettings, __doc__)
    check_folder(settings.from_nanogpt or settings.model)
    if settings.hub_model_id:
        check_repo_id(settings.hub_model_id)
    if settings.from_nanogpt:
        check_model_name(settings.tokenizer)
    from nanogpt_hf.sharing.export import base_of, export_run  # with torch, which takes seconds
    from nanogpt_hf.sharing.hub import check_push, push, push_space
    from nanogpt_hf.sharing.nanogpt_import import import_nanogpt
    from nanogpt_hf.sharing.space import write_space
    from nanogpt_hf.sharing.static_page import write_page

    if settings.from_nanogpt:
        import_nanogpt(settings.from_nanogpt, settings.output_dir, settings.text, settings.tokenizer)
        tell(f"written to {settings.output_dir}")
        return
    name = settings.hub_model_id or (Path(settings.space).resolve().name if settings.push_to_hub else None)
    if name:
        kind = "space" if settings.push_to_hub else "model"
        check_push(name, settings.hub_private_repo, repo_type=kind)
    if settings.output_dir:
        export_run(
            settings.model,
            settings.output_dir,
            settings.hub_format,
            merge=settings.merge,
            quantization=settings.quantization,
        )
        tell(f"written to {settings.output_dir}")
        if (Path(settings.output_dir) / "adapter_config.json").exists() and base_of(Path(settings.model))[1]:
            base = base_of(Path(settings.model))[0]
            tell(
                f"NOTE: it is an adapter on the folder {base}, without which nobody can use it; --merge writes both as one."
            )
    if settings.page:
        write_page(settings.model, settings.page)
        tell(
            f"a page in {settings.page}; look at it: python -m http.server --bind 127.0.0.1 -d {settings.page}"
        )
    if settings.space:
        write_space(settings.model, settings.space)
        tell(f"a Space in {settings.space}; start it here: python {Path(settings.space) / 'app.py'}")
    if settings.push_to_hub:
        tell(f"shared at {push_space(settings.space, name, private=settings.hub_private_repo)}")
    elif settings.hub_model_id:
        options = {
            "private": settings.hub_private_repo,
            "format": settings.hub_format,
            "merge": settings.merge,
            "quantization": settings.quantization,
        }
        tell(f"shared at {push(settings.model, settings.hub_model_id, **options)}")


if __name__ == "__main__":
    run_recipe(main)
