"""Maps the tensors of a checkpoint to the layers of a model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ..core.families import family_of, text_config
from ..core.record import SUBLAYERS, record
from ..core.stack import own_stack, pretrained_modules


def original_layers(config: PreTrainedConfig | dict[str, Any]) -> tuple[list[int], int]:
    """The indices, in the original model, of a model's layers, and the original's number of layers."""
    if (dropped := record(config).dropped) is not None:
        return dropped.kept, dropped.num_hidden_layers
    num_layers = config["num_hidden_layers"] if isinstance(config, dict) else text_config(config).num_hidden_layers
    return list(range(num_layers)), num_layers


def positions_on_disk(config: PreTrainedConfig, saved: dict[str, Any]) -> list[int] | None:
    """The index, in a checkpoint with the config.json `saved`, of each layer of a model; None if they are the same.

    Raises:
        ValueError: if the checkpoint lacks some of the layers or sub-layers.
    """
    wanted, original = original_layers(config)
    text = text_config(config)
    key = type(config).base_config_key
    if key in saved and saved.get("model_type") != config.model_type:
        saved = saved[key]  # only the text decoder of a multimodal checkpoint is loaded
    stored: Any = saved
    if not (dropped := record(saved).dropped):
        # `from_dict` adds defaults that config.json omits. Layers that the file says to drop are still in the weights.
        stored = type(config).from_dict(_without(saved, "drop_layers", "drop_attention", "drop_mlp"))
    available, total = original_layers(stored)
    require_sublayers(config, saved)
    if available == wanted and total == original:
        return None
    if total != original or not set(wanted) <= set(available):
        has = f"layers {available}" if dropped else f"{len(available)} layers"
        raise ValueError(
            f"drop_layers: the config needs layers {wanted} of a model with {original} layers, but the checkpoint "
            f"{config.name_or_path!r} has {has} of a model with {total} ({text.model_type})"
        )
    return [available.index(layer) for layer in wanted]


def require_sublayers(config: PreTrainedConfig, saved: dict[str, Any]) -> None:
    """Refuses a checkpoint with the config.json `saved` if it lacks sub-layers of a model; the error names them."""
    stored, wanted, (layers, _) = record(saved).dropped, record(config).dropped, original_layers(config)
    for kind in SUBLAYERS:
        if absent := set(getattr(stored, kind, ())) & set(layers) - set(getattr(wanted, kind, ())):
            raise ValueError(
                f"drop_{kind}: the checkpoint {config.name_or_path!r} has no {kind} in layers {sorted(absent)}, which "
                "the config needs; omit the config to load the checkpoint's own model"
            )


def _without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {
        key: _without(value, *names) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in names
    }


def positions_in_state_dict(config: PreTrainedConfig, model: PreTrainedModel, names: Iterable[str]) -> list[int] | None:
    """Like `positions_on_disk`, for tensors without a config.json, based on the number of layers."""
    wanted, original = original_layers(config)
    names = list(names)
    found = len({match[2] for match in map(_layer_names_of(model, names).match, names) if match})
    if found == len(wanted):
        return None
    if found == original:
        return wanted
    valid = f"{len(wanted)}, like the model, or {original}, like the original model"
    raise ValueError(f"drop_layers: state_dict has {found} layers, but must have {valid}")


def names_of_sublayers(model: PreTrainedModel) -> re.Pattern[str]:
    """Matches tensor names, in a checkpoint of complete layers, of the sub-layers that a model lacks."""
    patterns = []
    for prefix, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and (stack := own_stack(module)):
            start = f"(?:{re.escape(prefix)}\\.)?" if prefix else "(?:.*\\.)?"
            for kind, positions in record(module.config).sublayers.items():
                path, norms = stack.family.sublayer(kind)
                inside = "|".join(map(re.escape, (path, *norms)))
                patterns += [f"{start}{re.escape(stack.family.layers)}\\.{at}\\.(?:{inside})\\." for at in positions]
    return re.compile("|".join(patterns) or "(?!)")


def renumber(names: Iterable[str], model: PreTrainedModel, positions: list[int]) -> dict[str, str]:
    """Tensor name in a checkpoint -> its name in a model with the layers at `positions`; others are omitted."""
    names = list(names)
    return rename_layers(names, _layer_names_of(model, names), positions)


def rename_layers(names: Iterable[str], layer: re.Pattern[str], kept: list[int]) -> dict[str, str]:
    """Tensor name -> its name when only some layers are kept; tensors of other layers are omitted."""
    numbers = {str(old): new for new, old in enumerate(kept)}
    renamed = {}
    for name in names:
        if not (match := layer.match(name)):
            renamed[name] = name
        elif match[2] in numbers:
            renamed[name] = f"{match[1]}{numbers[match[2]]}{match[3]}"
    return renamed


def layer_names(path: str) -> re.Pattern[str]:
    """Matches tensor names in the layers at a path. Groups: the part before the layer's index, the index, the rest."""
    return re.compile(rf"^((?:.*?\.)?{re.escape(path)}\.)(\d+)(\..*)$")


def _layer_names_of(model: PreTrainedModel, names: list[str]) -> re.Pattern[str]:
    """Like `layer_names`, for the layers of a model's text decoder among the names in a checkpoint.

    Vision towers also have `layers`; the decoder's are those with its pre-norm. Multi-token prediction layers have it
    too, but transformers ignores them.
    """
    family = family_of(model.config, "drop_layers")
    marks = {f".{family.attention_norm}.weight"}
    if family.no_scaling and (stack := next(filter(None, map(own_stack, pretrained_modules(model))), None)):
        marks = {f".{name}" for name, _ in stack.layers[0].named_parameters()}
    ignored = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])
    names = [name for name in names if not any(re.search(pattern, name) for pattern in ignored)]
    matches = map(layer_names(family.layers).match, names)
    prefixes = {match[1] for match in matches if match and match[3] in marks}
    if len(prefixes) != 1:
        raise ValueError(
            f"drop_layers: the layers of {type(model).__name__} cannot be identified by the names in the checkpoint "
            f"(candidates: {sorted(prefixes) or 'none'})"
        )
    return re.compile(rf"^({re.escape(*prefixes)})(\d+)(\..*)$")
