"""No input can hurt: nothing is executed, nothing leaves its folder, nothing of the user's is given away.

The fuzz tests try 50 inputs each; NANOGPT_HF_FUZZ=5000 tries more.
"""

import ast
import json
import os
import random
import re
import shutil
import string
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from accelerate import Accelerator
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from processes import ROOT, TEXT, Run, digests, finished, train_here, training_words, write_corpus
from transformers import hf_argparser

from nanogpt_hf import NanoGPTConfig, NanoGPTForCausalLM
from nanogpt_hf.common.cli import parse
from nanogpt_hf.common.files import MANIFEST, folder_written_whole
from nanogpt_hf.common.settings import TrainingSettings
from nanogpt_hf.common.text import printable, without_home
from nanogpt_hf.data.corpora import Corpus, load_corpus
from nanogpt_hf.data.tokenization import train_char_tokenizer
from nanogpt_hf.generation.text import generate_text
from nanogpt_hf.training.checkpoints import (
    Progress,
    damage,
    load_checkpoint,
    newest_good,
    prune,
    read_progress,
    save_checkpoint,
)
from nanogpt_hf.training.optimization import make_optimizers
from nanogpt_hf.training.reporting import read_metrics

fuzz = settings(
    max_examples=int(os.environ.get("NANOGPT_HF_FUZZ", 50)),
    deadline=None,  # a loaded machine is no fault
    suppress_health_check=list(HealthCheck),
)
GO_ON = ("--resume_from_checkpoint", "last")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"))


# --- the first seconds ---


@pytest.mark.parametrize(
    "recipe, library",
    [("pretrain_char", "wrapt"), ("share", "yaml"), ("pretrain_char", "transformers"), ("share", "torch")],
)
def test_an_interrupt_during_the_imports_is_answered(tmp_path, recipe, library):
    """The library raises the signal itself, so that it comes at that very moment."""
    (tmp_path / library).mkdir()
    raises = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    (tmp_path / library / "__init__.py").write_text(raises)
    shutil.copy(hf_argparser.__file__, tmp_path / library)  # which is read without the package
    words = (
        [sys.executable, ROOT / "recipes" / f"{recipe}.py", "--model", tmp_path]
        if recipe != "pretrain_char"
        else [sys.executable, ROOT / "recipes" / "pretrain_char.py"]
    )
    words += ["--output_dir", tmp_path / "out"] if recipe == "share" else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (130, "error: interrupted.\n")


# --- nothing is executed ---

FORBIDDEN_MODULES = {
    "pickle",
    "cloudpickle",
    "dill",
    "shelve",
    "marshal",
    "joblib",
    "subprocess",
    "pty",
    "code",
}
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__"),
    *("os.system", "os.popen", "torch.load", "torch.save", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    *("np.load", "np.save", "numpy.load", "gather_object", "broadcast_object_list"),
}
FORBIDDEN_ARGUMENTS = {"shell": True, "allow_pickle": True, "weights_only": False, "trust_remote_code": True}


def offences(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [name for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name == "torch.load" and "weights_only=True" in map(ast.unparse, node.keywords):
                continue
            found += (
                [name] if name in FORBIDDEN_CALLS or re.match(r"os\.(exec|spawn|posix_spawn)", name) else []
            )
            for argument in node.keywords:
                if argument.arg in FORBIDDEN_ARGUMENTS and ast.unparse(argument.value) == str(
                    FORBIDDEN_ARGUMENTS[argument.arg]
                ):
                    found.append(f"{argument.arg}={ast.unparse(argument.value)}")
    return found


def test_no_pickle_no_eval_no_shell():
    files = [*(ROOT / "nanogpt_hf").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]
    assert len(files) > 20
    allowed = {
        "transformers_js.py": ["subprocess"]
    }  # `npm pack` of pinned packages, which runs nothing of them
    assert {path.name: offences(path.read_text(encoding="utf-8")) for path in files} == {
        path.name: allowed.get(path.name, []) for path in files
    }


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from torch import load; eval('1')",
        "import torch; torch.load('x')",
        "import torch; torch.load('x', weights_only=False)",
        "os.system('ls')",
        "run('ls', shell=True)",
        "yaml.load(text)",
        "os.execv('a', [])",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
    ],
)
def test_the_test_above_sees_offences(source):
    assert offences(source)


