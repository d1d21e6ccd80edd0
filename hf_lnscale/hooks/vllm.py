"""vLLM: keeps the architecture prefix of a protected checkpoint, so that only this package's model class matches."""

from __future__ import annotations

import copy
from typing import Any

from ..core.errors import ArgumentError
from ..core.record import record
from .install import Original


def parse(original: Original, /, self: Any, *args: Any, **kwargs: Any) -> Any:
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
