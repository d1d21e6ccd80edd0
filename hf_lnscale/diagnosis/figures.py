"""The plots of a diagnosis, in the manner of the papers; two models share their axes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .result import Diagnosis

# One colour for each model, the same as in the report.
COLORS = ("#1f6feb", "#b3560b")


def plot(what: str, diagnoses: Sequence[Diagnosis]) -> Any:
    """See `Diagnosis.plot`."""
    if what not in PLOTS:
        raise ValueError(f"what must be one of {', '.join(PLOTS)}, got {what!r}")
    require_matplotlib()
    return PLOTS[what](diagnoses)


def require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError("plotting needs matplotlib: pip install 'hf-lnscale[plot]'") from None


def save_all(diagnoses: Sequence[Diagnosis], folder: str | os.PathLike[str]) -> list[Path]:
    """Writes every plot that there are measurements for, as PNG and as SVG."""
    written = []
    for what in PLOTS:
        if what == "loss_added" and any(one.baseline is None for one in diagnoses):
            continue
        figure = plot(what, diagnoses)
        for suffix in ("png", "svg"):
            written.append(Path(folder) / f"{what}.{suffix}")
            figure.savefig(written[-1], dpi=120)
    return written


def _panels(diagnoses: Sequence[Diagnosis], height: float, rows: int = 1) -> tuple[Any, Any]:
    """A column for each model; axes are shared along rows."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.2 if len(diagnoses) == 1 else 12, height), layout="constrained")
    axes = figure.subplots(rows, len(diagnoses), squeeze=False, sharey="row")
    for column, one in enumerate(diagnoses):
        axes[0, column].set_title(one.name, loc="left")
        for axis in axes[:, column]:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def variance(diagnoses: Sequence[Diagnosis]) -> Any:
    figure, axes = _panels(diagnoses, 4)
    for axis, one, color in zip(axes[0], diagnoses, COLORS, strict=False):
        residual = one.residual[1:]
        layers = [place["place"] - 1 for place in residual]
        axis.plot(layers, [p["largest_channel_variance"] for p in residual], ":", color="gray", label="largest channel")
        axis.plot(layers, [p["variance"] for p in residual], "--", color="gray", label="all tokens")
        axis.plot(
            layers, [p["variance_without_first"] for p in residual], color="gray", lw=1, label="without first tokens"
        )
        axis.plot(layers, [p["typical"] for p in residual], "o-", ms=4, color=color, label="typical token")
        axis.set(xlabel="after layer", yscale="log")
        axis.legend(frameon=False)
    axes[0, 0].set_ylabel("residual variance")
    return figure


def angular(diagnoses: Sequence[Diagnosis]) -> Any:
    from matplotlib.ticker import MaxNLocator

    figure, axes = _panels(diagnoses, 5)
    tables = [np.array(one.angular, dtype=float) for one in diagnoses]
    top = max(float(np.nanmax(table)) for table in tables)
    for axis, table in zip(axes[0], tables, strict=True):
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
    axes[0, 0].set_ylabel("layers in the block")
    figure.colorbar(image, ax=axes[0].tolist(), label="angular distance, share of pi")
    return figure


def loss_added(diagnoses: Sequence[Diagnosis]) -> Any:
    if any(one.baseline is None for one in diagnoses):
        raise ValueError("what: 'loss_added' was not measured; diagnose with loss=True")
    figure, axes = _panels(diagnoses, 4)
    for axis, one, color in zip(axes[0], diagnoses, COLORS, strict=False):
        axis.bar([layer["layer"] for layer in one.layers], [layer["loss_added"] for layer in one.layers], color=color)
        # A removal can lower the loss, and one layer can be worth a hundred others.
        axis.set(xlabel="layer removed")
        axis.set_yscale("symlog", linthresh=0.01)
        axis.axhline(0, color="black", lw=0.8)
    axes[0, 0].set_ylabel("loss added, nats a token")
    return figure


# What a layer does, in four figures: the titles, and the fields of a layer with the labels of their lines.
_MEASURES: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("output norm / residual norm", (("attention_ratio", "attention"), ("mlp_ratio", "MLP"))),
    ("Block Influence", (("block_influence", ""),)),
    ("gradient norm of the weights", (("gradient_norm", ""),)),
    ("|J - I| / |I|", (("jacobian_distance", ""),)),
)


def layers(diagnoses: Sequence[Diagnosis]) -> Any:
    """What each layer does, as far as it was measured."""
    measures = [
        (title, lines)
        for title, lines in _MEASURES
        if any(layer[name] is not None for one in diagnoses for layer in one.layers for name, _ in lines)
    ]
    figure, axes = _panels(diagnoses, 2.2 * len(measures), rows=len(measures))
    for row, (title, lines) in zip(axes, measures, strict=True):
        row[0].set_ylabel(title)
        for axis, one, color in zip(row, diagnoses, COLORS, strict=False):
            for style, (name, label) in zip(("o-", "o--"), lines, strict=False):
                found = [(layer["layer"], layer[name], layer.get(f"{name}_error") or 0) for layer in one.layers]
                points = [point for point in found if point[1] is not None]
                if points:
                    xs, ys, errors = zip(*points, strict=True)
                    axis.errorbar(xs, ys, errors, fmt=style, ms=3, lw=1, color=color, label=label)
            axis.set_yscale("log")
            if lines[0][1]:
                axis.legend(frameon=False)
    for axis in axes[-1]:
        axis.set_xlabel("layer")
    return figure


PLOTS: dict[str, Callable[[Sequence[Diagnosis]], Any]] = {
    "variance": variance,
    "angular": angular,
    "loss_added": loss_added,
    "layers": layers,
}