def test_yaml_makes_no_objects(tmp_path):
    trap = tmp_path / "trap.yaml"
    trap.write_text(f"corpus: !!python/object/apply:os.mkdir [{tmp_path / 'made'}]\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        parse(TrainingSettings, None, argv=["--config", str(trap)])
    assert not (tmp_path / "made").exists()


# --- nothing of the user's is given away ---


def test_no_token_and_no_home_in_a_run_folder(tmp_path):
    """Corpus, tokenizer, base model and run folder lie under the home and are given by absolute paths."""
    home = tmp_path / "secret_home"
    home.mkdir()
    corpus, token = write_corpus(home), "hf_fakesecretfakesecret"
    environment = {"HOME": str(home), "HF_TOKEN": token, "HUGGING_FACE_HUB_TOKEN": token}
    words = ("--report_to", "tensorboard", "--max_steps", "6", "--save_steps", "3")
    finished(
        training_words(home / "first", corpus, *words),
        recipe="pretrain_char.py",
        log=tmp_path / "1",
        **environment,
    )
    for name, words in [
        ("second", ("--model_name_or_path", home / "first", "--report_to", "tensorboard")),
        ("third", ("--tokenizer", home / "first")),
    ]:
        words = training_words(home / name, corpus, "--max_steps", "3", *words)
        finished(words, log=tmp_path / name, **environment)
    for path in [path for name in ("first", "second", "third") for path in (home / name).rglob("*")]:
        assert "secret" not in str(path.relative_to(home))
        content = path.read_bytes() if path.is_file() else b""
        assert not re.search(rb"secret_?home|fakesecret", content), path
    for name in (
        "run.yaml",
        "metrics.jsonl",
        "samples.txt",
        "loss_curve.png",
        "checkpoints/step-6/progress.json",
    ):
        assert (home / "first" / name).stat().st_size, f"{name} has not been looked at"
    assert "~/text.txt" in (home / "first" / "run.yaml").read_text(encoding="utf-8")
    # ~ is understood where it stands in for the home, so run.yaml repeats the run from any folder.
    again = ["--config", home / "first" / "run.yaml", "--output_dir", home / "again"]
    finished(again, log=tmp_path / "4", **environment)
    assert digests(home / "again") == digests(home / "first")


def note_network(path: str) -> None:
    """From now on in this process, note every address that is asked for or connected to."""

    def hook(event, args):
        if event in ("socket.getaddrinfo", "socket.connect", "socket.sendto"):
            with open(path, "a", encoding="utf-8") as file:
                file.write(f"{event} {args}\n")

    sys.addaudithook(hook)


def test_a_run_on_a_file_asks_no_network(tmp_path):
    rows = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [TEXT]}), rows)
    asked = tmp_path / "asked"
    words = training_words(tmp_path / "run", rows, "--max_steps", "3", "--report_to", "tensorboard")
    finished(words, recipe="pretrain_char.py", prepare=(note_network, str(asked)))
    assert not asked.exists(), asked.read_text(encoding="utf-8")


def test_the_home_is_recognised_by_whole_names(monkeypatch, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "ann").symlink_to(tmp_path / "real")
    monkeypatch.setenv("HOME", str(tmp_path / "ann"))
    assert without_home(str(tmp_path / "ann" / "text.txt")) == os.path.join("~", "text.txt")
    assert without_home(str(tmp_path / "real" / "text.txt")) == os.path.join("~", "text.txt")
    assert without_home(str(tmp_path / "ann")) == "~"
    for path in (f"{tmp_path}/annabel/text.txt", "text.txt", "org/name", "tiny_shakespeare", ""):
        assert without_home(path) == path
    monkeypatch.setenv("HOME", "/")
    assert without_home("/data/text.txt") == "/data/text.txt"


