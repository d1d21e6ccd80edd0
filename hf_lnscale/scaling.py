"""LayerNorm Scaling: the norms in front of attention and MLP of layer l are multiplied by 1/sqrt(l).

"The Curse of Depth in Large Language Models", arXiv 2502.05795, section 4, equation 8: h_l' = Norm(h_l) / sqrt(l).

A norm's output is linear in its weight, so Norm(x; w) * s = Norm(x; w * s). The scale is therefore put on the weight
as the norm's forward reads it: one product on a vector of `hidden_size`, and nothing on the activations.

Only the forward reads it so. For everybody else `norm.weight` is the parameter, as in any model: for the optimizer, for
weight initialization, for quantizers that write into it, and for FSDP, which reads parameters by name and takes what it
finds for the parameter. (A `weight` that always reads as the product passes most tests, and under FSDP2 scales twice.)
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .families import FAMILIES, Family, UnsupportedArchitectureError, family_of, submodule, text_config


class _Stored(dict):
    """The value in a configuration. Of a class of this package, so that unpickling one imports, and enables, it."""


# What a configuration carries, in memory and in config.json.
ACTIVE = "ln_scaling"
FOLDED = "ln_scaling_folded"
# Which layers of which number are missing (depth/layers.py); a layer that is left keeps the depth it had.
DROPPED = "dropped_layers"
# What the checkpoint's own config.json said, in memory only: tells a model trained with the scale from a cold switch.
ON_DISK = "_ln_scaling_on_disk"


# How much of the exponent is there after a share of the warmup, both in [0, 1].
SCHEDULES = {"linear": lambda share: share, "cosine": lambda share: (1 - math.cos(math.pi * share)) / 2}


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class LNScalingConfig:
    """Parameters of LayerNorm Scaling: layer i, of depth d, is scaled by `d ** -exponent`.

    With `warmup_steps` the exponent is led from 0, a Pre-LN model, to its value over as many optimizer steps of
    training. Where it stands, `step`, is part of the configuration, and so of config.json; in training
    `hf_lnscale.training.LNScalingWarmupCallback` moves it.

    Attributes:
        exponent: 0.5 is the paper's 1/sqrt(l); 0 leaves every layer as it is.
        depths: one positive integer a layer, shape (L,); None stands for 1, 2, ..., L. A pruned model keeps the depths
            that its layers had when they were trained.
        warmup_steps: optimizer steps from exponent 0 to `exponent`; 0 for the whole exponent at once.
        schedule: how it gets there, "linear" or "cosine" (half a wave: slow at both ends).
        step: optimizer steps of the warmup that are done, 0 ... `warmup_steps`.

    Raises:
        ValueError: for an exponent that is negative, not finite or no number, for depths that are not positive
            integers, and for a warmup that is none; the message names the argument, what was given and what is valid.
    """

    exponent: float = 0.5
    depths: tuple[int, ...] | None = None
    warmup_steps: int = 0
    schedule: str = "linear"
    step: int = 0

    def __post_init__(self) -> None:
        exponent = self.exponent
        number = isinstance(exponent, (int, float)) and not isinstance(exponent, bool)
        if not number or not 0 <= exponent < math.inf:
            raise ValueError(
                f"ln_scaling: exponent must be a finite number >= 0 (the paper's is 0.5), got {exponent!r}"
            )
        object.__setattr__(self, "exponent", float(min(exponent, sys.float_info.max)))
        if not _is_integer(self.warmup_steps) or self.warmup_steps < 0:
            raise ValueError(f"ln_scaling: warmup_steps must be an integer >= 0, got {self.warmup_steps!r}")
        if self.schedule not in list(SCHEDULES):  # a list, as it may be unhashable
            raise ValueError(f"ln_scaling: schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if not _is_integer(self.step) or not 0 <= self.step <= self.warmup_steps:
            raise ValueError(
                f"ln_scaling: step must be an integer from 0 to warmup_steps, {self.warmup_steps}, got {self.step!r}"
            )
        if self.depths is None:
            return
        depths = self.depths
        if not isinstance(depths, (list, tuple)) or not depths:
            raise ValueError(f"ln_scaling: depths must be a list of positive integers, one a layer, got {depths!r}")
        for depth in depths:
            if not _is_integer(depth) or depth < 1:
                raise ValueError(
                    f"ln_scaling: depths must be positive integers, one a layer, got {depth!r} in {depths!r}"
                )
        object.__setattr__(self, "depths", tuple(depths))

    @classmethod
    def of(cls, value: Any) -> LNScalingConfig | None:
        """Reads a value of the `ln_scaling` argument: True, False, None, a dict or an `LNScalingConfig`.

        Returns:
            The configuration, or None where the value says "not scaled".
        """
        if value is None or value is False:
            return None
        if value is True:
            return cls()
        if isinstance(value, cls):
            return value
        if isinstance(value, Mapping):
            known = [field.name for field in fields(cls)]
            unknown = [key for key in value if key not in known]
            if unknown:
                raise ValueError(f"ln_scaling: unknown key {unknown[0]!r} in {dict(value)!r}; the keys are {known}")
            return cls(**value)
        raise ValueError(
            f"ln_scaling must be True, False, a dict such as {{'exponent': 0.5}} or an LNScalingConfig, got {value!r}"
        )

    def to_dict(self) -> dict[str, Any]:
        """What is stored in `config.json`; nothing of a warmup where there is none."""
        stored: dict[str, Any] = {
            "exponent": self.exponent,
            "depths": None if self.depths is None else list(self.depths),
        }
        if self.warmup_steps:
            stored |= {"warmup_steps": self.warmup_steps, "schedule": self.schedule, "step": self.step}
        return stored

    @property
    def warming_up(self) -> bool:
        """Whether there are steps to go to the whole exponent."""
        return self.step < self.warmup_steps

    @property
    def exponent_now(self) -> float:
        """The exponent that is applied: `exponent`, or what it has come to at `step` of a warmup."""
        if not self.warming_up:
            return self.exponent
        return self.exponent * SCHEDULES[self.schedule](self.step / self.warmup_steps)

    def for_layers(self, num_layers: int) -> LNScalingConfig:
        """The same with the depths written out.

        Raises:
            ValueError: if there is not one depth a layer.
        """
        depths = tuple(range(1, num_layers + 1)) if self.depths is None else self.depths
        if len(depths) != num_layers:
            raise ValueError(
                f"ln_scaling: depths must have one entry a layer, {num_layers} for this model, got {len(depths)}: "
                f"{list(depths)!r} (building a model writes out the depths of ln_scaling=True into its config; for "
                "another number of layers, set it anew)"
            )
        return replace(self, depths=depths)

    def scales(self, num_layers: int) -> list[float]:
        """The factor of each layer, shape (L,), computed in double precision (equation 8: `l ** -0.5`)."""
        depths = self.for_layers(num_layers).depths
        assert depths is not None
        try:  # at the end of a warmup too, before it begins
            smallest = max(depths) ** -self.exponent
        except OverflowError:
            smallest = 0.0
        if smallest < sys.float_info.min:
            raise ValueError(f"ln_scaling: exponent {self.exponent} makes the scale of a layer of {list(depths)} zero")
        return [depth**-self.exponent_now for depth in depths]


def get_ln_scaling(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The active scaling of a model's text decoder as a dict, a copy, or None."""
    return copy.deepcopy(vars(text_config(config)).get(ACTIVE))


