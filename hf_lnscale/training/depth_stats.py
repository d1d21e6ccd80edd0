"""How depth behaves while a model trains: residual variance, angular distance and gradient norm of each layer.

Shapes: B batch, T tokens, D hidden size, L layers, S measured steps.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
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

from ..core.stack import text_stack
from ..measuring.stream import hidden_states

logger = logging.get_logger(__name__)

MEASURES = {
    "residual_variance": "residual variance",
    "angular_distance": "angular distance, share of pi",
    "gradient_norm": "gradient norm",
}
_KEY = re.compile(r"depth/(\w+)/layer_(\d+)")


class DepthStatsCallback(TrainerCallback):
    """Logs, every so many steps, what each decoder layer does to the batches that it is trained on.

        trainer = SFTTrainer(...)
        trainer.add_callback(DepthStatsCallback(trainer))

    Of layer i, counted as in `model.model.layers`, it logs

    - `depth/residual_variance/layer_i`: the variance of the residual stream behind the layer, over all entries of the
      hidden states, as `hf_lnscale.diagnosis.residual_variance` (arXiv 2502.05795, section 3);
    - `depth/angular_distance/layer_i`: arccos(cos(input, output)) / pi, mean over tokens, as
      `score_layers(..., "angular", tokens="all")` (arXiv 2403.17887, equation 7);
    - `depth/gradient_norm/layer_i`: the 2-norm of the gradient of the layer's parameters, as the optimizer gets it:
      accumulated, averaged over processes, and clipped if `max_grad_norm` is set. Absent where a layer has none.

    They go to whatever `report_to` names, and to `trainer.state.log_history`, and so into `trainer_state.json`; the
    progress bar does not print them. All are of one optimizer step, taken together over its micro-batches and all
    processes. Padding does not count; nor do passes without gradients (generation, reference models) and the second
    run of a layer under gradient checkpointing.

    Steps that are not measured run without hooks. A model that is compiled runs eagerly on those that are: compiled
    code would not call hooks that came later, and compiling anew would cost more.

    Args:
        trainer: the Trainer that it is added to, which knows the processes and the loggers.
        every_n_steps: steps 1, N, 2N, 3N, ... are measured.
        skip_tokens: the first tokens of each sequence that do not count. Trained models put massive activations on the
            first one (arXiv 2402.17762), which can be nearly all of the variance. 0 counts every token.

    Raises:
        ValueError: if `every_n_steps` is not a positive integer or `skip_tokens` a negative one, and for
            `nn.DataParallel`, whose replicas cannot be told apart; start one process a device.
        UnsupportedArchitectureError: if the model's family is not in the table.
    """

    def __init__(self, trainer: Trainer, every_n_steps: int = 100, skip_tokens: int = 1) -> None:
        for argument, value, least in (("every_n_steps", every_n_steps, 1), ("skip_tokens", skip_tokens, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"DepthStatsCallback: {argument} must be an integer >= {least}, got {value!r}")
        if trainer.args.parallel_mode is ParallelMode.NOT_DISTRIBUTED:
            raise ValueError(
                "DepthStatsCallback does not work with nn.DataParallel; start one process a device (torchrun)"
            )
        text_stack(trainer.model)  # type: ignore[arg-type]
        self.trainer = trainer
        self.every_n_steps = every_n_steps
        self.skip_tokens = skip_tokens
        self._hooks: list[Any] = []
        self._eager: Any = None
        self._counting_BT: torch.Tensor | None = None  # while a pass is measured: 1 for each token that counts
        self._passes: list[list[torch.Tensor]] = []  # of each pass, L x (tokens, mean, variance, angular distance)
        self._squares_L: torch.Tensor | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._stop()
        step = state.global_step + 1
        if step == 1 or step % self.every_n_steps == 0:
            self._start(model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._hooks:
            self._squares_L = _gradient_squares(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self._hooks:
            return
        passes, squares_L = self._passes, self._squares_L
        self._stop()
        self._log(self._over_processes(passes, squares_L))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop()

    # --- one measured step --------------------------------------------------------------------------

    def _start(self, model: nn.Module) -> None:
        stack = text_stack(model)
        self._hooks = [
            stack.model.register_forward_pre_hook(self._before_pass, with_kwargs=True),
            stack.model.register_forward_hook(self._after_pass, always_call=True),
            *(layer.register_forward_hook(self._after_layer, with_kwargs=True) for layer in stack.layers),
        ]
        if _is_compiled(self.trainer.model_wrapped) or _is_compiled(model):
            self._eager = torch.compiler.set_stance("force_eager")

    def _stop(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._eager is not None:
            self._eager.__exit__(None, None, None)
        self._hooks, self._eager = [], None
        self._counting_BT, self._passes, self._squares_L = None, [], None

    def _before_pass(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        # The recomputation of checkpointed layers comes in the backward, after the pass.
        if torch.is_grad_enabled() and module.training:
            self._counting_BT = _counting(args, kwargs, self.skip_tokens)
            self._passes.append([])

    def _after_pass(self, module: nn.Module, args: Any, output: Any) -> None:
        self._counting_BT = None

    @torch.no_grad()
    def _after_layer(self, layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._counting_BT is not None:
            after_BTD = output[0] if isinstance(output, tuple) else output
            self._passes[-1].append(_statistics(hidden_states(args, kwargs), after_BTD, self._counting_BT))

    def _over_processes(self, passes: list[list[torch.Tensor]], squares_L: torch.Tensor | None) -> dict[str, float]:
        """One number a layer and measure, the same on every process. Every process must call it."""
        # Here the host waits for the device, once.
        counted = [torch.stack([layer.to(one[0].device) for layer in one]).tolist() for one in passes if one]
        squares = None if squares_L is None else squares_L.tolist()
        everywhere = gather_object([(counted, squares)])
        moments: dict[int, tuple[int, float, float]] = {}
        distances: dict[int, float] = {}
        for layers in (layers for counted, _ in everywhere for layers in counted):
            for i, (tokens, mean, variance, distance) in enumerate(layers):
                if tokens:
                    moments[i] = _merge(moments.get(i, (0, 0.0, 0.0)), int(tokens), mean, variance)
                    distances[i] = distances.get(i, 0.0) + tokens * distance
        logs = {_key("residual_variance", i): squares / count for i, (count, _, squares) in moments.items()}
        logs |= {_key("angular_distance", i): distances[i] / count for i, (count, _, _) in moments.items()}
        if all(squares is not None for _, squares in everywhere):
            for i, parts in enumerate(zip(*(squares for _, squares in everywhere), strict=True)):
                if not math.isnan(parts[0]):
                    logs[_key("gradient_norm", i)] = math.sqrt(sum(parts))
        return logs

    def _log(self, logs: dict[str, float]) -> None:
        # As `Trainer.log`, which would print hundreds of numbers on the console, and, in TRL, flush the metrics that
        # are kept for the next regular entry.
        trainer, state = self.trainer, self.trainer.state
        if not logs:
            logger.warning_once("DepthStatsCallback: no forward pass of the decoder was seen in a training step")
            return
        logs["epoch"] = state.epoch
        state.log_history.append({**logs, "step": state.global_step})
        for callback in trainer.callback_handler.callbacks:
            if not re.search("Progress|Printer", type(callback).__name__):
                callback.on_log(trainer.args, state, trainer.control, logs=dict(logs), model=trainer.model)


def _key(measure: str, layer: int) -> str:
    return f"depth/{measure}/layer_{layer:02}"


def _counting(args: Any, kwargs: Any, skip_tokens: int) -> torch.Tensor:
    """1.0 for each token of a pass that counts, else 0.0, shape (B, T)."""
    inputs = kwargs.get("inputs_embeds")
    if inputs is None:
        inputs = args[0] if args else kwargs["input_ids"]
    real_BT = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:  # one that is written out for attention says nothing here
        real_BT = mask.bool()
    if positions is None:
        positions = real_BT.cumsum(1) - 1
    while positions.dim() > 2:  # a position a dimension of an image; the first is that of text
        positions = positions[0]
    return (real_BT & (positions >= skip_tokens)).float()


def _statistics(before_BTD: torch.Tensor, after_BTD: torch.Tensor, counting_BT: torch.Tensor) -> torch.Tensor:
    """Of the tokens that count: their number, mean and variance of all entries behind the layer, angular distance.

    Returns:
        Shape (4,), float32, on the device of the hidden states; zeros if no token counts.
    """
    x_BTD, y_BTD = before_BTD.float(), after_BTD.float()
    w_BT = counting_BT.to(y_BTD.device)
    count = w_BT.sum()

    def mean_over_tokens(value_BT: torch.Tensor) -> torch.Tensor:
        return torch.where(w_BT > 0, value_BT, 0).sum() / count.clamp_min(1)

    variance_BT, mean_BT = torch.var_mean(y_BTD, dim=-1, correction=0)
    mean = mean_over_tokens(mean_BT)
    variance = mean_over_tokens(variance_BT + (mean_BT - mean) ** 2)
    # From what the layer adds, d = y - x, since arccos of a cosine near 1 keeps no digits of a small angle in float32:
    # tan(angle) = |x| |d| sin(x, d) / (|x|^2 + x d).
    d_BTD = y_BTD - x_BTD
    xx_BT, dd_BT, xd_BT = (torch.linalg.vecdot(a, b) for a, b in ((x_BTD, x_BTD), (d_BTD, d_BTD), (x_BTD, d_BTD)))
    angle_BT = torch.atan2((xx_BT * dd_BT - xd_BT**2).clamp_min(0).sqrt(), xx_BT + xd_BT)
    return torch.stack([count, mean, variance, mean_over_tokens(angle_BT) / math.pi])


@torch.no_grad()
def _gradient_squares(model: nn.Module) -> torch.Tensor | None:
    """This process's part of the squared gradient norm of each layer, so that the sum over all processes is the norm's.

    Returns:
        Shape (L,), NaN for a layer without gradients; None where gradients are not with their parameters.
    """
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()) or any(
        hasattr(parameter, "ds_id") for parameter in model.parameters()
    ):
        logger.warning_once("DepthStatsCallback: no gradient norms with DeepSpeed ZeRO-3 and FSDP1; FSDP2 has them")
        return None
    squares = []
    for layer in text_stack(model).layers:
        parts = [_square(parameter.grad) for parameter in layer.parameters() if parameter.grad is not None]
        squares.append(torch.stack(parts).sum() if parts else torch.tensor(math.nan))
    return torch.stack([square.to(squares[0].device) for square in squares])


def _square(gradient: torch.Tensor) -> torch.Tensor:
    copies = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if isinstance(gradient, DTensor):
        for size, placement in zip(gradient.device_mesh.shape, gradient.placements, strict=True):
            if placement.is_partial():
                raise RuntimeError("DepthStatsCallback: a gradient is a partial sum; it was not reduced")
            if not placement.is_replicate():
                copies //= size
        gradient = gradient.to_local()
    return torch.linalg.vector_norm(gradient, dtype=torch.float32) ** 2 / copies


def _merge(moments: tuple[int, float, float], count: int, mean: float, variance: float) -> tuple[int, float, float]:
    """Moments of two sets together (Chan, Golub & LeVeque 1983), in double precision."""
    old_count, old_mean, old_squares = moments
    total = old_count + count
    difference = mean - old_mean
    squares = old_squares + variance * count + difference**2 * old_count * count / total
    return total, old_mean + difference * count / total, squares


def _is_compiled(model: nn.Module) -> bool:
    return any(
        module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
        for module in model.modules()
    )


# --- looking at them --------------------------------------------------------------------------------


def read_depth_stats(run: Any) -> tuple[list[int], dict[str, torch.Tensor]]:
    """What a `DepthStatsCallback` logged.

    Args:
        run: a Trainer, its `state.log_history`, a `trainer_state.json`, a checkpoint, or the `output_dir` of a run.

    Returns:
        The S measured steps, and for each measure a tensor of shape (S, L), float64, NaN where nothing was logged.

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
    found: dict[str, dict[int, dict[int, Any]]] = {measure: {} for measure in MEASURES}
    for entry in history:
        for key, value in entry.items():
            if match := _KEY.fullmatch(key):
                found[match[1]].setdefault(int(entry["step"]), {})[int(match[2])] = value
    steps = sorted({step for values in found.values() for step in values})
    if not steps:
        raise ValueError(f"no depth statistics in {run!r}; was a DepthStatsCallback added to the Trainer?")
    num_layers = 1 + max(layer for values in found.values() for layers in values.values() for layer in layers)
    tensors = {
        measure: torch.tensor(
            [[values.get(step, {}).get(layer, math.nan) for layer in range(num_layers)] for step in steps],
            dtype=torch.float64,
        )
        for measure, values in found.items()
    }
    return steps, tensors