def test_the_home_is_recognised_however_a_path_leads_there(monkeypatch, tmp_path):
    home = tmp_path / "home" / "ann"
    (home / "texts").mkdir(parents=True)
    (home.parent / "bob").mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    for path in (
        f"a/..//..{'/..' * 20}{home}/x.txt",
        "home/ann/x.txt",
        "./home/ann/x.txt",
        "home/bob/../ann/x.txt",
    ):
        assert without_home(path) == "~/x.txt"
    assert without_home("home/ann") == "~" and without_home("home/ann/*.txt") == "~/*.txt"
    assert without_home(f"a/..//{home}/x.txt").count("ann") == 0
    assert without_home(f"document of {home}: {home}.") == "document of ~: ~."
    for path in ("home/bob/x.txt", "home/annabel/x.txt", "x.txt", "", "/elsewhere" + str(home), "linear"):
        assert without_home(path) == path
    monkeypatch.chdir(home / "texts")
    assert without_home("../../ann/x.txt") == "~/x.txt"
    for path in ("../x.txt", "x.txt", "../../bob/x.txt", "a/../x.txt", ""):
        assert without_home(path) == path


@pytest.mark.parametrize("given", ["secret_home/{}", "a/..//..{up}{home}/{}", "{home}/../secret_home/{}"])
def test_no_way_of_writing_a_path_gives_the_home_away(tmp_path, given):
    home = tmp_path / "secret_home"
    home.mkdir()
    (tmp_path / "a").mkdir()
    write_corpus(home)

    def written(name):
        return given.format(name, home=home, up="/.." * 20)

    words = training_words(
        written("run"), written("text.txt"), "--max_steps", "2", "--document_end", str(home)
    )
    options = {"recipe": "pretrain_char.py", "prepare": (os.chdir, str(tmp_path)), "HOME": str(home)}
    finished(words, log=tmp_path / "log", **options)
    words = training_words(
        written("two"), written("text.txt"), "--max_steps", "2", "--tokenizer", written("run")
    )
    finished(words, log=tmp_path / "log2", **options)
    files = [path for name in ("run", "two") for path in (home / name).rglob("*") if path.is_file()]
    assert {"run.yaml", "README.md", "progress.json"} <= {path.name for path in files}
    assert not [path for path in files if re.search(rb"secret_?home", path.read_bytes())]


# --- nothing drives the terminal ---


def test_a_model_of_control_characters_does_not_drive_the_terminal(tmp_path):
    bells = write_corpus(tmp_path, "\x1b]0;title\x07\x1b[2J\x9b31m\r\x08" * 200)
    folder = tmp_path / "run"
    words = training_words(folder, bells, "--max_steps", "60", "--learning_rate", "0.03")
    said = finished(words, recipe="pretrain_char.py")
    sampling = ["--model", str(folder), "--prompt", "\x1b", "--max_new_tokens", "100"]
    said += finished(sampling, recipe="sample.py", log=tmp_path / "log")
    assert "\\x1b" in said and "\\x07" in said
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", said)
    assert not re.search(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", (folder / "samples.txt").read_text(encoding="utf-8")
    )


def test_an_error_that_quotes_control_characters_does_not_either(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"\x1b[2J": "text"}) + "\n")
    run = Run(training_words(tmp_path / "run", tmp_path / "rows.jsonl"))
    assert run.wait() == 2 and "\\x1b[2J" in run.said() and "\x1b" not in run.said()


# --- nothing leaves its folder ---


@fuzz
@given(st.text(min_size=1), st.text(min_size=1))
@example("..", "..")
@example("../../etc/passwd", "/")
@example("~", "~root")
def test_no_name_of_a_corpus_leaves_the_folder_of_the_runs(corpus, tokenizer):
    folder = Path(TrainingSettings(corpus=corpus, tokenizer=tokenizer).folder())
    assert folder.parent == Path("runs") and folder.name not in ("", ".", "..")
    assert os.path.normpath(folder) == str(folder)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "org/../../etc", "..", "org/..", "./..:x", "org/name:../../x"]
)
def test_no_hub_id_leaves_the_cache(name, tmp_path, monkeypatch):
    here = tmp_path / "above" / "here"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    with pytest.raises(ValueError):
        load_corpus(name)
    assert [*tmp_path.rglob("*")] == [here.parent, here]


