"""PEFT adapters: the base of an adapter is recorded in its adapter_config.json and compared on loading.

PEFT records only the path of the base. A base loaded from that path lacks flags that were passed as keywords, and
adapter weights for layer 7 of a pruned model also fit layer 7 of the unpruned one. Neither would raise an error.

The note holds the scale and the layers of the base. It is stored in `auto_mapping`, PEFT's field for restoring the
base, and only for a base that is scaled, folded or pruned, in memory or on disk. If a program without this package
could not load the base correctly from its path, a sentence that says so is appended to `peft_type`: PEFT does not know
the resulting type and raises a `KeyError` that shows it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from ..core.display import brief
from ..core.record import ACTIVE, DROPPED, FOLDED, SUBLAYERS, Dropped, Record, record, require_valid, set_ln_scaling
from ..core.warnings import warn
from ..pruning import checkpoint_layers
from .configuration import set_flags

NOTE = "hf_lnscale"
TRIPWIRE = " on a base with LayerNorm Scaling or dropped layers: install hf_lnscale and import it before loading"


def base_state(config: PreTrainedConfig | None) -> Record:
    """The scale and the layers in a configuration, ignoring `on_disk`; empty for a plain model or None."""
    return dataclasses.replace(record(config), on_disk=None)


def note(adapter: dict[str, Any]) -> Record | None:
    """The state of the adapter's base when it was saved, from its adapter_config.json; None if not recorded."""
    mapping = adapter.get("auto_mapping")
    noted = mapping.get(NOTE) if isinstance(mapping, dict) else None
    if noted is None:
        return None
    try:
        if not isinstance(noted, dict):
            raise ValueError(f"it must be a dict with any of the keys {ACTIVE}, {FOLDED} and {DROPPED}, got {noted!r}")
        return record(noted)
    except ValueError as error:
        raise ValueError(f"auto_mapping[{NOTE!r}] in the adapter's adapter_config.json: {error}") from None


def add_note(path: Path, base: PreTrainedConfig | None) -> None:
    """Records the base in an adapter_config.json, replacing any existing note; None keeps that of a configuration."""
    adapter = json.loads(path.read_text(encoding="utf-8"))
    before = note(adapter)
    found = before if base is None else base_state(base) if record(base) != Record() else None
    if found is None and before is None:
        return
    mapping = {key: value for key, value in (adapter.get("auto_mapping") or {}).items() if key != NOTE}
    if found is not None:
        mapping[NOTE] = found.to_dict()
        on_disk = _config_on_disk(adapter)
        if found.needs_plugin or on_disk is None or base_state(on_disk) != found:
            adapter["peft_type"] += TRIPWIRE
    adapter["auto_mapping"] = mapping or None
    path.write_text(json.dumps(adapter, indent=2, sort_keys=True), encoding="utf-8")


def without_tripwire(adapter: dict[str, Any]) -> dict[str, Any]:
    """Restores the original `peft_type` in the dict of an adapter_config.json, in place; refuses one without a note."""
    if isinstance(kind := adapter.get("peft_type"), str) and kind.endswith(TRIPWIRE):
        if note(adapter) is None:
            raise ValueError(
                f"auto_mapping[{NOTE!r}], which describes the adapter's base, is missing in its adapter_config.json: "
                f"auto_mapping is {brief(adapter.get('auto_mapping'))}"
            )
        adapter["peft_type"] = kind.removesuffix(TRIPWIRE)
    return adapter


def keywords(adapter: dict[str, Any], base: PreTrainedConfig | None = None) -> dict[str, Any]:
    """The keywords of `from_pretrained` needed to restore the base that the adapter was trained on.

    If `base`, the current configuration of the base, is None, it is read from the path that PEFT recorded.
    """
    wanted = note(adapter)
    base = base or (_config_on_disk(adapter) if wanted else None)
    if wanted is None or base is None:  # if the base is missing, loading it will raise an error
        return {}
    if (found := keywords_to_restore(wanted, base)) is None:
        raise ValueError(_mismatch(adapter, "this adapter", wanted, base))
    return found


