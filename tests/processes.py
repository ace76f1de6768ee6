"""Training in processes of its own, forked from an interpreter that has imported everything already.

A fresh interpreter spends seconds on imports; a fork of a warm one trains a tiny model in about one.
"""

import atexit
import functools
import hashlib
import importlib
import json
import multiprocessing.context
import multiprocessing.forkserver
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from huggingface_hub import constants, hf_api
from tqdm import tqdm
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.utils.logging import disable_progress_bar

from nanogpt_hf.common.cli import parse
from nanogpt_hf.common.running import run_recipe
from nanogpt_hf.common.settings import TrainingSettings
from nanogpt_hf.data.corpora import load_corpus
from nanogpt_hf.runs.pretraining import (
    find_rdrop,
    make_model,
    make_tokenizer,
    settle_dropout,
    settle_short_windows,
    short_windows,
)
from nanogpt_hf.runs.run import language_modeling, make_ready, resolve
from nanogpt_hf.training.hardware import make_accelerator
from nanogpt_hf.training.loop import train

ROOT = Path(__file__).parents[1]
TINY = (
    "--architecture qwen3 --optim muon --n_layer 1 --n_embd 16 --n_head 2 --n_positions 16 --per_device_train_batch_size 4 --dropout 0.1 --use_cpu "
    "--max_steps 30 --warmup_steps 5 --logging_steps 3 --eval_steps 6 --save_steps 5 --per_device_eval_batch_size 512 --sample_length 20"
).split()
TEXT = "To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n" * 30

tqdm.get_lock()  # made before any fork: a killed process would leave one of its own behind
get_checkpoint_conversion_mapping("gpt2")  # takes half a second the first time, wherever a model is loaded


def write_corpus(folder: Path, text: str = TEXT) -> Path:
    path = folder / "text.txt"
    path.write_text(text, encoding="utf-8")
    return path


def training_words(folder: Path, corpus: Path, *words) -> list[str]:
    return [str(word) for word in ("--corpus", corpus, "--output_dir", folder, *TINY, *words)]


def train_here(words: list[str], change_model=None, make_accelerator=make_accelerator):
    """A run in this process, up to the end of its training; errors are raised.

    Args:
        change_model: called with the model before it is trained.
        make_accelerator: called with the settings.
    """
    disable_progress_bar()
    settings = parse(TrainingSettings, None, argv=words)
    AcceleratorState._reset_state(reset_partial_state=True)  # each run has its own precision
    accelerator = make_accelerator(settings)
    corpus = load_corpus(settings.corpus, settings.validation_split_percentage, **settings.reading_options())
    set_seed(settings.seed)
    tokenizer = make_tokenizer(settings, corpus)
    settings = settle_dropout(settings, accelerator, corpus, tokenizer)
    model = make_model(settings, corpus, tokenizer)
    settings = settle_short_windows(resolve(settings, accelerator, corpus, tokenizer, model))
    make_ready(settings, model)
    if change_model is not None:
        change_model(model)
    alpha, _ = find_rdrop(settings, model)
    objective = language_modeling(accelerator, settings, corpus, tokenizer, alpha)
    objective.short = short_windows(settings)
    return train(accelerator, settings, corpus, tokenizer, model, objective)


def run_here(script: str, *words) -> int:
    """A recipe in this process, or another script by its path below the clone, as if it were run; its exit status."""
    before = sys.argv
    sys.argv = [script, *map(str, words)]
    try:
        runpy.run_path(
            str(ROOT / script if "/" in script else ROOT / "recipes" / script), run_name="__main__"
        )
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = before
    return 0