@pytest.mark.parametrize("name", ["../progress.json", "/etc/passwd", "sub/file", "..", "."])
def test_a_manifest_cannot_name_files_elsewhere(tmp_path, name):
    checkpoint = write_checkpoint(tmp_path)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest[name] = {"bytes": 1, "sha256": "0" * 64}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    assert name in damage(checkpoint)


def write_checkpoint(folder: Path, step: int = 1) -> Path:
    with folder_written_whole(folder / f"step-{step}") as staging:
        (staging / "optimizer.safetensors").write_bytes(b"state")
        (staging / "progress.json").write_text("{}")
    return folder / f"step-{step}"


def test_links_in_a_run_folder_are_not_followed(corpus, tmp_path):
    """Links that lead out of it stand where the run writes and deletes."""
    outside, folder = tmp_path / "outside", tmp_path / "run"
    (outside / "step-1").mkdir(parents=True)
    for name in ("precious", "step-1/precious"):
        (outside / name).write_text("precious")
    words = training_words(folder, corpus, "--max_steps", "10", "--save_total_limit", "1")
    train_here(words)

    def lay_links():
        for name in (
            "run.yaml",
            "metrics.jsonl",
            "model.safetensors",
            ".run.yaml",
            ".metrics.jsonl",
            "samples.txt",
        ):
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(outside / "precious")
        for place in (
            folder / ".unfinished-1",
            folder / "checkpoints" / ".unfinished-1",
            folder / "checkpoints" / "step-7",
        ):
            if not place.is_symlink():
                place.symlink_to(outside / "step-1", target_is_directory=True)

    lay_links()
    train_here([*words, *GO_ON, "--max_steps", "20"])
    lay_links()
    train_here([*words, "--overwrite_output_dir"])
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").symlink_to(outside, target_is_directory=True)
    with pytest.raises(ValueError, match="is a symbolic link"):
        train_here([*words, *GO_ON])
    train_here([*words, "--overwrite_output_dir"])
    assert not (folder / "checkpoints").is_symlink() and (folder / "checkpoints" / "step-10").is_dir()
    kept = {path.relative_to(outside): path.read_text() for path in outside.rglob("*") if path.is_file()}
    assert kept == {Path("precious"): "precious", Path("step-1/precious"): "precious"}


def test_pruning_does_not_follow_links(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    moved = write_checkpoint(tmp_path / "elsewhere", step=1)
    checkpoints = tmp_path / "checkpoints"
    newest = write_checkpoint(checkpoints, step=2)
    (checkpoints / "step-1").symlink_to(moved, target_is_directory=True)
    prune(newest, keep=1)
    assert damage(moved) is None and [path.name for path in checkpoints.iterdir()] == ["step-2"]


# --- whatever the input: an error sentence or a result ---


def sentence(message: str) -> None:
    assert message.strip() and "Traceback" not in message and message.count("\n") == 0, message


def mutations(content: bytes):
    """Strategies for bytes that were once a good file."""

    def apply(edits):
        result = bytearray(content)
        for kind, place, piece in edits:
            place = place % (len(result) + 1)
            if kind == "cut":
                del result[place:]
            elif kind == "insert":
                result[place:place] = piece
            elif kind == "overwrite":
                result[place : place + len(piece)] = piece
            else:
                del result[place : place + len(piece)]
        return bytes(result)

    edit = st.tuples(
        st.sampled_from(["cut", "insert", "overwrite", "delete"]),
        st.integers(0, 2**20),
        st.binary(min_size=1, max_size=8),
    )
    return st.lists(edit, min_size=1, max_size=4).map(apply)


GOOD_JSONL = "".join(
    json.dumps({"text": text, "number": 1}) + "\n" for text in ("Ёлки", "to be", "", "\n")
).encode()


def good_parquet() -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["to be or not to be"] * 20, "number": [1] * 20}), sink
    )
    return sink.getvalue().to_pybytes()


