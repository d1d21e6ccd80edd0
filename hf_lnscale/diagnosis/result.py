"""`DiagnosisData`: the measurements of a diagnosis, on disk and as a table."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.table import Table

from ..core.display import as_text, compact, one_line, rich_text, with_error
from ..core.json_file import read_object

if TYPE_CHECKING:
    from typing_extensions import Self

FILE = "diagnosis.json"
_FORMAT = 1


class Column(NamedTuple):
    """A measure in the tables of layers."""

    title: str  # heading in the report
    description: str  # explanation of the heading
    field: str  # see `DiagnosisData.values`
    short: str = ""  # heading in a terminal; "" leaves the measure out there


COLUMNS = (
    Column("layer", "Layer, counted from 0", "layer", "layer"),
    Column("typical", "Mean square of a typical token after the layer", "residual.typical", "typical"),
    Column("variance", "Variance of the residual stream after the layer, all tokens", "residual.variance"),
    Column("without first", "The same without the first token of each sequence", "residual.variance_without_first"),
    Column(
        "largest channel",
        "The largest variance of a single channel, a single measurement",
        "residual.largest_channel_variance",
    ),
    Column("attention", "Norm of attention's output over the norm of the stream", "attention_ratio", "attn"),
    Column("MLP", "Norm of the MLP's output over the norm of the stream", "mlp_ratio", "MLP"),
    Column("influence", "Block Influence: 1 - mean cosine of input and output", "block_influence", "influence"),
    Column("angle", "Angular distance of input and output at the last token, fraction of pi", "angular_distance"),
    Column("loss added", "Loss added by removing the layer, nats per token", "loss_added", "loss added"),
    Column("ppl without", "Perplexity without the layer", "perplexity_without"),
    Column("Jacobian", "Distance of the layer's Jacobian from the identity", "jacobian_distance", "|J-I|"),
)


@dataclass(frozen=True, eq=False)
class DiagnosisData:
    """The content of diagnosis.json, described in full in docs/diagnosis.md.

    Attributes:
        model: name, model_type, sizes, dtype, and the plugin's record.
        data: the data used, as returned by `TokenBatches.describe`.
        baseline: loss and perplexity of the full model, with standard errors; None without `loss`.
        residual: variance at each of the L + 1 places of the residual stream, computed in several ways.
        layers: the measures of each layer; None if not taken.
        angular: `angular[i][n - 1]` is the angular distance of the block of n layers starting at layer i; None if it
            exceeds the model.
        cuts: layers removed together, with the perplexity; None without `loss`.
        verdict: cautions, facts and sentences.
        cost: for each part, the estimated forward passes and the seconds taken.
        notes: what could not be measured, and why.
        versions: library versions.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    baseline: dict[str, Any] | None
    residual: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    angular: list[list[float | None]]
    cuts: list[dict[str, Any]] | None
    verdict: dict[str, Any]
    cost: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The model's name."""
        return one_line(self.model["name"])

    def values(self, field: str) -> list[Any]:
        """A field of each layer, None if not measured; "residual.x" is x of the residual stream after the layer."""
        if field.startswith("residual."):
            return [place.get(field.removeprefix("residual.")) for place in self.residual[1:]]
        return [layer.get(field) for layer in self.layers]

    def measured(self, field: str) -> bool:
        """Whether any layer has a value."""
        return any(value is not None for value in self.values(field))

    def cells(self, field: str, show: Callable[[Any, Any], str] = with_error) -> list[str]:
        """A field of each layer as text, with its standard error if it has one."""
        if field == "layer":
            return [str(layer) for layer in self.values(field)]
        return [show(*pair) for pair in zip(self.values(field), self.values(f"{field}_error"), strict=True)]

    def to_json(self) -> str:
        """The content of diagnosis.json."""
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=1, allow_nan=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the JSON to a file, or to an existing folder as `diagnosis.json`; returns the path of the file."""
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        path.write_text(self.to_json(), encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a file written by `save`, or the folder that contains it.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file does not contain a diagnosis.
        """
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        try:
            content = read_object(path)
            if content.pop("format", None) != _FORMAT:
                raise ValueError("it has an unknown format")
            if missing := {one.name for one in fields(cls)} - set(content):
                raise ValueError(f"it lacks {min(missing)}")
            return cls(**content)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{str(path)!r} contains no diagnosis: {error}") from None

    def __str__(self) -> str:
        """The verdict and a table of the layers, as wide as the terminal."""
        lines = (*self.verdict.get("cautions", ()), *self.verdict["sentences"], *self.notes)
        words = [
            rich_text(one_line(line))
            for line in (f"{self.name}: {self.verdict['headline']}", *map("- {}".format, lines))
        ]
        shown = [column for column in COLUMNS if column.short and self.measured(column.field)]
        table = Table(*(column.short for column in shown), padding=(0, 1) if Console().width >= 100 else 0)
        for row in zip(*(self.cells(one.field, compact) for one in shown), strict=True):
            table.add_row(*row)
        return as_text(*words, table, rich_text("0.27(1): 0.27 with a standard error of 0.01"), width=None) + "\n"
