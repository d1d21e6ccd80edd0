"""Residual variance, angular distance and gradient norm of each layer during training.

Shapes: B batch, T tokens, D hidden size, L layers, P forward passes, S measured steps.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from transformers.training_args import ParallelMode
from transformers.utils import logging

from ..core.errors import ArgumentError, require_integers, require_packages
from ..core.stack import text_stack
from ..measuring.state_stats import layer_angle, mean_where, pooled_moments
from ..measuring.stream import hidden_states, is_compiled, layer_output

logger = logging.get_logger(__name__)

MEASURES = {
    "residual_variance": "residual variance",
    "angular_distance": "angular distance / pi",
    "gradient_norm": "gradient norm",
}
_KEY = re.compile(r"depth/(\w+)/layer_(\d+)")


class DepthStatsCallback(TrainerCallback):
    """Logs statistics of each decoder layer on the training batches every N steps.

        trainer = SFTTrainer(...)
        trainer.add_callback(DepthStatsCallback(trainer))

    For layer i, counted from 0, it logs:

    - `depth/residual_variance/layer_i`: the variance of the residual stream after the layer, over all entries of the
      hidden states, as `diagnose` measures it (arXiv 2502.05795, section 3);
    - `depth/angular_distance/layer_i`: arccos(cos(input, output)) / pi, mean over tokens, as
      `score_layers(..., "angular", tokens="all")` (arXiv 2403.17887, equation 7);
    - `depth/gradient_norm/layer_i`: the 2-norm of the gradient of the layer's parameters, as received by the optimizer:
      accumulated, averaged over processes, and clipped if `max_grad_norm` is set. Omitted for layers without one.

    They are logged to `report_to` and `trainer.state.log_history`, and therefore to `trainer_state.json`, but not
    printed by the progress bar. Each covers one optimizer step with all micro-batches on all processes, excluding
    padding, passes without gradients and recomputation under gradient checkpointing. Other steps run without hooks. On
    measured steps, a compiled model runs eagerly (docs/depth-stats.md).

    Args:
        trainer: the Trainer that the callback is added to.
        every_n_steps: measure steps 1, N, 2N, 3N, ...
        skip_tokens: number of tokens to ignore at the start of each sequence. Trained models have massive activations
            on the first one (arXiv 2402.17762), which can dominate the variance.

    Raises:
        ValueError: if `every_n_steps` is not a positive integer, `skip_tokens` is negative, or `nn.DataParallel` is
            used.
        UnsupportedArchitectureError: if the model's family is not in the table.
    """

    _counting_BT: torch.Tensor | None  # during a measured pass: 1 for each counted token
    _passes: list[list[torch.Tensor]]  # for each pass, L x (tokens, mean, variance, angular distance)
    _norms_L: torch.Tensor | None

    def __init__(self, trainer: Trainer, every_n_steps: int = 100, skip_tokens: int = 1) -> None:
        require_integers(1, every_n_steps=every_n_steps)
        require_integers(0, skip_tokens=skip_tokens)
        if trainer.args.parallel_mode is ParallelMode.NOT_DISTRIBUTED:
            problem = "DepthStatsCallback does not work with nn.DataParallel; start one process per device (torchrun)"
            raise ArgumentError("trainer", problem=problem)
        text_stack(trainer.model)  # type: ignore[arg-type]
        self.trainer = trainer
        self.every_n_steps = every_n_steps
        self.skip_tokens = skip_tokens
        self._measuring: ExitStack | None = None  # during a measured step: hooks and the compiled mode
        self._stop()

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._stop()
        step = state.global_step + 1
        if step == 1 or step % self.every_n_steps == 0:
            self._start(model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._measuring:
            self._norms_L = _gradient_norms(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._measuring:
            logs = _over_processes(self._passes, self._norms_L)
            self._stop()
            self._log(logs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop()

    def _start(self, model: nn.Module) -> None:
        stack = text_stack(model)
        self._measuring = ExitStack()
        enter = self._measuring.enter_context
        enter(stack.model.register_forward_pre_hook(self._before_pass, with_kwargs=True))
        enter(stack.model.register_forward_hook(self._after_pass, always_call=True))
        for layer in stack.layers:
            enter(layer.register_forward_hook(self._after_layer, with_kwargs=True))
        if any(map(is_compiled, (*self.trainer.model_wrapped.modules(), *model.modules()))):
            enter(torch.compiler.set_stance("force_eager"))

    def _stop(self) -> None:
        if self._measuring:
            self._measuring.close()
        self._measuring = None
        self._counting_BT, self._passes, self._norms_L = None, [], None

    def _before_pass(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        # Checkpointed layers are recomputed in the backward, after this pass.
        if torch.is_grad_enabled() and module.training:
            self._counting_BT = _counting(args, kwargs, self.skip_tokens)
            self._passes.append([])

    def _after_pass(self, module: nn.Module, args: Any, output: Any) -> None:
        self._counting_BT = None

    @torch.no_grad()
    def _after_layer(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._counting_BT is not None:
            states = hidden_states(args, kwargs), layer_output(output)
            self._passes[-1].append(_statistics(*states, self._counting_BT))

    def _log(self, logs: dict[str, float]) -> None:
        # Not `Trainer.log`, which would print hundreds of numbers and, in TRL, flush the metrics collected for the next
        # regular entry.
        trainer, state = self.trainer, self.trainer.state
        if not logs:
            logger.warning_once("DepthStatsCallback: a training step had no forward pass of the decoder")
            return
        logs["epoch"] = state.epoch
        state.log_history.append({**logs, "step": state.global_step})
        for callback in trainer.callback_handler.callbacks:
            if not re.search("Progress|Printer", type(callback).__name__):
                callback.on_log(trainer.args, state, trainer.control, logs=dict(logs), model=trainer.model)


def _over_processes(passes: list[list[torch.Tensor]], norms_L: torch.Tensor | None) -> dict[str, float]:
    """One number per layer and measure, identical on every process. Every process must call it."""
    # The only device synchronization.
    counted = [torch.stack([layer.to(one[0].device) for layer in one]).tolist() for one in passes if one]
    found: dict[str, torch.Tensor] = {}
    if everywhere := gather_object(counted):
        tokens_PL, mean_PL, variance_PL, distance_PL = torch.tensor(everywhere, dtype=torch.float64).unbind(-1)
        share_PL = tokens_PL / tokens_PL.sum(0)
        between_PL = (mean_PL - (share_PL * mean_PL).sum(0)) ** 2
        found["residual_variance"] = (share_PL * (variance_PL + between_PL)).sum(0)
        found["angular_distance"] = (share_PL * distance_PL).sum(0)
    if norms_L is not None:
        found["gradient_norm"] = norms_L
    return {
        f"depth/{measure}/layer_{i:02}": value
        for measure, values_L in found.items()
        for i, value in enumerate(values_L.tolist())
        if not math.isnan(value)
    }


def _counting(args: Any, kwargs: Any, skip_tokens: int) -> torch.Tensor:
    """1.0 for each counted token of a pass and 0.0 for others, shape (B, T)."""
    inputs = kwargs.get("inputs_embeds")
    if inputs is None:
        inputs = args[0] if args else kwargs["input_ids"]
    real_BT = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:  # not expanded for attention
        real_BT = mask.bool()
    if positions is None:
        positions = real_BT.cumsum(1) - 1
    while positions.dim() > 2:  # multimodal positions; the first are those of text
        positions = positions[0]
    counting_BT: torch.Tensor = real_BT & (positions >= skip_tokens)
    return counting_BT.float()


def _statistics(before_BTD: torch.Tensor, after_BTD: torch.Tensor, counting_BT: torch.Tensor) -> torch.Tensor:
    """Number of counted tokens, mean and variance of their entries after the layer, mean angle; shape (4,)."""
    x_BTD, y_BTD = before_BTD.float(), after_BTD.float()
    w_BT = counting_BT.to(y_BTD.device)
    angle = mean_where(w_BT, layer_angle(x_BTD, y_BTD)) / math.pi
    return torch.stack([w_BT.sum(), *pooled_moments(y_BTD, w_BT), angle])


@torch.no_grad()
def _gradient_norms(model: nn.Module) -> torch.Tensor | None:
    """The norm of each layer's gradient, shape (L,), NaN without gradients; None if parameters do not hold them."""
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()) or any(
        hasattr(parameter, "ds_id") for parameter in model.parameters()
    ):
        logger.warning_once("DepthStatsCallback: no gradient norms with DeepSpeed ZeRO-3 or FSDP1; use FSDP2")
        return None
    norms = []
    for layer in text_stack(model).layers:
        gradients = [parameter.grad for parameter in layer.parameters() if parameter.grad is not None]
        parts = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
        parts = [part.full_tensor() if isinstance(part, DTensor) else part for part in parts]
        norms.append(torch.stack(parts).norm() if parts else torch.tensor(math.nan))
    return torch.stack([norm.to(norms[0].device) for norm in norms])


