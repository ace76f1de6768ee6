"""Where the recipes are, in a clone or in what pip has installed, and the command that runs one."""

from pathlib import Path

INSTALLED = Path(__file__).parents[1] / "recipes"
CLONED = Path(__file__).parents[2] / "recipes"


def recipes() -> dict[str, Path]:
    """The scripts by name."""
    folder = INSTALLED if INSTALLED.is_dir() else CLONED
    return {path.stem: path for path in sorted(folder.glob("*.py")) if path.stem != "__init__"}


def command(recipe: str) -> str:
    """How to run a recipe from where the user stands: as a script of the clone, or through `nanogpt`."""
    if not INSTALLED.is_dir() and Path("recipes", f"{recipe}.py").is_file():
        return f"python recipes/{recipe}.py"
    return f"nanogpt {recipe}"


def first_line_of(path: Path) -> str:
    """What a recipe does, the first line of its docstring."""
    return path.read_text(encoding="utf-8").removeprefix('"""').split("\n")[0].rstrip('"')
