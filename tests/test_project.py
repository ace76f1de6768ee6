"""The project itself: lint, launch settings, and what README promises."""

import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from processes import run_here

from nanogpt_hf.common.cli import parse
from nanogpt_hf.common.errors import UserError

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


def test_lint_and_format():
    for words in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *words, "."], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_tree_in_the_readme_is_the_tree_on_the_disk():
    tree = README.split("```text\n")[-1].split("```")[0]
    named = {line.split()[0].rstrip("/") for line in tree.splitlines() if line.strip()}
    rooms = {
        path.name
        for path in [*ROOT.iterdir(), *(ROOT / "nanogpt_hf").iterdir()]
        if path.is_dir() and not re.match(r"[.]|runs$|data$|build$|.*egg-info|__pycache__", path.name)
        if not (path / "pyvenv.cfg").exists()  # a reader's virtual environment
    }
    assert rooms <= named and {"runs", "data"} <= named
    for name in named:
        assert (ROOT / name).is_dir() or (ROOT / "nanogpt_hf" / name).is_dir(), name


def test_the_readme_names_every_recipe_and_no_line_is_wider_than_a_page():
    for path in ROOT.glob("recipes/*.py"):
        assert f"`{path.name}`" in README, path.name
    assert max(map(len, README.splitlines())) <= 120


class Read(Exception):
    """What was made of a recipe's settings."""


def settings_of(recipe, make, monkeypatch):
    """What `make` makes of the class of a recipe's settings, its docstring and its positional, where it would read them."""
    spec = importlib.util.spec_from_file_location(recipe, ROOT / "recipes" / f"{recipe}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def read(cls, description, *arguments, **options):
        raise Read(make(cls, description, options.get("positional")))

    for name in ("parse", "read_settings"):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, read)
    with pytest.raises(Read) as end:
        module.main()
    return end.value.args[0]


def told(recipe, words, monkeypatch):
    """The settings that a recipe's own parser makes of a command line, without its paths being looked for."""
    return settings_of(
        recipe, lambda cls, help, first: parse(cls, help, words, positional=first), monkeypatch
    )


def commands(text):
    """Every command of a recipe in the code blocks of a text: its name and its words."""
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for i, word in enumerate(words):
                if match := re.fullmatch(r"recipes/(\w+)\.py", word):
                    yield match[1], words[i + 1 :]
                elif word == "nanogpt" and i + 1 < len(words):
                    yield words[i + 1], words[i + 2 :]


def test_the_readmes_commands_are_understood_by_their_recipes(monkeypatch):
    found = list(commands(README))
    assert len(found) > 8
    for recipe, words in found:
        assert told(recipe, words, monkeypatch), (recipe, words)


def test_every_flag_in_the_readmes_prose_is_a_setting(monkeypatch):
    prose = re.sub(r"```.*?```", "", README, flags=re.S)
    named = {flag for code in re.findall("`[^`]+`", prose) for flag in re.findall(r"--(\w+)", code)}
    known = {"help", "config", "model_args"}  # of every recipe, and of lm-eval
    for path in ROOT.glob("recipes/*.py"):
        known |= settings_of(path.stem, lambda cls, *_: {field.name for field in fields(cls)}, monkeypatch)
    assert len(named) > 8 and named <= known, named - known


def test_a_wrong_flag_in_the_readme_would_be_seen(monkeypatch):
    (recipe, words), *_ = commands(README)
    with pytest.raises(UserError, match="there is no setting --no_such_setting"):
        told(recipe, [*words, "--no_such_setting"], monkeypatch)


def test_the_readmes_python_runs(tmp_path, monkeypatch, capsys):
    """On a tiny model in the place of the reader's."""
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    (name,) = re.findall(r'"(runs/\w+)"', block)
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 60, encoding="utf-8")
    words = "--max_steps 4 --use_cpu --sample_length 20 --n_layer 1 --n_embd 16 --n_head 2 --n_positions 16".split()
    words += ["--corpus", tmp_path / "text.txt", "--output_dir", tmp_path / name]
    assert run_here("pretrain_char.py", *words, "--per_device_train_batch_size", 4) == 0
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(block, {})
    assert capsys.readouterr().out.strip()


def named_places():
    """Every `file.py:name` in the documentation."""
    for path in [*ROOT.glob("docs/*.md"), ROOT / "CONTRIBUTING.md"]:
        for file, name in re.findall(r"`([\w/]+\.py):(\w+)`", path.read_text(encoding="utf-8")):
            yield path.name, file, name


def test_the_places_that_the_documentation_names_are_there():
    places = list(named_places())
    assert len(places) > 30
    for document, file, name in places:
        path = ROOT / file if (ROOT / file).exists() else ROOT / "nanogpt_hf" / file
        defined = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.Assign):
                defined |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        assert name in defined, (document, file, name)


