"""The one template of model cards: what it says, and that no name in it is more than a name."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from hf_lnscale.checkpoints.card import Table, model_card
from hf_lnscale.core.display import Markdown

NASTY = "<img src=x onerror=alert(1)> [/x] | `a`\n# b"
SHOWN = "<img src=x onerror=alert(1)> [/x] | `a`\\n# b"


def parse(card):
    """Metadata, and the text of each heading, paragraph and cell; anything else in them is an error."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    found = []
    for token in parser.parse(card.text):
        assert token.type != "html_block"
        if token.type == "inline":
            kinds = {child.type for child in token.children}
            assert kinds <= {"text", "text_special", "code_inline", "image", "softbreak"}, kinds
            found.append("".join(child.content for child in token.children))
    return card.data, found


def test_a_card(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    card = model_card(
        "base, 2 of 30 layers dropped",
        base_model="someone/base",
        dataset="folder",
        tags=["trl"],
        notes=["Layers 1, 2 were dropped.", Markdown("See `plan.json`.")],
        code="import hf_lnscale",
        parts=[
            Table(("", "before"), [("perplexity", "1.0")], "On text.", heading="Measured"),
            Markdown("**As is**"),
        ],
        pictures=["loss.png"],
        settings={"seed": 0, "resume": False, "lr": 1e-3, "name": None, "drop": []},
        made_by="hf-lnscale prune base",
        versions={"torch": "2.13.0"},
    )
    text = str(card)
    assert str(ModelCard(text)) == text
    assert card.data.to_dict() == {
        "base_model": "someone/base",
        "library_name": "transformers",
        "tags": ["hf-lnscale", "trl"],
    }
    assert card.text.strip().split("\n\n") == [
        "# base, 2 of 30 layers dropped",
        "Layers 1, 2 were dropped. See `plan.json`.",
        "```python\nimport hf_lnscale\n```",
        "## Measured",
        "|  | before |\n| --- | ---: |\n| perplexity | 1.0 |",
        "On text.",
        "**As is**",
        "![loss](loss.png)",
        "Made by `hf-lnscale prune base`, with torch 2.13.0.",
        "| argument |  |\n| --- | ---: |\n| `seed` | `0` |\n| `lr` | `0.001` |",
    ]


def test_names_are_names():
    card = model_card(
        NASTY,
        base_model=NASTY,
        notes=[f"From {NASTY}."],
        parts=[Table((NASTY, ""), [(NASTY, "1")], NASTY, heading=NASTY)],
        settings={"data": NASTY},
        made_by=NASTY,
        versions={"torch": "2.13.0"},
    )
    data, found = parse(ModelCard(str(card)))
    assert data.base_model == NASTY
    cell = SHOWN.replace("\\n", ", ")  # lines of a cell
    assert found[:3] == [SHOWN, f"From {SHOWN}.", SHOWN]
    assert found[3:8] == [cell, "", cell, "1", SHOWN]
    assert found[8] == f"Made by {SHOWN}, with torch 2.13.0."
    assert found[-2:] == ["data", SHOWN]


def test_local_paths_stay_out_of_the_metadata(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    for local in ("base", "./gone", str(tmp_path)):
        assert model_card("x", base_model=local, dataset=local).data.to_dict().keys() == {"library_name", "tags"}
