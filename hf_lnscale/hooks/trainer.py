"""`Trainer`: checks the checkpoint that a run is resumed from."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint

from ..core.apply import set_ln_scaling_step
from ..core.config import LNScalingConfig
from ..core.errors import ArgumentError
from ..core.json_file import read_object
from ..core.record import SourceName, get_ln_scaling, is_flagged, record, recorded_scaling, scaled_alike
from ..pruning import checkpoint_layers
from .configuration import saved_config
from .install import Original
from .peft import require_base_of

if TYPE_CHECKING:
    from transformers import Trainer


def train(original: Original, /, self: Trainer, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
    # Trainer loads the weights of a checkpoint without reading its configuration.
    folder = resume_from_checkpoint
    if folder is True and os.path.isdir(output := str(self.args.output_dir)):
        folder = get_last_checkpoint(output)
    config = getattr(self.model, "config", None)
    # The original refuses a missing folder.
    if isinstance(folder, (str, os.PathLike)) and os.path.isdir(folder) and isinstance(config, PreTrainedConfig):
        has_config = os.path.isfile(os.path.join(folder, "config.json"))  # not for an adapter or sharded state
        step = require_same_model(config, str(folder)) if has_config else _recorded_step(config, Path(folder))
        if step is not None and self.model is not None:  # the weights loaded next belong to this step
            set_ln_scaling_step(self.model, step)
        if not has_config:
            require_base_of(folder, {}, self.model)
    _require_moved_warmup(self, record(config).active)
    _require_known_to_vllm(self, config)
    return original(self, resume_from_checkpoint, *args, **kwargs)


def save_model(original: Original, /, self: Trainer, output_dir: str | None = None, *args: Any, **kwargs: Any) -> Any:
    result = original(self, output_dir, *args, **kwargs)
    folder, model = Path(output_dir or str(self.args.output_dir)), self.model
    # From a sharded state alone, `train` could not detect a different scale or different layers.
    sharded = self.is_fsdp_enabled and self.args.should_save and not (folder / "config.json").exists()
    if sharded and isinstance(model, PreTrainedModel) and is_flagged(model.config):
        model.config.save_pretrained(folder)
    return result


def _recorded_step(config: PreTrainedConfig, folder: Path) -> int | None:
    """The warmup step saved with the Trainer state, if the model has a warmup."""
    own, state = record(config).active, folder / "trainer_state.json"
    if own is None or not own.warmup_steps or not state.is_file():
        return None
    try:
        recorded = recorded_scaling(read_object(state).get("stateful_callbacks") or {})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"resume_from_checkpoint: {str(state)!r} has no valid warmup state: {error!r}") from None
    return recorded.step if recorded else None


def _require_moved_warmup(trainer: Trainer, scale: LNScalingConfig | None) -> None:
    if scale is None or not scale.warming_up:
        return
    if not any(getattr(callback, "moves_ln_scaling", False) for callback in trainer.callback_handler.callbacks):
        constant = LNScalingConfig(scale.exponent_now, scale.depths).to_dict()
        raise ValueError(
            f"the model's ln_scaling warmup is at step {scale.step} of {scale.warmup_steps}, and no callback of this "
            "Trainer advances it. Add LNScalingWarmupCallback() from hf_lnscale.training to its callbacks, or keep the "
            f"current scale: hf_lnscale.apply_ln_scaling(model, {constant})"
        )
    for callback in trainer.callback_handler.callbacks:
        # TRL callbacks that sync a reference model, or save a running average of the model.
        if hasattr(callback, "sync_target_model") or hasattr(callback, "running_model"):
            raise ValueError(
                f"{type(callback).__name__} averages the model's weights, but the scale of the average would stay at "
                f"step {scale.step} of {scale.warmup_steps} of the ln_scaling warmup. Finish the warmup without it "
                "(for a reference model: sync_ref_model=False)"
            )


def _require_known_to_vllm(trainer: Trainer, config: Any) -> None:
    """Refuses TRL's `use_vllm` if vLLM, which loads the checkpoint of the model's name, would get another model.

    TRL then sends it the model's tensors by name, which would replace other layers, and no scale.
    """
    given: tuple[str, Any] = ("use_vllm", True)
    if not getattr(trainer.args, "use_vllm", False):
        if not hasattr(trainer, "weight_transfer"):
            return
        given = ("trainer", type(trainer).__name__)  # TRL's asynchronous ones always use vLLM, without an argument
    name, scale = getattr(config, "_name_or_path", ""), record(config).active
    if not isinstance(name, SourceName):
        return
    if scale is not None and scale.warming_up:
        problem = (
            f"would keep the scale of step {scale.step} of {scale.warmup_steps} of the ln_scaling warmup in vLLM. "
            "Finish the warmup without it"
        )
    elif dataclasses.replace(record(saved_config(config, name)), on_disk=None) != name.record:
        problem = (
            f"would load the checkpoint {str(name)!r} into vLLM, but the model was changed since it was loaded from "
            "it: other layers or another scale. Save the model, load it from that folder, and train that"
        )
    else:
        return
    raise ArgumentError(*given, problem=problem)


def require_same_model(config: PreTrainedConfig, folder: str) -> int | None:
    """Refuses a checkpoint of a different model; returns its warmup step if both have the same warmup."""
    saved = saved_config(config, folder)
    both = (type(config).from_dict(dict(saved)), config)
    if any(record(one).dropped for one in both):  # other configurations need not have a number of layers
        theirs, ours = ((*checkpoint_layers.original_layers(one), record(one).sublayers) for one in both)
        if theirs != ours:
            lacking = ["".join(f" without {kind} in {at}" for kind, at in one[2].items()) for one in (theirs, ours)]
            raise ValueError(
                f"resume_from_checkpoint={folder!r} was trained with layers {theirs[0]} of {theirs[1]}{lacking[0]}, "
                f"but the model has layers {ours[0]} of {ours[1]}{lacking[1]}; load the model with the same "
                "drop_layers, drop_attention and drop_mlp to resume"
            )
    own, trained = record(config).active, record(saved).active
    if not scaled_alike(config, trained):
        raise ValueError(
            f"resume_from_checkpoint={folder!r} was trained with "
            f"ln_scaling={trained and trained.to_dict()}, but the model has "
            f"ln_scaling={get_ln_scaling(config)}; build the model with the same ln_scaling to resume"
        )
    return trained.step if own and trained and own.warmup_steps == trained.warmup_steps > 0 else None
