"""The measurements that take gradients, layer by layer: they hold the L states of one batch and the graph of one layer.

Shapes: B batch, T tokens, N selected tokens of B x T, S sequences, D hidden size, L layers, P = L + 1 places in the
residual stream (place i is before layer i, place L after the last layer).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..core.errors import ArgumentError
from ..core.stack import Stack, text_stack
from ..measuring.losses import loss_gradient
from ..measuring.split_model import PLAIN_FORWARD, SplitModel, model_inputs, pick_tokens, predictions
from ..measuring.stream import (
    eval_mode,
    first_tokens,
    hidden_states,
    layer_output,
    upcast,
)
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


@dataclass
class _Call:
    """A recorded call of a layer: its input and its other arguments."""

    layer: nn.Module
    x_BTD: torch.Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def again(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Reruns the layer with gradients; returns the input, as a leaf of a new graph, and the output."""
        x_BTD = self.x_BTD.detach().requires_grad_()
        with torch.enable_grad():
            y_BTD = layer_output(self.layer(x_BTD, *self.args, **self.kwargs))
        _require_differentiable(y_BTD)
        return x_BTD, y_BTD


@contextmanager
def _recording(stack: Stack) -> Iterator[tuple[list[_Call], list[torch.Tensor]]]:
    """Records the calls of all layers and the output of the last one."""
    calls: list[_Call] = []
    last: list[torch.Tensor] = []

    def record(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        calls.append(_Call(layer, hidden_states(args, kwargs), args[1:], others))

    with ExitStack() as hooks:
        for layer in stack.layers:
            hooks.enter_context(layer.register_forward_pre_hook(record, with_kwargs=True))
        hooks.enter_context(
            stack.layers[-1].register_forward_hook(lambda layer, args, output: last.append(layer_output(output)))
        )
        yield calls, last


def weights_have_gradients(stack: Stack) -> bool:
    """Whether all layer weights are in memory and have a dtype that supports gradients."""
    matrices = [weight for weight in stack.layers.parameters() if weight.dim() >= 2]
    return not getattr(stack.model.config, "quantization_config", None) and all(
        weight.is_floating_point() and weight.element_size() >= 2 and not weight.is_meta for weight in matrices
    )


def gradient_norms(
    model: nn.Module, batches: TokenBatches, advance: Callable[[float], object]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms of the gradient of the loss, the mean next-token cross-entropy.

    From the last layer to the first, each layer is rerun on its recorded input, so only the graph and gradients of one
    layer are in memory.

    Returns:
        weights_NL: for each batch and layer, the norm of the gradient with respect to all of the layer's weights; NaN
            for weights without gradients (quantized, offloaded).
        states_L: norm of the gradient of a sequence's summed loss with respect to a token's state before the layer;
            mean over tokens, excluding the first of each sequence.

    Raises:
        NotDifferentiableError: if a layer is not differentiable.
    """
    split_model = SplitModel(model)
    layers = split_model.stack.layers
    readable = weights_have_gradients(split_model.stack)
    weights: list[torch.Tensor] = []
    states_L = torch.zeros(len(layers), dtype=torch.float64)
    rest = 0
    with eval_mode(model):
        for batch in batches:
            picked_BT, targets_N = predictions(batch)
            if not len(targets_N):
                continue
            with _recording(split_model.stack) as (calls, last):
                split_model.hidden(batch)
            y_BTD = last.pop().detach().requires_grad_()
            with torch.enable_grad():
                x_ND = pick_tokens(split_model.hidden(batch, start=(len(layers) - 1, y_BTD)), picked_BT)
                (g_BTD,) = torch.autograd.grad(x_ND, y_BTD, loss_gradient(split_model, x_ND, targets_N))
            rest_BT = batch.attention_mask & ~first_tokens(batch)
            found: list[float] = []
            while calls:
                g_BTD, squares = _through(calls.pop(), g_BTD, readable)
                norm_BT = torch.linalg.vector_norm(upcast(g_BTD), dim=-1)
                states_L[len(calls)] += norm_BT[rest_BT.to(norm_BT.device)].double().sum().item()
                found.append(squares)
                advance(1 / len(batches) / len(layers))
            weights.append(torch.tensor(found[::-1], dtype=torch.float64).sqrt() / len(targets_N))
            rest += int(rest_BT.sum())
    if not weights:
        raise ArgumentError("data", problem="there is no token to predict; sequences must have at least two tokens")
    return torch.stack(weights), states_L / rest


def _through(call: _Call, g_BTD: torch.Tensor, weights: bool) -> tuple[torch.Tensor, float]:
    """The gradient with respect to a layer's input, and the squared gradient norm of its weights (else NaN)."""
    parameters = list(call.layer.parameters()) if weights else []
    with ExitStack() as restored:
        for parameter in parameters:
            restored.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_()
        x_BTD, y_BTD = call.again()
        # Experts that received no tokens have no gradient.
        found = torch.autograd.grad(y_BTD, [x_BTD, *parameters], g_BTD.to(y_BTD.device), allow_unused=True)
    squares = [upcast(gradient).square().sum().double() for gradient in found[1:] if gradient is not None]
    return found[0], sum(square.item() for square in squares) if weights else math.nan


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
    for batch in batches:
        rest_BT = batch.attention_mask & ~first_tokens(batch)
        with eval_mode(model):
            with _recording(stack) as (calls, _):
                stack.model(**model_inputs(stack, batch), **PLAIN_FORWARD)
            entries_B = rest_BT.sum(1) * calls[0].x_BTD.shape[-1]
            squares_LB = torch.zeros(len(calls), len(rest_BT), dtype=torch.float64)
            for position in reversed(range(len(squares_LB))):
                x_BTD, y_BTD = calls.pop().again()
                device = y_BTD.device
                generator = generators.setdefault(device, torch.Generator(device).manual_seed(0))
                for probe in range(probes):
                    u_BTD = torch.empty_like(y_BTD, requires_grad=False).bernoulli_(generator=generator) * 2 - 1
                    u_BTD *= rest_BT[..., None].to(device)
                    (product_BTD,) = torch.autograd.grad(y_BTD, x_BTD, u_BTD, retain_graph=probe < probes - 1)
                    difference_BTD = upcast(product_BTD) - u_BTD.to(product_BTD.device)
                    squares_LB[position] += difference_BTD.square().sum((1, 2)).double().cpu()
                del y_BTD
                advance(1 / len(batches) / len(squares_LB))
        real_B = entries_B > 0
        samples.append((squares_LB / probes / entries_B)[:, real_B].T)
    return torch.cat(samples)
