"""The text decoder inside a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from .families import FAMILIES, Family, UnsupportedArchitectureError, family_of, submodule
from .sublayers import AbsentNorm

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Stack:
    """A text decoder inside a model: its module (such as `LlamaModel`), its layers and its row of the table."""

    model: PreTrainedModel
    layers: nn.ModuleList
    family: Family

    @property
    def norms(self) -> list[tuple[int, nn.Module]]:
        """Every pre-norm with the position of its layer, except those of missing sub-layers; all can be scaled."""
        family_of(self.model.config)
        found = []
        for position, layer in enumerate(self.layers):
            for path in self.family.pre_norms:
                norm = submodule(layer, path)
                if isinstance(norm, AbsentNorm):
                    continue
                if problem := _problem(norm, layer):
                    what = f"the pre-norm {path!r} of layer {position}"
                    raise UnsupportedArchitectureError(f"ln_scaling: {what} {problem}")
                found.append((position, norm))
        return found


def _problem(norm: nn.Module | None, layer: nn.Module) -> str:
    """Why a pre-norm of a layer cannot be scaled; "" if it can."""
    kind, where = type(norm).__name__, f"in {type(layer).__name__}; see hf_lnscale.register_family"
    if norm is None:
        return f"is missing {where}"
    if norm._parameters.get("weight") is None:
        if type(norm).__module__.partition(".")[0] != "peft":
            return f"({kind}) has no weight {where}"
        return (
            f"is wrapped by a PEFT adapter ({kind}), which trains a copy of it. Merge or unload the adapter first "
            "(model.merge_and_unload(), model.unload()), or change the scale before adding it"
        )
    if set(norm._parameters) - {"weight", "bias"}:
        return f"({kind}) has parameters other than weight and bias, in which its output may not be linear, {where}"
    return ""


def pretrained_modules(model: nn.Module) -> list[PreTrainedModel]:
    """The modules of a model that are `PreTrainedModel`s, outermost first."""
    # Imported here because importing it installs the hooks, which import this file.
    from transformers import PreTrainedModel

    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def base_config(model: nn.Module) -> PreTrainedConfig | None:
    """The configuration of a model, which may be wrapped; None if it is not one of transformers."""
    return next((module.config for module in pretrained_modules(model)), None)


def own_stack(module: PreTrainedModel) -> Stack | None:
    """The stack whose layers `module` itself holds (a `LlamaModel`, not the `LlamaForCausalLM` around it)."""
    family = FAMILIES.get(module.config.model_type)
    if family is None:
        return None
    layers = submodule(module, family.layers)
    return Stack(module, layers, family) if isinstance(layers, nn.ModuleList) else None


def text_stack(model: nn.Module) -> Stack:
    """The only text decoder of a model, which may be wrapped (a head, a vision model, PEFT, DDP)."""
    modules = pretrained_modules(model)
    stacks = [stack for module in modules if (stack := own_stack(module))]
    if len(stacks) > 1:
        kinds = [type(stack.model).__name__ for stack in stacks]
        raise ValueError(f"model holds {len(stacks)} text decoders ({', '.join(kinds)}); pass the one to use")
    if stacks:
        return stacks[0]
    for module in modules:
        family_of(module.config)
    raise UnsupportedArchitectureError(f"no decoder of a known family found in {type(model).__name__}")
