"""vLLM: the configuration that it reads of a scaled checkpoint keeps its mark, which no class but ours is found by."""

from __future__ import annotations

import copy
from typing import Any

from ..core.errors import ArgumentError
from ..core.record import record
from .install import Original


def parse(original: Original, /, self: Any, *args: Any, **kwargs: Any) -> Any:
    values, config = original(self, *args, **kwargs)
    if prefix := record(config).architecture_prefix:
        # Without architectures vLLM takes the class of the model_type, which is the family's own.
        config.architectures = [prefix + name for name in config.architectures or [""]]
        overrides = kwargs.get("hf_overrides")  # what vLLM does to this configuration next
        if callable(overrides):
            left = overrides(copy.deepcopy(config)).architectures
        else:
            left = (overrides or {}).get("architectures", config.architectures)
        if left != config.architectures:
            raise ArgumentError(
                "hf_overrides",
                {"architectures": left},
                problem=f"takes the mark {prefix!r} from the model's {config.architectures}, and its LayerNorm "
                "Scaling or missing sub-layers with it. Leave it out, or export the model first: hf-lnscale export",
            )
    return values, config
