"""`PreTrainedConfig`: reads the flags and protects the config.json of a scaled checkpoint."""

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
from .install import DROPS, FLAGS, Original, require_supported

# Keywords of from_pretrained that determine where files are found.
_WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# Maps a config.json to the temporary path it is written to while a model is saved.
written_as: ContextVar[dict[Path, Path]] = ContextVar("written_as")
_T = TypeVar("_T")


@contextmanager
def setting(variable: ContextVar[_T], value: _T) -> Iterator[None]:
    """Context in which a context variable has the given value."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def pop_flags(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Removes the flags from keywords and returns them."""
    return {name: kwargs.pop(name, None) for name in FLAGS}


def set_flags(config: PreTrainedConfig, flags: Mapping[str, Any]) -> None:
    """Sets flags in a configuration whose other fields are set: valid values depend on the number of layers."""
    drops, scaling = [flags.get(name) for name in DROPS], flags.get("ln_scaling")
    dropping = any(drop is not None for drop in drops)
    if dropping or (scaling is not None and scaling is not False):
        require_supported()
    if dropping:
        from ..pruning.depth_fields import set_drop_layers  # imports the models of transformers

        set_drop_layers(config, *drops)
    record.set_ln_scaling(config, scaling)


def located(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of `from_pretrained` that determine where files are found."""
    return {key: kwargs[key] for key in _WHERE if kwargs.get(key) is not None}


def saved_config(config: PreTrainedConfig, name: Any, kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config.json of a checkpoint as a dict; `config` belongs to the model that reads it."""
    saved, _ = type(config).get_config_dict(name, **located(kwargs or {}))
    return saved


def flag_property(name: str) -> property:
    found = "None; `dropped_layers` lists what is missing" if name in DROPS else "The text decoder's scale, or None"
    return property(
        lambda config: None if name in DROPS else record.get_ln_scaling(config),
        lambda config, value: set_flags(config, {name: value}),
        doc=f"{found}. Assigning to it acts like the keyword {name} of from_pretrained.",
    )


def from_dict(original: Original, /, cls: Any, *args: Any, **kwargs: Any) -> Any:
    flags = pop_flags(kwargs)
    made = original(cls, *args, **kwargs)
    config = made[0] if isinstance(made, tuple) else made
    set_flags(config, flags)
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
    except RecursionError:  # as JSONDecodeError, so that transformers' error names the file
        raise json.JSONDecodeError("nested too deeply", "", 0) from None
    return record.unprotect(found)


def post_init(original: Original, /, self: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
    """Hook on the constructor, so that its keywords work in any order."""
    flags = pop_flags(kwargs)
    if record.FOLDED in kwargs:  # both keys come from a file, which is validated when it is read
        kwargs = {"ln_scaling": flags.pop("ln_scaling"), **kwargs}
    original(self, *args, **kwargs)
    set_flags(self, flags)


def update(original: Original, /, self: PreTrainedConfig, config_dict: Any, *args: Any, **kwargs: Any) -> None:
    values = dict(config_dict)
    flags = pop_flags(values)
    original(self, values, *args, **kwargs)
    set_flags(self, flags)


def get_mtp_config(original: Original, /, self: PreTrainedConfig, *args: Any, **kwargs: Any) -> Any:
    """The configuration of the multi-token prediction layers, which `generate(use_mtp=True)` reads first."""
    found = record.record(self)
    if found.active or found.dropped:
        raise ArgumentError(
            "use_mtp",
            True,
            problem=f"is not supported for a model with {'dropped layers' if found.dropped else 'ln_scaling'}: the "
            "multi-token prediction layers were trained with a different model. Use an assistant_model, for example "
            "from hf_lnscale.draft_model",
        )
    return original(self, *args, **kwargs)
