"""The loss of a model with layers, or sub-layers, left out.

Shapes: B batch, T tokens, N tokens picked out of B x T, S sequences, D hidden size, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging

from ..core.config import is_integer
from ..core.errors import ArgumentError
from ..core.stack import text_stack
from ..core.sublayers import Unit
from .split_model import SplitModel, pick_tokens, predictions
from .stream import capture_residual_stream, eval_mode, upcast
from .text import TokenBatches, token_batches
from .uncertainty import ratio_residuals, standard_error

# Largest loss (nats per token) before exp() overflows.
MOST_NATS = 700.0
# Logits that are upcast at a time on a CPU: the memory of a small part is used again for the next one.
_UPCAST_LOGITS = 2**20
_BAR = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"


def perplexity_of(loss: float) -> float:
    """exp(loss), loss in nats per token; infinite where that overflows."""
    return math.exp(loss) if loss < MOST_NATS else math.inf


def token_losses(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each token, shape (N,), nats, in at least float32."""
    size = max(1, _UPCAST_LOGITS // logits_NV.shape[1] if logits_NV.device.type == "cpu" else len(logits_NV))
    # Not slices: backward, each of those would fill a gradient of all logits.
    parts = zip(logits_NV.split(size), targets_N.to(logits_NV.device).split(size), strict=True)
    return torch.cat([F.cross_entropy(upcast(some_NV), some_N, reduction="none") for some_NV, some_N in parts])


def loss_gradient(halves: SplitModel, x_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Gradient of the loss, summed over tokens, with respect to the states that the head reads, shape (N, D).

    The backward pass goes through the head a part of the logits at a time.
    """
    leaf_ND = x_ND.detach().requires_grad_()
    gradient_ND = torch.zeros_like(leaf_ND)
    with torch.enable_grad():
        for part in halves.parts(len(leaf_ND)):
            loss = token_losses(halves.logits(leaf_ND[part]), targets_N[part]).sum()
            gradient_ND += torch.autograd.grad(loss, leaf_ND)[0]
    return gradient_ND


class MeanLoss:
    """A mean over tokens, in nats, kept by sequence so that it has a standard error.

    Attributes:
        total: sum over tokens.
        sums_S: sum over the tokens of each sequence, float64.
        counts_S: number of tokens in each sequence; shared by the losses of a sweep.
    """

    def __init__(self, counts_S: torch.Tensor) -> None:
        self.total, self.counts_S = 0.0, counts_S
        self.sums_S = torch.zeros(len(counts_S), dtype=torch.float64)

    def add(self, values_N: torch.Tensor, sequences_N: torch.Tensor) -> None:
        """Adds tokens, each of the sequence with the given number."""
        values_N = values_N.cpu().double()
        self.total += values_N.sum().item()
        self.sums_S.index_add_(0, sequences_N, values_N)

    @property
    def mean(self) -> float:
        return self.total / int(self.counts_S.sum())

    def error(self, reference: MeanLoss | None = None) -> float | None:
        """Standard error of the mean, or of its difference to a reference on the same sequences; None for one."""
        used_S = self.counts_S > 0
        residuals_S = ratio_residuals(self.sums_S[used_S], self.counts_S[used_S], self.mean)
        if reference is not None:
            residuals_S -= ratio_residuals(reference.sums_S[used_S], self.counts_S[used_S], reference.mean)
        return standard_error(residuals_S)


class SourceLosses:
    """The loss of a model on several sources of text, or on `only` one of them: `of`, by the name of the source.

    `hidden` gives the decoder's output for the batch with an index, shape (B, T, D).
    """

    def __init__(
        self,
        halves: SplitModel,
        batches: TokenBatches,
        hidden: Callable[[int], torch.Tensor],
        only: str | None = None,
    ) -> None:
        picked = [predictions(batch) for batch in batches]
        self.of: dict[str, MeanLoss] = {}
        for name in [only] if only else dict.fromkeys(batch.name for batch in batches):
            mine = [index for index, batch in enumerate(batches) if batch.name == name]
            loss = MeanLoss(torch.cat([picked[index][0].sum(1) for index in mine]))
            if not loss.counts_S.sum():
                raise ArgumentError(
                    "data", problem=f"there is no token to predict in {name}; sequences must hold two tokens or more"
                )
            sequences = 0
            for index in mine:
                picked_BT, targets_N = picked[index]
                x_ND = pick_tokens(hidden(index), picked_BT)
                sequences_N = sequences + picked_BT.nonzero()[:, 0]
                for part in halves.parts(len(x_ND)):
                    loss.add(token_losses(halves.logits(x_ND[part]), targets_N[part]), sequences_N[part])
                sequences += len(picked_BT)
            self.of[name] = loss

    @property
    def mean(self) -> float:
        """Mean over sources, each counted once: the logarithm of the geometric mean of their perplexities."""
        return sum(loss.mean for loss in self.of.values()) / len(self.of)

    def error(self, reference: SourceLosses | None = None) -> float:
        """Standard error of the mean, or of its difference to a reference; a source of one sequence adds nothing."""
        errors = [loss.error(reference.of[name] if reference else None) or 0.0 for name, loss in self.of.items()]
        return math.hypot(*errors) / len(self.of)


def losses_by_source(model: nn.Module, batches: TokenBatches, removed: Iterable[Unit] = ()) -> SourceLosses:
    """The loss of a model from which layers are removed, for each source of text."""
    halves, gone = SplitModel(model), list(removed)
    with eval_mode(model):
        return SourceLosses(halves, batches, lambda index: halves.hidden(batches.batches[index], gone))


def loss_without(model: nn.Module, batches: Any, removed: Iterable[Unit] = ()) -> float:
    """The loss of a model from which layers are removed, in nats per token, its mean over sources of text.

    `batches` are as `token_batches` takes them.
    """
    return losses_by_source(model, token_batches(batches, text_stack(model).model), removed).mean


def sweep_losses(
    model: nn.Module,
    batches: Any,
    removed: Iterable[Unit] = (),
    candidates: Iterable[Unit] | None = None,
    measure: str = "loss",
    progress: bool = True,
) -> dict[Any, float]:
    """The loss after removing one more layer, or the attention or the MLP of one, for each candidate.

    The states before every candidate are kept from one pass, and a candidate runs only the layers after it: half the
    layers on average. Memory: C states of one batch, shape (C, B, T, D), for C candidates.

    Args:
        model: a causal language model of a known family.
        batches: as `token_batches` takes it.
        removed: positions of layers that are removed already, and pairs such as ("attention", 3).
        candidates: what to try, each by itself on top of `removed`; None tries all layers that are left.
        measure: "loss", the mean cross-entropy of the next token, or "kl", the mean of KL(full || without) over all
            tokens, where full is the model with nothing removed.
        progress: show a progress bar.

    Returns:
        Candidate -> nats per token, in the order of the candidates.
    """
    found = sweep(model, token_batches(batches, text_stack(model).model), removed, candidates, measure, progress)[1]
    return {candidate: one.mean for candidate, one in found.items()}


def sweep(
    model: nn.Module,
    batches: TokenBatches,
    removed: Iterable[Unit],
    candidates: Iterable[Unit] | None,
    measure: str,
    progress: bool | Callable[[float], object],
) -> tuple[MeanLoss, dict[Any, MeanLoss]]:
    """`sweep_losses` with the loss of the model without `removed` (for "loss" only), and with losses by sequence.

    `progress` shows a bar, or is called with the fraction of the work done since the last call.
    """
    if measure not in ("loss", "kl"):
        raise ArgumentError("measure", measure, "'loss' or 'kl'")
    halves = SplitModel(model)
    layers = halves.stack.layers
    gone = set(_positions("removed", removed, len(layers)))
    if candidates is None:
        candidates = [i for i in range(len(layers)) if i not in gone]
    candidates = _positions("candidates", candidates, len(layers))
    if twice := gone.intersection(candidates):
        problem = f"layer {next(iter(twice))} is removed already; removed is {sorted(gone, key=str)}"
        raise ArgumentError("candidates", problem=problem)

    picked = [batch.attention_mask if measure == "kl" else predictions(batch)[0] for batch in batches]
    counts_S = torch.cat([picked_BT.sum(1) for picked_BT in picked])
    if not counts_S.sum():
        raise ArgumentError("data", problem="there is no token to predict; sequences must hold two tokens or more")
    current, totals = MeanLoss(counts_S), {candidate: MeanLoss(counts_S) for candidate in candidates}
    bar = logging.tqdm(
        total=1.0, desc=f"{measure} without a layer", disable=progress is not True, leave=False, bar_format=_BAR
    )
    advance = progress if callable(progress) else bar.update
    # For a batch the layers are one half of the work and the head is the other, near enough for a bar.
    share, sequences = 0.5 / max(len(batches), 1), 0
    used, states = set(map(layer_of, candidates)), dict[int, torch.Tensor]()
    score: Callable[[torch.Tensor], torch.Tensor]

    def keep(place: int, x_BTD: torch.Tensor) -> None:
        if place in used:
            states[place] = x_BTD

    with eval_mode(model), bar:
        for batch, picked_BT in zip(batches, picked, strict=True):
            targets_N = predictions(batch)[1]
            left = Counter(map(layer_of, candidates))
            with capture_residual_stream(halves.stack, keep):
                current_ND = pick_tokens(halves.hidden(batch, gone), picked_BT)
            full_ND = pick_tokens(halves.hidden(batch), picked_BT) if measure == "kl" and gone else current_ND
            finals: dict[Unit, torch.Tensor] = {}
            for candidate in totals:
                layer = layer_of(candidate)
                left[layer] -= 1
                # After its last use, the state that follows from it takes its place in memory.
                x_BTD = states[layer] if left[layer] else states.pop(layer)
                if layer == candidate:
                    final_BTD = halves.hidden(batch, gone, (layer, x_BTD))
                else:
                    final_BTD = halves.hidden(batch, [*gone, candidate], (layer - 1, x_BTD) if layer else None)
                finals[candidate] = pick_tokens(final_BTD, picked_BT)
                advance(share / len(candidates))
            sequences_N = sequences + picked_BT.nonzero()[:, 0]
            for part in halves.parts(len(full_ND)):
                if measure == "loss":
                    score = partial(token_losses, targets_N=targets_N[part])
                    current.add(score(halves.logits(current_ND[part])), sequences_N[part])
                else:
                    score = _divergence_from(halves.logits(full_ND[part]))
                for candidate, x_ND in finals.items():
                    totals[candidate].add(score(halves.logits(x_ND[part])), sequences_N[part])
                advance(share * len(full_ND[part]) / len(full_ND))
            sequences += len(picked_BT)
    return current, totals


def _divergence_from(full_NV: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    log_p_NV = upcast(full_NV).log_softmax(-1)
    p_NV = log_p_NV.exp()
    return lambda logits_NV: (p_NV * (log_p_NV - upcast(logits_NV).log_softmax(-1))).sum(-1)


def layer_of(unit: Unit) -> int:
    """The layer that a unit is, or is a part of."""
    return unit[1] if isinstance(unit, tuple) else unit


def _positions(argument: str, units: Iterable[Unit], num_layers: int) -> list[Unit]:
    units = list(units)
    for position in map(layer_of, units):
        if not is_integer(position) or not 0 <= position < num_layers:
            raise ArgumentError(argument, problem=f"layers are 0 to {num_layers - 1}, got {position!r}")
    return units
