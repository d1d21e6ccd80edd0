"""`hf-lnscale export`, and `fold`, which points to it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Option

from ..core.display import one_line
from ..core.errors import ArgumentError
from .options import Checkpoint, Force, written


def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, Option(help="Folder to write; with --format gguf, a .gguf file.")],
    format: Annotated[
        Literal["safetensors", "zeros", "deci", "gguf"],
        Option(help="zeros: fill missing sub-layers; deci: leave them out, for vLLM; gguf: use llama.cpp's converter."),
    ] = "safetensors",
    converter: Annotated[
        Path | None, Option(help="llama.cpp's folder or convert_hf_to_gguf.py; default: LLAMA_CPP or PATH.")
    ] = None,
    outtype: Annotated[
        str | None, Option(help="Weight type in a GGUF file: f32, f16, bf16, q8_0, auto (the default).")
    ] = None,
    force: Force = False,
) -> None:
    """Fold the scale into the weights for any runtime, or write GGUF.

    With --format zeros, missing attention and MLPs are restored with all
    weights zero: the same outputs, at the size and speed of complete layers.
    With --format deci they stay missing, for vLLM and llama.cpp.
    With --format gguf the result is one file for llama.cpp; the checkpoint
    need not have a scale.
    """
    if format == "gguf":
        from ..checkpoints.gguf import export_gguf

        path = export_gguf(checkpoint, out, converter=converter, outtype=outtype or "auto", force=force)
        print(f"wrote {one_line(path)}")
        return
    if out.suffix == ".gguf":
        raise ArgumentError("out", out, problem="is a .gguf file, which requires `format=gguf`")
    for name, value in {"converter": converter, "outtype": outtype}.items():
        if value is not None:
            raise ArgumentError(name, value, problem="is valid with `format=gguf` only")
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
    print("hf-lnscale: use export to fold: hf-lnscale export MODEL --out DIR", file=sys.stderr)
    raise typer.Exit(2)
