"""Which tensors of a checkpoint belong to the layers that a model has, and under which names they are loaded."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..core.families import family_of, text_config
from ..core.record import SUBLAYERS, record
from ..core.stack import own_stack, pretrained_modules


def original_layers(config: PreTrainedConfig | dict[str, Any]) -> tuple[list[int], int]:
    """Which layers of the model that it was once cut from a model has: their numbers there, and how many there were."""
    if (dropped := record(config).dropped) is not None:
        return dropped.kept, dropped.num_hidden_layers
    num_layers = config["num_hidden_layers"] if isinstance(config, dict) else text_config(config).num_hidden_layers
    return list(range(num_layers)), num_layers


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
    return rename_layers(names, _layer_names_of(model, names), positions)


def rename_layers(names: Iterable[str], layer: re.Pattern[str], kept: list[int]) -> dict[str, str]:
    """Names of tensors to their names when only some layers are kept; tensors of other layers are missing."""
    numbers = {str(old): new for new, old in enumerate(kept)}
    renamed = {}
    for name in names:
        if not (match := layer.match(name)):
            renamed[name] = name
        elif match[2] in numbers:
            renamed[name] = f"{match[1]}{numbers[match[2]]}{match[3]}"
    return renamed


def layer_names(path: str) -> re.Pattern[str]:
    """Matches names of tensors in the layers at a path: what is before the layer's number, the number, and the rest."""
    return re.compile(rf"^((?:.*?\.)?{re.escape(path)}\.)(\d+)(\..*)$")


def _layer_names_of(model: PreTrainedModel, names: list[str]) -> re.Pattern[str]:
    """As `layer_names`, for the layers of a model's text decoder among the names in a checkpoint.

    A vision tower has `layers` too; the decoder's are those with its pre-norm. So have layers for predicting several
    tokens, which transformers ignores.
    """
    family = family_of(model.config, "drop_layers")
    marks = {f".{family.attention_norm}.weight"}
    if family.no_scaling and (stack := next((own for m in pretrained_modules(model) if (own := own_stack(m))), None)):
        marks = {f".{name}" for name, _ in stack.layers[0].named_parameters()}
    ignored = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])
    matches = map(layer_names(family.layers).match, names)
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
