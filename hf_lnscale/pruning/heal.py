"""Healing a model that layers are removed from, in closed form: no training, no new module, a plain checkpoint.

Between two kept layers that were apart, the second meets a state that it has never seen. The last kept layer before the
cut is led over to it: its MLP's output is changed by a linear map, fitted by least squares to what the full model hands
on behind the cut, and the map goes into the weights that produce that output (ReplaceMe, arXiv 2505.02819, section 3).

Three things decide whether that repairs or destroys:

- All tokens are fitted, the first of a sequence too. Massive activations (arXiv 2402.17762) arise on it in one layer's
  MLP. A map that has not seen them turns them into noise that all other tokens attend to; that alone made a perplexity
  of 90 one of 2 million. In plain least squares they have the weight they need, as they are large.
- The ridge penalty is therefore measured by the median feature: by the mean, massive activations would drown the rest.
- What is kept is decided by the loss on held-out data, never by the distance of states: the two need not agree.

Shapes: B sequences, T tokens, N tokens of a batch that are real, D hidden size, I width of the MLP, F features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers.utils import logging

from ..core.families import UnsupportedArchitectureError, submodule
from ..core.stack import Stack, text_stack
from ..measuring.losses import perplexity_of, token_losses
from ..measuring.split_model import SplitModel, pick_tokens, predictions, returns_tuples
from ..measuring.stream import eval_mode, hidden_states
from ..measuring.text import TokenBatches, Windows, token_batches
from .layers import normalize_layers
from .plan import PruningPlan

__all__ = ["METHODS", "REACHES", "HealReport", "HealedLayer", "heal", "healed", "why_not_healable"]

METHODS = ("refit", "linear", "magnitude", "magnitude_per_channel")
REACHES = ("cut", "after")

# The MLP, and the weights whose output it adds up, from a decoder layer. All that a layer has are taken: dense layers
# have the first, mixtures of experts the others. Every one is (..., D, I), output channels first.
_MLP = "mlp"
_OUTPUT_WEIGHTS = (
    "mlp.down_proj",
    "mlp.experts.down_proj",
    "mlp.shared_expert.down_proj",
    "mlp.shared_experts.down_proj",
)
# Families whose MLP's output no weight gives linearly, with the reason.
_NOT_LINEAR = dict.fromkeys(
    ("gemma2", "gemma3_text"), "a norm (post_feedforward_layernorm) behind the MLP undoes what is done to its weights"
)
# Ridge penalties, in units of the median of the features' second moments, largest first; tried until one does worse.
_RIDGES = (3.0, 0.3, 0.03, 0.003)
# Relative; how far the changed weights' output may be from the map of the old output.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class HealedLayer:
    """What was tried on one kept layer.

    Attributes:
        layer: its position in the full model; None for a cut that has no kept layer in front of it.
        dropped: positions of the layers that are cut out right behind it; empty if only `reach="after"` led to it.
        method: what was fitted; "linear" where a mixture of experts stands in the way of "refit".
        ridge: the penalty that held-out data chose, in units of the median second moment of the features; infinity
            leaves the layer as it is. 0 where the method has no penalty.
        error_before: relative error of the residual stream behind the cut on held-out tokens: the root of the mean over
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
    error_before: float | None = None
    error_after: float | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    kept: bool = False
    reason: str = ""


