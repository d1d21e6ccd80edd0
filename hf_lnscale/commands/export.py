"""`hf-lnscale export`, and `fold`, another name under which it is looked for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Option

from ..core.display import one_line
from .options import Checkpoint, Force, written


def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, Option(help="Folder to write; a file that ends in .gguf with --format gguf.")],
    format: Annotated[
        Literal["safetensors", "zeros", "deci", "gguf"],
        Option(
            help="zeros: fills layers without attention or MLP; deci: keeps them, for vLLM; "
            "gguf: by llama.cpp's converter."
        ),
    ] = "safetensors",
    converter: Annotated[
        Path | None, Option(help="llama.cpp's folder, or its convert_hf_to_gguf.py; default: LLAMA_CPP, or PATH.")
    ] = None,
    outtype: Annotated[str, Option(help="Weights in a GGUF file: f32, f16, bf16, q8_0, auto.")] = "auto",
    force: Force = False,
) -> None:
    """Fold the scale into the weights, for any runtime; or GGUF.

    With --format zeros, layers that lack attention or MLP get them back, with
    all weights zero: the same outputs, the size and speed of whole layers.
    With --format deci they stay as they are, for vLLM and llama.cpp.
    With --format gguf the result is one file for llama.cpp; the checkpoint
    may then be one without a scale.
    """
    if format == "gguf":
        from ..checkpoints.gguf import export_gguf

        print(f"wrote {one_line(export_gguf(checkpoint, out, converter=converter, outtype=outtype, force=force))}")
        return
    if format == "deci":
        from ..checkpoints.deci import export_deci, readers

        path = export_deci(checkpoint, out, force=force)
        print(f"wrote {one_line(path)}: {readers(path)}")
        return
    from ..checkpoints.names import read_config

    if format == "zeros":
        from ..checkpoints.zeros import export_zeros as write
    else:
        from ..checkpoints.export import export as write
    path = write(checkpoint, out, force=force)
    print(written(path, read_config(path)))


def fold() -> None:
    """Points to export."""
    print("hf-lnscale: folding is done by export: hf-lnscale export MODEL --out DIR", file=sys.stderr)
    raise typer.Exit(2)
