"""Model cards for the checkpoints that this package writes or uploads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData

from .._version import __version__
from ..core.display import Markdown, Row, markdown, markdown_code, markdown_text
from .folders import public_name


@dataclass(frozen=True)
class Table:
    """A table of a model card."""

    header: Row
    rows: Sequence[Row]
    note: str = ""  # a paragraph below the table that says how the values were measured
    heading: str = ""

    def __str__(self) -> str:
        heading = f"## {markdown_text(self.heading)}" if self.heading else ""
        return _paragraphs([heading, markdown(self.header, self.rows), _text(self.note)])


def model_card(
    title: str,
    *,
    base_model: str | None = None,
    dataset: str | None = None,
    library_name: str = "transformers",
    tags: Sequence[str] = (),
    pipeline_tag: str | None = None,
    notes: Sequence[str] = (),
    code: str = "",
    parts: Sequence[Table | Markdown] = (),
    pictures: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    made_by: str = "",
    versions: Mapping[str, str] | None = None,
) -> ModelCard:
    """Creates a model card. Text that is not of type `Markdown` is escaped.

    Args:
        base_model, dataset: what the model was made from; local paths are omitted.
        library_name, pipeline_tag: the Hub's names for the library that loads the model and for the task.
        tags: tags in addition to "hf-lnscale".
        notes: sentences on how the model was made, joined into one paragraph.
        code: Python code that loads the model.
        parts: tables, or sections in Markdown.
        pictures: names of image files in the card's folder.
        settings: arguments by name; empty values and False are omitted.
        made_by: the command line or function that made the model.
        versions: library versions by name; by default this package, transformers and torch.
    """
    data = ModelCardData(
        base_model=_public(base_model),
        datasets=[dataset] if dataset and _public(dataset) else None,
        library_name=library_name,
        tags=["hf-lnscale", *tags],
        pipeline_tag=pipeline_tag,
    )
    if versions is None:
        versions = {"hf_lnscale": __version__, "transformers": transformers.__version__, "torch": torch.__version__}
    made = f"Made {f'by {markdown_code(made_by)}, ' if made_by else ''}with "
    made += ", ".join(f"{name} {version}" for name, version in versions.items()) + "."
    given = [
        (markdown_code(name), markdown_code(value))
        for name, value in (settings or {}).items()
        if value not in (None, "", [], {}) and value is not False
    ]
    sections = [
        f"# {markdown_text(title)}",
        " ".join(map(_text, notes)),
        f"```python\n{code}\n```" if code else "",
        *map(str, parts),
        *(f"![{markdown_text(Path(name).stem)}]({name})" for name in pictures),
        made,
        markdown(("argument", ""), given) if given else "",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_paragraphs(sections)}\n")


def _public(name: str | None) -> str | None:
    return name if name and not Path(name).exists() and public_name(name) == name else None


def _text(text: str) -> str:
    return text if isinstance(text, Markdown) else markdown_text(text)


def _paragraphs(parts: Sequence[str]) -> str:
    return "\n\n".join(part for part in parts if part)
