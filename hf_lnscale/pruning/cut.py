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


@dataclass(frozen=True)
class Cut:
    """The parts to drop from a model, as sorted positions before the drop.

    Attributes:
        layers: whole layers, including those that lose their second sub-layer.
        attention: layers that lose only their attention.
        mlp: layers that lose only their MLP.
        text: the text on which a plan chose them, if any.
    """

    layers: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()
    text: KnownText | None = None

    def __bool__(self) -> bool:
        return bool(self.layers or self.attention or self.mlp)

    @classmethod
    def of(
        cls,
        config: PreTrainedConfig,
        layers: Any = None,
        attention: Any = None,
        mlp: Any = None,
        named: str = "drop_{}",
    ) -> Cut:
        """Parses the arguments `drop_layers` (see `layers_to_drop`), `drop_attention` and `drop_mlp`.

        `named` is a format string for the names of the last two in errors.

        Raises:
            ValueError: if an index is invalid, a sub-layer is already missing, or no layer would be left.
            UnsupportedArchitectureError: if the family is not in the table, or does not support dropping sub-layers.
        """
        if isinstance(layers, (str, bytes)) or hasattr(layers, "__fspath__"):
            layers = PruningPlan.load(layers)
        typed = {"drop_layers": layers, named.format("attention"): attention, named.format("mlp"): mlp}
        if isinstance(layers, PruningPlan):
            attention = _or_planned(attention, layers, "attention", named)
            mlp = _or_planned(mlp, layers, "mlp", named)
        whole = set(layers_to_drop(layers, config))
        before = {kind: set(record(config).sublayers.get(kind, ())) for kind in SUBLAYERS}
        sublayers = {
            kind: set()
            if value is None
            else set(_sublayers_to_drop(value, kind, config, before[kind], named.format(kind)))
            for kind, value in (("attention", attention), ("mlp", mlp))
        }
        whole |= set.intersection(*(before[kind] | sublayers[kind] for kind in SUBLAYERS))
        if len(whole) == (num_layers := text_config(config).num_hidden_layers):
            names = [name for name, value in typed.items() if value is not None]
            raise ValueError(
                f"{' and '.join(names)}: nothing would be left of {num_layers} layers, since a layer that loses both "
                "attention and MLP is dropped"
            )
        text = layers.known_text if isinstance(layers, PruningPlan) and layers.units else None
        partial = {kind: tuple(sorted(layers - whole)) for kind, layers in sublayers.items()}
        return cls(tuple(sorted(whole)), **partial, text=text)


def _or_planned(value: Any, plan: PruningPlan, kind: str, named: str) -> Any:
    """The value of `drop_attention` or `drop_mlp`, or else the layers in the plan."""
    planned = list(getattr(plan, kind)) or None
    if planned and value is not None:
        raise ValueError(
            f"{named.format(kind)}: {value!r} conflicts with the plan's {planned}; pass only the plan, or all three "
            "lists without it"
        )
    return planned if value is None else value


def normalize_layers(layers: Any, num_layers: int, argument: str = "drop_layers", least: int = 1) -> list[int]:
    """Validates a list of layers to drop.

    Args:
        layers: indices; negative ones count from the end.
        num_layers: number of layers, L.
        argument: name of the argument for errors.
        least: number of layers that must be left; 0 if layers only lose a part.

    Returns:
        Sorted positions from 0 to L - 1.

    Raises:
        ValueError: if indices are not integers, are out of range or repeated, or too few layers would be left.
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
        value = operator.index(value)
        if not 1 <= value < num_layers:
            raise ValueError(
                f"drop_layers={value}: a number of layers must be between 1 and {num_layers - 1} for this model"
            )
        layers = list(range(num_layers - 1 - value, num_layers - 1))
        warn(
            f"drop_layers={value} drops layers {layers}, the deepest except the last, by a rule of thumb that can "
            "destroy a model. hf_lnscale.plan_pruning chooses layers by measurement."
        )
        return layers
    if not isinstance(value, Iterable):
        raise ValueError(
            "drop_layers must be a list of layer indices, a PruningPlan, the path of one, or a number of layers, got "
            f"{value!r}"
        )
    return normalize_layers(value, num_layers)


def droppable_units(config: PreTrainedConfig) -> list[tuple[str, int]]:
    """The attention and MLP units that can be dropped separately, from layers that have both.

    Raises:
        UnsupportedArchitectureError: if the family supports neither; the message gives the reason.
    """
    units: list[tuple[str, int]] = []
    for kind in SUBLAYERS:
        for layer in range(text_config(config).num_hidden_layers):
            with suppress(ValueError):
                units += [(kind, at) for at in _sublayers_to_drop([layer], kind, config, set(), "units")]
    if not units:
        require_sublayer(config, "attention", "units='sublayers'")
    touched = {at for positions in record(config).sublayers.values() for at in positions}
    return [unit for unit in units if unit[1] not in touched]


def _sublayers_to_drop(value: Any, kind: str, config: PreTrainedConfig, before: set[int], argument: str) -> list[int]:
    require_sublayer(config, kind, argument)
    text = text_config(config)
    layers = normalize_layers(value, text.num_hidden_layers, argument, least=0)
    if absent := before.intersection(layers):
        raise ValueError(f"{argument}: layers {sorted(absent)} have none, as it has already been dropped")
    if kind == "attention":
        kinds = _kinds_of_layers(text)
        if other := [layer for layer in layers if kinds and kinds[layer] in _WITHOUT_TOKENS]:
            raise ValueError(
                f"{argument}: layers {other} have {kinds[other[0]]} instead of attention with a KV cache; use "
                "drop_layers to drop whole layers"
            )
        if getattr(text, "num_kv_shared_layers", None):
            raise ValueError(f"{argument}: with num_kv_shared_layers, other layers use a layer's keys and values")
    return layers


# Kinds of layers whose cache does not grow with the number of tokens.
_WITHOUT_TOKENS = ("linear_attention", "conv", "mamba", "moe", "mlp")


def _kinds_of_layers(text: PreTrainedConfig) -> list[str]:
    """The kind of each layer, if the configuration lists them."""
    return getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or []


def counting_layers(text: PreTrainedConfig) -> set[int]:
    """The layers of a hybrid model whose cache counts tokens, at least one of which must be kept.

    These are the layers without linear attention. Empty for a model that is not a hybrid.
    """
    kinds = _kinds_of_layers(text)
    counting = {layer for layer, kind in enumerate(kinds) if kind not in _WITHOUT_TOKENS}
    return counting if len(counting) < len(kinds) else set()
