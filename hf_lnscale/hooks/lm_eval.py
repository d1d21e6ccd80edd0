"""lm-eval's `delta`, a second checkpoint whose tensors are added to those of the first by their names.

Its module can be imported before those of transformers that are hooked. Imports the standard library only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def create_model(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def create_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        if delta := given.get("delta"):
            from .readers import require_same_layers

            where = {key: given[key] for key in ("revision", "trust_remote_code") if key in given}
            require_same_layers(given["pretrained"], delta, **where)
        return original(self, *args, **kwargs)

    return create_model