def set_ln_scaling(config: PreTrainedConfig, value: Any) -> None:
    """Writes a value of the `ln_scaling` argument into a configuration; a model built from it is scaled accordingly.

    None changes nothing, and True neither where a scaling is set already: a checkpoint's own depths stay.
    """
    if value is None or (value is True and get_ln_scaling(config)):
        return
    text = text_config(config)
    holder = vars(text)
    scaling = LNScalingConfig.of(value)
    if scaling is None:
        holder.pop(ACTIVE, None)
        return
    if text.model_type:  # the base class, with which Trainer looks into a config.json, has none
        family_of(config)
    if FOLDED in holder:
        raise ValueError(
            f"ln_scaling={value!r} on a checkpoint whose norm weights hold the scale already ({FOLDED} in its config): "
            "that would scale twice. It needs no flag to run; to train it further with LayerNorm Scaling, load it "
            "without the flag and call hf_lnscale.unfold_ln_scaling(model)."
        )
    if scaling.depths is None and (record := holder.get(DROPPED)):
        own = [layer + 1 for layer in range(record["num_hidden_layers"]) if layer not in record["layers"]]
        scaling = replace(scaling, depths=tuple(own))
    if scaling.depths is not None and (num_layers := getattr(text, "num_hidden_layers", None)):
        scaling = scaling.for_layers(num_layers)
    holder[ACTIVE] = _Stored(scaling.to_dict())


