"""What is hooked before transformers can be imported, or without it. Imports the standard library only."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

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


def load_checkpoint_in_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """accelerate's function; transformers imports accelerate while it is being imported itself."""

    def load_checkpoint_in_model(model: Any, checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
        if "transformers.modeling_utils" in sys.modules:  # else it is no model of transformers
            from .readers import require_checkpoint_of

            require_checkpoint_of(model, checkpoint)
        return original(model, checkpoint, *args, **kwargs)

    return load_checkpoint_in_model


def refuse(original: Callable[..., Any]) -> Callable[..., Any]:
    """As `guard.refuse`, whose import needs transformers."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        if "transformers.modeling_utils" not in sys.modules:
            return original(*args, **kwargs)
        from .guard import refuse

        return refuse(original)(*args, **kwargs)

    return guarded
