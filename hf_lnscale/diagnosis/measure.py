"""The distance of each layer's Jacobian from the identity. Holds the L states of one batch and the graph of one layer.

Shapes: B batch, T tokens, N selected tokens of B x T, S sequences, D hidden size, L layers, P = L + 1 places in the
residual stream (place i is before layer i, place L after the last layer).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from ..core.stack import text_stack
from ..measuring.split_model import PLAIN_FORWARD, model_inputs
from ..measuring.stream import eval_mode, first_tokens, hidden_states, layer_output, upcast
from ..measuring.text import TokenBatches


class NotDifferentiableError(ValueError):
    """A layer uses an operation that is not differentiable."""


def _require_differentiable(y: torch.Tensor) -> None:
    """Refuses inference kernels without a backward, which autograd skips with only a warning.

    bitsandbytes uses one on a CPU once a pass without gradients has packed the weights.
    """
    queue, seen = [y.grad_fn], set()
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "NotImplemented" in node.name():
            raise NotDifferentiableError("the layers use a kernel that is not differentiable")
        queue += [after for after, _ in node.next_functions]


def jacobian_distances(
    model: nn.Module, batches: TokenBatches, probes: int, advance: Callable[[float], object]
) -> torch.Tensor:
    """Distance of each layer's Jacobian J from the identity, |J - I|_F^2 / |I|_F^2.

    J has (T - 1) D rows: the outputs of all tokens of a sequence except the first, with respect to all its inputs. For
    u with independent entries +1 and -1, the mean of |(J - I)^T u|^2 is |J - I|_F^2 (Hutchinson 1990), and |I|_F^2 is
    (T - 1) D. Each vector-Jacobian product is one backward pass, which every attention kernel and most kernels for
    quantized weights support, unlike Jacobian-vector products.

    Returns:
        Shape (S, L): the mean over the `probes` for each sequence of at least two tokens.

    Raises:
        NotDifferentiableError: if a layer is not differentiable.
    """
    stack = text_stack(model)
    generators: dict[torch.device, torch.Generator] = {}
    samples: list[torch.Tensor] = []
    # Each layer that was called, its input and its other arguments.
    calls: list[tuple[nn.Module, torch.Tensor, tuple[Any, ...], dict[str, Any]]] = []

    def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        calls.append((layer, hidden_states(args, kwargs), args[1:], others))

    for batch in batches:
        rest_BT = batch.attention_mask & ~first_tokens(batch)
        with eval_mode(model):
            with ExitStack() as hooks:
                for layer in stack.layers:
                    hooks.enter_context(layer.register_forward_pre_hook(record, with_kwargs=True))
                stack.model(**model_inputs(stack, batch), **PLAIN_FORWARD)
            entries_B = rest_BT.sum(1) * calls[0][1].shape[-1]
            squares_LB = torch.zeros(len(calls), len(rest_BT), dtype=torch.float64)
            for position in reversed(range(len(squares_LB))):
                layer, x_BTD, args, kwargs = calls.pop()
                x_BTD = x_BTD.detach().requires_grad_()  # a leaf of a new graph
                with torch.enable_grad():
                    y_BTD = layer_output(layer(x_BTD, *args, **kwargs))
                _require_differentiable(y_BTD)
                device = y_BTD.device
                generator = generators.setdefault(device, torch.Generator(device).manual_seed(0))
                for probe in range(probes):
                    u_BTD = torch.empty_like(y_BTD, requires_grad=False).bernoulli_(generator=generator) * 2 - 1
                    u_BTD *= rest_BT[..., None].to(device)
                    (product_BTD,) = torch.autograd.grad(y_BTD, x_BTD, u_BTD, retain_graph=probe < probes - 1)
                    difference_BTD = upcast(product_BTD) - u_BTD.to(product_BTD.device)
                    squares_LB[position] += difference_BTD.square().sum((1, 2)).double().cpu()
                del args, kwargs, y_BTD
                advance(1 / len(batches) / len(squares_LB))
        real_B = entries_B > 0
        samples.append((squares_LB / probes / entries_B)[:, real_B].T)
    return torch.cat(samples)
