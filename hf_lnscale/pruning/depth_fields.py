"""Drops layers from a configuration: adjusts per-layer fields and records the cut.

The record uses the original model's indices, so that layers are found on disk and keep their own depth.
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
from transformers import MODEL_MAPPING, PreTrainedConfig

from ..checkpoints.folders import public_name
from ..core.families import Family, UnsupportedArchitectureError, family_of, text_config
from ..core.record import SUBLAYERS, Dropped, Record, add_known_text, record, write
from .checkpoint_layers import layer_names, rename_layers
from .cut import Cut, counting_layers

# Lists that may have as many entries as there are layers by coincidence.
_NOT_OVER_DEPTH = ("token_id", "architectures", "keys_to_ignore_at_inference", "limit", "betas")
# Prefixes of the text decoder's layers in module names of whole models.
_BEFORE_LAYERS = ("", "model.", "language_model.", "model.language_model.", "language_model.model.")


def set_drop_layers(config: PreTrainedConfig, value: Any, attention: Any = None, mlp: Any = None) -> None:
    """Applies `drop_layers`, `drop_attention` and `drop_mlp` to a configuration. All use indices before the drop."""
    prune_config(config, Cut.of(config, value, attention, mlp))


def prune_config(config: PreTrainedConfig, cut: Cut | Iterable[int], family: Family | None = None) -> None:
    """Drops layers and sub-layers from a model's configuration, in place, and adjusts per-layer fields.

    `cut` may be a list of layers, as returned by `normalize_layers`; `family` is the row of a text decoder that is not
    in the table.

    Raises:
        UnsupportedArchitectureError: if the family is not in the table, or its per-layer fields are unknown.
        ValueError: if the configuration refers to layers in a way that cannot be adjusted.
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
            f"drop_layers: without layers {sorted(counting)} only linear-attention layers are left, which cannot "
            "generate; keep one of them"
        )
    before = record(config)
    past = before.dropped or Dropped((), num_layers)
    gone, *lacking = (
        {*getattr(past, kind), *(past.kept[at] for at in getattr(cut, kind))} for kind in ("layers", *SUBLAYERS)
    )
    base = past.base or public_name(config.name_or_path or "")
    sublayers = (tuple(sorted(layers - gone)) for layers in lacking)
    dropped = Dropped(tuple(sorted(gone)), past.num_hidden_layers, base, *sublayers)
    scalings = {
        name: scaling.for_layers(num_layers).keeping(kept)
        for name in ("active", "folded", "on_disk")
        if (scaling := getattr(before, name)) is not None
    }
    if cut.layers:
        after = copy.deepcopy(text)
        _follow(after, rules, kept)
        _require_describable(text, after, family.layers, kept)
        vars(text).update(vars(after))
    write(config, dataclasses.replace(before, **scalings, dropped=dropped))
    if cut.text:
        add_known_text(config, cut.text)


def _follow(text: PreTrainedConfig, rules: dict[str, str], kept: list[int]) -> None:
    if (overrides := text.to_dict().get("per_layer_config")) is not None:
        text.per_layer_config = None  # would be validated against the number of layers
    for name, rule in rules.items():
        _FOLLOW[rule](text, name, kept)
    text.num_hidden_layers = len(kept)
    if overrides is not None:
        entries = {int(layer): entry for layer, entry in overrides.items()}
        text.per_layer_config = {new: entries[old] for new, old in enumerate(kept) if old in entries}


def _period(text: PreTrainedConfig, name: str, kept: list[int]) -> None:
    """Finds a period, and an offset if there is one, that selects the same layers after renumbering."""
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
    problem = f"no period does so for layers {kept}; drop other layers, so that a regular pattern is left"
    raise ValueError(f"drop_layers: the config selects layers of a kind by {name}={period}, and {problem}")


def _dense(text: PreTrainedConfig, name: str, kept: list[int]) -> None:
    """Replaces `decoder_sparse_step` (every n-th layer), which cannot be renumbered, by `mlp_only_layers`."""
    step = text.decoder_sparse_step
    dense = [layer for layer in kept if layer in getattr(text, name) or (layer + 1) % step]
    setattr(text, name, [kept.index(layer) for layer in dense])
    text.decoder_sparse_step = 1


def _shared(text: PreTrainedConfig, name: str, kept: list[int]) -> None:
    kinds = getattr(text, name)
    for layer in kept:
        source = max((i for i in range(layer + 1) if kinds[i] != "shared"), default=layer)
        if source not in kept:
            raise ValueError(f"drop_layers: layer {layer} uses the {name} of layer {source}; drop both or neither")
    setattr(text, name, [kinds[layer] for layer in kept])


def _unset(text: PreTrainedConfig, name: str, kept: list[int]) -> None:
    if value := getattr(text, name):
        problem = "layers depend on each other or on their index, so the remaining ones would compute something else"
        raise ValueError(f"drop_layers: with the config's {name}={value!r}, {problem}")


def _value(rule: Callable[[Any, list[int]], Any]) -> Callable[[PreTrainedConfig, str, list[int]], None]:
    return lambda text, name, kept: setattr(text, name, rule(getattr(text, name), kept))


