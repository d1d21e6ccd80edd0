"""Drops decoder layers, or parts of them, from a model in memory."""

from __future__ import annotations

import copy
import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..core.families import text_config
from ..core.record import SUBLAYERS, KnownText, add_known_text
from ..core.stack import Stack, text_stack
from ..core.sublayers import Unit, parts, take_out
from .cut import Cut
from .depth_fields import prune_config
from .plan import units_of


def drop_layers(model: nn.Module, layers: Any = None, *, attention: Any = None, mlp: Any = None) -> nn.Module:
    """Drops decoder layers, or their attention or MLP, from a model in memory, in place.

    The result is the same model that `from_pretrained(..., drop_layers=layers, drop_attention=attention,
    drop_mlp=mlp)` loads. With LayerNorm Scaling, each remaining layer keeps the scale of its own depth.

    Args:
        model: a transformers model of a family in the table.
        layers: indices (negative ones count from the end), a `PruningPlan`, the path of one, or a number of layers. If
            the model is already healed, pass `plan.layers`, since a plan with healing warns that the model should be.
        attention, mlp: indices, before any layer is dropped, of layers that lose their attention or MLP and the norms
            used only by it. A layer that loses both is dropped.

    Returns:
        The same model.

    Raises:
        ValueError: before anything is changed, if an index is invalid, the model has a PEFT adapter (which refers to
            layers by index), an optimizer holds its parameters, or it is sharded or spread over devices by hooks.
        UnsupportedArchitectureError: if the family or its per-layer configuration fields are unknown, or its sub-layers
            cannot be dropped.
    """
    stack = text_stack(model)
    cut = Cut.of(stack.model.config, layers, attention, mlp, named="{}")
    if not cut:
        return model
    require_droppable(model, stack, cut)
    _own_configs(model)
    for config in _configs_of(model):
        prune_config(config, cut)
    for kind in SUBLAYERS:
        for position in getattr(cut, kind):
            take_out(stack.layers[position], stack.family, kind, position)
    delete_layers(stack, cut.layers)
    return model


def delete_layers(stack: Stack, dropped: Sequence[int]) -> None:
    """Deletes decoder layers from a stack and renumbers the others; does not change configurations."""
    for position in reversed(dropped):
        del stack.layers[position]
    for position, layer in enumerate(stack.layers):
        for module in layer.modules():
            if isinstance(vars(module).get("layer_idx"), int):
                vars(module)["layer_idx"] = position


def modules_of(stack: Stack, unit: Unit) -> list[nn.Module]:
    """The modules that are removed with a layer, attention or MLP."""
    if isinstance(unit, int):
        return [stack.layers[unit]]
    return parts(stack.layers[unit[1]], stack.family, unit[0])


def note_text(model: nn.Module, text: KnownText) -> None:
    """Records in a model's configuration the text used to choose or heal its layers."""
    for config in _configs_of(model):
        add_known_text(config, text)


def _configs_of(model: nn.Module) -> list[PreTrainedConfig]:
    """All configurations that describe the text decoder, since several modules may hold copies. Each only once."""
    configs = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    distinct = {id(text_config(config)): config for config in configs}.values()
    text = text_stack(model).model.config
    return [config for config in distinct if text_config(config).model_type == text.model_type]


def _own_configs(model: nn.Module) -> None:
    """Copies a model's configurations, since other models may share the same objects."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(config := vars(module).get("config"), PreTrainedConfig):
            vars(module)["config"] = copy.deepcopy(config, memo)


def require_droppable(model: nn.Module, stack: Stack, cut: Cut) -> None:
    """Refuses a model in memory from which these parts cannot be dropped; see `drop_layers`."""
    for name, module in model.named_modules():
        problem, kind = "", type(module).__name__
        if type(module).__module__.partition(".")[0] == "peft":
            problem = f"has a PEFT adapter ({name}: {kind}), which refers to layers by index; merge it first "
            problem += "(merge_and_unload), or drop layers before adding it"
        elif "_hf_hook" in vars(module) and len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            problem = "is spread over devices or offloaded; pass drop_layers to from_pretrained"
        elif kind.startswith("FSDP"):
            problem = "is sharded; drop layers before that"
        if problem:
            raise ValueError(f"drop_layers: the model {problem}")
    dropped = [part for unit in units_of(vars(cut)) for part in modules_of(stack, unit)]
    parameters = {id(parameter) for module in dropped for parameter in module.parameters()}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.optim.Optimizer) and any(
            id(parameter) in parameters for group in thing.param_groups for parameter in group["params"]
        ):
            problem = "holds parameters of the layers to drop; drop layers before creating the optimizer"
            raise ValueError(f"drop_layers: an optimizer ({type(thing).__name__}) {problem}")
