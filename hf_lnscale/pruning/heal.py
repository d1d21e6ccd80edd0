"""Heals a model after removing layers, in closed form: no training, no new modules, a plain checkpoint.

docs/pruning.md describes the method. What else determines whether it repairs or damages a model:

- All tokens are fitted, including the first of each sequence. Massive activations (arXiv 2402.17762) arise on it in one
  layer's MLP. A fit that has not seen them turns them into noise that all other tokens attend to; this alone raised
  the perplexity from 90 to 2 million. Since they are large, plain least squares gives them the weight they need.
- For the same reason the ridge penalty is relative to the median feature: relative to the mean, massive activations
  would dominate it.
- The loss on held-out data decides what is kept, not the distance between states: the two need not agree.
- A small held-out set selects too weak a penalty, so the largest one within a standard error of the best is used.

Shapes: D hidden size, I MLP width.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils import logging

from ..core.record import known_text, remember_source
from ..core.stack import Stack, text_stack
from ..core.sublayers import Unit, missing
from ..core.warnings import warn
from ..measuring.known_text import caution, sequences_of, share_known, sketch
from ..measuring.losses import MeanLoss, SourceLosses, layer_of, perplexity_of
from ..measuring.sample import default_sources, with_default_sources
from ..measuring.split_model import SplitModel, returns_tuples
from ..measuring.stream import eval_mode
from ..measuring.text import Windows, token_batches
from .cut import Cut, normalize_layers
from .heal_fit import Repair, Stream, require_changeable
from .heal_report import HEALED_IN_MEMORY, Copy, HealedLayer, HealedSource, HealReport, restore
from .layers import note_text
from .plan import PruningPlan, by_kind, units_of

__all__ = ["METHODS", "HealReport", "Healer", "heal", "why_not_healable"]

METHODS = ("refit", "linear")

logger = logging.get_logger(__name__)


def heal(
    model: nn.Module,
    layers: Iterable[int] | PruningPlan,
    data: Any = None,
    *,
    attention: Iterable[int] | None = None,
    mlp: Iterable[int] | None = None,
    method: str = "refit",
    held_out: Any = None,
    tokenizer: Any = None,
    windows: Windows = Windows(num_tokens=16_384),
    cross_validate: bool = True,
    progress: bool = True,
) -> HealReport:
    """Changes weights of kept layers, in place, to compensate for layers that will be dropped.

    It removes nothing: call `drop_layers(model, layers)` afterwards. A missing layer or MLP is compensated by the last
    MLP before it, a missing MLP also by the next one after it, and a missing attention by the MLP of its layer. Layers
    dropped before all kept layers are not compensated. MLPs are refitted from first to last, on the states of the
    pruned model healed so far, to match the full model's states before the layer of the next MLP. A step that raises
    the loss on any source of held-out text is moved back towards the old weights (W + t (V - W), t = 1/2, 1/4, 1/8)
    until it does not, and undone if it then does not lower their mean.

    Let r be the residual stream that the MLP output u is added to, and y the full model's state to match, minus what a
    layer without MLP adds to the stream in between. The methods minimize, over all non-padding tokens of the
    calibration data, weighted by source:

    - "refit": |y - r - V a|^2 + ridge |V - W|^2, where a, of shape (I,), is the input of `down_proj`, W its weight
      and V the new weight. Needs two (I, I) and three (I, D) matrices in double precision in addition to the model.
      Falls back to "linear" for mixtures of experts, whose experts have no common a.
    - "linear": |y - r - A u|^2 + ridge |A - I|^2, with A of shape (D, D), as in ReplaceMe (arXiv 2505.02819, section 3,
      but without the pull towards I there). Each weight W that produces u is replaced by A W: `down_proj`, or the
      `down_proj` of every expert, routed and shared. Gates and routing weights are scalars, so this is exact. It is the
      special case V = A W of "refit".

    If a norm follows the MLP (Gemma 2 and 3), the weights determine the direction of what is added and the norm's
    weight g the size of each channel. They are fitted one after the other: the weights to (y - r) / g, with the target
    and output of every token normalized to a root mean square of 1, then g to y - r, channel by channel.

    Args:
        model: the full causal language model, in memory.
        layers: positions to drop (negative ones count from the end), or a plan.
        attention, mlp: positions of layers that lose only their attention or MLP, as in `drop_layers`.
        data: one source of text or several, with weights, see `token_batches`. A source of weight 0 is evaluated but
            not fitted. None uses `measuring.sample.default_sources`; t then starts at the value up to 1/2 that does
            best on each of these by a fit to the other, among those that make neither worse, or at 1 if
            only that makes neither worse.
        method: one of `METHODS`.
        held_out: data to choose the penalty and to evaluate on, including all its sources. None holds out a quarter of
            the sequences of each source, and all sequences of sources of weight 0. In either case, a single source is
            joined by default ones, see `measuring.sample.with_default_sources`.
        tokenizer, windows: see `token_batches`. With token ids, the tokenizer is used to evaluate on other text.
        cross_validate: whether to also fit without each source in turn, at the chosen penalty, to estimate the
            perplexity on text that was never fitted, and to choose t without data. Takes as long as one more penalty.
        progress: whether to show a progress bar.

    Returns:
        A report with results before and after. It has no step for layers dropped before all kept layers.

    Raises:
        ValueError: if a name is unknown, a layer does not exist, the data has no tokens to predict, the model has no
            language modeling head, or weights cannot be changed exactly because they are quantized, not in memory,
            wrapped by an adapter or shared with another module.
        UnsupportedArchitectureError: if the family is not in the table, or its MLP output is found not to be linear in
            these weights. The model is then unchanged.
    """
    healer = Healer(model, data, method=method, held_out=held_out, tokenizer=tokenizer, windows=windows,
                    cross_validate=cross_validate)  # fmt: skip
    config = healer.stack.model.config
    if warning := caution(config, sequences_of(healer.judged)):
        warn(f"held-out data: {warning}")
    report = healer.heal(layers, attention=attention, mlp=mlp, progress=progress)
    if report.kept:
        report.text_before.append(known_text(config))
        note_text(model, sketch(healer.fitted))
    return report


class Healer:
    """Heals a model for several sets of layers, one after the other, while running the full model only once.

    The full model's states are stored at both ends of each cut: one tensor of (tokens, D) per place, in the model's
    dtype, on the CPU. 65,536 tokens with D = 4,096 in bfloat16 take 0.5 GiB per place. A contiguous block has two
    places, shared with adjacent blocks. `forget` frees them.

    Args:
        model, data, method, held_out, tokenizer, windows, cross_validate: see `heal`.

    Raises:
        ValueError: see `heal`.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any = None,
        *,
        method: str = "refit",
        held_out: Any = None,
        tokenizer: Any = None,
        windows: Windows = Windows(num_tokens=16_384),
        cross_validate: bool = True,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        self.model, self.method, self.cross_validate = model, method, cross_validate
        self.stack = text_stack(model)
        given, data = data is not None, default_sources() if data is None else data
        batches = token_batches(data, self.stack.model, tokenizer=tokenizer, windows=windows)
        batches.given &= given
        fitted = [name for name, weight in batches.weights.items() if weight > 0]
        if held_out is None:
            self.fitted, self.judged = batches.split(0.25, whole=batches.weights.keys() - set(fitted))
        else:
            self.fitted = batches.only(*fitted)
            self.judged = token_batches(held_out, self.stack.model, tokenizer=tokenizer, windows=windows)
        self.held_out = self.judged  # without default sources; layers are chosen on it
        if len(self.fitted.weights) == len(self.held_out.weights) == 1:
            if tokenizer := self.held_out.tokenizer or batches.tokenizer or tokenizer:
                self.fitted, self.judged = with_default_sources(self.fitted, self.held_out, tokenizer)
            else:
                logger.warning(
                    "healing is fitted and evaluated on only one kind of text and may do harm on others; pass "
                    "`tokenizer` to add other text to these token ids"
                )
        # A held-out source may be the same text as a fitted one under another name.
        names, text = self.judged.weights.keys() - self.fitted.weights.keys(), sketch(self.fitted)
        self._fitted_too = {name for name in names if share_known(text, sequences_of(self.judged.only(name)))}
        self._split_model = SplitModel(model)
        self._changed: list[Copy] = []
        self.fit: HealReport | None = None  # the last full one of `healed`, set aside
        self.forget()

    def forget(self) -> None:
        """Frees the full model's states and known losses, which are recomputed when needed."""
        self._full = [{0: Stream(self._split_model, batches)} for batches in (self.fitted, self.judged)]
        # Losses before healing, by what is removed; a search adds those that it has measured.
        self.unhealed: dict[tuple[Unit, ...], SourceLosses] = {}

    @contextmanager
    def healed(self, units: Iterable[Unit], *, quick: bool = False, progress: bool = True) -> Iterator[HealReport]:
        """Context in which the model is healed. Restores the original weights on exit, bit for bit."""
        report = self.heal_again(units, quick, progress)
        try:
            yield report
        finally:
            report.set_aside()
            if quick:
                report.forget()
            else:
                self.fit = report

    def heal_again(self, units: Iterable[Unit], quick: bool = False, progress: bool = True) -> HealReport:
        """Heals the model for these units; reapplies `fit` if it was for the same ones."""
        parts = by_kind(units)
        if not quick and self.fit and list(self.fit.dropped) == units_of(parts):
            self.fit.redo()
            return self.fit
        return self.heal(**parts, quick=quick, progress=progress)

    def heal(
        self,
        layers: Iterable[int] | PruningPlan,
        *,
        attention: Iterable[int] | None = None,
        mlp: Iterable[int] | None = None,
        quick: bool = False,
        progress: bool = True,
    ) -> HealReport:
        """See `heal`. The model must have its original weights: undo the last report first.

        Args:
            quick: try only the largest penalty and do not cross-validate, to compare sets in less time.

        Raises:
            ValueError: also if the last report was not undone.
        """
        if any(not torch.equal(parameter.cpu(), original) for parameter, original in self._changed):
            raise ValueError("model: it is still healed for another set of layers; call undo() on that report first")
        stack = self.stack
        if isinstance(layers, PruningPlan):
            to_drop: Any = replace(layers, perplexity={})  # avoids the warning that the plan needs healing
        else:
            to_drop = normalize_layers(layers, len(stack.layers), "layers")
        cut = Cut.of(stack.model.config, to_drop, attention, mlp)
        gaps = _gaps(stack, cut)
        for gap in gaps:
            require_changeable(self.model, stack, gap.layer)
        originals: list[Copy] = []
        try:
            with eval_mode(self.model):
                report = self._repair(units_of(vars(cut)), gaps, originals, quick, progress)
        except BaseException:
            restore(originals)
            raise
        self._changed = list(originals)
        if originals:
            remember_source(stack.model.config, HEALED_IN_MEMORY)
        return report

    def _repair(
        self, dropped: list[Unit], gaps: list[_Gap], originals: list[Copy], quick: bool, progress: bool
    ) -> HealReport:
        """Repairs one gap after the other, and adds copies of the weights that it changes to `originals`."""
        stack = self.stack
        if self._split_model.tuples is None:
            self._split_model.tuples = returns_tuples(stack)
        # Computed before any weight is changed.
        start = min([*(gap.layer for gap in gaps), *map(layer_of, dropped)], default=0)
        full = self._full
        for streams in full:
            for place in sorted({start, *(gap.end for gap in gaps)} - streams.keys()):
                streams[place] = streams[max(below for below in streams if below < place)].at(place)
        pruned = [replace(streams[start], removed=frozenset(dropped)) for streams in full]
        whole = self._losses_unhealed((), full[1][max(full[1])])
        losses = before = self._losses_unhealed(tuple(dropped), pruned[1])
        steps: list[HealedLayer] = []
        left_out: dict[str, float] = {}
        for layer, end, parts in logging.tqdm(gaps, desc="heal", disable=not progress, leave=False):
            pruned = [stream.at(layer) for stream in pruned]
            targets = [a[end].target(b, layer + 1) for a, b in zip(full, pruned, strict=True)]
            repair = Repair(stack, layer, self.method, targets, pruned)
            originals += repair.originals
            step, losses, changes = repair.heal(parts, losses, self.cross_validate and not quick, quick)
            if not step.kept:
                del originals[-len(repair.originals) :]
            left_out |= {name: left_out.get(name, 0.0) + change for name, change in changes.items()}
            steps.append(step)
        found = {"full": whole, "before": before, "after": losses}
        return HealReport(
            dropped=tuple(dropped),
            method=self.method,
            steps=tuple(steps),
            sources={name: self._source(name, found, left_out.get(name)) for name in before.of},
            data={"calibration": self.fitted.describe(), "held_out": self.judged.describe()},
            _originals=originals,
            _config=stack.model.config,
            **_perplexities(found),
        )

    def _losses_unhealed(self, units: tuple[Unit, ...], stream: Stream) -> SourceLosses:
        """The losses without some units before healing, continued from `stream` where they are not known yet."""
        losses = self.unhealed.get(units)
        if losses is None:
            losses = self.unhealed[units] = stream.losses()
        elif unknown := [name for name in self.judged.weights if name not in losses.of]:
            losses.of |= stream.losses(*unknown).of
        return losses

    def _source(self, name: str, found: dict[str, SourceLosses], left_out: float | None) -> HealedSource:
        of = {which: losses.of[name] for which, losses in found.items()}
        before, after, weight = of["before"], of["after"], self.fitted.weights.get(name, 0.0)
        unseen = None if left_out is None else perplexity_of(before.mean + left_out)
        if not weight and name not in self._fitted_too:
            unseen = perplexity_of(after.mean)
        return HealedSource(
            weight=weight,
            change=after.mean - before.mean,
            change_error=after.error(before),
            perplexity_left_out=unseen,
            **_perplexities(of),
        )


