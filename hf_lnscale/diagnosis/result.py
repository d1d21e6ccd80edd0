"""`Diagnosis`: what was measured, on disk, in a terminal, in a notebook, as plots and as a report."""

from __future__ import annotations

import html
import io
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from .verdict import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "diagnosis.json"
_FORMAT = 1


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What `diagnose` finds. The attributes are those of diagnosis.json, which docs/diagnosis.md describes in full.

    Attributes:
        model: name, model_type, sizes, dtype, and what of the plugin is active in it.
        data: what was measured on, as `TokenBatches.describe` says it.
        baseline: loss and perplexity of the whole model; None without `loss`.
        residual: for each of the L + 1 places of the residual stream its variance, counted in several ways.
        layers: for each layer what it does and what it is worth; None where that was not measured.
        angular: angular distance of the block of n layers from layer i on at `angular[i][n - 1]`; None where there are
            not as many.
        cuts: layers removed together, with the perplexity; None without `loss`.
        verdict: facts and sentences.
        cost: of each part, forward passes as announced and seconds as taken.
        notes: what could not be measured, and why.
        versions: of the libraries.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    baseline: dict[str, float] | None
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
        return self.model["name"]

    def to_json(self) -> str:
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=1, allow_nan=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the JSON to a file, or into a folder that exists as `diagnosis.json`; returns the file's path."""
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        path.write_text(self.to_json(), encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Diagnosis:
        """Reads what `save` wrote, from the file or the folder that holds it.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if the file holds something else.
        """
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("format") != _FORMAT:
                raise ValueError("it was written in another format")
            if missing := {one.name for one in fields(cls)} - set(content):
                raise ValueError(f"it lacks {min(missing)}")
            return cls(**content)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{str(path)!r} holds no diagnosis: {error}") from None

    def plot(self, what: str, compare: Diagnosis | None = None) -> Figure:
        """One of the plots: "variance", "angular", "loss_added", "layers"; with `compare`, of both on shared axes.

        Raises:
            ValueError: if there is no such plot, or what it shows was not measured.
            ImportError: if matplotlib is missing; the message names the extra.
        """
        from .figures import plot

        return plot(what, [self] if compare is None else [self, compare])

    def report(self, path: str | os.PathLike[str] | None = None, compare: Diagnosis | None = None) -> str:
        """The report: one HTML file that needs nothing else, no network either.

        Args:
            path: where to write it.
            compare: another diagnosis, to be shown beside this one on the same axes.

        Returns:
            The HTML.
        """
        from .html_report import render

        text = render([self] if compare is None else [self, compare])
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def _repr_html_(self) -> str:
        """In a notebook the report shows, in a frame of its own, so that the styles of the two stay apart."""
        return (
            f'<iframe title="Diagnosis of {html.escape(self.name)}" srcdoc="{html.escape(self.report())}" '
            'style="width: 100%; height: 640px; border: 1px solid #8888; border-radius: 4px"></iframe>'
        )

    def __str__(self) -> str:
        """The verdict, and a table of the layers."""
        columns = [
            ("layer", None),
            ("variance behind", None),
            ("typical", None),
            ("attention", "attention_ratio"),
            ("MLP", "mlp_ratio"),
            ("influence", "block_influence"),
            ("loss added", "loss_added"),
            ("gradient", "gradient_norm"),
            ("|J - I|", "jacobian_distance"),
        ]
        table = Table(*(title for title, _ in columns))
        for one, place in zip(self.layers, self.residual[1:], strict=True):
            first = [str(one["layer"]), number(place["variance"]), number(place["typical"])]
            table.add_row(*first, *(number(one[name]) for _, name in columns if name))
        console = Console(file=io.StringIO(), width=120, color_system=None)
        title = f"{self.name}: {self.verdict['headline']}"
        for line in (title, *(f"- {sentence}" for sentence in self.verdict["sentences"] + self.notes)):
            console.print(line, highlight=False, markup=False)
        console.print(table)
        return console.file.getvalue()  # type: ignore[attr-defined]