def trained_without(config: PreTrainedConfig) -> str | None:
    """How the active scaling differs from the one that the checkpoint's weights were trained with.

    Returns:
        None where they agree, else "on", "off" or "other": what was done to the checkpoint's own.
    """
    text = text_config(config)
    num_layers = text.num_hidden_layers if hasattr(text, "num_hidden_layers") else 0
    here, there = get_ln_scaling(config), vars(text).get(ON_DISK)
    if here is None and there is None:
        return None
    scales = []
    for value in (here, there):
        scaling = LNScalingConfig.of(value)
        try:
            scales.append(scaling.scales(num_layers) if scaling else [1.0] * num_layers)
        except ValueError:  # the checkpoint has another number of layers than the model
            scales.append([])
    if scales[0] == scales[1]:
        return None
    return "off" if here is None else "on" if there is None else "other"


# --- the scaled norm --------------------------------------------------------------------------------


def scale_parameter(
    parameter: torch.Tensor, scale: float | torch.Tensor, one_plus_weight: bool = False
) -> torch.Tensor:
    """What a norm must read in place of `parameter` so that its output is multiplied by `scale`.

    Args:
        parameter: weight or bias of the norm, shape (D,).
        scale: the factor, a number or a tensor of shape () in double precision; the same bits come out.
        one_plus_weight: the norm multiplies by `1 + parameter`: `s * (1 + w) = 1 + (s * w + s - 1)`.

    Returns:
        Shape (D,), in the parameter's dtype, so that writing it into the parameter changes no bit of the output.
    """
    if not one_plus_weight and not isinstance(scale, torch.Tensor):
        return parameter * scale
    # One rounding at the end: in bfloat16, s * w and + (s - 1) would round twice, and a tensor would be rounded first.
    wide = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
    if isinstance(scale, torch.Tensor) and scale.device.type != "cpu":
        scale = scale.to(parameter.device)  # the replicas of nn.DataParallel share the first one's
    return (wide * scale + (scale - 1.0) if one_plus_weight else wide * scale).to(parameter.dtype)


def unscale_parameter(scaled: torch.Tensor, scale: float, one_plus_weight: bool = False) -> torch.Tensor:
    """The inverse of `scale_parameter`: of the numbers next to the quotient, the one whose product is `scaled` again.

    Every result of `scale_parameter` is met exactly; a weight trained on after folding to the nearest number.
    """
    # Undo the arithmetic that was done, with the factor and the summand as they were rounded.
    arithmetic = torch.promote_types(scaled.dtype, torch.float32)
    factor, summand = (torch.tensor(x, dtype=arithmetic).double().item() for x in (scale, scale - 1.0))
    wide = scaled.double()
    candidate = ((wide - summand if one_plus_weight else wide) / factor).to(scaled.dtype)
    best, error = candidate, torch.full_like(wide, math.inf)
    for towards in (None, math.inf, math.inf, -math.inf, -math.inf, -math.inf, -math.inf):  # two up, then two below
        if towards is not None:
            candidate = torch.nextafter(candidate, torch.full_like(candidate, towards))
        distance = (scale_parameter(candidate, scale, one_plus_weight).double() - wide).abs()
        best, error = torch.where(distance < error, candidate, best), torch.minimum(distance, error)
    return best


class _ScaledView:
    """What the forward of a scaled norm gets as `self`: the norm, with its parameters read as scaled."""

    def __init__(self, norm: _ScaledNorm) -> None:
        self._scaled_norm = norm

    def __getattr__(self, name: str) -> Any:
        norm = self._scaled_norm
        value = getattr(norm, name)
        if name in ("weight", "bias") and value is not None:
            return scale_parameter(value, norm.ln_scale, norm._one_plus_weight and name == "weight")
        if isinstance(value, MethodType) and value.__self__ is norm:  # it may read the weight too
            return functools.partial(value.__func__, self)
        return value


