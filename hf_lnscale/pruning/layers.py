"""Taking decoder layers out: of a configuration, of a model in memory, and of the weights that are read from disk.

A pruned model is a plain, smaller model of its family. What was dropped from what is noted in its configuration, in the
numbering of the model that it was once cut from, so that layers can be found again on disk, and keep their own depth.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import numbers
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

from ..checkpoints.folders import public_name
from ..core.families import Family, UnsupportedArchitectureError, family_of, require_sublayer, text_config
from ..core.record import SUBLAYERS, Dropped, KnownText, Record, add_known_text, record, write
from ..core.stack import Stack, own_stack, pretrained_modules, text_stack
from ..core.sublayers import parts, take_out
from ..core.warnings import warn
from .plan import PruningPlan


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


# --- configurations -------------------------------------------------------------------------------------------------


def original_layers(config: PreTrainedConfig | dict[str, Any]) -> tuple[list[int], int]:
    """Which layers of the model that it was once cut from a model has: their numbers there, and how many there were."""
    if (dropped := record(config).dropped) is not None:
        return dropped.kept, dropped.num_hidden_layers
    num_layers = config["num_hidden_layers"] if isinstance(config, dict) else text_config(config).num_hidden_layers
    return list(range(num_layers)), num_layers


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


def _period(text: PreTrainedConfig, name: str, kept: list[int]) -> None:
    """Finds a period, with its offset if it has one, that meets the same layers after renumbering."""
    shift = name.replace("period", "offset")
    movable = shift != name and hasattr(text, shift)
    period, offset = getattr(text, name), getattr(text, shift) if movable else -1
    wanted = [(layer - offset) % period == 0 for layer in kept]
    for new in range(1, len(kept) + 2):
        for start in range(new) if movable else (-1,):
            if [(position - start) % new == 0 for position in range(len(kept))] == wanted:
                setattr(text, name, new)
                if movable:
                    setattr(text, shift, start)
                return
    raise ValueError(
        f"drop_layers: the config says that layers are of a kind by {name}={period}, and no period says it of layers "
        f"{kept}; drop others, so that what is left is regular"
    )


def _dense(text: PreTrainedConfig, name: str, kept: list[int]) -> None:
    """`mlp_only_layers` takes over from `decoder_sparse_step` (every n-th layer), which no renumbering survives."""
    step = text.decoder_sparse_step
    dense = [layer for layer in kept if layer in getattr(text, name) or (layer + 1) % step]
    setattr(text, name, [kept.index(layer) for layer in dense])
    text.decoder_sparse_step = 1


def _shared(text: PreTrainedConfig, name: str, kept: list[int]) -> None:
    kinds = getattr(text, name)
    for layer in kept:
        source = max((i for i in range(layer + 1) if kinds[i] != "shared"), default=layer)
        if source not in kept:
            raise ValueError(f"drop_layers: layer {layer} takes its {name} from layer {source}; drop both or neither")
    setattr(text, name, [kinds[layer] for layer in kept])


def _unset(text: PreTrainedConfig, name: str, kept: list[int]) -> None:
    if value := getattr(text, name):
        raise ValueError(
            f"drop_layers: with the config's {name}={value!r} layers depend on each other or on their own number, so "
            "that the others would no longer compute what they did"
        )


def _value(rule: Callable[[Any, list[int]], Any]) -> Callable[[PreTrainedConfig, str, list[int]], None]:
    return lambda text, name, kept: setattr(text, name, rule(getattr(text, name), kept))


# What follows a rule of `families.RULES`: changes the field of a configuration in place, from the layers that are kept.
_FOLLOW: dict[str, Callable[[PreTrainedConfig, str, list[int]], None]] = {
    "each": _value(lambda values, kept: [values[layer] for layer in kept]),
    "cycle": _value(lambda values, kept: [values[layer % len(values)] for layer in kept]),
    "first": _value(lambda count, kept: sum(layer < count for layer in kept)),
    "last": _value(lambda last, kept: sum(layer <= last for layer in kept) - 1),
    "indices": _value(lambda indices, kept: [new for new, layer in enumerate(kept) if layer in indices]),
    "count": _value(lambda count, kept: len(kept)),
    "shared": _shared,
    "unset": _unset,
    "period": _period,
    "dense": _dense,
}


def _rules(config: PreTrainedConfig, family: Family) -> dict[str, str]:
    """The rule of each field over depth that a configuration holds; refuses lists of which the rule is not known."""
    text = text_config(config)
    if family.rules is None:
        raise UnsupportedArchitectureError(
            f"drop_layers is not supported for model_type {text.model_type!r}: which fields of its configuration run "
            "over depth is not known. Name them with hf_lnscale.register_family(..., depth_fields=(...)), () if none."
        )
    # Every configuration may have layer_types, whether or not its family comes with it.
    said = text.to_dict()
    rules = {"layer_types": "each"} | family.rules
    rules = {name: rule for name, rule in rules.items() if said.get(name) is not None}
    for name, value in said.items():
        if not isinstance(value, (list, tuple)) or name.endswith(_NOT_OVER_DEPTH):
            continue
        if name in rules:
            if rules[name] in ("each", "shared") and len(value) != text.num_hidden_layers:
                raise ValueError(
                    f"drop_layers: the config's {name} has {len(value)} entries for {text.num_hidden_layers} layers; "
                    "which are whose cannot be known"
                )
        elif len(value) == text.num_hidden_layers:
            if "layer" not in name:
                raise ValueError(
                    f"drop_layers: the config's {name} has one entry for each of the {len(value)} layers; whether it "
                    "runs over depth is not known. Say so with hf_lnscale.register_family(..., depth_fields={"
                    f'"{name}": "each", ...}})'
                )
            rules[name] = "each"
    return rules


# Lists that may happen to be as long as there are layers.
_NOT_OVER_DEPTH = ("token_id", "architectures", "keys_to_ignore_at_inference", "limit", "betas")


def _require_describable(before: PreTrainedConfig, after: PreTrainedConfig, path: str, kept: list[int]) -> None:
    """Refuses a configuration whose model would have other tensors than the layers that are left."""
    model_class = MODEL_MAPPING.get(type(before), None)
    if not isinstance(model_class, type):
        return  # code from outside transformers
    shapes = _shapes(model_class, before)
    wanted = {new: shapes[old] for old, new in _renamed(shapes, _layer_names(path), kept).items()}
    try:
        built = _shapes(model_class, after)
    except Exception as error:
        raise ValueError(
            f"drop_layers: no {before.model_type} model can be built of layers {kept} alone: {error}"
        ) from error
    if differing := sorted(wanted.items() ^ built.items()):
        name = differing[0][0]
        raise ValueError(
            f"drop_layers: no {before.model_type} configuration describes layers {kept} alone: {name!r} has shape "
            f"{wanted.get(name)}, and in a model of the new configuration {built.get(name)}. If a field over depth is "
            "missing in the family's row, name it: hf_lnscale.register_family(..., depth_fields=...)"
        )


def _shapes(model_class: type[PreTrainedModel], text: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    # Read again from its dict: as it will be loaded, and without an implementation that this machine may not have.
    plain = copy.deepcopy(text)
    write(plain, Record())
    with torch.device("meta"):
        model = model_class(type(text).from_dict(plain.to_dict()))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@dataclasses.dataclass(frozen=True)
class Cut:
    """What is taken out of a model: positions in it before any is taken out, sorted.

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


