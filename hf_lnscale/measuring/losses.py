"""The loss of a model without some layers or sub-layers.

Shapes: B batch, T tokens, N selected tokens of B x T, S sequences, D hidden size, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging

from ..core.config import is_integer
from ..core.errors import ArgumentError
from ..core.sublayers import Unit
from .split_model import SplitModel, pick_tokens, predictions
from .stream import capture_residual_stream, eval_mode, upcast
from .text import Batch, TokenBatches
from .uncertainty import ratio_residuals, standard_error

# Largest loss (nats per token) before exp() overflows.
MOST_NATS = 700.0
# Number of logits to upcast at once on a CPU; small enough for malloc to reuse the memory.
_UPCAST_LOGITS = 2**20
_BAR = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"


def perplexity_of(loss: float) -> float:
    """exp(loss), with the loss in nats per token; infinity on overflow."""
    return math.exp(loss) if loss < MOST_NATS else math.inf


def why_not_finite(model: nn.Module) -> str:
    """The reason why values computed by a model are not finite, or what to do about it."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not weight.is_meta and not weight.isfinite().all():
            return f"the weight {name} is not finite"
    if any(weight.dtype == torch.float16 for weight in model.parameters()):
        return "load the model in bfloat16 or float32"
    return "its activations overflow"


