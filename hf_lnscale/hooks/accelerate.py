"""accelerate, which can be imported before transformers, or without it. Imports the standard library only."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def load_checkpoint_in_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """accelerate's function; transformers imports accelerate while it is being imported itself."""

    def load_checkpoint_in_model(model: Any, checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
        if "transformers.modeling_utils" in sys.modules:  # else it is no model of transformers
            from .readers import require_checkpoint_of

            require_checkpoint_of(model, checkpoint)
        return original(model, checkpoint, *args, **kwargs)

    return load_checkpoint_in_model


def refuse(original: Callable[..., Any]) -> Callable[..., Any]:
    """As `guard.refuse`, whose import needs transformers."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        if "transformers.modeling_utils" not in sys.modules:
            return original(*args, **kwargs)
        from .guard import refuse

        return refuse(original)(*args, **kwargs)

    return guarded
