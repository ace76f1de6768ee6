"""Open a page to play with models: texts that stream, two models side by side, surprisal, verse, the run's curve.

    python recipes/play.py runs/tiny_shakespeare-char                         # http://127.0.0.1:7860
    python recipes/play.py runs/tiny_shakespeare-char runs/tiny_shakespeare-bpe --server_port 8000
    python recipes/play.py openai-community/gpt2 --use_cpu

It needs gradio: pip install -c constraints.txt -e ".[play]"; to mark verse, the extra verse too. It listens on this
machine alone; --server_name 0.0.0.0 opens it to everybody who can reach the machine.
"""

from dataclasses import dataclass

from nanogpt_hf.common.cli import Values, parse
from nanogpt_hf.common.errors import UserError
from nanogpt_hf.common.fields import Settings, setting
from nanogpt_hf.common.paths import check_model_name
from nanogpt_hf.common.running import run_recipe


@dataclass(frozen=True)
class PlaySettings(Settings):
    """Settings"""

    model: list[str] = setting([], "folders or Hub ids, one or more", essential=True)
    server_name: str = setting("127.0.0.1", "address to listen on")
    server_port: int | None = setting(None, "port; default: the first free one from 7860", ge=1, lt=2**16)
    inbrowser: bool = setting(False, "open a browser")
    chat: bool | None = setting(
        None, "take prompts as messages; default: where the model has a chat template"
    )
    use_cpu: bool = setting(False, "leave a GPU alone")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise UserError("there is no model: give a run folder or a Hub id.")


def check(said: Values) -> None:
    """Raises UserError where a model that the user has named cannot be one."""
    for name in said.get("model", []):
        check_model_name(name)


def main() -> None:
    settings = parse(PlaySettings, __doc__, check=check, positional="model")
    from nanogpt_hf.generation.writer import Writer  # with torch, which takes seconds
    from nanogpt_hf.training.hardware import device_for_writing

    try:
        from nanogpt_hf.runs.page import serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UserError("the page needs gradio: pip install 'nanogpt_hf[play]'.") from error
    device = device_for_writing(settings.use_cpu)
    writers = [Writer.load(name, *device, settings.chat) for name in settings.model]
    serve(
        writers,
        server_name=settings.server_name,
        server_port=settings.server_port,
        inbrowser=settings.inbrowser,
    )


if __name__ == "__main__":
    run_recipe(main)
