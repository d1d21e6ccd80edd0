"""Refuses the flags where transformers, PEFT or vLLM is not as the hooks need it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..core.record import get_ln_scaling, is_flagged, parts, protected_part
from .install import CONFIGURATION, DROPS, GROUPS, MODELS, VLLM, require_supported


def _refuse_value(config: Any, value: Any) -> None:
    if value is not None and value is not False:
        require_supported()


def ln_scaling_property() -> property:
    return property(get_ln_scaling, _refuse_value)


def drop_property() -> property:
    return property(lambda config: None, _refuse_value)


def refuse(original: Callable[..., Any]) -> Callable[..., Any]:
    """A wrapper that refuses flags, and configurations and models that have one, and passes on everything else."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if is_flagged(getattr(value, "config", value)):
                require_supported(*(group for group in GROUPS if group != VLLM))
        for name in ("ln_scaling", *DROPS):
            _refuse_value(None, kwargs.pop(name, None))
        return original(*args, **kwargs)

    return guarded


def refuse_scaled_file(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_config_dict(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        if any(protected_part(part).needs_plugin for part in parts(found[0])):
            require_supported(CONFIGURATION, MODELS, VLLM)
        return found

    return get_config_dict
