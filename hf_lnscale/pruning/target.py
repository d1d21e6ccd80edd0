"""How far to prune: the goal that the caller gives, and when it is reached."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..core.errors import ArgumentError, require_integers
from ..core.stack import Stack, text_stack
from ..core.sublayers import Unit
from ..measuring.losses import layer_of
from ..measuring.stream import eval_mode, kv_cache
from .cut import normalize_layers
from .layers import modules_of


def one_goal(**arguments: Any) -> tuple[str, Any]:
    """The name and value of the one argument that sets the target; refuses several, and values that no model allows."""
    given = {name: value for name, value in arguments.items() if value is not None}
    if len(given) != 1:
        shown = ", ".join(f"`{name}`={value!r}" for name, value in given.items()) or "none"
        *names, last = (f"`{name}`" for name in arguments)
        problem = f"exactly one of {', '.join(names)} and {last} must be given, got {shown}"
        raise ArgumentError(next(iter(given or arguments)), problem=problem)
    ((name, value),) = given.items()
    value = value.item() if hasattr(value, "item") and name != "drop" else value  # a NumPy scalar
    # The range of `num_layers` depends on the model; see `require_possible`.
    free = name == "drop" or (name == "num_layers" and isinstance(value, int) and not isinstance(value, bool))
    if not free and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf):
        raise ArgumentError(name, value, "a positive number")
    return name, value


def require_possible(goal: tuple[str, Any], num_layers: int) -> None:
    """Refuses to drop layers that a model with `num_layers` layers does not have, or all of them."""
    name, value = goal
    if num_layers < 2:
        raise ArgumentError("model", problem="it has only one layer, which cannot be dropped")
    if name == "num_layers" and (not isinstance(value, int) or not 1 <= value < num_layers):
        raise ArgumentError(name, value, f"an integer from 1 to {num_layers - 1} for this model")
    if name == "drop":
        normalize_layers(value, num_layers, name)


class Target:
    """The target of a search, and what is left of a model without some units (layers, attention or MLPs).

    Attributes:
        words: the goal, as stored in a plan.
        least: the smallest number of layers that can be enough.
        budget: largest relative increase in perplexity, or None.
    """

    def __init__(self, model: nn.Module, goal: tuple[str, Any], cache_tokens: int = 0, cache_batch: int = 1) -> None:
        require_integers(0, cache_tokens=cache_tokens)
        require_integers(1, cache_batch=cache_batch)
        self.name, self.value = goal
        self.stack = text_stack(model)
        total = len(self.stack.layers)
        require_possible(goal, total)
        self.cache_of = {"tokens": cache_tokens, "batch": cache_batch}
        self._cache_L, self._counter_L = [0] * total, [0] * total
        if cache_tokens:
            self._cache_L, self._counter_L = cache_bytes(self.stack, cache_tokens, cache_batch)
        self._full = (*_size(model.parameters()), sum(self._cache_L))
        self.budget: float | None = None
        if self.name == "drop":
            self.value = normalize_layers(self.value, total, self.name)
            self.least = len(self.value)
        elif self.name == "num_layers":
            self.least = int(self.value)
        elif self.name == "max_perplexity_increase":
            self.budget, self.least = self.value, 1
        else:
            by_size = sorted(range(total), key=lambda layer: self._left((layer,)))  # largest layer first
            if self.value < (smallest := self._left(by_size[:-1])):
                valid = f"at least {smallest}, the size of this model with one layer left"
                raise ArgumentError(self.name, self.value, valid)
            self.least = next(n for n in range(1, total) if self._left(by_size[:n]) <= self.value)
        self.words = {self.name: self.value}
        if self.name == "target_memory":
            self.words |= {"cache_tokens": cache_tokens, "cache_batch": cache_batch}

    def require_not_met(self) -> None:
        """Refuses a target for which nothing has to be dropped."""
        if self.budget is None and self.reached(()):
            raise ArgumentError(self.name, self.value, problem="is already met by the unchanged model")

    def reached(self, dropped: Sequence[Unit]) -> bool:
        """Whether dropping these units is enough."""
        if self.name in ("drop", "num_layers"):
            return len(dropped) == self.least
        one_left = sum(isinstance(unit, int) for unit in dropped) == len(self.stack.layers) - 1
        return one_left or (self.budget is None and self._left(dropped) <= self.value)

    def sizes(self, dropped: Sequence[Unit]) -> dict[str, Any]:
        """Parameters, bytes of weights and bytes of the KV cache, each with nothing dropped and without these units."""
        saved = map(sum, zip((0, 0, 0), *map(self._size_of, dropped), strict=True))
        both = [[full, full - less] for full, less in zip(self._full, saved, strict=True)]
        return dict(zip(("params", "weight_bytes", "cache_bytes"), both, strict=True)) | {"cache_of": self.cache_of}

    def saves(self, unit: Unit, dropped: Sequence[Unit]) -> int:
        """What dropping a unit saves after others: bytes of weights and KV cache with a cache, otherwise parameters.

        For a layer without MLP, only what its attention saves.
        """
        before = [part for part in dropped if layer_of(part) == unit]
        sizes = [self._size_of(part) for part in (unit, *before)]
        whole, *less = (weights + cache if self.cache_of["tokens"] else params for params, weights, cache in sizes)
        return whole - sum(less)

    def _left(self, dropped: Sequence[Unit]) -> int:
        """What is left, in the unit of the goal."""
        sizes = self.sizes(dropped)
        names = ["params"] if self.name == "target_params" else ["weight_bytes", "cache_bytes"]
        return int(sum(sizes[name][1] for name in names))

    def _size_of(self, unit: Unit) -> tuple[int, int, int]:
        """Parameters, bytes of weights and bytes of KV cache of one unit."""
        layer = layer_of(unit)
        cache = 0 if unit == ("mlp", layer) else self._cache_L[layer]
        if unit == ("attention", layer):  # the tokens are still counted
            cache -= self._counter_L[layer]
        parameters = (parameter for module in modules_of(self.stack, unit) for parameter in module.parameters())
        return (*_size(parameters), cache)


def _size(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """Number and bytes of parameters."""
    sizes = [(parameter.numel(), parameter.numel() * parameter.element_size()) for parameter in parameters]
    return sum(count for count, _ in sizes), sum(size for _, size in sizes)


def cache_bytes(stack: Stack, tokens: int, batch: int) -> tuple[list[int], list[int]]:
    """The bytes of each layer's KV cache of `batch` sequences of `tokens` tokens, with and without its attention.

    Extrapolated from a cache of a few tokens: linear attention has a state of constant size, and the cache of a sliding
    window stops growing. Without attention, one element per token remains, see `AbsentAttention`.
    """
    probe = 3
    embedding: torch.Tensor = stack.model.get_input_embeddings().weight  # type: ignore[assignment]
    ids = torch.zeros(1, probe, dtype=torch.long, device=embedding.device)
    with eval_mode(stack.model):  # in training mode with gradient checkpointing, there is no cache
        (cache,) = kv_cache(stack.model(input_ids=ids, use_cache=True, return_dict=True)).values()
    found, counters = [], []
    for layer in cache.layers:
        window = getattr(layer, "sliding_window", None) if getattr(layer, "is_sliding", False) else None
        length, total = min(tokens, window or tokens), 0
        for tensor in _tensors(vars(layer)):
            size = tensor.numel() * tensor.element_size()
            total += size * length // probe if tensor.dim() == 4 and tensor.shape[-2] == probe else size
        found.append(total * batch)
        counters.append(embedding.element_size() * length * batch)
    return found, counters


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        if values.is_floating_point():  # not a counter
            yield values
    elif isinstance(values, (dict, list, tuple)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _tensors(value)
