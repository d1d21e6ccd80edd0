"""`PreTrainedConfig`: the keywords are read, and a scaled checkpoint's config.json is protected."""

from __future__ import annotations

import functools
import json
import os
from typing import Any

from transformers import PreTrainedConfig

from ..core.record import ACTIVE, ON_DISK, parts, protect, set_ln_scaling, unprotect
from ..pruning import layers

# --- the hooks --------------------------------------------------------------------------------------


def from_dict_hook(original: Any) -> Any:
    @functools.wraps(original.__func__)
    def from_dict(
        cls: type[PreTrainedConfig],
        config_dict: dict[str, Any],
        ln_scaling: Any = None,
        drop_layers: Any = None,
        **kwargs: Any,
    ) -> Any:
        made = original.__func__(cls, config_dict, **kwargs)
        # After every other keyword: what is valid depends on the number of layers.
        config = made[0] if isinstance(made, tuple) else made
        layers.set_drop_layers(config, drop_layers)
        set_ln_scaling(config, ln_scaling)
        return made

    return classmethod(from_dict)


def to_json_file_hook(original: Any) -> Any:
    @functools.wraps(original)
    def to_json_file(self: PreTrainedConfig, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        if not any(part.get(ACTIVE) or ON_DISK in part for part in parts(self.to_dict())):
            return original(self, json_file_path, use_diff=use_diff)
        config = protect(json.loads(self.to_json_string(use_diff=use_diff)))
        with open(json_file_path, "w", encoding="utf-8") as file:
            file.write(json.dumps(config, indent=2, sort_keys=True) + "\n")

    return to_json_file


def _dict_from_json_file(original: Any) -> Any:
    @functools.wraps(original.__func__)
    def _dict_from_json_file(cls: type[PreTrainedConfig], json_file: str | os.PathLike) -> dict[str, Any]:
        return unprotect(original.__func__(cls, json_file))

    return classmethod(_dict_from_json_file)
