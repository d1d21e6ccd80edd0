"""The command line, a thin face on the library.

A verb is a function with `@app.command()`: the first line of its docstring is what `hf-lnscale --help` says of it, and
whatever it raises becomes a line on stderr, in `main`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

# typer and rich come with transformers, whose own command line is made of them.
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig
from transformers.utils import logging

from .. import __version__
from ..checkpoints.folders import public_command

_EPILOG = """
[bold]Examples[/bold]

hf-lnscale info MODEL
hf-lnscale diagnose MODEL --data text.txt --out report
hf-lnscale prune MODEL --data text.txt --layers 2 --out smaller
hf-lnscale evaluate MODEL smaller --data text.txt --tasks arc_easy
hf-lnscale export trained --out plain
hf-lnscale run accelerate launch train.py

A MODEL is a folder, a .gguf file or the folder that it is in, or a name on the Hub.

Exit codes: 0 done, 1 failed, 2 unreadable command line, 130 interrupted; run has those of the program.
"""

app = typer.Typer(
    name="hf-lnscale",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Against the curse of depth in transformers models: LayerNorm Scaling, and layers dropped by measurement.",
    epilog=_EPILOG,
)

Checkpoint = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A folder, a .gguf file or the folder that it is in, or a name on the Hub."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_debug = False


def _version(show: bool) -> None:
    if show:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error happened: the whole traceback.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    global _debug
    _debug = debug
    logging.set_verbosity_error()


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the models, the picture and results.json.")] = Path(
        "lnscale-demo"
    ),
    fast: Annotated[bool, typer.Option("--fast", help="Half a minute: smaller models, a few steps.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of both trainings.")] = 0,
) -> None:
    """See the curse of depth, and the cures, in minutes.

    Measures a real model layer by layer, trains a small one with and without
    LayerNorm Scaling, ships it, and cuts a model.
    """
    from .demo import run

    run(out, fast=fast, seed=seed)


@app.command()
def info(
    checkpoint: Checkpoint,
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint is: family, layers, scales, cuts.

    Reads no weights.
    """
    from ..checkpoints.export import read_info
    from ..core.config import LNScalingConfig

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
    console.print(f"  layers   {found.num_layers or 'not counted in its configuration'}", highlight=False)
    if found.dropped:
        gone = ", ".join(map(str, found.dropped["layers"]))
        base = f" of {found.dropped['base']}" if found.dropped["base"] else ""
        console.print(f"  dropped  {gone} of the {found.dropped['num_hidden_layers']} layers{base}", highlight=False)
    console.print(f"  scaling  {state}", highlight=False)
    if scaling and found.num_layers:
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
    out: Annotated[Path, typer.Option(help="Folder to write; a file that ends in .gguf with --format gguf.")],
    format: Annotated[str, typer.Option(help="safetensors, or gguf: by llama.cpp's converter.")] = "safetensors",
    converter: Annotated[
        Path | None,
        typer.Option(help="llama.cpp's folder, or its convert_hf_to_gguf.py; else LLAMA_CPP and PATH are looked in."),
    ] = None,
    outtype: Annotated[str, typer.Option(help="Of a GGUF's weights: f32, f16, bf16, q8_0, auto.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Fold the scale into the weights, for any runtime; or GGUF.

    With --format gguf it becomes one file for llama.cpp; a checkpoint without
    a scale is taken as it is then.
    """
    if format == "gguf":
        from ..checkpoints.gguf import export_gguf

        print(f"wrote {export_gguf(checkpoint, out, converter=converter, outtype=outtype, force=force)}")
        return
    if format != "safetensors":
        raise typer.BadParameter(f"{format!r} is none of safetensors, gguf", param_hint="--format")
    from ..checkpoints.export import export as write

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
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens in a window; 512, or the positions of the model where these are fewer.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows at a time.")] = 8,
    dtype: Annotated[str, typer.Option(help="Of the weights: auto, float32, bfloat16, ...")] = "auto",
    device: Annotated[str | None, typer.Option(help="To compute on; a GPU if there is one.")] = None,
    device_map: Annotated[str | None, typer.Option(help="Such as auto: spread over devices, or offloaded.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print diagnosis.json; with --compare, a list of the two.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a diagnosis that is there.")] = False,
) -> None:
    """See what each layer of a model does and is worth: a report.

    The curse of depth in a model of yours: tables here, plots in the report.
    """
    from ..checkpoints.names import Placement
    from ..diagnosis.folder import run
    from ..measuring.text import Windows

    found = run(
        model, data, out, compare=compare, windows=Windows(tokens, seq_len, batch_size),
        placement=Placement(dtype, device, device_map), draw=plots, force=force, loss=loss, gradients=gradients,
        jacobian=jacobian,
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
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens in a window; 512, or the positions of the model where these are fewer.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows at a time.")] = 8,
    dtype: Annotated[str, typer.Option(help="Of the weights: auto, float32, bfloat16, ...")] = "auto",
    device: Annotated[str | None, typer.Option(help="To compute on; a GPU if there is one.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Drop layers, chosen by measurement: a smaller checkpoint.

    Give one of the three: --layers, --max-ppl-increase or --drop.
    """
    from ..checkpoints.names import Placement
    from ..core.record import get_ln_scaling
    from ..measuring.text import Windows
    from ..pruning.prune import prune as run

    plan, table = run(
        checkpoint, data, out, num_layers=layers, max_perplexity_increase=_share(max_ppl_increase),
        drop=_indices(drop), method=method, heal=None if heal == "none" else heal,
        windows=Windows(tokens, seq_len, batch_size), placement=Placement(dtype, device), force=force,
        command=public_command(["hf-lnscale", *sys.argv[1:]]),
    )  # fmt: skip
    if as_json:
        print(json.dumps({"path": str(out), **dataclasses.asdict(plan)}, indent=2))
        return
    Console().print(table)
    if plan.heal is not None and "healed" not in plan.perplexity:
        print("healing did not help on held-out data and was left out")
    if get_ln_scaling(AutoConfig.from_pretrained(out)):
        print(f"wrote {out}: its LayerNorm Scaling is active, as before; hf-lnscale export makes it a plain checkpoint")
    else:
        print(f"wrote {out}: a plain checkpoint, loads without hf_lnscale")


@app.command()
def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="What to measure; the others are compared with the first.")
    ],
    data: Annotated[
        Path | None, typer.Option(help="Text, or JSON lines with a column text or messages, for perplexity.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Of lm-evaluation-harness, as in hellaswag,arc_easy; or files of tasks.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="A folder with files of tasks.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only so many documents of each task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples in front of each question of a task.")] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Only the first of the text's bytes.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens in a window; 1024, or as many as all models can.")] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens that a window moves on by; half of it.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows, or requests of a task, at a time.")] = 4,
    speed: Annotated[bool, typer.Option("--speed/--no-speed", help="Measure speed and memory.")] = True,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt that speed is measured with.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode after it.")] = 32,
    repeats: Annotated[int, typer.Option(help="Runs that speed is the median of.")] = 5,
    dtype: Annotated[str, typer.Option(help="Of the weights: auto, float32, bfloat16, ...")] = "auto",
    device: Annotated[str | None, typer.Option(help="To compute on; a GPU if there is one.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write it too: a file .json or .md, or the model's folder.")] = None,
    as_json: AsJson = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Measure models side by side: quality, speed, memory, size.

    Perplexity and bits per byte of a text, tasks of lm-evaluation-harness,
    tokens per second, time to the first token, peak memory, parameters, size
    on disk. The first model is the reference; differences have standard errors.
    """
    from ..checkpoints.names import Placement
    from ..evaluation import evaluate as run

    found = run(
        models, data, tasks=[task.strip() for task in (tasks or "").split(",") if task.strip()],
        include_path=include_path, limit=limit, num_fewshot=num_fewshot, max_bytes=max_bytes, seq_len=seq_len,
        stride=stride, batch_size=batch_size, speed=speed, prompt_tokens=prompt_tokens, new_tokens=new_tokens,
        repeats=repeats, placement=Placement(dtype, device),
    )  # fmt: skip
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
    elif as_markdown:
        print(found.markdown())
    else:
        console = Console()
        console.print(found.table())
        console.print(found.notes, highlight=False, markup=False)
    if out is not None:
        print(f"wrote {found.save(out)}", file=sys.stderr)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of a checkpoint.")],
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="Repository on the Hub, as in me/model; made if it does not exist.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be uploaded; needs no network.")] = False,
    evaluation: Annotated[
        Path | None, typer.Option(help="JSON that evaluate --out wrote, for the card; else the folder's own figures.")
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="Name on the Hub of the model that it was made from.")] = None,
    allow_scaled: Annotated[
        bool, typer.Option("--allow-scaled", help="Upload an active scale, which needs hf_lnscale to load.")
    ] = False,
    private: Annotated[bool | None, typer.Option("--private/--public", help="Of a repository made new.")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    as_json: AsJson = False,
) -> None:
    """Upload a checkpoint to the Hub, its figures in the card.

    What belongs to a training run (optimizer, logs, checkpoints) stays here.
    """
    from ..checkpoints.hub import push as run

    done = run(
        folder, repo, evaluation=evaluation, base_model=base_model, allow_scaled=allow_scaled, private=private,
        message=message, dry_run=dry_run,
    )  # fmt: skip
    if as_json:
        print(json.dumps({**dataclasses.asdict(done), "folder": str(done.folder)}, indent=2))
    elif done.url:
        print(f"uploaded {len(done.files) + 1} files: {done.url}")
    else:
        print(done)


@app.command(context_settings={"allow_extra_args": True, "allow_interspersed_args": False})
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
    from .program import run as execute

    execute(program, context.args, module=module)


@app.command()
def env(as_json: AsJson = False) -> None:
    """Show versions, what is installed, devices."""
    from .environment import environment

    found = environment()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    packages, optional = found["packages"], {name for names in found["extras"].values() for name in names}
    console = Console(highlight=False, soft_wrap=True)
    rows: list[tuple[str, Any]] = [
        ("hf_lnscale", f"{found['hf_lnscale']['version']}  {found['hf_lnscale']['path']}"),
        ("python", f"{found['python']['version']}  {found['python']['path']}"),
        ("platform", found["platform"]),
        *((name, version) for name, version in packages.items() if name not in optional),
        *(
            (extra, ", ".join(f"{name} {packages[name] or 'no'}" for name in names))
            for extra, names in found["extras"].items()
        ),
        ("devices", "; ".join(found["devices"])),
        ("threads", found["threads"]),
        ("flags", "on" if found["flags"] else "off"),
        ("llama.cpp", found["llama_cpp"] or "no converter to GGUF found"),
    ]  # fmt: skip
    for name, value in rows:
        console.print(f"{name:16} {value}", markup=False)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    no_args_is_help=False,
)
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


def main() -> None:
    """Runs the command line; a failure is one line on stderr, with a hint, and exit code 1."""
    warnings.showwarning = _show_warning
    try:
        app(prog_name="hf-lnscale")
    except Exception as error:
        if _debug:
            raise
        print(f"hf-lnscale: {_message(error)}\n  hint: {_hint(error)}", file=sys.stderr)
        raise SystemExit(1) from None


def _show_warning(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
    print(f"hf-lnscale: warning: {message}", file=sys.stderr)


def _message(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0] if lines else ""
    if isinstance(error, (ValueError, OSError, ImportError, RuntimeError)) and said:
        return said
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _hint(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "a smaller --batch-size or --seq-len, or --dtype bfloat16, needs less memory"
    if "is not a local folder" in str(error) or "couldn't connect" in str(error):
        return "a model is a folder, a .gguf file or the folder that it is in, or a name on the Hub"
    verb = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    return f"hf-lnscale {verb} --help says what is valid; hf-lnscale --debug {verb} ... shows where it happened"


if __name__ == "__main__":
    main()
