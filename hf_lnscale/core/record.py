"""The only reader and writer of the plugin's keys in a model's configuration, in memory and in config.json."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import yaml
from transformers import PreTrainedConfig

from .config import LNScalingConfig, is_integer
from .display import brief
from .families import family_of, text_config
from .json_file import are_layers

# ON_DISK holds the scaling stored in the checkpoint's config.json and exists only in memory: it distinguishes a model
# trained with the scale from one on which it was enabled after training.
ACTIVE = "ln_scaling"
FOLDED = "ln_scaling_folded"
DROPPED = "dropped_layers"
ON_DISK = "_ln_scaling_on_disk"
_KEYS = frozenset({ACTIVE, FOLDED, DROPPED, ON_DISK})
SUBLAYERS = ("attention", "mlp")
_MOST_LAYERS = 1_000_000  # bounds the size of lists of layers
# Not part of `Record`, since it does not affect outputs. At most `KEPT` hashes of a text's passages are stored.
KNOWN_TEXT, KEPT = "calibration_text", 128
_used = False
# Key in the metadata of safetensors files.
MARK = "hf_lnscale"
# What protects the config.json of scaled checkpoints and of those without some sub-layers.
MODEL_TYPE_PREFIX, ARCHITECTURE_PREFIX, PARTIAL_PREFIX = "hf_lnscale_", "LNS", "Partial"
TRIPWIRE = "This checkpoint uses LayerNorm Scaling: install hf_lnscale and import it before loading"
PARTIAL_TRIPWIRE = "This checkpoint lacks attention or MLP in layers: install hf_lnscale and import it before loading"


class Stored(dict[str, Any]):
    """An active scaling in a configuration. Defined here so that unpickling a configuration imports this package."""


@dataclass(frozen=True)
class Dropped:
    """The layers and sub-layers of the original model that are missing, as sorted indices into it, counted from 0.

    A layer that lacks only one sub-layer is in `attention` or `mlp`; a layer that lacks both is in `layers`.
    """

    layers: tuple[int, ...]
    num_hidden_layers: int  # of the original model
    base: str = field(default="", compare=False)  # the original's name; empty if it has no name that others can load
    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()

    @property
    def kept(self) -> list[int]:
        """Indices into the original model of the remaining layers."""
        return [layer for layer in range(self.num_hidden_layers) if layer not in self.layers]

    @property
    def sublayers(self) -> dict[str, list[int]]:
        """Positions, in this model, of the layers that lack each kind of sub-layer. Empty lists are omitted."""
        at = {layer: position for position, layer in enumerate(self.kept)}
        found = {kind: [at[layer] for layer in getattr(self, kind)] for kind in SUBLAYERS}
        return {kind: positions for kind, positions in found.items() if positions}

    def __str__(self) -> str:
        """The missing parts, for example "layers 12; attention of layers 7, 26"."""
        return named_parts(self.layers, self.attention, self.mlp)

    def to_dict(self) -> dict[str, Any]:
        sublayers = {kind: list(getattr(self, kind)) for kind in self.sublayers}
        return {
            "layers": list(self.layers), "num_hidden_layers": self.num_hidden_layers, "base": self.base, **sublayers
        }  # fmt: skip


def named_parts(layers: Iterable[int], attention: Iterable[int], mlp: Iterable[int]) -> str:
    """Describes parts of a model: "layers 12, 14; attention of layers 7"."""
    named = {"layers": layers, "attention of layers": attention, "MLPs of layers": mlp}
    found = {what: ", ".join(map(str, numbers)) for what, numbers in named.items()}
    return "; ".join(f"{what} {numbers}" for what, numbers in found.items() if numbers)


@dataclass(frozen=True)
class KnownText:
    """The text used to choose or heal a model's layers; see `measuring.known_text`."""

    source: str
    passages: tuple[int, ...]  # a sorted sample of 48-bit hashes

    def to_dict(self) -> dict[str, Any]:
        """For JSON: passages are joined into one string, twelve hexadecimal digits each."""
        hashes = "".join(f"{passage:012x}" for passage in self.passages)
        return {"source": self.source, "passages": hashes}

    @classmethod
    def of(cls, stored: Any) -> KnownText:
        """The inverse of `to_dict`. Ignores other keys; raises `ValueError` for an invalid value."""
        try:
            source, hashes = stored["source"], stored["passages"]
            if not isinstance(source, str) or not re.fullmatch("([0-9a-f]{12})*", hashes):
                raise TypeError
        except (TypeError, KeyError, IndexError):
            raise ValueError(
                f'{KNOWN_TEXT} must look like {{"source": "a.txt", "passages": "00c0ffee0123"}}, with twelve '
                f"hexadecimal digits per passage, got {stored!r:.200}"
            ) from None
        return cls(source, tuple(sorted(int(hashes[at : at + 12], 16) for at in range(0, len(hashes), 12))))


