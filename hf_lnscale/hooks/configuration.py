"""`PreTrainedConfig`: the flags are read, and a scaled checkpoint's config.json is protected."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

from ..core import record
from ..core.errors import ArgumentError
from .deferred import config_file
from .install import DROPS, require_supported


def set_ln_scaling(config: PreTrainedConfig, value: Any) -> None:
    if value is not None and value is not False:
        require_supported()
    record.set_ln_scaling(config, value)


def set_drops(config: PreTrainedConfig, values: dict[str, Any]) -> None:
    """Takes out what the keywords of `DROPS` say."""
    if all(value is None for value in values.values()):
        return
    require_supported()
    from ..pruning import layers  # imports the models of transformers

    layers.set_drop_layers(config, *(values.get(name) for name in DROPS))


def pop_drops(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords of `DROPS`, which are taken out of `kwargs`."""
    return {name: kwargs.pop(name, None) for name in DROPS}


def ln_scaling_property() -> property:
    return property(record.get_ln_scaling, set_ln_scaling, doc="LayerNorm Scaling of the text decoder, or None.")


def _drop_property(name: str, what: str) -> property:
    return property(
        lambda config: None,
        lambda config, value: set_drops(config, {name: value}),
        doc=f"Drops {what} assigned to it from the configuration. `dropped_layers` says what is missing.",
    )


def drop_layers_property() -> property:
    return _drop_property("drop_layers", "the layers")


def drop_attention_property() -> property:
    return _drop_property("drop_attention", "the attention of the layers")


def drop_mlp_property() -> property:
    return _drop_property("drop_mlp", "the MLP of the layers")


def from_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_dict(cls: Any, *args: Any, ln_scaling: Any = None, **kwargs: Any) -> Any:
        drops = pop_drops(kwargs)
        made = original(cls, *args, **kwargs)
        # After every other keyword: what is valid depends on the number of layers.
        config = made[0] if isinstance(made, tuple) else made
        set_drops(config, drops)
        set_ln_scaling(config, ln_scaling)
        if record.is_flagged(config):
            record.require_valid(config)
        return made

    return from_dict


def post_init(original: Callable[..., Any]) -> Callable[..., Any]:
    """Of the constructor: its keywords mean the same in any order."""

    def __post_init__(self: PreTrainedConfig, *args: Any, ln_scaling: Any = None, **kwargs: Any) -> None:
        drops = pop_drops(kwargs)
        original(self, *args, **kwargs)
        set_drops(self, drops)
        set_ln_scaling(self, ln_scaling)

    return __post_init__


def update(original: Callable[..., Any]) -> Callable[..., Any]:
    def update(self: PreTrainedConfig, config_dict: Any, *args: Any, **kwargs: Any) -> None:
        values = dict(config_dict)
        drops, scaling = pop_drops(values), values.pop("ln_scaling", None)
        original(self, values, *args, **kwargs)
        set_drops(self, drops)
        set_ln_scaling(self, scaling)

    return update


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


def get_mtp_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """The configuration of the layers for multi-token prediction, which `generate(use_mtp=True)` asks for first."""

    def get_mtp_config(self: PreTrainedConfig, *args: Any, **kwargs: Any) -> Any:
        found = record.record(self) if record.is_flagged(self) else record.Record()
        if found.active or found.dropped:
            raise ArgumentError(
                "use_mtp",
                True,
                problem=f"is not supported for a model with {'dropped layers' if found.dropped else 'ln_scaling'}: the "
                "layers for multi-token prediction were trained on another model. Use an assistant_model, such as "
                "hf_lnscale.draft_model makes",
            )
        return original(self, *args, **kwargs)

    return get_mtp_config
