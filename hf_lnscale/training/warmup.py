"""The scale over training: what moves the warmup of a model's `ln_scaling` in a Trainer.

Where a warmup stands is part of the model's configuration, so every checkpoint says it. An adapter's checkpoint holds
no configuration of its base; for these, the state of the callback is saved with that of the Trainer.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..scaling import LNScalingConfig, get_ln_scaling, set_ln_scaling_step, text_stack


class LNScalingWarmupCallback(TrainerCallback, ExportableState):
    """Leads a model's exponent from 0 to its value while a Trainer trains it, one move an optimizer step.

    What is led where, and over how many steps, is the model's own: `ln_scaling={"warmup_steps": 1000}`. The step that
    is trained next sees the exponent that belongs to the number of steps done, so the first one trains a Pre-LN model.
    A run that is resumed goes on from where the checkpoint was; one that starts from a model half-way, from there.

        model = AutoModelForCausalLM.from_pretrained(name, ln_scaling={"warmup_steps": 1000})
        Trainer(model=model, ..., callbacks=[LNScalingWarmupCallback()]).train()

    Raises:
        ValueError: when training starts, if the model has no warmup, or the run is too short to end it.
    """

    def __init__(self) -> None:
        self.step = 0

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"step": self.step}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        scaling = _scaling(model)
        if scaling is None or not scaling.warmup_steps:
            has = "no ln_scaling" if scaling is None else f"ln_scaling={scaling.to_dict()}"
            raise ValueError(
                f"{type(self).__name__}: the model has {has}, so there is no warmup to lead. Load or build it with "
                'ln_scaling={"warmup_steps": N}, or leave the callback out.'
            )
        # The Trainer restores the state of callbacks only if it is asked to.
        callbacks: Any = state.stateful_callbacks  # a dict, whatever its annotation says
        saved = callbacks.get(type(self).__name__) if state.global_step else None
        self.step = (saved[0] if isinstance(saved, list) else saved)["attributes"]["step"] if saved else scaling.step
        self._offset = self.step - state.global_step
        left, steps = scaling.warmup_steps - self.step, state.max_steps - state.global_step
        if left > steps:
            raise ValueError(
                f"{type(self).__name__}: the warmup has {left} steps to go (warmup_steps={scaling.warmup_steps}), the "
                f"run only {steps}: it would end with a model that is neither Pre-LN nor LNS. Train for longer, or "
                "give ln_scaling fewer warmup_steps."
            )
        set_ln_scaling_step(model, self.step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._move(kwargs["model"], state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The weights of the best checkpoint are loaded by then, without a look at its configuration.
        if args.load_best_model_at_end and state.best_global_step is not None:
            self._move(kwargs["model"], state.best_global_step)

    def _move(self, model: Any, global_step: int) -> None:
        scaling = _scaling(model)
        assert scaling is not None
        step = min(global_step + self._offset, scaling.warmup_steps)
        if step != self.step:
            set_ln_scaling_step(model, step)
            self.step = step


def _scaling(model: Any) -> LNScalingConfig | None:
    return LNScalingConfig.of(get_ln_scaling(text_stack(model).model.config))
