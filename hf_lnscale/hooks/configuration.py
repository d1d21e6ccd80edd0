"""`PreTrainedConfig`: the flags are read, and a scaled checkpoint's config.json is protected."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

from ..core import record
from .deferred import config_file
from .install import require_supported


def set_ln_scaling(config: PreTrainedConfig, value: Any) -> None:
    if value is not None and value is not False:
        require_supported()
    record.set_ln_scaling(config, value)


def set_drop_layers(config: PreTrainedConfig, value: Any) -> None:
    if value is None:
        return
    require_supported()
    from ..pruning import layers  # imports the models of transformers

    layers.set_drop_layers(config, value)


def ln_scaling_property() -> property:
    return property(record.get_ln_scaling, set_ln_scaling, doc="LayerNorm Scaling of the text decoder, or None.")


def drop_layers_property() -> property:
    return property(
        lambda config: None,
        set_drop_layers,
        doc="Drops the layers assigned to it from the configuration. `dropped_layers` says which are missing.",
    )


def from_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_dict(cls: Any, *args: Any, ln_scaling: Any = None, drop_layers: Any = None, **kwargs: Any) -> Any:
        made = original(cls, *args, **kwargs)
        # After every other keyword: what is valid depends on the number of layers.
        config = made[0] if isinstance(made, tuple) else made
        set_drop_layers(config, drop_layers)
        set_ln_scaling(config, ln_scaling)
        if record.is_flagged(config):
            record.require_valid(config)
        return made

    return from_dict


def to_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    def to_dict(self: PreTrainedConfig, *args: Any, **kwargs: Any) -> Any:
        values = original(self, *args, **kwargs)
        if isinstance(name := values.get("_name_or_path"), record.SourceName):
            values["_name_or_path"] = str(name)
        if record.is_flagged(self):
            values.pop(record.ON_DISK, None)
        return values

    return to_dict


def to_json_file(original: Callable[..., Any]) -> Callable[..., Any]:
    def to_json_file(self: PreTrainedConfig, json_file_path: Any, *args: Any, **kwargs: Any) -> Any:
        json_file_path = config_file(json_file_path)
        if not record.is_flagged(self):
            return original(self, json_file_path, *args, **kwargs)
        text = self.to_json_string(*args, **kwargs)
        config = record.protect(json.loads(text))
        with open(json_file_path, "w", encoding="utf-8") as file:
            file.write(json.dumps(config, indent=2, sort_keys=True) + "\n")

    return to_json_file


def dict_from_json_file(original: Callable[..., Any]) -> Callable[..., Any]:
    def dict_from_json_file(cls: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            found = original(cls, *args, **kwargs)
        except RecursionError:  # nested too deeply; transformers names the file in its error for what is not JSON
            raise json.JSONDecodeError("nested too deeply", "", 0) from None
        return record.unprotect(found)

    return dict_from_json_file