def prune_config(config: PreTrainedConfig, cut: Cut | Iterable[int], family: Family | None = None) -> None:
    """Takes layers and sub-layers out of a model's configuration, in place: fields that run over depth follow.

    Args:
        config: of the whole model; its text decoder is meant.
        cut: what to take out, or layers, as `normalize_layers` returns them.
        family: the row of the text decoder, if it is not in the table.

    Raises:
        UnsupportedArchitectureError: if the family is not in the table, or its fields over depth are not known.
        ValueError: if the configuration names layers in a place that cannot be followed.
    """
    cut = cut if isinstance(cut, Cut) else Cut(tuple(cut))
    if not cut:
        return
    text = text_config(config)
    family = family or family_of(config, "drop_layers")
    rules = _rules(config, family)
    num_layers = text.num_hidden_layers
    kept = [layer for layer in range(num_layers) if layer not in cut.layers]
    _refuse_other_mentions(config, family, kept)
    if (counting := counting_layers(text)) and not counting.intersection(kept):
        raise ValueError(
            f"drop_layers: without layers {sorted(counting)} only layers of linear attention are left, which cannot "
            "generate; keep one of them"
        )
    found = record(config)
    past = found.dropped or Dropped((), num_layers)
    gone = {*past.layers, *(past.kept[at] for at in cut.layers)}
    lacking = [{*getattr(past, kind), *(past.kept[at] for at in getattr(cut, kind))} - gone for kind in SUBLAYERS]
    base = past.base or public_name(config.name_or_path or "")
    dropped = Dropped(tuple(sorted(gone)), past.num_hidden_layers, base, *(tuple(sorted(one)) for one in lacking))
    scalings = {
        name: scaling.for_layers(num_layers).keeping(kept)
        for name in ("active", "folded", "on_disk")
        if (scaling := getattr(found, name)) is not None
    }
    if cut.layers:
        after = copy.deepcopy(text)
        _follow(after, rules, kept)
        _require_describable(text, after, family.layers, kept)
        vars(text).update(vars(after))
    write(config, dataclasses.replace(found, **scalings, dropped=dropped))
    if cut.text:
        add_known_text(config, cut.text)


