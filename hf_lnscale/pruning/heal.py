"""Healing a model that layers are removed from, in closed form: no training, no new module, a plain checkpoint.

When layers are removed, the next kept layer reads states it was never trained on. The last kept layer before the cut is
changed so that its output comes close to the state that the full model has after the cut: the weights that produce its
MLP's output are refitted by least squares (ReplaceMe, arXiv 2505.02819, section 3).

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

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from statistics import geometric_mean
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils import logging

from ..core.display import as_text, terminal
from ..core.families import UnsupportedArchitectureError, submodule
from ..core.record import remember_source
from ..core.stack import Stack, text_stack
from ..measuring.losses import SourceLosses, perplexity_of
from ..measuring.sample import default_sources, with_default_sources
from ..measuring.split_model import SplitModel, returns_tuples
from ..measuring.stream import eval_mode, hidden_states, layer_output
from ..measuring.text import TokenBatches, Windows, token_batches
from .layers import normalize_layers
from .plan import PruningPlan

__all__ = ["METHODS", "HealReport", "HealedLayer", "HealedSource", "Healer", "heal", "healed", "why_not_healable"]

# How the name of a healed model says that its weights are not those of the checkpoint any more.
HEALED_IN_MEMORY = "healed"
METHODS = ("refit", "linear")

logger = logging.get_logger(__name__)

# The MLP, and the weights whose output it adds up, from a decoder layer. All that a layer has are changed: dense layers
# have the first, mixtures of experts the others. Every one is (..., D, I), output channels first.
_MLP = "mlp"
_OUTPUT_WEIGHTS = (
    "mlp.down_proj",
    "mlp.experts.down_proj",
    "mlp.shared_expert.down_proj",
    "mlp.shared_experts.down_proj",
)
# A norm on the MLP's output, from a decoder layer (Gemma 2 and 3).
_OUTPUT_NORM = "post_feedforward_layernorm"
# Ridge penalties, in units of the median of the features' second moments, largest first; tried until one does worse.
_RIDGES = (3.0, 0.3, 0.03, 0.003)
# Fractions of the change that are tried while a source of text is worse off with the fit than without.
_BLENDS = (1.0, 0.5, 0.25, 0.125)
# Relative; how far the changed weights' output may be from what was fitted.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
# Tokens in double precision at a time, as a fraction of the features: few beside a matrix of (F, F).
_TOKENS_PER_FEATURE, _LEAST_TOKENS = 1 / 64, 64


@dataclass(frozen=True)
class HealedLayer:
    """One kept layer before a cut, and the fit that was tried on it. Losses are means over the judged sources.

    Attributes:
        layer: its position in the full model; None for a cut with no kept layer before it.
        dropped: positions of the layers that are cut out right after it.
        method: the method of the fit; "linear" where a mixture of experts rules out "refit".
        ridge: the penalty that was chosen, in units of the median second moment of the features; infinity leaves the
            layer as it is.
        blend: the fraction of the fitted change that was made; below 1 if all of it made a source of text worse.
        error_before: relative error of the residual stream after the cut on held-out tokens: the root of the mean over
            tokens of |state - full model's state|^2 / |full model's state|^2.
        error_after: the same with the chosen fit.
        loss_before: of the pruned model on held-out data before this step, nats a token.
        loss_after: the same after it.
        kept: whether the weights were changed.
        reason: why they were not, or "".
    """

    layer: int | None
    dropped: tuple[int, ...]
    method: str
    ridge: float = math.inf
    blend: float = 1.0
    error_before: float | None = None
    error_after: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    kept: bool = False
    reason: str = ""


@dataclass(frozen=True)
class HealedSource:
    """The effect of healing on one source of text, on its held-out part.

    Attributes:
        weight: how much it counted in the fit; 0 for a source that was only judged.
        perplexity_full, perplexity_before, perplexity_after: with all layers, without the dropped ones, and healed.
        change: of the loss by healing, nats a token; never above 0.
        change_error: its standard error over sequences; None if there is one only.
        perplexity_left_out: estimate of `perplexity_after` for a fit without this source (the changes that each step's
            fit to the other sources makes, added up): what text that was never fitted can expect. It is
            `perplexity_after` where `weight` is 0, and None if this is the only source or it was not asked for.
    """

    weight: float
    perplexity_full: float
    perplexity_before: float
    perplexity_after: float
    change: float
    change_error: float | None
    perplexity_left_out: float | None = None


@dataclass(frozen=True, eq=False)
class HealReport:
    """The result of healing. Perplexities are on the held-out data, which the penalties were chosen on too, and are
    geometric means over the sources of text, each counted once.

    Attributes:
        dropped: positions of the layers that are removed.
        method: as given.
        steps: one entry for each layer that was tried, in order.
        perplexity_full: of the model with all its layers.
        perplexity_before: without the dropped ones.
        perplexity_after: the same, healed; never above `perplexity_before`.
        sources: the same for each source of text, by name.
        data: `calibration` and `held_out`, as `TokenBatches.describe` records them.
    """

    dropped: tuple[int, ...]
    method: str
    steps: tuple[HealedLayer, ...]
    perplexity_full: float
    perplexity_before: float
    perplexity_after: float
    sources: dict[str, HealedSource]
    data: dict[str, Any]
    _originals: list[_Copy] = field(default_factory=list, repr=False)
    _config: Any = field(default=None, repr=False)

    @property
    def never_fitted(self) -> dict[str, float]:
        """What text can expect that was never fitted: `full`, `before` and `after`, from `perplexity_left_out`.

        The geometric means over the sources that have it; empty if none does.
        """
        found = [one for one in self.sources.values() if one.perplexity_left_out is not None]
        names = {"full": "perplexity_full", "before": "perplexity_before", "after": "perplexity_left_out"}
        return {name: geometric_mean(getattr(one, value) for one in found) for name, value in names.items() if found}

    @property
    def kept(self) -> bool:
        """Whether any weight was changed."""
        return any(step.kept for step in self.steps)

    def undo(self) -> None:
        """Writes the weights back as they were, bit for bit. Works after the layers were taken out, too.

        The report holds a copy of each changed weight for this, on the CPU. `forget` frees them.
        """
        _restore(self._originals)
        if self._originals:
            remember_source(self._config, "")

    def set_aside(self) -> Callable[[], None]:
        """Undoes the healing, and returns a function that applies it again. That holds a copy of the healed weights."""
        healed = _copies(parameter for parameter, _ in self._originals)
        self.undo()

        def again() -> None:
            _restore(healed)
            if healed:
                remember_source(self._config, HEALED_IN_MEMORY)

        return again

    def forget(self) -> None:
        """Frees the copies of the old weights; `undo` does nothing from then on."""
        self._originals.clear()

    def to_dict(self) -> dict[str, Any]:
        """For JSON. An infinite `ridge` is None."""
        steps = [asdict(step) for step in self.steps]
        for step in steps:
            step["dropped"] = list(step["dropped"])
            step["ridge"] = None if math.isinf(step["ridge"]) else step["ridge"]
        return {
            "dropped": list(self.dropped),
            "method": self.method,
            "perplexity": {
                "full": self.perplexity_full,
                "before": self.perplexity_before,
                "after": self.perplexity_after,
            },
            "never_fitted": self.never_fitted,
            "sources": {name: asdict(source) for name, source in self.sources.items()},
            "steps": steps,
            "data": self.data,
        }

    def __str__(self) -> str:
        title = (
            f"Healing without layers {', '.join(map(str, self.dropped))}: perplexity {self.perplexity_before:.2f} to "
            f"{self.perplexity_after:.2f} (all layers {self.perplexity_full:.2f})"
        )
        steps, sources = [], []
        for step in self.steps:
            done = f"{step.blend:g} of it" if step.blend < 1 else "yes"
            before_after = ["", ""]
            if step.loss_before is not None and step.loss_after is not None:
                before_after = [
                    f"{step.error_before:.3f} to {step.error_after:.3f}",
                    f"{perplexity_of(step.loss_before):.2f} to {perplexity_of(step.loss_after):.2f}",
                ]
            steps.append([
                "-" if step.layer is None else str(step.layer),
                ", ".join(map(str, step.dropped)),
                step.method,
                "-" if math.isinf(step.ridge) else f"{step.ridge:g}",
                *before_after,
                done if step.kept else f"no: {step.reason}",
            ])  # fmt: skip
        for name, source in self.sources.items():
            error = "" if source.change_error is None else f" +- {source.change_error:.1%}"
            sources.append([
                name,
                f"{source.weight:g}" if source.weight else "judged only",
                f"{source.perplexity_full:.2f}",
                f"{source.perplexity_before:.2f}",
                f"{source.perplexity_after:.2f} ({math.expm1(source.change):+.1%}{error})",
                "-" if source.perplexity_left_out is None else f"{source.perplexity_left_out:.2f}",
            ])  # fmt: skip
        return as_text(
            terminal(["layer", "cut after it", "method", "ridge", "error", "perplexity", "kept"], steps, title),
            terminal(["source", "weight", "all layers", "without", "healed", "never fitted"], sources, "Perplexity"),
        )


def heal(
    model: nn.Module,
    layers: Iterable[int] | PruningPlan,
    data: Any = None,
    *,
    method: str = "refit",
    held_out: Any = None,
    tokenizer: Any = None,
    windows: Windows = Windows(num_tokens=16_384),
    cross_validate: bool = True,
    progress: bool = True,
) -> HealReport:
    """Changes weights of kept layers, in place, so that the model does better without the layers that are to go.

    It removes nothing: call `drop_layers(model, layers)` afterwards. The last kept layers before each cut are healed
    from the first to the last, each on the states that the pruned model, healed so far, produces, to match those of the
    full model. A step that does not lower the mean loss over the sources of held-out text is taken back, and one that
    raises it on any of them is moved back towards the old weights (W + t (V - W), t = 1/2, 1/4, 1/8) until it does not,
    so that the result is never worse on a judged source than before.

    With r the residual stream that the MLP's output u is added to, and y the full model's state after the cut, the
    methods minimize, over all real tokens of the calibration data, each source of text counting by its weight:

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
        data: calibration data, as `token_batches` takes it; one source of text or several, with weights. A source of
            weight 0 is judged, not fitted. None takes English and Python code, see `measuring.sample.default_sources`.
        method: one of `METHODS`.
        held_out: data to choose the penalty by and to measure on, whose sources are all judged; None holds a quarter of
            the sequences of each source out, and all of those of weight 0. Either way, English and Python code are
            judged beside a single source, see `measuring.sample.with_default_sources`.
        tokenizer, windows: see `token_batches`. With token ids, a tokenizer serves to judge on other text.
        cross_validate: also fit without each source in turn, at the chosen penalty, to estimate the perplexity on text
            that was never fitted. Costs about as much as one more penalty.
        progress: show a bar.

    Returns:
        A report, with figures before and after. A cut before the first kept layer cannot be healed; the report says so.

    Raises:
        ValueError: for unknown names, layers that do not exist, data without tokens to predict, a model without a
            language head, and weights that cannot be changed exactly: quantized, not in memory, wrapped by an adapter,
            or shared with another module.
        UnsupportedArchitectureError: if the family is not in the table, or if its MLP's output is not linear in these
            weights, as measured. The model is then as it was.
    """
    healer = Healer(model, data, method=method, held_out=held_out, tokenizer=tokenizer, windows=windows,
                    cross_validate=cross_validate)  # fmt: skip
    return healer.heal(layers, progress=progress)


@contextmanager
def healed(model: nn.Module, layers: Iterable[int], data: Any = None, **options: Any) -> Iterator[HealReport]:
    """Within it, the model is healed as by `heal`; afterwards its weights are what they were, bit for bit.

    Args:
        model, layers, data, options: see `heal`.
    """
    progress = options.pop("progress", True)
    with Healer(model, data, **options).healed(layers, progress) as report:
        yield report


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
        self.given = self.judged
        if len(self.given.weights) == 1:
            if tokenizer := self.given.tokenizer or batches.tokenizer or tokenizer:
                self.judged = with_default_sources(self.given, tokenizer)
            else:
                logger.warning(
                    "healing is fitted to and judged on one kind of text alone, and may do harm on others: `tokenizer` "
                    "is not given, which these token ids could be judged beside other text with"
                )
        self._halves = SplitModel(model)
        self._changed: list[_Copy] = []
        self.forget()

    def forget(self) -> None:
        """Frees the full model's states. They are computed again when they are needed."""
        self._full = [{0: _Stream(self._halves, batches)} for batches in (self.fitted, self.judged)]
        self._losses_full: SourceLosses | None = None

    @contextmanager
    def healed(self, layers: Iterable[int] | PruningPlan, progress: bool = True) -> Iterator[HealReport]:
        """Within it, the model is healed; afterwards its weights are what they were, bit for bit."""
        report = self.heal(layers, progress)
        try:
            yield report
        finally:
            report.undo()
            report.forget()

    def heal(self, layers: Iterable[int] | PruningPlan, progress: bool = True) -> HealReport:
        """See `heal`. The model must be the full one as it was: undo the last report first.

        Raises:
            ValueError: also if the last report was not undone.
        """
        if any(not torch.equal(parameter.cpu(), original) for parameter, original in self._changed):
            raise ValueError("model: it is still healed for another set of layers; call undo() on that report first")
        stack = self.stack
        if isinstance(layers, PruningPlan):
            layers.require_made_for(stack.model.config)
            layers = layers.layers
        dropped = normalize_layers(layers, len(stack.layers), "layers")
        cuts = _cuts(dropped, len(stack.layers))
        for layer, _ in cuts:
            if layer is not None:
                _require_changeable(self.model, stack, layer)

        originals: list[_Copy] = []
        left_out: dict[str, float] = {}
        try:
            with eval_mode(self.model):
                if self._halves.tuples is None:
                    self._halves.tuples = returns_tuples(stack)
                # Before any weight is changed.
                full = self._keep([place for layer, end in cuts for place in (layer or 0, end)])
                pruned = [streams[cuts[0][0] or 0].without(dropped) for streams in full]
                if self._losses_full is None:
                    self._losses_full = full[1][max(full[1])].losses()
                losses = before = pruned[1].losses()
                steps = []
                for layer, end in logging.tqdm(cuts, desc="heal", disable=not progress, leave=False):
                    gone = tuple(i for i in dropped if (-1 if layer is None else layer) < i < end)
                    if layer is None:
                        steps.append(HealedLayer(None, gone, self.method, reason="no layer is kept before the cut"))
                        continue
                    pruned = [stream.at(layer) for stream in pruned]
                    targets = [streams[end] for streams in full]
                    cut = _Cut(stack, layer, self.method, self.fitted.weights, targets, pruned)
                    step, losses, changes = cut.heal(gone, losses, originals, self.cross_validate)
                    for name, change in changes.items():
                        left_out[name] = left_out.get(name, 0.0) + change
                    steps.append(step)
        except BaseException:
            _restore(originals)
            raise
        self._changed = list(originals)
        if originals:
            remember_source(stack.model.config, HEALED_IN_MEMORY)
        return HealReport(
            dropped=tuple(dropped),
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

    def _keep(self, places: Iterable[int]) -> list[dict[int, _Stream]]:
        for streams in self._full:
            for place in sorted(set(places) - streams.keys()):
                streams[place] = streams[max(below for below in streams if below < place)].at(place)
        return self._full

    def _source(
        self, name: str, full: SourceLosses, before: SourceLosses, after: SourceLosses, left_out: float | None
    ) -> HealedSource:
        weight = self.fitted.weights.get(name, 0.0)
        unseen = None if left_out is None else perplexity_of(before.of[name].mean + left_out)
        return HealedSource(
            weight=weight,
            perplexity_full=perplexity_of(full.of[name].mean),
            perplexity_before=perplexity_of(before.of[name].mean),
            perplexity_after=perplexity_of(after.of[name].mean),
            change=after.of[name].mean - before.of[name].mean,
            change_error=after.of[name].error(before.of[name]),
            perplexity_left_out=unseen if weight else perplexity_of(after.of[name].mean),
        )


def why_not_healable(model: nn.Module) -> str | None:
    """The reason why `heal` would refuse a model, or None if it would not."""
    try:
        stack = text_stack(model)
        for layer in range(len(stack.layers)):
            _require_changeable(model, stack, layer)
    except ValueError as error:
        return str(error)
    return None


# --- where, and what --------------------------------------------------------------------------------


def _cuts(dropped: list[int], num_layers: int) -> list[tuple[int | None, int]]:
    """For each cut the kept layer before it, and the place in the full model's stream that its output is to match."""
    kept = [i for i in range(num_layers) if i not in dropped]
    pairs: list[tuple[int | None, int]] = list(zip([None, *kept], [*kept, num_layers], strict=True))
    return [(layer, end) for layer, end in pairs if end > (0 if layer is None else layer + 1)]


def _output_weights(stack: Stack, layer: int) -> list[tuple[str, nn.Parameter]]:
    """The parameters that give a layer's MLP output, each with its path: weights (..., D, I) and biases (..., D)."""
    found: list[tuple[str, nn.Parameter]] = []
    for path in _OUTPUT_WEIGHTS:
        holder = submodule(stack.layers[layer], path)
        names = ["weight", "bias"]
        if holder is None:  # the experts' weights are parameters, not modules
            parent, _, name = path.rpartition(".")
            holder, names = submodule(stack.layers[layer], parent), [name]
            if not hasattr(holder, name):
                continue
        if holder._parameters.get(names[0]) is None:
            raise ValueError(
                f"model: {path} of layer {layer} ({type(holder).__name__}) holds no plain weight; merge or unload what "
                "wraps it (an adapter, a parametrization) before healing"
            )
        parameters = [(path, holder._parameters.get(name)) for name in names]
        found += [(path, parameter) for path, parameter in parameters if parameter is not None]
    return found


def _require_changeable(model: nn.Module, stack: Stack, layer: int) -> None:
    model_type = stack.model.config.model_type
    weights = _output_weights(stack, layer)
    if not weights or submodule(stack.layers[layer], _MLP) is None:
        raise UnsupportedArchitectureError(
            f"healing is not possible for model_type {model_type!r}: layer {layer} has none of {_OUTPUT_WEIGHTS}"
        )
    if norm := submodule(stack.layers[layer], _OUTPUT_NORM):
        weights = [*weights, (_OUTPUT_NORM, norm.get_parameter("weight"))]
    users: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.is_meta:
            users.setdefault(parameter.data_ptr(), set()).add(name)
    for path, weight in weights:
        where = f"model: {path} of layer {layer}"
        if weight.is_meta:
            raise ValueError(f"{where} is not in memory (offloaded, or on the meta device); load the model whole")
        if type(weight) is not nn.Parameter or weight.dtype not in _TOLERANCE:
            raise ValueError(
                f"{where} is quantized or sharded ({type(weight).__name__}, {weight.dtype}); heal the model in "
                "floating point, in one process, and quantize or shard it afterwards"
            )
        if weight.numel() and len(names := users[weight.data_ptr()]) > 1:
            raise ValueError(f"{where} is shared by {sorted(names)}: changing it would change more than this layer")


# --- the residual stream ----------------------------------------------------------------------------


class _Reached(Exception):
    """Ends a pass over the model in a layer after which nothing is needed."""


class _Stream:
    """The states of some data before one layer, kept on the CPU, so that going on from there runs no layer twice."""

    def __init__(
        self,
        halves: SplitModel,
        batches: TokenBatches,
        removed: Iterable[int] = (),
        place: int = 0,
        states: list[tuple[torch.Tensor, torch.device]] | None = None,
    ) -> None:
        self.halves, self.batches, self.removed = halves, batches, frozenset(removed)
        self.place, self.states = place, states

    def without(self, removed: Iterable[int]) -> _Stream:
        """The same states, to go on without some of the layers that follow."""
        return _Stream(self.halves, self.batches, removed, self.place, self.states)

    def state(self, index: int) -> torch.Tensor:
        assert self.states is not None
        state_BTD, device = self.states[index]
        return state_BTD.to(device)

    def _pass(self, index: int) -> torch.Tensor:
        start = None if self.states is None else (self.place - 1, self.state(index))
        return self.halves.hidden(self.batches.batches[index], self.removed, start)

    def at(self, place: int) -> _Stream:
        """The states before layer `place`, which is not removed, or after the last layer."""
        if place == self.place:
            return self
        layers = self.halves.stack.layers
        states: list[tuple[torch.Tensor, torch.device]] = []

        def stop(state_BTD: torch.Tensor) -> None:
            states.append((state_BTD.cpu(), state_BTD.device))
            raise _Reached

        if place < len(layers):
            hook = layers[place].register_forward_pre_hook(
                lambda layer, args, kwargs: stop(hidden_states(args, kwargs)), with_kwargs=True
            )
        else:
            hook = layers[-1].register_forward_hook(lambda layer, args, output: stop(layer_output(output)))
        with hook:
            for index in range(len(self.batches)):
                with suppress(_Reached):
                    self._pass(index)
        return _Stream(self.halves, self.batches, self.removed, place, states)

    def observe(
        self, index: int, layer: nn.Module, paths: Collection[str]
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Runs the layer in this place alone on a batch: path in the layer -> input and output; "" is the layer."""
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def note(path: str) -> Callable[[nn.Module, Any, Any, Any], None]:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                seen[path] = hidden_states(args, kwargs), layer_output(output)
                if not path:
                    raise _Reached

            return hook

        with ExitStack() as hooks:
            for path in (*paths, ""):
                hook = layer.get_submodule(path).register_forward_hook(note(path), with_kwargs=True)
                hooks.enter_context(hook)
            with suppress(_Reached):
                self._pass(index)
        return seen

    def losses(self, only: str | None = None) -> SourceLosses:
        """Cross-entropy of the next token, going on from this place to the end; of all sources of text, or one."""
        return SourceLosses(self.halves, self.batches, self._pass, only)


# --- least squares ----------------------------------------------------------------------------------


class _Moments:
    """Second moments of features x, and of x with what they are to explain, z, summed over tokens."""

    def __init__(self, xx_FF: torch.Tensor, xz_FD: torch.Tensor) -> None:
        self.xx_FF, self.xz_FD = xx_FF, xz_FD

    def add(self, x_NF: torch.Tensor, z_ND: torch.Tensor, weight: float) -> None:
        self.xx_FF.addmm_(x_NF.T, x_NF, alpha=weight)
        self.xz_FD.addmm_(x_NF.T, z_ND, alpha=weight)

    def copy(self) -> _Moments:
        return _Moments(self.xx_FF.clone(), self.xz_FD.clone())

    def solve_in_place(self, ridge: float) -> torch.Tensor:
        """The coefficients that explain z best, shape (F, D), |coefficients|^2 penalized. The moments are lost."""
        diagonal_F = self.xx_FF.diagonal()
        diagonal_F += ridge * (diagonal_F.median().item() or diagonal_F.mean().item() or 1.0)
        # The transpose of a symmetric matrix is itself, in the column-major order that LAPACK factorizes in place.
        factor_FF = torch.linalg.cholesky(self.xx_FF.mT, out=self.xx_FF.mT)
        half_FD = torch.linalg.solve_triangular(factor_FF, self.xz_FD, upper=False)
        change_FD: torch.Tensor = torch.linalg.solve_triangular(factor_FF.mT, half_FD, upper=True)
        return change_FD


class _Tokens(NamedTuple):
    """Real tokens of one source of text at one layer, in double precision.

    Attributes:
        name: the source.
        u_ND: the MLP's output, as it is added to the stream unless a norm follows.
        x_NF: the features that explain it.
        target_ND: what should be added: the full model's state less the stream.
        gap_ND: the full model's state less the layer's output.
        y_ND: the full model's state.
    """

    name: str
    u_ND: torch.Tensor
    x_NF: torch.Tensor
    target_ND: torch.Tensor
    gap_ND: torch.Tensor
    y_ND: torch.Tensor


class _Fit(NamedTuple):
    """Changes the MLP's output from u to u + x @ change, and the gain of the norm that follows, if there is one."""

    ridge: float
    change_FD: torch.Tensor
    gain_D: torch.Tensor | None


class _Cut:
    """The kept layer before a cut, with the states it reads in the pruned model and those of the full model after."""

    def __init__(
        self,
        stack: Stack,
        position: int,
        method: str,
        weights: dict[str, float],
        full: list[_Stream],
        pruned: list[_Stream],
    ) -> None:
        self.stack, self.position, self.layer = stack, position, stack.layers[position]
        parameters = _output_weights(stack, position)
        self.paths = [path for path, _ in parameters]
        self.method = method if all(path.startswith(_OUTPUT_WEIGHTS[0]) for path in self.paths) else "linear"
        self.old = _copies(weight for _, weight in parameters)
        self.norm = submodule(self.layer, _OUTPUT_NORM)
        self.old_norm: list[_Copy] = []
        if self.norm is not None:
            self.old_norm = _copies([self.norm.get_parameter("weight")])
            self.gain_D = _double(self.old_norm[0][0]) + float(stack.family.one_plus_weight)
        self.fitted, self.judged = zip(full, pruned, strict=True)
        # Tokens are weighted so that sources count by their weights, whatever their number of tokens.
        counts = {name: self.fitted[1].batches.only(name).num_tokens for name in weights}
        scale = sum(counts.values()) / sum(weights.values())
        self.token_weights = {name: scale * weight / counts[name] for name, weight in weights.items()}

    def heal(
        self,
        gone: tuple[int, ...],
        before: SourceLosses,
        originals: list[tuple[nn.Parameter, torch.Tensor]],
        cross_validate: bool,
    ) -> tuple[HealedLayer, SourceLosses, dict[str, float]]:
        """One step: its record, the losses after it, and how each source's would change by a fit to the others."""
        originals.extend(self.old + self.old_norm)
        error_before = self._error()
        moments = self._moments()
        tried: list[tuple[_Fit, SourceLosses]] = []
        for ridge in _RIDGES:
            self._restore()
            tried.append((self._fit(moments.copy().solve_in_place(ridge), ridge), self.judged[1].losses()))
            if len(tried) > 1 and tried[-1][1].mean > tried[-2][1].mean:
                break
        best = min((losses for _, losses in tried), key=lambda losses: losses.mean)
        fit, after = next(  # the largest penalty comes first
            (fit, losses) for fit, losses in tried if losses is best or losses.mean - best.mean <= losses.error(best)
        )
        blend, reason = 1.0, "the loss on held-out data would not be lower"
        if best.mean < before.mean:
            blend, after, reason = self._blended(fit, after, before)
        changes = {}
        if cross_validate and len(self.token_weights) > 1:
            for name in self.token_weights.keys() & before.of.keys():
                changes[name] = 0.0 if reason else self._left_out(name, moments, fit.ridge, blend, before)
        if reason:
            self._restore()
            del originals[len(originals) - len(self.old + self.old_norm) :]
            after = before
        else:
            self._write(fit, blend)
        step = HealedLayer(
            layer=self.position,
            dropped=gone,
            method=self.method,
            ridge=math.inf if reason else fit.ridge,
            blend=blend,
            error_before=error_before,
            error_after=error_before if reason else self._error(),
            loss_before=before.mean,
            loss_after=after.mean,
            kept=not reason,
            reason=reason,
        )
        return step, after, changes

    def _blended(self, fit: _Fit, after: SourceLosses, before: SourceLosses) -> tuple[float, SourceLosses, str]:
        """The largest blend that makes no source worse, with its losses, or the reason why there is none."""
        worse: list[str] = []
        for blend in _BLENDS:
            if blend < 1.0:
                self._write(fit, blend)
                after = self.judged[1].losses()
            worse = [name for name in before.of if after.of[name].mean > before.of[name].mean]
            if not worse and after.mean < before.mean:
                return blend, after, ""
        of = f" of {', '.join(worse)}" if len(before.of) > 1 else ""
        return 1.0, before, f"the loss on held-out data{of} would not be lower"

    def _left_out(self, name: str, moments: _Moments, ridge: float, blend: float, before: SourceLosses) -> float:
        """How a source's loss changes by a fit to the others."""
        self._restore()
        others = self.token_weights.keys() - {name}
        part = moments.copy()
        self._add_moments(part, [name], -1.0)
        self._write(self._fit(part.solve_in_place(ridge), ridge, others), blend)
        return self.judged[1].losses(only=name).mean - before.of[name].mean

    def _moments(self) -> _Moments:
        self.probe = next(self._tokens(self.fitted))
        features, channels = self.probe.x_NF.shape[1], self.probe.u_ND.shape[1]
        moments = _Moments(*(self.probe.u_ND.new_zeros(features, size) for size in (features, channels)))
        self._add_moments(moments, self.token_weights)
        return moments

    def _add_moments(self, moments: _Moments, names: Collection[str], sign: float = 1.0) -> None:
        for tokens in self._tokens(self.fitted, names):
            x_NF, z_ND = tokens.x_NF, tokens.gap_ND
            if self.norm is not None:  # directions alone
                scale_N1 = _inverse_rms(tokens.u_ND)
                direction_ND = tokens.target_ND / torch.where(self.gain_D == 0, 1.0, self.gain_D)
                z_ND = direction_ND * _inverse_rms(direction_ND) - tokens.u_ND * scale_N1
                x_NF = x_NF * scale_N1
            moments.add(x_NF, z_ND, sign * self.token_weights[tokens.name])

    def _fit(self, change_FD: torch.Tensor, ridge: float, names: Collection[str] | None = None) -> _Fit:
        """Writes the weights, checks that they do as they should, and fits the norm that follows to their output."""
        fit = _Fit(ridge, change_FD.cpu(), None)
        self._write(fit)
        self._require_exact(change_FD)
        if self.norm is None:
            return fit
        nn_D, nz_D = torch.zeros_like(self.gain_D), torch.zeros_like(self.gain_D)
        for tokens in self._tokens(self.fitted, names):
            normed_ND = tokens.u_ND * _inverse_rms(tokens.u_ND, self.norm)
            nn_D += self.token_weights[tokens.name] * normed_ND.square().sum(0)
            nz_D += self.token_weights[tokens.name] * (normed_ND * tokens.target_ND).sum(0)
        fit = fit._replace(gain_D=torch.where(nn_D > 0, nz_D / nn_D, self.gain_D))
        self._write(fit)
        return fit

    @torch.no_grad()
    def _write(self, fit: _Fit, blend: float = 1.0) -> None:
        """Changes the weights by a fraction of the fit. Computed in double precision, rounded once."""
        for parameter, original in self.old:
            # An expert at a time: all of them in double precision would be four times their memory.
            expert = parameter.dim() == 3
            parts = zip(parameter.unbind(0), original.unbind(0), strict=True) if expert else [(parameter, original)]
            for part, old in parts:
                new = _double(old.to(part.device))
                change_DF = fit.change_FD.to(new.device).T
                if self.method == "linear":
                    new = new + blend * (change_DF @ new)
                elif part.dim() == 2:  # a bias stays as it is
                    new = new + blend * change_DF
                part.copy_(new)
        if fit.gain_D is not None:
            for parameter, original in self.old_norm:
                parameter.copy_(_double(original.to(parameter.device)) + blend * (fit.gain_D - self.gain_D))

    def _restore(self) -> None:
        _restore(self.old + self.old_norm)

    def _error(self) -> float:
        """The relative error of the layer's output on held-out data, each token weighing the same."""
        total, count = 0.0, 0
        for tokens in self._tokens(self.judged):
            norm_N = tokens.y_ND.norm(dim=-1).clamp_min(1e-30)
            total += (tokens.gap_ND.norm(dim=-1) / norm_N).square().sum().item()
            count += len(norm_N)
        return math.sqrt(total / count)

    def _tokens(self, streams: tuple[_Stream, _Stream], names: Collection[str] | None = None) -> Iterator[_Tokens]:
        """The real tokens of some sources, or all, some at a time."""
        full, pruned = streams
        # Granite multiplies what it adds to the stream.
        factor = float(getattr(self.layer, "residual_multiplier", 1.0))

        norm, down = self.stack.family.mlp_norm, _OUTPUT_WEIGHTS[0]
        paths = [norm, _MLP, *([down] if self.method == "refit" else []), *([_OUTPUT_NORM] if self.norm else [])]
        for index, batch in enumerate(pruned.batches):
            if names is not None and batch.name not in names:
                continue
            seen = pruned.observe(index, self.layer, paths)
            residual_BTD, u, output_BTD = seen[norm][0], seen[_MLP][1], seen[""][1]
            x = seen[down][0] if down in seen else u
            added_BTD = factor * (seen[_OUTPUT_NORM][1] if self.norm else u).view_as(output_BTD)
            size = _double(output_BTD).norm().clamp_min(1e-30)
            off = _double(output_BTD - (residual_BTD + added_BTD)).norm() / size
            if not off <= 16 * torch.finfo(output_BTD.dtype).eps:
                raise UnsupportedArchitectureError(
                    f"healing is not possible for {type(self.layer).__name__}: its output is not its residual stream "
                    f"plus the output of {_MLP!r} (off by {off:.1e})"
                )
            states = (u, x, residual_BTD, output_BTD, full.state(index))
            flat = [state.to(output_BTD.device).reshape(batch.attention_mask.numel(), -1) for state in states]
            tokens = batch.attention_mask.flatten().nonzero()[:, 0].to(output_BTD.device)
            for part in tokens.split(max(_LEAST_TOKENS, int(x.shape[-1] * _TOKENS_PER_FEATURE))):
                u_ND, x_NF, residual_ND, output_ND, y_ND = (_double(state[part]) for state in flat)
                yield _Tokens(
                    batch.name, u_ND.mul_(factor), x_NF.mul_(factor), y_ND - residual_ND, y_ND - output_ND, y_ND
                )

    def _require_exact(self, change_FD: torch.Tensor) -> None:
        """Measures on some tokens whether the changed weights give what was fitted.

        Raises:
            UnsupportedArchitectureError: if not: then the MLP's output is not linear in them.
        """
        expected_ND = self.probe.u_ND + self.probe.x_NF @ change_FD
        found_ND = next(self._tokens(self.fitted)).u_ND
        off = ((found_ND - expected_ND).norm() / expected_ND.norm().clamp_min(1e-30)).item()
        if not off <= _TOLERANCE[next(self.layer.parameters()).dtype]:
            raise UnsupportedArchitectureError(
                f"healing is not possible for {type(self.layer).__name__}: the output of {_MLP!r} does not follow its "
                f"weights {self.paths} linearly (off by {off:.1e})"
            )


# --- small things -----------------------------------------------------------------------------------


_Copy = tuple[nn.Parameter, torch.Tensor]


def _copies(parameters: Iterable[nn.Parameter]) -> list[_Copy]:
    return [(parameter, parameter.detach().to("cpu", copy=True)) for parameter in parameters]


@torch.no_grad()
def _restore(copies: list[_Copy]) -> None:
    for parameter, original in copies:
        parameter.copy_(original)


def _inverse_rms(x_ND: torch.Tensor, norm: nn.Module | None = None) -> torch.Tensor:
    """1 over the root mean square of each token, shape (N, 1), with the epsilon of a norm."""
    epsilon = float(getattr(norm, "eps", getattr(norm, "variance_epsilon", 0.0)))
    square_N1: torch.Tensor = x_ND.square().mean(-1, keepdim=True)
    return (square_N1 + epsilon).clamp_min(1e-60).rsqrt()


def _double(x: torch.Tensor) -> torch.Tensor:
    return (x.cpu() if x.device.type == "mps" else x).double()
