"""`Trainer.train`: what a run may be resumed from."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, Trainer
from transformers.trainer_utils import get_last_checkpoint

from ..core.apply import set_ln_scaling_step
from ..core.config import LNScalingConfig
from ..core.families import text_config
from ..core.record import DROPPED, ON_DISK, get_ln_scaling, trained_without
from ..pruning import layers
from .models import active_in
from .peft import require_base_of


def train_hook(original: Any) -> Any:
    @functools.wraps(original)
    def train(self: Trainer, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        # Trainer loads the weights of a checkpoint without a look at its configuration.
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        config = getattr(self.model, "config", None)
        if folder and isinstance(config, PreTrainedConfig):
            has_config = os.path.isfile(os.path.join(folder, "config.json"))  # not of an adapter, nor sharded
            step = require_same_model(config, str(folder)) if has_config else _recorded_step(config, Path(folder))
            if step is not None and self.model is not None:  # the weights that are loaded next belong to it
                set_ln_scaling_step(self.model, step)
            if not has_config:
                require_base_of(folder, {}, self.model)
        _require_led_warmup(self, config)
        return original(self, resume_from_checkpoint, *args, **kwargs)

    return train


def _recorded_step(config: PreTrainedConfig, folder: Path) -> int | None:
    """The step of a warmup that was saved with the state of the Trainer, if the model has a warmup."""
    from ..training.warmup import recorded_scaling

    own, state = LNScalingConfig.of(get_ln_scaling(config)), folder / "trainer_state.json"
    if own is None or not own.warmup_steps or not state.is_file():
        return None
    recorded = recorded_scaling(json.loads(state.read_text(encoding="utf-8")).get("stateful_callbacks") or {})
    return recorded.step if recorded else None


def _require_led_warmup(trainer: Trainer, config: Any) -> None:
    scale = LNScalingConfig.of(get_ln_scaling(config)) if isinstance(config, PreTrainedConfig) else None
    if scale is None or not scale.warming_up:
        return
    from ..training.warmup import LNScalingWarmupCallback

    if not any(isinstance(callback, LNScalingWarmupCallback) for callback in trainer.callback_handler.callbacks):
        held = LNScalingConfig(scale.exponent_now, scale.depths).to_dict()
        raise ValueError(
            f"the warmup of the model's ln_scaling stands at step {scale.step} of {scale.warmup_steps}, and nothing in "
            "this Trainer moves it. Add LNScalingWarmupCallback(), from hf_lnscale.training, to its callbacks, or keep "
            f"it where it is: hf_lnscale.apply_ln_scaling(model, {held})"
        )


def require_same_model(config: PreTrainedConfig, folder: str) -> int | None:
    """The step of a warmup that the checkpoint stands at, if the model has the same one."""
    saved, _ = type(config).get_config_dict(folder)
    both = (type(config).from_dict(dict(saved)), config)
    if any(DROPPED in vars(text_config(one)) for one in both):  # others need not count their layers
        there, here = map(layers.original_layers, both)
        if there != here:
            raise ValueError(
                f"resume_from_checkpoint={folder!r} was trained with layers {there[0]} of {there[1]}, the model has "
                f"layers {here[0]} of {here[1]}; load the model with the same drop_layers to resume"
            )
    active = active_in(saved)
    resumed = copy.deepcopy(config)
    vars(text_config(resumed))[ON_DISK] = active
    own, trained = (LNScalingConfig.of(one) for one in (get_ln_scaling(config), active))
    if own and trained and trained.warmup_steps and own == dataclasses.replace(trained, step=own.step):
        return trained.step
    warming_up = any(one and one.warming_up for one in (own, trained))
    if warming_up or trained_without(resumed) is not None:
        raise ValueError(
            f"resume_from_checkpoint={folder!r} was trained with ln_scaling={active}, the model has "
            f"ln_scaling={get_ln_scaling(config)}; build the model with the same ln_scaling to resume"
        )
    return None
