"""PEFT: an adapter records its base model and is refused on any other."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import warnings
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME, find_adapter_config_file

from ..core.apply import require_consistent
from ..core.errors import ArgumentError
from ..core.stack import base_config
from . import adapter_note as adapters
from .configuration import located, setting
from .install import Original

# The configuration of the model whose adapter is being saved.
noted_base: ContextVar[PreTrainedConfig | None] = ContextVar("noted_base", default=None)


def read_adapter(name: Any, where: dict[str, Any]) -> dict[str, Any] | None:
    """The contents of an adapter's adapter_config.json, or None if there is none."""
    file = find_adapter_config_file(os.fspath(name), **located(where))
    return adapters.without_tripwire(json.loads(Path(file).read_text(encoding="utf-8"))) if file else None


def adapter_to_load(name: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The adapter that `from_pretrained` will attach to the base it loads."""
    given = kwargs.get("adapter_kwargs") or {}
    if (found := given.get("_adapter_model_path")) is not None:  # AutoModel has already looked it up
        return read_adapter(found, {**kwargs, **given})
    # Looking on the Hub would cost a request for every model; `load_adapter` looks there later and checks the base.
    folder = isinstance(name, (str, os.PathLike)) and os.path.isdir(name)
    return read_adapter(name, {"subfolder": kwargs.get("subfolder")}) if folder else None


def require_base_of(name: Any, where: dict[str, Any], model: Any) -> None:
    """Refuses an adapter that was trained on a different base."""
    adapter = read_adapter(name, where)
    if adapter is not None:
        adapters.require_base(adapter, os.fspath(name), base_config(model))


def load_adapter(
    original: Original, /, self: PreTrainedModel, peft_model_id: Any = None, *args: Any, **kwargs: Any
) -> Any:
    load_config = kwargs.get("load_config")
    name = peft_model_id or getattr(load_config, "pretrained_model_name_or_path", None)
    if name is not None:
        where = getattr(load_config, "download_kwargs", None) or {}
        require_base_of(name, {**where, **kwargs, **(kwargs.get("adapter_kwargs") or {})}, self)
    return original(self, peft_model_id, *args, **kwargs)


def from_json_file(original: Original, /, cls: Any, *args: Any, **kwargs: Any) -> Any:
    return adapters.without_tripwire(original(cls, *args, **kwargs))


def save_adapter_config(original: Original, /, self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(self, save_directory, *args, **kwargs)
    adapters.add_note(Path(save_directory) / ADAPTER_CONFIG_NAME, noted_base.get())
    return result


def compose_cartridge_adapters(original: Original, /, adapter_paths: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuses adapters of different bases; PEFT joins the keys and values of adapters of one base."""
    paths, notes = list(adapter_paths), []
    for path in paths:
        with contextlib.suppress(OSError):  # the original refuses an adapter that is not there
            if (found := read_adapter(path, {})) is not None:
                notes.append(adapters.note(found))
    if any(one != notes[0] for one in notes):
        records = [one and one.to_dict() for one in notes]
        raise ArgumentError(
            "adapter_paths", [str(path) for path in paths], problem=f"were trained on different bases: {records}"
        )
    return original(paths, *args, **kwargs)


def save_adapter(original: Original, /, self: Any, *args: Any, **kwargs: Any) -> Any:
    require_consistent(self)
    with setting(noted_base, base_config(self)):
        return original(self, *args, **kwargs)


def own_base_only(original: Original, /, *args: Any, **kwargs: Any) -> Any:
    """Checks the base before any PEFT function that loads an adapter into a model in memory changes the model."""
    given = inspect.signature(original).bind(*args, **kwargs).arguments
    model = next(given[name] for name in ("model", "lora_model", "self") if name in given)
    adapter = given.get("model_id") or given["model_name_or_path"]
    require_base_of(adapter, {**given, **given.get("kwargs", {})}, model)
    return original(*args, **kwargs)


def hotswap_adapter_from_state_dict(original: Original, /, *args: Any, **kwargs: Any) -> Any:
    """Called by `hotswap_adapter`, even where that was imported by name before this package."""
    given = inspect.signature(original).bind(*args, **kwargs).arguments
    adapter = given["config"].to_dict()
    if adapters.note(adapter) is not None:  # an adapter in memory has none and may belong to this model
        adapters.require_base(adapter, given["adapter_name"], base_config(given["model"]))
    return original(*args, **kwargs)


def auto_adapter(original: Original, /, cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
    adapter = read_adapter(pretrained_model_name_or_path, kwargs)
    with warnings.catch_warnings():
        if adapter is not None and (found := adapters.keywords(adapter)):
            kwargs = {**found, **kwargs}
            # The adapter was trained with this scale, so the warning does not apply.
            warnings.filterwarnings("ignore", message="ln_scaling was")
        return original(cls, pretrained_model_name_or_path, *args, **kwargs)