@dataclass(frozen=True, eq=False)
class HealReport:
    """What healing did. Perplexities are on the held-out data, by which the penalties were chosen too.

    Attributes:
        dropped: positions of the layers that are removed.
        method, reach: as given.
        steps: one entry a layer that was tried, in order.
        perplexity_full: of the model with all its layers.
        perplexity_before: without the dropped ones.
        perplexity_after: the same, healed; never above `perplexity_before`.
        data: `calibration` and `held_out`, as `TokenBatches.describe` says it.
    """

    dropped: tuple[int, ...]
    method: str
    reach: str
    steps: tuple[HealedLayer, ...]
    perplexity_full: float
    perplexity_before: float
    perplexity_after: float
    data: dict[str, Any]
    _originals: list[tuple[nn.Parameter, torch.Tensor]] = field(default_factory=list, repr=False)

    @property
    def kept(self) -> bool:
        """Whether any weight was changed."""
        return any(step.kept for step in self.steps)

    def undo(self) -> None:
        """Writes the weights back as they were, bit for bit. Works after the layers were taken out, too.

        The report holds a copy of each changed weight for this, on the CPU. `forget` frees them.
        """
        _restore(self._originals)

    def forget(self) -> None:
        """Gives the copies of the old weights free; `undo` does nothing from then on."""
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
            "reach": self.reach,
            "perplexity": {
                "full": self.perplexity_full,
                "before": self.perplexity_before,
                "after": self.perplexity_after,
            },
            "steps": steps,
            "data": self.data,
        }

    def __str__(self) -> str:
        dropped = ", ".join(map(str, self.dropped))
        table = Table(
            title=f"Healing without layers {dropped}: perplexity {self.perplexity_before:.2f} to "
            f"{self.perplexity_after:.2f} (all layers {self.perplexity_full:.2f})"
        )
        for column in ("layer", "cut behind it", "method", "ridge", "error", "perplexity", "kept"):
            table.add_column(column)
        for step in self.steps:
            before_after = ("", "")
            if step.loss_before is not None and step.loss_after is not None:
                before_after = (
                    f"{step.error_before:.3f} to {step.error_after:.3f}",
                    f"{perplexity_of(step.loss_before):.2f} to {perplexity_of(step.loss_after):.2f}",
                )
            table.add_row(
                "-" if step.layer is None else str(step.layer),
                ", ".join(map(str, step.dropped)) or "-",
                step.method,
                "-" if math.isinf(step.ridge) else f"{step.ridge:g}",
                *before_after,
                "yes" if step.kept else f"no: {step.reason}",
            )
        console = Console(width=120, color_system=None)
        with console.capture() as capture:
            console.print(table)
        return capture.get().rstrip()


