"""`PreTrainedConfig`: the flags are read, and a scaled checkpoint's config.json is protected."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedConfig

from ..core import record
from ..core.errors import ArgumentError
from .install import DROPS, Original, require_supported

# Keywords of from_pretrained that say where a file is found.
_WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# Where a config.json is written first, while a model is saved.
written_as: ContextVar[dict[Path, Path]] = ContextVar("written_as")
_T = TypeVar("_T")


@contextmanager
def setting(variable: ContextVar[_T], value: _T) -> Iterator[None]:
    """Within it, a context variable has a value."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def set_ln_scaling(config: PreTrainedConfig, value: Any) -> None:
    if value is not None and value is not False:
        require_supported()
    record.set_ln_scaling(config, value)


def set_drops(config: PreTrainedConfig, values: dict[str, Any]) -> None:
    """Takes out what the keywords of `DROPS` say."""
    if all(value is None for value in values.values()):
        return
    require_supported()
    from ..pruning.depth_fields import set_drop_layers  # imports the models of transformers

    set_drop_layers(config, *(values.get(name) for name in DROPS))


def pop_drops(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords of `DROPS`, which are taken out of `kwargs`."""
    return {name: kwargs.pop(name, None) for name in DROPS}


def located(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the keywords of `from_pretrained` that say where a file is found."""
    return {key: kwargs[key] for key in _WHERE if kwargs.get(key) is not None}


def saved_config(config: PreTrainedConfig, name: Any, kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The dict of the config.json of a checkpoint; `config` is of the model that reads it."""
    saved, _ = type(config).get_config_dict(name, **located(kwargs or {}))
    return saved


def ln_scaling_property(name: str) -> property:
    return property(record.get_ln_scaling, set_ln_scaling, doc="LayerNorm Scaling of the text decoder, or None.")


def drop_property(name: str) -> property:
    return property(
        lambda config: None,
        lambda config, value: set_drops(config, {name: value}),
        doc=f"As the keyword {name} of from_pretrained, when assigned to. `dropped_layers` says what is missing.",
    )


def from_dict(original: Original, /, cls: Any, *args: Any, ln_scaling: Any = None, **kwargs: Any) -> Any:
    drops = pop_drops(kwargs)
    made = original(cls, *args, **kwargs)
    # After every other keyword: what is valid depends on the number of layers.
    config = made[0] if isinstance(made, tuple) else made
    set_drops(config, drops)
    set_ln_scaling(config, ln_scaling)
    if record.is_flagged(config):
        record.require_valid(config)
    return made


def to_dict(original: Original, /, self: PreTrainedConfig, *args: Any, **kwargs: Any) -> Any:
    values = original(self, *args, **kwargs)
    if isinstance(name := values.get("_name_or_path"), record.SourceName):
        values["_name_or_path"] = str(name)
    if record.is_flagged(self):
        values.pop(record.ON_DISK, None)
    return values


def to_json_file(original: Original, /, self: PreTrainedConfig, json_file_path: Any, *args: Any, **kwargs: Any) -> Any:
    json_file_path = written_as.get({}).get(Path(json_file_path), json_file_path)
    if not record.is_flagged(self):
        return original(self, json_file_path, *args, **kwargs)
    text = self.to_json_string(*args, **kwargs)
    config = record.protect(json.loads(text))
    with open(json_file_path, "w", encoding="utf-8") as file:
        file.write(json.dumps(config, indent=2, sort_keys=True) + "\n")


def dict_from_json_file(original: Original, /, cls: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        found = original(cls, *args, **kwargs)
    except RecursionError:  # nested too deeply; transformers names the file in its error for what is not JSON
        raise json.JSONDecodeError("nested too deeply", "", 0) from None
    return record.unprotect(found)


def post_init(original: Original, /, self: PreTrainedConfig, *args: Any, ln_scaling: Any = None, **kwargs: Any) -> None:
    """Hook on the constructor: its keywords mean the same in any order."""
    drops = pop_drops(kwargs)
    if record.FOLDED in kwargs:  # both stand in a file: what is wrong with it is said when it is read
        kwargs, ln_scaling = {"ln_scaling": ln_scaling, **kwargs}, None
    original(self, *args, **kwargs)
    set_drops(self, drops)
    set_ln_scaling(self, ln_scaling)


def update(original: Original, /, self: PreTrainedConfig, config_dict: Any, *args: Any, **kwargs: Any) -> None:
    values = dict(config_dict)
    drops, scaling = pop_drops(values), values.pop("ln_scaling", None)
    original(self, values, *args, **kwargs)
    set_drops(self, drops)
    set_ln_scaling(self, scaling)


def get_mtp_config(original: Original, /, self: PreTrainedConfig, *args: Any, **kwargs: Any) -> Any:
    """The configuration of the layers for multi-token prediction, which `generate(use_mtp=True)` asks for first."""
    found = record.record(self)
    if found.active or found.dropped:
        raise ArgumentError(
            "use_mtp",
            True,
            problem=f"is not supported for a model with {'dropped layers' if found.dropped else 'ln_scaling'}: the "
            "layers for multi-token prediction were trained on another model. Use an assistant_model, such as "
            "hf_lnscale.draft_model makes",
        )
    return original(self, *args, **kwargs)