class _ScaledNorm(nn.Module):
    """Base of the classes that `_scaled_class` makes. `ln_scale` is an attribute of the instance.

    It is a number, which `torch.compile` takes for a constant; in a warmup a tensor of shape () that is written in
    place, so that nothing is compiled anew. Not a buffer: that would be cast with the model, and come from the meta
    device without a value. A backward pass that would see another scale than its forward fails: autograd counts writes.
    """

    ln_scale: float | torch.Tensor
    _unscaled_class: type[nn.Module]
    _one_plus_weight: bool
    # The function that a kernel library bound to this instance in place of the class's forward.
    _bound_forward: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if "forward" in vars(self):
            self._adopt_bound_forward()
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = self._bound_forward or self._unscaled_class.forward
        return forward(_ScaledView(self), *args, **kwargs)

    def _adopt_bound_forward(self) -> None:
        """Liger and `use_kernels` bind a forward to the instance; on its own, it would read the unscaled weight."""
        bound = vars(self)["forward"]
        if isinstance(bound, MethodType) and bound.__self__ is self:
            del vars(self)["forward"]
            if bound.__func__ is not type(self).forward:
                vars(self)["_bound_forward"] = bound.__func__
        elif getattr(inspect.unwrap(bound), "__func__", None) is not type(self).forward:
            raise RuntimeError(
                f"ln_scaling: {bound!r} was set as the forward of a scaled {type(self).__name__}, and whether it reads "
                "the scaled weight cannot be known. Bind it as a method, types.MethodType(function, norm), or fold the "
                "scale first: hf_lnscale.fold_ln_scaling(model)"
            )

    def extra_repr(self) -> str:
        return f"{self._unscaled_class.extra_repr(self)}, ln_scale={float(self.ln_scale):.4g}".removeprefix(", ")

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so pickle is told how to make it again.
        return _new_scaled_norm, (self._unscaled_class, self._one_plus_weight), vars(self).copy()


_classes: dict[tuple[type[nn.Module], bool], type[_ScaledNorm]] = {}


def _scaled_class(base: type[nn.Module], one_plus_weight: bool) -> type[_ScaledNorm]:
    """The subclass of a norm's class whose forward reads the parameters as scaled."""
    if (key := (base, one_plus_weight)) not in _classes:
        body = {"_unscaled_class": base, "_one_plus_weight": one_plus_weight, "__module__": base.__module__}
        # Same name: libraries tell norms by it, transformers' own weight initialization among them.
        _classes.setdefault(key, type(base.__name__, (_ScaledNorm, base), body))
    return _classes[key]


def _new_scaled_norm(base: type[nn.Module], one_plus_weight: bool) -> _ScaledNorm:
    cls = _scaled_class(base, one_plus_weight)
    return cls.__new__(cls)


def _scale_norm(norm: nn.Module, scale: float, one_plus_weight: bool, warming_up: bool) -> None:
    if not isinstance(norm, _ScaledNorm):
        norm.__class__ = _scaled_class(type(norm), one_plus_weight)
    if warming_up:
        _write_scale(norm, scale)
    else:
        vars(norm)["ln_scale"] = scale


def _write_scale(norm: nn.Module, scale: float) -> None:
    """Sets the scale of a norm in a warmup, in place unless the norm has moved to another device."""
    device, held = norm._parameters["weight"].device, vars(norm).get("ln_scale")  # type: ignore[union-attr]
    # Every device takes a tensor of shape () from the CPU, where it stays without weights or double precision.
    device = torch.device("cpu") if device.type in ("meta", "mps") else device
    if isinstance(held, torch.Tensor) and held.device == device:
        held.fill_(scale)
    else:
        vars(norm)["ln_scale"] = torch.tensor(scale, dtype=torch.float64, device=device)


def _unscale_norm(norm: nn.Module) -> None:
    if not isinstance(norm, _ScaledNorm):
        return
    bound = norm._bound_forward
    norm.__class__ = norm._unscaled_class  # type: ignore[assignment]
    del norm.ln_scale
    if bound is not None:
        del vars(norm)["_bound_forward"]
        vars(norm)["forward"] = MethodType(bound, norm)


