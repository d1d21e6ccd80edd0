"""The cost of a search in time and memory, estimated before it starts."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import nn

from ..core.display import show_bytes
from ..core.stack import text_stack
from ..measuring.losses import token_losses
from ..measuring.split_model import SplitModel, logit_slices, pick_tokens, predictions
from ..measuring.stream import eval_mode
from ..measuring.text import Batch, TokenBatches
from .search import BLOCKS, HEALED, STEPWISE, Target

# Number of penalties that healing usually tries; it stops when the next one does worse.
_PENALTIES = 2


@dataclass(frozen=True)
class Work:
    """The amount of work of a search.

    Attributes:
        layers: number of tokens times decoder layers.
        head: number of tokens through the language modeling head and loss.
        products: number of double-precision multiply-adds to fit the healing.
    """

    layers: float
    head: float
    products: float = 0.0


@dataclass(frozen=True)
class Cost:
    """The estimated cost of a search.

    Attributes:
        seconds: time.
        device_bytes: memory on the model's device, including the model.
        state_bytes: CPU memory for states of the residual stream.
        batch_bytes: approximate memory on the model's device for activations and logits of a batch.
    """

    seconds: float
    device_bytes: int
    state_bytes: int
    batch_bytes: int

    def __str__(self) -> str:
        if self.seconds < 90:
            shown = f"{self.seconds:.0f} s"
        else:
            shown = f"{self.seconds / 60:.0f} min" if self.seconds < 5400 else f"{self.seconds / 3600:.1f} h"
        return (
            f"about {shown}; {show_bytes(self.device_bytes)} for the model and the fits, "
            f"{show_bytes(self.state_bytes)} for states of the residual stream, {show_bytes(self.batch_bytes)} for a "
            "batch"
        )


def work_of_search(
    num_layers: int,
    target: Target,
    method: str,
    heal: str | None,
    calibration: int,
    judged: int,
    features: int,
    more: int = 1,
) -> Work:
    """The work for the smallest number of layers that can reach the target, or for one step with sub-layers.

    Args:
        num_layers: number of layers of the model, L.
        target, method, heal: see `search_layers`; the method is "sublayers" if these are chosen.
        calibration, judged: numbers of tokens.
        features: number of input features of the fitted weights.
        more: factor by which default sources increase the tokens for healing.
    """
    dropped, total = target.least, float(num_layers)
    kept, held_out = total - dropped, 0.25 * calibration
    # Perplexities of the full model, without the layers, and healed.
    layers, head = judged * (total + kept * (2 if heal else 1)), judged * (3.0 if heal else 2.0)
    fits, quick = 1 if heal else 0, 0
    if "drop" in target.words:
        pass
    elif method == "best_of":
        tried = min(BLOCKS, num_layers - dropped + 1) + 1
        each = held_out if heal else calibration
        # Scores, then the full model's states before each cut and the layers after it.
        layers += calibration * total + each * (total + tried * kept / 2)
        head += tried * each
        quick = fits * min(HEALED, tried)
    elif method == "sublayers":  # three candidates per layer
        layers += calibration * total * (1 + 3 * total / 2)
        head += calibration * (3 * total + 1)
        fits *= 2  # for a missing MLP, the MLPs before and after it are refitted
    elif method in STEPWISE:
        for left in range(num_layers, num_layers - dropped, -1):
            layers += calibration * left * (1 + (left - 1) / 2)
            head += calibration * (left + 1)
        fits = dropped if method == "greedy_healed" else fits
    elif method in ("perplexity", "kl"):
        layers += calibration * total * (1 + (total - 1) / 2)
        head += calibration * (total + 1)
    else:
        passes = 3 if method == "taylor" else 1  # a backward pass is twice a forward pass
        layers, head = layers + passes * calibration * total, head + (passes - 1) * 1.5 * calibration
    if fits:
        # The full model's states for the first set, and for each further set from the nearest known place. Per fit,
        # from the cut on: the loss before, with each penalty (only one if quick), and without each of several sources.
        passes = fits * (1 + _PENALTIES + (more > 1)) + 2 * quick
        layers += more * (calibration * total * (1 + (fits + quick - 1) / 2) + held_out * passes * kept / 2)
        head += more * held_out * (1 + passes)
    # Half of the symmetric second moments are computed, and again for the fits without a source.
    return Work(layers, head, (quick + fits * (1.0 + (more > 1))) * more * calibration * features**2)


def estimate_cost(
    model: nn.Module,
    target: Target,
    method: str,
    heal: str | None,
    calibration: TokenBatches,
    judged: TokenBatches,
) -> Cost:
    """Estimates the cost of `search_layers` for its smallest number of layers, from a short timed forward pass."""
    stack = text_stack(model)
    config, total = stack.model.config, len(stack.layers)
    width: int = config.hidden_size
    inner = getattr(config, "intermediate_size", None)
    features = inner if heal == "refit" and isinstance(inner, int) else width
    # A single source is joined by the default ones, which together have as many tokens.
    more = 2 if len(calibration.weights) == 1 and calibration.tokenizer else 1
    work = work_of_search(total, target, method, heal, calibration.num_tokens, judged.num_tokens, features, more)
    per_layer, per_head, per_product = _unit_times(model, calibration.batches[0], min(features, 1024))
    parameters = list(model.parameters())
    weights = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    fits = 8 * (2 * features**2 + 3 * features * width) if heal else 0
    # Both ends of each cut, and one state of the pruned model.
    places = 2 * (HEALED if method == "best_of" and "drop" not in target.words else 1) + 1
    states = places * more * calibration.num_tokens * width * parameters[0].element_size() if heal else 0
    batch = max(one.input_ids.numel() for one in calibration)
    at_once = min(batch, next(logit_slices(batch, config.vocab_size)).stop)
    # For a layer, its states and about four matrices of MLP width; for the head, logits, log-probabilities and a copy.
    mlp_width = inner if isinstance(inner, int) else 4 * width
    passing = batch * (8 * width + 4 * mlp_width) * parameters[0].element_size() + 3 * 4 * at_once * config.vocab_size
    seconds = work.layers * per_layer + work.head * per_head + work.products * per_product
    return Cost(seconds, weights + fits, states, passing)


def _unit_times(model: nn.Module, batch: Batch, features: int) -> tuple[float, float, float]:
    """Seconds per token in a layer, per token in head and loss, and per double-precision operation."""
    short = Batch(batch.input_ids[:1, :512], batch.attention_mask[:1, :512])
    picked_BT, targets_N = predictions(short)
    split_model = SplitModel(model)
    times = []
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
            matrix = torch.ones(
                512, features, dtype=torch.float64, device="cpu" if x_BTD.device.type == "mps" else x_BTD.device
            )
            (matrix.T @ matrix)[0, 0].item()
            times = [middle - start, end - middle, time.perf_counter() - end]
    layers = len(split_model.stack.layers)
    return (
        times[0] / (short.input_ids.numel() * layers),
        times[1] / max(int(picked_BT.sum()), 1),
        times[2] / (2 * 512 * features**2),
    )
