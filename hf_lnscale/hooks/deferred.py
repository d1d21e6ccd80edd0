"""A config.json that is written under another name first, while a model is saved. Imports the standard library only."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

_folder: ContextVar[Path | None] = ContextVar("_folder", default=None)


@contextlib.contextmanager
def writing_aside(folder: str | os.PathLike[str] | None) -> Iterator[Path | None]:
    """Within it, `config.json` of this folder is written to the path that this gives."""
    token = _folder.set(None if folder is None else Path(folder))
    try:
        yield None if folder is None else Path(folder) / "config.json.new"
    finally:
        _folder.reset(token)


def config_file(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Where a configuration is to be written for now."""
    folder = _folder.get()
    if folder is None or Path(path) != folder / "config.json":
        return path
    return folder / "config.json.new"
