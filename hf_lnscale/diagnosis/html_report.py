"""The report: one HTML file with its figures, its data and its script inside.

The figures are drawn here, as SVG, so that the page is whole without its script, in print too; the script adds hover,
sorting and the choice of light or dark. Colours are those of the style sheet, by class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from . import verdict
from .verdict import number, ranges, times

if TYPE_CHECKING:
    from .result import Diagnosis

# Of a figure, in its own units; on a wide screen these are pixels.
WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 66, 8, 34, 48
# Colours of the heat map, from nothing to much: viridis, reversed (van der Walt and Smith 2015), at nine points.
_HEAT = ("#fde725", "#aadc32", "#5ec962", "#27ad81", "#21918c", "#2c728e", "#3b528b", "#472d7b", "#440154")
_SHADES = 32


def render(diagnoses: Sequence[Diagnosis]) -> str:
    """The report of one diagnosis, or of two side by side, as HTML."""
    page = Environment(
        loader=PackageLoader("hf_lnscale.diagnosis", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html.j2")  # fmt: skip
    return page.render(
        diagnoses=diagnoses,
        title=" and ".join(one.name for one in diagnoses),
        changed=verdict.compare(*diagnoses) if len(diagnoses) == 2 else None,
        figures=[figure for figure in (_figure(spec, diagnoses) for spec in _FIGURES) if figure],
        columns=[column for column in _COLUMNS if any(_column(one, column) for one in diagnoses)],
        rows=_rows,
        data=[_data(one) for one in diagnoses],
        geometry=(WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM),
        number=number, times=times, ranges=ranges, heat=_HEAT, budgets=verdict.BUDGETS,
    )  # fmt: skip


# --- the table --------------------------------------------------------------------------------------------------------

# Title, what it is, and where it comes from: a field of the layer, or of the residual stream behind it.
_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("layer", "Layer, the first is 0", "layer"),
    ("typical", "Mean square of a typical token behind the layer", "residual.typical"),
    ("variance", "Variance of the residual stream behind the layer, all tokens", "residual.variance"),
    ("without first", "The same without the first token of each sequence", "residual.variance_without_first"),
    ("largest channel", "The largest variance of a single channel", "residual.largest_channel_variance"),
    ("attention", "Norm of attention's output over that of the stream", "attention_ratio"),
    ("MLP", "Norm of the MLP's output over that of the stream", "mlp_ratio"),
    ("influence", "Block Influence: 1 - mean cosine of input and output", "block_influence"),
    ("angle", "Angular distance of the layer's input and output at the last token, share of pi", "angular_distance"),
    ("loss added", "Loss added by removing the layer, nats a token", "loss_added"),
    ("ppl without", "Perplexity without the layer", "perplexity_without"),
    ("gradient", "Norm of the gradient of the layer's weights", "gradient_norm"),
    ("state gradient", "Norm of the gradient with respect to a token's state in front", "state_gradient_norm"),
    ("Jacobian", "Distance of the layer's Jacobian from the identity", "jacobian_distance"),
)


def _values(one: Diagnosis, field: str) -> list[Any]:
    if field.startswith("residual."):
        return [place[field.removeprefix("residual.")] for place in one.residual[1:]]
    return [layer[field] for layer in one.layers]


def _column(one: Diagnosis, column: tuple[str, str, str]) -> bool:
    return any(value is not None for value in _values(one, column[2]))


def _rows(one: Diagnosis, columns: list[tuple[str, str, str]]) -> list[list[tuple[Any, str]]]:
    """A row for each layer: value to sort by, and text."""
    rows = []
    for layer in range(len(one.layers)):
        row = []
        for _, _, field in columns:
            value = _values(one, field)[layer]
            text = str(value) if field == "layer" else number(value)
            error = one.layers[layer].get(f"{field}_error")
            row.append((value, f"{value:.3f} ± {error:.3f}" if error and value < 100 else text))
        rows.append(row)
    return rows


def _data(one: Diagnosis) -> dict[str, Any]:
    """What the script shows on hover."""
    return {
        "name": one.name,
        "angular": one.angular,
        **{field: _values(one, field) for _, _, field in _COLUMNS},
        "gradient_norm_error": _values(one, "gradient_norm_error"),
        "jacobian_distance_error": _values(one, "jacobian_distance_error"),
    }


# --- figures ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Line:
    field: str
    label: str
    style: str  # a class of the style sheet


@dataclass(frozen=True)
class _Spec:
    """A figure: a panel for each model, on the same axes."""

    key: str
    title: str
    says: str
    unit: str
    lines: tuple[_Line, ...]
    scale: str = "log"
    bars: bool = False


_FIGURES = (
    _Spec(
        "variance",
        "How the residual stream grows",
        "A typical token is the geometric mean over tokens of the mean square, which the norm in front of a layer "
        "divides by. Where the other curves leave it, a few tokens or channels carry massive activations.",
        "variance, behind the layer",
        (
            _Line("residual.typical", "typical token", "accent solid dots"),
            _Line("residual.variance_without_first", "without first tokens", "muted solid"),
            _Line("residual.variance", "all tokens", "muted dashed"),
            _Line("residual.largest_channel_variance", "largest channel", "muted dotted"),
        ),
    ),
    _Spec(
        "loss",
        "What each layer is worth",
        "Loss added by removing the layer, one at a time, without any training. The axis is linear around 0 and "
        "logarithmic beyond 0.01: one layer can be worth a hundred others.",
        "loss added, nats a token",
        (_Line("loss_added", "loss added", "accent"),),
        "symlog",
        True,
    ),
    _Spec("angular", "Which blocks of layers could go together", "", "layers in the block", ()),
    _Spec(
        "ratio",
        "What attention and MLP add",
        "Norm of a sub-layer's output over the norm of the stream that it is added to, mean over all tokens but the "
        "first of each sequence. Small: the layer changes little.",
        "output norm / stream norm",
        (_Line("attention_ratio", "attention", "accent solid dots"), _Line("mlp_ratio", "MLP", "accent dashed rings")),
    ),
    _Spec(
        "jacobian",
        "How near each layer is to the identity",
        "Distance of the layer's Jacobian from the identity, |J - I| / |I| in the Frobenius norm, with its standard "
        "error. 0 is a layer that hands its input on.",
        "distance from the identity",
        (_Line("jacobian_distance", "distance", "accent solid dots"),),
    ),
    _Spec(
        "influence",
        "How far each layer turns the stream",
        "Block Influence: 1 - mean cosine of a layer's input and output.",
        "Block Influence",
        (_Line("block_influence", "Block Influence", "accent solid dots"),),
    ),
    _Spec(
        "gradient",
        "The gradient of each layer",
        "Norm of the gradient of the loss with respect to all weights of the layer, mean over batches with its "
        "standard error. It depends on the size of the batches: compare layers, and models on the same data.",
        "gradient norm",
        (_Line("gradient_norm", "gradient norm", "accent solid dots"),),
    ),
    _Spec(
        "state_gradient",
        "The gradient that comes back through the stream",
        "Norm of the gradient of a sequence's loss with respect to a token's state in front of the layer.",
        "gradient norm of a state",
        (_Line("state_gradient_norm", "gradient norm", "accent solid dots"),),
    ),
)


def _figure(spec: _Spec, diagnoses: Sequence[Diagnosis]) -> dict[str, Any] | None:
    if spec.key == "angular":
        top = max(value for one in diagnoses for row in one.angular for value in row if value is not None)
        most = max(len(one.layers) for one in diagnoses)
        panels = [_heat_map(one, number_, top, most) for number_, one in enumerate(diagnoses)]
        says = (
            "Angular distance of a block's input and output at the last token of each sequence, as a share of pi. "
            "Every cell is a block: its first layer along the bottom, its size upwards. Dots: the least of each size."
        )
        return {"spec": spec, "says": says, "panels": panels, "top": number(top)}
    values = [
        value for one in diagnoses for line in spec.lines for value in _values(one, line.field) if value is not None
    ]
    if not values:
        return None
    axis = _axis(values, spec.scale)
    most = max(len(one.layers) for one in diagnoses)
    panels = [_panel(spec, one, number_, axis, most) for number_, one in enumerate(diagnoses)]
    return {"spec": spec, "says": spec.says, "panels": panels}


@dataclass(frozen=True)
class _Axis:
    to: Callable[[float], float]  # value -> height in the figure
    ticks: list[float]


def _axis(values: list[float], scale: str) -> _Axis:
    """A vertical axis that holds all values; a logarithmic one leaves out what is not positive."""
    if scale == "log":
        positive = [value for value in values if value > 0] or [1.0]
        low, high = math.log10(min(positive)), math.log10(max(positive))
        pad = 0.06 * (high - low) + 0.03
        forward, low, high = _log10, low - pad, high + pad
        decades = range(math.floor(low), math.ceil(high) + 1)
        ticks = [10.0**d * m for d in decades for m in ((1,) if high - low > 2 else (1, 2, 5))]
        if high - low > 6:
            ticks = ticks[:: math.ceil((high - low) / 5)]
    else:
        forward = _symlog
        low, high = min(0.0, *map(_symlog, values)), max(0.0, *map(_symlog, values))
        pad = 0.06 * (high - low) + 0.03
        low, high = low - (pad if low < 0 else 0), high + pad
        ticks = sorted({sign * 10.0**d for sign in (-1, 1) for d in range(-2, 6)} | {0.0})
    if len([tick for tick in ticks if low <= forward(tick) <= high]) < 2:
        # A range inside one decade: its ends and the middle.
        ticks = [10 ** (low + (high - low) * share) for share in (0.1, 0.5, 0.9)] if scale == "log" else ticks

    def to(value: float) -> float:
        return HEIGHT - BOTTOM - (forward(value) - low) / (high - low) * (HEIGHT - BOTTOM - TOP)

    return _Axis(to, [tick for tick in ticks if low <= forward(tick) <= high])


def _log10(value: float) -> float:
    return math.log10(value) if value > 0 else -math.inf


def _symlog(value: float) -> float:
    """Linear up to 0.01, logarithmic beyond."""
    size = abs(value) / 0.01
    return math.copysign(size if size <= 1 else 1 + math.log10(size), value)


def _step(layers: int) -> float:
    return (WIDTH - LEFT - RIGHT) / layers


def _x(layer: float, layers: int) -> float:
    return LEFT + (layer + 0.5) * _step(layers)


def _panel(spec: _Spec, one: Diagnosis, which: int, axis: _Axis, layers: int) -> Markup:
    parts = [_grid(axis, layers, spec.unit)]
    bottom = HEIGHT - BOTTOM
    for line in spec.lines:
        points = [
            (layer, value)
            for layer, value in enumerate(_values(one, line.field))
            if value is not None and (spec.scale != "log" or value > 0)
        ]
        if spec.bars:
            base = axis.to(0.0) if spec.scale == "symlog" else bottom
            width = 0.72 * _step(layers)
            parts += [
                f'<rect class="bar" x="{_x(layer, layers) - width / 2:.1f}" y="{min(axis.to(value), base):.1f}" '
                f'width="{width:.1f}" height="{abs(axis.to(value) - base):.1f}"/>'
                for layer, value in points
            ]
            continue
        for layer, value in points:
            if error := one.layers[layer].get(f"{line.field}_error"):
                ends = [axis.to(max(value + sign * error, value / 10)) for sign in (-1, 1)]
                parts.append(f'<path class="error" d="M{_x(layer, layers):.1f} {ends[0]:.1f}V{ends[1]:.1f}"/>')
        path = " ".join(f"{_x(layer, layers):.1f},{axis.to(value):.1f}" for layer, value in points)
        parts.append(f'<polyline class="line {line.style}" points="{path}"/>')
        if "dots" in line.style or "rings" in line.style:
            kind = "ring" if "rings" in line.style else "dot"
            parts += [
                f'<circle class="{kind}" cx="{_x(layer, layers):.1f}" cy="{axis.to(value):.1f}" r="2.6"/>'
                for layer, value in points
            ]
    if spec.scale == "symlog":
        parts.append(f'<path class="axis" d="M{LEFT} {axis.to(0.0):.1f}H{WIDTH - RIGHT}"/>')
    parts.append(f'<rect class="cursor" y="{TOP}" width="{_step(layers):.1f}" height="{bottom - TOP}" hidden=""/>')
    return _svg(spec, one, which, parts, _in_words(spec, one), layers)


def _in_words(spec: _Spec, one: Diagnosis) -> str:
    """What the figure shows, for those who do not see it."""
    said = []
    for line in spec.lines:
        values = [(value, layer) for layer, value in enumerate(_values(one, line.field)) if value is not None]
        if values:
            low, high = min(values), max(values)
            said.append(
                f"{line.label}: {number(values[0][0])} at layer {values[0][1]}, {number(values[-1][0])} at layer "
                f"{values[-1][1]}; least {number(low[0])} at layer {low[1]}, most {number(high[0])} at layer {high[1]}"
            )
    return ". ".join(said) or "Not measured"


def _grid(axis: _Axis, layers: int, unit: str) -> str:
    bottom = HEIGHT - BOTTOM
    parts = []
    for tick in axis.ticks:
        y = axis.to(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{y:.1f}" dy="0.35em" text-anchor="end">{_tick(tick)}</text>'
        )
    parts.append(_layers_axis(layers))
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}"/>')
    parts.append(_labels("layer", unit))
    return "".join(parts)


def _tick_beside(y: float, text: str) -> str:
    return f'<text class="tick" x="{LEFT - 6}" y="{y:.1f}" dy="0.35em" text-anchor="end">{text}</text>'


def _layers_axis(layers: int) -> str:
    return "".join(
        f'<text class="tick" x="{_x(layer, layers):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{layer}</text>'
        for layer in range(0, layers, _every(layers))
    )


def _every(layers: int) -> int:
    return next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if layers / step <= 10)


def _labels(below: str, beside: str) -> str:
    # Above the axis and not along it: read without turning the head, and in nobody's way on a phone.
    return (
        f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{below}</text>'
        f'<text class="label" x="4" y="18">{escape(beside)}</text>'
    )


def _tick(value: float) -> str:
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"


def _heat_map(one: Diagnosis, which: int, top: float, layers: int) -> Markup:
    own = len(one.layers)
    width, height = _step(layers), (HEIGHT - TOP - BOTTOM) / layers
    bottom = HEIGHT - BOTTOM
    # A path for each shade: a page of 80 layers has 3,240 cells.
    shades: dict[int, list[str]] = {}
    for first in range(own):
        for size in range(1, own - first + 1):
            share = (one.angular[first][size - 1] or 0.0) / top
            x, y = LEFT + first * width, bottom - size * height
            cell = f"M{x:.2f} {y:.2f}h{width:.2f}v{height:.2f}h{-width:.2f}z"
            shades.setdefault(round(share * (_SHADES - 1)), []).append(cell)
    parts = [f'<path fill="{_color(shade / (_SHADES - 1))}" d="{"".join(d)}"/>' for shade, d in sorted(shades.items())]
    best = []
    for size in range(1, own):
        first = min(range(own - size + 1), key=lambda i: one.angular[i][size - 1] or 0.0)
        best.append((size, first))
        x, y = LEFT + (first + 0.5) * width, bottom - (size - 0.5) * height
        parts.append(f'<circle class="best" cx="{x:.1f}" cy="{y:.1f}" r="{min(2.4, height / 2):.1f}"/>')
    parts.append(_layers_axis(layers))
    for size in range(_every(layers), layers + 1, _every(layers)):
        y = bottom - (size - 0.5) * height
        parts.append(_tick_beside(y, str(size)))
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}"/>')
    parts.append(_labels("first layer of the block", "layers in the block"))
    parts.append(f'<rect class="cursor" width="{width:.2f}" height="{height:.2f}" hidden=""/>')
    named = [(size, first) for size, first in best if size in (1, 2, 4, 8, 16, 32)]
    words = "; ".join(
        f"least of {size}: layers {ranges(list(range(first, first + size)))}, {number(one.angular[first][size - 1])}"
        for size, first in named
    )
    spec = next(spec for spec in _FIGURES if spec.key == "angular")
    return _svg(spec, one, which, parts, f"Angular distance of every block of layers. {words}", layers)


def _color(share: float) -> str:
    at = min(share, 0.9999) * (len(_HEAT) - 1)
    low, high = (_HEAT[int(at) + i] for i in (0, 1))
    pairs = [(int(low[i : i + 2], 16), int(high[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * (at % 1)):02x}" for a, b in pairs)


def _svg(spec: _Spec, one: Diagnosis, which: int, parts: list[str], words: str, layers: int) -> Markup:
    key, name = f"{spec.key}-{which}", escape(f"{spec.title}: {one.name}")
    # No <title>: browsers would show it as a tooltip of their own.
    return Markup(
        f'<svg class="chart model-{which}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" '
        f'aria-label="{name}" aria-describedby="{key}-desc" '
        f'data-figure="{spec.key}" data-model="{which}" data-axis="{layers}" '
        f'data-fields="{" ".join(line.field for line in spec.lines)}">'
        f'<desc id="{key}-desc">{escape(words)}</desc>{"".join(parts)}</svg>'
    )
