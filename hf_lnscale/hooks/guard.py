"""Refuses the flags if another package does not match the hooks. Does not import transformers itself."""

from __future__ import annotations

import sys
from typing import Any

from .install import CONFIGURATION, DROPS, GROUPS, MODELS, SGLANG, VLLM, Original, require_supported


def refuse(original: Original, /, *args: Any, **kwargs: Any) -> Any:
    """Refuses flags, and configurations and models that have one; passes through everything else."""
    if MODELS in sys.modules:  # otherwise accelerate is used without transformers
        from ..core.record import is_flagged

        if any(is_flagged(getattr(value, "config", value)) for value in (*args, *kwargs.values())):
            require_supported(*(group for group in GROUPS if group not in (VLLM, SGLANG)))
        flags = [kwargs.pop(name, None) for name in ("ln_scaling", *DROPS)]
        if any(value is not None and value is not False for value in flags):
            require_supported()
    return original(*args, **kwargs)


def refuse_scaled_file(original: Original, /, *args: Any, **kwargs: Any) -> Any:
    from ..core.record import parts, protected_part

    found = original(*args, **kwargs)
    if any(protected_part(part).needs_plugin for part in parts(found[0])):
        require_supported(CONFIGURATION, MODELS, VLLM, SGLANG)
    return found


def refuse_to_serve(original: Original, /, model: Any, *args: Any, **kwargs: Any) -> Any:
    """SGLang: refuses models that would lose their scale, or get new weights for missing sub-layers."""
    from ..core.errors import ArgumentError
    from ..core.record import record

    config = original(model, *args, **kwargs)
    if record(config).needs_plugin:
        problem = "is scaled or lacks sub-layers, which SGLang does not know; serve what hf-lnscale export writes"
        raise ArgumentError("model", str(model), problem=problem)
    return config
