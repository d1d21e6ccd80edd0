"""LayerNorm Scaling: the outputs of the norms before attention and MLP of layer l are multiplied by 1/sqrt(l).

"The Curse of Depth in Large Language Models", arXiv 2502.05795, section 4, equation 8: h_l' = Norm(h_l) / sqrt(l).

A norm's output is linear in its weight, so Norm(x; w) * s = Norm(x; w * s). Only the norm's forward sees the scaled
weight. To everything else `norm.weight` is the ordinary parameter: the optimizer, weight initialization, quantizers
that write into it, and FSDP, which looks parameters up by name. (A `weight` property that always returned the product
would pass most tests, but FSDP2 would scale twice.)
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import weakref
from types import MethodType
from typing import Any

import torch
from torch import nn


def scale_parameter(
    parameter: torch.Tensor, scale: float | torch.Tensor, one_plus_weight: bool = False
) -> torch.Tensor:
    """The value to use in place of `parameter` so that the norm's output is multiplied by `scale`.

    Args:
        parameter: weight or bias of the norm, shape (D,).
        scale: a number or a float64 tensor of shape (); both give bit-identical results.
        one_plus_weight: the norm multiplies by `1 + parameter`: `s * (1 + w) = 1 + (s * w + s - 1)`.

    Returns:
        Shape (D,), in the parameter's dtype, so that storing it in the parameter leaves the output bit-identical.
    """
    if not one_plus_weight and not isinstance(scale, torch.Tensor):
        return parameter * scale
    # Round only once, at the end: in bfloat16, s * w + (s - 1) would round twice, and a tensor scale beforehand too.
    upcast = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
    if isinstance(scale, torch.Tensor) and scale.device.type != "cpu":
        scale = scale.to(parameter.device)  # nn.DataParallel replicas share the scale of the first device
    return (upcast * scale + (scale - 1.0) if one_plus_weight else upcast * scale).to(parameter.dtype)


def unscale_parameter(scaled: torch.Tensor, scale: float, one_plus_weight: bool = False) -> torch.Tensor:
    """The inverse of `scale_parameter`: of the numbers next to the quotient, the one whose product is `scaled`.

    Exact for every result of `scale_parameter`; the nearest match for a weight that was trained after folding.
    """
    # Invert the arithmetic of `scale_parameter`, with the factor and the summand rounded as they were there.
    arithmetic = torch.promote_types(scaled.dtype, torch.float32)
    factor, summand = (torch.tensor(x, dtype=arithmetic).double().item() for x in (scale, scale - 1.0))
    upcast = scaled.double()
    candidate = ((upcast - summand if one_plus_weight else upcast) / factor).to(scaled.dtype)
    best, error = candidate, torch.full_like(upcast, math.inf)
    for towards in (None, math.inf, math.inf, -math.inf, -math.inf, -math.inf, -math.inf):  # two up, then two below
        if towards is not None:
            candidate = torch.nextafter(candidate, torch.full_like(candidate, towards))
        distance = (scale_parameter(candidate, scale, one_plus_weight).double() - upcast).abs()
        best, error = torch.where(distance < error, candidate, best), torch.minimum(distance, error)
    return best


class _ScaledView:
    """Passed as `self` to the forward of a scaled norm: the norm with its parameters scaled on access."""

    def __init__(self, norm: ScaledNorm) -> None:
        self._scaled_norm = norm

    def __getattr__(self, name: str) -> Any:
        norm = self._scaled_norm
        value = getattr(norm, name)
        if name in ("weight", "bias") and value is not None:
            return scale_parameter(value, norm.ln_scale, norm._one_plus_weight and name == "weight")
        if isinstance(value, MethodType) and value.__self__ is norm:  # the method may read the weight too
            return functools.partial(value.__func__, self)
        return value


class ScaledNorm(nn.Module):
    """Base of the classes that `_scaled_class` creates. `ln_scale` is an attribute of the instance.

    It is a number, which `torch.compile` treats as a constant, or during a warmup a tensor of shape () that is updated
    in place to avoid recompilation. It is not a buffer, which would be cast with the model and lose its value on the
    meta device. If it changes between forward and backward, backward fails, since autograd tracks in-place writes.
    """

    ln_scale: float | torch.Tensor
    _unscaled_class: type[nn.Module]
    _one_plus_weight: bool
    # The forward that a kernel library bound to this instance.
    _bound_forward: Any = None
    # The norm that this one was copied from during a warmup, until its own warmup is stepped.
    _copied_from: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if "forward" in self.__dict__:
            self._adopt_bound_forward()
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = self._bound_forward or self._unscaled_class.forward
        return forward(_ScaledView(self), *args, **kwargs)

    def _adopt_bound_forward(self) -> None:
        """Liger and `use_kernels` bind a forward to the instance; on its own it would read the unscaled weight."""
        bound = self.__dict__["forward"]
        if isinstance(bound, MethodType) and bound.__self__ is self:
            del self.__dict__["forward"]
            if bound.__func__ is not type(self).forward:
                self.__dict__["_bound_forward"] = bound.__func__
        elif getattr(inspect.unwrap(bound), "__func__", None) is not type(self).forward:
            raise RuntimeError(
                f"ln_scaling: {bound!r} was set as the forward of a scaled {type(self).__name__}, which may not read "
                "the scaled weight. Bind it as a method, types.MethodType(function, norm), or fold the scale first: "
                "hf_lnscale.fold_ln_scaling(model)"
            )

    def extra_repr(self) -> str:
        return f"{self._unscaled_class.extra_repr(self)}, ln_scale={float(self.ln_scale):.4g}".removeprefix(", ")

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is created at run time and cannot be found by name.
        state = {name: value for name, value in vars(self).items() if name != "_copied_from"}
        return _new_scaled_norm, (self._unscaled_class, self._one_plus_weight), state

    def __deepcopy__(self, memo: dict[int, Any]) -> ScaledNorm:
        made = memo[id(self)] = _new_scaled_norm(self._unscaled_class, self._one_plus_weight)
        vars(made).update(copy.deepcopy(vars(self), memo))
        if isinstance(self.ln_scale, torch.Tensor):
            vars(made)["_copied_from"] = weakref.ref(self)
        return made

    @property
    def left_behind(self) -> bool:
        """Whether this norm was copied during a warmup that has advanced since, without its own scale following."""
        source = self._copied_from and self._copied_from()
        return source is not None and float(getattr(source, "ln_scale", 1.0)) != float(self.ln_scale)


scaled_classes: dict[tuple[type[nn.Module], bool], type[ScaledNorm]] = {}


def _scaled_class(base: type[nn.Module], one_plus_weight: bool) -> type[ScaledNorm]:
    """The subclass of a norm's class whose forward reads scaled parameters."""
    if (key := (base, one_plus_weight)) not in scaled_classes:
        body = {"_unscaled_class": base, "_one_plus_weight": one_plus_weight, "__module__": base.__module__}
        # The name stays: libraries recognize norms by it, including transformers' weight initialization.
        scaled_classes.setdefault(key, type(base.__name__, (ScaledNorm, base), body))
    return scaled_classes[key]


