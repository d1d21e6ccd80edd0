"""Where the recipes are, and how `hf-lnscale train` starts them. Needs nothing that they need."""

from __future__ import annotations

import runpy
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

from ..checkpoints.folders import public_command

RECIPES = {"pretrain": "pretrain", "continue": "continue_pretrain", "sft": "sft", "heal": "heal"}
_started_as: list[str] = []  # how, where it was not as a script


def recipes_folder() -> Path:
    """The scripts with their configs: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parents[1] / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"


def find_config(recipe: str, name: str) -> Path:
    """The path of a config: a file, or the name of one that comes with the recipe.

    Raises:
        FileNotFoundError: if it is neither; the message names those that there are.
    """
    own = recipes_folder() / "configs" / recipe
    for path in (Path(name), own / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in own.glob("*.yaml")))
    raise FileNotFoundError(f"--config: there is no file {name!r}; those that come with {recipe} are {known}")


def start(recipe: str, words: list[str]) -> None:
    """Runs the script of a recipe in this process, as `python recipes/RECIPE.py WORDS` does.

    Raises:
        ValueError: if there is no such recipe.
        ImportError: if an extra is missing; the message names it.
    """
    if recipe not in RECIPES:
        raise ValueError(f"train: there is no recipe {recipe!r}; there are {', '.join(RECIPES)}")
    for package in ("trl", "peft", "accelerate", "datasets"):
        if find_spec(package) is None:
            raise ImportError(f"training needs {package}: pip install 'hf-lnscale[train]'")
    before, sys.argv = sys.argv, ["hf-lnscale", *words]
    _started_as[:] = ["hf-lnscale", "train", recipe]
    try:
        runpy.run_path(str(recipes_folder() / f"{RECIPES[recipe]}.py"), run_name="__main__")
    finally:
        sys.argv = before
        _started_as.clear()


def command(public: bool = False) -> str:
    """The command line that this process was started with; to show to others, without where its paths lie."""
    words = [*(_started_as or ["python", sys.argv[0]]), *sys.argv[1:]]
    return public_command(words) if public else shlex.join(words)