def read_depth_stats(run: Any) -> tuple[list[int], dict[str, torch.Tensor]]:
    """Reads the statistics logged by a `DepthStatsCallback`.

    Args:
        run: a Trainer, its `state.log_history`, a `trainer_state.json`, a checkpoint, or the `output_dir` of a run.

    Returns:
        The S measured steps, and for each measure a float64 tensor of shape (S, L), with NaN where nothing was logged.

    Raises:
        FileNotFoundError: if there is no `trainer_state.json`.
        ValueError: if the run has no depth statistics.
    """
    history = run.state.log_history if isinstance(run, Trainer) else run
    if isinstance(history, (str, os.PathLike)):
        path = Path(history)
        if path.is_dir() and not (path / "trainer_state.json").exists():
            path = Path(get_last_checkpoint(str(path)) or path)
        path = path / "trainer_state.json" if path.is_dir() else path
        history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    found: dict[int, dict[tuple[str, int], float]] = {}  # by step, and by measure and layer
    for entry in history:
        for key, value in entry.items():
            if match := _KEY.fullmatch(key):
                found.setdefault(int(entry["step"]), {})[match[1], int(match[2])] = value
    if not found:
        problem = f"no depth statistics in {run!r:.99}; add a DepthStatsCallback to the Trainer"
        raise ArgumentError("run", problem=problem)
    steps, layers = sorted(found), range(1 + max(layer for values in found.values() for _, layer in values))
    return steps, {
        measure: torch.tensor(
            [[found[step].get((measure, layer), math.nan) for layer in layers] for step in steps], dtype=torch.float64
        )
        for measure in MEASURES
    }


