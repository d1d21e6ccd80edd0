"""Hooks that read the residual stream of a running model.

Shapes: B batch, T tokens, D hidden size, L layers, P = L + 1 places in the stream (place i is before layer i, place L
after the last layer).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ..core.families import family_of
from ..core.stack import Stack
from .text import Batch


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Context with evaluation mode and without gradients. Restores each module's mode on exit.

    Compiled modules run eagerly, since compiled code ignores hooks registered later.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    # Set only if needed, since it imports the compiler, which takes seconds.
    eager = torch.compiler.set_stance("force_eager") if any(map(is_compiled, model.modules())) else nullcontext()
    try:
        with torch.no_grad(), eager:
            yield
    finally:
        for module, training in modes:
            module.training = training


def is_compiled(module: nn.Module) -> bool:
    """Whether a module was compiled, by `torch.compile` or in place."""
    # `nn.Module.compile` stores the compiled call in the module, but `__getstate__` omits it.
    in_place = vars(module).keys() != module.__getstate__().keys()
    return in_place or type(module).__name__ == "OptimizedModule"


@contextmanager
def capture_residual_stream(
    stack: Stack,
    visit: Callable[[int, torch.Tensor], None],
    middle: Callable[[int, torch.Tensor], None] | None = None,
) -> Iterator[None]:
    """Context in which each forward pass calls `visit(place, x_BTD)` with its P states in order.

    Between places i and i + 1, `middle(i, x_BTD)` is called with the state between attention and MLP (the input of the
    MLP's pre-norm).
    """

    with ExitStack() as hooks:

        def read(module: nn.Module, function: Callable[[int, torch.Tensor], None], place: int) -> None:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                function(place, hidden_states(args, kwargs))

            hooks.enter_context(module.register_forward_pre_hook(hook, with_kwargs=True))

        if middle is not None:
            family_of(stack.model.config, "measuring between attention and MLP")
        for place, layer in enumerate(stack.layers):
            read(layer, visit, place)
            if middle is not None:
                read(layer.get_submodule(stack.family.mlp_norm), middle, place)
        last, end = stack.layers[-1], len(stack.layers)
        after = last.register_forward_hook(lambda layer, args, output: visit(end, layer_output(output)))
        hooks.enter_context(after)
        yield


def first_tokens(batch: Batch) -> torch.Tensor:
    """A mask of the first non-padding token of each sequence, shape (B, T), bool."""
    return batch.attention_mask & (batch.attention_mask.cumsum(1) == 1)


def last_tokens(batch: Batch) -> torch.Tensor:
    """A mask of the last non-padding token of each sequence, shape (B, T), bool."""
    return batch.attention_mask & (batch.attention_mask.flip(1).cumsum(1).flip(1) == 1)


def hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The input of a decoder layer or norm, shape (B, T, D), given its call arguments."""
    found: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def layer_output(output: Any) -> torch.Tensor:
    """The output of a decoder layer, shape (B, T, D), given its return value."""
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found


def kv_cache(output: Any) -> dict[str, Any]:
    """The KV cache in a model's output as a keyword argument for the next call (renamed in transformers 5.24)."""
    names = ("cache", "past_key_values", "cache_params", "state")
    return {name: value for name, value in output.items() if name in names}


def upcast(x: torch.Tensor) -> torch.Tensor:
    """Converts to float32 unless the dtype is already at least as wide."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
