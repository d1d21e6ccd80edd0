"""One step of healing: fits the weights of one kept MLP, evaluates the fit, and writes or discards it.

Shapes: B sequences, T tokens, N non-padding tokens of a batch, D hidden size, I MLP width, F features.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ..core.families import UnsupportedArchitectureError, family_of, submodule
from ..core.stack import Stack
from ..core.sublayers import Unit
from ..measuring.losses import SourceLosses
from ..measuring.split_model import SplitModel
from ..measuring.stream import hidden_states, layer_output, upcast
from ..measuring.text import TokenBatches
from .heal_report import Copy, HealedLayer, copies, restore

# Paths, relative to a decoder layer, of the MLP and of the weights that produce its output. All that exist are changed:
# the first in dense layers, the others in mixtures of experts. Shapes are (..., D, I), output channels first.
_MLP = "mlp"
OUTPUT_WEIGHTS = (
    "mlp.down_proj",
    "mlp.experts.down_proj",
    "mlp.shared_expert.down_proj",
    "mlp.shared_experts.down_proj",
)
# Path of a norm on the MLP output (Gemma 2 and 3).
_OUTPUT_NORM = "post_feedforward_layernorm"
# Ridge penalties relative to the median second moment of the features. Tried from the largest until one does worse.
_RIDGES = (3.0, 0.3, 0.03, 0.003)
# Fractions of the change to try while the fit makes the model worse on any source of text.
_BLENDS = (1.0, 0.5, 0.25, 0.125)
# The largest of them if no text was given and one of these helps. If the loss is quadratic in the fraction and lowest
# at s, half the change keeps three quarters of the gain at s = 1, and harms nothing with s >= 1/4 (the whole: 1/2).
_LARGEST_NOT_GIVEN = 0.5
# Relative tolerance between the output of the changed weights and the fit.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
# Tokens per chunk in double precision, as a fraction of the features, to stay small compared to an (F, F) matrix.
_TOKENS_PER_FEATURE, _LEAST_TOKENS = 1 / 64, 64
# Number of stripes in which second moments are accumulated. More stripes compute less of the redundant triangle.
_STRIPES = 8


def output_weights(stack: Stack, layer: int) -> list[tuple[str, nn.Parameter]]:
    """The parameters that produce a layer's MLP output, with their paths: weights (..., D, I) and biases (..., D)."""
    weights: list[tuple[str, nn.Parameter]] = []
    for path in OUTPUT_WEIGHTS:
        holder = submodule(stack.layers[layer], path)
        names = ["weight", "bias"]
        if holder is None:  # the experts' weights are parameters, not modules
            parent, _, name = path.rpartition(".")
            holder, names = submodule(stack.layers[layer], parent), [name]
            if not hasattr(holder, name):
                continue
        if holder._parameters.get(names[0]) is None:
            raise ValueError(
                f"model: {path} of layer {layer} ({type(holder).__name__}) has no plain weight; merge or remove its "
                "wrapper (an adapter, a parametrization) before healing"
            )
        parameters = [(path, holder._parameters.get(name)) for name in names]
        weights += [(path, parameter) for path, parameter in parameters if parameter is not None]
    return weights


def require_changeable(model: nn.Module, stack: Stack, layer: int) -> None:
    model_type = stack.model.config.model_type
    family_of(stack.model.config, "healing")
    weights = output_weights(stack, layer)
    if not weights or submodule(stack.layers[layer], _MLP) is None:
        raise UnsupportedArchitectureError(
            f"healing is not possible for model_type {model_type!r}: layer {layer} has none of {OUTPUT_WEIGHTS}"
        )
    if norm := submodule(stack.layers[layer], _OUTPUT_NORM):
        weights = [*weights, (_OUTPUT_NORM, norm.get_parameter("weight"))]
    users: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.is_meta:
            users.setdefault(parameter.data_ptr(), set()).add(name)
    for path, weight in weights:
        problem = ""
        if weight.is_meta:
            problem = "not in memory (offloaded, or on the meta device); load the whole model"
        elif type(weight) is not nn.Parameter or weight.dtype not in TOLERANCE:
            problem = f"quantized or sharded ({type(weight).__name__}, {weight.dtype}); heal the model in floating "
            problem += "point, in one process, and quantize or shard it afterwards"
        elif weight.numel() and len(names := users[weight.data_ptr()]) > 1:
            problem = f"shared by {sorted(names)}, so changing it would affect more than this layer"
        if problem:
            raise ValueError(f"model: {path} of layer {layer} is {problem}")


