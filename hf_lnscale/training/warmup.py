"""Advances the warmup of a model's `ln_scaling` in a Trainer.

The position of a warmup is part of the model's configuration, and so of every checkpoint. Checkpoints of adapters and
sharded ones hold no configuration; for these it is saved with the Trainer's state too.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..core.apply import set_ln_scaling_step
from ..core.config import LNScalingConfig
from ..core.record import get_ln_scaling, recorded_scaling
from ..core.stack import text_stack


class LNScalingWarmupCallback(TrainerCallback, ExportableState):
    """Ramps a model's exponent up from 0 to its value, one update per optimizer step.

    The model's configuration sets length and shape of the ramp. Each step is trained with the exponent for the number
    of steps done before it, so the first step trains a Pre-LN model. A resumed run continues from its checkpoint's
    position, and a new run from the position of the model.

        model = AutoModelForCausalLM.from_pretrained(name, ln_scaling={"warmup_steps": 1000})
        Trainer(model=model, ..., callbacks=[LNScalingWarmupCallback()]).train()

    Raises:
        ValueError: when training starts, if the model has no warmup, if it differs from that of the resumed
            checkpoint, or if the run is too short for it.
    """

    moves_ln_scaling = True  # by this the hook on Trainer.train recognizes the callback

    def __init__(self) -> None:
        self.ln_scaling: dict[str, Any] | None = None  # of the model; saved with the Trainer's state
        self._offset = 0  # warmup steps done before the first step of the run

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"ln_scaling": self.ln_scaling}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        scaling = LNScalingConfig.of(get_ln_scaling(text_stack(model).model.config))
        if scaling is None or not scaling.warmup_steps:
            has = "no ln_scaling" if scaling is None else f"ln_scaling={scaling.to_dict()}"
            raise ValueError(
                f"{type(self).__name__}: the model has {has}, so there is no warmup. Load or build it with "
                'ln_scaling={"warmup_steps": N}, or leave the callback out.'
            )
        saved = state.stateful_callbacks  # a dict when read from a file
        if state.global_step and (resumed := recorded_scaling(saved)):
            if dataclasses.replace(resumed, step=scaling.step) != scaling:
                raise ValueError(
                    f"{type(self).__name__}: the run to resume had ln_scaling={resumed.to_dict()}, the model has "
                    f"{scaling.to_dict()}; build the model with the same ln_scaling to resume"
                )
            scaling = resumed
        left, steps = scaling.warmup_steps - scaling.step, state.max_steps - state.global_step
        if left > steps:
            raise ValueError(
                f"{type(self).__name__}: the warmup has {left} steps to go (warmup_steps={scaling.warmup_steps}), the "
                f"run only {steps}: it would end with a model that is neither Pre-LN nor LNS. Train for longer, or "
                "give ln_scaling fewer warmup_steps."
            )
        self._offset, self.ln_scaling = scaling.step - state.global_step, None
        self._move(model, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._move(kwargs["model"], state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        # The last log of a run comes just before Trainer loads the weights of the best checkpoint, which leaves the
        # position of the warmup as it is.
        if "train_runtime" in (logs or {}) and args.load_best_model_at_end and state.best_global_step is not None:
            self._move(kwargs["model"], state.best_global_step)

    def _move(self, model: Any, global_step: int) -> None:
        step = global_step + self._offset
        if self.ln_scaling is None or min(step, self.ln_scaling["warmup_steps"]) != self.ln_scaling["step"]:
            set_ln_scaling_step(model, step)
            self.ln_scaling = get_ln_scaling(text_stack(model).model.config)
