"""Hooks for libraries that may be imported before or during transformers: accelerate, torch.distributed and lm-eval.

Imports only the standard library; wrappers import what they need when called.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from .install import Original


def _models_imported() -> bool:
    return "transformers.modeling_utils" in sys.modules  # otherwise no transformers model exists


def load_checkpoint_in_model(original: Original, /, model: Any, checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
    if _models_imported():
        from .readers import require_checkpoint_of

        require_checkpoint_of(model, checkpoint)
    return original(model, checkpoint, *args, **kwargs)


def set_up_planner(
    original: Original, /, self: Any, state_dict: Any, metadata: Any = None, *args: Any, **kwargs: Any
) -> None:
    """The load planner, which matches tensors to a state dict by name."""
    original(self, state_dict, metadata, *args, **kwargs)
    if metadata is not None and _models_imported():
        from .readers import require_all_layers

        require_all_layers(self.state_dict, metadata.state_dict_metadata)


def create_model(original: Original, /, self: Any, *args: Any, **kwargs: Any) -> Any:
    """lm-eval's `delta`, a second checkpoint whose tensors are added to the first by name."""
    given = inspect.signature(original).bind(self, *args, **kwargs).arguments
    if delta := given.get("delta"):
        from .readers import require_same_layers

        where = {key: given[key] for key in ("revision", "trust_remote_code") if key in given}
        require_same_layers(given["pretrained"], delta, **where)
    return original(self, *args, **kwargs)
