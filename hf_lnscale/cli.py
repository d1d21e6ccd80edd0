"""The command line, a thin face on the library."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

# typer and rich come with transformers, whose own command line is made of them.
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig
from transformers.utils import logging

from . import __version__

app = typer.Typer(
    name="hf-lnscale",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Against the curse of depth in transformers models: LayerNorm Scaling, and layers dropped by measurement.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage.",
)

Checkpoint = Annotated[str, typer.Argument(help="Folder of a checkpoint, or name of a repository on the Hub.")]


def _version(show: bool) -> None:
    if show:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    logging.set_verbosity_error()


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the models, the picture and results.json.")] = Path(
        "lnscale-demo"
    ),
    fast: Annotated[bool, typer.Option("--fast", help="Half a minute: smaller models, a few steps.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of both trainings.")] = 0,
) -> None:
    """See the curse of depth in a real model, train with and without the cure, ship the result, and cut a model."""
    from .demo import run

    run(out, fast=fast, seed=seed)


@app.command()
def info(
    checkpoint: Checkpoint,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show family, layers, the scale of each layer, what was folded and what was dropped; reads no weights."""
    from .export import read_info
    from .scaling import LNScalingConfig

    found = read_info(checkpoint)
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
        return
    state = "no LayerNorm Scaling"
    if scaling := LNScalingConfig.of(found.active or found.folded):
        way = f" (step {scaling.step} of {scaling.warmup_steps} on the way to {scaling.exponent:g})"
        where = "active: needs hf_lnscale to run" if found.active else "folded into the weights: runs anywhere"
        state = f"LayerNorm Scaling, exponent {scaling.exponent_now:g}{way if scaling.warming_up else ''}, {where}"
    console = Console()
    console.print(f"[bold]{found.path}[/bold]", highlight=False)
    family = found.family if found.family == found.model_type else f"{found.family} in {found.model_type}"
    console.print(f"  family   {family}{'' if found.supported else ' (not supported)'}", highlight=False)
    console.print(f"  layers   {found.num_layers}", highlight=False)
    if found.dropped:
        gone = ", ".join(map(str, found.dropped["layers"]))
        base = f" of {found.dropped['base']}" if found.dropped["base"] else ""
        console.print(f"  dropped  {gone} of the {found.dropped['num_hidden_layers']} layers{base}", highlight=False)
    console.print(f"  scaling  {state}", highlight=False)
    if scaling:
        table = Table("layer", "depth", "scale")
        scaling = scaling.for_layers(found.num_layers)
        for position, (depth, scale) in enumerate(
            zip(scaling.depths or (), scaling.scales(found.num_layers), strict=True)
        ):
            table.add_row(str(position), str(depth), f"{scale:.4f}")
        console.print(table)


@app.command()
def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the folder if it is not empty.")] = False,
) -> None:
    """Fold the scale of a checkpoint into its weights: a plain checkpoint for any runtime."""
    from .export import export as write

    path = write(checkpoint, out, force=force)
    print(f"wrote {path}: a plain checkpoint, loads without hf_lnscale")


@app.command()
def diagnose(
    model: Checkpoint,
    data: Annotated[Path, typer.Option(help="Text, or JSON lines with a column text or messages, to measure on.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html, diagnosis.json and the plots.")],
    compare: Annotated[str | None, typer.Option(help="A second checkpoint, shown beside the first.")] = None,
    loss: Annotated[bool, typer.Option("--loss/--no-loss", help="Loss without each layer: about L / 2 passes.")] = True,
    gradients: Annotated[bool, typer.Option("--gradients/--no-gradients", help="Gradient norms: 4 passes.")] = True,
    jacobian: Annotated[
        bool, typer.Option("--jacobian/--no-jacobian", help="Jacobians: 4 passes over 8 windows.")
    ] = True,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Write PNG and SVG; needs matplotlib.")] = True,
    tokens: Annotated[int, typer.Option(help="Tokens of the data to use.")] = 16_384,
    seq_len: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Windows at a time.")] = 8,
    dtype: Annotated[str, typer.Option(help="Of the weights: auto, float32, bfloat16, ...")] = "auto",
    device: Annotated[str | None, typer.Option(help="To compute on; a GPU if there is one.")] = None,
    device_map: Annotated[str | None, typer.Option(help="Such as auto: spread over devices, or offloaded.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print diagnosis.json; with --compare, a list of the two.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a diagnosis that is there.")] = False,
) -> None:
    """See the curse of depth in a model: what each layer does, what it is worth, and a report to look at."""
    from .diagnosis.run import run

    found = run(
        model, data, out, compare=compare, dtype=dtype, device=device, device_map=device_map, draw=plots, force=force,
        loss=loss, gradients=gradients, jacobian=jacobian, num_tokens=tokens, seq_len=seq_len, batch_size=batch_size,
    )  # fmt: skip
    if as_json:
        documents = [json.loads(one.to_json()) for one in found]
        print(json.dumps(documents if compare else documents[0], indent=1))
        return
    print("\n".join(str(one) for one in found))
    print(f"wrote {out / 'report.html'}")


