"""What pip installs, outside of the clone: the recipes, the launch settings and the command."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from processes import TEXT

from nanogpt_hf.common.recipes import recipes

ROOT = Path(__file__).parents[1]
TINY = (
    "--n_layer 1 --n_embd 16 --n_head 2 --n_positions 16 --per_device_train_batch_size 4 --max_steps 4 --use_cpu --sample_length 20"
).split()


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The scripts' folder of an environment with the wheel in it. Its libraries are those of this environment."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    for name in ("nanogpt_hf", "recipes", "accelerate_configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    words = ["-q", "--disable-pip-version-check"]
    build = [*words, "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, source]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *build], check=True)
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    libraries = Path(sysconfig.get_path("purelib"))
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
    )
    # A path alone: the .pth files in it, an editable install of this project among them, are not read.
    (Path(site.stdout.strip()) / "libraries.pth").write_text(str(libraries))
    (wheel,) = folder.glob("*.whl")
    subprocess.run(
        [python, "-m", "pip", "install", *words, "--ignore-installed", "--no-deps", "--no-index", wheel],
        check=True,
    )
    return folder / "venv" / "bin"


def run(words, folder):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        list(map(str, words)), cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def test_the_command_lists_the_recipes_and_names_the_nearest(installed, tmp_path):
    done = run([installed / "nanogpt", "--help"], tmp_path)
    assert done.returncode == 0, done.stderr
    for name in recipes():
        assert f"  {name} " in done.stdout
    done = run([installed / "nanogpt", "pretrain_chars"], tmp_path)
    assert done.returncode == 2 and done.stderr == (
        "error: there is no recipe 'pretrain_chars'; did you mean pretrain_char?\n"
    )


def test_a_wheel_trains_and_names_commands_that_are_there(installed, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    (config,) = (installed.parent / "lib").glob("*/site-packages/nanogpt_hf/accelerate_configs/cpu.yaml")
    words = [installed / "python", "-m", "accelerate.commands.accelerate_cli", "launch", "-q"]
    words += ["--config_file", config, "-m", "nanogpt_hf", "pretrain_char", "--corpus", "text.txt", *TINY]
    done = run(words, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        "4 x 16 tokens" in done.stdout
        and "more samples    nanogpt sample --model runs/text-char" in done.stdout
    )
    done = run([installed / "nanogpt", "sample", "--model", "runs/text-char", "--use_cpu"], tmp_path)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
