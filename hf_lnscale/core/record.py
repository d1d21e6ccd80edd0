"""The plugin's keys in a model's configuration, in memory and in config.json: their one reader and writer."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

from transformers import PreTrainedConfig

from .config import LNScalingConfig, is_integer
from .display import brief
from .families import family_of, text_config
from .json_file import are_layers

# ON_DISK holds the scaling in the checkpoint's own config.json and exists in memory alone: it tells a model that was
# trained with the scale from one in which it was switched on cold.
ACTIVE = "ln_scaling"
FOLDED = "ln_scaling_folded"
DROPPED = "dropped_layers"
ON_DISK = "_ln_scaling_on_disk"
SUBLAYERS = ("attention", "mlp")
_MOST_LAYERS = 1_000_000  # lists of layers are made
# No part of `Record`: it says how the layers were chosen, and changes no output. A text is known by at most so many
# hashes of its passages.
KNOWN_TEXT, KEPT = "calibration_text", 128
# Key in the metadata of safetensors files.
MARK = "hf_lnscale"


class Stored(dict[str, Any]):
    """An active scaling in a configuration. Defined here so that unpickling a configuration imports this package."""


@dataclass(frozen=True)
class Dropped:
    """Which layers and sub-layers of the original model are missing, by their sorted numbers in it, counted from 0.

    A layer that is there without its attention or MLP is one of `attention` or `mlp`; one without both, of `layers`.
    """

    layers: tuple[int, ...]
    num_hidden_layers: int  # of the original model
    base: str = field(default="", compare=False)  # the original's name, empty if it has none that others can use
    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()

    @property
    def kept(self) -> list[int]:
        """The numbers, in the original model, of the layers that are left."""
        return [layer for layer in range(self.num_hidden_layers) if layer not in self.layers]

    @property
    def sublayers(self) -> dict[str, list[int]]:
        """Positions, in the model itself, of the layers that lack a sub-layer, by its kind; no empty lists."""
        at = {layer: position for position, layer in enumerate(self.kept)}
        found = {kind: [at[layer] for layer in getattr(self, kind)] for kind in SUBLAYERS}
        return {kind: positions for kind, positions in found.items() if positions}

    def __str__(self) -> str:
        """The missing parts, as in "layers 12; attention of layers 7, 26"."""
        return named_parts(self.layers, self.attention, self.mlp)

    def to_dict(self) -> dict[str, Any]:
        sublayers = {kind: list(getattr(self, kind)) for kind in self.sublayers}
        return {
            "layers": list(self.layers), "num_hidden_layers": self.num_hidden_layers, "base": self.base, **sublayers
        }  # fmt: skip


def named_parts(layers: Iterable[int], attention: Iterable[int], mlp: Iterable[int]) -> str:
    """Parts of a model in words: "layers 12, 14; attention of layers 7"."""
    named = {"layers": layers, "attention of layers": attention, "MLPs of layers": mlp}
    found = {what: ", ".join(map(str, numbers)) for what, numbers in named.items()}
    return "; ".join(f"{what} {numbers}" for what, numbers in found.items() if numbers)


@dataclass(frozen=True)
class KnownText:
    """The text that a model's layers were chosen or healed on; see `measuring.known_text`."""

    source: str
    passages: tuple[int, ...]  # a sorted sample of their hashes, of 48 bits each

    def to_dict(self) -> dict[str, Any]:
        """For JSON: passages are a string of twelve hexadecimal digits each."""
        hashes = "".join(f"{passage:012x}" for passage in self.passages)
        return {"source": self.source, "passages": hashes}

    @classmethod
    def of(cls, stored: Any) -> KnownText:
        """Reads what `to_dict` wrote; other keys are ignored, and anything else is a `ValueError`."""
        try:
            source, hashes = stored["source"], stored["passages"]
            if not isinstance(source, str) or not re.fullmatch("([0-9a-f]{12})*", hashes):
                raise TypeError
        except (TypeError, KeyError, IndexError):
            raise ValueError(
                f'{KNOWN_TEXT} must be like {{"source": "a.txt", "passages": "00c0ffee0123"}}, with twelve hexadecimal '
                f"digits a passage, got {stored!r:.200}"
            ) from None
        return cls(source, tuple(sorted(int(hashes[at : at + 12], 16) for at in range(0, len(hashes), 12))))