@dataclass(frozen=True)
class Record:
    """What a configuration stores about the text decoder's scale and layers."""

    active: LNScalingConfig | None = None  # applied to the norms' outputs
    folded: LNScalingConfig | None = None  # contained in the norm weights
    dropped: Dropped | None = None
    on_disk: LNScalingConfig | None = None  # active in the checkpoint's own config.json

    @property
    def sublayers(self) -> dict[str, list[int]]:
        """See `Dropped.sublayers`; empty if every layer is complete."""
        return self.dropped.sublayers if self.dropped else {}

    @property
    def needs_plugin(self) -> bool:
        """Whether a program without this package would compute wrong outputs, so that the checkpoint is protected."""
        return bool(self.active or self.sublayers)

    @property
    def architecture_prefix(self) -> str:
        """Prefix of the names in `architectures` of a protected checkpoint."""
        return (PARTIAL_PREFIX if self.sublayers else "") + (ARCHITECTURE_PREFIX if self.active else "")

    @property
    def tripwires(self) -> list[str]:
        """Keys in a protected checkpoint's `id2label` on which the configuration classes of transformers fail."""
        return [PARTIAL_TRIPWIRE] * bool(self.sublayers) + [TRIPWIRE] * bool(self.active)

    def to_dict(self) -> dict[str, Any]:
        """The keys and values to store in config.json; empty for a plain model."""
        values = {ACTIVE: self.active, FOLDED: self.folded, DROPPED: self.dropped}
        return {key: value.to_dict() for key, value in values.items() if value is not None}


class SourceName(str):
    """The name of the checkpoint that a model was loaded from, together with the changes made to the model since.

    Some programs load a second model from the `_name_or_path` of the first one's configuration, as TRL does for
    reference models. `from_pretrained` with this name gives the changed model, not the one in the checkpoint.
    """

    record: Record
    changed: str  # how the weights were changed in memory, if loading cannot reproduce them; else ""

    def __new__(cls, name: str, record: Record = Record(), changed: str = "") -> SourceName:
        made = super().__new__(cls, name)
        made.record, made.changed = record, changed
        return made


# Model cards store the base model's name as YAML, which would otherwise serialize the class.
for _representer in (yaml.representer.Representer, yaml.representer.SafeRepresenter):
    _representer.add_representer(SourceName, lambda dumper, name: dumper.represent_str(str(name)))


def remember_source(config: PreTrainedConfig, changed: str | None = None) -> None:
    """Stores in a model's name what a second model loaded by that name must match; keeps `changed` if it is None."""
    if name := getattr(config, "_name_or_path", ""):
        changed = getattr(name, "changed", "") if changed is None else changed
        found = record(config)
        plain = found == Record() and not changed
        config._name_or_path = str(name) if plain else SourceName(name, replace(found, on_disk=None), changed)


def record(config: object) -> Record:
    """Reads and validates the plugin's keys in a configuration or a config.json dict; empty for anything else."""
    if isinstance(config, dict):
        keys = _KEYS - {ON_DISK}
        values = next((part for part in parts(config) if any(part.get(key) is not None for key in keys)), config)
        num_layers = number if is_integer(number := values.get("num_hidden_layers")) else None
    elif is_flagged(config):
        values, num_layers = vars(text_config(config)), layers_of(config)
    else:
        return Record()
    return Record(
        active=_scaling(values, ACTIVE, num_layers),
        folded=_scaling(values, FOLDED, num_layers),
        dropped=_dropped(values.get(DROPPED)),
        on_disk=_scaling(values, ON_DISK, num_layers),
    )


def note_use() -> None:
    """Notes that this process has, or had, a model with a scale or a cut."""
    global _used
    _used = True


def is_used() -> bool:
    """Whether a model in this process may have a scale or a cut, so that it is worth looking for one."""
    return _used


def write(config: PreTrainedConfig, new: Record) -> None:
    """Writes what `record` reads. Stores new objects, since other configurations may share the old ones."""
    values = vars(text_config(config))
    for key in _KEYS:
        values.pop(key, None)
    values |= new.to_dict()
    if new != Record():
        note_use()
    if new.active:
        values[ACTIVE] = Stored(values[ACTIVE])
    if new.on_disk:
        values[ON_DISK] = new.on_disk.to_dict()
    remember_source(config)


def known_text(config: PreTrainedConfig) -> KnownText | None:
    """The text used to choose or heal a model's layers, if its configuration records it."""
    stored = vars(text_config(config)).get(KNOWN_TEXT)
    return None if stored is None else KnownText.of(stored)


def add_known_text(config: PreTrainedConfig, text: KnownText) -> None:
    """Adds a text to those recorded in a configuration."""
    if before := known_text(config):
        names = dict.fromkeys(f"{before.source}, {text.source}".split(", "))
        text = KnownText(", ".join(names), tuple(sorted({*before.passages, *text.passages})[:KEPT]))
    write_known_text(config, text)


