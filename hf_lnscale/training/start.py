"""Starts a recipe: what `hf-lnscale train` runs."""

from __future__ import annotations

from ..core.errors import require_packages
from .scripts import RECIPES, import_recipe


def start(recipe: str, words: list[str]) -> None:
    """Runs a recipe in this process, as `python recipes/RECIPE.py WORDS` does."""
    if recipe not in RECIPES:
        raise ValueError(f"train: there is no recipe {recipe!r}; there are {', '.join(RECIPES)}")
    require_packages("training", "train", "trl", "peft", "accelerate", "datasets")
    from .recipe_run import launch

    module = import_recipe(RECIPES[recipe])
    launch(module.make_parser(f"hf-lnscale train {recipe}"), module.main, words)
