"""Shared by several verbs: options, parsers of values, the line about a checkpoint that was written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from ..core.display import one_line

Checkpoint = Annotated[
    str, Argument(metavar="MODEL", help="A folder, a .gguf file or the folder that it is in, or a name on the Hub.")
]
Data = Annotated[Path, Option(help="Text, or JSON lines with a column text or messages, to measure on.")]
SeqLen = Annotated[
    int | None, Option(help="Tokens in a window; 512, or the number of positions of the model if smaller.")
]
BatchSize = Annotated[int, Option(help="Windows at a time.")]
Dtype = Annotated[str, Option(help="Type of the weights: auto (the checkpoint's own), fp32, bf16, fp16.")]
Device = Annotated[str | None, Option(help="Device to compute on; a GPU if there is one.")]
Force = Annotated[bool, Option("--force", help="Replace what an earlier run wrote there.")]
AsJson = Annotated[bool, Option("--json", help="Print JSON.")]

_UNITS = {"": 1, "b": 1, **{f"{prefix}b": 1000**i for i, prefix in enumerate("kmgt", start=1)}}
_UNITS |= {f"{prefix}ib": 1024**i for i, prefix in enumerate("kmgt", start=1)}
_COUNTS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}


def parse_increase(value: str) -> float:
    """Reads a relative increase, "10%" or "0.1"."""
    try:
        number = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        number = 0.0
    # 10 without a percent sign is more likely ten percent than a thousand.
    if not 0 < number < (float("inf") if value.endswith("%") else 1):
        raise typer.BadParameter(f"{value!r} is not a valid increase; use 10% or 0.1")
    return number


def parse_layers(value: str) -> list[int]:
    """Reads layers, counted from 0: "12,14,17", with ranges that include their ends, as in "12-14,17"."""
    layers: list[int] = []
    for part in value.split(","):
        match = re.fullmatch(r"\s*(-?\d+)(?:-(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if first > last:
            raise typer.BadParameter(f"{value!r} is not a list of layers; use 12,14,17 or 12-14")
        layers += range(first, last + 1)
    return layers


def parse_bytes(value: str) -> int:
    """Reads a size, "4GiB", "500MB" or a number of bytes."""
    return int(_quantity(value, _UNITS, "size", "4GiB, 500MB or a number of bytes"))


def parse_count(value: str) -> int:
    """Reads a count, "1.1B", "500M" or a plain number."""
    return int(_quantity(value, _COUNTS, "count", "1.1B, 500M or a plain number"))


def _quantity(value: str, units: dict[str, float], what: str, valid: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower())
    if not match or match[2] not in units or not float(match[1]):
        raise typer.BadParameter(f"{value!r} is not a valid {what}; use {valid}")
    return float(match[1]) * units[match[2]]


def written(path: object, config: Any) -> str:
    """The line about a checkpoint that was written: where, and what it takes to load it."""
    from ..core.record import record

    if record(config).sublayers:
        state = "layers lack attention or MLP: needs hf_lnscale to load; hf-lnscale export --format zeros does not"
    elif record(config).active:
        state = "its LayerNorm Scaling is active; hf-lnscale export makes it a plain checkpoint"
    else:
        state = "a plain checkpoint, loads without hf_lnscale"
    return f"wrote {one_line(path)}: {state}"