@functools.cache
def warm_interpreter() -> multiprocessing.context.BaseContext:
    """Where all processes of multiprocessing's method forkserver are forked from, here and in what the tests call."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # a process of several threads cannot be forked safely
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        multiprocessing.forkserver.ensure_running()
    return context


def start(target, *args) -> multiprocessing.process.BaseProcess:
    """A process that calls a function of a module, forked."""
    process = warm_interpreter().Process(target=target, args=args)
    process.start()
    return process


class Run:
    """A process at work on a run up to the end of its training, answering errors as recipes do.

    Args:
        words: its command line.
        recipe: run this recipe, which also samples and describes, instead.
        log: file for what it prints on both streams; by default beside the run folder.
        prepare: a function called in the process first, and its arguments.
        environment: variables to set.
    """

    def __init__(self, words, recipe: str | None = None, log: Path | None = None, prepare=(), **environment):
        words = [str(word) for word in words]
        self.log = log or Path(words[words.index("--output_dir") + 1] + ".log")
        self.process = start(_run, words, recipe, str(self.log), prepare, environment)

    def wait(self, timeout=120) -> int:
        """Its exit status, 128 + n after signal n as a shell has it."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"the run has not ended after {timeout} s:\n{self.said()}")
        code = self.process.exitcode
        return 128 - code if code < 0 else code

    def signal(self, number) -> None:
        os.kill(self.process.pid, number)

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def wait_for(self, path: Path, timeout=60) -> None:
        """Until a file is there."""
        end = time.monotonic() + timeout
        while not path.exists():
            assert time.monotonic() < end and self.process.is_alive(), f"no {path}:\n{self.said()}"
            time.sleep(0.002)


def read_variables_again() -> None:
    """What huggingface_hub read of the environment when it was imported, which was before this process was forked."""
    importlib.reload(constants)
    hf_api.api.endpoint = constants.ENDPOINT


def _run(words, recipe, log, prepare, environment):
    os.environ.update(environment)
    read_variables_again()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdin = open(os.devnull, encoding="utf-8")
    os.chdir(ROOT)
    if prepare:
        prepare[0](*prepare[1:])
    if recipe is None:
        return run_recipe(lambda: train_here(words) and None)
    sys.argv = [f"recipes/{recipe}", *words]
    runpy.run_path(str(ROOT / "recipes" / recipe), run_name="__main__")


def take_terminal(name: str) -> None:
    """Give this process, as `Run` prepares it, a session of its own whose terminal this is."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.setsid()
    terminal = os.open(name, os.O_RDWR)
    for stream in range(3):
        os.dup2(terminal, stream)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout, sys.stderr = (open(stream, "w", encoding="utf-8", closefd=False) for stream in (1, 2))


def ring(commands: Sequence[list], logs: Path, **options) -> list[Run]:
    """Processes at work on one run, as a launcher starts them.

    Args:
        commands: the command line of each.
        logs: folder of what each one prints.
        options: of each `Run`.
    """
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        port, size = str(any_port.getsockname()[1]), str(len(commands))
    place = dict(WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return [
        Run(words, log=logs / f"{port}-{rank}.log", RANK=str(rank), LOCAL_RANK=str(rank), **place | options)
        for rank, words in enumerate(commands)
    ]


def finished(words, **options) -> str:
    """What a run said that has to end well."""
    run = Run(words, **options)
    status = run.wait()
    assert status == 0, (status, run.said())
    return run.said()


STRANGERS = """
import gc, importlib, json, os, sys
import accelerate, transformers.generation, transformers.modeling_utils  # what takes long and knows no model yet
from huggingface_hub import constants, hf_api

gc.freeze()
for line in sys.stdin:
    code, sys.argv, folder, log, environment = json.loads(line)
    if not os.fork():
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        importlib.reload(constants)
        hf_api.api.endpoint = constants.ENDPOINT
        sys.modules["nanogpt_hf"] = None  # installed or not, importing it fails
        exec(code)
        sys.stdout.flush()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@functools.cache
def _strangers() -> subprocess.Popen:
    command = [sys.executable, "-I", "-W", "ignore", "-c", STRANGERS]
    home = tempfile.mkdtemp(prefix="strangers-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    environment = {"HF_HOME": home, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def stranger(code: str, *words, folder: Path, environment: dict | None = None) -> str:
    """What a process prints that has never heard of this package, forked from one that has transformers.

    Args:
        folder: where it is.
        environment: all its variables; by default it is offline.
    """
    log = folder / "stranger.log"
    environment = environment or {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    asked = [code, ["stranger", *map(str, words)], str(folder), str(log), environment]
    process = _strangers()
    print(json.dumps(asked), file=process.stdin, flush=True)
    status = process.stdout.readline()
    said = log.read_text(encoding="utf-8") if log.exists() else ""
    assert status == "0\n", (status, said)
    return said


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of all weights and optimiser states that a run has left."""
    files = sorted(folder.rglob("*.safetensors"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl, every one of which must be whole."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def without_times(rows: list[dict]) -> list[dict]:
    return [
        {key: value for key, value in row.items() if key not in ("elapsed_s", "tokens_per_s")} for row in rows
    ]
