"""Text of unknown origin comes out as it is, and as text: in a terminal, in Markdown, in HTML made of that."""

import io

import pytest
from rich.console import Console

from hf_lnscale.core.display import (
    compact,
    markdown,
    markdown_code,
    markdown_text,
    one_line,
    rich_text,
    show_bytes,
    terminal,
)


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (0.26712, 0.0123, "0.27(1)"),
        (0.26712, 0.00097, "0.267(1)"),
        (-0.00512, 0.00086, "-0.0051(9)"),
        (1623.4, 34.0, "1623(34)"),
        (4.0123e-4, 1.4e-6, "4.01(1)e-04"),
        (2.5e8, 3e6, "2.50(3)e+08"),
        (0.26712, None, "0.267"),
        (0.26712, 0.0, "0.267"),
        (0.26712, float("nan"), "0.267"),
        (0.0, 0.1, "0"),
        (None, None, "-"),
    ],
)
def test_an_error_in_brackets(value, error, shown):
    assert compact(value, error) == shown


NAMES = [
    "[/x]",
    "[bold]loud[/bold]",
    "<img onerror=alert(1)>",
    "a|b",
    "first\nsecond",
    "\x1b[31mred",
    "`code`",
    "``",
    "back\\slash\\",
    "_em_ __strong__ *em* ~~gone~~",
    "[link](https://example.com)",
    "&lt;",
    "# heading",
    "a_b-c.1",
    "naïve 模型",
]


def visible(name):
    return name.replace("\n", "\\n").replace("\x1b", "\\x1b")


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_terminal(name):
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None, legacy_windows=False)
    console.print(rich_text(name.replace("\n", " ")), soft_wrap=True)
    console.print(terminal(["", one_line(name)], [[one_line(name), "1"]], title=one_line(name)))
    printed = console.file.getvalue()
    assert printed.count(visible(name)) >= 3
    assert "\x1b" not in printed


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_markdown(name):
    """Rendered by a parser of CommonMark, a paragraph, a heading and a cell hold the name and nothing else."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table").enable("strikethrough")

    def text_of(source, at):
        tokens = parser.parse(source)
        inline = [token for token in tokens if token.type == "inline"][at]
        assert {child.type for child in inline.children} <= {"text", "text_special", *["code_inline"] * (at == 2)}
        return "".join(child.content for child in inline.children)

    assert text_of(f"Model {markdown_text(name)} here", 0) == f"Model {visible(name)} here"
    assert text_of(f"# {markdown_text(name)}", 0) == visible(name)
    assert text_of(f"x\n\n{markdown_text(name)}", 1) == visible(name)
    table = markdown(["", one_line(name)], [[one_line(name), "1"], [markdown_code(name), "2"]])
    cells = [token for token in parser.parse(table) if token.type == "inline"]
    assert [cell.content for cell in cells][3::2] == ["1", "2"]
    assert len(cells) == 6
    for cell, kind in ((cells[1], "text"), (cells[2], "text"), (cells[4], "code_inline")):
        children = [child for child in cell.children if child.content]
        assert {child.type for child in children} <= {kind, f"{kind}_special"}
        assert "".join(child.content for child in children) == visible(name)


def test_markdown_keeps_ready_cells_and_joins_lines():
    assert markdown(["", "a"], [["x", "1\n+2 %"]]) == "|  | a |\n| --- | ---: |\n| x | 1, +2 % |"


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "-"), (512, "0.5 KiB"), (3 * 2**20, "3.0 MiB"), (2500 * 2**30, "2,500.0 GiB")]
)
def test_sizes(value, shown):
    assert show_bytes(value) == shown
