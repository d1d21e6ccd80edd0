"""`LNScalingConfig`: the parameters of LayerNorm Scaling."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

from .display import brief

# Fraction of the final exponent reached at a given fraction of the warmup.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda share: share,
    "cosine": lambda share: (1 - math.cos(math.pi * share)) / 2,
}


def is_integer(value: Any) -> bool:
    """Whether a value is a Python or NumPy integer, but not a boolean."""
    return isinstance(value, Integral) and not isinstance(value, bool)


@dataclass(frozen=True)
class LNScalingConfig:
    """Parameters of LayerNorm Scaling: layer i, of depth d, is scaled by `d ** -exponent`.

    With `warmup_steps`, the exponent is ramped up from 0 (Pre-LN) to its final value over that many optimizer steps.
    The current position, `step`, is part of the configuration and is saved in config.json. During training,
    `hf_lnscale.training.LNScalingWarmupCallback` advances it.

    Attributes:
        exponent: 0.5 is the paper's 1/sqrt(l); 0 leaves every layer unchanged.
        depths: one positive integer per layer, shape (L,); None means 1, 2, ..., L. A pruned model keeps the depths
            that its layers had during training.
        warmup_steps: number of optimizer steps from exponent 0 to `exponent`; 0 disables the warmup.
        schedule: shape of the ramp, "linear" or "cosine" (a half-wave, slow at both ends).
        step: number of warmup steps completed, from 0 to `warmup_steps`.

    Raises:
        ValueError: if the exponent is not a finite number >= 0, the depths are not positive integers, or the warmup is
            invalid; the message names the argument, the value and what is valid.
    """

    exponent: float = 0.5
    depths: tuple[int, ...] | None = None
    warmup_steps: int = 0
    schedule: str = "linear"
    step: int = 0

    def __post_init__(self) -> None:
        def require(valid: bool, name: str, what: str) -> None:
            if not valid:
                raise ValueError(f"ln_scaling: {name} must be {what}, got {brief(getattr(self, name))}")

        number = isinstance(self.exponent, Real) and not isinstance(self.exponent, bool)
        valid = number and 0 <= self.exponent < math.inf
        require(valid, "exponent", "a finite number >= 0 (the paper's is 0.5)")
        object.__setattr__(self, "exponent", float(min(self.exponent, sys.float_info.max)))
        require(is_integer(self.warmup_steps) and self.warmup_steps >= 0, "warmup_steps", "an integer >= 0")
        schedules = list(SCHEDULES)  # a list, as the value may be unhashable
        require(self.schedule in schedules, "schedule", f"one of {', '.join(schedules)}")
        valid = is_integer(self.step) and 0 <= self.step <= self.warmup_steps
        require(valid, "step", f"an integer from 0 to warmup_steps, {self.warmup_steps}")
        if (depths := self.depths) is not None:
            listed = isinstance(depths, (list, tuple, range)) and len(depths) > 0
            valid = listed and all(is_integer(depth) and depth > 0 for depth in depths)
            require(valid, "depths", "a list of positive integers, one per layer")
            object.__setattr__(self, "depths", tuple(map(int, depths)))
        for name in ("warmup_steps", "step"):
            object.__setattr__(self, name, int(getattr(self, name)))

    @classmethod
    def of(cls, value: Any) -> LNScalingConfig | None:
        """Converts a value of the `ln_scaling` argument: True, False, None, a dict or an `LNScalingConfig`.

        Returns:
            The configuration, or None if the value is False or None.
        """
        if value is None or value is False:
            return None
        if value is True:
            return cls()
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            known = [field.name for field in fields(cls)]
            for key in value:
                if key not in known:
                    raise ValueError(f"ln_scaling: unknown key {key!r} in {brief(dict(value))}; the keys are {known}")
            return cls(**value)
        raise ValueError(
            f"ln_scaling must be True, False, a dict such as {{'exponent': 0.5}} or an LNScalingConfig, got "
            f"{brief(value)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The dict stored in `config.json`. Warmup keys are omitted if there is no warmup."""
        stored: dict[str, Any] = {"exponent": self.exponent, "depths": self.depths and list(self.depths)}
        if self.warmup_steps:
            stored |= {"warmup_steps": self.warmup_steps, "schedule": self.schedule, "step": self.step}
        return stored

    @property
    def warming_up(self) -> bool:
        """Whether the warmup is not complete yet."""
        return self.step < self.warmup_steps

    @property
    def exponent_now(self) -> float:
        """The exponent currently applied: `exponent`, or its value at `step` of the warmup."""
        if not self.warming_up:
            return self.exponent
        return self.exponent * SCHEDULES[self.schedule](self.step / self.warmup_steps)

    def for_layers(self, num_layers: int) -> LNScalingConfig:
        """A copy with explicit depths.

        Raises:
            ValueError: if the number of depths is not `num_layers`.
        """
        depths = tuple(range(1, num_layers + 1)) if self.depths is None else self.depths
        if len(depths) != num_layers:
            raise ValueError(
                f"ln_scaling: depths must have one entry per layer, {num_layers} for this model, got {len(depths)}: "
                f"{list(depths)!r} (building a model with ln_scaling=True stores its depths in the config; set "
                "ln_scaling again after changing the number of layers)"
            )
        return replace(self, depths=depths)

    def keeping(self, positions: list[int]) -> LNScalingConfig:
        """A copy for a model that keeps only the layers at these positions; the depths must be explicit."""
        assert self.depths is not None
        return replace(self, depths=tuple(self.depths[position] for position in positions))

    def scales(self, num_layers: int) -> list[float]:
        """The scale of each layer, shape (L,), computed in double precision (equation 8: `l ** -0.5`)."""
        depths = self.for_layers(num_layers).depths
        assert depths is not None
        try:  # checks the final exponent, so that a warmup fails at its start rather than at its end
            smallest = max(depths) ** -self.exponent
        except OverflowError:
            smallest = 0.0
        if smallest < sys.float_info.min:
            raise ValueError(
                f"ln_scaling: exponent {self.exponent} with depths {brief(list(depths))} gives a layer a scale of zero"
            )
        return [depth**-self.exponent_now for depth in depths]
