"""LayerNorm Scaling on a model in memory: apply, remove, fold and unfold it, and step its warmup."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .config import LNScalingConfig, is_integer
from .families import UnsupportedArchitectureError, family_of, text_config
from .norm import ScaledNorm, scale_norm, scale_parameter, scaled_classes, unscale_norm, unscale_parameter, write_scale
from .record import FOLDED, get_ln_scaling, record, require_valid, set_ln_scaling, write
from .stack import Stack, own_stack, pretrained_modules, text_stack
from .sublayers import missing, take_out

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def apply_from_config(model: PreTrainedModel) -> None:
    """Applies the configuration to a model that has just been constructed: drops sub-layers and scales norms."""
    found = record(model.config)
    if not found.needs_plugin:
        return
    # A decoder nested in a head or vision model was already handled by its own constructor. Doing it again is
    # harmless and covers layers that the outer model has replaced since.
    stacks = [stack for module in pretrained_modules(model) if (stack := own_stack(module))]
    for stack in stacks:
        own = record(stack.model.config)
        for kind, positions in own.sublayers.items():
            if positions[-1] >= len(stack.layers):
                require_valid(stack.model.config)  # num_hidden_layers was changed
            for position in positions:
                if kind not in missing(stack.layers[position], stack.family):
                    take_out(stack.layers[position], stack.family, kind, position)
        if own.active:
            _apply(stack, own.active)
    if text_config(model.config) is model.config and not stacks:
        flag = "ln_scaling" if found.active else "drop_layers"
        raise UnsupportedArchitectureError(
            f"{flag}: {type(model).__name__} has no decoder layers at {family_of(model.config, flag).layers!r}"
        )


def _apply(stack: Stack, scaling: LNScalingConfig) -> None:
    scaling = scaling.for_layers(len(stack.layers))
    scales, norms = scaling.scales(len(stack.layers)), stack.norms
    _require_free(norms)
    for position, norm in norms:
        scale_norm(norm, scales[position], stack.family.one_plus_weight, scaling.warming_up)
    write(stack.model.config, replace(record(stack.model.config), active=scaling))


def _write(model: nn.Module, stack: Stack, **changes: Any) -> None:
    """Updates the record in every configuration in `model` that describes the stack (usually one shared object)."""
    new = replace(record(stack.model.config), **changes)
    for module in pretrained_modules(model):
        config = text_config(module.config)
        if config.model_type == stack.model.config.model_type:
            write(config, new)


def apply_ln_scaling(model: nn.Module, ln_scaling: Any = True) -> nn.Module:
    """Enables LayerNorm Scaling on a model in memory, in place, and returns the model.

    Multiplies the outputs of the attention and MLP pre-norms of each layer by `depth ** -exponent` (arXiv 2502.05795,
    equation 8). Parameters and their names do not change. A model trained without the scale gives useless outputs at
    first.

    Args:
        model: a transformers model, or one wrapped by PEFT or DDP.
        ln_scaling: True, False (same as `remove_ln_scaling`), a dict or an `LNScalingConfig`. True keeps a scaling
            that is already active; any other value replaces it.

    Raises:
        ValueError: if the value is invalid, or the scale is already folded into the weights.
        UnsupportedArchitectureError: if the model's family is not in the table.
    """
    if LNScalingConfig.of(ln_scaling) is None:
        return remove_ln_scaling(model)
    stack = text_stack(model)
    config = stack.model.config
    before = record(config)
    set_ln_scaling(config, ln_scaling)
    scaling = record(config).active
    assert scaling is not None
    try:
        _apply(stack, scaling)
    except ValueError:
        write(config, before)
        raise
    _write(model, stack)
    return model


def remove_ln_scaling(model: nn.Module) -> nn.Module:
    """Disables LayerNorm Scaling on a model in memory, in place, restores the class of each norm, returns the model.

    This changes the outputs, if there is a scale. `fold_ln_scaling` gives a plain model with the same outputs.

    Raises:
        UnsupportedArchitectureError: if the model's family is not in the table.
    """
    stack = text_stack(model)
    _require_free(stack.norms)
    for _, norm in stack.norms:
        unscale_norm(norm)
    _write(model, stack, active=None)
    return model


def set_ln_scaling_step(model: nn.Module, step: int) -> nn.Module:
    """Sets the warmup of a model's scale to its state after `step` optimizer steps, in place, and returns the model.

    Call it after each optimizer step of a custom training loop; in a Trainer, `LNScalingWarmupCallback` does so. Works
    on wrapped, sharded and compiled models, without recompiling.

    Args:
        model: a model whose `ln_scaling` has `warmup_steps`.
        step: an integer >= 0; values beyond `warmup_steps` are clamped.

    Raises:
        ValueError: if the model has no warmup, or `step` is invalid.
        UnsupportedArchitectureError: if the model's family is not in the table.
    """
    stack = text_stack(model)
    scaling = record(stack.model.config).active
    if scaling is None or not scaling.warmup_steps:
        raise ValueError(
            f"the model's ln_scaling is {get_ln_scaling(stack.model.config)}, which has no warmup. Add one, for "
            'example ln_scaling={"warmup_steps": 1000}'
        )
    if not is_integer(step) or step < 0:
        raise ValueError(f"step must be an integer >= 0, got {step!r}")
    moved = replace(scaling, step=min(step, scaling.warmup_steps))
    scales = moved.scales(len(stack.layers))
    with torch.no_grad():
        for position, norm in stack.norms:
            write_scale(norm, scales[position])
    _write(model, stack, active=moved)
    return model


def ln_scales(model: nn.Module) -> list[float]:
    """The scale applied to the pre-norms of each layer; 1.0 for layers without one.

    Returns:
        L floats, one per layer, from the first layer to the last.

    Raises:
        UnsupportedArchitectureError: if the model's family is not in the table.
    """
    stack = text_stack(model)
    family_of(stack.model.config)
    return [max(scales) for scales in _applied(stack)]


def _applied(stack: Stack) -> list[set[float]]:
    """The distinct scales in each layer, including those of norms copied by an adapter; {1.0} if there are none."""
    return [
        {float(norm.ln_scale) for norm in layer.modules() if isinstance(norm, ScaledNorm)} or {1.0}
        for layer in stack.layers
    ]


def fold_ln_scaling(model: nn.Module) -> nn.Module:
    """Folds the scale into the norm weights, in place, and returns the model: a plain one, for any runtime.

    The stored product is exactly the one the forward computed, so outputs are bit-identical in any dtype. The
    configuration keeps a key, `ln_scaling_folded`, that other programs ignore. An optimizer that holds these weights
    continues from the new values. Training a folded model is training without LayerNorm Scaling.

    Raises:
        ValueError: if no scale is active, or a norm's weight is not in memory (meta device, offloaded).
        UnsupportedArchitectureError: if the model's family is not in the table.
    """
    stack = text_stack(model)
    norms, found = stack.norms, record(stack.model.config)
    if found.active is None:
        folded = found.folded and found.folded.to_dict()
        raise ValueError(f"the scale is already folded: {folded}" if folded else "the model has no active ln_scaling")
    _change_weights(stack, scale_parameter, [float(norm.ln_scale) for _, norm in norms])  # type: ignore[arg-type]
    for _, norm in norms:
        unscale_norm(norm)
    _write(model, stack, active=None, folded=found.active)
    return model


def unfold_ln_scaling(model: nn.Module) -> nn.Module:
    """Reverses `fold_ln_scaling`, in place, so that training with the scale can continue, and returns the model.

    Its outputs are bit-identical unless the norm weights were trained while folded, in which case a weight may differ
    in its last bit.

    Raises:
        ValueError: if nothing is folded, or a norm's weight is not in memory (meta device, offloaded).
        UnsupportedArchitectureError: if the model's family is not in the table.
    """
    stack = text_stack(model)
    folded = record(stack.model.config).folded
    if folded is None:
        raise ValueError(f"nothing to unfold: the model's config has no {FOLDED}")
    scales = folded.scales(len(stack.layers))
    _change_weights(stack, unscale_parameter, [scales[position] for position, _ in stack.norms])
    _write(model, stack, folded=None)
    return apply_ln_scaling(model, folded)


def require_consistent(model: nn.Module) -> None:
    """Refuses, before saving, a model that does not match its configuration; the message names the likely cause."""
    for module in pretrained_modules(model):
        if (stack := own_stack(module)) and (problem := _inconsistency(stack)):
            raise ValueError(f"this {type(module).__name__} {problem}")


def _inconsistency(stack: Stack) -> str:
    config, number = stack.model.config, len(stack.layers)
    found = record(config)
    if found.dropped and config.num_hidden_layers != number:
        return (
            f"has {number} layers, but its config says {config.num_hidden_layers}, with {list(found.dropped.layers)} "
            "dropped: drop_layers was set on the config after the model was built (use "
            "hf_lnscale.drop_layers(model, layers))"
        )
    absent = [(kind, position) for position, layer in enumerate(stack.layers) for kind in missing(layer, stack.family)]
    lacking = {kind: [position for other, position in absent if other == kind] for kind, _ in absent}
    if lacking != found.sublayers:
        return (
            f"lacks sub-layers of layers {lacking}, but its config says {found.sublayers}: the config was changed "
            "after the model was built (use hf_lnscale.drop_layers(model, attention=..., mlp=...)), or two models "
            "share one config object"
        )
    expected, applied = found.active.scales(number) if found.active else [1.0] * number, _applied(stack)
    if applied != [{scale} for scale in expected]:
        return (
            f"has norms scaled by {[max(scales) for scales in applied]}, but its config says {expected}. Either "
            "config.ln_scaling was changed after the model was built (use hf_lnscale.apply_ln_scaling), or two models "
            "share one config object (build each from its own: copy.deepcopy(config))."
        )
    # A copy whose weights are never updated, such as a reference model, is correct at the step it was copied at.
    left_behind = any(isinstance(norm, ScaledNorm) and norm.left_behind for norm in stack.model.modules())
    if left_behind and any(parameter._version for parameter in stack.model.parameters()):
        return (
            f"is a copy whose weights were averaged or trained while its ln_scaling warmup stayed at step "
            f"{found.active and found.active.step} and the original's advanced. Set it to the step that its weights "
            "belong to: hf_lnscale.set_ln_scaling_step(copy, step)"
        )
    return ""


def _require_free(norms: list[tuple[int, nn.Module]]) -> None:
    """Refuses, before any norm is changed, norms that FSDP or accelerate has already wrapped."""
    for position, norm in norms:
        if isinstance(norm, ScaledNorm) and type(norm) not in scaled_classes.values():
            raise ValueError(
                f"a norm of layer {position} was wrapped as {type(norm).__name__} after it was scaled; change the "
                "scale before the model is sharded"
            )
        if "_hf_hook" in vars(norm):
            raise ValueError(
                f"a norm of layer {position} has an accelerate hook because the model was dispatched over devices or "
                "offloaded; change the scale before that, or fold on disk: hf-lnscale export SRC --out DST"
            )


def _change_weights(stack: Stack, change: Callable[..., torch.Tensor], scales: list[float]) -> None:
    """Replaces each parameter of the pre-norms by `change(parameter, scale of the norm, one_plus_weight)`."""
    norms = stack.norms
    _require_free(norms)
    for position, norm in norms:
        for parameter in norm.parameters(recurse=False):
            if parameter.is_meta or not parameter.numel():  # DeepSpeed ZeRO-3 leaves empty parameters
                raise ValueError(
                    f"the norm weights of layer {position} are not in memory (meta device, offloaded or partitioned); "
                    "load the whole model into memory, or fold it on disk: hf-lnscale export SRC --out DST"
                )
    with torch.no_grad():
        for (_, norm), scale in zip(norms, scales, strict=True):
            for name, parameter in norm.named_parameters(recurse=False):
                parameter.copy_(change(parameter, scale, stack.family.one_plus_weight and name == "weight"))