def lint_imports(folder):
    """The import contracts of .importlinter, on the package in a folder."""
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command as run; run()",
            "--no-cache",
        ],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )


def test_imports_go_one_way():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "module, line",
    [
        ("data/token_stream", "from ..training import reporting"),
        ("common/text", "def late():\n    from ..model.presets import PRESETS"),
        ("model/presets", "import nanogpt_hf.runs.run"),
        ("model/modeling_nanogpt", "from ..common.errors import UserError"),
        ("data/token_stream", "from . import shards"),
        ("training/objectives", "if 0:\n    from . import loop"),
    ],
)
def test_a_planted_import_is_seen(module, line, tmp_path):
    shutil.copytree(
        ROOT / "nanogpt_hf", tmp_path / "nanogpt_hf", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(ROOT / ".importlinter", tmp_path)
    path = tmp_path / "nanogpt_hf" / f"{module}.py"
    path.write_text(f"{path.read_text(encoding='utf-8')}\n{line}\n", encoding="utf-8")
    done = lint_imports(tmp_path)
    assert done.returncode == 1 and "BROKEN" in done.stdout, done.stdout + done.stderr


def test_a_command_line_is_answered_without_torch_and_transformers():
    """Importing them takes seconds; --help, a misspelt flag and what is not there have to be answered before."""
    done = subprocess.run([sys.executable, "-c", ANSWERED], cwd=ROOT, capture_output=True, text=True)
    wrong = [line for line in done.stderr.splitlines() if not line.startswith("error: ")]
    assert done.returncode == 0 and not wrong, wrong
    assert (
        done.stderr.count("did you mean nanogpt_hf/model?") >= 8 and done.stderr.count("'nowhere.txt'") >= 8
    )


ANSWERED = """
import runpy, sys
from pathlib import Path

more = {
    "plan": ("--preset gpt5", "--gpu a1000"),
    "pretrain": ("--preset gpt5",),
    "pretrain_char": (
        *("--preset bbaby", "--lr_scheduler_type zigzag", "--report_to excel", "--max_steps -3", "--bf16 --fp16"),
        *("--document_end (", "--hub_model_id a/b/c", "--preset cpu --output_dir nanogpt_hf"),
    ),
    "share": ("--model nanogpt_hf --hub_model_id a/b/c",),
    "tune_verse": ("--seed -1",),
}
for script in sorted(Path("recipes").glob("*.py")):
    for words, status in (
        *((line.split(), 2) for line in more.get(script.stem, ())),
        (["--help"], 0),
        (["--zzz", "3"], 2),
        (["--config", "accelerate_configs/cpu.yaml"], 2),
        (["--corpus", "nowhere.txt"], 2),
        (["--model", "nanogpt_hf/modell", "--output_dir", "zzz"], 2),
        (["--model_name_or_path", "nanogpt_hf/modell"], 2),
        (["--tokenizer", "nanogpt_hf/modell"], 2),
        (["--runs", "nanogpt_hf/model", "nanogpt_hf/modell"], 2),
        (["--from_nanogpt", "nanogpt_hf", "--output_dir", "zzz", "--tokenizer", "nanogpt_hf/modell"], 2),
    ):
        sys.argv = [str(script), *words]
        try:
            runpy.run_path(str(script), run_name="__main__")
            ended = 0
        except SystemExit as end:
            ended = end.code or 0
        slow = {"torch", "transformers"} & {*sys.modules}
        if ended != status or slow:
            print(script.name, words, ended, slow, file=sys.stderr)
            sys.exit(1)
"""


def test_no_script_has_the_name_of_a_module_of_python():
    """A script's folder comes first on the path, and torch.compile hands that path to its workers."""
    for script in ROOT.glob("*/*.py"):
        assert script.stem not in sys.stdlib_module_names, script


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_launch_settings_are_what_accelerate_knows(path):
    config = load_config_from_file(str(path))  # raises on unknown keys
    assert config.mixed_precision == "no", "the recipes choose the precision"
    assert yaml.safe_load(path.read_text(encoding="utf-8")).keys() >= {
        "distributed_type",
        "num_processes",
        "use_cpu",
    }


def test_launch_settings_for_two_processes_train(tmp_path):
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 60, encoding="utf-8")
    sizes = "--n_layer 1 --n_embd 16 --n_head 2 --n_positions 16 --per_device_train_batch_size 4 --max_steps 4 --sample_length 20"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"),
            *(
                "--config_file",
                ROOT / "accelerate_configs" / "cpu_2_processes.yaml",
                ROOT / "recipes" / "pretrain_char.py",
            ),
            *("--corpus", tmp_path / "text.txt", "--output_dir", tmp_path / "run", *sizes.split()),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "8 x 16 tokens" in done.stdout