@dataclass(frozen=True)
class Record:
    """The scale and the layers of the text decoder in a configuration."""

    active: LNScalingConfig | None = None  # applied to the norms' outputs
    folded: LNScalingConfig | None = None  # contained in the norm weights
    dropped: Dropped | None = None
    on_disk: LNScalingConfig | None = None  # active in the checkpoint's own config.json

    @property
    def sublayers(self) -> dict[str, list[int]]:
        """See `Dropped.sublayers`; empty for a model of whole layers."""
        return self.dropped.sublayers if self.dropped else {}

    @property
    def needs_plugin(self) -> bool:
        """Whether a program without this package would compute something else: its checkpoint is protected."""
        return bool(self.active or self.sublayers)

    @property
    def architecture_prefix(self) -> str:
        """Marks the names in `architectures` of a protected checkpoint."""
        return (PARTIAL_PREFIX if self.sublayers else "") + (ARCHITECTURE_PREFIX if self.active else "")

    def to_dict(self) -> dict[str, Any]:
        """The keys that belong into a config.json and their values; empty for a plain model."""
        values = {ACTIVE: self.active, FOLDED: self.folded, DROPPED: self.dropped}
        return {key: value.to_dict() for key, value in values.items() if value is not None}


class SourceName(str):
    """The name of the checkpoint that a model was loaded from, with the changes made to the model since.

    Many programs load a second model by the `_name_or_path` of a first one's configuration, such as TRL's reference
    models. `from_pretrained` of this name gives the same model again, not the one in the checkpoint.
    """

    record: Record
    changed: str  # how its weights were changed in memory, so that they cannot be loaded again; "" if they were not

    def __new__(cls, name: str, record: Record = Record(), changed: str = "") -> SourceName:
        made = super().__new__(cls, name)
        made.record, made.changed = record, changed
        return made


def remember_source(config: PreTrainedConfig, changed: str | None = None) -> None:
    """Notes in the name of a model in memory what one that is loaded by it must be like; see `SourceName`.

    None for how its weights were changed leaves what was noted.
    """
    if name := getattr(config, "_name_or_path", ""):
        changed = getattr(name, "changed", "") if changed is None else changed
        found = record(config)
        plain = found == Record() and not changed
        config._name_or_path = str(name) if plain else SourceName(name, replace(found, on_disk=None), changed)


def record(config: object) -> Record:
    """Reads and validates the plugin's keys in a configuration or the dict of a config.json; anything else has none.

    Stored depths of exactly 1, 2, ... are the default ones and follow the number of layers, which may have been changed
    since they were written.

    Raises:
        ValueError: for a value that is not valid; the message names the key, the value and what is valid.
    """
    if isinstance(config, dict):
        keys = (ACTIVE, FOLDED, DROPPED)
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


def write(config: PreTrainedConfig, new: Record) -> None:
    """Replaces what `record` reads. The values are new objects, as configurations may share the old ones."""
    values = vars(text_config(config))
    for key in (ACTIVE, FOLDED, DROPPED, ON_DISK):
        values.pop(key, None)
    values |= new.to_dict()
    if new.active is not None:
        values[ACTIVE] = Stored(values[ACTIVE])
    if new.on_disk is not None:
        values[ON_DISK] = new.on_disk.to_dict()
    remember_source(config)


def known_text(config: PreTrainedConfig) -> KnownText | None:
    """The text that a model's layers were chosen or healed on, if its configuration says so."""
    stored = vars(text_config(config)).get(KNOWN_TEXT)
    return None if stored is None else KnownText.of(stored)


def add_known_text(config: PreTrainedConfig, text: KnownText) -> None:
    """Notes a text in a configuration, beside what was noted before."""
    if before := known_text(config):
        names = dict.fromkeys(f"{before.source}, {text.source}".split(", "))
        text = KnownText(", ".join(names), tuple(sorted({*before.passages, *text.passages})[:KEPT]))
    write_known_text(config, text)


def write_known_text(config: PreTrainedConfig, text: KnownText | None) -> None:
    """Replaces what `known_text` reads."""
    values = vars(text_config(config))
    values.pop(KNOWN_TEXT, None)
    if text is not None:
        values[KNOWN_TEXT] = text.to_dict()


def mark(own: Record) -> str:
    """The mark of weights that belong to a configuration with this record."""
    return json.dumps(own.to_dict(), sort_keys=True)


