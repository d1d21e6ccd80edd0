"""Layers without attention or MLP: a placeholder module replaces it and adds nothing to the residual stream.

The layer's own forward still runs, so masks, indices and the KV cache are the model's own. Norms used only by the
missing sub-layer become identities.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from .families import Family, UnsupportedArchitectureError, submodule

# A layer, or its attention or MLP: ("attention", 3).
Unit = int | tuple[str, int]


class AbsentNorm(nn.Identity):
    """Replaces a norm of a missing sub-layer."""


class AbsentMLP(nn.Module):
    """Replaces an MLP: returns zeros in the shape of its input."""

    def forward(self, x_BTD: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return torch.zeros_like(x_BTD)


class AbsentAttention(nn.Module):
    """Replaces an attention module: returns zeros in the shape of its input, and no attention weights.

    A cache gets its number of tokens from a single layer, often the first. In case that is this one, it stores keys of
    one element and values of none per token. If the cache already holds keys, for example from PEFT's prefix tuning,
    it stores zeros of the same shape.
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        x_BTD = next(value for value in given if isinstance(value, torch.Tensor))
        if cache := next((value for value in given if isinstance(value, Cache)), None):
            layer = cache.layers[self.layer_idx] if self.layer_idx < len(cache.layers) else None
            keys, values = (
                _zeros(x_BTD, getattr(layer, name, None), size) for name, size in (("keys", 1), ("values", 0))
            )
            cache.update(keys, values, self.layer_idx)
        return torch.zeros_like(x_BTD), None


def _zeros(x_BTD: torch.Tensor, cached: torch.Tensor | None, size: int) -> torch.Tensor:
    """Keys or values with `size` elements per token, or with the shape of those already cached."""
    heads, size = (cached.shape[1], cached.shape[-1]) if cached is not None and cached.dim() == 4 else (1, size)
    return x_BTD.new_zeros(x_BTD.shape[0], heads, x_BTD.shape[1], size)


def take_out(layer: nn.Module, family: Family, kind: str, position: int) -> None:
    """Removes "attention" or "mlp" from the decoder layer at a position, in place; refuses if a module is missing."""
    path, norms = family.sublayer(kind)
    for name in (path, *norms):
        if submodule(layer, name) is None:
            raise UnsupportedArchitectureError(
                f"the {kind} of layer {position} ({type(layer).__name__}) cannot be dropped: it has no {name!r}. Use "
                "drop_layers to drop whole layers"
            )
    put(layer, path, absent(kind, position))
    for name in norms:
        put(layer, name, AbsentNorm())


def absent(kind: str, position: int) -> nn.Module:
    """The placeholder for the attention or MLP of the layer at a position."""
    return AbsentMLP() if kind == "mlp" else AbsentAttention(position)


def missing(layer: nn.Module, family: Family) -> list[str]:
    """The kinds of sub-layers that a decoder layer lacks."""
    kinds = {"attention": AbsentAttention, "mlp": AbsentMLP}
    return [kind for kind, absent in kinds.items() if isinstance(submodule(layer, family.sublayer(kind)[0]), absent)]


def parts(layer: nn.Module, family: Family, kind: str) -> list[nn.Module]:
    """The modules of a decoder layer that are removed with its attention or MLP."""
    path, norms = family.sublayer(kind)
    return [layer.get_submodule(name) for name in (path, *norms)]


def put(layer: nn.Module, path: str, module: nn.Module) -> None:
    """Sets the module at a path of a decoder layer, in the layer's training or evaluation mode."""
    parent, _, name = path.rpartition(".")
    module.train(layer.training)
    setattr(layer.get_submodule(parent), name, module)