def _new_scaled_norm(base: type[nn.Module], one_plus_weight: bool) -> ScaledNorm:
    cls = _scaled_class(base, one_plus_weight)
    return cls.__new__(cls)


def scale_norm(norm: nn.Module, scale: float, one_plus_weight: bool, warming_up: bool) -> None:
    if not isinstance(norm, ScaledNorm):
        norm.__class__ = _scaled_class(type(norm), one_plus_weight)
    if warming_up:
        write_scale(norm, scale)
    else:
        vars(norm)["ln_scale"] = scale


def write_scale(norm: nn.Module, scale: float) -> None:
    """Sets the scale of a norm during a warmup, in place unless the norm has moved to another device."""
    vars(norm).pop("_copied_from", None)
    device, current = norm._parameters["weight"].device, vars(norm).get("ln_scale")  # type: ignore[union-attr]
    # "meta" has no values and "mps" no float64; a CPU tensor of shape () works with weights on any device.
    device = torch.device("cpu") if device.type in ("meta", "mps") else device
    if isinstance(current, torch.Tensor) and current.device == device:
        current.fill_(scale)
    else:
        vars(norm)["ln_scale"] = torch.tensor(scale, dtype=torch.float64, device=device)


def unscale_norm(norm: nn.Module) -> None:
    if not isinstance(norm, ScaledNorm):
        return
    bound = norm._bound_forward
    norm.__class__ = norm._unscaled_class  # type: ignore[assignment]
    del norm.ln_scale
    if bound is not None:
        del vars(norm)["_bound_forward"]
        vars(norm)["forward"] = MethodType(bound, norm)
