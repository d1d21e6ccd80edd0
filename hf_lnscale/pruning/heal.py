"""Healing a model that layers are removed from, in closed form: no training, no new module, a plain checkpoint.

When layers are removed, the next kept layer reads states it was never trained on. The last kept layer before the cut is
changed so that its output comes close to the state that the full model has after the cut: the weights that produce its
MLP's output are refitted by least squares (ReplaceMe, arXiv 2505.02819, section 3). The MLPs before and after an
MLP that is missing, and that of a layer without attention, are refitted in the same way.

Five things decide whether that repairs a model or damages it:

- All tokens are fitted, the first of a sequence too. Massive activations (arXiv 2402.17762) arise on it in one layer's
  MLP. A fit that has not seen them turns them into noise that all other tokens attend to; that alone made a perplexity
  of 90 one of 2 million. In plain least squares they have the weight they need, as they are large.
- The ridge penalty is therefore measured by the median feature: by the mean, massive activations would drown the rest.
- The loss on held-out data decides what is kept, never the distance between states: the two need not agree.
- A fit learns the text it is fitted on. Several sources of text are fitted and judged together, and a fit that makes
  the model worse on one of them is moved back towards the old weights.
- A small held-out set picks too weak a penalty. The largest one within a standard error of the best is taken.

Shapes: B sequences, T tokens, N tokens of a batch that are real, D hidden size, I width of the MLP, F features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
from ..measuring.losses import SourceLosses, layer_of, perplexity_of
from ..measuring.sample import default_sources, with_default_sources
from ..measuring.split_model import SplitModel, returns_tuples
from ..measuring.stream import eval_mode
from ..measuring.text import Windows, token_batches
from .cut import Cut, normalize_layers
from .heal_fit import Repair, Stream, require_changeable
from .heal_report import HEALED_IN_MEMORY, Copy, HealedLayer, HealedSource, HealReport, restore
from .layers import note_text
from .plan import PruningPlan, units_of

__all__ = ["METHODS", "HealReport", "HealedLayer", "HealedSource", "Healer", "heal", "healed", "why_not_healable"]

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
    """Changes weights of kept layers, in place, so that the model does better without the layers that are to go.

    It removes nothing: call `drop_layers(model, layers)` afterwards. For a missing layer or MLP the last MLP before
    it is changed, for an MLP the next one after it too, and for a missing attention the MLP of its layer; layers
    before all that stay are not made up for. Each is healed, from the first to the last, on the states that the
    pruned model, healed so far, produces, to match those of the full model before the next MLP's layer. A step that
    does not lower the mean loss over the sources of held-out text is taken back, and one that raises it on any of
    them is moved back towards the old weights (W + t (V - W), t = 1/2, 1/4, 1/8) until it does not, so that the
    result is never worse on a judged source than before.

    With r the residual stream that the MLP's output u is added to, and y the full model's state to match, less what a
    layer without MLP adds to the stream in between, the methods minimize, over all real tokens of the calibration data,
    each source of text counting by its weight:

    - "refit": |y - r - V a|^2 + ridge |V - W|^2, where a, of shape (I,), is the input of `down_proj`, W its weight
      and V the new one. Needs two matrices of (I, I) and three of (I, D) in double precision beside the model. Experts
      have no common a: there, "linear".
    - "linear": |y - r - A u|^2 + ridge |A - I|^2, A of shape (D, D), as in ReplaceMe (arXiv 2505.02819, section 3,
      there without the pull towards I). Each weight W whose output u is made of becomes A W: `down_proj`, and with
      experts those of every expert, routed and shared. Gates and routing weights are scalars, so this is exact. The
      refit with V = A W is a special case of "refit".

    Where a norm follows the MLP (Gemma 2 and 3), the weights decide the direction of what is added and the norm's
    weight g the size of each channel. Both are fitted, one after the other: the weights to (y - r) / g, every token's
    target and output at a root mean square of 1, then g channel by channel to y - r.

    Args:
        model: the full causal language model, in memory.
        layers: positions to drop; negative ones count from the end. Or a plan.
        attention, mlp: positions of layers that lose their attention or MLP alone, as in `drop_layers`.
        data: calibration data, as `token_batches` takes it; one source of text or several, with weights. A source of
            weight 0 is judged, not fitted. None takes English and Python code, see `measuring.sample.default_sources`.
        method: one of `METHODS`.
        held_out: data to choose the penalty by and to measure on, whose sources are all judged; None holds a quarter of
            the sequences of each source out, and all of those of weight 0. Either way, English and Python code are
            fitted, with little weight, and judged beside a single source, see `measuring.sample.with_default_sources`.
        tokenizer, windows: see `token_batches`. With token ids, a tokenizer serves to judge on other text.
        cross_validate: also fit without each source in turn, at the chosen penalty, to estimate the perplexity on text
            that was never fitted. Costs about as much as one more penalty.
        progress: show a bar.

    Returns:
        A report, with figures before and after. It has no step for a cut before all layers that stay.

    Raises:
        ValueError: for unknown names, layers that do not exist, data without tokens to predict, a model without a
            language head, and weights that cannot be changed exactly: quantized, not in memory, wrapped by an adapter,
            or shared with another module.
        UnsupportedArchitectureError: if the family is not in the table, or if its MLP's output is not linear in these
            weights, as measured. The model is then as it was.
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


