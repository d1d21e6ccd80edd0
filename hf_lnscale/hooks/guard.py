"""Refuses the flags where transformers, PEFT or vLLM is not as the hooks need it. Imports no transformers itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from .install import CONFIGURATION, DROPS, GROUPS, MODELS, VLLM, require_supported


def refuse(original: Callable[..., Any]) -> Callable[..., Any]:
    """A wrapper that refuses flags, and configurations and models that have one, and passes on everything else."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        if MODELS in sys.modules:  # else accelerate is used without transformers
            from ..core.record import is_flagged

            if any(is_flagged(getattr(value, "config", value)) for value in (*args, *kwargs.values())):
                require_supported(*(group for group in GROUPS if group != VLLM))
            if any(kwargs.pop(name, None) not in (None, False) for name in ("ln_scaling", *DROPS)):
                require_supported()
        return original(*args, **kwargs)

    return guarded


def refuse_scaled_file(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_config_dict(*args: Any, **kwargs: Any) -> Any:
        from ..core.record import parts, protected_part

        found = original(*args, **kwargs)
        if any(protected_part(part).needs_plugin for part in parts(found[0])):
            require_supported(CONFIGURATION, MODELS, VLLM)
        return found

    return get_config_dict
