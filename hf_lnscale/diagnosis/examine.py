"""`diagnose`: every measure over depth, with its cost said in advance."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .._version import __version__
from ..checkpoints.folders import public_name
from ..core.record import DROPPED, get_ln_scaling
from ..core.stack import Stack, text_stack
from ..measuring.losses import MOST_NATS, loss_without, sweep
from ..measuring.split_model import SplitModel
from ..measuring.text import Batch, TokenBatches, Windows, token_batches
from . import verdict
from .measure import (
    NotDifferentiableError,
    Streamed,
    gradient_norms,
    jacobian_distances,
    stream,
    weights_have_gradients,
)
from .result import Diagnosis

# In forward passes: the layers run forward, again one by one, and backward (with respect to inputs and weights).
_GRADIENT_PASSES = 4.0
_PARTS = {
    "stream": "the stream",
    "loss": "the loss without each layer",
    "cuts": "cuts of several layers (one more for each layer that can go)",
    "gradients": "gradients",
    "jacobian": "Jacobians",
}


def diagnose(
    model: nn.Module,
    data: Any,
    *,
    tokenizer: Any = None,
    windows: Windows = Windows(num_tokens=16_384),
    loss: bool = True,
    gradients: bool = True,
    jacobian: bool = True,
    jacobian_sequences: int = 8,
    jacobian_probes: int = 2,
    progress: bool = True,
) -> Diagnosis:
    """Looks for the curse of depth in a model: what each layer does to the residual stream, and what it is worth.

    One pass over the data, at most twice as long as a plain one, finds for each layer the variance of the residual
    stream, the norm of what attention and MLP add to it, Block Influence, and the angular distance of every block of
    layers. The rest costs more and can be left out, part by part. With L layers and the forward pass as the unit:

    - `loss`: the loss without each layer, about L / 2; and without several, 1 for each layer that can go.
    - `gradients`: the norm of each layer's gradient, 4. Weights that are quantized or offloaded have none; the gradient
      with respect to the stream is measured in any case.
    - `jacobian`: how far each layer's Jacobian is from the identity, 2 + `jacobian_probes`, on `jacobian_sequences`
      sequences alone.

    What is announced, with `progress`, is the sum for the model at hand. Memory beyond the model: the pass holds one
    batch; the rest L states of one batch, shape (L, B, T, D), and the graph of one layer. Small batches help.

    Args:
        model: a model of a known family, in any wrapper, on any devices; for `loss` and `gradients` with its language
            head.
        data: texts, a dataset, a path or token ids, see `token_batches`, which the next arguments go to too.
        tokenizer: turns text into ids; loaded by the model's name if none is given.
        windows: how texts are cut.
        loss, gradients, jacobian: whether to measure these.
        jacobian_sequences: sequences, from the first on, that the Jacobian is estimated on.
        jacobian_probes: random vectors for each of them.
        progress: show the cost in advance and a progress bar.

    Raises:
        ValueError: for wrong arguments, for data without a sequence of two tokens, for a model without a language head
            where one is needed, and if the residual stream is not finite.
        UnsupportedArchitectureError: if the model's family is not in the table.
    """
    for name, value in {"jacobian_sequences": jacobian_sequences, "jacobian_probes": jacobian_probes}.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    stack = text_stack(model)
    if loss or gradients:
        _require_head(model)
    batches = token_batches(data, stack.model, tokenizer=tokenizer, windows=windows)
    few = _first(batches, jacobian_sequences)
    wanted = {"loss": loss, "cuts": loss, "gradients": gradients, "jacobian": jacobian}
    costs = _costs(stack, few.num_tokens / max(batches.num_tokens, 1), jacobian_probes)
    costs = {part: passes for part, passes in costs.items() if wanted.get(part, True)}
    notes: list[str] = []
    with _Progress(costs, batches.num_tokens, progress) as bar:
        with bar.part("stream"):
            streamed = stream(model, batches, lambda share: bar.advance(share * costs["stream"]))
        _require_finite(stack, streamed)
        full, added, cuts, weights_NL, states_L, distances_SL = None, None, None, None, None, None
        if loss:
            with bar.part("loss"):
                full, without = sweep(
                    model, batches, (), None, "loss", lambda share: bar.advance(share * costs["loss"])
                )
                if not full < MOST_NATS:
                    raise ValueError(
                        f"model: its loss is {full:.4g} nats a token on this data; nothing can be compared with that"
                    )
                added = [one - full for one in without.values()]
            with bar.part("cuts"):
                cuts = _nested_cuts(model, batches, added, full, bar)
        if gradients:
            with bar.part("gradients"), _noting("gradients", notes):
                weights_NL, states_L = gradient_norms(model, batches, bar.advance, costs["gradients"])
            if states_L is not None and not weights_have_gradients(stack):
                notes.append("gradient_norm: the weights are quantized or offloaded and have no gradient")
        if jacobian:
            with bar.part("jacobian"), _noting("jacobian_distance", notes):
                distances_SL = jacobian_distances(model, few, jacobian_probes, bar.advance, costs["jacobian"])
    residual = _residual(streamed)
    layers = _layers(streamed, full, added, weights_NL, states_L, distances_SL)
    notes += _leave_out_infinite(layers)
    baseline = None if full is None else {"loss": full, "perplexity": math.exp(full)}
    return Diagnosis(
        model=_about(model, stack),
        data=batches.describe() | {"seq_len": max(batch.input_ids.shape[1] for batch in batches)},
        baseline=baseline,
        residual=residual,
        layers=layers,
        angular=[[None if math.isnan(x) else x for x in row] for row in streamed.angles_LL.tolist()],
        cuts=cuts,
        verdict=verdict.judge(residual, layers, baseline, cuts),
        cost=bar.found(),
        notes=notes,
        versions={"hf_lnscale": __version__, "transformers": transformers.__version__, "torch": str(torch.__version__)},
    )


@contextmanager
def _noting(what: str, notes: list[str]) -> Iterator[None]:
    """What no gradient goes through is not measured, and that is said."""
    try:
        yield
    except NotDifferentiableError as error:
        notes.append(f"{what}: {error}")


def _require_head(model: nn.Module) -> None:
    try:
        SplitModel(model)
    except ValueError:
        raise ValueError(
            f"model: {type(model).__name__} has no language head to predict tokens with; load it with "
            "AutoModelForCausalLM, or leave out what needs one: loss=False, gradients=False"
        ) from None


def _require_finite(stack: Stack, streamed: Streamed) -> None:
    for place, moments in enumerate(streamed.rest):
        if not math.isfinite(moments.variance):
            where = f"after layer {place - 1}" if place else "after the embedding"
            raise ValueError(
                f"model: the residual stream {where} is not finite in {_dtype(stack)}; load the model in bfloat16 "
                "or float32"
            )


def _first(batches: TokenBatches, sequences: int) -> TokenBatches:
    """The first sequences, in batches no larger than they are."""
    found: list[Batch] = []
    for batch in batches:
        if sequences > 0:
            found.append(Batch(batch.input_ids[:sequences], batch.attention_mask[:sequences]))
        sequences -= len(batch.input_ids)
    return TokenBatches(found, batches.source)


def _costs(stack: Stack, share: float, probes: int) -> dict[str, float]:
    """Forward passes of each part, by the arithmetic of layers and head; `share` of the data is for the Jacobian."""
    layers = len(stack.layers)
    head: float = stack.model.config.vocab_size * stack.model.config.hidden_size
    # The embedding is no product with a matrix, the head is; where both are one matrix, it counts once too.
    head /= max(head, stack.model.num_parameters())
    body = 1 - head
    return {
        "stream": body,
        # A pass that keeps the states in front of every layer, and from each of these what comes after the layer.
        "loss": body * (1 + (layers - 1) / 2) + head * (layers + 1),
        "cuts": 1.0,
        "gradients": _GRADIENT_PASSES,
        "jacobian": body * share * (2 + probes),
    }


def _nested_cuts(
    model: nn.Module, batches: TokenBatches, added: list[float], full: float, bar: _Progress
) -> list[dict[str, Any]]:
    """Layers removed together, in the order of what each costs alone, until the largest budget is passed.

    What layers cost together is more than the sum of what they cost alone, so it is measured; the first cut beyond the
    budget is the last.
    """
    order = sorted(range(len(added)), key=added.__getitem__)
    cuts: list[dict[str, Any]] = []
    for count in range(1, len(order)):
        removed = order[:count]
        # The first is known from the sweep.
        found = full + added[removed[0]] if count == 1 else loss_without(model, batches, removed)
        cuts.append({"layers": removed, "perplexity": math.exp(found)})
        if count > 2:
            bar.more(1.0)
        if count > 1:
            bar.advance(1.0)
        if found > full + math.log1p(max(verdict.BUDGETS)):
            break
    return cuts


# --- what is found, in the form of diagnosis.json ---------------------------------------------------------------------


def _about(model: nn.Module, stack: Stack) -> dict[str, Any]:
    config = stack.model.config
    return {
        "name": public_name(config.name_or_path or "") or type(model).__name__,
        "model_type": config.model_type,
        "num_layers": len(stack.layers),
        "hidden_size": config.hidden_size,
        "parameters": _parameters(model, stack),
        "dtype": _dtype(stack),
        "quantized": getattr(config, "quantization_config", None) is not None,
        "ln_scaling": get_ln_scaling(config),
        "dropped_layers": (vars(config).get(DROPPED) or {}).get("layers", []),
    }


def _dtype(stack: Stack) -> str:
    return str(stack.model.dtype).removeprefix("torch.")


def _parameters(model: nn.Module, stack: Stack) -> int:
    """Also of packed weights, which transformers knows to count."""
    return (model if isinstance(model, PreTrainedModel) else stack.model).num_parameters()


def _residual(streamed: Streamed) -> list[dict[str, Any]]:
    places = []
    for place, (first, rest) in enumerate(zip(streamed.first, streamed.rest, strict=True)):
        whole = first.with_(rest)
        places.append(
            {
                "place": place,
                "variance": whole.variance,
                "variance_without_first": rest.variance,
                "typical": streamed.typical_P[place].item(),
                "largest_channel": int(whole.channels_D.argmax()),
                "largest_channel_variance": whole.channels_D.max().item(),
                "largest_channel_variance_without_first": rest.channels_D.max().item(),
            }
        )
    return places


def _layers(
    streamed: Streamed,
    full: float | None,
    added: list[float] | None,
    weights_NL: torch.Tensor | None,
    states_L: torch.Tensor | None,
    distances_SL: torch.Tensor | None,
) -> list[dict[str, Any]]:
    gradient, gradient_error = _mean_and_error(weights_NL)
    square, square_error = _mean_and_error(distances_SL)
    found = []
    for layer in range(len(streamed.attention_L)):
        distance = None if square is None else math.sqrt(square[layer])
        found.append(
            {
                "layer": layer,
                "attention_ratio": streamed.attention_L[layer, 1].item(),
                "attention_ratio_all_tokens": streamed.attention_L[layer, 0].item(),
                "mlp_ratio": streamed.mlp_L[layer, 1].item(),
                "mlp_ratio_all_tokens": streamed.mlp_L[layer, 0].item(),
                "block_influence": streamed.influence_L[layer, 0].item(),
                "angular_distance": streamed.angles_LL[layer, 0].item(),
                "loss_added": None if added is None else added[layer],
                "perplexity_without": None
                if added is None or full is None
                else math.exp(min(full + added[layer], MOST_NATS)),
                "gradient_norm": _or_none(gradient, layer),
                "gradient_norm_error": _or_none(gradient_error, layer),
                "state_gradient_norm": _or_none(None if states_L is None else states_L.tolist(), layer),
                "jacobian_distance": distance,
                # Of a root: half of the square's, over the root.
                "jacobian_distance_error": None
                if not distance or square_error is None
                else square_error[layer] / (2 * distance),
            }
        )
    return found


def _leave_out_infinite(layers: list[dict[str, Any]]) -> list[str]:
    """Makes them None, as JSON has none of them; returns a note for each measure."""
    notes = []
    for name in [name for name, value in layers[0].items() if "gradient" in name or "jacobian" in name]:
        bad = [one for one in layers if one[name] is not None and not math.isfinite(one[name])]
        for one in bad:
            one[name] = None
        if bad:
            which = ", ".join(str(one["layer"]) for one in bad)
            notes.append(f"{name}: not finite in layers {which}; load the model in bfloat16 or float32")
    return notes


def _mean_and_error(samples_NL: torch.Tensor | None) -> tuple[list[float] | None, list[float] | None]:
    """The mean over samples and its standard error; None with a single sample."""
    if samples_NL is None or not len(samples_NL):
        return None, None
    error_L = samples_NL.std(0) / len(samples_NL) ** 0.5 if len(samples_NL) > 1 else None
    return samples_NL.mean(0).tolist(), None if error_L is None else error_L.tolist()


def _or_none(values: list[float] | None, at: int) -> float | None:
    return None if values is None or math.isnan(values[at]) else values[at]


# --- progress ---------------------------------------------------------------------------------------------------------


class _Progress:
    """One bar over all parts, in forward passes; the cost is said before it."""

    def __init__(self, costs: dict[str, float], num_tokens: int, show: bool) -> None:
        self.costs = costs
        self.seconds: dict[str, float] = {}
        if show:
            parts = ", ".join(f"{passes:.1f} for {_PARTS[part]}" for part, passes in costs.items())
            total = sum(costs.values())
            print(f"about {total:.0f} forward passes over {num_tokens:,} tokens: {parts}", file=sys.stderr)
        self.bar: Any = logging.tqdm(
            total=sum(costs.values()),
            disable=not show,
            leave=False,
            bar_format="{desc}{percentage:3.0f}%|{bar}| {n:.1f}/{total:.1f} passes [{elapsed}<{remaining}]",
        )
        self.advance: Callable[[float], object] = self.bar.update

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def more(self, passes: float) -> None:
        """There is more to do than was known in advance."""
        self.bar.total = (self.bar.total or 0) + passes

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.bar.set_description(_PARTS[name].partition(" (")[0])
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def found(self) -> dict[str, dict[str, float]]:
        """For each part the passes that were announced, and the seconds that it took."""
        return {
            part: {"passes": round(passes, 2), "seconds": round(self.seconds[part], 3)}
            for part, passes in self.costs.items()
        }
