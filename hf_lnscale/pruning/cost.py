"""The cost of a search in time and memory, estimated before it starts."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import nn

from ..core.display import show_bytes
from ..core.stack import text_stack
from ..measuring.losses import token_losses
from ..measuring.split_model import SplitModel, logit_slices, pick_tokens, predictions
from ..measuring.stream import eval_mode
from ..measuring.text import Batch
from .scores import STREAM_METHODS
from .search import BLOCKS, HEALED, STEPWISE, Request, Text
from .target import Target

# Number of penalties that healing usually tries; it stops when the next one does worse.
_PENALTIES = 2


class Work(NamedTuple):
    layers: float  # tokens times decoder layers
    head: float  # tokens through the language modeling head and loss
    products: float  # double-precision multiply-adds to fit the healing


class Cost(NamedTuple):
    seconds: float
    device_bytes: int  # memory on the model's device, including the model
    state_bytes: int  # CPU memory for states of the residual stream
    batch_bytes: int  # approximate memory on the model's device for activations and logits of a batch

    def __str__(self) -> str:
        minutes = f"{self.seconds / 60:.0f} min" if self.seconds < 5400 else f"{self.seconds / 3600:.1f} h"
        shown = f"{self.seconds:.0f} s" if self.seconds < 90 else minutes
        device, states, batch = map(show_bytes, self[1:])
        return (
            f"about {shown}; {device} for the model and the fits, {states} for states of the residual stream, {batch} "
            "for a batch"
        )


def work_of_search(num_layers: int, target: Target, request: Request, text: Text, features: int, more: int = 1) -> Work:
    """The work for the smallest number of layers that can reach the target, or for one step with sub-layers.

    Fitted weights have `features` input features; default sources increase the tokens for healing `more` times.
    """
    method, heal, dropped = _method(target, request), bool(request.heal), target.least
    calibration, judged = text.calibration.num_tokens, text.held_out.num_tokens
    total, kept, tried = float(num_layers), float(num_layers - dropped), min(BLOCKS, num_layers - dropped + 1) + 1
    share = 0.25 if heal else 1.0  # of the calibration text, on which proposals are compared

    def swept(steps: int) -> tuple[float, float]:
        """Each of some steps runs the remaining layers once, and for each candidate the layers after it."""
        left = range(num_layers, num_layers - steps, -1)
        return sum(count * (count + 1) / 2 for count in left), sum(count + 1.0 for count in left)

    # Passes of the calibration text through a layer, and through the head.
    layers, head = {
        "given": (0.0, 0.0),
        # Scores, then the full model's states before each cut and the layers after it.
        "best_of": (total + share * (total + tried * kept / 2), share * tried),
        **dict.fromkeys(STREAM_METHODS, (total, 0.0)),
        "taylor": (3 * total, 3.0),  # a backward pass is twice a forward pass
        **dict.fromkeys(("perplexity", "kl"), swept(1)),
        **dict.fromkeys(STEPWISE, swept(dropped)),
        "sublayers": (total * (1 + 3 * total / 2), 3 * total + 1),  # three candidates per layer
    }[method]
    # Perplexities of the full model, without the layers, and healed.
    layers = calibration * layers + judged * (total + kept * (1 + heal))
    head = calibration * head + judged * (2.0 + heal)
    # With sub-layers, the MLPs before and after a missing one are refitted.
    fits = heal * {"greedy_healed": dropped, "sublayers": 2}.get(method, 1)
    quick = heal * min(HEALED, tried) if method == "best_of" else 0
    if fits:
        # The full model's states for the first set, and for each further set from the nearest known place. Per fit,
        # from the cut on: the loss before, with each penalty (only one if quick), and without each of several sources.
        # Of proposals, the loss before is known, except that on default sources.
        held_out, passes = 0.25 * calibration, fits * ((not quick) + _PENALTIES + (more > 1)) + quick * (2 - 1 / more)
        layers += more * (calibration * total * (1 + (fits + quick - 1) / 2) + held_out * passes * kept / 2)
        head += more * held_out * (1 + passes)
    # Half of the symmetric second moments are computed, and again for the fits without a source.
    return Work(layers, head, (quick + fits * (1.0 + (more > 1))) * more * calibration * features**2)


def _method(target: Target, request: Request) -> str:
    if "drop" in target.words:
        return "given"
    return request.units if request.units == "sublayers" else request.method


def estimate_cost(model: nn.Module, target: Target, request: Request, text: Text) -> Cost:
    """Estimates the cost of `search_layers` for its smallest number of layers, from a short timed forward pass."""
    stack, calibration = text_stack(model), text.calibration
    config, heal = stack.model.config, request.heal
    width: int = config.hidden_size
    inner = getattr(config, "intermediate_size", None)
    features = inner if heal == "refit" and isinstance(inner, int) else width
    # A single source is joined by the default ones, which together have as many tokens.
    more = 2 if len(calibration.weights) == 1 and calibration.tokenizer else 1
    work = work_of_search(len(stack.layers), target, request, text, features, more)
    per_layer, per_head, per_product = _unit_times(model, calibration.batches[0], min(features, 1024))
    parameters = list(model.parameters())
    weights = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    fits = 8 * (2 * features**2 + 3 * features * width) if heal else 0
    # Both ends of each cut, and one state of the pruned model.
    places = 2 * (HEALED if _method(target, request) == "best_of" else 1) + 1
    states = places * more * calibration.num_tokens * width * parameters[0].element_size() if heal else 0
    batch_tokens = max(batch.input_ids.numel() for batch in calibration)
    at_once = min(batch_tokens, next(logit_slices(batch_tokens, config.vocab_size)).stop)
    # For a layer, its states and about four matrices of MLP width; for the head, logits, log-probabilities and a copy.
    mlp_width = inner if isinstance(inner, int) else 4 * width
    passing = batch_tokens * (8 * width + 4 * mlp_width) * parameters[0].element_size()
    passing += 3 * 4 * at_once * config.vocab_size
    seconds = work.layers * per_layer + work.head * per_head + work.products * per_product
    return Cost(seconds, weights + fits, states, passing)


def _unit_times(model: nn.Module, batch: Batch, features: int) -> tuple[float, float, float]:
    """Seconds per token in a layer, per token in head and loss, and per double-precision operation."""
    short = Batch(batch.input_ids[:1, :512], batch.attention_mask[:1, :512])
    picked_BT, targets_N = predictions(short)
    split_model, rows = SplitModel(model), 512
    with eval_mode(model):
        for _ in range(2):  # the first run is a warmup
            start = time.perf_counter()
            x_BTD = split_model.hidden(short)
            x_BTD[0, 0, 0].item()  # waits for the device
            middle = time.perf_counter()
            x_ND = pick_tokens(x_BTD, picked_BT)
            for part in split_model.parts(len(x_ND)):
                token_losses(split_model.logits(x_ND[part]), targets_N[part])[0].item()
            end = time.perf_counter()
            device = "cpu" if x_BTD.device.type == "mps" else x_BTD.device
            matrix = torch.ones(rows, features, dtype=torch.float64, device=device)
            (matrix.T @ matrix)[0, 0].item()
            times = middle - start, end - middle, time.perf_counter() - end
    counts = short.input_ids.numel() * len(split_model.stack.layers), max(len(targets_N), 1), 2 * rows * features**2
    return times[0] / counts[0], times[1] / counts[1], times[2] / counts[2]
