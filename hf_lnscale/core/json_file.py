"""Reads and validates JSON from untrusted files."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from .config import is_integer
from .display import brief

_WORDS = {dict: "an object", list: "a list", str: "a string", type(None): "null"}


def parse(text: str) -> Any:
    """Parses JSON; raises `ValueError` also for excessive nesting and unpaired surrogates."""
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def to_json(value: Any, **options: Any) -> str:
    """Like `json.dumps`, but standard JSON: infinities and NaN become strings, which `number_of` reads back."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return json.dumps(value) if isinstance(value, float) and not math.isfinite(value) else value


def number_of(value: Any) -> Any:
    """Converts a number that `to_json` wrote as a string; returns anything else unchanged."""
    return float(value) if value in ("Infinity", "-Infinity", "NaN") else value


def read_object(path: Path, **kinds: type | tuple[type, ...]) -> dict[str, Any]:
    """Reads a JSON object from a file and checks that the fields in `kinds`, if present, have those types.

    The `ValueError` for invalid content does not name the file.
    """
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"it must be a JSON object, got {brief(found)}")
    for name, kind in kinds.items():
        if name in found and not isinstance(found[name], kind):
            valid = " or ".join(_WORDS[one] for one in (kind if isinstance(kind, tuple) else (kind,)))
            raise ValueError(f"its {name} must be {valid}, got {brief(found[name])}")
    return found


def is_positive(value: Any) -> bool:
    """Whether a value is a possible perplexity: a positive number, or, for a broken model, infinity or NaN."""
    return (isinstance(value, float) and not value <= 0) or (is_integer(value) and 0 < value <= sys.float_info.max)


def are_layers(value: Any, num_layers: int | None = None) -> bool:
    """Whether a value is a list of distinct layer indices, counted from 0, of a model with `num_layers` layers."""
    return (
        isinstance(value, list)
        and all(is_integer(one) and one >= 0 and (num_layers is None or one < num_layers) for one in value)
        and len(set(value)) == len(value)
    )
