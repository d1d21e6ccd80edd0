"""Figures as people read them, in a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

_UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}

Row = Sequence[str]


def show_bytes(value: float | None) -> str:
    if value is None:
        return "-"
    unit = next((name for name, size in _UNITS.items() if value >= size), "KiB")
    return f"{value / _UNITS[unit]:,.1f} {unit}"


def markdown(header: Row, rows: Sequence[Row]) -> str:
    """A table in Markdown; line breaks within a cell become commas."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    cells = [[cell.replace("\n", ", ").replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def terminal(header: Row, rows: Sequence[Row], title: str = "") -> Table:
    table = Table(header[0], title=title or None, title_justify="left")
    for name in header[1:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table