def _perplexities(found: Mapping[str, SourceLosses | MeanLoss]) -> dict[str, Any]:
    """The perplexity of each loss, and those standard errors that are known, as fields of a report."""
    perplexities = {which: perplexity_of(loss.mean) for which, loss in found.items()}
    errors = {which: error for which, loss in found.items() if (error := loss.error()) is not None}
    return {f"perplexity_{which}": value for which, value in perplexities.items()} | {
        "errors": {which: perplexities[which] * error for which, error in errors.items()}
    }


def why_not_healable(model: nn.Module) -> str | None:
    """The reason why `heal` cannot heal a model, or None."""
    try:
        stack = text_stack(model)
        for layer in range(len(stack.layers)):
            if "mlp" not in missing(stack.layers[layer], stack.family):
                require_changeable(model, stack, layer)
    except ValueError as error:
        return str(error)
    return None


class _Gap(NamedTuple):
    """The missing parts that one MLP compensates for."""

    layer: int  # the layer of the MLP
    end: int  # the layer of the next MLP, or the number of layers
    parts: tuple[Unit, ...]  # what is missing between them; empty for an MLP that only follows a missing one


def _gaps(stack: Stack, cut: Cut) -> list[_Gap]:
    """Assigns the missing parts to the remaining MLPs, in order."""
    total, units, start, after_missing_mlp = len(stack.layers), units_of(vars(cut)), 0, False
    left = [layer for layer in range(total) if layer not in (*cut.layers, *cut.mlp)]
    left = [layer for layer in left if "mlp" not in missing(stack.layers[layer], stack.family)]
    gaps = []
    for layer, end in itertools.pairwise([*left, total]):
        parts = tuple(unit for unit in units if start <= layer_of(unit) < end)
        if after_missing_mlp or not set(parts) <= set(range(layer)):  # layers dropped before all MLPs are skipped
            gaps.append(_Gap(layer, end, parts))
        start, after_missing_mlp = end, any(start <= position < end for position in cut.mlp)
    return gaps