def heal(
    model: nn.Module,
    layers: Iterable[int] | PruningPlan,
    data: Any,
    *,
    method: str = "refit",
    reach: str = "cut",
    held_out: Any = None,
    tokenizer: Any = None,
    windows: Windows = Windows(num_tokens=16_384),
    progress: bool = True,
) -> HealReport:
    """Changes weights of kept layers, in place, so that the model does better without the layers that are to go.

    It removes nothing: call `drop_layers(model, layers)` afterwards. Kept layers are healed from the first to the last,
    each on the states that the pruned model, healed so far, produces, towards those of the full model. A step that does
    not lower the loss on held-out data is taken back, so that the result is never worse there than before.

    With r the residual stream in front of the addition of the MLP's output u, and y the full model's state behind the
    cut, the methods minimize, over all real tokens of the calibration data:

    - "linear": |y - r - A u|^2 + ridge |A - I|^2, A of shape (D, D), as in ReplaceMe (arXiv 2505.02819, section 3,
      there without the pull towards I). Each weight W whose output u is made of becomes A W: `down_proj`, and with
      experts those of every expert, routed and shared. Gates and routing weights are scalars, so this is exact.
    - "refit": |y - r - V a|^2 + ridge |V - W|^2, where a, of shape (I,), is what goes into `down_proj`, W its weight
      and V the new one. A W is among the V, so with as small a ridge it fits no worse, and the more data the better.
      It needs room for a few matrices of (I, I) in double precision. Experts have no common a: there, "linear".
    - "magnitude": A is one factor times I. "magnitude_per_channel": A is diagonal. The gap in magnitude at a cut that
      LinearPatch (arXiv 2505.24680) and Prune&Comp (arXiv 2507.18212) close. They scale the whole state, by ratios of
      mean magnitudes; a factor on r cannot be folded exactly beside tied embeddings, so u alone is scaled here, by the
      factor that least squares gives.

    Args:
        model: the full causal language model, in memory.
        layers: positions to drop; negative ones count from the end. Or a plan.
        data: calibration data, as `token_batches` takes it.
        method: one of `METHODS`.
        reach: "cut" changes the last kept layer before each cut; "after" every kept layer from the one before the first
            cut on, each towards the full model's state in front of the next kept layer.
        held_out: data to choose the penalty by and to measure on; None holds a quarter of the sequences out.
        tokenizer, windows: see `token_batches`.
        progress: show a bar.

    Returns:
        What was done, with figures before and after. A cut in front of the first kept layer cannot be healed, which is
        noted.

    Raises:
        ValueError: for unknown names, layers that do not exist, data without tokens to predict, a model without a
            language head, and weights that cannot be changed exactly: quantized, not in memory, wrapped by an adapter,
            or shared with another module.
        UnsupportedArchitectureError: if the family is not in the table, or if its MLP's output is not what these
            weights give linearly, by the table or as measured. The model is then as it was.
    """
    for name, value, valid in (("method", method, METHODS), ("reach", reach, REACHES)):
        if value not in valid:
            raise ValueError(f"{name} must be one of {', '.join(valid)}, got {value!r}")
    stack = text_stack(model)
    if isinstance(layers, PruningPlan):
        layers.require_made_for(stack.model.config)
        layers = layers.layers
    dropped = normalize_layers(layers, len(stack.layers), "layers")
    batches = token_batches(data, stack.model, tokenizer=tokenizer, windows=windows)
    if held_out is None:
        batches, held_out = batches.split(0.25)
    held_out = token_batches(held_out, stack.model, tokenizer=tokenizer, windows=windows)
    places = _places(dropped, len(stack.layers), reach)
    for layer, _ in places:
        if layer is not None:
            _require_changeable(model, stack, layer)

    originals: list[tuple[nn.Parameter, torch.Tensor]] = []
    try:
        with eval_mode(model):
            halves = SplitModel(model)
            halves.tuples = returns_tuples(stack)
            full, pruned = ([_Stream(halves, part, gone) for part in (batches, held_out)] for gone in ((), dropped))
            loss_full = full[1].loss()
            loss = before = pruned[1].loss()
            steps = []
            for layer, end in logging.tqdm(places, desc="heal", disable=not progress, leave=False):
                gone = tuple(i for i in dropped if (-1 if layer is None else layer) < i < end)
                if layer is None:
                    steps.append(HealedLayer(None, gone, method, reason="no layer is kept in front of the cut"))
                    continue
                step = _heal_layer(stack, layer, end, gone, method, full, pruned, loss, originals)
                loss = step.loss_after if step.loss_after is not None else loss
                steps.append(step)
    except BaseException:
        _restore(originals)
        raise
    return HealReport(
        dropped=tuple(dropped),
        method=method,
        reach=reach,
        steps=tuple(steps),
        perplexity_full=perplexity_of(loss_full),
        perplexity_before=perplexity_of(before),
        perplexity_after=perplexity_of(loss),
        data={"calibration": batches.describe(), "held_out": held_out.describe()},
        _originals=originals,
    )


@contextmanager
def healed(model: nn.Module, layers: Iterable[int], data: Any, **options: Any) -> Iterator[HealReport]:
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


def _places(dropped: list[int], num_layers: int, reach: str) -> list[tuple[int | None, int]]:
    """Kept layers to change, and for each the place in the full model's stream that its output is to match."""
    kept = [i for i in range(num_layers) if i not in dropped]
    pairs: list[tuple[int | None, int]] = list(zip([None, *kept], [*kept, num_layers], strict=True))
    if not dropped:
        return []
    cuts = [(layer, end) for layer, end in pairs if end > (0 if layer is None else layer + 1)]
    return cuts if reach == "cut" else [pair for pair in pairs if pair[1] >= cuts[0][1]]


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
                "wraps it (an adapter, a parametrization), and heal then"
            )
        parameters = [(path, holder._parameters.get(name)) for name in names]
        found += [(path, parameter) for path, parameter in parameters if parameter is not None]
    return found


def _require_changeable(model: nn.Module, stack: Stack, layer: int) -> None:
    model_type = stack.model.config.model_type
    if reason := _NOT_LINEAR.get(model_type):
        raise UnsupportedArchitectureError(f"healing is not possible for model_type {model_type!r}: {reason}")
    weights = _output_weights(stack, layer)
    if not weights or submodule(stack.layers[layer], _MLP) is None:
        raise UnsupportedArchitectureError(
            f"healing is not possible for model_type {model_type!r}: layer {layer} has none of {_OUTPUT_WEIGHTS}"
        )
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
                "floating point, in one process, and quantize or shard it then"
            )
        if weight.numel() and len(names := users[weight.data_ptr()]) > 1:
            raise ValueError(f"{where} is shared by {sorted(names)}: changing it would change more than this layer")


