"""`hf-lnscale export`, and `fold`, another name under which it is looked for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..core.display import one_line
from .options import Checkpoint, Force


def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="Folder to write; a file that ends in .gguf with --format gguf.")],
    format: Annotated[
        Literal["safetensors", "gguf"], typer.Option(help="gguf: by llama.cpp's converter.")
    ] = "safetensors",
    converter: Annotated[
        Path | None,
        typer.Option(help="llama.cpp's folder, or its convert_hf_to_gguf.py; default: LLAMA_CPP, or PATH."),
    ] = None,
    outtype: Annotated[str, typer.Option(help="Weights in a GGUF file: f32, f16, bf16, q8_0, auto.")] = "auto",
    force: Force = False,
) -> None:
    """Fold the scale into the weights, for any runtime; or GGUF.

    With --format gguf the result is one file for llama.cpp; the checkpoint
    may then be one without a scale.
    """
    if format == "gguf":
        from ..checkpoints.gguf import export_gguf

        print(f"wrote {one_line(export_gguf(checkpoint, out, converter=converter, outtype=outtype, force=force))}")
        return
    from ..checkpoints.export import export as write

    path = write(checkpoint, out, force=force)
    print(f"wrote {one_line(path)}: a plain checkpoint, loads without hf_lnscale")


def fold() -> None:
    """Points to export."""
    print("hf-lnscale: folding is done by export: hf-lnscale export MODEL --out DIR", file=sys.stderr)
    raise typer.Exit(2)
