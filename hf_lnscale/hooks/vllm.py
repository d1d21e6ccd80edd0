"""vLLM: the configuration that it reads of a scaled checkpoint keeps its mark, which no class but ours is found by."""

from __future__ import annotations

from typing import Any

from ..core.record import record
from .install import Original


def parse(original: Original, /, self: Any, *args: Any, **kwargs: Any) -> Any:
    values, config = original(self, *args, **kwargs)
    if prefix := record(config).architecture_prefix:
        # Without architectures vLLM takes the class of the model_type, which is the family's own.
        config.architectures = [prefix + name for name in config.architectures or [""]]
    return values, config