# For each rule in `families.RULES`, a function that adjusts the field of a configuration to the kept layers, in place.
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
    """The rule of each per-layer field in a configuration. Refuses lists whose rule is unknown."""
    text = text_config(config)
    if family.rules is None:
        raise UnsupportedArchitectureError(
            f"drop_layers is not supported for model_type {text.model_type!r}: its per-layer configuration fields are "
            "not known. Name them with hf_lnscale.register_family(..., depth_fields=(...)), or () if there are none."
        )
    # Any configuration may have layer_types, even if its family does not list it.
    values, total = text.to_dict(), text.num_hidden_layers
    rules = {"layer_types": "each"} | family.rules
    rules = {name: rule for name, rule in rules.items() if values.get(name) is not None}
    for name, value in values.items():
        if not isinstance(value, (list, tuple)) or name.endswith(_NOT_OVER_DEPTH):
            continue
        has = f"drop_layers: the config's {name} has {len(value)} entries"
        if name in rules:
            if rules[name] in ("each", "shared") and len(value) != total:
                raise ValueError(f"{has} for {total} layers, so entries cannot be matched to layers")
        elif len(value) == total:
            if "layer" not in name:
                raise ValueError(
                    f"{has}, as many as there are layers, but is not known as a per-layer field. If it is one, use "
                    f'hf_lnscale.register_family(..., depth_fields={{"{name}": "each", ...}})'
                )
            rules[name] = "each"
    return rules


def _require_describable(before: PreTrainedConfig, after: PreTrainedConfig, path: str, kept: list[int]) -> None:
    """Refuses a configuration whose model would have different tensors from the kept layers."""
    shapes = _shapes(before)
    if not shapes:
        return
    wanted = {new: shapes[old] for old, new in rename_layers(shapes, layer_names(path), kept).items()}
    try:
        built = _shapes(after)
    except Exception as error:
        raise ValueError(
            f"drop_layers: no {before.model_type} model can be built from only layers {kept}: {error}"
        ) from error
    if differing := sorted(wanted.items() ^ built.items()):
        name = differing[0][0]
        raise ValueError(
            f"drop_layers: no {before.model_type} configuration describes only layers {kept}: {name!r} has shape "
            f"{wanted.get(name)}, but {built.get(name)} in a model with the new configuration. If the family's row "
            "lacks a per-layer field, name it: hf_lnscale.register_family(..., depth_fields=...)"
        )


def _shapes(text: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of a decoder's tensors by name; empty for custom code outside transformers."""
    model_class = MODEL_MAPPING.get(type(text), None)
    if not isinstance(model_class, type):
        return {}
    # Recreated from its dict, as on loading, and without an attention implementation that may not be installed.
    plain = copy.deepcopy(text)
    write(plain, Record())
    with torch.device("meta"):
        model = model_class(type(text).from_dict(plain.to_diff_dict()))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _refuse_other_mentions(config: PreTrainedConfig, family: Family, kept: list[int]) -> None:
    """Refuses a quantization_config that would treat layers differently under their new indices."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    values = quantization if isinstance(quantization, dict) else quantization.to_dict()
    modules = _modules_of_a_layer(text_config(config), family)
    names = [f"{before}{family.layers}.{{}}{module}" for module in modules for before in _BEFORE_LAYERS]
    for pattern in _strings(json.loads(json.dumps(values, default=str))):
        matchers = _matchers(pattern)
        for new, old in enumerate(kept):
            if any(bool(match(at.format(new))) != bool(match(at.format(old))) for at in names for match in matchers):
                problem = f"the quantization_config names single layers ({pattern!r}), whose indices would change"
                raise ValueError(f"drop_layers: {problem}; prune the checkpoint before quantizing it")


def _matchers(pattern: str) -> list[Callable[[str], Any]]:
    """All ways in which libraries may interpret a pattern: part of a name, tensor in a module, glob or expression."""
    matchers: list[Callable[[str], Any]] = [
        lambda name: pattern in name,
        lambda name: f"{name}." in pattern,
        re.compile(fnmatch.translate(pattern)).match,
    ]
    with suppress(re.error):
        expression = re.compile(pattern)
        matchers += [expression.search, expression.match, expression.fullmatch]
    return matchers


def _strings(value: Any) -> Iterable[str]:
    """Every string in a JSON value, including keys, without the prefixes that mark regular expressions."""
    if isinstance(value, str):
        yield re.sub(r"^(re:|[+-]:)", "", value)
    elif isinstance(value, (dict, list)):
        for part in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _strings(part)


def _modules_of_a_layer(text: PreTrainedConfig, family: Family) -> set[str]:
    """Paths of all modules in any decoder layer, relative to the layer and starting with a dot; "" is the layer."""
    names = _shapes(text) or [f"{family.layers}.0.self_attn.q_proj.weight"]
    paths = {match[3].rpartition(".")[0] for match in map(layer_names(family.layers).match, names) if match}
    return {name[:end] for name in paths for end in range(len(name) + 1) if name[end : end + 1] in ("", ".")}