def is_flagged(config: object) -> TypeGuard[PreTrainedConfig]:
    """Whether something is a configuration with a key of the plugin, in itself or in a part; only reads attributes."""
    if not isinstance(config, PreTrainedConfig):
        return False
    values = vars(config)
    return any(key in values for key in (ACTIVE, FOLDED, DROPPED, ON_DISK)) or any(
        is_flagged(value) for value in values.values()
    )


def require_valid(config: PreTrainedConfig) -> None:
    """Validates a configuration that was read from a file, which may have been edited by hand.

    Raises:
        ValueError: for a value that is not valid in itself, or that does not fit the number of layers.
    """
    found, num_layers = record(config), layers_of(config)
    if found.active and found.folded:
        raise ValueError(
            f"the model's config has both {ACTIVE} and {FOLDED}, which would scale twice; remove {ACTIVE}, or "
            f"{FOLDED} if the norm weights do not contain the scale"
        )
    if num_layers is None:
        return
    for key, scaling in ((ACTIVE, found.active), (FOLDED, found.folded)):
        with _naming(key):
            _ = scaling and scaling.scales(num_layers)
    if found.dropped is not None and len(found.dropped.kept) != num_layers:
        raise ValueError(
            f"{DROPPED} in the model's config is {found.dropped.to_dict()}, which leaves {len(found.dropped.kept)} "
            f"layers, but num_hidden_layers is {num_layers}; give drop_layers to leave out more layers"
        )