def plot_depth_stats(runs: Any, path: str | os.PathLike[str] | None = None) -> Any:
    """Draws the depth statistics of a run, or of several side by side: a curve over depth for each measured step.

    Args:
        runs: what `read_depth_stats` takes, or a mapping of names to such.
        path: where to write the picture; its suffix says the format.

    Returns:
        The `matplotlib.figure.Figure`: a row a measure, a column a run. The scale of a row is the same in all columns.

    Raises:
        ImportError: if matplotlib is missing; the message names the extra.
        ValueError: if a run has no depth statistics.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise ImportError("plotting needs matplotlib: pip install 'hf-lnscale[plot]'") from None
    named: Iterable[tuple[str, Any]] = runs.items() if isinstance(runs, Mapping) else [("", runs)]
    columns = [(name, *read_depth_stats(run)) for name, run in named]
    figure = Figure(figsize=(1.2 + 4.2 * len(columns), 7.5), layout="constrained")
    grid = figure.subplots(len(MEASURES), len(columns), sharex="col", sharey="row", squeeze=False)
    every_step = [step for _, steps, _ in columns for step in steps]
    # Much happens early.
    color: Any = ScalarMappable(
        LogNorm(min(every_step), max(max(every_step), min(every_step) + 1)), colormaps["viridis"]
    )
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
    figure.colorbar(color, ax=grid, label="step", shrink=0.5)
    if path is not None:
        figure.savefig(path)
    return figure