# --- models -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stack:
    """A text decoder inside a model: its module (`LlamaModel`), its layers, its row of the table."""

    model: PreTrainedModel
    layers: nn.ModuleList
    family: Family

    @property
    def norms(self) -> list[tuple[int, nn.Module]]:
        """Every pre-norm with the position of its layer.

        Raises:
            UnsupportedArchitectureError: if a layer lacks one, or one has no weight.
        """
        found = []
        for position, layer in enumerate(self.layers):
            for path in self.family.pre_norms:
                norm = submodule(layer, path)
                if norm is None or norm._parameters.get("weight") is None:
                    what = "is missing" if norm is None else f"({type(norm).__name__}) has no weight"
                    if hasattr(norm, "modules_to_save"):
                        what = "is wrapped by an adapter that trains it in full (merge the adapter first)"
                    raise UnsupportedArchitectureError(
                        f"ln_scaling: the pre-norm {path!r} of layer {position} {what} in {type(layer).__name__} "
                        f"(model_type {self.model.config.model_type!r}); see hf_lnscale.register_family"
                    )
                if set(norm._parameters) - {"weight", "bias"}:
                    raise UnsupportedArchitectureError(
                        f"ln_scaling: the norm {path!r} of {type(layer).__name__} has parameters "
                        f"{sorted(norm._parameters)}; only weight and bias are known to be linear in its output"
                    )
                found.append((position, norm))
        return found


def own_stack(module: nn.Module) -> Stack | None:
    """The stack whose layers `module` itself holds (a `LlamaModel`, not the `LlamaForCausalLM` around it)."""
    if not isinstance(module, PreTrainedModel):
        return None
    family = FAMILIES.get(module.config.model_type)
    if family is None:
        return None
    layers = submodule(module, family.layers)
    return Stack(module, layers, family) if isinstance(layers, nn.ModuleList) else None


def text_stack(model: nn.Module) -> Stack:
    """The text decoder of a model, however it is wrapped (a head, a vision model, PEFT, DDP).

    Raises:
        UnsupportedArchitectureError: if there is none of a known family.
        ValueError: if there is more than one.
    """
    stacks = [stack for module in model.modules() if (stack := own_stack(module))]
    if len(stacks) > 1:
        kinds = [type(stack.model).__name__ for stack in stacks]
        raise ValueError(f"model holds {len(stacks)} text decoders ({', '.join(kinds)}); pass the one that is meant")
    if stacks:
        return stacks[0]
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            family_of(module.config)
    raise UnsupportedArchitectureError(f"no decoder of a known family found in {type(model).__name__}")


def apply_from_config(model: PreTrainedModel) -> None:
    """Scales the norms that `model` itself holds as its configuration says; called once a model is constructed."""
    value = get_ln_scaling(model.config)
    if value is None:
        return
    stack = own_stack(model)
    if stack is None:
        # A head or a vision model. The decoder inside was scaled when it was constructed; once more does no harm, and
        # reaches layers that the head has put in since.
        inside = [stack for module in model.modules() if (stack := own_stack(module))]
        for stack in inside:
            if scaling := get_ln_scaling(stack.model.config):
                _apply(stack, LNScalingConfig(**scaling))
        if text_config(model.config) is model.config and not inside:
            raise UnsupportedArchitectureError(
                f"ln_scaling: {type(model).__name__} has no decoder layers at {family_of(model.config).layers!r}"
            )
        return
    _apply(stack, LNScalingConfig(**value))


def _apply(stack: Stack, scaling: LNScalingConfig) -> None:
    scaling = scaling.for_layers(len(stack.layers))
    scales = scaling.scales(len(stack.layers))
    norms = stack.norms
    _require_free(norms)
    for position, norm in norms:
        _scale_norm(norm, scales[position], stack.family.one_plus_weight, scaling.warming_up)
    vars(stack.model.config)[ACTIVE] = _Stored(scaling.to_dict())


def _configs(model: nn.Module, stack: Stack) -> list[dict[str, Any]]:
    """The attributes of every configuration in `model` that speaks of the stack; most often all are one object."""
    configs = [text_config(module.config) for module in model.modules() if isinstance(module, PreTrainedModel)]
    return [vars(config) for config in configs if config.model_type == stack.model.config.model_type]


