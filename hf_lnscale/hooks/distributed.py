"""torch.distributed.checkpoint, which transformers imports amid its own import. Imports the standard library only."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def set_up_planner(original: Callable[..., Any]) -> Callable[..., Any]:
    """The planner of a load, which reads tensors into those of a state dict by their names."""

    def set_up_planner(self: Any, state_dict: Any, metadata: Any = None, *args: Any, **kwargs: Any) -> None:
        original(self, state_dict, metadata, *args, **kwargs)
        if metadata is not None and "transformers.modeling_utils" in sys.modules:  # else there is no model
            from .readers import require_all_layers

            require_all_layers(self.state_dict, metadata.state_dict_metadata)

    return set_up_planner
