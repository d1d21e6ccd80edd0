"""The measurements: one streaming forward pass, and a backward pass layer by layer.

The forward pass holds one batch and sums for each layer. The backward pass holds the L states of one batch and the
graph of one layer. Sums are computed in at least float32 and accumulated in float64.

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
from ..measuring.angles import BlockAngles, cosine_distance
from ..measuring.losses import loss_gradient
from ..measuring.moments import Moments, channel_moments
from ..measuring.split_model import PLAIN_FORWARD, SplitModel, model_inputs, pick_tokens, predictions
from ..measuring.stream import (
    capture_residual_stream,
    eval_mode,
    first_tokens,
    hidden_states,
    last_tokens,
    layer_output,
    upcast,
)
from ..measuring.text import Batch, TokenBatches


@dataclass
class Streamed:
    """The results of the forward pass. "First" means the first token of each sequence, "rest" all other tokens.

    Attributes:
        first, rest: moments at each place of the residual stream.
        typical_P: geometric mean over the rest of the mean square |x|^2 / D of a token.
        means: means over all tokens and over the rest, shape (L, 2), of "attention" and "mlp" (the norm of the
            sub-layer's output over the norm of the state it is added to) and of "influence" (1 - cosine similarity of
            the layer's input and output).
        angles_LL: angular distances of blocks of layers, see `BlockAngles.mean`.
        errors: standard errors over sequences of the `means`, and of the logarithm, shape (P,), of "typical" and of
            "growth" (relative to the place after the first layer); of the mean "square" |x|^2 / D of all tokens and of
            the rest, shape (P, 2); of the "angle" of each layer, shape (L,). NaN for one sequence.
    """

    first: list[Moments]
    rest: list[Moments]
    typical_P: torch.Tensor
    means: dict[str, torch.Tensor]
    angles_LL: torch.Tensor
    errors: dict[str, torch.Tensor]


def stream(model: nn.Module, batches: TokenBatches, advance: Callable[[float], object]) -> Streamed:
    """Runs one forward pass over the batches; `advance` is called with each completed fraction of the work."""
    stack = text_stack(model)
    pass_ = _Pass(stack)
    with eval_mode(model), capture_residual_stream(stack, pass_.at, pass_.between):
        for batch in batches:
            pass_.start(batch)
            stack.model(**model_inputs(stack, batch), **PLAIN_FORWARD)
            pass_.finish()
            advance(1 / len(batches))
    if not pass_.rest[0].count:
        problem = "sequences have no token after the first; each needs at least two"
        raise ArgumentError("data", problem=problem)
    # Converts sums over (first, rest) to sums over (all, rest).
    parts = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    counts_2S = parts.T @ torch.cat(pass_.counts_S, dim=-1).double()
    sums = {name: torch.cat(values, dim=-1) for name, values in pass_.sums.items()}
    logs_PS, rest_S = sums.pop("log")[:, 1], counts_2S[1]
    squares_P2S = parts.T @ sums.pop("square")
    means, errors = {}, {"square": _errors(squares_P2S, counts_2S), "angle": pass_.angles.errors()}
    for name, split_L2S in sums.items():
        sums_L2S = parts.T @ split_L2S
        means[name] = sums_L2S.sum(-1) / counts_2S.sum(-1)
        errors[name] = _errors(sums_L2S, counts_2S)
    errors |= {"typical": _errors(logs_PS, rest_S), "growth": _errors(logs_PS - logs_PS[1], rest_S)}
    typical_P = (logs_PS.sum(-1) / rest_S.sum()).exp()
    return Streamed(pass_.first, pass_.rest, typical_P, means, pass_.angles.mean(), errors)


def _errors(sums_S: torch.Tensor, counts_S: torch.Tensor) -> torch.Tensor:
    """Standard errors of means over tokens, given sums by sequence; keeps leading dimensions."""
    used = counts_S.reshape(-1, counts_S.shape[-1]).bool().all(0)
    sums_S, counts_S = sums_S[..., used], counts_S[..., used].expand_as(sums_S[..., used])
    means = sums_S.sum(-1, keepdim=True) / counts_S.sum(-1, keepdim=True)
    residuals_S = (sums_S - means * counts_S) / counts_S.sum(-1, keepdim=True)
    number = sums_S.shape[-1]
    return (number / (number - 1) * residuals_S.square().sum(-1)).sqrt() if number > 1 else means[..., 0] * math.nan


def _with_norm(x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x_BTD = upcast(x_BTD)
    return x_BTD, torch.linalg.vector_norm(x_BTD, dim=-1).clamp_min(torch.finfo(x_BTD.dtype).tiny)


class _Pass:
    """The sums of a forward pass, kept on the device during a batch to avoid synchronizing at each layer."""

    before: tuple[torch.Tensor, torch.Tensor]  # the state before the running layer, and its norm
    middle: tuple[torch.Tensor, torch.Tensor]  # the state between attention and MLP, and its norm

    def __init__(self, stack: Stack) -> None:
        layers, channels = len(stack.layers), stack.model.config.hidden_size
        self.first, self.rest = ([Moments(channels) for _ in range(layers + 1)] for _ in range(2))
        # Numbers of first and other tokens by sequence, one tensor per batch.
        self.counts_S: list[torch.Tensor] = []
        self.sums: dict[str, list[torch.Tensor]] = {
            "attention": [], "mlp": [], "influence": [], "log": [], "square": [],
        }  # fmt: skip
        self.angles = BlockAngles(layers)

    def start(self, batch: Batch) -> None:
        self.padded = batch.padded
        self.masks = {torch.device("cpu"): (first_tokens(batch), batch.attention_mask & ~first_tokens(batch))}
        # Indices, since indexing with a mask synchronizes with the GPU.
        self.last_tokens = last_tokens(batch).nonzero(as_tuple=True)
        self.counts_S.append(torch.stack([mask_BT.sum(-1) for mask_BT in self.masks[torch.device("cpu")]]))
        self.counts: list[int] = self.counts_S[-1].sum(-1).tolist()
        self.moments: list[list[torch.Tensor]] = [[], []]
        self.found: dict[str, list[torch.Tensor]] = {name: [] for name in self.sums}
        self.last: list[torch.Tensor] = []

    def at(self, place: int, x_BTD: torch.Tensor) -> None:
        self.last.append(x_BTD[tuple(index.to(x_BTD.device, non_blocking=True) for index in self.last_tokens)])
        x_BTD, norm_BT = _with_norm(x_BTD)
        if place:
            m_BTD, m_norm_BT = (one.to(x_BTD.device) for one in self.middle)
            y_BTD, y_norm_BT = (one.to(x_BTD.device) for one in self.before)
            self._sum("mlp", torch.linalg.vector_norm(x_BTD - m_BTD, dim=-1) / m_norm_BT)
            self._sum("influence", cosine_distance(x_BTD, y_BTD, norm_BT, y_norm_BT))
        self.before = (x_BTD, norm_BT)
        square_BT = norm_BT.square() / x_BTD.shape[-1]
        self._sum("log", square_BT.log())
        self._sum("square", square_BT)
        first_BT, rest_BT = self._masks(x_BTD.device)
        # Without padding these are views, otherwise copies.
        parts = (x_BTD[first_BT], x_BTD[rest_BT]) if self.padded else (x_BTD[:, 0], x_BTD[:, 1:])
        for found, part in zip(self.moments, parts, strict=True):
            found.append(channel_moments(part))

    def between(self, place: int, m_BTD: torch.Tensor) -> None:
        self.middle = _with_norm(m_BTD)
        x_BTD, x_norm_BT = (one.to(m_BTD.device) for one in self.before)
        self._sum("attention", torch.linalg.vector_norm(self.middle[0] - x_BTD, dim=-1) / x_norm_BT)

    def _sum(self, name: str, values_BT: torch.Tensor) -> None:
        values_BT = values_BT.double()
        sums = [torch.where(mask_BT, values_BT, 0.0).sum(-1) for mask_BT in self._masks(values_BT.device)]
        self.found[name].append(torch.stack(sums))

    def _masks(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if device not in self.masks:
            first_BT, rest_BT = self.masks[torch.device("cpu")]
            self.masks[device] = (first_BT.to(device), rest_BT.to(device))
        return self.masks[device]

    def finish(self) -> None:
        for merged, found, count in zip((self.first, self.rest), self.moments, self.counts, strict=True):
            for moments, (variance_D, mean_D) in zip(merged, found, strict=True):
                moments.add(count, mean_D.cpu().double(), variance_D.cpu().double())
        for name, values in self.found.items():
            self.sums[name].append(torch.stack([value.cpu() for value in values]))
        self.angles.add(self.last)
        del self.before, self.middle, self.last, self.moments


# --- with gradients ---------------------------------------------------------------------------------------------------


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Norms of the gradient of the loss, the mean next-token cross-entropy.

    From the last layer to the first, each layer is rerun on its recorded input, so only the graph and gradients of one
    layer are in memory.

    Returns:
        weights_NL: for each batch and layer, the norm of the gradient with respect to all of the layer's weights; NaN
            for weights without gradients (quantized, offloaded).
        states_L: norm of the gradient of a sequence's summed loss with respect to a token's state before the layer;
            mean over tokens, excluding the first of each sequence.
        errors_L: the standard error of the latter over sequences; NaN for one.

    Raises:
        NotDifferentiableError: if a layer is not differentiable.
    """
    split_model = SplitModel(model)
    layers = split_model.stack.layers
    readable = weights_have_gradients(split_model.stack)
    weights: list[torch.Tensor] = []
    states: list[torch.Tensor] = []  # sums for each layer and sequence
    counts: list[torch.Tensor] = []
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
            states_LB = torch.zeros(len(layers), len(rest_BT), dtype=torch.float64)
            while calls:
                g_BTD, squares = _through(calls.pop(), g_BTD, readable)
                norm_BT = torch.linalg.vector_norm(upcast(g_BTD), dim=-1)
                states_LB[len(calls)] = torch.where(rest_BT.to(norm_BT.device), norm_BT.double(), 0.0).sum(-1)
                found.append(squares)
                advance(1 / len(batches) / len(layers))
            weights.append(torch.tensor(found[::-1], dtype=torch.float64).sqrt() / len(targets_N))
            states.append(states_LB)
            counts.append(rest_BT.sum(-1))
    if not weights:
        raise ArgumentError("data", problem="contains no token to predict; sequences must have at least two tokens")
    states_LS, counts_S = torch.cat(states, dim=-1), torch.cat(counts)
    return torch.stack(weights), states_LS.sum(-1) / counts_S.sum(), _errors(states_LS, counts_S)


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