def apply_ln_scaling(model: nn.Module, ln_scaling: Any = True) -> nn.Module:
    """Switches LayerNorm Scaling on in a model in memory, in place.

    Multiplies the output of the norm in front of attention and of the norm in front of the MLP of each layer by
    `depth ** -exponent` (arXiv 2502.05795, equation 8). Parameters, their names and gradients' owners stay; a model
    that was trained without the scale gives other, at first useless, outputs.

    Args:
        model: a transformers model, or one wrapped by PEFT or DDP.
        ln_scaling: True, False (as `remove_ln_scaling`), a dict or an `LNScalingConfig`. Replaces a scaling that is
            active, but for True, which keeps it.

    Returns:
        The same model.

    Raises:
        ValueError: for a wrong value, or if the scale is folded into the weights already.
        UnsupportedArchitectureError: if the model's family is not in the table.
    """
    if LNScalingConfig.of(ln_scaling) is None:
        return remove_ln_scaling(model)
    stack = text_stack(model)
    config = stack.model.config
    before = get_ln_scaling(config)
    set_ln_scaling(config, ln_scaling)
    try:
        _apply(stack, LNScalingConfig(**vars(config)[ACTIVE]))
    except ValueError:
        vars(config).pop(ACTIVE)
        if before:
            vars(config)[ACTIVE] = before
        raise
    for attributes in _configs(model, stack):
        attributes[ACTIVE] = vars(config)[ACTIVE]
    return model


def remove_ln_scaling(model: nn.Module) -> nn.Module:
    """Switches LayerNorm Scaling off in a model in memory, in place: the norms get their own class back.

    The outputs change. To keep them, and lose the need for this plugin, use `fold_ln_scaling`.

    Returns:
        The same model. One that has no scale comes back as it is.

    Raises:
        UnsupportedArchitectureError: if the model's family is not in the table.
    """
    stack = text_stack(model)
    _require_free(stack.norms)
    for _, norm in stack.norms:
        _unscale_norm(norm)
    for attributes in _configs(model, stack):
        attributes.pop(ACTIVE, None)
    return model


def set_ln_scaling_step(model: nn.Module, step: int) -> nn.Module:
    """Moves the warmup of a model's scale to where it stands after `step` optimizer steps, in place.

    For training loops of one's own, after each optimizer step; `LNScalingWarmupCallback` does it in a Trainer. Works on
    a model that is wrapped, sharded or compiled, and compiles nothing anew.

    Args:
        model: a model whose `ln_scaling` has `warmup_steps`.
        step: an integer >= 0; past the end of the warmup it stays at its end.

    Returns:
        The same model.

    Raises:
        ValueError: if the model has no warmup, or for a wrong step.
        UnsupportedArchitectureError: if the model's family is not in the table.
    """
    stack = text_stack(model)
    scaling = LNScalingConfig.of(get_ln_scaling(stack.model.config))
    if scaling is None or not scaling.warmup_steps:
        raise ValueError(
            f"the model's ln_scaling is {get_ln_scaling(stack.model.config)}: there is no warmup to move. Give it one: "
            'ln_scaling={"warmup_steps": 1000}'
        )
    if not _is_integer(step) or step < 0:
        raise ValueError(f"step must be an integer >= 0, got {step!r}")
    moved = replace(scaling, step=min(step, scaling.warmup_steps))
    scales = moved.scales(len(stack.layers))
    with torch.no_grad():
        for position, norm in stack.norms:
            _write_scale(norm, scales[position])
    stored = _Stored(moved.to_dict())
    for attributes in _configs(model, stack):
        attributes[ACTIVE] = stored
    return model


def ln_scales(model: nn.Module) -> list[float]:
    """The factor that multiplies the pre-norms of each layer, as applied; 1.0 where none is.

    Returns:
        L floats, first layer first.

    Raises:
        UnsupportedArchitectureError: if the model's family is not in the table.
    """
    stack = text_stack(model)
    scales = [1.0] * len(stack.layers)
    for position, norm in stack.norms:
        scales[position] = float(getattr(norm, "ln_scale", 1.0))
    return scales


def fold_ln_scaling(model: nn.Module) -> nn.Module:
    """Puts the scale into the norm weights, in place, and takes the flag off: a plain model for any runtime.

    The product that is stored is the product that was computed, so the outputs stay the same bit for bit, in any
    dtype. The configuration keeps a note, `ln_scaling_folded`, that other programs ignore. An optimizer that holds
    these weights goes on from the new values; training a folded model is training without LayerNorm Scaling.

    Returns:
        The same model.

    Raises:
        ValueError: if no scale is active, or a norm's weight is not in memory (meta device, offloaded).
        UnsupportedArchitectureError: if the model's family is not in the table.
    """
    stack = text_stack(model)
    scaling = vars(stack.model.config).get(ACTIVE)
    if scaling is None:
        folded = vars(stack.model.config).get(FOLDED)
        raise ValueError(f"the scale is folded already: {folded}" if folded else "the model has no active ln_scaling")
    _require_weights(stack)
    with torch.no_grad():
        for _, norm in stack.norms:
            for name, parameter in norm.named_parameters(recurse=False):
                one_plus = stack.family.one_plus_weight and name == "weight"
                parameter.copy_(scale_parameter(parameter, float(norm.ln_scale), one_plus))  # type: ignore[arg-type]
            _unscale_norm(norm)
    for attributes in _configs(model, stack):
        attributes.pop(ACTIVE, None)
        attributes[FOLDED] = scaling
    return model


