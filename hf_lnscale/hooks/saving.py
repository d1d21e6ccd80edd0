"""Keeps weights and configuration consistent when saving is interrupted.

transformers writes config.json before the weights, and the scale and the cut are stored only in config.json. If saving
over another checkpoint were killed in between, the folder would hold the weights of one model and the configuration of
the other. Two measures prevent this for models with a scale or a cut, and for models saved over one:

- While weights are written, the folder has no config.json: the old one is renamed first, and the new one appears last.
- Weights carry the record of their model in their safetensors metadata, or, in a pickled `state_dict()`, in what torch
  keeps with it. Loading compares it with the config.json in the same folder. Weights without a record, from earlier
  releases or other programs, are not checked.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME

from ..core.display import brief
from ..core.errors import CheckpointError
from ..core.record import MARK, Record, mark, record, unprotect
from .configuration import setting, written_as
from .install import Original

# The record to store in weight files while a model is saved.
_mark: ContextVar[str | None] = ContextVar("_mark", default=None)


@contextlib.contextmanager
def weights_first(folder: str | os.PathLike[str], config: PreTrainedConfig, writes_config: bool) -> Iterator[None]:
    """Context in which the old config.json is set aside and weights are marked; the new config.json appears on exit."""
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
            os.replace(replaced, final)  # saving failed before any weights were written


def must_be_written_last(folder: str | os.PathLike[str], config: PreTrainedConfig) -> bool:
    """Whether a model, or the checkpoint it is saved over, has a scale or a cut."""
    if record(config) != Record():
        return True
    with contextlib.suppress(OSError, ValueError, AttributeError):
        existing = json.loads((Path(folder) / CONFIG_NAME).read_text(encoding="utf-8"))
        return record(unprotect(existing)) != Record()
    return False


@contextlib.contextmanager
def marking(own: str) -> Iterator[None]:
    """Context in which accelerate marks the weights of a model with a scale or a cut."""
    with setting(_mark, own if json.loads(own) else None):
        yield


def save_weights(original: Original, /, obj: Any, *args: Any, **kwargs: Any) -> Any:
    """Wraps accelerate's `save`, which is given a plain dict of weights, so that a pickled one has metadata too."""
    if (own := _mark.get()) is not None and not kwargs.get("safe_serialization"):
        obj = OrderedDict(obj)
        vars(obj)["_metadata"] = {"": {MARK: json.loads(own)}}
    return original(obj, *args, **kwargs)


def save_file(original: Original, /, *args: Any, **kwargs: Any) -> Any:
    """Wraps `save_file` and `save` of safetensors to mark the weights of a model with a scale or a cut."""
    if (own := _mark.get()) is not None:
        kwargs["metadata"] = {**(kwargs.get("metadata") or {}), MARK: own}
    return original(*args, **kwargs)


def require_same_checkpoint(files: Iterable[str], saved: Callable[[], dict[str, Any]]) -> bool:
    """Refuses weight files with a different mark than their config.json; returns whether any file is marked.

    `saved` reads the config.json; it is called only if a file is marked.
    """
    expected: str | None = None
    for file in files:
        if (own := _mark_of(file)) is None:
            continue
        expected = expected or mark(record(saved()))
        with contextlib.suppress(ValueError, RecursionError):
            if own == expected or json.loads(own) == json.loads(expected):  # the JSON may be formatted differently
                continue
        raise CheckpointError(
            f"{Path(file).name} was saved by a model with {brief(own)}, but the config.json beside it says {expected}: "
            "the folder holds the weights of one model and the configuration of another. Save the model again, or "
            "restore the matching file"
        )
    return expected is not None


def _mark_of(file: str) -> str | None:
    """The record stored in a weight file, or None."""
    if str(file).endswith(".safetensors"):
        with safe_open(file, framework="pt") as weights:
            return (weights.metadata() or {}).get(MARK)
    found: list[Any] = []
    with contextlib.suppress(Exception):  # a file that torch cannot map into memory, or without such metadata
        state = torch.load(file, map_location="meta", mmap=True, weights_only=True)
        found = [one[MARK] for one in state._metadata.values() if MARK in one]
    return json.dumps(found[0], sort_keys=True) if found else None


def _weights(folder: str | os.PathLike[str]) -> dict[str, tuple[int, int]]:
    """The weight files of a folder with their sizes and modification times."""
    files = [file for pattern in ("*.safetensors", "*.bin") for file in Path(folder).glob(pattern)]
    return {file.name: (file.stat().st_size, file.stat().st_mtime_ns) for file in files}
