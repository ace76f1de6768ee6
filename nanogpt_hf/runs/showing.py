"""What a person looks at of a model: its card, the loss curve of its run, and what it writes."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..common.errors import UserError
from ..common.files import written_if_possible
from ..common.settings import RunSettings
from ..common.text import first_line, printable
from ..data.corpora import AnyCorpus
from ..generation.text import generate_text
from ..model.loading import load_model_and_tokenizer
from ..sharing.model_card import make_card
from ..training.reporting import draw_loss_curve, read_metrics, say

SMALL = 2**28  # bytes of weights, of which a second model surely fits beside the one that trains
SHARE_OF_TIME = 0.03
BETWEEN = "\n\n---\n\n"  # two samples
NEW_LINE = "\n"  # the prompt that every tokenizer knows and that says least


class Showing:
    """Writes card, loss curve and samples of a model: what a person looks at.

    None of them may cost a run anything: what fails is left out with a sentence. The card is written every time. While a
    run goes on, one short sample is, not where the model is so large that a second one might not fit beside it; and
    sample and loss curve only where each takes at most SHARE_OF_TIME of the time since it was written last.
    --sample_on_eval wants all of them every time, or, false, no samples before the end.

    Attributes:
        prompt: the text that the samples continue.
        ended: whether the run has come to its end; then nothing is left out.
    """

    def __init__(
        self, accelerator: Accelerator, settings: RunSettings, corpus: AnyCorpus, prompt: str = NEW_LINE
    ):
        self.accelerator, self.settings, self.prompt = accelerator, settings, prompt
        self.run = Path(settings.folder())
        source = settings.model_name_or_path or settings.tokenizer
        self.title = f"{Path(corpus.name).name}, {Path(source).name}"  # without folders of this machine
        self.ended = False
        # When each was begun and done the last time.
        self.times = {"samples": (0.0, 0.0), "curve": (0.0, 0.0)}

    def __call__(self, model: Path, target: Path, last: bool = False) -> None:
        """Write what shows the model in one folder into another."""
        there, now = (model / "samples.txt").exists(), self.ended or self._samples_now(model, last)
        if now and (last or not there):
            with self._timed("samples"):
                self._write(
                    target / "samples.txt", lambda path: path.write_text(self._sample(model, last), "utf-8")
                )
            if not last and (target / "samples.txt").exists():
                say(self.accelerator, *first_lines((target / "samples.txt").read_text("utf-8")))
        elif there:
            shutil.copy(model / "samples.txt", target)
        if last or self.settings.sample_on_eval or self._is_cheap("curve"):
            with suppress(Exception):  # a second, once, which says nothing of what the next picture takes
                import matplotlib.figure  # noqa: F401
            with self._timed("curve"):
                rows = read_metrics(self.run / "metrics.jsonl")
                self._write(target / "loss_curve.png", lambda path: draw_loss_curve(path, rows, self.title))
        self._write(target / "README.md", lambda path: make_card(self.run, model, target).save(path))

    def _samples_now(self, model: Path, last: bool) -> bool:
        if self.settings.sample_on_eval is not None:
            return self.settings.sample_on_eval
        return self._is_small(model) and (last or self._is_cheap("samples"))

    def _is_small(self, model: Path) -> bool:
        return sum(path.stat().st_size for path in model.glob("*.safetensors")) <= SMALL

    def _is_cheap(self, what: str) -> bool:
        begun, done = self.times[what]
        return done - begun <= SHARE_OF_TIME * (time.perf_counter() - begun)

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.times[what] = begun, time.perf_counter()

    def _sample(self, folder: Path, last: bool) -> str:
        # Whole, where the one that trains may be sharded.
        model, tokenizer = load_model_and_tokenizer(str(folder), to_write=True)
        amount = (3, self.settings.sample_length) if last else (1, min(200, self.settings.sample_length))
        return sample(model.to(self.accelerator.device), tokenizer, self.prompt, self.settings.seed, *amount)

    def _write(self, path: Path, write: Callable[[Path], object]) -> None:
        written_if_possible(path, write, tell=lambda line: say(self.accelerator, line))


def first_lines(samples: str, count: int = 2) -> list[str]:
    """What a person who watches a run sees of its samples: of the first."""
    lines = [line for line in samples.split(BETWEEN)[0].splitlines() if line.strip()]
    return [f"  {line[:100]}" for line in lines[:count]]


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompt: str,
    seed: int,
    texts: int,
    tokens: int,
) -> str:
    amount = {"num_return_sequences": texts, "max_new_tokens": tokens}
    stop = [] if prompt == NEW_LINE else ["\n\n"]  # where a stanza ends
    samples = generate_text(model, tokenizer, prompt, **amount, stop=stop, temperature=0.8, seed=seed)
    return printable(BETWEEN.join((prompt + sample).strip() for sample in samples) + "\n")


def sample_base(accelerator: Accelerator, settings: RunSettings, prompt: str) -> str | None:
    """What the base writes without training, if it can still be had."""
    base = settings.model_name_or_path
    try:
        model, tokenizer = load_model_and_tokenizer(base, to_write=True)
        amount = (3, settings.sample_length)
        return sample(model.to(accelerator.device), tokenizer, prompt, settings.seed, *amount)
    except UserError as error:
        say(accelerator, f"warning: no samples of the base, {first_line(error)}.")
        return None
