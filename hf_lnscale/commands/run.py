"""`hf-lnscale run`."""

from __future__ import annotations

from typing import Annotated

import typer

from .program import become


def run(
    context: typer.Context,
    program: Annotated[
        str, typer.Argument(metavar="PROGRAM [ARGS]...", help="A script, or a command of this Python environment.")
    ],
    module: Annotated[bool, typer.Option("-m", "--module", help="PROGRAM is a module, as with python -m.")] = False,
) -> None:
    """Run any Python program with the flags on, unchanged.

    In the processes that it starts too. What follows PROGRAM is the
    program's own; so is the exit code.

    hf-lnscale run lm_eval --model hf --model_args pretrained=X,ln_scaling=True
    hf-lnscale run trl sft --config sft.yaml
    hf-lnscale run accelerate launch train.py
    """
    become(program, context.args, module=module)
