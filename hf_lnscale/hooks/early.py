"""Hooks for libraries imported before or during transformers: accelerate, torch.distributed, lm-eval and mergekit.

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


def save_state(original: Original, /, self: Any, *args: Any, **kwargs: Any) -> Any:
    """accelerate's `Accelerator`: saves the state of a training loop, without the model's configuration."""
    handle = self.register_save_state_pre_hook(
        lambda models, weights, folder: _state_of("note_models", models, folder) if self.is_main_process else None
    )
    try:
        return original(self, *args, **kwargs)
    finally:
        handle.remove()


def load_state(original: Original, /, self: Any, *args: Any, **kwargs: Any) -> Any:
    handle = self.register_load_state_pre_hook(lambda models, folder: _state_of("require_models", models, folder))
    try:
        return original(self, *args, **kwargs)
    finally:
        handle.remove()


def save_model(original: Original, /, self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """accelerate's `Accelerator`: saves weights without the model's configuration."""
    if not _models_imported():
        return original(self, model, *args, **kwargs)
    from .readers import mark_of
    from .saving import marking

    with marking(mark_of(model)):
        return original(self, model, *args, **kwargs)


def merge_weights(original: Original, /, checkpoint_dir: Any, *args: Any, **kwargs: Any) -> Any:
    """accelerate's `merge_fsdp_weights`: a distributed checkpoint in one file, without a model in memory."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    marks = (FileSystemReader(checkpoint_dir).read_metadata().planner_data or {}).get("hf_lnscale") or []
    if len(marks) != 1:  # none, or of several models
        return original(checkpoint_dir, *args, **kwargs)
    from .saving import marking

    with marking(marks[0]):
        return original(checkpoint_dir, *args, **kwargs)


def save_weights(original: Original, /, *args: Any, **kwargs: Any) -> Any:
    if not _models_imported():
        return original(*args, **kwargs)
    from . import saving

    return saving.save_weights(original, *args, **kwargs)


def save_file(original: Original, /, *args: Any, **kwargs: Any) -> Any:
    if not _models_imported():
        return original(*args, **kwargs)
    from . import saving

    return saving.save_file(original, *args, **kwargs)


def _state_of(function: str, models: Any, folder: Any) -> None:
    if _models_imported():
        from . import readers

        getattr(readers, function)(models, folder)


def create_global_plan(original: Original, /, self: Any, all_plans: Any, *args: Any, **kwargs: Any) -> Any:
    """The global plan of a save, which also creates the metadata of the checkpoint."""
    plans, metadata = original(self, all_plans, *args, **kwargs)
    if _models_imported():
        from .readers import mark_state

        mark_state(self, metadata)
    return plans, metadata


def set_up_planner(
    original: Original, /, self: Any, state_dict: Any, metadata: Any = None, *args: Any, **kwargs: Any
) -> None:
    """The load planner, which matches tensors to a state dict by name."""
    original(self, state_dict, metadata, *args, **kwargs)
    # Private: converts a checkpoint to another format, without a model.
    converts = type(self).__name__ == "_EmptyStateDictLoadPlanner"
    if metadata is not None and _models_imported() and not converts:
        from .readers import require_own_checkpoint

        require_own_checkpoint(self.state_dict, metadata)


def create_model(original: Original, /, self: Any, *args: Any, **kwargs: Any) -> Any:
    """lm-eval's `delta`, a second checkpoint whose tensors are added to the first by name."""
    given = inspect.signature(original).bind(self, *args, **kwargs).arguments
    if delta := given.get("delta"):
        from .readers import require_same_layers

        where = {key: given[key] for key in ("revision", "trust_remote_code") if key in given}
        require_same_layers(given["pretrained"], delta, **where)
    return original(self, *args, **kwargs)


def run_merge(original: Original, /, merge_config: Any, out_path: Any, options: Any, *args: Any, **kwargs: Any) -> Any:
    """mergekit, also where TRL's `MergeModelCallback` calls it."""
    from .readers import require_mergeable

    require_mergeable(merge_config, trust_remote_code=options.trust_remote_code)
    return original(merge_config, out_path, options, *args, **kwargs)
