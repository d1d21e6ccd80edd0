"""Taking decoder layers, or parts of them, out of a model in memory.

A pruned model is a plain, smaller model of its family.
"""

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
from ..core.sublayers import parts, take_out
from .cut import Cut
from .depth_fields import prune_config


def drop_layers(model: nn.Module, layers: Any = None, *, attention: Any = None, mlp: Any = None) -> nn.Module:
    """Takes decoder layers, or the attention or the MLP of some, out of a model in memory, in place.

    The result is the model that `from_pretrained(..., drop_layers=layers, drop_attention=attention, drop_mlp=mlp)`
    loads. With LayerNorm Scaling, each layer that stays keeps the scale of its own depth.

    Args:
        model: a transformers model of a family in the table.
        layers: indices (negative ones count from the end), a `PruningPlan`, the path of one, or a number of layers. Of
            a plan that healed give `plan.layers` if the model is healed: the plan itself warns that it should be.
        attention: indices of the layers that lose their attention, with the norms that serve it alone. Like `mlp`,
            they count layers before any is taken out. A layer that loses both is taken out.
        mlp: indices of the layers that lose their MLP.

    Returns:
        The same model.

    Raises:
        ValueError: for wrong indices, all before anything is changed; for a model that carries a PEFT adapter, whose
            weights and saved form use layer numbers; for one that an optimizer holds; for one that is sharded or
            spread over devices by hooks.
        UnsupportedArchitectureError: if the family, or its configuration fields over depth, are not known, or if its
            sub-layers cannot be taken out.
    """
    stack = text_stack(model)
    cut = Cut.of(stack.model.config, layers, attention, mlp, named="{}")
    if not cut:
        return model
    require_droppable(model, stack, cut)
    _own_configs(model)
    for one in _configs_of(model):
        prune_config(one, cut)
    for kind in SUBLAYERS:
        for position in getattr(cut, kind):
            take_out(stack.layers[position], stack.family, kind, position)
    delete_layers(stack, cut.layers)
    return model


def delete_layers(stack: Stack, dropped: Sequence[int]) -> None:
    """Takes decoder layers out of a stack and numbers the others anew; configurations are left alone."""
    for gone in reversed(dropped):
        del stack.layers[gone]
    for position, layer in enumerate(stack.layers):
        for module in layer.modules():
            if isinstance(vars(module).get("layer_idx"), int):
                vars(module)["layer_idx"] = position


def note_text(model: nn.Module, text: KnownText) -> None:
    """Notes in a model's configuration the text that its layers were chosen or healed on."""
    for config in _configs_of(model):
        add_known_text(config, text)


def _configs_of(model: nn.Module) -> list[PreTrainedConfig]:
    """Each configuration once: several modules may hold copies of that of the text decoder, or hold it in their own."""
    configs = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    found = {id(text_config(one)): one for one in configs}.values()
    text = text_stack(model).model.config
    return [one for one in found if text_config(one).model_type == text.model_type]


def _own_configs(model: nn.Module) -> None:
    """Gives a model configurations of its own: another model may have been built from the same objects."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(held := vars(module).get("config"), PreTrainedConfig):
            vars(module)["config"] = copy.deepcopy(held, memo)


def require_droppable(model: nn.Module, stack: Stack, cut: Cut) -> None:
    """Refuses a model in memory of which these parts cannot be taken out.

    Raises:
        ValueError: see `drop_layers`.
    """
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise ValueError(
                f"drop_layers: the model carries a PEFT adapter ({name}: {type(module).__name__}), which refers to "
                "layers by number; merge it first (merge_and_unload), or drop layers before adding it"
            )
        if "_hf_hook" in vars(module) and len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            raise ValueError(
                "drop_layers: the model is spread over devices or offloaded; give drop_layers to from_pretrained"
            )
        if type(module).__name__.startswith("FSDP"):
            raise ValueError("drop_layers: the model is sharded; drop layers before that")
    gone = [stack.layers[layer] for layer in cut.layers]
    for kind in SUBLAYERS:
        gone += [one for at in getattr(cut, kind) for one in parts(stack.layers[at], stack.family, kind)]
    parameters = {id(parameter) for module in gone for parameter in module.parameters()}
    for held in gc.get_objects():
        if issubclass(type(held), torch.optim.Optimizer) and any(
            id(parameter) in parameters for group in held.param_groups for parameter in group["params"]
        ):
            raise ValueError(
                f"drop_layers: an optimizer ({type(held).__name__}) holds parameters of the layers to drop; drop "
                "layers before the optimizer is made"
            )
