"""PEFT adapters: which base one belongs to is noted in its adapter_config.json, and compared when it is loaded.

PEFT notes the path of the base alone. Loaded from there, the base comes without what was given as keywords, and weights
for layer 7 of a pruned model fit layer 7 of the unpruned one; neither would fail.

The note is what the base's configuration says of scale and layers. It stands in `auto_mapping`, PEFT's own field for
what it takes to get the base back, and is there only for a base that is scaled, folded or pruned, or is so on disk.
Where the path does not give back the base to a program without this package, `peft_type` ends in a sentence that says
so: PEFT then knows no such type, and raises it as a `KeyError`.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ..core.config import LNScalingConfig
from ..core.families import text_config
from ..core.record import ACTIVE, DROPPED, FOLDED, ON_DISK, parts, set_ln_scaling
from ..core.warnings import warn
from ..pruning import layers

NOTE = "hf_lnscale"
TRIPWIRE = " on a base with LayerNorm Scaling or dropped layers: install hf_lnscale and import it before loading"


def base_state(config: PreTrainedConfig | dict[str, Any] | None) -> dict[str, Any]:
    """What a configuration, or the dict of one, says of scale and layers; empty for a plain model."""
    if config is None:
        return {}
    said = list(parts(config)) if isinstance(config, dict) else [vars(text_config(config))]
    return {name: part[name] for name in (ACTIVE, FOLDED, DROPPED) for part in said if part.get(name)}


def note(adapter: dict[str, Any]) -> dict[str, Any] | None:
    """The traits of the base that an adapter was saved with, from the dict of its adapter_config.json; None if none."""
    return (adapter.get("auto_mapping") or {}).get(NOTE)


def add_note(path: Path, base: PreTrainedConfig) -> None:
    """Notes in an adapter_config.json what its base is; a note that is there already is replaced."""
    adapter = json.loads(path.read_text(encoding="utf-8"))
    found = base_state(base)
    noted = bool(found) or ON_DISK in vars(text_config(base))
    if not noted and note(adapter) is None:
        return
    mapping = {key: value for key, value in (adapter.get("auto_mapping") or {}).items() if key != NOTE}
    if noted:
        mapping[NOTE] = found
        if ACTIVE in found or not _on_disk_as(base, adapter):
            adapter["peft_type"] += TRIPWIRE
    adapter["auto_mapping"] = mapping or None
    path.write_text(json.dumps(adapter, indent=2, sort_keys=True), encoding="utf-8")


def without_tripwire(adapter: dict[str, Any]) -> dict[str, Any]:
    """The dict of an adapter_config.json with its own `peft_type`, in place."""
    if isinstance(kind := adapter.get("peft_type"), str):
        adapter["peft_type"] = kind.removesuffix(TRIPWIRE)
    return adapter


def keywords(adapter: dict[str, Any], base: PreTrainedConfig | None = None) -> dict[str, Any]:
    """What to give to `from_pretrained` of the base so that it is the one that the adapter was trained on.

    Args:
        adapter: the dict of an adapter_config.json.
        base: a configuration of the base as far as it is; None reads the one at the path that PEFT noted.

    Returns:
        `drop_layers` and `ln_scaling`, as far as needed; empty for an adapter without a note.

    Raises:
        ValueError: if no keyword makes that base of the one at hand.
    """
    wanted = note(adapter)
    if wanted is None:
        return {}
    base = base or _config_on_disk(adapter)
    if base is None:  # loading it will say what is wrong
        return {}
    found = _to_restore(wanted, base)
    restored = copy.deepcopy(base)
    if found is not None:
        layers.set_drop_layers(restored, found.get("drop_layers"))
        set_ln_scaling(restored, found.get("ln_scaling"))
    if found is None or not _same(wanted, base_state(restored)):
        raise ValueError(_mismatch(adapter, "this adapter", wanted, base))
    return found


def require_base(adapter: dict[str, Any], name: str, base: PreTrainedConfig | None) -> None:
    """Refuses an adapter that was trained on another base than the one at hand.

    Args:
        adapter: the dict of its adapter_config.json.
        name: what it was loaded by.
        base: the configuration of the model that it is to be put on; None for a model of another library.

    Raises:
        ValueError: if scale or layers differ; the message says how to load the base.
    """
    here, wanted = base_state(base), note(adapter)
    if wanted is None:
        if base is None:
            return
        # Trained on a plain base, or without this package on one that is pruned or folded on disk.
        there = _config_on_disk(adapter, local=not here)
        if there is None and not here:
            return
        if there is None and ACTIVE not in here:
            warn(
                f"whether the adapter {name!r} was trained on this base, which has {_describe(here)}, cannot be "
                f"known: it has no note, and its base {adapter.get('base_model_name_or_path')!r} cannot be read"
            )
            return
        wanted = base_state(there)
    if not _same(wanted, here):
        raise ValueError(_mismatch(adapter, f"the adapter {name!r}", wanted, base))


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """By what counts for an adapter: the name of the model that layers were dropped from does not."""

    def key(said: dict[str, Any]) -> tuple[Any, ...]:
        dropped = said.get(DROPPED) or {}
        return said.get(ACTIVE), said.get(FOLDED), dropped.get("layers"), dropped.get("num_hidden_layers")

    return key(one) == key(other)


def _to_restore(wanted: dict[str, Any], base: PreTrainedConfig) -> dict[str, Any] | None:
    """The keywords without a look at whether they are enough; None if layers are missing."""
    held, original = layers.original_layers(base)
    kept, of = layers.original_layers(wanted) if wanted.get(DROPPED) else (list(range(original)), original)
    if of != original or not set(kept) <= set(held):
        return None
    found: dict[str, Any] = {}
    if kept != held:
        found["drop_layers"] = [position for position, layer in enumerate(held) if layer not in kept]
    if wanted.get(ACTIVE) != base_state(base).get(ACTIVE) and (wanted.get(ACTIVE) or ACTIVE in base_state(base)):
        found["ln_scaling"] = _scaling(wanted.get(ACTIVE)) or False
    return found


def _mismatch(adapter: dict[str, Any], what: str, wanted: dict[str, Any], base: PreTrainedConfig | None) -> str:
    message = f"{what} was trained on a base with {_describe(wanted)}; this base has {_describe(base_state(base))}. "
    found = _to_restore(wanted, base) if base is not None else None
    if found and wanted.get(FOLDED) == base_state(base).get(FOLDED):
        said = ", ".join(f"{key}={value!r}" for key, value in found.items())
        return f"{message}Load the base with from_pretrained(..., {said})"
    where = adapter.get("base_model_name_or_path")
    return f"{message}Load it on that base" + (f", {where!r}" if where else "")


def _describe(said: dict[str, Any]) -> str:
    if DROPPED in said:
        kept, original = layers.original_layers(said)
        which = f"layers {kept} of {original} (dropped: {said[DROPPED]['layers']})"
    else:
        which = "all its layers"
    if FOLDED in said:
        return f"ln_scaling={_scaling(said[FOLDED])!r} folded into its weights and {which}"
    return f"ln_scaling={_scaling(said.get(ACTIVE))!r} and {which}"


def _scaling(value: Any) -> dict[str, Any] | None:
    scaling = LNScalingConfig.of(value)
    return scaling.to_dict() if scaling else None


def _config_on_disk(adapter: dict[str, Any], local: bool = False) -> PreTrainedConfig | None:
    """The configuration at the path that PEFT noted, or None if it cannot be read; `local` asks no Hub for it."""
    name = adapter.get("base_model_name_or_path")
    if not name:
        return None
    try:
        return AutoConfig.from_pretrained(name, revision=adapter.get("revision"), local_files_only=local)
    except (OSError, ValueError):
        return None


def _on_disk_as(base: PreTrainedConfig, adapter: dict[str, Any]) -> bool:
    there = _config_on_disk(adapter)
    return there is not None and _same(base_state(there), base_state(base))