def keywords_to_restore(wanted: Record, base: PreTrainedConfig) -> dict[str, Any] | None:
    """The keywords of `from_pretrained` that give a model with record `wanted` from a checkpoint, if there are any."""
    if (found := _to_restore(wanted, base)) is None:
        return None
    restored = copy.deepcopy(base)
    set_flags(restored, {**found, "ln_scaling": None})
    try:
        set_ln_scaling(restored, found.get("ln_scaling"))
        require_valid(restored)
    except ValueError:  # depths for a different number of layers, or a scale of zero
        return None
    return found if wanted == base_state(restored) else None


def require_base(adapter: dict[str, Any], name: str, base: PreTrainedConfig | None) -> None:
    """Refuses an adapter that was trained on a base with a different scale or different layers.

    `name` is where it was loaded from. `base` describes the model to attach it to; None for one of another library.
    """
    here, wanted = base_state(base), note(adapter)
    if wanted is None:
        if base is None:
            return
        # Trained on a plain base, or, without this package, on a base that is pruned or folded on disk.
        plain = here == Record()
        on_disk = _config_on_disk(adapter, local=plain)
        if on_disk is None and plain:
            return
        if on_disk is None and not here.needs_plugin:
            warn(
                f"cannot tell whether the adapter {name!r} was trained on this base, which has {_describe(here)}: it "
                f"does not record its base, and {adapter.get('base_model_name_or_path')!r} cannot be read"
            )
            return
        wanted = base_state(on_disk)
    if wanted != here:
        raise ValueError(_mismatch(adapter, f"the adapter {name!r}", wanted, base))


def _to_restore(wanted: Record, base: PreTrainedConfig) -> dict[str, Any] | None:
    """The keywords, without checking whether they suffice; None if layers are missing."""
    available, original = checkpoint_layers.original_layers(base)
    after, before = (found or Dropped((), original) for found in (wanted.dropped, record(base).dropped))
    if after.num_hidden_layers != original or not set(after.kept) <= set(available):
        return None
    gone = {f"drop_{kind}": {*getattr(after, kind)} - {*getattr(before, kind)} for kind in ("layers", *SUBLAYERS)}
    found: dict[str, Any] = {
        keyword: [position for position, layer in enumerate(available) if layer in layers]
        for keyword, layers in gone.items()
        if layers
    }
    if wanted.active != base_state(base).active:
        found["ln_scaling"] = wanted.active.to_dict() if wanted.active else False
    return found


def _mismatch(adapter: dict[str, Any], what: str, wanted: Record, base: PreTrainedConfig | None) -> str:
    message = f"{what} was trained on a base with {_describe(wanted)}; this base has {_describe(base_state(base))}. "
    found = _to_restore(wanted, base) if base is not None else None
    if found and wanted.folded == base_state(base).folded:
        needed = ", ".join(f"{key}={value!r}" for key, value in found.items())
        return f"{message}Load the base with from_pretrained(..., {needed})"
    where = adapter.get("base_model_name_or_path")
    return f"{message}Load it on that base" + (f", {where!r}" if where else "")


def _describe(state: Record) -> str:
    which = "all its layers"
    if dropped := state.dropped:
        which = f"layers {dropped.kept} of {dropped.num_hidden_layers} (dropped: {list(dropped.layers)})"
        which += "".join(f", without {kind} in {list(getattr(dropped, kind))}" for kind in dropped.sublayers)
    if state.folded:
        return f"ln_scaling={state.folded.to_dict()!r} folded into its weights and {which}"
    return f"ln_scaling={state.active and state.active.to_dict()!r} and {which}"


def _config_on_disk(adapter: dict[str, Any], local: bool = False) -> PreTrainedConfig | None:
    """The configuration at the path that PEFT recorded, or None if unreadable; `local` skips the Hub."""
    found: PreTrainedConfig | None = None
    if name := adapter.get("base_model_name_or_path"):
        with contextlib.suppress(OSError, ValueError):
            found = AutoConfig.from_pretrained(name, revision=adapter.get("revision"), local_files_only=local)
    return found
