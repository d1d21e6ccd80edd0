"""Formats numbers and tables, and escapes untrusted text before it is shown.

Names of models and files, and any other text read from outside, go through `one_line` (plain text), `rich_text`
(rich), `markdown_text` or `markdown_code` (Markdown). HTML templates escape automatically.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

_UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}

Row = Sequence[str]


class Markdown(str):
    """Markdown that is already escaped."""


def show_bytes(value: float | None) -> str:
    """A size in KiB, MiB or GiB; "-" for None."""
    if value is None:
        return "-"
    unit, size = next((pair for pair in _UNITS.items() if value >= pair[1]), ("KiB", 2**10))
    return f"{value / size:,.1f} {unit}"


def number(value: float | None, sign: str = "") -> str:
    """Formats a number with three digits and a thousands separator; "-" for None. `sign="+"` shows a plus sign."""
    if value is None:
        return "-"
    if not value:
        return "0"
    if abs(value) < 0.001 or abs(value) >= 1e7:
        return f"{value:{sign}.1e}"
    return f"{value:{sign},.0f}" if abs(value) >= 999.5 else f"{value:{sign}#.3g}".removesuffix(".")


def with_error(value: float | None, error: float | None = None, sign: str = "") -> str:
    """Formats a number with its standard error, if any, to two digits of the error: "0.267 ± 0.012"."""
    if value is None or not error or not math.isfinite(error):
        return number(value, sign)
    if error < 1e-4 or abs(value) >= 1e7:
        return f"{number(value, sign)} ± {number(error)}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:{sign},.{decimals}f} ± {error:,.{decimals}f}"


def compact(value: float | None, error: float | None = None) -> str:
    """As `with_error`, with one digit of the error in parentheses, in units of the last digit: "0.27(1)"."""
    if not value or not error or not math.isfinite(error):
        return number(value)
    power = 0 if 0.001 <= abs(value) < 1e7 else math.floor(math.log10(abs(value)))
    value, error = value / 10.0**power, error / 10.0**power
    decimals = max(0, -math.floor(math.log10(float(f"{error:.0e}"))))  # of the rounded one
    return f"{value:.{decimals}f}({error * 10**decimals:.0f})" + (f"e{power:+03d}" if power else "")


def one_line(text: object) -> str:
    """Text with line breaks and control characters replaced by Python escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def brief(value: object, longest: int = 300) -> str:
    """The `repr` of a value, truncated for a message."""
    try:
        text = repr(value)
    except RecursionError:
        text = f"a {type(value).__name__} nested too deeply"
    return text if len(text) <= longest else f"{text[:longest]} ..."


def rich_text(text: object, style: str = "") -> Text:
    """Text for rich, without markup; line breaks are kept."""
    from rich.text import Text

    return Text("\n".join(map(one_line, str(text).split("\n"))), style)


def markdown_text(text: object) -> str:
    """Text for a Markdown paragraph, heading or cell, with markup and HTML escaped."""
    shown = one_line(text).replace("&", "&amp;").replace("<", "&lt;")
    # Underscores within words are not markup in GitHub's Markdown.
    shown = re.sub(r"([\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_])|^[#>]|#$|^[+-](?=[\s-]|$))", r"\\\1", shown)
    # A leading number would start a list, and leading spaces a code block.
    return re.sub("^ ", "&#32;", re.sub(r"^([0-9]+)([.)])(?=\s|$)", r"\1\\\2", shown))


def markdown_code(text: object) -> Markdown:
    """Text as inline code in Markdown."""
    shown = one_line(text)
    longest = max(map(len, re.findall("`+", shown)), default=0)
    return Markdown(f"`{shown}`" if longest == 0 else f"{'`' * (longest + 1)} {shown} {'`' * (longest + 1)}")


def markdown(header: Row, rows: Sequence[Row]) -> str:
    """A Markdown table; line breaks within a cell become commas."""
    lines = [[_cell(cell) for cell in line] for line in (header, *rows)]
    lines.insert(1, ["---"] + ["---:"] * (len(header) - 1))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(cell: str) -> str:
    if isinstance(cell, Markdown):
        return cell.replace("|", "\\|")  # a bar ends the cell, even within code
    return ", ".join(map(markdown_text, cell.split("\n")))


def terminal(header: Row, rows: Sequence[Row], title: str = "") -> Table:
    """A table for a terminal, with the first column left-aligned; line breaks within a cell are kept."""
    from rich.table import Table

    table = Table(title=rich_text(title) if title else None, title_justify="left")
    for at, name in enumerate(header):
        table.add_column(rich_text(name), justify="right" if at else "left")
    for row in rows:
        table.add_row(*map(rich_text, row))
    return table


def as_text(*tables: Table | Text, width: int | None = 120) -> str:
    """Tables as plain text, one below the other; with `width=None`, as wide as the terminal."""
    from rich.console import Console

    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        for table in tables:
            console.print(table)
    return capture.get().rstrip()
