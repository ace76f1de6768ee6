"""The project itself: lint, launch settings, and what README promises."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

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
        for path in ROOT.iterdir()
        if path.is_dir() and not re.match(r"[.]|runs|data|.*egg-info", path.name)
        if not (path / "pyvenv.cfg").exists()  # a reader's virtual environment
    }
    modules = {path.name for path in (ROOT / "nanogpt_hf").glob("*.py")} - {"__init__.py"}
    recipes = {path.name for path in (ROOT / "recipes").glob("*.py")}
    assert rooms - {"__pycache__"} | modules | recipes <= named
    for name in named:
        assert list(ROOT.glob(f"**/{name}")), name


def test_every_flag_in_the_readme_exists():
    from nanogpt_hf.common import settings

    text = "\n".join(
        path.read_text(encoding="utf-8") for path in [*ROOT.glob("recipes/*.py"), Path(settings.__file__)]
    )
    launcher = {"config_file", "num_processes"}
    for flag in set(re.findall(r"--([a-z]\w+)", README)) - launcher:
        assert re.search(rf"\b{flag}\b", text), flag


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


def test_a_command_line_is_answered_without_torch():
    """Importing torch takes seconds; a misspelt flag and --help have to be answered before."""
    for words in (["--help"], ["--lr", "3"], ["--corpus", "nowhere.txt"]):
        for recipe in ("pretrain_char", "pretrain_bpe", "pretrain", "finetune_lora"):
            script = f"recipes/{recipe}.py"
            code = (
                "import runpy, sys\n"
                f"sys.argv = {[script, *words]!r}\n"
                f"try:\n    runpy.run_path({script!r}, run_name='__main__')\n"
                "except SystemExit:\n    sys.exit('torch' in sys.modules)"
            )
            done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, (recipe, words, done.stderr)


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


@pytest.mark.parametrize("name, processes", [("cpu", 1), ("cpu_2_processes", 2)])
def test_launch_settings_for_the_cpu_train(name, processes, tmp_path):
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question.\n" * 60, encoding="utf-8")
    sizes = (
        "--n_layer 1 --n_embd 16 --n_head 2 --n_positions 16 --per_device_train_batch_size 4 --max_steps 4"
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"),
            *(
                "--config_file",
                ROOT / "accelerate_configs" / f"{name}.yaml",
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
    assert f"{4 * processes} x 16 tokens" in done.stdout
