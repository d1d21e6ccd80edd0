"""The report of healing: what was changed, what it gave for each source of text, and the weights as they were."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from statistics import geometric_mean
from typing import Any

import torch
from torch import nn

from ..core.display import as_text, terminal
from ..core.record import SUBLAYERS, KnownText, named_parts, remember_source, write_known_text
from ..core.sublayers import Unit
from ..measuring.losses import perplexity_of
from .plan import by_kind

# How the name of a healed model says that its weights are not those of the checkpoint any more.
HEALED_IN_MEMORY = "healed"

# A parameter, and its values as they were, on the CPU.
Copy = tuple[nn.Parameter, torch.Tensor]


def copies(parameters: Iterable[nn.Parameter]) -> list[Copy]:
    return [(parameter, parameter.detach().to("cpu", copy=True)) for parameter in parameters]


@torch.no_grad()
def restore(copies: list[Copy]) -> None:
    for parameter, original in copies:
        parameter.copy_(original)


@dataclass(frozen=True)
class HealedLayer:
    """One kept MLP, and the fit that was tried on it. Losses are means over the judged sources.

    Attributes:
        layer: the position of its layer in the full model.
        dropped: what it makes up for: positions of layers, and pairs such as ("attention", 3).
        method: the method of the fit; "linear" where a mixture of experts rules out "refit".
        ridge: the penalty that was chosen, in units of the median second moment of the features; infinity leaves the
            layer as it is.
        blend: the fraction of the fitted change that was made; below 1 if all of it made a source of text worse.
        error_before: relative error of the residual stream after it on held-out tokens: the root of the mean over
            tokens of |state - full model's state|^2 / |full model's state|^2.
        error_after: the same with the chosen fit.
        loss_before: of the pruned model on held-out data before this step, nats a token.
        loss_after: the same after it.
        kept: whether the weights were changed.
        reason: why they were not, or "".
    """

    layer: int
    dropped: tuple[Unit, ...]
    method: str
    ridge: float
    blend: float
    error_before: float
    error_after: float
    loss_before: float
    loss_after: float
    kept: bool
    reason: str


@dataclass(frozen=True)
class HealedSource:
    """The effect of healing on one source of text, on its held-out part.

    Attributes:
        weight: how much it counted in the fit; 0 for a source that was only judged.
        perplexity_full, perplexity_before, perplexity_after: with all layers, without the dropped ones, and healed.
        change: of the loss by healing, nats a token; never above 0.
        change_error: its standard error over sequences; None if there is one only.
        perplexity_left_out: estimate of `perplexity_after` for a fit without this source (the changes that each step's
            fit to the other sources makes, added up): what text that was never fitted can expect. It is
            `perplexity_after` where `weight` is 0, and None if this is the only source, if it was not asked for, or if
            fitted text was judged under another name.
    """

    weight: float
    perplexity_full: float
    perplexity_before: float
    perplexity_after: float
    change: float
    change_error: float | None
    perplexity_left_out: float | None = None


@dataclass(frozen=True, eq=False)
class HealReport:
    """The result of healing. Perplexities are on the held-out data, which the penalties were chosen on too, and are
    geometric means over the sources of text, each counted once.

    Attributes:
        dropped: what is removed: positions of layers, and pairs such as ("attention", 3).
        method: as given.
        steps: one entry for each layer that was tried, in order.
        perplexity_full: of the model with all its layers.
        perplexity_before: without the dropped ones.
        perplexity_after: the same, healed; never above `perplexity_before`.
        sources: the same for each source of text, by name.
        data: `calibration` and `held_out`, as `TokenBatches.describe` records them.
        text_before: what the model knew of its calibration text before, if healing was noted; for `undo`.
    """

    dropped: tuple[Unit, ...]
    method: str
    steps: tuple[HealedLayer, ...]
    perplexity_full: float
    perplexity_before: float
    perplexity_after: float
    sources: dict[str, HealedSource]
    data: dict[str, Any]
    _originals: list[Copy] = field(default_factory=list, repr=False)
    _config: Any = field(default=None, repr=False)
    text_before: list[KnownText | None] = field(default_factory=list, repr=False)

    @property
    def never_fitted(self) -> dict[str, float]:
        """Expected perplexity of text that was never fitted: `full`, `before` and `after`, from `perplexity_left_out`.

        The geometric means over the sources that have it; empty if none does.
        """
        found = [one for one in self.sources.values() if one.perplexity_left_out is not None]
        names = {"full": "perplexity_full", "before": "perplexity_before", "after": "perplexity_left_out"}
        return {name: geometric_mean(getattr(one, value) for one in found) for name, value in names.items() if found}

    @property
    def kept(self) -> bool:
        """Whether any weight was changed."""
        return any(step.kept for step in self.steps)

    def undo(self) -> None:
        """Writes the weights back as they were, bit for bit. Works after the layers were taken out, too.

        The report holds a copy of each changed weight for this, on the CPU. `forget` frees them.
        """
        restore(self._originals)
        if self._originals:
            remember_source(self._config, "")
        if self.text_before:
            write_known_text(self._config, self.text_before.pop())

    def set_aside(self) -> Callable[[], None]:
        """Undoes the healing, and returns a function that applies it again. That holds a copy of the healed weights."""
        healed = copies(parameter for parameter, _ in self._originals)
        self.undo()

        def again() -> None:
            restore(healed)
            if healed:
                remember_source(self._config, HEALED_IN_MEMORY)

        return again

    def forget(self) -> None:
        """Frees the copies of the old weights; `undo` does nothing from then on."""
        self._originals.clear()

    def to_dict(self) -> dict[str, Any]:
        """For JSON. An infinite `ridge` is None."""
        steps = [asdict(step) for step in self.steps]
        for step in steps:
            step["dropped"] = _plain(step["dropped"])
            step["ridge"] = None if math.isinf(step["ridge"]) else step["ridge"]
        return {
            "dropped": _plain(self.dropped),
            "method": self.method,
            "perplexity": {
                "full": self.perplexity_full,
                "before": self.perplexity_before,
                "after": self.perplexity_after,
            },
            "never_fitted": self.never_fitted,
            "sources": {name: asdict(source) for name, source in self.sources.items()},
            "steps": steps,
            "data": self.data,
        }

    def __str__(self) -> str:
        title = (
            f"Healing without {_named(self.dropped)}: perplexity {self.perplexity_before:.2f} to "
            f"{self.perplexity_after:.2f} (all layers {self.perplexity_full:.2f})"
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
            error = "" if source.change_error is None else f" +- {source.change_error:.1%}"
            sources.append([
                name,
                f"{source.weight:g}" if source.weight else "judged only",
                f"{source.perplexity_full:.2f}",
                f"{source.perplexity_before:.2f}",
                f"{source.perplexity_after:.2f} ({math.expm1(source.change):+.1%}{error})",
                "-" if source.perplexity_left_out is None else f"{source.perplexity_left_out:.2f}",
            ])  # fmt: skip
        return as_text(
            terminal(["layer", "makes up for", "method", "ridge", "error", "perplexity", "kept"], steps, title),
            terminal(["source", "weight", "all layers", "without", "healed", "never fitted"], sources, "Perplexity"),
        )


def _named(units: Iterable[Unit]) -> str:
    found = by_kind(units)
    return named_parts(*(found.get(kind, ()) for kind in ("layers", *SUBLAYERS)))


def _plain(units: Iterable[Unit]) -> list[Any]:
    return [list(unit) if isinstance(unit, tuple) else unit for unit in units]
