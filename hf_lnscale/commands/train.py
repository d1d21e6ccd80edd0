"""`hf-lnscale train`."""

from __future__ import annotations

from typing import Annotated

import typer

from ..core.errors import require_packages


def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="pretrain, continue, sft or heal.")] = "",
) -> None:
    """Train a model with a recipe: pretrain, continue, sft or heal.

    `hf-lnscale train sft --help` lists all options.
    """
    from ..training.scripts import RECIPES, recipes_folder

    if recipe in ("", "--help"):
        print(
            f"usage: hf-lnscale train {{{','.join(RECIPES)}}} [--config NAME_OR_FILE] [OPTIONS]\n\n"
            "hf-lnscale train sft --help lists the options of sft. On several GPUs, use an accelerate config:\n"
            "accelerate launch --config_file FILE -m hf_lnscale train sft ...\n\n"
            f"Recipes, their configs and accelerate configs are in\n{recipes_folder()}"
        )
        return
    start(recipe, context.args)


def start(recipe: str, words: list[str]) -> None:
    """Runs a recipe in this process, like `python recipes/RECIPE.py WORDS`."""
    from ..training.scripts import RECIPES, import_recipe

    if recipe not in RECIPES:
        raise ValueError(f"train: there is no recipe {recipe!r}; use one of {', '.join(RECIPES)}")
    require_packages("training", "train", "trl", "peft", "accelerate", "datasets")
    from ..training.recipe_run import launch

    module = import_recipe(RECIPES[recipe])
    launch(module.make_parser(f"hf-lnscale train {recipe}"), module.main, words)
