"""Layers without their attention or their MLP: a stand-in takes the module's place, and adds nothing to the stream.

The layer's own forward goes on around it, so that masks, indices and cache are the model's own. A norm that serves the
missing sub-layer alone hands its input on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from .families import Family, UnsupportedArchitectureError, submodule

# A layer, or the attention or the MLP of one: ("attention", 3).
Unit = int | tuple[str, int]


class AbsentNorm(nn.Identity):
    """In place of a norm of a sub-layer that is missing."""


class AbsentMLP(nn.Module):
    """In place of an MLP: returns zeros in the shape of its input."""

    def forward(self, x_BTD: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return torch.zeros_like(x_BTD)


class AbsentAttention(nn.Module):
    """In place of an attention: returns zeros in the shape of its input, and no attention weights.

    A cache finds out how many tokens it holds from some one layer, often the first. So that it may be this one, the
    tokens are counted here too: by keys of one number a token, and values of none. A cache that others have put keys
    into, such as those of PEFT's prefix tuning, gets zeros of their shape.
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        x_BTD = next(value for value in given if isinstance(value, torch.Tensor))
        if cache := next((value for value in given if isinstance(value, Cache)), None):
            held = cache.layers[self.layer_idx] if self.layer_idx < len(cache.layers) else None
            keys, values = (
                _zeros(x_BTD, getattr(held, name, None), size) for name, size in (("keys", 1), ("values", 0))
            )
            cache.update(keys, values, self.layer_idx)
        return torch.zeros_like(x_BTD), None


def _zeros(x_BTD: torch.Tensor, held: torch.Tensor | None, size: int) -> torch.Tensor:
    """Keys or values of so many numbers a token, or in the shape of those that a cache holds already."""
    heads, size = (held.shape[1], held.shape[-1]) if held is not None and held.dim() == 4 else (1, size)
    return x_BTD.new_zeros(x_BTD.shape[0], heads, x_BTD.shape[1], size)


def take_out(layer: nn.Module, family: Family, kind: str, position: int) -> None:
    """Takes "attention" or "mlp" out of the decoder layer at a position, in place; refused if the layer does not have
    the modules that the table says."""
    path, norms = family.sublayer(kind)
    for name in (path, *norms):
        if submodule(layer, name) is None:
            raise UnsupportedArchitectureError(
                f"the {kind} of layer {position} ({type(layer).__name__}) cannot be taken out: there is no {name!r}. "
                "Whole layers can go: drop_layers"
            )
    put(layer, path, absent(kind, position))
    for name in norms:
        put(layer, name, AbsentNorm())


def absent(kind: str, position: int) -> nn.Module:
    """The stand-in for the attention or the MLP of the layer at a position."""
    return AbsentMLP() if kind == "mlp" else AbsentAttention(position)


def missing(layer: nn.Module, family: Family) -> list[str]:
    """The kinds of sub-layers that a decoder layer lacks."""
    kinds = {"attention": AbsentAttention, "mlp": AbsentMLP}
    return [kind for kind, absent in kinds.items() if isinstance(submodule(layer, family.sublayer(kind)[0]), absent)]


def parts(layer: nn.Module, family: Family, kind: str) -> list[nn.Module]:
    """The modules of a decoder layer that go with its attention or MLP."""
    path, norms = family.sublayer(kind)
    return [layer.get_submodule(name) for name in (path, *norms)]


def put(layer: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module at a path of a decoder layer, in the layer's mode."""
    parent, _, name = path.rpartition(".")
    module.train(layer.training)
    setattr(layer.get_submodule(parent), name, module)
