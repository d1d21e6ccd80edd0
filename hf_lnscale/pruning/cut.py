"""Parses `drop_layers`, `drop_attention` and `drop_mlp` into a `Cut`, the parts to drop from a model."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..core.families import family_of, require_sublayer, text_config
from ..core.record import SUBLAYERS, KnownText, record
from ..core.warnings import warn
from .plan import PruningPlan

# Kinds of layers whose cache does not grow with the number of tokens.
_WITHOUT_TOKENS = ("linear_attention", "conv", "mamba", "moe", "mlp")


@dataclass(frozen=True)
class Cut:
    """The parts to drop from a model, as sorted positions before the drop."""

    layers: tuple[int, ...] = ()  # whole layers, including those that lose their second sub-layer
    attention: tuple[int, ...] = ()  # layers that lose only their attention
    mlp: tuple[int, ...] = ()
    text: KnownText | None = None  # on which a plan chose them, if any

    def __bool__(self) -> bool:
        return bool(self.layers or self.attention or self.mlp)

    @classmethod
    def of(
        cls, config: PreTrainedConfig, layers: Any, attention: Any = None, mlp: Any = None, named: str = "drop_{}"
    ) -> Cut:
        """Parses the arguments `drop_layers` (see `layers_to_drop`), `drop_attention` and `drop_mlp`.

        `named` is a format string for the names of the last two in errors.
        """
        if isinstance(layers, (str, bytes)) or hasattr(layers, "__fspath__"):
            layers = PruningPlan.load(layers)
        plan = layers if isinstance(layers, PruningPlan) else None
        given = {"attention": attention, "mlp": mlp}
        names = {"layers": "drop_layers", **{kind: named.format(kind) for kind in given}}
        typed = [names[kind] for kind, value in {"layers": layers, **given}.items() if value is not None]
        for kind, value in given.items():
            if planned := list(getattr(plan, kind, ())):
                if value is not None:
                    problem = f"conflicts with the plan's {planned}; pass only the plan, or all three lists without it"
                    raise ValueError(f"{names[kind]}: {value!r} {problem}")
                given[kind] = planned
        whole = set(layers_to_drop(layers, config))
        before = {kind: set(record(config).sublayers.get(kind, ())) for kind in SUBLAYERS}
        lost = {
            kind: set(_sublayers_to_drop(value, kind, config, before[kind], names[kind]))
            for kind, value in given.items()
        }
        whole |= set.intersection(*(before[kind] | lost[kind] for kind in SUBLAYERS))
        if len(whole) == (num_layers := text_config(config).num_hidden_layers):
            reason = "since a layer that loses both attention and MLP is dropped"
            raise ValueError(f"{' and '.join(typed)}: nothing would be left of {num_layers} layers, {reason}")
        text = plan.known_text if plan and plan.units else None
        partial = {kind: tuple(sorted(layers - whole)) for kind, layers in lost.items()}
        return cls(tuple(sorted(whole)), **partial, text=text)


def normalize_layers(layers: Any, num_layers: int, argument: str = "drop_layers", least: int = 1) -> list[int]:
    """Sorted positions from 0, given indices of which negative ones count from the end.

    Raises a ValueError about `argument` if indices are not integers, out of range or repeated, or if fewer than `least`
    layers would be left (0 if layers only lose a part).
    """
    valid = f"valid are integers from {-num_layers} to {num_layers - 1}, each once" + ", and not all of them" * least
    # A 0-d array has an __iter__ that raises.
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Iterable) or getattr(layers, "ndim", 1) == 0:
        raise ValueError(f"{argument} must be a list of layer indices, got {layers!r}; {valid}")
    positions: list[int] = []
    for layer in layers:
        try:
            if isinstance(layer, bool) or getattr(layer, "dtype", None) is torch.bool:
                raise TypeError
            index = operator.index(layer)
        except TypeError:
            raise ValueError(f"{argument}: {layer!r} in {layers!r} is not a layer index; {valid}") from None
        if not -num_layers <= index < num_layers:
            raise ValueError(f"{argument}: layer {index} does not exist in a model of {num_layers} layers; {valid}")
        index %= num_layers
        if index in positions:
            raise ValueError(f"{argument}: layer {index} is given twice in {list(layers)!r}; {valid}")
        positions.append(index)
    if len(positions) > num_layers - least:
        raise ValueError(f"{argument}: {list(layers)!r} are all {num_layers} layers; {valid}")
    return sorted(positions)


def layers_to_drop(value: Any, config: PreTrainedConfig) -> list[int]:
    """Parses a value of `drop_layers`: indices, a `PruningPlan`, None, or a number N of layers.

    A number selects the deepest N layers except the last, as Gromov et al. (arXiv 2403.17887, section 4.4) propose in
    the absence of measurements. A plan with healing causes a warning, since dropping does not heal.
    """
    if value is None:
        return []
    family_of(config, "drop_layers")  # other families need not have a number of layers
    num_layers = text_config(config).num_hidden_layers
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, PruningPlan):
        value.require_made_for(config)
        if "healed" in value.perplexity:
            arguments = "plan.layers" + "".join(f", {kind}=plan.{kind}" for kind in SUBLAYERS if getattr(value, kind))
            warn(
                f"drop_layers: the plan's perplexity of {value.perplexity['healed']:.2f} was measured on the healed "
                f"model; without healing it is {value.perplexity['after']:.2f}. To heal, load the whole model, call "
                f"hf_lnscale.heal(model, plan, data) and then hf_lnscale.drop_layers(model, {arguments}); or use "
                "`hf-lnscale prune`."
            )
        return normalize_layers(value.layers, num_layers, "drop_layers: the plan")
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        if not 1 <= (value := operator.index(value)) < num_layers:
            valid = f"a number of layers must be between 1 and {num_layers - 1} for this model"
            raise ValueError(f"drop_layers={value}: {valid}")
        layers = list(range(num_layers - 1 - value, num_layers - 1))
        warn(
            f"drop_layers={value} drops layers {layers}, the deepest except the last, by a rule of thumb that can "
            "destroy a model. hf_lnscale.plan_pruning chooses layers by measurement."
        )
        return layers
    if not isinstance(value, Iterable):
        valid = "a list of layer indices, a PruningPlan, the path of one, or a number of layers"
        raise ValueError(f"drop_layers must be {valid}, got {value!r}")
    return normalize_layers(value, num_layers)


def droppable_units(config: PreTrainedConfig) -> list[tuple[str, int]]:
    """The attention and MLP units, of layers that have both, that can be dropped; raises if the family has none."""
    units: list[tuple[str, int]] = []
    for kind in SUBLAYERS:
        for layer in range(text_config(config).num_hidden_layers):
            with suppress(ValueError):
                units += [(kind, at) for at in _sublayers_to_drop([layer], kind, config, set(), "units")]
    if not units:
        require_sublayer(config, "attention", "units='sublayers'")
    touched = set().union(*record(config).sublayers.values())
    return [unit for unit in units if unit[1] not in touched]


def _sublayers_to_drop(value: Any, kind: str, config: PreTrainedConfig, before: set[int], argument: str) -> list[int]:
    if value is None:
        return []
    require_sublayer(config, kind, argument)
    text = text_config(config)
    layers = normalize_layers(value, text.num_hidden_layers, argument, least=0)
    if absent := before.intersection(layers):
        raise ValueError(f"{argument}: layers {sorted(absent)} have none, as it has already been dropped")
    if kind == "attention":
        kinds = _kinds_of_layers(text)
        if other := [layer for layer in layers if kinds and kinds[layer] in _WITHOUT_TOKENS]:
            problem = f"layers {other} have {kinds[other[0]]} instead of attention with a KV cache"
            raise ValueError(f"{argument}: {problem}; use drop_layers to drop whole layers")
        if getattr(text, "num_kv_shared_layers", None):
            raise ValueError(f"{argument}: with num_kv_shared_layers, other layers use a layer's keys and values")
    return layers


def _kinds_of_layers(text: PreTrainedConfig) -> list[str]:
    """The kind of each layer, if the configuration lists them."""
    return getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or []


def counting_layers(text: PreTrainedConfig) -> set[int]:
    """The layers without linear attention of a hybrid model, one of which must be kept; empty for other models."""
    kinds = _kinds_of_layers(text)
    counting = {layer for layer, kind in enumerate(kinds) if kind not in _WITHOUT_TOKENS}
    return counting if len(counting) < len(kinds) else set()
