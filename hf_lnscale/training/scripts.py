"""Finds the recipes and their configs, without importing their dependencies."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

RECIPES = {"pretrain": "pretrain", "continue": "continue_pretrain", "sft": "sft", "heal": "heal"}


def recipes_folder() -> Path:
    """The folder of the recipes: inside the installed package, or next to it in a checkout."""
    inside = Path(__file__).parents[1] / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"


def find_config(recipe: str, name: str) -> Path:
    """The path of a config: an existing file, or the name of a config shipped with the recipe."""
    own = recipes_folder() / "configs" / recipe
    for path in (Path(name), own / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in own.glob("*.yaml")))
    raise FileNotFoundError(f"--config: there is no file {name!r}; configs shipped with {recipe} are {known}")


def import_recipe(script: str) -> ModuleType:
    """Imports a recipe as `hf_lnscale.recipes.SCRIPT`, a package that a checkout does not have."""
    package = ModuleType("hf_lnscale.recipes")
    package.__path__ = [str(recipes_folder())]
    sys.modules.setdefault(package.__name__, package)
    return import_module(f"{package.__name__}.{script}")
