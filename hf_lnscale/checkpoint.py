"""config.json of a scaled checkpoint, written so that no program unaware of the scale takes it for a plain one.

transformers ignores configuration keys that it does not know, so a flag alone would be dropped without a word. While a
scale is active, the file therefore differs from the family's own in three ways, all undone on reading:

- `model_type` and `architectures` carry a prefix: whatever goes by them (AutoModel, vLLM, llama.cpp) refuses.
- `id2label` next to `ln_scaling` holds a key that is not a number: the family's own configuration class, called by
  name, fails on it, with the key as the message.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .scaling import ACTIVE, ON_DISK

MODEL_TYPE_PREFIX = "hf_lnscale_"
ARCHITECTURE_PREFIX = "LNS"
TRIPWIRE = "This checkpoint uses LayerNorm Scaling: install hf_lnscale and import it before loading"


def parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A configuration's dict and those of the sub-configurations in it."""
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from parts(value)


def protect(config: dict[str, Any]) -> dict[str, Any]:
    """Turns the dict of a configuration into what is written to `config.json`, in place.

    Returns:
        The same dict, unchanged but for internal notes if no scale is active in it.
    """
    scaled = False
    for part in list(parts(config)):
        part.pop(ON_DISK, None)
        if part.get(ACTIVE):
            scaled = True
            part["id2label"] = {**(part.get("id2label") or {}), TRIPWIRE: ""}
    if scaled:
        config["model_type"] = MODEL_TYPE_PREFIX + config["model_type"]
        if config.get("architectures"):
            config["architectures"] = [ARCHITECTURE_PREFIX + name for name in config["architectures"]]
    return config


def unprotect(config: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `protect`, in place, for the dict read from `config.json`.

    Notes beside each active scale that the file had it. Any other file's dict comes back as it is.
    """
    scaled = False
    for part in list(parts(config)):
        if not part.get(ACTIVE):
            continue
        scaled = True
        part[ON_DISK] = part[ACTIVE]
        labels = {key: label for key, label in (part.pop("id2label", None) or {}).items() if key != TRIPWIRE}
        if labels:
            part["id2label"] = labels
    if scaled:
        config["model_type"] = config.get("model_type", "").removeprefix(MODEL_TYPE_PREFIX)
        if config.get("architectures"):
            config["architectures"] = [name.removeprefix(ARCHITECTURE_PREFIX) for name in config["architectures"]]
    return config