def read_or_refuse(folder: Path, name: str, content: bytes) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    before = sorted(folder.iterdir())
    try:
        result = load_corpus(str(folder / name))
    except ValueError as error:
        sentence(str(error))
    else:
        assert isinstance(result, Corpus) and all(
            isinstance(text, str) for text in result.train + result.validation
        )
        "".join(result.train).encode()
    assert sorted(folder.iterdir()) == before


@fuzz
@given(content=st.binary() | st.text().map(str.encode) | mutations("Ёж\r\n\ufeff To be".encode()))
def test_fuzz_text_files(tmp_path_factory, content):
    read_or_refuse(tmp_path_factory.getbasetemp() / "txt", "text.txt", content)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["text", "body", ""]), inner, max_size=3)
    ),
    max_leaves=6,
)


@fuzz
@given(
    content=mutations(GOOD_JSONL)
    | st.lists(JSON.map(json.dumps), max_size=4).map(lambda rows: "\n".join(rows).encode())
)
@example(b'{"text": ' + b"[" * 100_000)
@example(b'{"text": "\\ud800"}\n')
@example(b'{"text": 1' + b"0" * 5000 + b"}\n")
def test_fuzz_jsonl_files(tmp_path_factory, content):
    read_or_refuse(tmp_path_factory.getbasetemp() / "jsonl", "rows.jsonl", content)


@fuzz
@given(content=mutations(good_parquet()))
def test_fuzz_parquet_files(tmp_path_factory, content):
    read_or_refuse(tmp_path_factory.getbasetemp() / "parquet", "rows.parquet", content)


RUN_YAML = (
    yaml.safe_dump(vars(TrainingSettings()), sort_keys=False, allow_unicode=True)
    + "record:\n  corpus: {name: x}\n"
).encode()
NAMES = st.sampled_from(sorted(vars(TrainingSettings()))) | st.text(string.ascii_letters + "_", max_size=12)


