"""The parts to take out of a model: the values of `drop_layers`, `drop_attention` and `drop_mlp`, read into a `Cut`."""

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
    """The parts that are taken out of a model: positions in it before any is taken out, sorted.

    Attributes:
        layers: whole layers, those that lose both sub-layers, or lose one and had lost the other before, among them.
        attention: layers that lose their attention alone.
        mlp: layers that lose their MLP alone.
        text: the text that a plan chose all of it on, if one did.
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
        """Reads values of the arguments `drop_layers`, see `layers_to_drop`, `drop_attention` and `drop_mlp`.

        `named` makes the names of the last two for errors, of "attention" and "mlp".

        Raises:
            ValueError: for wrong indices, a sub-layer that is not there, or if no layer would be left.
            UnsupportedArchitectureError: if the family is not in the table, or cannot lose sub-layers alone.
        """
        if isinstance(layers, (str, bytes)) or hasattr(layers, "__fspath__"):
            layers = PruningPlan.load(layers)
        typed = {"drop_layers": layers, named.format("attention"): attention, named.format("mlp"): mlp}
        if isinstance(layers, PruningPlan):
            attention = _or_planned(attention, layers, "attention", named)
            mlp = _or_planned(mlp, layers, "mlp", named)
        whole = set(layers_to_drop(layers, config))
        before = {kind: set(record(config).sublayers.get(kind, ())) for kind in SUBLAYERS}
        given = {
            kind: set()
            if value is None
            else set(_sublayers_to_drop(value, kind, config, before[kind], named.format(kind)))
            for kind, value in (("attention", attention), ("mlp", mlp))
        }
        whole |= set.intersection(*(before[kind] | given[kind] for kind in SUBLAYERS))
        if len(whole) == (num_layers := text_config(config).num_hidden_layers):
            names = [name for name, value in typed.items() if value is not None]
            raise ValueError(
                f"{' and '.join(names)}: nothing would be left of {num_layers} layers; a layer without attention and "
                "MLP is dropped"
            )
        text = layers.known_text if isinstance(layers, PruningPlan) and layers.units else None
        sublayers = {kind: tuple(sorted(found - whole)) for kind, found in given.items()}
        return cls(tuple(sorted(whole)), **sublayers, text=text)


def _or_planned(value: Any, plan: PruningPlan, kind: str, named: str) -> Any:
    """The value of `drop_attention` or `drop_mlp`, or what the plan beside it says."""
    planned = list(getattr(plan, kind)) or None
    if planned and value is not None:
        raise ValueError(
            f"{named.format(kind)}: {value!r} and the plan's {planned} exclude each other; give the plan alone, or all "
            "three lists without it"
        )
    return planned if value is None else value


def normalize_layers(layers: Any, num_layers: int, argument: str = "drop_layers", least: int = 1) -> list[int]:
    """Reads a list of layers to drop.

    Args:
        layers: indices; negative ones count from the end.
        num_layers: layers that there are, L.
        argument: the name to complain under.
        least: layers that must be left; 0 where the layers stay, and lose a part.

    Returns:
        Sorted positions, each in 0 ... L - 1.

    Raises:
        ValueError: for indices that are not integers, out of range or given twice, or if too few layers would be left.
    """
    valid = f"valid are integers from {-num_layers} to {num_layers - 1}, each once" + ", and not all of them" * least
    # An array without dimensions has an __iter__ that raises.
    if isinstance(layers, (str, bytes)) or not isinstance(layers, Iterable) or getattr(layers, "ndim", 1) == 0:
        raise ValueError(f"{argument} must be a list of layer indices, got {layers!r}; {valid}")
    found: list[int] = []
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
        if index in found:
            raise ValueError(f"{argument}: layer {index} is given twice in {list(layers)!r}; {valid}")
        found.append(index)
    if len(found) > num_layers - least:
        raise ValueError(f"{argument}: {list(layers)!r} are all {num_layers} layers; {valid}")
    return sorted(found)


def layers_to_drop(value: Any, config: PreTrainedConfig) -> list[int]:
    """Reads a value of `drop_layers`: indices, a `PruningPlan`, None, or a number N of layers.

    The deepest N layers but the last are those that Gromov et al. (arXiv 2403.17887, section 4.4) propose where nothing
    is measured. A plan whose figures are with healing is warned of, as dropping does not heal.
    """
    if value is None:
        return []
    family_of(config, "drop_layers")  # others need not count their layers
    num_layers = text_config(config).num_hidden_layers
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, PruningPlan):
        value.require_made_for(config)
        if "healed" in value.perplexity:
            gone = "plan.layers" + "".join(f", {kind}=plan.{kind}" for kind in SUBLAYERS if getattr(value, kind))
            warn(
                f"drop_layers: the plan's perplexity of {value.perplexity['healed']:.2f} is that of the healed model; "
                f"without healing it is {value.perplexity['after']:.2f}. To heal, load the whole model, call "
                f"hf_lnscale.heal(model, plan, data) and then hf_lnscale.drop_layers(model, {gone}); or use "
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
            f"drop_layers={value} drops layers {layers}, the deepest but the last, by a rule of thumb and not by "
            "measurement; it can destroy a model. hf_lnscale.plan_pruning chooses layers by what they cost."
        )
        return layers
    if not isinstance(value, Iterable):
        raise ValueError(
            "drop_layers must be a list of layer indices, a PruningPlan, the path of one, or a number of layers, got "
            f"{value!r}"
        )
    return normalize_layers(value, num_layers)


def droppable_units(config: PreTrainedConfig) -> list[tuple[str, int]]:
    """The attention and the MLPs, as units, that a model can lose alone: of layers that have both.

    Raises:
        UnsupportedArchitectureError: if its family can lose neither; the message says why.
    """
    found: list[tuple[str, int]] = []
    for kind in SUBLAYERS:
        for layer in range(text_config(config).num_hidden_layers):
            with suppress(ValueError):
                found += [(kind, at) for at in _sublayers_to_drop([layer], kind, config, set(), "units")]
    if not found:
        require_sublayer(config, "attention", "units='sublayers'")
    touched = {at for positions in record(config).sublayers.values() for at in positions}
    return [unit for unit in found if unit[1] not in touched]


def _sublayers_to_drop(value: Any, kind: str, config: PreTrainedConfig, before: set[int], argument: str) -> list[int]:
    require_sublayer(config, kind, argument)
    text = text_config(config)
    found = normalize_layers(value, text.num_hidden_layers, argument, least=0)
    if absent := before.intersection(found):
        raise ValueError(f"{argument}: layers {sorted(absent)} have none; it was dropped before")
    if kind == "attention":
        kinds = _kinds_of_layers(text)
        if other := [layer for layer in found if kinds and kinds[layer] in _WITHOUT_TOKENS]:
            raise ValueError(
                f"{argument}: layers {other} have no attention with a KV cache, but {kinds[other[0]]}; the whole layer "
                "can go: drop_layers"
            )
        if getattr(text, "num_kv_shared_layers", None):
            raise ValueError(f"{argument}: with num_kv_shared_layers, other layers attend to a layer's keys and values")
    return found


# Kinds of layers whose cache does not grow with the tokens.
_WITHOUT_TOKENS = ("linear_attention", "conv", "mamba", "moe", "mlp")


def _kinds_of_layers(text: PreTrainedConfig) -> list[str]:
    """The kind of each layer, if a configuration says it."""
    return getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or []


def counting_layers(text: PreTrainedConfig) -> set[int]:
    """The layers of which one must stay: the cache of a hybrid model counts tokens in a layer without linear attention.

    Empty for a model that is not a hybrid.
    """
    kinds = _kinds_of_layers(text)
    counting = {layer for layer, kind in enumerate(kinds) if kind not in _WITHOUT_TOKENS}
    return counting if len(counting) < len(kinds) else set()