def plot_depth_stats(runs: Any, path: str | os.PathLike[str] | None = None) -> Any:
    """Plots the depth statistics of one run, or of several side by side: a curve over depth for each measured step.

    Args:
        runs: a run accepted by `read_depth_stats`, or a mapping from names to runs.
        path: image file to write; its suffix determines the format.

    Returns:
        The `matplotlib.figure.Figure`: one row per measure, one column per run. Rows share their scale.

    Raises:
        ImportError: if matplotlib is not installed; the message names the extra.
        ValueError: if a run has no depth statistics.
    """
    require_packages("plotting", "plot", "matplotlib")
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    named: Iterable[tuple[str, Any]] = runs.items() if isinstance(runs, Mapping) else [("", runs)]
    columns = [(name, *read_depth_stats(run)) for name, run in named]
    figure = Figure(figsize=(1.2 + 4.2 * len(columns), 7.5), layout="constrained")
    grid = figure.subplots(len(MEASURES), len(columns), sharex="col", sharey="row", squeeze=False)
    every_step = [step for _, steps, _ in columns for step in steps]
    # Logarithmic, since most changes happen early.
    norm = LogNorm(min(every_step), max(max(every_step), min(every_step) + 1))
    color: Any = ScalarMappable(norm, colormaps["viridis"])
    for column, (name, steps, tensors) in enumerate(columns):
        for axes, (measure, label) in zip(grid[:, column], MEASURES.items(), strict=True):
            for step, values_L in zip(steps, tensors[measure].tolist(), strict=True):
                axes.plot(values_L, color=color.to_rgba(step), linewidth=1)
            if measure != "angular_distance":
                axes.set_yscale("log")
            axes.set_ylabel(label if column == 0 else "")
        grid[0, column].set_title(name, loc="left")
        grid[-1, column].set_xlabel("layer")
        grid[-1, column].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(color, ax=grid, label="step; a batch each, without standard errors", shrink=0.5)
    if path is not None:
        figure.savefig(path)
    return figure
