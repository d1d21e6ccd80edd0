"""PEFT: an adapter notes its base, and is put on no other."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import warnings
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME, find_adapter_config_file

from ..core.apply import require_consistent
from . import adapter_note as adapters

# --- adapters ---------------------------------------------------------------------------------------

# Of the model whose adapter is being saved.
_base: ContextVar[PreTrainedConfig | None] = ContextVar("_base", default=None)


@contextlib.contextmanager
def noting(base: PreTrainedConfig | None) -> Any:
    token = _base.set(base)
    try:
        yield
    finally:
        _base.reset(token)


def read_adapter(name: Any, where: dict[str, Any]) -> dict[str, Any] | None:
    """The dict of an adapter's adapter_config.json, or None if there is none."""
    known = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
    where = {key: where[key] for key in known if where.get(key) is not None}
    file = find_adapter_config_file(os.fspath(name), **where)
    return adapters.without_tripwire(json.loads(Path(file).read_text(encoding="utf-8"))) if file else None


def adapter_to_load(name: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The adapter that `from_pretrained` is going to put on the base it loads."""
    given = kwargs.get("adapter_kwargs") or {}
    if (found := given.get("_adapter_model_path")) is not None:  # AutoModel has looked
        return read_adapter(found, {**kwargs, **given})
    # On the Hub, looking would cost every model a request; `load_adapter` will look there, and refuse.
    folder = isinstance(name, (str, os.PathLike)) and os.path.isdir(name)
    return read_adapter(name, {"subfolder": kwargs.get("subfolder")}) if folder else None


def require_base_of(name: Any, where: dict[str, Any], model: Any) -> None:
    """Refuses to put an adapter on another base than its own."""
    adapter = read_adapter(name, where)
    if adapter is not None:
        base = next((part.config for part in model.modules() if isinstance(part, PreTrainedModel)), None)
        adapters.require_base(adapter, os.fspath(name), base)


def load_adapter_into_model_hook(original: Any) -> Any:
    @functools.wraps(original)
    def load_adapter(self: PreTrainedModel, peft_model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
        load_config = kwargs.get("load_config")
        name = peft_model_id or getattr(load_config, "pretrained_model_name_or_path", None)
        if name is not None:
            where = getattr(load_config, "download_kwargs", None) or {}
            require_base_of(name, {**where, **kwargs, **(kwargs.get("adapter_kwargs") or {})}, self)
        return original(self, peft_model_id, *args, **kwargs)

    return load_adapter


def from_json_file_hook(original: Any) -> Any:
    @functools.wraps(original.__func__)
    def from_json_file(cls: type, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        return adapters.without_tripwire(original.__func__(cls, path_json_file, **kwargs))

    return classmethod(from_json_file)


def save_adapter_config_hook(original: Any) -> Any:
    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: str, **kwargs: Any) -> None:
        original(self, save_directory, **kwargs)
        if (base := _base.get()) is not None:
            adapters.add_note(Path(save_directory) / ADAPTER_CONFIG_NAME, base)

    return save_pretrained


def save_adapter_hook(original: Any) -> Any:
    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
        require_consistent(self)
        base = next((part.config for part in self.modules() if isinstance(part, PreTrainedModel)), None)
        with noting(base):
            original(self, *args, **kwargs)

    return save_pretrained


def adapter_from_pretrained_hook(original: Any) -> Any:
    @functools.wraps(original.__func__)
    def from_pretrained(cls: type, model: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        require_base_of(model_id, kwargs, model)  # before the model is changed
        return original.__func__(cls, model, model_id, *args, **kwargs)

    return classmethod(from_pretrained)


def load_adapter_hook(original: Any) -> Any:
    @functools.wraps(original)
    def load_adapter(self: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        require_base_of(model_id, kwargs, self)
        return original(self, model_id, *args, **kwargs)

    return load_adapter


def auto_adapter_hook(original: Any) -> Any:
    @functools.wraps(original.__func__)
    def from_pretrained(cls: type, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        adapter = read_adapter(pretrained_model_name_or_path, kwargs)
        with warnings.catch_warnings():
            if adapter is not None and (found := adapters.keywords(adapter)):
                kwargs = {**found, **kwargs}
                # Not cold: that is how the adapter was trained.
                warnings.filterwarnings("ignore", message="ln_scaling was")
            return original.__func__(cls, pretrained_model_name_or_path, *args, **kwargs)

    return classmethod(from_pretrained)