# --- the residual stream ----------------------------------------------------------------------------


class _Reached(Exception):
    """Ends a pass over the model in a layer behind which nothing is needed."""


class _Stream:
    """The states of some data in one place of the stack, kept, so that going on from there runs no layer twice."""

    def __init__(self, halves: SplitModel, batches: TokenBatches, removed: Iterable[int]) -> None:
        self.halves, self.batches, self.removed = halves, batches.batches, frozenset(removed)
        self.place = 0
        self.states_BTD: list[torch.Tensor | None] = [None] * len(self.batches)

    def _pass(self, index: int) -> torch.Tensor:
        state_BTD = self.states_BTD[index]
        start = None if state_BTD is None else (self.place - 1, state_BTD)
        return self.halves.hidden(self.batches[index], self.removed, start)

    def advance(self, place: int) -> None:
        """Goes on to the place in front of layer `place`, which is not removed, or behind the last layer."""
        if place == self.place:
            return
        layers, reached = self.halves.stack.layers, []

        def stop(state_BTD: torch.Tensor) -> None:
            reached.append(state_BTD)
            raise _Reached

        if place < len(layers):
            hook = layers[place].register_forward_pre_hook(
                lambda layer, args, kwargs: stop(hidden_states(args, kwargs)), with_kwargs=True
            )
        else:
            hook = layers[-1].register_forward_hook(lambda layer, args, output: stop(_first(output)))
        with hook:
            for index in range(len(self.batches)):
                try:
                    self._pass(index)
                except _Reached:
                    self.states_BTD[index] = reached.pop()
        self.place = place

    def observe(self, layer: nn.Module, watch: Callable[[ExitStack, dict[str, Any]], None]) -> Iterator[dict[str, Any]]:
        """Runs the layer in this place alone and yields, a batch at a time, what `watch` puts into its dict."""
        seen: dict[str, Any] = {}

        def stop(layer: nn.Module, args: Any, output: Any) -> None:
            seen["output"] = _first(output)
            raise _Reached

        for index in range(len(self.batches)):
            with ExitStack() as hooks:
                watch(hooks, seen)
                hooks.enter_context(layer.register_forward_hook(stop))
                with suppress(_Reached):
                    self._pass(index)
            yield seen

    def loss(self) -> float:
        """Mean cross-entropy of the next token, going on from this place to the end."""
        total, count = 0.0, 0
        for index, batch in enumerate(self.batches):
            picked_BT, targets_N = predictions(batch)
            if not len(targets_N):
                continue
            x_ND = pick_tokens(self._pass(index), picked_BT)
            for part in self.halves.parts(len(x_ND)):
                losses_N = token_losses(self.halves.logits(x_ND[part]), targets_N[part])
                total += losses_N.cpu().double().sum().item()
            count += len(targets_N)
        if not count:
            raise ValueError("data: there is no token to predict in the held-out data; sequences must hold two or more")
        return total / count


# --- least squares ----------------------------------------------------------------------------------