def unfold_ln_scaling(model: nn.Module) -> nn.Module:
    """Takes a folded scale out of the norm weights again, in place, and switches the flag on: for more training.

    Returns:
        The same model, with the same outputs: bit for bit, unless the norm weights were trained while folded, which
        can leave a difference in the last bit of a weight.

    Raises:
        ValueError: if nothing is folded, or a norm's weight is not in memory (meta device, offloaded).
        UnsupportedArchitectureError: if the model's family is not in the table.
    """
    stack = text_stack(model)
    folded = vars(stack.model.config).get(FOLDED)
    if folded is None:
        raise ValueError(f"there is nothing to unfold: no {FOLDED} in the model's config")
    _require_weights(stack)
    scaling = LNScalingConfig.of(folded)
    assert scaling is not None
    scales = scaling.scales(len(stack.layers))
    with torch.no_grad():
        for position, norm in stack.norms:
            for name, parameter in norm.named_parameters(recurse=False):
                one_plus = stack.family.one_plus_weight and name == "weight"
                parameter.copy_(unscale_parameter(parameter, scales[position], one_plus))
    for attributes in _configs(model, stack):
        attributes.pop(FOLDED, None)
    return apply_ln_scaling(model, scaling)


def require_consistent(model: nn.Module) -> None:
    """Refuses a model whose norms are scaled otherwise than its configuration says; called before it is saved.

    Raises:
        ValueError: if the two differ; the message says how that comes about.
    """
    for module in model.modules():
        stack = own_stack(module)
        if stack is None:
            continue
        scaling = LNScalingConfig.of(get_ln_scaling(stack.model.config))
        dropped, number = vars(stack.model.config).get(DROPPED), stack.model.config.num_hidden_layers
        if dropped and number != len(stack.layers):
            raise ValueError(
                f"this {type(module).__name__} has {len(stack.layers)} layers, its config says {number}, with "
                f"{dropped['layers']} dropped: drop_layers was assigned to the configuration of a model that is built "
                "already (use hf_lnscale.drop_layers(model, layers))"
            )
        said = scaling.scales(len(stack.layers)) if scaling else [1.0] * len(stack.layers)
        applied = [
            {float(norm.ln_scale) for norm in layer.modules() if isinstance(norm, _ScaledNorm)} or {1.0}
            for layer in stack.layers
        ]
        if applied != [{scale} for scale in said]:
            raise ValueError(
                f"the norms of this {type(module).__name__} are scaled by {[max(scales) for scales in applied]}, its "
                f"config says {said}. Either config.ln_scaling was changed after the model was built (use "
                "hf_lnscale.apply_ln_scaling), or two models share one config object (build each from its own: "
                "copy.deepcopy(config))."
            )


def _require_free(norms: list[tuple[int, nn.Module]]) -> None:
    """Refuses norms that something else holds on to, before the first is changed."""
    for position, norm in norms:
        if isinstance(norm, _ScaledNorm) and type(norm) not in _classes.values():
            raise ValueError(
                f"a norm of layer {position} was wrapped as {type(norm).__name__} after it was scaled; change the "
                "scale before the model is sharded"
            )
        if "_hf_hook" in vars(norm):
            raise ValueError(
                f"a norm of layer {position} has a hook of accelerate's, as the model was spread over devices or "
                "offloaded; change the scale before that, or fold on disk: hf-lnscale export SRC --out DST"
            )


def _require_weights(stack: Stack) -> None:
    _require_free(stack.norms)
    for position, norm in stack.norms:
        for parameter in norm.parameters(recurse=False):
            if parameter.is_meta or not parameter.numel():  # DeepSpeed's ZeRO-3 leaves parameters without elements
                raise ValueError(
                    f"the norm weights of layer {position} are not in memory (meta device, offloaded or partitioned); "
                    "load the model without that, or fold it on disk: hf-lnscale export SRC --out DST"
                )
