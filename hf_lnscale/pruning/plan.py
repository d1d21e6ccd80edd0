"""A pruning plan: which layers of which model to drop, how they were chosen, and what it costs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from ..checkpoints.folders import write_atomically
from ..core.display import brief, with_error
from ..core.errors import ArgumentError
from ..core.families import text_config
from ..core.json_file import are_layers, is_positive, number_of, read_object, to_json
from ..core.record import SUBLAYERS, KnownText, named_parts, record
from ..core.sublayers import Unit

PLAN_FILE = "pruning_plan.json"
_FORMAT = 1
_KINDS: dict[str, Any] = {
    "layers": list, "model": dict, "model_name": str, "method": dict, "data": dict, "perplexity": dict, "errors": dict,
    "steps": list, "heal": (dict, type(None)), "notes": dict, "attention": list, "mlp": list,
}  # fmt: skip
# Fields that identify a plan's model. They are in config.json, so no weights need to be read.
_FINGERPRINT = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size"
)  # fmt: skip


def fingerprint(config: PreTrainedConfig) -> dict[str, Any]:
    """The shape of a model, as stored in a plan. Models with different fingerprints have different layers."""
    text, before = text_config(config), record(config).dropped
    missing = units_of(vars(before)) if before else []
    return {
        "model_type": text.model_type,
        **{name: getattr(text, name, None) for name in _FINGERPRINT},
        "dropped_before": [unit if isinstance(unit, int) else f"{unit[0]} {unit[1]}" for unit in missing],
    }


@dataclass(frozen=True)
class PruningPlan:
    """The result of `plan_pruning`, saved as a small JSON file.

    Attributes:
        layers: sorted positions to drop, in the model that the plan was made for.
        model: fingerprint of that model: model_type, sizes, and what had already been dropped from it.
        model_name: its Hub name or folder name, for information.
        method: how the layers were chosen.
        data: the text used: `calibration` and `held_out`, each with source, number of tokens and sha256; the former
            also with hashes of its passages, see `measuring.known_text`.
        perplexity: on held-out data: `before`, `after` dropping, and `healed` if healing was tried and kept.
        errors: standard errors over sequences, of `perplexity` by the same names, and of the relative change from
            `before`, paired by sequence, as `after_change` and `healed_change`. 0 for a single sequence.
        steps: the steps of the search: layers dropped so far, and the values that decided.
        heal: report of the healing tried, or None.
        notes: other information, such as sizes before and after.
        attention: positions of layers that lose only their attention.
        mlp: positions of layers that lose only their MLP.
    """

    layers: tuple[int, ...]
    model: dict[str, Any]
    model_name: str = ""
    method: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    perplexity: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    heal: dict[str, Any] | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()

    @property
    def units(self) -> list[Unit]:
        """All units to drop: layers, and attention or MLPs of other layers as pairs such as ("attention", 3)."""
        return units_of(vars(self))

    @property
    def dropped(self) -> str:
        """The units in words, for example "layers 12; attention of layers 7, 26"."""
        return named_parts(self.layers, self.attention, self.mlp)

    @property
    def perplexity_increase(self) -> float | None:
        """The relative increase (0.1 means ten percent), after healing if that was kept."""
        before, after = self.perplexity.get("before"), self.perplexity.get("healed", self.perplexity.get("after"))
        return None if before is None or after is None else after / before - 1.0

    @property
    def known_text(self) -> KnownText | None:
        """The text used to choose or heal the layers; None if they were given, or the plan is from an older release.

        Raises:
            ValueError: if the plan's record of it is invalid.
        """
        stored = self.data.get("calibration")
        return KnownText.of(stored) if isinstance(stored, dict) and "passages" in stored else None

    def require_whole_layers(self, argument: str) -> None:
        """Raises an error about `argument` if the plan drops attention or MLPs separately."""
        if self.attention or self.mlp:
            problem = "the plan drops attention or MLPs separately, but only whole layers are supported here"
            raise ArgumentError(argument, problem=problem)

    def require_made_for(self, config: PreTrainedConfig) -> None:
        """Raises a ValueError that names the difference if the plan is for a different model."""
        for name, actual in fingerprint(config).items():
            if (expected := self.model.get(name)) != actual:
                problem = f"with {name} {brief(expected)}; this one has {actual!r}"
                name = self.model_name or "without a name"
                raise ValueError(f"drop_layers: the plan was made for another model ({name}), {problem}")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the plan to a file, or to a folder as `pruning_plan.json`; returns the path of the file."""
        path = Path(path)
        if path.is_dir() or path.suffix != ".json":
            path.mkdir(parents=True, exist_ok=True)
            path = path / PLAN_FILE
        write_atomically(path, to_json({"format": _FORMAT, **asdict(self)}, indent=2) + "\n")
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PruningPlan:
        """Reads a plan from a file or a folder that contains one.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if the file is not a plan.
        """
        file = Path(os.fsdecode(path))
        if file.is_dir():
            file = file / PLAN_FILE
        if not file.is_file():
            raise FileNotFoundError(f"drop_layers: there is no pruning plan at {str(path)!r} ({PLAN_FILE}, or *.json)")
        try:
            values = read_object(file, **_KINDS)
            if values.get("format") != _FORMAT:
                raise ValueError("it has an unknown format")
            if missing := {"layers", "model"} - set(values):
                raise ValueError(f"it has no {min(missing)}")
            values = {name: value for name, value in values.items() if name in _KINDS}
            for kind in ("layers", *SUBLAYERS):
                if not are_layers(layers := values.get(kind, [])):
                    raise ValueError(f"its {kind} must be distinct integers >= 0, got {brief(layers)}")
                values[kind] = tuple(layers)
            figures, errors = (
                {figure: number_of(value) for figure, value in values.get(name, {}).items()}
                for name in ("perplexity", "errors")
            )
            if not all(map(is_positive, figures.values())) or ("healed" in figures and "after" not in figures):
                raise ValueError(f"its perplexity must be positive numbers by name, got {brief(figures)}")
            if not all(error == 0 or is_positive(error) for error in errors.values()):
                raise ValueError(f"its errors must be numbers >= 0 by name, got {brief(errors)}")
            plan = cls(**values | {"perplexity": figures, "errors": errors})
            _ = plan.known_text  # raises if it is invalid
            return plan
        except ValueError as error:
            raise ValueError(f"drop_layers: {str(file)!r} is not a pruning plan: {error}") from None

    def __str__(self) -> str:
        figures = ", ".join(
            f"{name} {with_error(value, self.errors.get(name))}" for name, value in self.perplexity.items()
        )
        result = f"perplexity {figures}" if figures else ""
        if "healed" in self.perplexity and (never := (self.heal or {}).get("never_fitted")):
            before, after = (with_error(never[one], never.get(f"{one}_error")) for one in ("full", "after"))
            result += f"; on text that was never fitted: before {before}, healed {after}"
        what = f"drop {len(self.layers)} of {self.model.get('num_hidden_layers')} layers: {list(self.layers)}"
        what += "".join(f", {kind} of {list(getattr(self, kind))}" for kind in SUBLAYERS if getattr(self, kind))
        return what + (f" ({result})" if result else "")


def units_of(step: Mapping[str, Any]) -> list[Unit]:
    """The units in `layers`, `attention` and `mlp` of a plan or a step of a search."""
    return [*step["layers"], *((kind, layer) for kind in SUBLAYERS for layer in step.get(kind, ()))]


def by_kind(units: Iterable[Unit]) -> dict[str, list[int]]:
    """The inverse of `units_of`. A layer that loses both attention and MLP is listed in `layers`."""
    units = list(units)
    layers = {unit for unit in units if not isinstance(unit, tuple)}
    parts = {
        kind: {unit[1] for unit in units if isinstance(unit, tuple) and unit[0] == kind} - layers for kind in SUBLAYERS
    }
    both = set.intersection(*parts.values())
    sublayers = {kind: sorted(part - both) for kind, part in parts.items() if part - both}
    return {"layers": sorted(layers | both)} | sublayers
