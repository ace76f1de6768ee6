"""The command `nanogpt`: each recipe by its name, wherever pip has put it.

nanogpt --help
nanogpt pretrain_char --corpus my_text.txt
accelerate launch -m nanogpt_hf pretrain_char
"""

import runpy
import sys

from .common.errors import UserError
from .common.recipes import first_line_of, recipes
from .common.running import run_recipe
from .common.text import nearest


def main() -> None:
    """Run the recipe that the first word names.

    Raises:
        UserError: there is none of that name.
    """
    known = recipes()
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        width = max(map(len, known))
        print("usage: nanogpt RECIPE [--SETTING VALUE …]\n")
        for recipe, path in known.items():
            print(f"  {recipe:{width}}  {first_line_of(path)}")
        print("\nnanogpt RECIPE --help shows its settings.")
        return
    if name not in known:
        near = nearest(name, known)
        hint = f"did you mean {near}?" if near else "`nanogpt --help` lists them."
        raise UserError(f"there is no recipe {name!r}; {hint}")
    sys.argv = [str(known[name]), *sys.argv[2:]]
    runpy.run_path(str(known[name]), run_name="__main__")


def console() -> None:
    """The entry point of the command."""
    run_recipe(main)


if __name__ == "__main__":
    console()