def _follow(text: PreTrainedConfig, rules: dict[str, str], kept: list[int]) -> None:
    if (overrides := text.to_dict().get("per_layer_config")) is not None:
        text.per_layer_config = None  # it is compared with the number of layers
    for name, rule in rules.items():
        _FOLLOW[rule](text, name, kept)
    text.num_hidden_layers = len(kept)
    if overrides is not None:
        entries = {int(layer): entry for layer, entry in overrides.items()}
        text.per_layer_config = {new: entries[old] for new, old in enumerate(kept) if old in entries}


# What stands before the text decoder's layers in the names of whole models.
_BEFORE_LAYERS = ("", "model.", "language_model.", "model.language_model.", "language_model.model.")


def _refuse_other_mentions(config: PreTrainedConfig, family: Family, kept: list[int]) -> None:
    """Refuses a quantization_config by which layers would be quantized otherwise under their new numbers."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    said = quantization if isinstance(quantization, dict) else quantization.to_dict()
    names = [
        f"{before}{family.layers}.{{}}{module}"
        for module in _modules_of_a_layer(text_config(config), family)
        for before in _BEFORE_LAYERS
    ]
    for pattern in _strings(json.loads(json.dumps(said, default=str))):
        ways = _ways_to_read(pattern)
        for new, old in enumerate(kept):
            if any(bool(means(one.format(new))) != bool(means(one.format(old))) for one in names for means in ways):
                raise ValueError(
                    f"drop_layers: the quantization_config speaks of single layers ({pattern!r}), which would be "
                    "others afterwards; prune the checkpoint before it is quantized"
                )


def _ways_to_read(pattern: str) -> list[Callable[[str], Any]]:
    """Each library reads a pattern in another way."""
    with suppress(re.error):
        expression = re.compile(pattern)
        return [lambda name: pattern in name, expression.search, expression.match, expression.fullmatch]
    return [lambda name: pattern in name]


def _strings(value: Any) -> Iterable[str]:
    """Every string in a JSON value, keys too, without the prefixes by which libraries mark regular expressions."""
    if isinstance(value, str):
        yield re.sub(r"^(re:|[+-]:)", "", value)
    elif isinstance(value, (dict, list)):
        for one in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _strings(one)


def _modules_of_a_layer(text: PreTrainedConfig, family: Family) -> set[str]:
    """The names of all modules in any decoder layer, from the layer on, each with a dot in front; "" is the layer."""
    model_class = MODEL_MAPPING.get(type(text), None)
    names = (
        _shapes(model_class, text) if isinstance(model_class, type) else [f"{family.layers}.0.self_attn.q_proj.weight"]
    )
    matches = map(_layer_names(family.layers).match, names)
    found = {match[3].rpartition(".")[0] for match in matches if match}
    return {name[:end] for name in found for end in range(len(name) + 1) if name[end : end + 1] in ("", ".")}


def set_drop_layers(config: PreTrainedConfig, value: Any, attention: Any = None, mlp: Any = None) -> None:
    """Writes values of `drop_layers`, `drop_attention` and `drop_mlp` into a configuration; a model built from it lacks
    what they name. All three count layers as they are in the configuration before."""
    prune_config(config, Cut.of(config, value, attention, mlp))


# --- models in memory -----------------------------------------------------------------------------------------------


def delete_layers(stack: Stack, dropped: Sequence[int]) -> None:
    """Takes decoder layers out of a stack and numbers the others anew; configurations are left alone."""
    for gone in reversed(dropped):
        del stack.layers[gone]
    for position, layer in enumerate(stack.layers):
        for module in layer.modules():
            if isinstance(vars(module).get("layer_idx"), int):
                vars(module)["layer_idx"] = position


def drop_layers(model: nn.Module, layers: Any = None, *, attention: Any = None, mlp: Any = None) -> nn.Module:
    """Takes decoder layers, or the attention or the MLP of some, out of a model in memory, in place.

    The result is the model that `from_pretrained(..., drop_layers=layers, drop_attention=attention, drop_mlp=mlp)`
    loads. With LayerNorm Scaling, each layer that stays keeps the scale of its own depth.

    Args:
        model: a transformers model of a family in the table.
        layers: indices (negative ones count from the end), a `PruningPlan`, the path of one, or a number of layers. Of
            a plan that healed give `plan.layers` if the model is healed: the plan itself warns that it should be.
        attention: indices of the layers that lose their attention, with the norms that serve it alone. Like `mlp`,
            they count layers before any is taken out. A layer that loses both is taken out.
        mlp: indices of the layers that lose their MLP.

    Returns:
        The same model.

    Raises:
        ValueError: for wrong indices, all before anything is changed; for a model that carries a PEFT adapter, whose
            weights and saved form use layer numbers; for one that an optimizer holds; for one that is sharded or
            spread over devices by hooks.
        UnsupportedArchitectureError: if the family, or its configuration fields over depth, are not known, or if its
            sub-layers cannot be taken out.
    """
    stack = text_stack(model)
    cut = Cut.of(stack.model.config, layers, attention, mlp, named="{}")
    if not cut:
        return model
    require_droppable(model, stack, cut)
    _own_configs(model)
    for one in _configs_of(model):
        prune_config(one, cut)
    for kind in SUBLAYERS:
        for position in getattr(cut, kind):
            take_out(stack.layers[position], stack.family, kind, position)
    delete_layers(stack, cut.layers)
    return model


def note_text(model: nn.Module, text: KnownText) -> None:
    """Notes in a model's configuration the text that its layers were chosen or healed on."""
    for config in _configs_of(model):
        add_known_text(config, text)