class _Moments:
    """Second moments of features x and of what they are to explain, z, summed over tokens in double precision.

    For one coefficient a channel, or one in all (`shape` "channel", "one"), the matrices are vectors.
    """

    def __init__(self, shape: str) -> None:
        self.shape = shape
        self.xx: Any = 0.0  # (F, F), (D,) or (1,)
        self.xz: Any = 0.0  # (F, D), (D,) or (1,)
        self.zz = 0.0
        self.yy = 0.0

    def add(self, x_NF: torch.Tensor, z_ND: torch.Tensor, y_ND: torch.Tensor) -> None:
        if self.shape == "matrix":
            xx, xz = x_NF.T @ x_NF, x_NF.T @ z_ND
        else:
            xx, xz = (x_NF * x_NF).sum(0), (x_NF * z_ND).sum(0)
            if self.shape == "one":
                xx, xz = xx.sum(0, keepdim=True), xz.sum(0, keepdim=True)
        self.xx, self.xz = self.xx + xx, self.xz + xz
        self.zz += z_ND.pow(2).sum().item()
        self.yy += y_ND.pow(2).sum().item()

    def solve(self, ridge: float) -> torch.Tensor:
        """The coefficients that explain z best, shape (F, D), (D,) or (1,), with |coefficients|^2 held down."""
        if self.shape != "matrix":
            return torch.where(self.xx > 0, self.xz / self.xx.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
        diagonal_F = self.xx.diagonal()
        penalty = ridge * (diagonal_F.median().item() or diagonal_F.mean().item() or 1.0)
        factor_FF = torch.linalg.cholesky(self.xx + penalty * torch.eye(len(self.xx), dtype=torch.float64).to(self.xx))
        return torch.cholesky_solve(self.xz, factor_FF)

    def error(self, fit: torch.Tensor | None = None) -> float:
        """|z - fit(x)| / |y|, both summed over tokens before the root."""
        squares = self.zz
        if fit is not None:
            mapped = self.xx @ fit if self.shape == "matrix" else self.xx * fit
            squares += (fit * (mapped - 2 * self.xz)).sum().item()
        return math.sqrt(max(squares, 0.0) / self.yy) if self.yy else 0.0


_SHAPES = {"refit": "matrix", "linear": "matrix", "magnitude_per_channel": "channel", "magnitude": "one"}


def _heal_layer(
    stack: Stack,
    position: int,
    end: int,
    gone: tuple[int, ...],
    method: str,
    full: list[_Stream],
    pruned: list[_Stream],
    loss: float,
    originals: list[tuple[nn.Parameter, torch.Tensor]],
) -> HealedLayer:
    """One step of `heal`. The full model's states are taken beyond the layer before its weights are changed."""
    weights = _output_weights(stack, position)
    if method == "refit" and [path for path, _ in weights if not path.startswith(_OUTPUT_WEIGHTS[0])]:
        method = "linear"
    moments, probe = [], None
    for held_out, (target, stream) in enumerate(zip(full, pruned, strict=True)):
        target.advance(end)
        stream.advance(position)
        moment = _Moments(_SHAPES[method])
        for u_ND, x_NF, state_ND, y_ND in _tokens(stack, position, method, target, stream):
            if probe is None:
                probe = u_ND, x_NF
            # Measured on held-out tokens, each has the same weight, however large its state is.
            weight_N1 = y_ND.norm(dim=-1, keepdim=True).clamp_min(1e-30).reciprocal() if held_out else 1.0
            moment.add(x_NF * weight_N1, (y_ND - state_ND) * weight_N1, y_ND * weight_N1)
        moments.append(moment)
    assert probe is not None

    before = [(weight, weight.detach().to("cpu", copy=True)) for _, weight in weights]
    originals.extend(before)
    ridges = _RIDGES if _SHAPES[method] == "matrix" else (0.0,)
    best: tuple[float, float, torch.Tensor | None] = (loss, math.inf, None)
    for ridge in ridges:
        fit = moments[0].solve(ridge)
        _fold(before, method, fit)
        if ridge == ridges[0]:
            _require_exact(stack, position, method, pruned[0], fit, *probe)
        found = pruned[1].loss()
        if found < best[0]:
            best = (found, ridge, fit)
        elif best[2] is not None:
            break
    loss_after, ridge, best_fit = best
    if best_fit is None:
        _restore(before)
        del originals[len(originals) - len(before) :]
    else:
        _fold(before, method, best_fit)
    return HealedLayer(
        layer=position,
        dropped=gone,
        method=method,
        ridge=ridge,
        error_before=moments[1].error(),
        error_after=moments[1].error(best_fit),
        loss_before=loss,
        loss_after=loss_after,
        kept=best_fit is not None,
        reason="" if best_fit is not None else "the loss on held-out data would not be lower",
    )


def _tokens(
    stack: Stack, position: int, method: str, target: _Stream | None, stream: _Stream
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """For each batch, of its real tokens and in double precision: the MLP's output u as it is added, the features x,
    the layer's output and the full model's state (without `target`, the layer's output again)."""
    layer = stack.layers[position]
    # Granite multiplies what it adds to the stream.
    factor = float(getattr(layer, "residual_multiplier", 1.0))

    def watch(hooks: ExitStack, seen: dict[str, Any]) -> None:
        def note(name: str, value: Callable[[Any, Any], torch.Tensor]) -> Any:
            return lambda module, args, output: seen.__setitem__(name, value(args, output))

        norm, mlp = layer.get_submodule(stack.family.mlp_norm), layer.get_submodule(_MLP)
        hooks.enter_context(norm.register_forward_hook(note("residual", lambda args, _: args[0])))
        hooks.enter_context(mlp.register_forward_hook(note("u", lambda _, output: _first(output))))
        if method == "refit":
            down = layer.get_submodule(_OUTPUT_WEIGHTS[0])
            hooks.enter_context(down.register_forward_hook(note("x", lambda args, _: args[0])))

    for index, seen in enumerate(stream.observe(layer, watch)):
        picked_BT = stream.batches[index].attention_mask
        u_BTD, output_BTD = seen["u"].view_as(seen["output"]), seen["output"]
        off = (output_BTD - (seen["residual"] + factor * u_BTD)).double().norm() / output_BTD.double().norm()
        if not off <= 16 * torch.finfo(output_BTD.dtype).eps:
            raise UnsupportedArchitectureError(
                f"healing is not possible for {type(layer).__name__}: what it returns is not its residual stream plus "
                f"the output of {_MLP!r} (off by {off:.1e})"
            )
        x = seen["x"].view(*output_BTD.shape[:2], -1) if method == "refit" else u_BTD
        state = None if target is None else target.states_BTD[index]
        state = output_BTD if state is None else state.to(output_BTD.device)
        u_ND, x_NF, output_ND, y_ND = (_double(pick_tokens(part, picked_BT)) for part in (u_BTD, x, output_BTD, state))
        yield factor * u_ND, factor * x_NF, output_ND, y_ND


def _fold(before: list[tuple[nn.Parameter, torch.Tensor]], method: str, fit: torch.Tensor) -> None:
    """Writes into the weights what makes of the output u: u + fit(x). Computed in double precision, rounded once."""
    fit = fit.T.contiguous() if fit.dim() == 2 else fit
    for parameter, original in before:
        # An expert at a time: all of them in double precision would be four times their memory.
        bias = parameter.dim() == 1
        parts = (
            zip(parameter.unbind(0), original.unbind(0), strict=True)
            if parameter.dim() == 3
            else [(parameter, original)]
        )
        for part, old in parts:
            old = old.to(fit.device).double()
            if method == "refit":
                new = old if bias else old + fit
            elif method == "linear":
                new = old + fit @ old
            else:
                new = old * (1.0 + fit if bias else 1.0 + fit[:, None])
            with torch.no_grad():
                part.copy_(new)


def _restore(before: list[tuple[nn.Parameter, torch.Tensor]]) -> None:
    with torch.no_grad():
        for parameter, original in before:
            parameter.copy_(original)


def _require_exact(
    stack: Stack, position: int, method: str, stream: _Stream, fit: torch.Tensor, u_ND: torch.Tensor, x_NF: torch.Tensor
) -> None:
    """Measures whether the changed weights give what was fitted, on the first batch.

    Raises:
        UnsupportedArchitectureError: if not: then the MLP's output is not linear in them.
    """
    expected_ND = u_ND + (x_NF @ fit if fit.dim() == 2 else x_NF * fit)
    found_ND, *_ = next(_tokens(stack, position, method, None, stream))
    off = ((found_ND - expected_ND).norm() / expected_ND.norm().clamp_min(1e-30)).item()
    layer = stack.layers[position]
    if not off <= _TOLERANCE[next(layer.parameters()).dtype]:
        raise UnsupportedArchitectureError(
            f"healing is not possible for {type(layer).__name__}: the output of {_MLP!r} does not follow its weights "
            f"{[path for path, _ in _output_weights(stack, position)]} linearly (off by {off:.1e})"
        )


# --- small things -----------------------------------------------------------------------------------


def _first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _double(x: torch.Tensor) -> torch.Tensor:
    return (x.cpu() if x.device.type == "mps" else x).double()