# --- the residual stream ----------------------------------------------------------------------------


class _Reached(Exception):
    """Ends a forward pass after the last layer that is needed."""


@dataclass(frozen=True, eq=False)
class Stream:
    """The states of the data before one layer, kept on the CPU to continue from there without rerunning layers."""

    split_model: SplitModel
    batches: TokenBatches
    removed: frozenset[Unit] = frozenset()  # to continue without these of the following layers and sub-layers
    place: int = 0
    states: tuple[tuple[torch.Tensor, torch.device], ...] = ()  # for each batch; none for place 0

    def state(self, index: int) -> torch.Tensor:
        state_BTD, device = self.states[index]
        return state_BTD.to(device)

    def _pass(self, index: int) -> torch.Tensor:
        start = (self.place - 1, self.state(index)) if self.states else None
        return self.split_model.hidden(self.batches.batches[index], self.removed, start)

    def at(self, place: int) -> Stream:
        """The states before layer `place`, or after the last layer."""
        if place == self.place:
            return self
        run = [(i, layer) for i, layer in enumerate(self.split_model.stack.layers) if i not in self.removed]
        states: list[tuple[torch.Tensor, torch.device]] = []

        def stop(state_BTD: torch.Tensor) -> None:
            states.append((state_BTD.cpu(), state_BTD.device))
            raise _Reached

        if following := next((layer for i, layer in run if i >= place), None):
            hook = following.register_forward_pre_hook(
                lambda layer, args, kwargs: stop(hidden_states(args, kwargs)), with_kwargs=True
            )
        else:
            hook = run[-1][1].register_forward_hook(lambda layer, args, output: stop(layer_output(output)))
        with hook:
            for index in range(len(self.batches)):
                with suppress(_Reached):
                    self._pass(index)
        return replace(self, place=place, states=tuple(states))

    def target(self, pruned: Stream, place: int) -> Stream:
        """The states that a pruned model should have at an earlier place in order to reach these states.

        These are the states minus what the model adds in between, neglecting that this changes with the states.
        """
        if pruned.removed.issuperset(range(place, self.place)):
            return self
        near = pruned.at(place)
        far = near.at(self.place)
        states = []
        for index in range(len(self.batches)):
            y_BTD, near_BTD, far_BTD = (upcast(stream.state(index)) for stream in (self, near, far))
            states.append(((y_BTD + near_BTD - far_BTD).cpu(), y_BTD.device))
        return replace(self, place=place, states=tuple(states))

    def observe(
        self, index: int, layer: nn.Module, paths: Collection[str]
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Runs only the layer at this place on a batch: path in the layer -> (input, output); "" is the layer."""
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def note(path: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen[path] = hidden_states(args, kwargs), layer_output(output)
            if not path:
                raise _Reached

        with ExitStack() as hooks:
            for path in (*paths, ""):
                hook = layer.get_submodule(path).register_forward_hook(partial(note, path), with_kwargs=True)
                hooks.enter_context(hook)
            with suppress(_Reached):
                self._pass(index)
        return seen

    def losses(self, *names: str) -> SourceLosses:
        """Next-token cross-entropy when continuing from here to the end, for all sources of text or only some."""
        names = names or tuple(self.batches.weights)
        losses = SourceLosses(self.split_model, self.batches.only(*names))
        for index, batch in enumerate(self.batches):
            if batch.name in names:
                losses.add(batch, self._pass(index))
        return losses


# --- least squares ----------------------------------------------------------------------------------


class _Moments(NamedTuple):
    """Second moments x x^T of features and x z^T with the regression target z, summed over tokens.

    Of the symmetric matrix x x^T, only the triangle that Cholesky reads is complete.
    """

    xx_FF: torch.Tensor
    xz_FD: torch.Tensor

    def add(self, x_NF: torch.Tensor, z_ND: torch.Tensor, weight: float) -> None:
        for start in range(0, x_NF.shape[1], step := -(-x_NF.shape[1] // _STRIPES)):
            stripe = slice(start, start + step)
            self.xx_FF[stripe, start:].addmm_(x_NF[:, stripe].T, x_NF[:, start:], alpha=weight)
        self.xz_FD.addmm_(x_NF.T, z_ND, alpha=weight)

    def copy(self) -> _Moments:
        return _Moments(self.xx_FF.clone(), self.xz_FD.clone())

    def solve_in_place(self, ridge: float) -> torch.Tensor:
        """The ridge regression coefficients, shape (F, D). Overwrites the moments."""
        diagonal_F = self.xx_FF.diagonal()
        diagonal_F += ridge * (diagonal_F.median().item() or diagonal_F.mean().item() or 1.0)
        # Transposing a symmetric matrix gives the same matrix in column-major order, which LAPACK factorizes in place.
        factor_FF = torch.linalg.cholesky(self.xx_FF.mT, out=self.xx_FF.mT)
        half_FD = torch.linalg.solve_triangular(factor_FF, self.xz_FD, upper=False)
        change_FD: torch.Tensor = torch.linalg.solve_triangular(factor_FF.mT, half_FD, upper=True)
        return change_FD


class _Tokens(NamedTuple):
    """Non-padding tokens of one source of text at one layer, in double precision."""

    name: str  # of the source
    u_ND: torch.Tensor  # MLP output, as added to the residual stream unless a norm follows
    x_NF: torch.Tensor  # regression features
    target_ND: torch.Tensor  # what should be added: the full model's state minus the residual stream
    gap_ND: torch.Tensor  # the full model's state minus the layer's output
    y_ND: torch.Tensor  # the full model's state


class _Fit(NamedTuple):
    """A change of the MLP output from u to u + x @ change, and of the gain of a following norm, if any."""

    ridge: float
    change_FD: torch.Tensor
    gain_D: torch.Tensor | None


class Repair:
    """Refits the MLP of a kept layer to compensate for missing parts.

    Takes the layer's input states in the pruned model, and the full model's states to match after it.
    """

    def __init__(
        self, stack: Stack, position: int, method: str, full: Sequence[Stream], pruned: Sequence[Stream]
    ) -> None:
        self.stack, self.position, self.layer = stack, position, stack.layers[position]
        parameters = output_weights(stack, position)
        self.paths = [path for path, _ in parameters]
        self.method = method if all(path.startswith(OUTPUT_WEIGHTS[0]) for path in self.paths) else "linear"
        self.old = copies(weight for _, weight in parameters)
        self.norm = submodule(self.layer, _OUTPUT_NORM)
        self.old_norm: list[Copy] = []
        if self.norm is not None:
            self.old_norm = copies([self.norm.get_parameter("weight")])
            self.gain_D = _double(self.old_norm[0][0]) + float(stack.family.one_plus_weight)
        self.originals = self.old + self.old_norm
        self.fitted, self.judged = zip(full, pruned, strict=True)
        batches = self.fitted[1].batches
        weights, self.careful = batches.weights, not batches.given
        # Token weights that give each source its weight, independent of its number of tokens.
        self.counts = {name: batches.only(name).num_tokens for name in weights}
        scale = sum(self.counts.values()) / sum(weights.values())
        self.token_weights = {name: scale * weight / self.counts[name] for name, weight in weights.items()}

    def heal(
        self, dropped: tuple[Unit, ...], before: SourceLosses, cross_validate: bool, quick: bool
    ) -> tuple[HealedLayer, SourceLosses, dict[str, float]]:
        """One step: its record, the losses after it, and the change of each source's loss by a fit to the others."""
        error_before, moments = math.nan if quick else self._error(), self._moments()
        fit, after = self._chosen(moments, _RIDGES[:1] if quick else _RIDGES)
        blend, reason = 1.0, "the loss on text that was not fitted would be higher"
        names = self.token_weights.keys() & before.of.keys() if cross_validate and len(self.token_weights) > 1 else ()
        changes: dict[str, dict[float, float]] = {}
        if self.careful:
            changes = {name: self._left_out(name, moments, fit.ridge, _BLENDS, before) for name in names}
        harmless = [part for part in _BLENDS if all(change[part] <= 0 for change in changes.values())]
        if self.careful and not quick:  # of a ruined model, only the whole change may repair anything
            harmless = [part for part in harmless if part <= _LARGEST_NOT_GIVEN] or harmless
        if harmless:
            best = min(harmless, key=lambda part: sum(change[part] for change in changes.values()))
            blends = [part for part in harmless if part <= best]
            blend, after, reason = self._blended(fit, blends, after, before)
        if not (reason or changes):
            changes = {name: self._left_out(name, moments, fit.ridge, [blend], before) for name in names}
        left_out = {name: 0.0 if reason else changes[name][blend] for name in names}
        if reason:
            restore(self.originals)
            after = before
        else:
            self._write(fit, blend)
        step = HealedLayer(
            layer=self.position,
            dropped=dropped,
            method=self.method,
            ridge=math.inf if reason else fit.ridge,
            blend=blend,
            error_before=error_before,
            error_after=error_before if reason or quick else self._error(),
            loss_before=before.mean,
            loss_after=after.mean,
            kept=not reason,
            reason=reason,
        )
        return step, after, left_out

    def _chosen(self, moments: _Moments, ridges: Iterable[float]) -> tuple[_Fit, SourceLosses]:
        """The fit of the largest penalty within a standard error of the best, and its losses."""
        tried: list[tuple[_Fit, SourceLosses]] = []
        for ridge in ridges:  # in decreasing order
            restore(self.originals)
            tried.append((self._fit(moments.copy().solve_in_place(ridge), ridge), self.judged[1].losses()))
            if len(tried) > 1 and tried[-1][1].mean > tried[-2][1].mean:
                break
        best = min((losses for _, losses in tried), key=lambda losses: losses.mean)
        near = (pair for pair in tried if pair[1] is best or pair[1].mean - best.mean <= pair[1].error(best))
        return next(near)

    def _blended(
        self, fit: _Fit, blends: Iterable[float], after: SourceLosses, before: SourceLosses
    ) -> tuple[float, SourceLosses, str]:
        """The first of some blends that makes no source worse, and its losses; otherwise why not to heal."""
        worse: list[str] = []
        for blend in blends:
            if blend < 1.0:
                self._write(fit, blend)
                after = self.judged[1].losses()
            worse = [name for name in before.of if after.of[name].mean > before.of[name].mean]
            if not worse and after.mean < before.mean:
                return blend, after, ""
        of = f" of {', '.join(worse)}" if len(before.of) > 1 else ""
        return 1.0, before, f"the loss on held-out data{of} would not be lower"

    def _left_out(
        self, name: str, moments: _Moments, ridge: float, blends: Iterable[float], before: SourceLosses
    ) -> dict[float, float]:
        """The change of a source's loss by each of some blends of a fit to the other sources."""
        restore(self.originals)
        others = self.token_weights.keys() - {name}
        if 2 * self.counts[name] < sum(self.counts.values()):
            part = moments.copy()
            self._add_moments(part, [name], -1.0)
        else:  # takes no longer, and avoids the cancellation of large numbers
            part = _Moments(*map(torch.zeros_like, moments))
            self._add_moments(part, others)
        fit, changes = self._fit(part.solve_in_place(ridge), ridge, others), {}
        for blend in blends:
            self._write(fit, blend)
            changes[blend] = self.judged[1].losses(name).mean - before.of[name].mean
        return changes

    def _moments(self) -> _Moments:
        self.probe = next(self._tokens(self.fitted))
        features, channels = self.probe.x_NF.shape[1], self.probe.u_ND.shape[1]
        moments = _Moments(*(self.probe.u_ND.new_zeros(features, size) for size in (features, channels)))
        self._add_moments(moments, self.token_weights)
        return moments

    def _add_moments(self, moments: _Moments, names: Collection[str], sign: float = 1.0) -> None:
        for tokens in self._tokens(self.fitted, names):
            x_NF, z_ND = tokens.x_NF, tokens.gap_ND
            if self.norm is not None:  # fit only directions
                scale_N1 = _inverse_rms(tokens.u_ND)
                direction_ND = tokens.target_ND / torch.where(self.gain_D == 0, 1.0, self.gain_D)
                z_ND = direction_ND * _inverse_rms(direction_ND) - tokens.u_ND * scale_N1
                x_NF = x_NF * scale_N1
            moments.add(x_NF, z_ND, sign * self.token_weights[tokens.name])

    def _fit(self, change_FD: torch.Tensor, ridge: float, names: Collection[str] | None = None) -> _Fit:
        """Writes the weights, verifies their output, and fits the following norm, if any, to it."""
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
        """Applies a fraction of the fit to the original weights, in double precision with a single rounding."""
        for parameter, original in self.old:
            # One expert at a time, since all of them in double precision would take four times their memory.
            expert = parameter.dim() == 3
            parts = zip(parameter.unbind(0), original.unbind(0), strict=True) if expert else [(parameter, original)]
            for part, old in parts:
                new = _double(old.to(part.device))
                change_DF = fit.change_FD.to(new.device).T
                if self.method == "linear":
                    new = new + blend * (change_DF @ new)
                elif part.dim() == 2:  # a bias is not changed
                    new = new + blend * change_DF
                part.copy_(new)
        if fit.gain_D is not None:
            for parameter, original in self.old_norm:
                parameter.copy_(_double(original.to(parameter.device)) + blend * (fit.gain_D - self.gain_D))

    def _error(self) -> float:
        """The relative error of the layer's output on held-out data, with equal weight for each token."""
        total, count = 0.0, 0
        for tokens in self._tokens(self.judged):
            norm_N = tokens.y_ND.norm(dim=-1).clamp_min(1e-30)
            total += (tokens.gap_ND.norm(dim=-1) / norm_N).square().sum().item()
            count += len(norm_N)
        return math.sqrt(total / count)

    def _tokens(self, streams: tuple[Stream, Stream], names: Collection[str] | None = None) -> Iterator[_Tokens]:
        """Yields the non-padding tokens of all or some sources, in chunks."""
        full, pruned = streams
        # Granite scales what it adds to the residual stream.
        factor = float(getattr(self.layer, "residual_multiplier", 1.0))

        norm, down = self.stack.family.mlp_norm, OUTPUT_WEIGHTS[0]
        paths = [norm, _MLP, *([down] if self.method == "refit" else []), *([_OUTPUT_NORM] if self.norm else [])]
        for index, batch in enumerate(pruned.batches):
            if names is not None and batch.name not in names:
                continue
            seen = pruned.observe(index, self.layer, paths)
            residual_BTD, u, output_BTD = seen[norm][0], seen[_MLP][1], seen[""][1]
            x = seen[down][0] if down in seen else u
            added_BTD = factor * (seen[_OUTPUT_NORM][1] if self.norm else u).view_as(output_BTD)
            size = _double(output_BTD).norm().clamp_min(1e-30)
            off = float(_double(output_BTD - (residual_BTD + added_BTD)).norm() / size)
            if not off <= 16 * torch.finfo(output_BTD.dtype).eps:
                raise self._unsupported(f"its output is not its residual stream plus the output of {_MLP!r}", off)
            states = (u, x, residual_BTD, output_BTD, full.state(index))
            flat = [state.to(output_BTD.device).reshape(batch.attention_mask.numel(), -1) for state in states]
            tokens = batch.attention_mask.flatten().nonzero()[:, 0].to(output_BTD.device)
            for part in tokens.split(max(_LEAST_TOKENS, int(x.shape[-1] * _TOKENS_PER_FEATURE))):
                u_ND, x_NF, residual_ND, output_ND, y_ND = (_double(state[part]) for state in flat)
                yield _Tokens(
                    batch.name, u_ND.mul_(factor), x_NF.mul_(factor), y_ND - residual_ND, y_ND - output_ND, y_ND
                )

    def _require_exact(self, change_FD: torch.Tensor) -> None:
        """Refuses an MLP that is not linear in the changed weights, so that they do not produce the fitted output."""
        expected_ND = self.probe.u_ND + self.probe.x_NF @ change_FD
        found_ND = next(self._tokens(self.fitted)).u_ND
        off = float((found_ND - expected_ND).norm() / expected_ND.norm().clamp_min(1e-30))
        if not off <= TOLERANCE[self.old[0][0].dtype]:
            raise self._unsupported(f"the output of {_MLP!r} is not linear in its weights {self.paths}", off)

    def _unsupported(self, problem: str, off: float) -> UnsupportedArchitectureError:
        name = type(self.layer).__name__
        return UnsupportedArchitectureError(f"healing is not possible for {name}: {problem} (off by {off:.1e})")


def _inverse_rms(x_ND: torch.Tensor, norm: nn.Module | None = None) -> torch.Tensor:
    """The inverse root mean square of each token, shape (N, 1), with the epsilon of a norm."""
    epsilon = float(getattr(norm, "eps", getattr(norm, "variance_epsilon", 0.0)))
    square_N1: torch.Tensor = x_ND.square().mean(-1, keepdim=True)
    return (square_N1 + epsilon).clamp_min(1e-60).rsqrt()


def _double(x: torch.Tensor) -> torch.Tensor:
    return (x.cpu() if x.device.type == "mps" else x).double()
