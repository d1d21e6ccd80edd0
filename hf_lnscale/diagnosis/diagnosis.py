"""`Diagnosis`: the measurements, with plots and the report."""

from __future__ import annotations

import html
import os
from pathlib import Path
from typing import TYPE_CHECKING

from . import html_report, png
from .result import DiagnosisData

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Diagnosis(DiagnosisData):
    """The result of `diagnose`: the attributes of `DiagnosisData`, plots and the report."""

    def plot(self, what: str, compare: DiagnosisData | None = None) -> Figure:
        """Draws a plot: "variance", "angular", "loss_added" or "layers"; with `compare`, of both on shared axes.

        Raises:
            ValueError: if there is no such plot, or its measures were not taken.
            ImportError: if matplotlib is not installed; the message names the extra.
        """
        return png.plot(what, [self] if compare is None else [self, compare])

    def report(self, path: str | os.PathLike[str] | None = None, compare: DiagnosisData | None = None) -> str:
        """The report as a single HTML file that needs no other files and no network.

        Args:
            path: file to write.
            compare: another diagnosis, shown next to this one on the same axes.

        Returns:
            The HTML.
        """
        text = html_report.render([self] if compare is None else [self, compare])
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def _repr_html_(self) -> str:
        # In a separate frame, so that the styles of notebook and report do not interfere.
        return (
            f'<iframe title="Diagnosis of {html.escape(self.name)}" srcdoc="{html.escape(self.report())}" '
            'style="width: 100%; height: 640px; border: 1px solid #8888; border-radius: 4px"></iframe>'
        )
