"""Libraries that can be imported before transformers, or amid its import: accelerate, torch.distributed and lm-eval.

Imports the standard library only; what a wrapper needs is imported once it is called.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any


def _models_imported() -> bool:
    return "transformers.modeling_utils" in sys.modules  # else there is no model of transformers


def load_checkpoint_in_model(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_checkpoint_in_model(model: Any, checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
        if _models_imported():
            from .readers import require_checkpoint_of

            require_checkpoint_of(model, checkpoint)
        return original(model, checkpoint, *args, **kwargs)

    return load_checkpoint_in_model


def set_up_planner(original: Callable[..., Any]) -> Callable[..., Any]:
    """The planner of a load, which reads tensors into those of a state dict by their names."""

    def set_up_planner(self: Any, state_dict: Any, metadata: Any = None, *args: Any, **kwargs: Any) -> None:
        original(self, state_dict, metadata, *args, **kwargs)
        if metadata is not None and _models_imported():
            from .readers import require_all_layers

            require_all_layers(self.state_dict, metadata.state_dict_metadata)

    return set_up_planner


def create_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """lm-eval's `delta`, a second checkpoint whose tensors are added to those of the first by their names."""
    signature = inspect.signature(original)

    def create_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        if delta := given.get("delta"):
            from .readers import require_same_layers

            where = {key: given[key] for key in ("revision", "trust_remote_code") if key in given}
            require_same_layers(given["pretrained"], delta, **where)
        return original(self, *args, **kwargs)

    return create_model