def write_known_text(config: PreTrainedConfig, text: KnownText | None) -> None:
    """Writes what `known_text` reads."""
    values = vars(text_config(config))
    values.pop(KNOWN_TEXT, None)
    if text is not None:
        values[KNOWN_TEXT] = text.to_dict()


def mark(own: Record) -> str:
    """The string stored in weight files to tie them to a configuration with this record."""
    return json.dumps(own.to_dict(), sort_keys=True)


def is_flagged(config: object) -> TypeGuard[PreTrainedConfig]:
    """Whether an object is a configuration with a key of the plugin, possibly nested; only reads attributes."""
    if not isinstance(config, PreTrainedConfig):
        return False
    values = vars(config)
    return not _KEYS.isdisjoint(values) or any(map(is_flagged, values.values()))


def require_valid(config: PreTrainedConfig) -> None:
    """Refuses a configuration from a file, perhaps edited by hand, that is invalid or for another number of layers."""
    found, num_layers = record(config), layers_of(config)
    if found.active and found.folded:
        raise ValueError(
            f"the model's config has both {ACTIVE} and {FOLDED}, which would scale twice; remove {ACTIVE}, or "
            f"{FOLDED} if the norm weights do not contain the scale"
        )
    if num_layers is None:
        return
    with _naming(ACTIVE if found.active else FOLDED):
        if scaling := found.active or found.folded:
            scaling.scales(num_layers)
    if found.dropped is not None and len(found.dropped.kept) != num_layers:
        raise ValueError(
            f"{DROPPED} in the model's config is {found.dropped.to_dict()}, which leaves {len(found.dropped.kept)} "
            f"layers, but num_hidden_layers is {num_layers}; use drop_layers to drop more layers"
        )


def get_ln_scaling(config: PreTrainedConfig) -> dict[str, Any] | None:
    """A copy of the active scaling of a model's text decoder as a dict, or None."""
    active = record(config).active
    return Stored(active.to_dict()) if active else None


def set_ln_scaling(config: PreTrainedConfig, value: Any) -> None:
    """Sets `ln_scaling` in a configuration. None has no effect; True keeps a scaling that is already set."""
    if value is None:
        return
    now = record(config)
    if value is True and now.active:
        return
    scaling, num_layers = LNScalingConfig.of(value), layers_of(config)
    if scaling is None:
        return write(config, replace(now, active=None))
    if text_config(config).model_type:  # empty for the base class, with which Trainer reads a config.json
        family_of(config)
    if now.folded:
        raise ValueError(
            f"ln_scaling={value!r} on a checkpoint whose norm weights already contain the scale ({FOLDED} in its "
            "config) would scale twice. It needs no flag to run; to continue training with LayerNorm Scaling, load it "
            "without the flag and call hf_lnscale.unfold_ln_scaling(model)."
        )
    if isinstance(value, Stored):  # copied from a configuration, possibly with a different number of layers
        scaling = _fitted(scaling, num_layers)
    if scaling.depths is None and now.dropped:
        scaling = replace(scaling, depths=tuple(layer + 1 for layer in now.dropped.kept))
    if scaling.depths is not None and num_layers:
        scaling = scaling.for_layers(num_layers)
    write(config, replace(now, active=scaling))


def trained_without(config: PreTrainedConfig) -> str | None:
    """How the scaling was changed since training: it was turned "on", "off" or is "other"; None if it was not."""
    found = record(config)
    if _same_scales(found.active, found.on_disk, layers_of(config)):
        return None
    return "off" if found.active is None else "on" if found.on_disk is None else "other"


def scaled_alike(config: PreTrainedConfig, trained: LNScalingConfig | None) -> bool:
    """Whether a model has the scale that weights were trained with; the steps of a warmup may differ."""
    both, num_layers = [record(config).active, trained], layers_of(config)
    own, theirs = (scaling and replace(scaling, step=scaling.warmup_steps) for scaling in both)
    if any(scaling and scaling.warming_up for scaling in both) and own != theirs:
        return False
    return _same_scales(own, theirs and _fitted(theirs, num_layers), num_layers)


def _same_scales(first: LNScalingConfig | None, second: LNScalingConfig | None, num_layers: int | None) -> bool:
    if first is None and second is None:
        return True
    scales = []
    for scaling in (first, second):
        try:
            scales.append(scaling.scales(num_layers or 0) if scaling else [1.0] * (num_layers or 0))
        except ValueError:  # the checkpoint and the model have different numbers of layers
            scales.append([])
    return scales[0] == scales[1]


