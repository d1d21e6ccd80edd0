"""One streaming forward pass that measures the residual stream: how far layers rotate it, and how it grows.

Holds one batch, and sums for each layer, in at least float32 and accumulated in float64.

Shapes: B batch, T tokens, S sequences, D hidden size, L layers, P = L + 1 places in the residual stream (place i is
before layer i, place L after the last layer).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ..core.stack import Stack, text_stack
from .split_model import PLAIN_FORWARD, model_inputs
from .state_stats import BlockAngles, Moments, channel_moments, cosine_distance
from .stream import capture_residual_stream, eval_mode, first_tokens, last_tokens, upcast
from .text import Batch
from .uncertainty import ratio_residuals, squared_errors


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


def measure_stream(
    model: nn.Module, batches: Iterable[Batch], *, rotation_only: bool = False, tokens: str = "last"
) -> Streamed:
    """Runs one forward pass over the batches.

    Args:
        model: a model of a known family.
        batches: token ids.
        rotation_only: leave out `first`, `rest`, "attention" and "mlp", which not every family allows to measure.
        tokens: which tokens the angles compare, the "last" of each sequence or "all".
    """
    stack = text_stack(model)
    pass_ = _Pass(stack, rotation_only, tokens)
    with eval_mode(model), capture_residual_stream(stack, pass_.at, None if rotation_only else pass_.between):
        for batch in batches:
            pass_.start(batch)
            stack.model(**model_inputs(stack, batch), **PLAIN_FORWARD)
            pass_.finish()
    # Converts sums over (first, rest) to sums over (all, rest).
    parts = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    counts_2S = parts.T @ torch.cat(pass_.counts_S, dim=-1).double()
    sums = {name: torch.cat(values, dim=-1) for name, values in pass_.sums.items()}
    logs_PS, rest_S = sums.pop("log")[:, 1], counts_2S[1]
    sums = {name: parts.T @ split_2S for name, split_2S in sums.items()}
    errors = {name: _errors(sums_2S, counts_2S) for name, sums_2S in sums.items()}
    errors |= {"typical": _errors(logs_PS, rest_S), "growth": _errors(logs_PS - logs_PS[1], rest_S)}
    del sums["square"]
    return Streamed(
        first=pass_.first,
        rest=pass_.rest,
        typical_P=(logs_PS.sum(-1) / rest_S.sum()).exp(),
        means={name: sums_L2S.sum(-1) / counts_2S.sum(-1) for name, sums_L2S in sums.items()},
        angles_LL=pass_.angles.mean(),
        errors=errors | {"angle": pass_.angles.errors()},
    )


def _errors(sums_S: torch.Tensor, counts_S: torch.Tensor) -> torch.Tensor:
    """Standard errors of means over tokens, given sums by sequence; keeps leading dimensions."""
    used = counts_S.reshape(-1, counts_S.shape[-1]).bool().all(0)
    sums_S, counts_S = sums_S[..., used], counts_S[..., used]
    means = sums_S.sum(-1, keepdim=True) / counts_S.sum(-1, keepdim=True)
    return squared_errors(ratio_residuals(sums_S, counts_S, means)).sqrt()


def _with_norm(x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x_BTD = upcast(x_BTD)
    return x_BTD, torch.linalg.vector_norm(x_BTD, dim=-1).clamp_min(torch.finfo(x_BTD.dtype).tiny)


class _Pass:
    """The sums of a forward pass, kept on the device during a batch to avoid synchronizing at each layer."""

    before: tuple[torch.Tensor, torch.Tensor]  # the state before the running layer, and its norm
    middle: tuple[torch.Tensor, torch.Tensor]  # the state between attention and MLP, and its norm

    def __init__(self, stack: Stack, rotation_only: bool, tokens: str) -> None:
        layers, channels = len(stack.layers), stack.model.config.hidden_size
        self.rotation_only, self.tokens = rotation_only, tokens
        places = 0 if rotation_only else layers + 1
        self.first, self.rest = ([Moments(channels) for _ in range(places)] for _ in range(2))
        # Numbers of first and other tokens by sequence, one tensor per batch.
        self.counts_S: list[torch.Tensor] = []
        names = ("influence", "log", "square", *(() if rotation_only else ("attention", "mlp")))
        self.sums: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        self.angles = BlockAngles(layers)

    def start(self, batch: Batch) -> None:
        self.padded = batch.padded
        first_BT = first_tokens(batch)
        masks = (first_BT, batch.attention_mask & ~first_BT)
        self.masks: dict[torch.device, tuple[torch.Tensor, ...]] = {torch.device("cpu"): masks}
        # Indices, since indexing with a mask synchronizes with the GPU.
        compared_BT = last_tokens(batch) if self.tokens == "last" else batch.attention_mask
        self.compared = compared_BT.nonzero(as_tuple=True)
        self.counts_S.append(torch.stack([mask_BT.sum(-1) for mask_BT in masks]))
        self.moments: list[list[torch.Tensor]] = [[], []]
        self.found: dict[str, list[torch.Tensor]] = {name: [] for name in self.sums}
        self.states: list[torch.Tensor] = []  # of the compared tokens, at each place

    def at(self, place: int, x_BTD: torch.Tensor) -> None:
        self.states.append(x_BTD[tuple(index.to(x_BTD.device, non_blocking=True) for index in self.compared)])
        x_BTD, norm_BT = _with_norm(x_BTD)
        if place:
            y_BTD, y_norm_BT = (one.to(x_BTD.device) for one in self.before)
            self._sum("influence", cosine_distance(x_BTD, y_BTD, norm_BT, y_norm_BT))
        self.before = (x_BTD, norm_BT)
        square_BT = norm_BT.square() / x_BTD.shape[-1]
        self._sum("log", square_BT.log())
        self._sum("square", square_BT)
        if self.rotation_only:
            return
        if place:
            m_BTD, m_norm_BT = (one.to(x_BTD.device) for one in self.middle)
            self._sum("mlp", torch.linalg.vector_norm(x_BTD - m_BTD, dim=-1) / m_norm_BT)
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

    def _masks(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        if device not in self.masks:
            self.masks[device] = tuple(mask_BT.to(device) for mask_BT in self.masks[torch.device("cpu")])
        return self.masks[device]

    def finish(self) -> None:
        counts: list[int] = self.counts_S[-1].sum(-1).tolist()
        for merged, found, count in zip((self.first, self.rest), self.moments, counts, strict=True):
            for moments, (variance_D, mean_D) in zip(merged, found, strict=True):
                moments.add(count, mean_D.cpu().double(), variance_D.cpu().double())
        for name, values in self.found.items():
            self.sums[name].append(torch.stack([value.cpu() for value in values]))
        self.angles.add(self.states)
        del self.before, self.states, self.moments