def token_losses(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each token in nats, shape (N,), computed in at least float32."""
    size = max(1, _UPCAST_LOGITS // logits_NV.shape[1] if logits_NV.device.type == "cpu" else len(logits_NV))
    # `split` rather than slices, since the backward of each slice would allocate a gradient for all logits.
    parts = zip(logits_NV.split(size), targets_N.to(logits_NV.device).split(size), strict=True)
    return torch.cat([F.cross_entropy(upcast(some_NV), some_N, reduction="none") for some_NV, some_N in parts])


def loss_gradient(split_model: SplitModel, x_ND: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Gradient of the loss, summed over tokens, with respect to the head's input, shape (N, D)."""
    leaf_ND = x_ND.detach().requires_grad_()
    gradient_ND = torch.zeros_like(leaf_ND)
    with torch.enable_grad():
        for part in split_model.parts(len(leaf_ND)):
            loss = token_losses(split_model.logits(leaf_ND[part]), targets_N[part]).sum()
            gradient_ND += torch.autograd.grad(loss, leaf_ND)[0]
    return gradient_ND


class MeanLoss:
    """A mean over tokens, in nats, accumulated by sequence to compute its standard error.

    Attributes:
        total: sum over tokens.
        sums_S: sum over the tokens of each sequence, float64.
        counts_S: number of tokens in each sequence; shared by the losses of a sweep.
    """

    def __init__(self, counts_S: torch.Tensor) -> None:
        self.total, self.counts_S = 0.0, counts_S
        self.sums_S = torch.zeros(len(counts_S), dtype=torch.float64)

    def add(self, values_N: torch.Tensor, sequences_N: torch.Tensor) -> None:
        values_N = values_N.cpu().double()
        self.total += values_N.sum().item()
        self.sums_S.index_add_(0, sequences_N, values_N)

    @property
    def mean(self) -> float:
        return self.total / int(self.counts_S.sum())

    def error(self, reference: MeanLoss | None = None) -> float | None:
        """Standard error of the mean, or of its difference to a reference; None for a single sequence."""
        used_S = self.counts_S > 0
        residuals_S = ratio_residuals(self.sums_S[used_S], self.counts_S[used_S], self.mean)
        if reference is not None:
            residuals_S -= ratio_residuals(reference.sums_S[used_S], self.counts_S[used_S], reference.mean)
        return standard_error(residuals_S)


class SourceLosses:
    """The loss of a model on each source of text, accumulated batch by batch; `of` maps names of sources to losses."""

    def __init__(self, split_model: SplitModel, batches: TokenBatches) -> None:
        counts: dict[str, list[torch.Tensor]] = defaultdict(list)
        for batch in batches:
            counts[batch.name].append(predictions(batch)[0].sum(1))
        self.of = {name: MeanLoss(torch.cat(parts)) for name, parts in counts.items()}
        for name, loss in self.of.items():
            if not loss.counts_S.sum():
                problem = f"{name} has no token to predict; sequences must have at least two tokens"
                raise ArgumentError("data", problem=problem)
        self._split_model, self._sequences = split_model, Counter[str]()

    def add(self, batch: Batch, x_BTD: torch.Tensor) -> None:
        """Adds the next batch, given the decoder's output for it."""
        picked_BT, targets_N = predictions(batch)
        x_ND = pick_tokens(x_BTD, picked_BT)
        sequences_N = self._sequences[batch.name] + picked_BT.nonzero()[:, 0]
        for part in self._split_model.parts(len(x_ND)):
            losses_N = token_losses(self._split_model.logits(x_ND[part]), targets_N[part])
            self.of[batch.name].add(losses_N, sequences_N[part])
        self._sequences[batch.name] += len(picked_BT)

    @property
    def mean(self) -> float:
        """Unweighted mean over sources: the logarithm of the geometric mean of their perplexities."""
        return sum(loss.mean for loss in self.of.values()) / len(self.of)

    def error(self, reference: SourceLosses | None = None) -> float:
        """Standard error of the mean, or of its difference to a reference; single-sequence sources count as 0."""
        errors = [loss.error(reference.of[name] if reference else None) or 0.0 for name, loss in self.of.items()]
        return math.hypot(*errors) / len(self.of)


def losses_by_source(model: nn.Module, batches: TokenBatches, removed: Iterable[Unit] = ()) -> SourceLosses:
    """The loss of a model without the removed layers, for each source of text."""
    split_model, removed = SplitModel(model), list(removed)
    losses = SourceLosses(split_model, batches)
    with eval_mode(model):
        for batch in batches:
            losses.add(batch, split_model.hidden(batch, removed))
    return losses


def sweep(
    model: nn.Module,
    batches: TokenBatches,
    removed: Iterable[Unit] = (),
    candidates: Iterable[Unit] | None = None,
    measure: str = "loss",
    progress: bool | Callable[[float], object] = True,
) -> tuple[MeanLoss, dict[Any, MeanLoss]]:
    """The loss without `removed` (for "loss" only), and after removing one more layer or sub-layer, for each candidate.

    One pass stores the states before every candidate, so each candidate runs only the layers after it: half the layers
    on average. Memory: C states of one batch, shape (C, B, T, D), for C candidates.

    Args:
        removed: layers and sub-layers already removed.
        candidates: None tries all remaining layers.
        measure: "loss", the cross-entropy of the next token, or "kl", over all tokens KL(full || without), where "full"
            is the model with nothing removed.
        progress: may be a function that is called with the fraction of work done since its last call.
    """
    if measure not in ("loss", "kl"):
        raise ArgumentError("measure", measure, "'loss' or 'kl'")
    split_model = SplitModel(model)
    num_layers = len(split_model.stack.layers)
    removed = set(_positions("removed", removed, num_layers))
    if candidates is None:
        candidates = [layer for layer in range(num_layers) if layer not in removed]
    candidates = _positions("candidates", candidates, num_layers)
    if twice := removed.intersection(candidates):
        problem = f"layer {next(iter(twice))} is already removed; removed is {sorted(removed, key=str)}"
        raise ArgumentError("candidates", problem=problem)
    picked = [batch.attention_mask if measure == "kl" else predictions(batch)[0] for batch in batches]
    counts_S = torch.cat([picked_BT.sum(1) for picked_BT in picked])
    if not counts_S.sum():
        raise ArgumentError("data", problem="contains no token to predict; sequences must have at least two tokens")
    current, totals = MeanLoss(counts_S), {candidate: MeanLoss(counts_S) for candidate in candidates}
    bar = logging.tqdm(total=1.0, desc=f"{measure} without a layer", disable=progress is not True, leave=False,
                       bar_format=_BAR)  # fmt: skip
    advance = progress if callable(progress) else bar.update
    # For the progress bar, layers and head are assumed to take half of the time each.
    share, sequences = 0.5 / max(len(batches), 1), 0
    with eval_mode(model), bar:
        for batch, picked_BT in zip(batches, picked, strict=True):
            outputs = _outputs_without(split_model, batch, removed, [[candidate] for candidate in totals])
            full_ND = pick_tokens(next(outputs), picked_BT)
            if measure == "kl" and removed:
                full_ND = pick_tokens(split_model.hidden(batch), picked_BT)
            finals = []
            for x_BTD in outputs:
                finals.append(pick_tokens(x_BTD, picked_BT))
                advance(share / len(totals))
            targets_N, sequences_N = predictions(batch)[1], sequences + picked_BT.nonzero()[:, 0]
            for part in split_model.parts(len(full_ND)):
                if measure == "loss":
                    score = partial(token_losses, targets_N=targets_N[part])
                    current.add(score(split_model.logits(full_ND[part])), sequences_N[part])
                else:
                    log_p_NV = upcast(split_model.logits(full_ND[part])).log_softmax(-1)
                    score = partial(_divergence, log_p_NV, log_p_NV.exp())
                for total, x_ND in zip(totals.values(), finals, strict=True):
                    total.add(score(split_model.logits(x_ND[part])), sequences_N[part])
                advance(share * len(full_ND[part]) / len(full_ND))
            sequences += len(picked_BT)
    return current, totals


def losses_of_sets(
    model: nn.Module, batches: TokenBatches, sets: Sequence[Sequence[Unit]], progress: bool = True
) -> list[SourceLosses]:
    """The loss of the model without each set of units, on each source of text.

    Each set runs from its first layer on, starting from states of the full model that are stored in one pass.
    """
    split_model = SplitModel(model)
    losses = [SourceLosses(split_model, batches) for _ in sets]
    with eval_mode(model):
        for batch in logging.tqdm(batches, desc="proposals", disable=not progress, leave=False):
            outputs = _outputs_without(split_model, batch, set(), sets)
            next(outputs)
            for loss, x_BTD in zip(losses, outputs, strict=True):
                loss.add(batch, x_BTD)
    return losses


def _outputs_without(
    split_model: SplitModel, batch: Batch, removed: set[Unit], sets: Sequence[Sequence[Unit]]
) -> Iterator[torch.Tensor]:
    """The decoder's output without `removed`, then without each set as well, from its first layer on."""
    first_of = [min(map(layer_of, units)) for units in sets]
    left, states = Counter(first_of), dict[int, torch.Tensor]()

    def keep(place: int, x_BTD: torch.Tensor) -> None:
        if place in left:
            states[place] = x_BTD

    with capture_residual_stream(split_model.stack, keep):
        output_BTD = split_model.hidden(batch, removed)
    yield output_BTD
    del output_BTD
    for first, units in zip(first_of, sets, strict=True):
        left[first] -= 1
        # After its last use, a state is released to make room for the next one.
        x_BTD = states[first] if left[first] else states.pop(first)
        # A layer of which only a part is removed runs as well.
        skipped = first if first in units else first - 1
        start = (skipped, x_BTD) if skipped >= 0 else None
        yield split_model.hidden(batch, removed.union(units), start)


def _divergence(log_p_NV: torch.Tensor, p_NV: torch.Tensor, logits_NV: torch.Tensor) -> torch.Tensor:
    return (p_NV * (log_p_NV - upcast(logits_NV).log_softmax(-1))).sum(-1)


def layer_of(unit: Unit) -> int:
    """The layer that a unit is or belongs to."""
    return unit[1] if isinstance(unit, tuple) else unit


def _positions(argument: str, units: Iterable[Unit], num_layers: int) -> list[Unit]:
    units = list(units)
    for position in map(layer_of, units):
        if not is_integer(position) or not 0 <= position < num_layers:
            raise ArgumentError(argument, problem=f"layers are 0 to {num_layers - 1}, got {position!r}")
    return units