@fuzz
@given(
    content=mutations(RUN_YAML)
    | st.dictionaries(NAMES, JSON, max_size=4).map(lambda d: yaml.safe_dump(d).encode())
)
@example(b"seed: !!timestamp x")
@example(b"seed: 2020-13-45")
@example(b"seed: 1" + b"0" * 5000)
@example(b"seed: " + b"[" * 50_000)
@example(b"seed: " + b"[" * 10_000_000)
@example(b"corpus: !!binary \xff")
@example(b"? [1]\n: 2")
@example(
    b"a: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (i, i, b",".join([b"*%c" % (i - 1)] * 9)) for i in range(98, 110))
    + b"report_to: *m\n"
)
@example(b"report_to: &r [*r]")
def test_fuzz_config_files(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "run.yaml"
    path.write_bytes(content)
    begun = time.process_time()  # what the input costs, whatever else the machine does
    try:
        result = parse(TrainingSettings, None, argv=["--config", str(path)])
    except ValueError as error:
        sentence(str(error))
    else:
        assert isinstance(result, TrainingSettings)
    assert time.process_time() - begun < 5


@fuzz
@given(
    words=st.lists(
        st.sampled_from([f"--{name}" for name in vars(TrainingSettings())]) | st.text(max_size=9), max_size=6
    )
)
def test_fuzz_the_command_line(words):
    if not {"--help", "-h"} & set(words):
        try:
            assert isinstance(parse(TrainingSettings, None, argv=words), TrainingSettings)
        except ValueError as error:
            sentence(str(error).replace("\n", " ") if any("\n" in word for word in words) else str(error))


@fuzz
@given(
    content=mutations(b'{"step": 1, "train_loss": 2.0}\n{"step": 2}\n')
    | st.lists(JSON.map(json.dumps)).map(lambda rows: "\n".join(rows).encode())
)
@example(b"[" * 100_000)
def test_fuzz_metrics(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "metrics.jsonl"
    path.write_bytes(content)
    assert all(isinstance(row["step"], int) for row in read_metrics(path))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint, and the model, optimisers and tokenizer that it is of."""
    tokenizer = train_char_tokenizer([TEXT])
    config = NanoGPTConfig(architecture="qwen3", vocab_size=320, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = NanoGPTForCausalLM(config)
    optimizers = make_optimizers(model, TrainingSettings(optim="muon"))
    folder = tmp_path_factory.mktemp("checkpoint") / "step-3"
    progress = Progress(step=3, identity={"corpus": "x"})
    save_checkpoint(Accelerator(cpu=True), model, optimizers, tokenizer, progress, folder)
    return folder, model, optimizers, tokenizer


@fuzz
@given(data=st.data())
def test_fuzz_damaged_checkpoints(checkpoint, tmp_path_factory, data):
    """Whatever happens to one file of a checkpoint is noticed."""
    copy = tmp_path_factory.getbasetemp() / "damaged" / "step-3"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(checkpoint[0], copy)
    path = copy / data.draw(st.sampled_from(sorted(path.name for path in copy.iterdir())))
    content = path.read_bytes()
    changed = data.draw(mutations(content))
    path.write_bytes(changed)
    good, complaints = newest_good(copy.parent)
    if changed != content and not (path.name == MANIFEST and same_manifest(changed, content)):
        assert good is None and len(complaints) == 1
        sentence(complaints[0])


def same_manifest(changed: bytes, content: bytes) -> bool:
    """White space may change, and so may a file that is listed twice."""
    try:
        return json.loads(changed) == json.loads(content)
    except ValueError:
        return False


@fuzz
@given(data=st.data())
def test_fuzz_forged_checkpoints(checkpoint, tmp_path_factory, data):
    """A checkpoint whose manifest fits, but whose files are no longer what they should be: read, or refused."""
    original, model, optimizers, _ = checkpoint
    target = tmp_path_factory.getbasetemp() / "forged" / "step-3"
    name = data.draw(st.sampled_from(["model.safetensors", "optimizer.safetensors", "progress.json"]))
    with folder_written_whole(target) as staging:
        for path in original.iterdir():
            if path.name != MANIFEST:
                shutil.copy(path, staging)
        content = (original / name).read_bytes()
        if name == "progress.json":
            values = json.loads(content) | data.draw(
                st.dictionaries(st.sampled_from(sorted(json.loads(content))), JSON)
            )
            content = data.draw(st.just(json.dumps(values).encode()) | mutations(content))
        else:
            # The header's length, the header and the numbers are each as likely to be hit.
            end = 8 + int.from_bytes(content[:8], "little")
            start, stop = data.draw(st.sampled_from([(0, 8), (8, end), (end, len(content))]))
            content = content[:start] + data.draw(mutations(content[start:stop])) + content[stop:]
        (staging / name).write_bytes(content)
    assert damage(target) is None
    try:
        assert isinstance(read_progress(target), Progress)
        load_checkpoint(model, optimizers, target)
    except ValueError as error:
        sentence(str(error))


def test_deep_json_is_refused(checkpoint, tmp_path):
    shutil.copytree(checkpoint[0], tmp_path / "step-3")
    (tmp_path / "step-3" / MANIFEST).write_text("[" * 100_000)
    assert "cannot be read" in damage(tmp_path / "step-3")


@fuzz
@given(
    prompt=st.text() | st.text(st.characters()) | st.text("<|endoftext|>\0\r\n\ufeff\u200d👩"),
    seed=st.integers(0, 9),
)
@example("\ud800", 0)
@example("<|endoftext|>", 0)
@example("a" * 1000, 0)
def test_fuzz_prompts(checkpoint, prompt, seed):
    _, model, _, tokenizer = checkpoint
    try:
        (text,) = generate_text(model, tokenizer, prompt, max_new_tokens=3, seed=seed)
    except ValueError as error:
        sentence(str(error))
        assert not prompt or re.search("[\ud800-\udfff]", prompt)
    else:
        printable(prompt + text).encode("utf-8")


def test_random_bytes_are_no_checkpoint(tmp_path):
    (tmp_path / "step-9").mkdir()
    for name in (MANIFEST, "model.safetensors", "optimizer.safetensors", "progress.json"):
        (tmp_path / "step-9" / name).write_bytes(random.Random(0).randbytes(99))
    assert newest_good(tmp_path)[0] is None
