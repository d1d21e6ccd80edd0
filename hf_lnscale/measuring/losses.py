"""The loss of a model with layers left out.

Shapes: B batch, T tokens, N tokens picked out of B x T, D hidden size, V vocabulary, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging

from ..core.stack import text_stack
from .split_model import SplitModel, pick_tokens, predictions
from .stream import eval_mode, hidden_states
from .text import Batch, TokenBatches, token_batches

# Of a loss, in nats a token: what exp() still takes.
MOST_NATS = 700.0


def perplexity_of(loss: float) -> float:
    """exp(loss), loss in nats a token; infinite where that is no number any more."""
    return math.exp(loss) if loss < MOST_NATS else math.inf


def loss_without(model: nn.Module, batches: Any, removed: Iterable[int] = ()) -> float:
    """The loss of a model from which layers are removed, in nats a token: mean cross-entropy of the next token.

    Args:
        model: a causal language model of a known family.
        batches: as `token_batches` takes it.
        removed: positions of the layers that do not run; none gives the full model's loss.

    Raises:
        ValueError: for a position that does not exist, or if there is no token to predict.
    """
    return sweep(model, token_batches(batches, text_stack(model).model), removed, (), "loss", progress=False)[0]


class SourceLosses:
    """Losses of a model on several sources of text, kept for each sequence so that they have standard errors.

    Attributes:
        sums: name of the source -> sum of the cross-entropy over the tokens of each sequence, shape (S,), float64.
        counts: name of the source -> tokens that were predicted in each sequence, shape (S,).
    """

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, torch.Tensor] = {}

    def add(self, name: str, losses_N: torch.Tensor, picked_BT: torch.Tensor) -> None:
        """Adds a batch: the losses of the tokens picked out of (B, T), in that order."""
        counts_B = picked_BT.sum(1).cpu()
        parts = losses_N.cpu().double().split(counts_B.tolist())
        for found, values_B in ((self.sums, torch.stack([part.sum() for part in parts])), (self.counts, counts_B)):
            found[name] = torch.cat([found[name], values_B]) if name in found else values_B

    def require_tokens(self) -> None:
        """Raises a ValueError if a source has no token to predict."""
        empty = [name for name, counts_S in self.counts.items() if not counts_S.sum()]
        if empty or not self.counts:
            of = f" of {', '.join(empty)}" if len(self.counts) > 1 else ""
            raise ValueError(f"data: there is no token{of} to predict; sequences must hold two tokens or more")

    def of(self, name: str) -> float:
        """Mean loss of one source, nats a token."""
        return (self.sums[name].sum() / self.counts[name].sum()).item()

    def mean(self) -> float:
        """Mean over sources, each counted once: the logarithm of the geometric mean of their perplexities."""
        return sum(map(self.of, self.sums)) / len(self.sums)

    def change_error(self, before: SourceLosses, name: str) -> float:
        """Standard error of `self.of(name) - before.of(name)`, over sequences; NaN if there is one only."""
        counts_S = self.counts[name]
        differences_S = self.sums[name] - before.sums[name]
        rest_S = differences_S - counts_S * (differences_S.sum() / counts_S.sum())
        size = len(counts_S)
        return (
            (rest_S.square().sum() * size / (size - 1)).sqrt().item() / counts_S.sum().item() if size > 1 else math.nan
        )

    def mean_change_error(self, before: SourceLosses) -> float:
        """Standard error of `self.mean() - before.mean()`; sources of one sequence add nothing to it."""
        errors = [error for name in self.sums if not math.isnan(error := self.change_error(before, name))]
        return math.hypot(*errors) / len(self.sums)


def losses_by_source(model: nn.Module, batches: TokenBatches, removed: Iterable[int] = ()) -> SourceLosses:
    """The losses of a model from which layers are removed, for each source of text.

    Raises:
        ValueError: if there is no token to predict.
    """
    halves = SplitModel(model)
    losses = SourceLosses()
    with eval_mode(model):
        for batch in batches:
            losses.add(batch.name, *batch_losses(halves, batch, halves.hidden(batch, removed)))
    losses.require_tokens()
    return losses


def batch_losses(halves: SplitModel, batch: Batch, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of the tokens that a batch predicts, shape (N,), from the decoder's output, and which (B, T) these are."""
    picked_BT, targets_N = predictions(batch)
    x_ND = pick_tokens(x_BTD, picked_BT)
    parts = [token_cross_entropy(halves.logits(x_ND[part]), targets_N[part]).cpu() for part in halves.parts(len(x_ND))]
    return torch.cat(parts) if parts else torch.empty(0), picked_BT