@contextmanager
def healed(model: nn.Module, layers: Iterable[int], data: Any = None, **options: Any) -> Iterator[HealReport]:
    """Within it, the model is healed as by `heal`; afterwards its weights are what they were, bit for bit.

    Args:
        model, layers, data, options: see `heal`.
    """
    report = heal(model, layers, data, **options)
    try:
        yield report
    finally:
        report.undo()
        report.forget()


class Healer:
    """Heals a model for several sets of layers, one after the other, running the full model once.

    The full model's states are kept where a cut begins or ends: for each such place, one state of (tokens, D) in the
    model's dtype, on the CPU, of all tokens of the data: 65,536 tokens at D = 4,096 in bfloat16 are 0.5 GiB a place. A
    contiguous block has two places, and neighbouring blocks share them. `forget` frees them.

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
        data = default_sources() if data is None else data
        batches = token_batches(data, self.stack.model, tokenizer=tokenizer, windows=windows)
        fitted = [name for name, weight in batches.weights.items() if weight > 0]
        if held_out is None:
            self.fitted, self.judged = batches.split(0.25, whole=batches.weights.keys() - set(fitted))
        else:
            self.fitted = batches.only(*fitted)
            self.judged = token_batches(held_out, self.stack.model, tokenizer=tokenizer, windows=windows)
        self.given = self.judged  # by which layers are chosen
        if len(self.fitted.weights) == len(self.given.weights) == 1:
            if tokenizer := self.given.tokenizer or batches.tokenizer or tokenizer:
                self.fitted, self.judged = with_default_sources(self.fitted, self.given, tokenizer)
            else:
                logger.warning(
                    "healing is fitted to and judged on one kind of text alone, and may do harm on others: `tokenizer` "
                    "is not given, which other text could be put beside these token ids with"
                )
        # Held-out data may be fitted data under another name.
        names, text = self.judged.weights.keys() - self.fitted.weights.keys(), sketch(self.fitted)
        self._fitted_too = {name for name in names if share_known(text, sequences_of(self.judged.only(name)))}
        self._halves = SplitModel(model)
        self._changed: list[Copy] = []
        self.forget()

    def forget(self) -> None:
        """Frees the full model's states. They are computed again when they are needed."""
        self._full = [{0: Stream(self._halves, batches)} for batches in (self.fitted, self.judged)]
        self._losses_full: SourceLosses | None = None

    @contextmanager
    def healed(self, layers: Iterable[int] | PruningPlan, **options: Any) -> Iterator[HealReport]:
        """Within it, the model is healed; afterwards its weights are what they were, bit for bit."""
        report = self.heal(layers, **options)
        try:
            yield report
        finally:
            report.undo()
            report.forget()

    def heal(
        self,
        layers: Iterable[int] | PruningPlan,
        *,
        attention: Iterable[int] | None = None,
        mlp: Iterable[int] | None = None,
        quick: bool = False,
        progress: bool = True,
    ) -> HealReport:
        """See `heal`. The model must be the full one as it was: undo the last report first.

        Args:
            quick: try the largest penalty alone, and do not cross-validate; to compare sets in less time.

        Raises:
            ValueError: also if the last report was not undone.
        """
        if any(not torch.equal(parameter.cpu(), original) for parameter, original in self._changed):
            raise ValueError("model: it is still healed for another set of layers; call undo() on that report first")
        stack = self.stack
        if isinstance(layers, PruningPlan):
            given: Any = replace(layers, perplexity={})  # that it has to be healed is known here
        else:
            given = normalize_layers(layers, len(stack.layers), "layers")
        cut = Cut.of(stack.model.config, given, attention, mlp)
        gaps = _gaps(stack, cut)
        for gap in gaps:
            require_changeable(self.model, stack, gap.layer)

        dropped = tuple(units_of(vars(cut)))
        originals: list[Copy] = []
        left_out: dict[str, float] = {}
        try:
            with eval_mode(self.model):
                if self._halves.tuples is None:
                    self._halves.tuples = returns_tuples(stack)
                # Before any weight is changed.
                start = min([*(gap.layer for gap in gaps), *map(layer_of, dropped)], default=0)
                full = self._keep([start, *(gap.end for gap in gaps)])
                pruned = [streams[start].without(dropped) for streams in full]
                if self._losses_full is None:
                    self._losses_full = full[1][max(full[1])].losses()
                losses = before = pruned[1].losses()
                steps = []
                for layer, end, gone in logging.tqdm(gaps, desc="heal", disable=not progress, leave=False):
                    pruned = [stream.at(layer) for stream in pruned]
                    targets = [a[end].target(b, layer + 1) for a, b in zip(full, pruned, strict=True)]
                    repair = Repair(stack, layer, self.method, self.fitted.weights, targets, pruned)
                    step, losses, changes = repair.heal(
                        gone, losses, originals, self.cross_validate and not quick, quick
                    )
                    for name, change in changes.items():
                        left_out[name] = left_out.get(name, 0.0) + change
                    steps.append(step)
        except BaseException:
            restore(originals)
            raise
        self._changed = list(originals)
        if originals:
            remember_source(stack.model.config, HEALED_IN_MEMORY)
        return HealReport(
            dropped=dropped,
            method=self.method,
            steps=tuple(steps),
            perplexity_full=perplexity_of(self._losses_full.mean),
            perplexity_before=perplexity_of(before.mean),
            perplexity_after=perplexity_of(losses.mean),
            sources={
                name: self._source(name, self._losses_full, before, losses, left_out.get(name)) for name in before.of
            },
            data={"calibration": self.fitted.describe(), "held_out": self.judged.describe()},
            _originals=originals,
            _config=stack.model.config,
        )

    def _keep(self, places: Iterable[int]) -> list[dict[int, Stream]]:
        for streams in self._full:
            for place in sorted(set(places) - streams.keys()):
                streams[place] = streams[max(below for below in streams if below < place)].at(place)
        return self._full

    def _source(
        self, name: str, full: SourceLosses, before: SourceLosses, after: SourceLosses, left_out: float | None
    ) -> HealedSource:
        weight = self.fitted.weights.get(name, 0.0)
        unseen = None if left_out is None else perplexity_of(before.of[name].mean + left_out)
        if not weight and name not in self._fitted_too:
            unseen = perplexity_of(after.of[name].mean)
        return HealedSource(
            weight=weight,
            perplexity_full=perplexity_of(full.of[name].mean),
            perplexity_before=perplexity_of(before.of[name].mean),
            perplexity_after=perplexity_of(after.of[name].mean),
            change=after.of[name].mean - before.of[name].mean,
            change_error=after.of[name].error(before.of[name]),
            perplexity_left_out=unseen,
        )


