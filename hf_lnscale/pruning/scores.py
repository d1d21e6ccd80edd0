"""Importance scores of decoder layers, to decide which to remove.

For every method, a higher score means a more important layer. Layers are counted from 0, as in `model.model.layers`.
Measurements run without dropout, ignore padding, hold one batch at a time, and leave the model unchanged.

Shapes: B batch, T tokens, N selected tokens of B x T, D hidden size, L layers.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..checkpoints.folders import public_name
from ..core.display import as_text, terminal
from ..core.json_file import number_of, read_object, to_json
from ..core.stack import Stack, text_stack
from ..measuring.losses import loss_gradient, sweep
from ..measuring.split_model import SplitModel, pick_tokens, predictions
from ..measuring.stream import eval_mode, upcast
from ..measuring.stream_pass import measure_stream
from ..measuring.text import TokenBatches, Windows, token_batches

__all__ = ["METHODS", "LayerScores", "score_layers", "score_stream"]
STREAM_METHODS = ("block_influence", "angular")
_UNITS = {
    "block_influence": "1 - cosine",
    "angular": "angular distance / pi",
    "taylor": "sum of |weight x gradient|, nats",
    "perplexity": "perplexity without the layer",
    "kl": "KL from the full model, nats per token",
}
METHODS = tuple(_UNITS)


@dataclass(frozen=True, eq=False)
class LayerScores:
    """Scores of the layers of a model.

    Attributes:
        method: one of `METHODS`.
        scores: float64. Shape (L,), or for "angular" shape (L, L): `scores[i, n - 1]` is the distance over the block of
            n layers starting at layer i; NaN if it exceeds the model.
        model: the name the model was loaded by, or "".
        data: the data used, as returned by `TokenBatches.describe`.
        baseline: perplexity of the full model, for "perplexity".
        tokens: for "angular", the tokens compared: "last" or "all".
    """

    method: str
    scores: torch.Tensor
    model: str = ""
    data: dict[str, Any] | None = None
    baseline: float | None = None
    tokens: str | None = None

    @property
    def num_layers(self) -> int:
        return len(self.scores)

    @property
    def layers(self) -> torch.Tensor:
        """The score of each single layer, shape (L,)."""
        return self.scores[:, 0] if self.method == "angular" else self.scores

    def order(self) -> list[int]:
        """All layers in order of importance, least important first; ties are ordered by index."""
        return self.layers.argsort(stable=True).tolist()

    def lowest(self, n: int) -> list[int]:
        """The n layers of lowest score, lowest first; for "angular", the contiguous block of lowest distance.

        Raises:
            ValueError: if n is not between 0 and L - 1.
        """
        self._require_count(n, least=0)
        return list(self.best_block(n)) if self.method == "angular" and n else self.order()[:n]

    def best_block(self, n: int) -> range:
        """The n contiguous layers with the lowest angular distance (arXiv 2403.17887, section 3.2, step 2).

        Raises:
            ValueError: if n is not between 1 and L - 1, or the method is not "angular".
        """
        if self.method != "angular":
            raise ValueError(f"best_block needs scores of method 'angular', got {self.method!r}")
        self._require_count(n, least=1)
        start = int(self.scores[: self.num_layers - n + 1, n - 1].nan_to_num(math.inf).argmin())
        return range(start, start + n)

    def _require_count(self, n: int, least: int) -> None:
        if not isinstance(n, int) or isinstance(n, bool) or not least <= n < self.num_layers:
            raise ValueError(f"n must be an integer from {least} to {self.num_layers - 1}, got {n!r}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON, with null for undefined scores."""
        names = ("method", "model", "num_layers", "tokens", "baseline", "data")
        content = {name: getattr(self, name) for name in names} | {"scores": _without_nan(self.scores.tolist())}
        Path(path).write_text(to_json(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LayerScores:
        """Reads a file written by `save`.

        Raises:
            ValueError: if the file does not contain layer scores.
        """
        try:
            content = read_object(Path(path))
            rows = content["scores"]
            if content["method"] not in METHODS:
                raise KeyError("method")
            scores = torch.tensor(_with_nan(rows), dtype=torch.float64)
            if scores.shape != (len(rows),) * (2 if content["method"] == "angular" else 1):
                raise KeyError("scores")
            about = {name: content[name] for name in ("method", "model", "data", "tokens")}
            return cls(scores=scores, baseline=number_of(content["baseline"]), **about)
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise ValueError(f"{os.fspath(path)!r} contains no layer scores: {error}") from None

    def __str__(self) -> str:
        """A table of layers with their scores and ranks, or for "angular" of the best block of each size."""
        title = f"{self.method} of {self.model or 'the model'}, {self.num_layers} layers"
        if self.data:
            title += f", {self.data['num_tokens']:,} tokens of {self.data['source']}"
        if self.baseline is not None:
            title += f"; full model {_number(self.baseline)}"
        if self.method == "angular":
            header = ("block of", "layers", "angular distance")
            rows = []
            for n in range(1, self.num_layers):
                block = self.best_block(n)
                layers = str(block[0]) if n == 1 else f"{block[0]} to {block[-1]}"
                rows.append((str(n), layers, _number(self.scores[block[0], n - 1].item())))
        else:
            header = ("layer", _UNITS[self.method], "rank (1 is removed first)")
            rank = {layer: str(place) for place, layer in enumerate(self.order(), start=1)}
            rows = [(str(layer), _number(score), rank[layer]) for layer, score in enumerate(self.scores.tolist())]
        return f"{title}\n{as_text(terminal(header, rows))}"

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Plots one bar per layer, or for "angular" every block as a cell of a triangle.

        Args:
            path: image file to write; its suffix determines the format.

        Returns:
            The `matplotlib.figure.Figure`.

        Raises:
            ImportError: if matplotlib is not installed; the message names the extra.
        """
        try:
            from matplotlib.figure import Figure
            from matplotlib.ticker import MaxNLocator
        except ImportError:
            raise ImportError("plotting needs matplotlib: install the extra hf-lnscale[plot]") from None
        figure = Figure(figsize=(8, 6 if self.method == "angular" else 3.5), layout="constrained")
        axes = figure.subplots()
        axes.set_title(f"{self.method} {Path(self.model).name}".strip(), loc="left")
        if self.method == "angular":
            extent = (-0.5, self.num_layers - 0.5, 0.5, self.num_layers + 0.5)
            scores = self.scores.T.numpy()
            image = axes.imshow(scores, origin="lower", aspect="auto", cmap="viridis_r", extent=extent)
            axes.set(xlabel="first layer of the block", ylabel="layers in the block")
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
            figure.colorbar(image, label=_UNITS["angular"])
        else:
            axes.bar(range(self.num_layers), self.scores.tolist())
            axes.set(xlabel="layer", ylabel=_UNITS[self.method])
            if self.baseline is not None:
                axes.set_yscale("log")
                axes.axhline(self.baseline, color="gray", linestyle="--", label="full model")
                axes.legend()
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if path is not None:
            figure.savefig(path)
        return figure


def score_layers(
    model: nn.Module,
    data: Any,
    method: str = "block_influence",
    *,
    tokenizer: Any = None,
    windows: Windows = Windows(num_tokens=32_768),
    tokens: str = "last",
    progress: bool = True,
) -> LayerScores:
    """Scores every decoder layer of a model; layers with low scores can be removed.

    Methods, with x_i the residual stream before layer i:

    - "block_influence": 1 - mean over tokens of cos(x_i, x_{i+1}) (ShortGPT, arXiv 2403.03853, equation 1). One pass.
    - "angular": arccos(cos(x_i, x_{i+n})) / pi, mean over sequences, for every i and n in one pass (Gromov et al.,
      arXiv 2403.17887, equation 7).
    - "taylor": sum of |w dL/dw| over the layer's weight matrices, with L the next-token loss (Shortened LLaMA, arXiv
      2402.02834, section 3.1). Absolute values are taken per batch and averaged over batches, weighted by tokens, so
      that no gradient outlives its layer's backward pass. With a single batch this is the paper's score.
    - "perplexity": perplexity of the model without the layer (same section).
    - "kl": mean over tokens of KL(full || without the layer) between next-token distributions.

    The last two take half a pass per layer, see `sweep`.

    Args:
        model: a model of a known family, possibly wrapped; without a PEFT adapter for "taylor", and with its language
            modeling head for "taylor", "perplexity" and "kl".
        data: texts, a dataset, a path or token ids, see `token_batches`. More data gives better decisions: 32,768
            tokens is little for "perplexity".
        method: one of `METHODS`.
        tokenizer: converts text to ids; loaded by the model's name if not given.
        windows: how texts are split.
        tokens: for "angular", compare the "last" token of each sequence, as in the paper, or the mean over "all".
        progress: whether to show a progress bar.

    Raises:
        ValueError: if `method` or `tokens` is unknown, the data has no tokens, the method needs a language modeling
            head that the model lacks, or it reads weights that are quantized, offloaded or have an adapter.
        UnsupportedArchitectureError: if the model's family is not in the table.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if tokens not in ("last", "all"):
        raise ValueError(f"tokens must be 'last' or 'all', got {tokens!r}")
    stack = text_stack(model)
    name = public_name(stack.model.config.name_or_path or "")
    batches = token_batches(data, stack.model, tokenizer=tokenizer, windows=windows)
    if method in STREAM_METHODS:
        return score_stream(model, batches, (method,), tokens, progress)[method]
    about = batches.describe()
    if method == "taylor":
        return LayerScores(method, _taylor(model, batches, progress), name, about)
    full, without = sweep(model, batches, (), None, "kl" if method == "kl" else "loss", progress)
    scores = torch.tensor([loss.mean for loss in without.values()], dtype=torch.float64)
    if method == "kl":
        return LayerScores(method, scores, name, about)
    return LayerScores(method, scores.exp(), name, about, baseline=math.exp(full.mean))


def score_stream(
    model: nn.Module,
    batches: TokenBatches,
    methods: Iterable[str] = STREAM_METHODS,
    tokens: str = "last",
    progress: bool = True,
) -> dict[str, LayerScores]:
    """Scores by all methods that only read the residual stream, in a single pass; see `score_layers`."""
    methods = tuple(methods)
    _require_tokens(batches.num_tokens)
    tracked = logging.tqdm(batches, desc=", ".join(methods), disable=not progress, leave=False)
    streamed = measure_stream(model, tracked, rotation_only=True, tokens=tokens)
    found = {"block_influence": streamed.means["influence"][:, 0], "angular": streamed.angles_LL}
    name, about = public_name(text_stack(model).model.config.name_or_path or ""), batches.describe()
    return {
        method: LayerScores(method, found[method], name, about, tokens=tokens if method == "angular" else None)
        for method in methods
    }


def _matrices(stack: Stack) -> list[list[nn.Parameter]]:
    """The weight matrices of each layer, without norms and biases."""
    for name, module in stack.layers.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise ValueError(
                "method: 'taylor' scores a layer's own weights, but this model has a PEFT adapter "
                f"(layers.{name}: {type(module).__name__}); merge it first (merge_and_unload), or choose another method"
            )
    matrices = [[weight for weight in layer.parameters() if weight.dim() >= 2] for layer in stack.layers]
    for weight in itertools.chain(*matrices):
        if weight.is_meta or not weight.is_floating_point() or weight.element_size() < 2:
            what = "offloaded" if weight.is_meta else f"quantized ({weight.dtype})"
            what += "; load the whole model unquantized, or choose another method"
            raise ValueError(f"method: 'taylor' reads the weights, but this model's are {what}")
    return matrices


def _taylor(model: nn.Module, batches: TokenBatches, progress: bool) -> torch.Tensor:
    split_model = SplitModel(model)
    matrices = _matrices(split_model.stack)
    total_L = torch.zeros(len(matrices), dtype=torch.float64)
    count = 0

    def into_score(position: int, weight: torch.Tensor) -> None:
        assert weight.grad is not None
        total_L[position] += (upcast(weight.detach()) * upcast(weight.grad)).abs().sum().cpu().double()
        weight.grad = None

    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    with ExitStack() as hooks:
        for parameter, requires_grad, grad in before:
            hooks.callback(parameter.requires_grad_, requires_grad)
            hooks.callback(setattr, parameter, "grad", grad)
            parameter.requires_grad_(False)
            parameter.grad = None
        for position, layer in enumerate(matrices):
            for weight in layer:
                weight.requires_grad_(True)
                hooks.enter_context(weight.register_post_accumulate_grad_hook(partial(into_score, position)))
        with eval_mode(model), torch.enable_grad():
            for batch in logging.tqdm(batches, desc="taylor", disable=not progress, leave=False):
                picked_BT, targets_N = predictions(batch)
                if not len(targets_N):
                    continue
                x_ND = pick_tokens(split_model.hidden(batch), picked_BT)
                # The loss is summed over tokens; the total is divided by their number at the end.
                x_ND.backward(loss_gradient(split_model, x_ND, targets_N))
                count += len(targets_N)
    return total_L / _require_tokens(count)


def _require_tokens(count: int) -> int:
    if not count:
        raise ValueError("data: no tokens to evaluate; everything is padding, or the sequences are too short")
    return count


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def _without_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if math.isnan(value) else value


def _with_nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_nan(part) for part in value]
    return math.nan if value is None else number_of(value)
