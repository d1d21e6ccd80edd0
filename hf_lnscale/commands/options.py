"""Shared by several verbs: options, value parsers, quiet, and the line about a written checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from ..core.display import one_line

Checkpoint = Annotated[
    str, Argument(metavar="MODEL", help="A folder, a .gguf file or its folder, or a repository on the Hub.")
]
TEXT = "Text, or JSON lines, CSV or parquet with a column text or messages"
Data = Annotated[Path, Option(help=f"{TEXT}.")]
SeqLen = Annotated[int | None, Option(help="Tokens per window; defaults to 512 or the model's number of positions.")]
BatchSize = Annotated[int, Option(help="Windows per batch.")]
Dtype = Annotated[str, Option(help="Weight dtype: auto (the checkpoint's own), fp32, bf16, fp16.")]
Device = Annotated[str | None, Option(help="Device to compute on; defaults to a GPU if available.")]
Force = Annotated[bool, Option("--force", help="Replace the output of an earlier run.")]
AsJson = Annotated[bool, Option("--json", help="Print JSON.")]

_UNITS = {"": 1, "b": 1, **{f"{prefix}b": 1000**i for i, prefix in enumerate("kmgt", start=1)}}
_UNITS |= {f"{prefix}ib": 1024**i for i, prefix in enumerate("kmgt", start=1)}
_COUNTS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}


def parse_increase(value: str) -> float:
    """Parses a relative increase: "10%" or "0.1"."""
    try:
        number = float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        number = 0.0
    # Refuses 10 without a percent sign, which more likely means ten percent than a thousand.
    if not 0 < number < (float("inf") if value.endswith("%") else 1):
        raise typer.BadParameter(f"{value!r} is not a valid increase; use 10% or 0.1")
    return number


def parse_layers(value: str) -> list[int]:
    """Parses layers, counted from 0: "12,14,17", or with inclusive ranges "12-14,17"."""
    layers: list[int] = []
    for part in value.split(","):
        match = re.fullmatch(r"\s*(-?\d+)(?:-(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if first > last or (first < 0 and match and match[2]):
            raise typer.BadParameter(f"{value!r} is not a list of layers; use 12,14,17 or 12-14")
        layers += range(first, last + 1)
    return layers


def parse_bytes(value: str) -> int:
    """Parses a size: "4GiB", "500MB" or a number of bytes."""
    return int(_quantity(value, _UNITS, "size", "4GiB, 500MB or a number of bytes"))


def parse_count(value: str) -> int:
    """Parses a count: "1.1B", "500M" or a plain number."""
    return int(_quantity(value, _COUNTS, "count", "1.1B, 500M or a plain number"))


def _quantity(value: str, units: dict[str, float], what: str, valid: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower())
    if not match or match[2] not in units or not float(match[1]):
        raise typer.BadParameter(f"{value!r} is not a valid {what}; use {valid}")
    return float(match[1]) * units[match[2]]


def written(path: object, config: Any) -> str:
    """The line about a written checkpoint: where it is, and what loading it requires."""
    from ..core.record import record

    if record(config).sublayers:
        state = "layers lack attention or MLP; hf-lnscale export --format zeros makes it a plain checkpoint"
    elif record(config).active:
        state = "LayerNorm Scaling is active; hf-lnscale export makes it a plain checkpoint"
    else:
        state = "a plain checkpoint that loads without hf_lnscale"
    return f"wrote {one_line(path)}: {state}"


@contextmanager
def quiet_transformers(progress_bars: bool = True) -> Iterator[None]:
    """Suppresses transformers' hints on stderr, and its progress bars unless `progress_bars` is set."""
    from transformers.utils import logging

    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not progress_bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
