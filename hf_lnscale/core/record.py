"""What stands in a configuration, in memory and in config.json: the one reader and writer of the plugin's keys."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig

from .config import LNScalingConfig
from .families import family_of, text_config


class Stored(dict):
    """The value in a configuration. Of a class of this package, so that unpickling one imports, and enables, it."""


# What a configuration carries, in memory and in config.json.
ACTIVE = "ln_scaling"
FOLDED = "ln_scaling_folded"
# Which layers of which number are missing (pruning/layers.py); a layer that is left keeps the depth it had.
DROPPED = "dropped_layers"
# What the checkpoint's own config.json said, in memory only: tells a model trained with the scale from a cold switch.
ON_DISK = "_ln_scaling_on_disk"


def get_ln_scaling(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The active scaling of a model's text decoder as a dict, a copy, or None."""
    return copy.deepcopy(vars(text_config(config)).get(ACTIVE))


def set_ln_scaling(config: PreTrainedConfig, value: Any) -> None:
    """Writes a value of the `ln_scaling` argument into a configuration; a model built from it is scaled accordingly.

    None changes nothing, and True neither where a scaling is set already: a checkpoint's own depths stay.
    """
    if value is None or (value is True and get_ln_scaling(config)):
        return
    text = text_config(config)
    holder = vars(text)
    scaling = LNScalingConfig.of(value)
    if scaling is None:
        holder.pop(ACTIVE, None)
        return
    if text.model_type:  # the base class, with which Trainer looks into a config.json, has none
        family_of(config)
    if FOLDED in holder:
        raise ValueError(
            f"ln_scaling={value!r} on a checkpoint whose norm weights hold the scale already ({FOLDED} in its config): "
            "that would scale twice. It needs no flag to run; to train it further with LayerNorm Scaling, load it "
            "without the flag and call hf_lnscale.unfold_ln_scaling(model)."
        )
    if scaling.depths is None and (record := holder.get(DROPPED)):
        own = [layer + 1 for layer in range(record["num_hidden_layers"]) if layer not in record["layers"]]
        scaling = replace(scaling, depths=tuple(own))
    if scaling.depths is not None and (num_layers := getattr(text, "num_hidden_layers", None)):
        scaling = scaling.for_layers(num_layers)
    holder[ACTIVE] = Stored(scaling.to_dict())


def trained_without(config: PreTrainedConfig) -> str | None:
    """How the active scaling differs from the one that the checkpoint's weights were trained with.

    Returns:
        None where they agree, else "on", "off" or "other": what was done to the checkpoint's own.
    """
    text = text_config(config)
    num_layers = text.num_hidden_layers if hasattr(text, "num_hidden_layers") else 0
    here, there = get_ln_scaling(config), vars(text).get(ON_DISK)
    if here is None and there is None:
        return None
    scales = []
    for value in (here, there):
        scaling = LNScalingConfig.of(value)
        try:
            scales.append(scaling.scales(num_layers) if scaling else [1.0] * num_layers)
        except ValueError:  # the checkpoint has another number of layers than the model
            scales.append([])
    if scales[0] == scales[1]:
        return None
    return "off" if here is None else "on" if there is None else "other"


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
