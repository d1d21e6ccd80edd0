"""vLLM and SGLang: a scaled or partial checkpoint is served by this package's model class, or not at all."""

from __future__ import annotations

import copy
from typing import Any

from ..core.errors import ArgumentError
from ..core.record import record
from .install import Original


def parse(original: Original, /, self: Any, *args: Any, **kwargs: Any) -> Any:
    """vLLM: keeps the architecture prefix of a protected checkpoint, so that only this package's class matches."""
    values, config = original(self, *args, **kwargs)
    if prefix := record(config).architecture_prefix:
        # Without architectures, vLLM would use the family's own class for the model_type.
        config.architectures = [prefix + name for name in config.architectures or [""]]
        overrides = kwargs.get("hf_overrides")  # vLLM applies them to this configuration next
        if callable(overrides):
            left = overrides(copy.deepcopy(config)).architectures
        else:
            left = (overrides or {}).get("architectures", config.architectures)
        if left != config.architectures:
            raise ArgumentError(
                "hf_overrides",
                {"architectures": left},
                problem=f"removes the prefix {prefix!r} from the model's {config.architectures}, and with it LayerNorm "
                "Scaling or the missing sub-layers. Omit it, or export the model first: hf-lnscale export",
            )
    return values, config


def get_config(original: Original, /, model: Any, *args: Any, **kwargs: Any) -> Any:
    """SGLang: refuses models that would lose their scale, or get new weights for missing sub-layers."""
    config = original(model, *args, **kwargs)
    if record(config).needs_plugin:
        problem = "is scaled or lacks sub-layers, which SGLang does not know; serve what hf-lnscale export writes"
        raise ArgumentError("model", str(model), problem=problem)
    return config
