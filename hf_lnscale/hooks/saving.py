"""Keeps weights and configuration consistent when saving is interrupted.

transformers writes config.json first and the weights after it, while the scale and the cut are stored in config.json
only: a save over another checkpoint that is killed in between would leave the weights of one model with the
configuration of the other. Two things prevent that for models with a scale or a cut, and for models saved over one:

- While weights are written, the folder has no config.json: the old one is renamed first, the new one appears last.
- Weights carry the record of their model in their safetensors metadata; `require_same_checkpoint` compares it with the
  config.json in the same folder. Weights without a record, from an earlier release or elsewhere, load unchecked.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME

from ..core.display import brief
from ..core.errors import CheckpointError
from ..core.record import MARK, Record, mark, record, unprotect
from .configuration import setting, written_as
from .install import Original

# The record that weights are marked with while a model is saved.
_mark: ContextVar[str | None] = ContextVar("_mark", default=None)


@contextlib.contextmanager
def weights_first(folder: str | os.PathLike[str], config: PreTrainedConfig, writes_config: bool) -> Iterator[None]:
    """Within it, config.json of `folder` is set aside, and a new one, if this process writes one, appears at the end;
    weights are marked."""
    final, new, replaced = (Path(folder) / f"{CONFIG_NAME}{ending}" for ending in ("", ".new", ".replaced"))
    before = _weights(folder)
    if writes_config and final.is_file():
        os.replace(final, replaced)
    try:
        with setting(written_as, {final: new}), setting(_mark, mark(record(config))):
            yield
        if writes_config and new.is_file():
            os.replace(new, final)
            replaced.unlink(missing_ok=True)
    finally:
        if replaced.is_file() and not final.exists() and _weights(folder) == before:
            os.replace(replaced, final)  # it failed before a weight was written


def must_be_written_last(folder: str | os.PathLike[str], config: PreTrainedConfig) -> bool:
    """Whether a model, or the checkpoint that it is saved over, has a scale or a cut."""
    if record(config) != Record():
        return True
    with contextlib.suppress(OSError, ValueError, AttributeError):
        there = json.loads((Path(folder) / CONFIG_NAME).read_text(encoding="utf-8"))
        return record(unprotect(there)) != Record()
    return False


def save_file(original: Original, /, *args: Any, **kwargs: Any) -> Any:
    """safetensors' `save_file`, which marks the weights of a model with a scale or a cut."""
    if (own := _mark.get()) is not None:
        kwargs["metadata"] = {**(kwargs.get("metadata") or {}), MARK: own}
    return original(*args, **kwargs)


def require_same_checkpoint(files: Iterable[str], saved: Callable[[], dict[str, Any]]) -> bool:
    """Refuses safetensors files saved by a model with another scale or other layers than their config.json says.

    Args:
        files: the weight files.
        saved: reads the config.json that belongs to them; called only if a file is marked.

    Returns:
        Whether a file is marked.
    """
    expected: str | None = None
    for file in files:
        if not str(file).endswith(".safetensors"):
            continue
        with safe_open(file, framework="pt") as weights:
            own = (weights.metadata() or {}).get(MARK)
        if own is None:
            continue
        if expected is None:
            expected = mark(record(saved()))
        with contextlib.suppress(ValueError, RecursionError):
            if own == expected or json.loads(own) == json.loads(expected):  # others may write JSON in another way
                continue
        raise CheckpointError(
            f"{Path(file).name} was saved by a model with {brief(own)}, but the config.json beside it says {expected}: "
            "the folder holds the weights of one model and the configuration of another. Save the model again, or "
            "restore the file that belongs to the other"
        )
    return expected is not None


def _weights(folder: str | os.PathLike[str]) -> dict[str, tuple[int, int]]:
    """The weight files of a folder, by size and time of writing."""
    files = [file for pattern in ("*.safetensors", "*.bin") for file in Path(folder).glob(pattern)]
    return {file.name: (file.stat().st_size, file.stat().st_mtime_ns) for file in files}
