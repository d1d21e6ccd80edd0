"""The report: one HTML file that contains its figures, data and script.

Figures are static SVG, so the page is complete without its script, also in print. The script adds hover, sorting and
the choice of light or dark mode. The style sheet sets colors by class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any, TypeAlias

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..core.display import number
from ..measuring.uncertainty import LEAST_SEQUENCES, LEAST_TOKENS
from . import verdict
from .figures import FIGURES, LINEAR_UP_TO, Figure
from .result import COLUMNS, DiagnosisData
from .verdict import ranges

# Geometry of a figure in SVG units, which are pixels on a wide screen.
WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 66, 8, 34, 48
_BASE = HEIGHT - BOTTOM
# Colors of the heat map from low to high: reversed viridis (van der Walt and Smith 2015) at nine points.
_HEAT = ("#fde725", "#aadc32", "#5ec962", "#27ad81", "#21918c", "#2c728e", "#3b528b", "#472d7b", "#440154")
_SHADES = 32
_Axis: TypeAlias = tuple[Callable[[float], float], list[float]]


def render(diagnoses: Sequence[DiagnosisData]) -> str:
    """The report on one diagnosis, or on two side by side, as HTML."""
    page = Environment(
        loader=PackageLoader("hf_lnscale.diagnosis", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("report.html.j2")  # fmt: skip
    layers = max(len(one.layers) for one in diagnoses)
    columns = [column for column in COLUMNS if any(one.measured(column.field) for one in diagnoses)]
    return page.render(
        diagnoses=diagnoses,
        title=" and ".join(one.name for one in diagnoses),
        changed=verdict.compare(*diagnoses) if len(diagnoses) == 2 else None,
        figures=[(figure, _panels(figure, diagnoses, layers)) for figure in FIGURES if figure.measured(diagnoses)],
        top=number(_top(diagnoses)),
        columns=columns,
        rows=[_rows(one, [column.field for column in columns]) for one in diagnoses],
        data=[_data(one) for one in diagnoses],
        labels={line.field: line.label for figure in FIGURES for line in figure.lines},
        geometry=(WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM),
        heat=_HEAT,
        verdict=verdict,
        number=number,
        least=(LEAST_TOKENS, LEAST_SEQUENCES),
    )


def _rows(one: DiagnosisData, fields: list[str]) -> list[list[tuple[Any, str]]]:
    """One row per layer: values to sort by, and their text."""
    columns = [list(zip(one.values(field), one.cells(field), strict=True)) for field in fields]
    return [list(row) for row in zip(*columns, strict=True)]


def _data(one: DiagnosisData) -> dict[str, Any]:
    """The values shown on hover by the script."""
    fields = [column.field for column in COLUMNS]
    fields += [error for field in fields if one.measured(error := f"{field}_error")]
    return {"name": one.name, "angular": one.angular, **{field: one.values(field) for field in fields}}


# --- figures ----------------------------------------------------------------------------------------------------------


def _panels(figure: Figure, diagnoses: Sequence[DiagnosisData], layers: int) -> list[Markup]:
    if figure.kind == "blocks":
        top = _top(diagnoses)
        return [_heat_map(figure, one, which, top, layers) for which, one in enumerate(diagnoses)]
    values = [v for one in diagnoses for line in figure.lines for v in one.values(line.field) if v is not None]
    axis = _axis(values, figure.scale)
    return [_panel(figure, one, which, axis, layers) for which, one in enumerate(diagnoses)]


def _top(diagnoses: Sequence[DiagnosisData]) -> float:
    """The largest angular distance."""
    return max(value for one in diagnoses for row in one.angular for value in row if value is not None)


def _axis(values: list[float], scale: str) -> _Axis:
    """A vertical axis with ticks that covers all values, or all positive values if it is logarithmic."""
    forward = math.log10 if scale == "log" else _symlog
    # A linear axis includes zero; a logarithmic one ignores values that are not positive.
    shown = [v for v in values if v > 0] or [1.0] if scale == "log" else [0.0, *values]
    low, high = forward(min(shown)), forward(max(shown))
    pad = 0.06 * (high - low) + 0.03
    if scale == "log":
        low, high = low - pad, high + pad
        decades = range(math.floor(low), math.ceil(high) + 1)
        ticks = [10.0**d * m for d in decades for m in ((1,) if high - low > 2 else (1, 2, 5))]
        if high - low > 6:
            ticks = ticks[:: math.ceil((high - low) / 5)]
        if sum(low <= forward(tick) <= high for tick in ticks) < 2:
            # Within one decade, put ticks near both ends and in the middle.
            ticks = [10 ** (low + (high - low) * share) for share in (0.1, 0.5, 0.9)]
    else:
        low, high = low - (pad if low < 0 else 0), high + pad
        ticks = sorted({sign * 10.0**d for sign in (-1, 1) for d in range(-2, 6)} | {0.0})

    def to(value: float) -> float:
        return _BASE - (forward(value) - low) / (high - low) * (_BASE - TOP)

    return to, [tick for tick in ticks if low <= forward(tick) <= high]


def _symlog(value: float) -> float:
    size = abs(value) / LINEAR_UP_TO
    return math.copysign(size if size <= 1 else 1 + math.log10(size), value)


def _step(layers: int) -> float:
    return (WIDTH - LEFT - RIGHT) / layers


def _x(layer: float, layers: int) -> float:
    return LEFT + (layer + 0.5) * _step(layers)


def _panel(figure: Figure, one: DiagnosisData, which: int, axis: _Axis, layers: int) -> Markup:
    parts, (to, ticks) = [], axis
    for tick in ticks:
        parts += [f'<path class="grid" d="M{LEFT} {to(tick):.1f}H{WIDTH - RIGHT}"/>', _beside(to(tick), tick)]
    parts += _frame(layers, "layer", figure.unit)
    for line in figure.lines:
        values, errors = one.values(line.field), one.values(f"{line.field}_error")
        points = [(i, v) for i, v in enumerate(values) if v is not None and (figure.scale != "log" or v > 0)]
        marks = [(f"{_x(layer, layers):.1f}", to(value)) for layer, value in points]
        if figure.kind == "bars":
            base, width = to(0.0), 0.72 * _step(layers)
            parts += [
                f'<rect class="bar" x="{_x(layer, layers) - width / 2:.1f}" y="{min(to(value), base):.1f}" '
                f'width="{width:.1f}" height="{abs(to(value) - base):.1f}"/>'
                for layer, value in points
            ]
        for (x, _), (layer, value) in zip(marks, points, strict=True):
            if error := errors[layer]:
                low = value - error if figure.scale != "log" else max(value - error, value / 10)
                parts.append(f'<path class="error" d="M{x} {to(low):.1f}V{to(value + error):.1f}"/>')
        if figure.kind == "lines":
            path = " ".join(f"{x},{y:.1f}" for x, y in marks)
            parts.append(f'<polyline class="line {line.style}" points="{path}"/>')
        if "dots" in line.style or "rings" in line.style:
            kind = "ring" if "rings" in line.style else "dot"
            parts += [f'<circle class="{kind}" cx="{x}" cy="{y:.1f}" r="2.6"/>' for x, y in marks]
    if figure.scale == "symlog":
        parts.append(f'<path class="axis" d="M{LEFT} {to(0.0):.1f}H{WIDTH - RIGHT}"/>')
    parts.append(f'<rect class="cursor" y="{TOP}" width="{_step(layers):.1f}" height="{_BASE - TOP}" hidden=""/>')
    return _svg(figure, one, which, parts, _in_words(figure, one), layers)


def _in_words(figure: Figure, one: DiagnosisData) -> str:
    """A description of a figure for screen readers."""
    lines = []
    for line in figure.lines:
        found = [(value, layer) for layer, value in enumerate(one.values(line.field)) if value is not None]
        if found:
            first, last, low, high = (
                f"{number(value)} at layer {layer}" for value, layer in (found[0], found[-1], min(found), max(found))
            )
            lines.append(f"{line.label}: {first}, {last}; minimum {low}, maximum {high}")
    return ". ".join(lines) or "Not measured"


def _frame(layers: int, below: str, beside: str) -> Iterable[str]:
    """The layer indices, the axes and their labels."""
    for layer in range(0, layers, _every(layers)):
        yield f'<text class="tick" x="{_x(layer, layers):.1f}" y="{_BASE + 18}" text-anchor="middle">{layer}</text>'
    yield f'<path class="axis" d="M{LEFT} {TOP}V{_BASE}H{WIDTH - RIGHT}"/>'
    yield f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{below}</text>'
    # Above the axis rather than along it, to be horizontal and to save space on a phone.
    yield f'<text class="label" x="4" y="18">{escape(beside)}</text>'


def _every(layers: int) -> int:
    return next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if layers / step <= 10)


def _beside(y: float, value: float) -> str:
    """A tick of the vertical axis."""
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        text = f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    else:
        text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2g}"
    return f'<text class="tick" x="{LEFT - 6}" y="{y:.1f}" dy="0.35em" text-anchor="end">{text}</text>'


def _heat_map(figure: Figure, one: DiagnosisData, which: int, top: float, layers: int) -> Markup:
    own, width, height = len(one.layers), _step(layers), (_BASE - TOP) / layers
    # One path per shade rather than per cell: a model of 80 layers has 3,240 cells.
    shades: dict[int, list[str]] = {}
    for first in range(own):
        for size in range(1, own - first + 1):
            share = (one.angular[first][size - 1] or 0.0) / (top or 1.0)
            x, y = LEFT + first * width, _BASE - size * height
            cell = f"M{x:.2f} {y:.2f}h{width:.2f}v{height:.2f}h{-width:.2f}z"
            shades.setdefault(round(share * (_SHADES - 1)), []).append(cell)
    parts = [f'<path fill="{_color(shade / (_SHADES - 1))}" d="{"".join(d)}"/>' for shade, d in sorted(shades.items())]
    words = []
    for size in range(1, own):
        first = min(range(own - size + 1), key=lambda i: one.angular[i][size - 1] or 0.0)
        x, y = LEFT + (first + 0.5) * width, _BASE - (size - 0.5) * height
        parts.append(f'<circle class="best" cx="{x:.1f}" cy="{y:.1f}" r="{min(2.4, height / 2):.1f}"/>')
        if size in (1, 2, 4, 8, 16, 32):
            block = ranges(list(range(first, first + size)))
            words.append(f"least of {size}: layers {block}, {number(one.angular[first][size - 1])}")
    parts += _frame(layers, "first layer of the block", figure.unit)
    every = _every(layers)
    parts += [_beside(_BASE - (size - 0.5) * height, size) for size in range(every, layers + 1, every)]
    parts.append(f'<rect class="cursor" width="{width:.2f}" height="{height:.2f}" hidden=""/>')
    return _svg(figure, one, which, parts, f"Angular distance of every block of layers. {'; '.join(words)}", layers)


def _color(share: float) -> str:
    at = min(share, 0.9999) * (len(_HEAT) - 1)
    low, high = (_HEAT[int(at) + i] for i in (0, 1))
    pairs = [(int(low[i : i + 2], 16), int(high[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + (b - a) * (at % 1)):02x}" for a, b in pairs)


def _svg(figure: Figure, one: DiagnosisData, which: int, parts: list[str], words: str, layers: int) -> Markup:
    key, name = f"{figure.key}-{which}", escape(f"{figure.title}: {one.name}")
    # No <title>, since browsers show it as a tooltip.
    return Markup(
        f'<svg class="chart model-{which}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" '
        f'aria-label="{name}" aria-describedby="{key}-desc" '
        f'data-figure="{figure.key}" data-model="{which}" data-axis="{layers}" '
        f'data-fields="{" ".join(line.field for line in figure.lines)}">'
        f'<desc id="{key}-desc">{escape(words)}</desc>{"".join(parts)}</svg>'
    )
