"""Advances the warmup of a model's `ln_scaling` in a Trainer.

The warmup step is part of the model's configuration and thus of every checkpoint. Adapter checkpoints and sharded ones
have no configuration, so it is also saved with the Trainer state.
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
    """Ramps a model's exponent up from 0 to its final value, with one update per optimizer step.

    Length and shape of the ramp are set in the model's configuration. Each step uses the exponent for the number of
    steps completed before it, so the first step trains a Pre-LN model. A resumed run continues from its checkpoint's
    warmup step, and a new run from the model's.

        model = AutoModelForCausalLM.from_pretrained(name, ln_scaling={"warmup_steps": 1000})
        Trainer(model=model, ..., callbacks=[LNScalingWarmupCallback()]).train()

    Raises:
        ValueError: when training starts, if the model has no warmup, the warmup differs from the resumed checkpoint's,
            or the run is too short for it.
    """

    moves_ln_scaling = True  # marks the callback for the hook on Trainer.train

    def __init__(self) -> None:
        self.ln_scaling: dict[str, Any] | None = None  # the model's, saved with the Trainer state
        self._offset = 0  # warmup steps completed before the run

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"ln_scaling": self.ln_scaling}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        scaling = LNScalingConfig.of(get_ln_scaling(text_stack(model).model.config))
        if scaling is None or not scaling.warmup_steps:
            has = "no ln_scaling" if scaling is None else f"ln_scaling={scaling.to_dict()}"
            raise ValueError(
                f"{type(self).__name__}: the model has {has}, so there is no warmup. Load or build it with "
                'ln_scaling={"warmup_steps": N}, or remove the callback.'
            )
        saved = state.stateful_callbacks  # a dict when read from a file
        if state.global_step and (resumed := recorded_scaling(saved)):
            if dataclasses.replace(resumed, step=scaling.step) != scaling:
                raise ValueError(
                    f"{type(self).__name__}: the run to resume had ln_scaling={resumed.to_dict()}, but the model has "
                    f"{scaling.to_dict()}; build the model with the same ln_scaling to resume"
                )
            scaling = resumed
        left, steps = scaling.warmup_steps - scaling.step, state.max_steps - state.global_step
        if left > steps:
            raise ValueError(
                f"{type(self).__name__}: the warmup has {left} steps left (warmup_steps={scaling.warmup_steps}), but "
                f"the run has only {steps}, so the model would end up neither Pre-LN nor LNS. Train longer or use "
                "fewer warmup_steps."
            )
        self._offset, self.ln_scaling = scaling.step - state.global_step, None
        self._move(model, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._move(kwargs["model"], state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        # After the last log of a run, Trainer loads the weights of the best checkpoint but not its warmup step.
        if "train_runtime" in (logs or {}) and args.load_best_model_at_end and state.best_global_step is not None:
            self._move(kwargs["model"], state.best_global_step)

    def _move(self, model: Any, global_step: int) -> None:
        step = global_step + self._offset
        if self.ln_scaling is None or min(step, self.ln_scaling["warmup_steps"]) != self.ln_scaling["step"]:
            set_ln_scaling_step(model, step)
            self.ln_scaling = get_ln_scaling(text_stack(model).model.config)