def sweep_losses(
    model: nn.Module,
    batches: Any,
    removed: Iterable[int] = (),
    candidates: Iterable[int] | None = None,
    measure: str = "loss",
    progress: bool = True,
) -> dict[int, float]:
    """What the model loses by removing one more layer, for each candidate.

    The states in front of every candidate are kept from one pass, and a candidate runs only what comes after it: half
    the layers on average. Memory: C states of one batch, shape (C, B, T, D), for C candidates.

    Args:
        model: a causal language model of a known family.
        batches: as `token_batches` takes it.
        removed: positions of layers that are removed already.
        candidates: positions to try, each by itself on top of `removed`; None tries all that are left.
        measure: "loss", the mean cross-entropy of the next token, or "kl", the mean of KL(full || without) over all
            tokens, where full is the model with nothing removed.
        progress: show a progress bar.

    Returns:
        Candidate -> nats a token, in the order of the candidates.

    Raises:
        ValueError: for a position that does not exist or is removed already, an unknown measure, a model without a
            language head, or if there is no token to measure on.
    """
    batches = token_batches(batches, text_stack(model).model)
    return sweep(model, batches, removed, candidates, measure, progress)[1]


def sweep(
    model: nn.Module,
    batches: TokenBatches,
    removed: Iterable[int],
    candidates: Iterable[int] | None,
    measure: str,
    progress: bool | Callable[[float], object],
) -> tuple[float, dict[int, float]]:
    """Mean over tokens of the measure without `removed` (of "loss" only), and of that without each candidate too.

    `progress` says whether a bar is shown, or is called with the share of the work that was done since the last call.
    """
    if measure not in ("loss", "kl"):
        raise ValueError(f"measure must be 'loss' or 'kl', got {measure!r}")
    halves = SplitModel(model)
    layers = halves.stack.layers
    gone = set(_positions("removed", removed, len(layers)))
    if candidates is None:
        candidates = [i for i in range(len(layers)) if i not in gone]
    candidates = _positions("candidates", candidates, len(layers))
    if twice := gone.intersection(candidates):
        raise ValueError(f"candidates: layer {min(twice)} is removed already; removed is {sorted(gone)}")

    current, count = 0.0, 0
    totals = dict.fromkeys(candidates, 0.0)
    bar = logging.tqdm(
        total=len(batches) * len(candidates),
        desc=f"{measure} without a layer",
        disable=progress is not True,
        leave=False,
    )
    advance = progress if callable(progress) else None
    # Of a batch the layers are one half of the work and the head is the other, near enough for a bar.
    share = 0.5 / max(len(batches), 1)
    with eval_mode(model), bar:
        for batch in batches:
            picked_BT, targets_N = predictions(batch)
            if measure == "kl":
                picked_BT = batch.attention_mask
            states: dict[int, torch.Tensor] = {}
            with _keeping(layers, candidates, states):
                current_ND = pick_tokens(halves.hidden(batch, gone), picked_BT)
            full_ND = pick_tokens(halves.hidden(batch), picked_BT) if measure == "kl" and gone else current_ND
            finals: dict[int, torch.Tensor] = {}
            for candidate in totals:
                # A state is needed once; what comes of it takes its place in memory.
                start = (candidate, states.pop(candidate))
                finals[candidate] = pick_tokens(halves.hidden(batch, gone, start), picked_BT)
                bar.update()
                if advance:
                    advance(share / len(candidates))
            for part in halves.parts(len(full_ND)):
                if measure == "loss":
                    score = _cross_entropy_to(targets_N[part])
                    current += score(halves.logits(current_ND[part]))
                else:
                    score = _divergence_from(halves.logits(full_ND[part]))
                for candidate, x_ND in finals.items():
                    totals[candidate] += score(halves.logits(x_ND[part]))
                if advance:
                    advance(share * len(full_ND[part]) / len(full_ND))
            count += len(full_ND)
    if not count:
        raise ValueError("data: there is no token to predict; sequences must hold two tokens or more")
    return current / count, {candidate: total / count for candidate, total in totals.items()}


@contextmanager
def _keeping(layers: nn.ModuleList, positions: Iterable[int], states: dict[int, torch.Tensor]) -> Iterator[None]:
    """Within it, what goes into the layers at `positions` is put into `states`."""

    def keep(position: int) -> Any:
        return lambda layer, args, kwargs: states.__setitem__(position, hidden_states(args, kwargs))

    hooks = [layers[i].register_forward_pre_hook(keep(i), with_kwargs=True) for i in positions]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def token_cross_entropy(logits_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits_NV, targets_N.to(logits_NV.device), reduction="none")


def _cross_entropy_to(targets_N: torch.Tensor) -> Callable[[torch.Tensor], float]:
    return lambda logits_NV: _sum(token_cross_entropy(logits_NV, targets_N))


def _divergence_from(full_NV: torch.Tensor) -> Callable[[torch.Tensor], float]:
    log_p_NV = full_NV.log_softmax(-1)
    p_NV = log_p_NV.exp()

    def divergence(logits_NV: torch.Tensor) -> float:
        return _sum((p_NV * (log_p_NV - logits_NV.log_softmax(-1))).sum(-1))

    return divergence


# --- small things -----------------------------------------------------------------------------------


def _positions(argument: str, positions: Iterable[int], num_layers: int) -> list[int]:
    positions = list(positions)
    for position in positions:
        if not isinstance(position, int) or isinstance(position, bool) or not 0 <= position < num_layers:
            raise ValueError(f"{argument}: layers are 0 to {num_layers - 1}, got {position!r}")
    return positions


def _sum(values: torch.Tensor) -> float:
    return values.cpu().double().sum().item()
