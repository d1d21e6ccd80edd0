"""`hf-lnscale train`."""

from __future__ import annotations

from typing import Annotated

import typer


def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="pretrain, continue, sft or heal.")] = "",
) -> None:
    """Train a model by a recipe: pretrain, continue, sft or heal.

    `hf-lnscale train sft --help` lists all options.
    """
    from ..training.scripts import RECIPES, recipes_folder, start

    if recipe in ("", "--help"):
        print(
            f"usage: hf-lnscale train {{{','.join(RECIPES)}}} [--config NAME_OR_FILE] [OPTIONS]\n\n"
            "hf-lnscale train sft --help lists the options of sft. On several GPUs, with a config of accelerate's:\n"
            "accelerate launch --config_file FILE -m hf_lnscale train sft ...\n\n"
            f"Scripts, their configs and those for accelerate are in\n{recipes_folder()}"
        )
        return
    start(recipe, context.args)