def _configs_of(model: nn.Module) -> list[PreTrainedConfig]:
    """Each configuration once: several modules may hold copies of that of the text decoder, or hold it in their own."""
    configs = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    found = {id(text_config(one)): one for one in configs}.values()
    text = text_stack(model).model.config
    return [one for one in found if text_config(one).model_type == text.model_type]


def _own_configs(model: nn.Module) -> None:
    """Gives a model configurations of its own: another model may have been built from the same objects."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(held := vars(module).get("config"), PreTrainedConfig):
            vars(module)["config"] = copy.deepcopy(held, memo)


def require_droppable(model: nn.Module, stack: Stack, cut: Cut) -> None:
    """Refuses a model in memory of which these parts cannot be taken out.

    Raises:
        ValueError: see `drop_layers`.
    """
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise ValueError(
                f"drop_layers: the model carries a PEFT adapter ({name}: {type(module).__name__}), which refers to "
                "layers by number; merge it first (merge_and_unload), or drop layers before adding it"
            )
        if "_hf_hook" in vars(module) and len(set(getattr(model, "hf_device_map", {}).values())) > 1:
            raise ValueError(
                "drop_layers: the model is spread over devices or offloaded; give drop_layers to from_pretrained"
            )
        if type(module).__name__.startswith("FSDP"):
            raise ValueError("drop_layers: the model is sharded; drop layers before that")
    gone = [stack.layers[layer] for layer in cut.layers]
    for kind in SUBLAYERS:
        gone += [one for at in getattr(cut, kind) for one in parts(stack.layers[at], stack.family, kind)]
    parameters = {id(parameter) for module in gone for parameter in module.parameters()}
    for held in gc.get_objects():
        if issubclass(type(held), torch.optim.Optimizer) and any(
            id(parameter) in parameters for group in held.param_groups for parameter in group["params"]
        ):
            raise ValueError(
                f"drop_layers: an optimizer ({type(held).__name__}) holds parameters of the layers to drop; drop "
                "layers before the optimizer is made"
            )


# --- weights on disk ------------------------------------------------------------------------------------------------


def positions_on_disk(config: PreTrainedConfig, saved: dict[str, Any]) -> list[int] | None:
    """The positions of a model's layers in a checkpoint.

    Args:
        config: of the model that is to be loaded.
        saved: the checkpoint's own config.json.

    Returns:
        For each layer of the model its number in the checkpoint; None where these are the same.

    Raises:
        ValueError: if the checkpoint does not hold them.
    """
    wanted, original = original_layers(config)
    text = text_config(config)
    key = type(config).base_config_key
    if key in saved and saved.get("model_type") != config.model_type:
        saved = saved[key]  # the text part alone, of a checkpoint that has others
    there = record(saved).dropped
    if there is None:
        # The class fills in what config.json leaves out. The file may ask for layers to be dropped; it has them still.
        full = type(config).from_dict(_without(saved, "drop_layers", "drop_attention", "drop_mlp"))
        held, held_of = original_layers(full)
    else:
        held, held_of = there.kept, there.num_hidden_layers
    require_sublayers(config, saved)
    if held == wanted and held_of == original:
        return None
    if held_of != original or not set(wanted) <= set(held):
        raise ValueError(
            f"drop_layers: the config wants layers {wanted} of a model of {original} layers, but the checkpoint "
            f"{config.name_or_path!r} holds {'layers ' + str(held) if there else str(len(held)) + ' layers'} of a "
            f"model of {held_of} ({text.model_type})"
        )
    return [held.index(layer) for layer in wanted]


def require_sublayers(config: PreTrainedConfig, saved: dict[str, Any]) -> None:
    """Refuses a checkpoint that lacks sub-layers which a model has.

    Args:
        config: of the model that is to be loaded.
        saved: the checkpoint's own config.json.

    Raises:
        ValueError: if so; the message names them.
    """
    there, here, (layers, _) = record(saved).dropped, record(config).dropped, original_layers(config)
    for kind in SUBLAYERS:
        if absent := set(getattr(there, kind, ())) & set(layers) - set(getattr(here, kind, ())):
            raise ValueError(
                f"drop_{kind}: the checkpoint {config.name_or_path!r} has no {kind} in layers {sorted(absent)}, which "
                "the config wants; leave the config out, to load the model that is in the checkpoint"
            )


def _without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {
        key: _without(value, *names) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in names
    }


def positions_in_state_dict(config: PreTrainedConfig, model: PreTrainedModel, names: Iterable[str]) -> list[int] | None:
    """As `positions_on_disk`, for tensors without a config.json, from the number of layers.

    Raises:
        ValueError: if these are neither the layers of the model nor all of the original's.
    """
    wanted, original = original_layers(config)
    names = list(names)
    layer = _layer_names_of(model, names)
    found = {match[2] for name in names if (match := layer.match(name))}
    if len(found) == len(wanted):
        return None
    if len(found) == original:
        return wanted
    raise ValueError(
        f"drop_layers: state_dict holds {len(found)} layers; the model has {len(wanted)} of {original}, and either "
        "number would do"
    )


def names_of_sublayers(model: PreTrainedModel) -> re.Pattern[str]:
    """Matches the names, in a checkpoint of whole layers, of the tensors of the sub-layers that a model lacks."""
    found = []
    for prefix, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and (stack := own_stack(module)):
            start = f"(?:{re.escape(prefix)}\\.)?" if prefix else "(?:.*\\.)?"
            for kind, positions in record(module.config).sublayers.items():
                path, norms = stack.family.sublayer(kind)
                inside = "|".join(map(re.escape, (path, *norms)))
                found += [f"{start}{re.escape(stack.family.layers)}\\.{at}\\.(?:{inside})\\." for at in positions]
    return re.compile("|".join(found) or "(?!)")


def renumber(names: Iterable[str], model: PreTrainedModel, positions: list[int]) -> dict[str, str]:
    """New names for the tensors of a checkpoint of which some layers are kept.

    Args:
        names: of the tensors in the checkpoint.
        model: the model that they are for.
        positions: for each of its layers the number in the checkpoint.

    Returns:
        Name in the checkpoint to name under which it is loaded; tensors of dropped layers are missing.

    Raises:
        ValueError: if the decoder's layers cannot be recognized by the names.
    """
    names = list(names)
    return _renamed(names, _layer_names_of(model, names), positions)


def _renamed(names: Iterable[str], layer: re.Pattern[str], kept: list[int]) -> dict[str, str]:
    """Names of tensors to their names when only some layers are kept; tensors of other layers are missing."""
    numbers = {str(old): new for new, old in enumerate(kept)}
    renamed = {}
    for name in names:
        if not (match := layer.match(name)):
            renamed[name] = name
        elif match[2] in numbers:
            renamed[name] = f"{match[1]}{numbers[match[2]]}{match[3]}"
    return renamed


def _layer_names(path: str) -> re.Pattern[str]:
    """Matches names of tensors in the layers at a path: what is before the layer's number, the number, and the rest."""
    return re.compile(rf"^((?:.*?\.)?{re.escape(path)}\.)(\d+)(\..*)$")


def _layer_names_of(model: PreTrainedModel, names: list[str]) -> re.Pattern[str]:
    """As `_layer_names`, for the layers of a model's text decoder among the names in a checkpoint.

    A vision tower has `layers` too; the decoder's are those with its pre-norm. So have layers for predicting several
    tokens, which transformers ignores.
    """
    family = family_of(model.config, "drop_layers")
    marks = {f".{family.attention_norm}.weight"}
    if family.no_scaling and (stack := next((own for m in pretrained_modules(model) if (own := own_stack(m))), None)):
        marks = {f".{name}" for name, _ in stack.layers[0].named_parameters()}
    ignored = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])
    matches = map(_layer_names(family.layers).match, names)
    prefixes = {
        match[1]
        for match in matches
        if match and match[3] in marks and not any(re.search(one, match[0]) for one in ignored)
    }
    if len(prefixes) != 1:
        raise ValueError(
            f"drop_layers: the layers of {type(model).__name__} cannot be recognized by the names in the checkpoint "
            f"(candidates: {sorted(prefixes) or 'none'})"
        )
    return re.compile(rf"^({re.escape(*prefixes)})(\d+)(\..*)$")
