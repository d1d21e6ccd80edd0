"""Draws the figures with matplotlib. Two models share the same axes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.errors import ArgumentError, require_packages
from .figures import COLORS, FIGURES, LINEAR_UP_TO, Figure
from .result import DiagnosisData

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Picture

_PICTURES = tuple(dict.fromkeys(figure.picture for figure in FIGURES))


def plot(what: str, diagnoses: Sequence[DiagnosisData]) -> Picture:
    """Draws a picture with one row per measured figure and one column per diagnosis."""
    if what not in _PICTURES:
        raise ArgumentError("what", what, f"one of {', '.join(_PICTURES)}")
    require_packages("plotting", "plot", "matplotlib")
    from matplotlib.figure import Figure as Picture
    from matplotlib.ticker import MaxNLocator

    rows = _measured(what, diagnoses)
    if not rows:
        raise ArgumentError("what", what, problem="was not measured")
    size = (7.2 if len(diagnoses) == 1 else 12, 4.2 if len(rows) == 1 else 2.2 * len(rows))
    picture = Picture(figsize=size, layout="constrained")
    grid = picture.subplots(len(rows), len(diagnoses), squeeze=False, sharey="row")
    for axes, figure in zip(grid, rows, strict=True):
        axes[0].set_ylabel(figure.unit)
        for axis, one, color in zip(axes, diagnoses, COLORS, strict=False):
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xlabel("layer")
            if figure.kind != "blocks":
                _draw(axis, figure, one, color)
        if figure.kind == "blocks":
            picture.colorbar(_draw_blocks(axes, diagnoses), ax=list(axes), label="angular distance / pi")
    for axis, one in zip(grid[0], diagnoses, strict=True):
        axis.set_title(one.name.replace("$", r"\$"), loc="left")
    return picture


def save_all(diagnoses: Sequence[DiagnosisData], folder: str | os.PathLike[str]) -> None:
    """Writes every picture that has measurements, as PNG and as SVG."""
    for what in _PICTURES:
        if _measured(what, diagnoses):
            for suffix in ("png", "svg"):
                plot(what, diagnoses).savefig(Path(folder) / f"{what}.{suffix}", dpi=120)


def _measured(what: str, diagnoses: Sequence[DiagnosisData]) -> list[Figure]:
    return [figure for figure in FIGURES if figure.picture == what and figure.measured(diagnoses)]


def _draw(axis: Any, figure: Figure, one: DiagnosisData, model_color: str) -> None:
    for line in figure.lines:
        values, errors = one.values(line.field), one.values(f"{line.field}_error")
        layers = [layer for layer, value in enumerate(values) if value is not None]
        values = [values[layer] for layer in layers]
        errors = [errors[layer] or 0 for layer in layers]
        color = "gray" if "muted" in line.style else model_color
        if figure.kind == "bars":
            axis.bar(layers, values, color=color)
        else:
            dash = next((dash for word, dash in (("dashed", "--"), ("dotted", ":")) if word in line.style), "-")
            marker = "o" if "dots" in line.style or "rings" in line.style else ""
            fill = {"mfc": "white"} if "rings" in line.style else {}
            axis.plot(layers, values, dash, marker=marker, ms=3.5, lw=1.2, color=color, label=line.label, **fill)
        if any(errors):
            axis.errorbar(layers, values, errors, fmt="none", color="black" if figure.kind == "bars" else color, lw=1)
    if figure.scale == "symlog":
        axis.set_yscale("symlog", linthresh=LINEAR_UP_TO)
        axis.axhline(0, color="black", lw=0.8)
    else:
        axis.set_yscale("log")
    if len(figure.lines) > 1:
        axis.legend(frameon=False)


def _draw_blocks(axes: Sequence[Any], diagnoses: Sequence[DiagnosisData]) -> Any:
    """Draws angular distances, one cell per block of layers, on one color scale; returns the last image."""
    from matplotlib.ticker import MaxNLocator

    tables = [np.array(one.angular, dtype=float) for one in diagnoses]
    top = max(float(np.nanmax(table)) for table in tables)
    for axis, table in zip(axes, tables, strict=True):
        layers = len(table)
        image = axis.imshow(
            table.T, origin="lower", aspect="auto", cmap="viridis_r", vmin=0, vmax=top,
            extent=(-0.5, layers - 0.5, 0.5, layers + 0.5),
        )  # fmt: skip
        sizes = range(1, layers)
        best = [int(np.nanargmin(table[: layers - n + 1, n - 1])) for n in sizes]
        axis.plot(best, sizes, ".", color="white", ms=5, mec="black", mew=0.5, label="least of its size")
        axis.set(xlabel="first layer of the block")
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(loc="upper right", frameon=False)
    return image