def recorded_scaling(stateful_callbacks: dict[str, Any]) -> LNScalingConfig | None:
    """The warmup state from `stateful_callbacks` in a trainer_state.json; None if there was no warmup."""
    for saved in stateful_callbacks.values():
        for callback in saved if isinstance(saved, list) else [saved]:  # a list if a callback was added twice
            if state := callback["attributes"].get("ln_scaling"):
                return LNScalingConfig.of(state)
    return None


def layers_of(config: PreTrainedConfig) -> int | None:
    """The number of layers of a model's text decoder; None if its configuration has none."""
    number = getattr(text_config(config), "num_hidden_layers", None)
    return number if is_integer(number) else None  # a dict in some configurations


def _fitted(scaling: LNScalingConfig, num_layers: int | None) -> LNScalingConfig:
    """Adjusts stored depths of exactly 1, 2, ..., the default, to a number of layers that was changed since."""
    depths = scaling.depths
    if depths and num_layers and len(depths) != num_layers and depths == tuple(range(1, len(depths) + 1)):
        return replace(scaling, depths=tuple(range(1, num_layers + 1)))
    return scaling


@contextlib.contextmanager
def _naming(key: str) -> Iterator[None]:
    """Makes errors of `LNScalingConfig`, which name the argument `ln_scaling`, name the configuration key instead."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key} in the model's config is invalid: {error}") from None


def _scaling(values: dict[str, Any], key: str, num_layers: int | None) -> LNScalingConfig | None:
    if (stored := values.get(key)) is None:
        return None
    with _naming(key):
        scaling = LNScalingConfig.of(stored)
    return _fitted(scaling, num_layers) if scaling else None


def _dropped(stored: Any) -> Dropped | None:
    if stored is None:
        return None
    try:
        layers, number, base = stored["layers"], stored["num_hidden_layers"], stored.get("base") or ""
        parts = [layers, *(stored.get(kind) or [] for kind in SUBLAYERS)]
        valid = all(isinstance(part, list | tuple) for part in parts) and is_integer(number) and isinstance(base, str)
        named = [layer for part in parts for layer in part] if valid else []  # each layer may occur only once
        valid = valid and are_layers(named, number) and len(layers) < number <= _MOST_LAYERS
    except (TypeError, KeyError, IndexError, AttributeError):
        valid = False
    if not valid:
        raise ValueError(
            f'{DROPPED} in the model\'s config must look like {{"layers": [1, 2], "num_hidden_layers": 6}}, with '
            "distinct integers from 0 to num_hidden_layers - 1 that leave at least one layer; the optional keys "
            f"attention and mlp list other layers, got {brief(stored)}"
        )
    return Dropped(tuple(sorted(layers)), number, base, *(tuple(sorted(part)) for part in parts[1:])) if named else None


def parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields a configuration's dict and the dicts nested in it."""
    left = [config]
    while left:  # not recursive: nesting may exceed the recursion limit
        yield (part := left.pop())
        left += reversed([value for value in part.values() if isinstance(value, dict)])


def protect(config: dict[str, Any]) -> dict[str, Any]:
    """Converts the dict of a configuration, in place, to the form stored in `config.json`, and returns it.

    If nothing in it needs this package, only private state is removed.
    """
    prefix = ""
    for part in list(parts(config)):
        part.pop(ON_DISK, None)
        found = protected_part(part)
        for tripwire in found.tripwires:
            part["id2label"] = {**(part.get("id2label") or {}), tripwire: ""}
        prefix = prefix or found.architecture_prefix
    if prefix:
        config["model_type"] = MODEL_TYPE_PREFIX + config["model_type"]
        if config.get("architectures"):
            config["architectures"] = [prefix + name for name in config["architectures"]]
    return config


def unprotect(config: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `protect`, in place; leaves the dict of an unprotected `config.json` unchanged.

    Sets `ON_DISK` for each active scale. Any `ON_DISK` in the file itself is ignored.
    """
    prefix = ""
    for part in list(parts(config)):
        part.pop(ON_DISK, None)
        found = protected_part(part)
        _scaling(part, FOLDED, None)
        if found.active:
            part[ACTIVE], part[ON_DISK] = Stored(found.active.to_dict()), found.active.to_dict()
        if tripwires := found.tripwires:
            labels = (part.pop("id2label", None) or {}).items()
            if left := {key: label for key, label in labels if key not in tripwires}:
                part["id2label"] = left
        prefix = prefix or found.architecture_prefix
    if prefix:
        config["model_type"] = config.get("model_type", "").removeprefix(MODEL_TYPE_PREFIX)
        if config.get("architectures"):
            config["architectures"] = [name.removeprefix(prefix) for name in config["architectures"]]
    return config


def protected_part(part: dict[str, Any]) -> Record:
    """The fields of `Record` that may need this package, from a configuration's dict without nested ones."""
    return Record(active=_scaling(part, ACTIVE, None), dropped=_dropped(part.get(DROPPED)))
