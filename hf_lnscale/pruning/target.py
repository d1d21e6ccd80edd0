"""How far to prune: the goal that the caller gives, and when it is reached."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ..core.errors import ArgumentError, require_integers
from ..core.stack import Stack, text_stack
from ..core.sublayers import Unit, parts
from ..measuring.losses import layer_of
from ..measuring.stream import eval_mode, kv_cache
from .cut import normalize_layers


def one_goal(**arguments: Any) -> tuple[str, Any]:
    """The name and value of the one argument that sets the target.

    Raises:
        ArgumentError: if none or several are given, or the value is not a positive number (`drop` and the range of
            `num_layers` are not checked).
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    if len(given) != 1:
        shown = ", ".join(f"`{name}`={value!r}" for name, value in given.items()) or "none"
        names = [f"`{name}`" for name in arguments]
        problem = f"exactly one of {', '.join(names[:-1])} and {names[-1]} must be given, got {shown}"
        raise ArgumentError(next(iter(given or arguments)), problem=problem)
    name, value = next(iter(given.items()))
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

    Raises:
        ArgumentError: if the model cannot reach the goal.
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

        if self.name == "drop":
            self.value = normalize_layers(self.value, total, self.name)
        self.words = {self.name: self.value}
        if self.name == "target_memory":
            self.words |= {"cache_tokens": cache_tokens, "cache_batch": cache_batch}
        self.budget: float | None = self.value if self.name == "max_perplexity_increase" else None
        self.least = self._least()

    def _least(self) -> int:
        if self.budget is not None:
            return 1
        if self.name == "drop":
            return len(self.value)
        if self.name == "num_layers":
            return int(self.value)
        most = len(self.stack.layers) - 1
        by_size = sorted(range(most + 1), key=lambda layer: self._left((layer,)))  # largest layer first
        if self.value < (smallest := self._left(by_size[:most])):
            problem = f"at least {smallest}, the size of this model with one layer left"
            raise ArgumentError(self.name, self.value, problem)
        return next((n for n in range(1, most) if self._left(by_size[:n]) <= self.value), most)

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
        whole, *less = (
            sum(size[1:]) if self.cache_of["tokens"] else size[0] for size in map(self._size_of, (unit, *before))
        )
        return whole - sum(less)

    def _left(self, dropped: Sequence[Unit]) -> int:
        """What is left, in the unit of the goal."""
        (_, params), (_, weights), (_, cache), _ = self.sizes(dropped).values()
        return int(params if self.name == "target_params" else weights + cache)

    def _size_of(self, unit: Unit) -> tuple[int, int, int]:
        """Parameters, bytes of weights and bytes of KV cache of one unit."""
        layer = layer_of(unit)
        modules = [self.stack.layers[layer]]
        if isinstance(unit, tuple):
            modules = parts(modules[0], self.stack.family, unit[0])
        cache = 0 if unit == ("mlp", layer) else self._cache_L[layer]
        if unit == ("attention", layer):  # the tokens are still counted
            cache -= self._counter_L[layer]
        return (*_size(parameter for module in modules for parameter in module.parameters()), cache)


def _size(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """Number and bytes of parameters."""
    sizes = [(parameter.numel(), parameter.numel() * parameter.element_size()) for parameter in parameters]
    return sum(count for count, _ in sizes), sum(size for _, size in sizes)


def cache_bytes(stack: Stack, tokens: int, batch: int) -> tuple[list[int], list[int]]:
    """The size of each layer's KV cache in bytes, with and without its attention.

    Extrapolated from a cache of a few tokens: linear attention has a state of constant size, and the cache of a sliding
    window stops growing. Without attention, one element per token remains, see `AbsentAttention`.

    Args:
        tokens: length of each sequence.
        batch: number of sequences.
    """
    probe = 3
    embedding: torch.Tensor = stack.model.get_input_embeddings().weight  # type: ignore[assignment]
    ids = torch.zeros(1, probe, dtype=torch.long, device=embedding.device)
    with eval_mode(stack.model):  # in training mode with gradient checkpointing, there is no cache
        (cache,) = kv_cache(stack.model(input_ids=ids, use_cache=True, return_dict=True)).values()
    found, counters = [], []
    for layer in cache.layers:
        window = getattr(layer, "sliding_window", None) if getattr(layer, "is_sliding", False) else None
        total = 0
        for tensor in _tensors(vars(layer)):
            size = tensor.numel() * tensor.element_size()
            grows = tensor.dim() == 4 and tensor.shape[-2] == probe
            total += size * min(tokens, window or tokens) // probe if grows else size
        found.append(total * batch)
        counters.append(embedding.element_size() * min(tokens, window or tokens) * batch)
    return found, counters


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        if values.is_floating_point():  # not a counter
            yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)