def why_not_healable(model: nn.Module) -> str | None:
    """The reason why `heal` would refuse a model, or None if it would not."""
    try:
        stack = text_stack(model)
        for layer in range(len(stack.layers)):
            if "mlp" not in missing(stack.layers[layer], stack.family):
                require_changeable(model, stack, layer)
    except ValueError as error:
        return str(error)
    return None


class _Gap(NamedTuple):
    """The missing parts around one MLP.

    Attributes:
        layer: the layer of the MLP.
        end: that of the next one, or the number of layers.
        gone: what is missing there; nothing for one that only follows a missing MLP.
    """

    layer: int
    end: int
    gone: tuple[Unit, ...]


def _gaps(stack: Stack, cut: Cut) -> list[_Gap]:
    """Divides what is missing among the MLPs that are left, in order."""
    total, units, start, behind = len(stack.layers), units_of(vars(cut)), 0, False
    left = [layer for layer in range(total) if layer not in (*cut.layers, *cut.mlp)]
    left = [layer for layer in left if "mlp" not in missing(stack.layers[layer], stack.family)]
    found = []
    for layer, end in zip(left, [*left[1:], total], strict=True):
        gone = tuple(unit for unit in units if start <= layer_of(unit) < end)
        if behind or not set(gone) <= set(range(layer)):  # whole layers before all MLPs are not made up for
            found.append(_Gap(layer, end, gone))
        start, behind = end, any(start <= position < end for position in cut.mlp)
    return found