def _share(value: str | None) -> float | None:
    """Reads "10%" or "0.1"."""
    if value is None:
        return None
    try:
        share = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
        if not 0 < share < 1 and not value.endswith("%"):
            raise ValueError
    except ValueError:
        raise typer.BadParameter(f"--max-ppl-increase: {value!r} is no share; valid are 10% or 0.1") from None
    return share


def _indices(value: str | None) -> list[int] | None:
    if value is None:
        return None
    try:
        return [int(layer) for layer in value.split(",")]
    except ValueError:
        raise typer.BadParameter(f"--drop: {value!r} is no list of layers; valid is 12,14,17") from None


@app.command()
def prune(
    checkpoint: Checkpoint,
    data: Annotated[Path, typer.Option(help="Text, or JSON lines with a column text or messages, to measure on.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    layers: Annotated[int | None, typer.Option(help="Drop this many layers.")] = None,
    max_ppl_increase: Annotated[
        str | None, typer.Option(help="Drop as many as stay inside it on held-out data, as in 10%.")
    ] = None,
    drop: Annotated[str | None, typer.Option(help="Drop these layers, as in 12,14,17.")] = None,
    method: Annotated[str, typer.Option(help="How layers are chosen; see docs/pruning.md.")] = "best_of",
    heal: Annotated[
        str,
        typer.Option(help="How to heal the cut without training: refit, linear, ..., none; auto: refit if possible."),
    ] = "auto",
    tokens: Annotated[int, typer.Option(help="Tokens of the data to use; a quarter is held out.")] = 65_536,
    seq_len: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Windows at a time.")] = 8,
    dtype: Annotated[str, typer.Option(help="Of the weights: auto, float32, bfloat16, ...")] = "auto",
    device: Annotated[str | None, typer.Option(help="To compute on; a GPU if there is one.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is there.")] = False,
) -> None:
    """Drop layers of a checkpoint, chosen by measurement, and write a smaller plain checkpoint."""
    from .depth.prune import prune as run
    from .scaling import get_ln_scaling

    words = " ".join(shlex.quote(word) for word in sys.argv[1:])
    plan, table = run(
        checkpoint, data, out, num_layers=layers, max_perplexity_increase=_share(max_ppl_increase),
        drop=_indices(drop), method=method, heal=None if heal == "none" else heal, num_tokens=tokens,
        seq_len=seq_len, batch_size=batch_size, dtype=dtype, device=device, force=force, command=f"hf-lnscale {words}",
    )  # fmt: skip
    Console().print(table)
    if plan.heal is not None and "healed" not in plan.perplexity:
        print("healing did not help on held-out data and was left out")
    if get_ln_scaling(AutoConfig.from_pretrained(out)):
        print(f"wrote {out}: its LayerNorm Scaling is active, as before; hf-lnscale export makes it a plain checkpoint")
    else:
        print(f"wrote {out}: a plain checkpoint, loads without hf_lnscale")


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    no_args_is_help=False,
)
def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="pretrain, continue, sft or heal.")] = "",
) -> None:
    """Train a model by a recipe: pretrain, continue, sft or heal. `hf-lnscale train sft --help` lists all options."""
    from .training.scripts import RECIPES, recipes_folder, start

    if recipe in ("", "--help"):
        print(
            f"usage: hf-lnscale train {{{','.join(RECIPES)}}} [--config NAME_OR_FILE] [OPTIONS]\n\n"
            "hf-lnscale train sft --help lists the options of sft. On several GPUs, with a config of accelerate's:\n"
            "accelerate launch --config_file FILE -m hf_lnscale.cli train sft ...\n\n"
            f"Scripts, their configs and those for accelerate are in\n{recipes_folder()}"
        )
        return
    start(recipe, context.args)


def main() -> None:
    """Runs the command line; an expected failure is one line on stderr and exit code 1."""
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        print(f"hf-lnscale: {lines[0] if lines else type(error).__name__}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
