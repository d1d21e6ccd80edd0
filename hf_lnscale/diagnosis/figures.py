"""The figures of a diagnosis, as data. png.py and html_report.py draw them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .result import DiagnosisData

# Color of each model in PNG and SVG files; the report has separate ones for light and dark mode.
COLORS = ("#1f6feb", "#b3560b")
# The loss axis is linear up to here and logarithmic beyond.
LINEAR_UP_TO = 0.01


@dataclass(frozen=True)
class Line:
    """A curve, or a series of bars."""

    field: str  # see `DiagnosisData.values`; `{field}_error` is its standard error
    label: str  # name in the legend
    # Classes of the report's style sheet, also read by png.py: "accent" or "muted"; "solid", "dashed" or "dotted";
    # "dots" or "rings".
    style: str


@dataclass(frozen=True)
class Figure:
    """A figure with one panel per model, on the same axes."""

    key: str
    title: str
    caption: str
    unit: str  # label of the vertical axis
    lines: tuple[Line, ...] = ()
    scale: str = "log"  # or "symlog", for values of both signs
    kind: str = "lines"  # or "bars", or "blocks" for the angular distance of every block of layers
    picture: str = "layers"  # name of the PNG file in which it is a row

    def measured(self, diagnoses: Sequence[DiagnosisData]) -> bool:
        """Whether there is anything to draw."""
        return self.kind == "blocks" or any(one.measured(line.field) for one in diagnoses for line in self.lines)


FIGURES = (
    Figure(
        "variance",
        "How the residual stream grows",
        "The typical token is the geometric mean over tokens of the mean square, by which the norm before a layer "
        "divides. Where the other curves deviate from it, a few tokens or channels carry massive activations. All with "
        "standard errors except the largest channel, which is a single measurement on this text.",
        "variance after the layer",
        (
            Line("residual.typical", "typical token", "accent solid dots"),
            Line("residual.variance_without_first", "without first tokens", "muted solid"),
            Line("residual.variance", "all tokens", "muted dashed"),
            Line("residual.largest_channel_variance", "largest channel", "muted dotted"),
        ),
        picture="variance",
    ),
    Figure(
        "loss",
        "What each layer is worth",
        "Loss added by removing the layer, one at a time, without any training, with its standard error. The axis is "
        "linear around 0 and logarithmic beyond 0.01: one layer can be worth a hundred others.",
        "loss added, nats per token",
        (Line("loss_added", "loss added", "accent"),),
        scale="symlog",
        kind="bars",
        picture="loss_added",
    ),
    Figure(
        "angular",
        "Which blocks of layers could go together",
        "Angular distance between a block's input and output at the last token of each sequence, as a fraction of pi. "
        "Every cell is a block: its first layer on the horizontal axis, its size on the vertical. Dots: the least of "
        "each size. These are single measurements on this text, without a standard error.",
        "layers in the block",
        kind="blocks",
        picture="angular",
    ),
    Figure(
        "ratio",
        "What attention and MLP add",
        "Norm of a sub-layer's output over the norm of the stream that it is added to, mean over all tokens but the "
        "first of each sequence, with its standard error. A small value means that the layer changes little.",
        "output norm / stream norm",
        (Line("attention_ratio", "attention", "accent solid dots"), Line("mlp_ratio", "MLP", "accent dashed rings")),
    ),
    Figure(
        "jacobian",
        "How close each layer is to the identity",
        "Distance of the layer's Jacobian from the identity, |J - I| / |I| in the Frobenius norm, with its standard "
        "error. A layer that returns its input has distance 0.",
        "distance from the identity",
        (Line("jacobian_distance", "distance", "accent solid dots"),),
    ),
    Figure(
        "influence",
        "How far each layer turns the stream",
        "Block Influence: 1 - mean cosine of a layer's input and output, with its standard error.",
        "Block Influence",
        (Line("block_influence", "Block Influence", "accent solid dots"),),
    ),
)
