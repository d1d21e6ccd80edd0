"""The residual stream of a model that runs: what the measurements over depth share.

Shapes: B batch, T tokens, D hidden size, L layers, P = L + 1 places in the stream (place i is in front of layer i,
place L after the last layer).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..core.families import submodule
from ..core.stack import Stack

__all__ = ["capture_residual_stream", "eval_mode", "hidden_states", "upcast"]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is back in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def capture_residual_stream(
    stack: Stack,
    visit: Callable[[int, torch.Tensor], None],
    middle: Callable[[int, torch.Tensor], None] | None = None,
) -> Iterator[None]:
    """Within it, `visit(place, x_BTD)` is called with each of the P states of a pass, in order.

    Between places i and i + 1, `middle(i, x_BTD)` is called with the state between attention and MLP: what the norm in
    front of the MLP reads.
    """

    def in_front(place: int) -> Any:
        return lambda layer, args, kwargs: visit(place, hidden_states(args, kwargs))

    def after_last(layer: nn.Module, args: Any, output: Any) -> None:
        visit(len(stack.layers), output[0] if isinstance(output, tuple) else output)

    def between(place: int) -> Any:
        assert middle is not None
        return lambda norm, args, kwargs: middle(place, hidden_states(args, kwargs))

    hooks = [
        layer.register_forward_pre_hook(in_front(place), with_kwargs=True) for place, layer in enumerate(stack.layers)
    ]
    hooks.append(stack.layers[-1].register_forward_hook(after_last))
    if middle is not None:
        for place, layer in enumerate(stack.layers):
            norm = submodule(layer, stack.family.mlp_norm)
            hooks.append(norm.register_forward_pre_hook(between(place), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The residual stream that goes into a decoder layer or a norm, shape (B, T, D)."""
    return args[0] if args else kwargs["hidden_states"]


def upcast(x: torch.Tensor) -> torch.Tensor:
    """In at least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
