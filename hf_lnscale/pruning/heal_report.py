"""The report of healing: what was changed, its effect on each source of text, and the original weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from statistics import geometric_mean
from typing import Any

import torch
from torch import nn

from ..core.display import as_text, terminal, with_error
from ..core.record import SUBLAYERS, KnownText, named_parts, remember_source, write_known_text
from ..core.sublayers import Unit
from ..measuring.losses import perplexity_of
from .plan import by_kind

# `SourceName.changed` of a healed model, whose weights differ from the checkpoint's.
HEALED_IN_MEMORY = "healed"

_WHICH = ("full", "before", "after")

# A parameter and a copy of its values on the CPU.
Copy = tuple[nn.Parameter, torch.Tensor]


def copies(parameters: Iterable[nn.Parameter]) -> list[Copy]:
    return [(parameter, parameter.detach().to("cpu", copy=True)) for parameter in parameters]


@torch.no_grad()
def restore(copies: list[Copy]) -> None:
    for parameter, original in copies:
        parameter.copy_(original)


@dataclass(frozen=True)
class HealedLayer:
    """One kept MLP and the fit tried on it. Losses are means over the held-out sources, in nats per token.

    The error is that of the layer's output on held-out tokens: the root of the mean over tokens of |state - full
    model's state|^2 / |full model's state|^2 (NaN in a quick comparison).
    """

    layer: int  # position in the full model
    dropped: tuple[Unit, ...]  # what it compensates for: positions of layers, and pairs such as ("attention", 3)
    method: str  # "linear" if "refit" is not possible for a mixture of experts
    ridge: float  # penalty, relative to the median second moment of the features; infinity if nothing was changed
    # Fraction of the fitted change applied; below 1 if the full change made a source of text worse, or if no data was
    # given and less of it did better on sources left out.
    blend: float
    error_before: float
    error_after: float
    loss_before: float
    loss_after: float
    kept: bool  # whether the weights were changed
    reason: str  # why they were not changed, or ""


@dataclass(frozen=True)
class HealedSource:
    """The effect of healing on the held-out part of one source of text.

    `perplexity_left_out` estimates `perplexity_after` for text that was never fitted, from fits without this source
    (the sum of their changes over all steps). Equal to `perplexity_after` if `weight` is 0. None if this is the only
    source, cross-validation was off, or the source is fitted text under another name.
    """

    weight: float  # in the fit; 0 for a source that was only evaluated
    perplexity_full: float
    perplexity_before: float
    perplexity_after: float
    change: float  # of the loss by healing, in nats per token; never above 0
    change_error: float | None  # its standard error over sequences; None for a single sequence
    perplexity_left_out: float | None = None
    errors: dict[str, float] = field(default_factory=dict)  # empty for a single sequence

    def relative_error(self, which: str) -> float:
        """The standard error of one of the perplexities as a fraction of it; 0 if it is not known."""
        return self.errors.get(which, 0.0) / float(getattr(self, f"perplexity_{which}"))


@dataclass(frozen=True, eq=False)
class HealReport:
    """The result of healing.

    Perplexities are on the held-out data, on which the penalties were also chosen: with all layers (full), without the
    dropped ones (before), and healed (after; never above before). They are unweighted geometric means over the sources
    of text.

    Attributes:
        dropped: what is removed: positions of layers, and pairs such as ("attention", 3).
        method: as given.
        steps: one entry for each layer tried, in order.
        sources: the perplexities on each source of text, by name.
        data: `calibration` and `held_out`, as returned by `TokenBatches.describe`.
        errors: standard errors of the perplexities, by "full", "before" and "after".
        text_before: the calibration text recorded before healing, if it was replaced; used by `undo`.
    """

    dropped: tuple[Unit, ...]
    method: str
    steps: tuple[HealedLayer, ...]
    perplexity_full: float
    perplexity_before: float
    perplexity_after: float
    sources: dict[str, HealedSource]
    data: dict[str, Any]
    errors: dict[str, float] = field(default_factory=dict)
    _originals: list[Copy] = field(default_factory=list, repr=False)
    _healed: list[Copy] = field(default_factory=list, repr=False)
    _config: Any = field(default=None, repr=False)
    text_before: list[KnownText | None] = field(default_factory=list, repr=False)

    @property
    def never_fitted(self) -> dict[str, float]:
        """Expected `full`, `before` and `after` perplexity on text that was never fitted.

        Geometric means over the sources that have a `perplexity_left_out`, with standard errors as `full_error` and so
        on; empty if none does. `after_error` is the error of the measured loss.
        """
        known = [source for source in self.sources.values() if source.perplexity_left_out is not None]
        names = {"full": "perplexity_full", "before": "perplexity_before", "after": "perplexity_left_out"}
        means = {to: geometric_mean(getattr(source, name) for source in known) for to, name in names.items() if known}
        errors = {
            f"{name}_error": mean / len(known) * math.hypot(*(source.relative_error(name) for source in known))
            for name, mean in means.items()
        }
        return means | errors

    @property
    def kept(self) -> bool:
        """Whether any weights were changed."""
        return any(step.kept for step in self.steps)

    def undo(self) -> None:
        """Restores the original weights, bit for bit. Also works after the layers were dropped.

        For this, the report keeps a copy of each changed weight on the CPU. `forget` frees them.
        """
        restore(self._originals)
        if self._originals:
            remember_source(self._config, "")
        if self.text_before:
            write_known_text(self._config, self.text_before.pop())

    def set_aside(self) -> None:
        """Undoes the healing, and keeps a copy of the healed weights for `redo`."""
        self._healed[:] = copies(parameter for parameter, _ in self._originals)
        self.undo()

    def redo(self) -> None:
        restore(self._healed)
        if self._healed:
            remember_source(self._config, HEALED_IN_MEMORY)

    def forget(self) -> None:
        """Frees the copies of weights; `undo` then has no effect."""
        self._originals.clear()
        self._healed.clear()

    def to_dict(self) -> dict[str, Any]:
        """For JSON. An infinite `ridge` is None."""
        steps = [
            asdict(step) | {"dropped": _plain(step.dropped), "ridge": None if math.isinf(step.ridge) else step.ridge}
            for step in self.steps
        ]
        return {
            "dropped": _plain(self.dropped),
            "method": self.method,
            "perplexity": {which: getattr(self, f"perplexity_{which}") for which in _WHICH},
            "errors": self.errors,
            "never_fitted": self.never_fitted,
            "sources": {name: asdict(source) for name, source in self.sources.items()},
            "steps": steps,
            "data": self.data,
        }

    def __str__(self) -> str:
        full, before, after = _shown(self)
        title = (
            f"Healing without {_named(self.dropped)}: perplexity {before} to {after} (all layers {full}). Of single "
            "layers, without standard errors:"
        )
        steps, sources = [], []
        for step in self.steps:
            done = f"{step.blend:g} of it" if step.blend < 1 else "yes"
            steps.append([
                str(step.layer),
                _named(step.dropped),
                step.method,
                "-" if math.isinf(step.ridge) else f"{step.ridge:g}",
                f"{step.error_before:.3f} to {step.error_after:.3f}",
                f"{perplexity_of(step.loss_before):.2f} to {perplexity_of(step.loss_after):.2f}",
                done if step.kept else f"no: {step.reason}",
            ])  # fmt: skip
        for name, source in self.sources.items():
            weight = f"{source.weight:g}" if source.weight else "evaluated only"
            *others, after = _shown(source)
            error = "" if source.change_error is None else f" ± {source.change_error:.1%}"
            change = f"{after} ({math.expm1(source.change):+.1%}{error})"
            never = with_error(source.perplexity_left_out, source.errors.get("after"))
            sources.append([name, weight, *others, change, never])
        return as_text(
            terminal(["layer", "compensates", "method", "ridge", "error", "perplexity", "kept"], steps, title),
            terminal(["source", "weight", "all layers", "without", "healed", "never fitted"], sources, "Perplexity"),
        )


def _shown(one: HealReport | HealedSource) -> list[str]:
    """The three perplexities."""
    return [with_error(getattr(one, f"perplexity_{which}"), one.errors.get(which)) for which in _WHICH]


def _named(units: Iterable[Unit]) -> str:
    return named_parts(**dict.fromkeys(SUBLAYERS, ()) | by_kind(units))


def _plain(units: Iterable[Unit]) -> list[Any]:
    return [list(unit) if isinstance(unit, tuple) else unit for unit in units]
