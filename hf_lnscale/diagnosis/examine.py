"""`diagnose`: takes all measures over depth and announces their cost in advance."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .._version import __version__
from ..checkpoints.folders import public_name
from ..core.errors import ArgumentError, require_integers
from ..core.record import DROPPED, get_ln_scaling, record
from ..core.stack import Stack, text_stack
from ..measuring.known_text import caution, sequences_of
from ..measuring.losses import MOST_NATS, sweep, why_not_finite
from ..measuring.split_model import SplitModel
from ..measuring.stream_pass import Streamed, measure_stream
from ..measuring.text import TOKEN_IDS, Batch, TokenBatches, Windows, token_batches
from . import verdict
from .diagnosis import Diagnosis
from .measure import NotDifferentiableError, jacobian_distances

_OPTIONAL = (
    "loss_added", "loss_added_error", "perplexity_without", "perplexity_without_error", "jacobian_distance",
    "jacobian_distance_error",
)  # fmt: skip
_PARTS = {
    "stream": "the stream",
    "loss": "the loss without each layer",
    "cuts": "cuts of several layers (one more for each layer that can be dropped)",
    "jacobian": "Jacobians",
}


def diagnose(
    model: nn.Module,
    data: Any,
    *,
    tokenizer: Any = None,
    windows: Windows = Windows(num_tokens=16_384),
    loss: bool = True,
    jacobian: bool = True,
    jacobian_sequences: int = 8,
    jacobian_probes: int = 2,
    progress: bool = True,
) -> Diagnosis:
    """Looks for the curse of depth in a model: what each layer does to the residual stream, and what it contributes.

    One pass over the data, at most twice as long as a plain forward pass, measures for each layer the variance of the
    residual stream, the norm of what attention and MLP add to it, Block Influence, and the angular distance of every
    block of layers. It holds one batch; `loss` and `jacobian` also hold L states of one batch, shape (L, B, T, D), and
    the graph of one layer, for L layers.

    Args:
        model: a model of a known family, possibly wrapped, on any devices; with its language modeling head for `loss`.
        data, tokenizer, windows: see `token_batches`.
        loss: whether to measure the loss without each layer, in about L / 2 forward passes, and without several, in 1
            for each layer that can be dropped.
        jacobian: whether to measure the distance of each layer's Jacobian from the identity, in
            2 + `jacobian_probes` forward passes over the first `jacobian_sequences` sequences.
        jacobian_probes: number of random vectors per sequence.
        progress: whether to announce the cost and show a progress bar.

    Raises:
        ValueError: if an argument is invalid, the data has no sequence of two tokens, the model lacks a required
            language modeling head, or the residual stream is not finite or zero.
        UnsupportedArchitectureError: if the model's family is not in the table.
    """
    require_integers(1, jacobian_sequences=jacobian_sequences, jacobian_probes=jacobian_probes)
    stack = text_stack(model)
    if loss:
        try:
            SplitModel(model)
        except ArgumentError:
            problem = f"{type(model).__name__} has no language modeling head; load it with AutoModelForCausalLM, or "
            problem += "skip the part that needs one: `loss=False`"
            raise ArgumentError("model", problem=problem) from None
    batches = token_batches(data, stack.model, tokenizer=tokenizer, windows=windows)
    few = first_sequences(batches, jacobian_sequences)
    costs = forward_passes(stack, few.num_tokens / max(batches.num_tokens, 1), jacobian_probes)
    skipped = (() if loss else ("loss", "cuts")) + (() if jacobian else ("jacobian",))
    costs = {part: passes for part, passes in costs.items() if part not in skipped}
    notes: list[str] = []
    baseline = cuts = None
    with closing(_Progress(costs, batches.num_tokens, progress)) as bar:
        with bar.part("stream") as advance:
            streamed = measure_stream(model, _tracked(batches, advance))
        _require_sound(stack, streamed)
        columns = _columns(streamed)
        if loss:
            baseline, cuts = _add_losses(columns, model, batches, bar)
        if jacobian:
            notes += _add_jacobians(columns, model, few, jacobian_probes, bar)
    residual, layers = _residual(streamed), _rows(columns)
    notes += _leave_out_infinite(layers, stack)
    about = batches.describe() | {"seq_len": max(batch.input_ids.shape[1] for batch in batches)}
    of_text = about["source"] != TOKEN_IDS and not isinstance(data, TokenBatches)
    judged = verdict.judge(residual, layers, baseline, cuts, about, windows.num_tokens if of_text else None)
    judged["cautions"] += [known] if (known := caution(stack.model.config, sequences_of(batches))) else []
    return Diagnosis(
        model=_about(model, stack),
        data=about,
        baseline=baseline,
        residual=residual,
        layers=layers,
        angular=[[*map(_number, row)] for row in streamed.angles_LL.tolist()],
        cuts=cuts,
        verdict=judged,
        cost=bar.found,
        notes=notes,
        versions={"hf_lnscale": __version__, "transformers": transformers.__version__, "torch": str(torch.__version__)},
    )


def _add_losses(
    columns: dict[str, Any], model: nn.Module, batches: TokenBatches, bar: _Progress
) -> tuple[dict[str, float | None], list[dict[str, Any]]]:
    """Adds the loss without each layer to the columns; returns the baseline, and cuts of several layers.

    Standard errors of perplexities are by the delta method: d exp(x) = exp(x) dx, paired by sequence.
    """
    with bar.part("loss") as advance:
        full, without = sweep(model, batches, (), None, "loss", advance)
    if not full.mean < MOST_NATS:
        problem = f"its loss on this data is {full.mean:.4g} nats per token, too high for a comparison"
        raise ArgumentError("model", problem=problem)
    added = [one.mean - full.mean for one in without.values()]
    added = [one if math.isfinite(one) else math.inf for one in added]  # the loss without it overflows
    errors = [one.error(full) for one in without.values()]
    perplexities = [math.exp(min(full.mean + one, MOST_NATS)) if math.isfinite(one) else None for one in added]
    columns |= {"loss_added": added, "loss_added_error": errors, "perplexity_without": perplexities}
    columns["perplexity_without_error"] = [
        one and error and one * error for one, error in zip(perplexities, errors, strict=True)
    ]
    error, perplexity = full.error(), math.exp(full.mean)
    baseline = {"loss": full.mean, "loss_error": error, "perplexity": perplexity}
    baseline["perplexity_error"] = error and perplexity * error

    # Removes layers together, in the order of their individual cost, until the largest budget is exceeded.
    cuts: list[dict[str, Any]] = []
    order = sorted(without, key=added.__getitem__)
    with bar.part("cuts"):
        for count in range(1, len(order)):
            removed = order[:count]
            one = without[order[0]] if count == 1 else sweep(model, batches, removed, (), "loss", False)[0]
            if not one.mean < MOST_NATS:  # also true for NaN
                break
            error = one.error(full)
            increase_error = error and math.exp(one.mean - full.mean) * error
            cuts.append({"layers": removed, "perplexity": math.exp(one.mean), "increase_error": increase_error})
            if count > 1:
                bar.advance(1.0, more=count > 2)
            if one.mean > full.mean + math.log1p(max(verdict.BUDGETS)):
                break
    return baseline, cuts


def _add_jacobians(
    columns: dict[str, Any], model: nn.Module, few: TokenBatches, probes: int, bar: _Progress
) -> list[str]:
    """Adds the distances of the Jacobians to the columns; returns a note if a layer is not differentiable."""
    with bar.part("jacobian") as advance:
        try:
            samples_SL = jacobian_distances(model, few, probes, advance)
        except NotDifferentiableError as error:
            return [f"jacobian_distance: {error}"]
    columns["jacobian_distance"] = distance_L = samples_SL.mean(0).sqrt()
    if (number := len(samples_SL)) > 1:  # delta method: d sqrt(x) = dx / (2 sqrt(x))
        columns["jacobian_distance_error"] = samples_SL.std(0) / number**0.5 / (2 * distance_L)
    return []


def _tracked(batches: TokenBatches, advance: Callable[[float], object]) -> Iterator[Batch]:
    for batch in batches:
        yield batch
        advance(1 / len(batches))


def _require_sound(stack: Stack, streamed: Streamed) -> None:
    """Refuses data without a token to measure, and a residual stream that is not finite, or is zero after a layer."""
    if not streamed.rest[0].count:
        raise ArgumentError("data", problem="sequences have no token after the first; each needs at least two")
    for place, (moments, typical) in enumerate(zip(streamed.rest, streamed.typical_P.tolist(), strict=True)):
        where = f"the residual stream after {f'layer {place - 1}' if place else 'the embedding'}"
        if not math.isfinite(moments.variance):
            problem = f"{where} is not finite in {_dtype(stack)}; {why_not_finite(stack.model)}"
            raise ArgumentError("model", problem=problem)
        if place and not typical:
            raise ArgumentError("model", problem=f"{where} is zero for a token; check that the model is trained")


def first_sequences(batches: TokenBatches, sequences: int) -> TokenBatches:
    """The first `sequences` sequences, without splitting or joining batches."""
    found: list[Batch] = []
    for batch in batches:
        if sequences > 0:
            found.append(Batch(batch.input_ids[:sequences], batch.attention_mask[:sequences]))
        sequences -= len(batch.input_ids)
    return TokenBatches(found, batches.source)


def forward_passes(stack: Stack, share: float, probes: int) -> dict[str, float]:
    """The cost of each part in forward passes; the Jacobian uses a `share` of the data and `probes` per sequence."""
    layers = len(stack.layers)
    size: int = stack.model.config.vocab_size * stack.model.config.hidden_size
    # The head is a matrix product, unlike the embedding, which is a lookup; a tied matrix also counts once.
    head = size / max(size, stack.model.num_parameters())
    body = 1 - head
    return {
        "stream": body,
        # One pass that stores the states before every layer, and from each of them the layers after it.
        "loss": body * (1 + (layers - 1) / 2) + head * (layers + 1),
        "cuts": 1.0,
        "jacobian": body * share * (2 + probes),
    }


# --- the results, in the form of diagnosis.json -----------------------------------------------------------------------


def _about(model: nn.Module, stack: Stack) -> dict[str, Any]:
    config = stack.model.config
    dropped = record(config).dropped
    return {
        "name": public_name(config.name_or_path or "") or type(model).__name__,
        "model_type": config.model_type,
        "num_layers": len(stack.layers),
        "hidden_size": config.hidden_size,
        # transformers counts packed weights correctly.
        "parameters": (model if isinstance(model, PreTrainedModel) else stack.model).num_parameters(),
        "dtype": _dtype(stack),
        "quantized": getattr(config, "quantization_config", None) is not None,
        "ln_scaling": get_ln_scaling(config),
        DROPPED: list(dropped.layers) if dropped else [],
        "missing_sublayers": record(config).sublayers,
    }


def _dtype(stack: Stack) -> str:
    return str(stack.model.dtype).removeprefix("torch.")


def _residual(streamed: Streamed) -> list[dict[str, Any]]:
    typical_P, errors, rest = streamed.typical_P, streamed.errors, streamed.rest
    whole = [first.merged(others) for first, others in zip(streamed.first, rest, strict=True)]
    return _rows({
        "place": range(len(rest)),
        "variance": [one.variance for one in whole],
        # Of the mean square, which the variance is but for the square of the mean.
        "variance_error": errors["square"][:, 0],
        "variance_without_first": [one.variance for one in rest],
        "variance_without_first_error": errors["square"][:, 1],
        "typical": typical_P,
        # Delta method: d exp(x) = exp(x) dx.
        "typical_error": typical_P * errors["typical"],
        "growth_error": typical_P / typical_P[1] * errors["growth"],
        "largest_channel": [int(one.channels_D.argmax()) for one in whole],
        "largest_channel_variance": [one.channels_D.max().item() for one in whole],
        "largest_channel_variance_without_first": [one.channels_D.max().item() for one in rest],
    })  # fmt: skip


def _columns(streamed: Streamed) -> dict[str, Any]:
    """The measures by name, with L values each; the optional ones are None after the first pass."""
    means, errors = streamed.means, streamed.errors
    columns: dict[str, Any] = {"layer": range(len(streamed.angles_LL))}
    for name in ("attention", "mlp"):
        columns[f"{name}_ratio"], columns[f"{name}_ratio_error"] = means[name][:, 1], errors[name][:, 1]
        columns[f"{name}_ratio_all_tokens"] = means[name][:, 0]
    columns["block_influence"], columns["block_influence_error"] = means["influence"][:, 0], errors["influence"][:, 0]
    columns["angular_distance"], columns["angular_distance_error"] = streamed.angles_LL[:, 0], errors["angle"]
    return columns | dict.fromkeys(_OPTIONAL, [None] * len(streamed.angles_LL))


def _leave_out_infinite(layers: list[dict[str, Any]], stack: Stack) -> list[str]:
    """Sets values that are not finite to None, since JSON cannot represent them; returns a note for each measure."""
    notes = []
    for name in layers[0]:
        bad = [one for one in layers if one[name] is not None and not math.isfinite(one[name])]
        if not bad:
            continue
        # In some models the embedding of the padding token is zero.
        reason = "a token's state before it is zero" if "ratio" in name else why_not_finite(stack.model)
        notes.append(f"{name}: not finite in layers {', '.join(str(one['layer']) for one in bad)}; {reason}")
        for one in bad:
            one[name] = None
    return notes


def _rows(columns: dict[str, Any]) -> list[dict[str, Any]]:
    """Converts columns (tensors or other sequences of equal length) to one dict per row, with None for NaN."""
    lists = [values.tolist() if isinstance(values, torch.Tensor) else values for values in columns.values()]
    return [dict(zip(columns, map(_number, row), strict=True)) for row in zip(*lists, strict=True)]


def _number(value: Any) -> Any:
    return None if value is None or math.isnan(value) else value


# --- progress ---------------------------------------------------------------------------------------------------------


class _Progress:
    """A progress bar over all parts, in forward passes, preceded by a line with their cost."""

    def __init__(self, costs: dict[str, float], num_tokens: int, show: bool) -> None:
        self.costs, self.total = costs, sum(costs.values())
        self.found: dict[str, dict[str, float]] = {}  # estimated passes and seconds taken for each part
        if show:
            parts = ", ".join(f"{passes:.1f} for {_PARTS[part]}" for part, passes in costs.items())
            print(f"about {self.total:.0f} forward passes over {num_tokens:,} tokens: {parts}", file=sys.stderr)
        self.bar: Any = logging.tqdm(
            total=self.total,
            disable=not show,
            leave=False,
            bar_format="{desc}{percentage:3.0f}%|{bar}| {n:.1f}/{total:.1f} passes [{elapsed}<{remaining}]",
        )

    def close(self) -> None:
        self.bar.refresh()  # tqdm skips updates in quick succession
        self.bar.close()

    def advance(self, passes: float, more: bool = False) -> None:
        """Advances the bar. With `more`, first extends it by work that was not included in the estimate."""
        if more:
            self.total += passes
            self.bar.total = self.total
        self.bar.update(passes)

    @contextmanager
    def part(self, name: str) -> Iterator[Callable[[float], None]]:
        """Yields a function to call with each completed fraction of the part."""
        self.bar.set_description(_PARTS[name].partition(" (")[0])
        started = time.perf_counter()
        yield lambda fraction: self.advance(fraction * self.costs[name])
        seconds = time.perf_counter() - started
        self.found[name] = {"passes": round(self.costs[name], 2), "seconds": round(seconds, 3)}