def get_ln_scaling(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The active scaling of a model's text decoder as a dict, a copy, or None."""
    active = record(config).active
    return Stored(active.to_dict()) if active else None


def set_ln_scaling(config: PreTrainedConfig, value: Any) -> None:
    """Writes a value of the `ln_scaling` argument into a configuration; a model built from it is scaled accordingly.

    None changes nothing, and neither does True if a scaling is set already: a checkpoint keeps its own depths.

    Raises:
        ValueError: for a wrong value, or if the norm weights contain a scale already.
        UnsupportedArchitectureError: if the model's family is not in the table.
    """
    if value is None:
        return
    now = record(config)
    if value is True and now.active:
        return
    scaling, num_layers = LNScalingConfig.of(value), layers_of(config)
    if scaling is None:
        return write(config, replace(now, active=None))
    if text_config(config).model_type:  # the base class, with which Trainer looks into a config.json, has none
        family_of(config)
    if now.folded:
        raise ValueError(
            f"ln_scaling={value!r} on a checkpoint whose norm weights contain the scale already ({FOLDED} in its "
            "config): that would scale twice. It needs no flag to run; to train it further with LayerNorm Scaling, "
            "load it without the flag and call hf_lnscale.unfold_ln_scaling(model)."
        )
    if isinstance(value, Stored):  # copied from a configuration, perhaps of another number of layers
        scaling = _fitted(scaling, num_layers)
    if scaling.depths is None and now.dropped:
        scaling = replace(scaling, depths=tuple(layer + 1 for layer in now.dropped.kept))
    if scaling.depths is not None and num_layers:
        scaling = scaling.for_layers(num_layers)
    write(config, replace(now, active=scaling))


def trained_without(config: PreTrainedConfig) -> str | None:
    """How the active scaling differs from the one that the checkpoint's weights were trained with.

    Returns:
        None where they agree, else "on", "off" or "other": what was done to the checkpoint's own.
    """
    found = record(config)
    if found.active is None and found.on_disk is None:
        return None
    num_layers = layers_of(config) or 0
    scales = []
    for scaling in (found.active, found.on_disk):
        try:
            scales.append(scaling.scales(num_layers) if scaling else [1.0] * num_layers)
        except ValueError:  # the checkpoint has another number of layers than the model
            scales.append([])
    if scales[0] == scales[1]:
        return None
    return "off" if found.active is None else "on" if found.on_disk is None else "other"


def recorded_scaling(stateful_callbacks: dict[str, Any]) -> LNScalingConfig | None:
    """Where a warmup stood, from `stateful_callbacks` of a saved trainer_state.json; None if there was none."""
    for saved in stateful_callbacks.values():
        for one in saved if isinstance(saved, list) else [saved]:  # a list if a callback was given twice
            if stood := one["attributes"].get("ln_scaling"):
                return LNScalingConfig.of(stood)
    return None


def layers_of(config: PreTrainedConfig) -> int | None:
    """The number of layers of a model's text decoder; None if its configuration has no such number."""
    number = getattr(text_config(config), "num_hidden_layers", None)
    return number if is_integer(number) else None  # some have a dict


def _fitted(scaling: LNScalingConfig, num_layers: int | None) -> LNScalingConfig:
    depths = scaling.depths
    if depths and num_layers and len(depths) != num_layers and depths == tuple(range(1, len(depths) + 1)):
        return replace(scaling, depths=tuple(range(1, num_layers + 1)))
    return scaling


@contextlib.contextmanager
def _naming(key: str) -> Iterator[None]:
    """Makes errors of `LNScalingConfig`, which speak of the argument `ln_scaling`, name the key that was read."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key} in the model's config is not valid: {error}") from None


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
        named = [layer for part in parts for layer in part] if valid else []  # a layer without both is a dropped one
        valid = valid and are_layers(named, number) and len(layers) < number <= _MOST_LAYERS
    except (TypeError, KeyError, IndexError, AttributeError):
        valid = False
    if not valid:
        raise ValueError(
            f'{DROPPED} in the model\'s config must be like {{"layers": [1, 2], "num_hidden_layers": 6}}, with '
            "different integers from 0 to num_hidden_layers - 1 and not all of them; attention and mlp, if there, are "
            f"lists of other such layers, got {brief(stored)}"
        )
    return Dropped(tuple(sorted(layers)), number, base, *(tuple(sorted(part)) for part in parts[1:])) if named else None


MODEL_TYPE_PREFIX = "hf_lnscale_"
ARCHITECTURE_PREFIX, PARTIAL_PREFIX = "LNS", "Partial"
# Keys that stop the configuration classes of transformers, by what the checkpoint has.
TRIPWIRE = "This checkpoint uses LayerNorm Scaling: install hf_lnscale and import it before loading"
PARTIAL_TRIPWIRE = "This checkpoint lacks attention or MLP in layers: install hf_lnscale and import it before loading"


def parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A configuration's dict and those of the sub-configurations in it."""
    left = [config]
    while left:  # a value may be nested more deeply than functions can be
        yield (part := left.pop())
        left += reversed([value for value in part.values() if isinstance(value, dict)])


def protect(config: dict[str, Any]) -> dict[str, Any]:
    """Turns the dict of a configuration into what is written to `config.json`, in place, and returns it.

    If nothing in it needs this package, only private state is taken out.
    """
    prefix = ""
    for part in list(parts(config)):
        part.pop(ON_DISK, None)
        found = protected_part(part)
        for tripwire in _tripwires(found):
            part["id2label"] = {**(part.get("id2label") or {}), tripwire: ""}
        prefix = prefix or found.architecture_prefix
    if prefix:
        config["model_type"] = MODEL_TYPE_PREFIX + config["model_type"]
        if config.get("architectures"):
            config["architectures"] = [prefix + name for name in config["architectures"]]
    return config


def unprotect(config: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `protect`, in place, for the dict read from `config.json`; that of any other file is unchanged.

    Notes for each active scale that the file had it; such a note in the file itself is ignored.
    """
    prefix = ""
    for part in list(parts(config)):
        part.pop(ON_DISK, None)
        found = protected_part(part)
        _scaling(part, FOLDED, None)
        if found.active is not None:
            part[ACTIVE], part[ON_DISK] = Stored(found.active.to_dict()), found.active.to_dict()
        if tripwires := _tripwires(found):
            labels = {key: label for key, label in (part.pop("id2label", None) or {}).items() if key not in tripwires}
            if labels:
                part["id2label"] = labels
        prefix = prefix or found.architecture_prefix
    if prefix:
        config["model_type"] = config.get("model_type", "").removeprefix(MODEL_TYPE_PREFIX)
        if config.get("architectures"):
            config["architectures"] = [name.removeprefix(prefix) for name in config["architectures"]]
    return config


def protected_part(part: dict[str, Any]) -> Record:
    """The part of `Record` that may need this package, from the dict of one configuration without those inside it."""
    return Record(active=_scaling(part, ACTIVE, None), dropped=_dropped(part.get(DROPPED)))


def _tripwires(found: Record) -> list[str]:
    return [PARTIAL_TRIPWIRE] * bool(found.sublayers) + [TRIPWIRE] * bool(found.active)
