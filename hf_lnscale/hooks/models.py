"""`PreTrainedModel`: construction, loading and saving."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import sys
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_utils import load_state_dict

from ..core.apply import apply_from_config, require_consistent
from ..core.errors import ArgumentError, CheckpointError, UnsupportedTransformersError
from ..core.norm import ScaledNorm
from ..core.record import SourceName, is_flagged, note_use, record, remember_source, trained_without, write
from ..core.warnings import warn
from ..pruning import checkpoint_layers
from . import adapter_note as adapters
from .configuration import located, pop_flags, saved_config, set_flags, setting
from .install import DROPS, Original, require_supported
from .peft import adapter_to_load, noted_base
from .saving import must_be_written_last, require_same_checkpoint, weights_first

# Attribute of a model under construction: the handle of the check registered in `init`.
_UNAPPLIED = "_ln_scaling_unapplied"


def init(original: Original, /, self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    original(self, *args, **kwargs)
    if is_flagged(self.config):
        require_supported()
        note_use()
        # If a model does not call `post_init`, it must not run unscaled.
        vars(self)[_UNAPPLIED] = self.register_forward_pre_hook(lambda model, _: require_applied(model))


def post_init(original: Original, /, self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    result = original(self, *args, **kwargs)
    if is_flagged(self.config):
        apply_from_config(self)
        _done(self)
    return result


def _done(model: Any) -> None:
    if (handle := vars(model).pop(_UNAPPLIED, None)) is not None:
        handle.remove()


def require_applied(model: Any) -> None:
    """Refuses a model constructed without calling `post_init`, unless it matches its configuration anyway."""
    for part in model.modules():
        if _UNAPPLIED not in vars(part):
            continue
        try:
            require_consistent(part)
        except ValueError:
            raise UnsupportedTransformersError(
                f"{type(part).__name__} was constructed without calling post_init, so the scaling and missing "
                "sub-layers in its configuration were not applied. If it is a custom class, call self.post_init() at "
                "the end of its __init__; if it is part of transformers, this release is not supported."
            ) from None
        _done(part)


def save_pretrained(original: Original, /, self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    if any(isinstance(part, ScaledNorm) or is_flagged(getattr(part, "config", None)) for part in self.modules()):
        require_consistent(self)
    given = inspect.signature(original).bind(self, *args, **kwargs).arguments
    folder, main = given["save_directory"], given.get("is_main_process", True)
    with setting(noted_base, self.config):  # if the model has adapters, those are saved instead
        # With push_to_hub, the original uploads all files, including config.json, before it returns.
        last = must_be_written_last(folder, self.config) and not given.get("push_to_hub")
        with weights_first(folder, self.config, main) if last else contextlib.nullcontext():
            return original(self, *args, **kwargs)


def from_pretrained(
    original: Original, /, cls: Any, pretrained_model_name_or_path: Any = None, *args: Any, **kwargs: Any
) -> Any:
    name, config = pretrained_model_name_or_path, kwargs.get("config")
    if isinstance(name, SourceName):
        kwargs = {**_as_in_memory(name, kwargs), **kwargs}
    if adapter := adapter_to_load(name, kwargs):
        given = config if isinstance(config, PreTrainedConfig) else None
        kwargs = {**adapters.keywords(adapter, given), **kwargs}
    if isinstance(config, PreTrainedConfig):
        kwargs["config"] = config = copy.deepcopy(config)
        # With a configuration object, keywords would be passed to the model's `__init__`.
        set_flags(config, pop_flags(kwargs))
        own = record(config)
        # A configuration with another name does not describe these weights; a copy made through `to_dict` has no
        # `ON_DISK`.
        if name is not None and (config.name_or_path != str(name) or (own.active and not own.on_disk)):
            note_what_is_on_disk(config, name, kwargs)
    if kwargs.get("gguf_file") and (record(config).dropped or any(kwargs.get(name) is not None for name in DROPS)):
        raise ValueError(
            "drop_layers: layers cannot be dropped while loading a GGUF file; load the whole model and use "
            "hf_lnscale.drop_layers(model, layers)"
        )
    loaded = original(cls, name, *args, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    if is_flagged(getattr(model, "config", None)):
        require_applied(model)
        if name is not None and adapter is None and not isinstance(name, SourceName):
            warn_if_cold(model.config, name)
        remember_source(model.config)
    return loaded


def _as_in_memory(name: SourceName, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords that turn the checkpoint into the model that this name was taken from."""
    if name.changed:
        raise ArgumentError(
            "pretrained_model_name_or_path",
            str(name),
            problem=f"is the name of a model that was {name.changed} in memory, so loading it gives a different model. "
            "Save the model and load it from that folder, or pass the second model explicitly, for example "
            "ref_model=copy.deepcopy(model)",
        )
    base = kwargs.get("config")
    if not isinstance(base, PreTrainedConfig):
        trusted = kwargs.get("trust_remote_code")
        base = AutoConfig.from_pretrained(str(name), **located(kwargs), trust_remote_code=trusted)
    wanted, saved = name.record, record(base)
    if wanted.folded != saved.folded and (wanted.folded, saved.folded) in (
        (saved.active, None),
        (None, wanted.active),
    ):  # folded or unfolded in memory, which does not change the outputs
        wanted = dataclasses.replace(wanted, active=saved.active, folded=saved.folded)
    found = adapters.keywords_to_restore(wanted, base)
    if found is None:
        raise CheckpointError(
            f"{str(name)!r} no longer holds the model that was loaded from it, which has {wanted.to_dict()}: the "
            "checkpoint has been replaced. Save the model and use that folder"
        )
    return found


def note_what_is_on_disk(config: PreTrainedConfig, name: Any, kwargs: dict[str, Any]) -> None:
    write(config, dataclasses.replace(record(config), on_disk=None))
    try:
        saved = saved_config(config, name, kwargs)
    except (OSError, ValueError):  # no configuration next to the weights, for example for a single file
        return
    if active := record(saved).active:
        if positions := checkpoint_layers.positions_on_disk(config, saved):
            active = active.keeping(positions)
        write(config, dataclasses.replace(record(config), on_disk=active))


def warn_if_cold(config: PreTrainedConfig, name: Any) -> None:
    what = {
        "on": "ln_scaling was enabled for {name!r}, which was trained without it. Its layers do not expect scaled "
        "inputs: this takes SmolLM2-135M from perplexity 23 to over two million. LayerNorm Scaling is for training: "
        "load this checkpoint without the flag, or train a model from scratch with "
        "AutoModelForCausalLM.from_config(config, ln_scaling=True). If it was trained with the scale by a program that "
        "does not record it in config.json, mark it: hf-lnscale adopt {name} --out DIR",
        "off": "ln_scaling was disabled for {name!r}, which was trained with it. Its layers expect scaled inputs, so "
        "its outputs will be useless. To run it without hf_lnscale, fold the scale into the weights: "
        "hf_lnscale.fold_ln_scaling(model) or `hf-lnscale export`.",
        "other": "ln_scaling was changed for {name!r}, which was trained with another exponent or other depths. Its "
        "outputs will be wrong; omit the keyword, or pass ln_scaling=True, to use the checkpoint's own scaling.",
    }
    if change := trained_without(config):
        warn(what[change].format(name=str(name)))


def from_config(original: Original, /, cls: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
    scaling_is_given, flags = "ln_scaling" in kwargs, pop_flags(kwargs)
    if scaling_is_given or any(value is not None for value in flags.values()):
        config = copy.deepcopy(config)
    if scaling_is_given:
        # The weights are newly initialized, so no scale is folded into them, whatever the configuration says.
        write(config, dataclasses.replace(record(config), folded=None))
    set_flags(config, flags)
    model = original(cls, config, *args, **kwargs)
    if is_flagged(config):
        require_applied(model)
    return model


def load_pretrained_model(original: Original, /, *args: Any, **kwargs: Any) -> Any:
    bound = inspect.signature(original).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    model, state_dict, load_config = given["model"], given["state_dict"], given["load_config"]
    name, files = load_config.pretrained_model_name_or_path, given["checkpoint_files"] or []
    saved = functools.cache(lambda: saved_config(model.config, name, load_config.download_kwargs))
    own = given["expected_keys"] is None  # set only for an adapter, which uses its model's layer indices
    if own and name is not None and require_same_checkpoint(files, saved):
        checkpoint_layers.require_sublayers(model.config, saved())
    if record(model.config).dropped is None:
        return original(*args, **kwargs)
    positions = None
    if own and name is not None:
        positions = checkpoint_layers.positions_on_disk(model.config, saved())
    elif own and state_dict is not None:
        positions = checkpoint_layers.positions_in_state_dict(model.config, model, state_dict)
    with contextlib.ExitStack() as opened:
        if positions is not None:
            if state_dict is None:
                state_dict = _checkpoint_tensors(files, load_config, opened)
            renamed = checkpoint_layers.renumber(state_dict, model, positions)
            kept = {new: state_dict[old] for old, new in renamed.items()}
            if is_deepspeed_zero3_enabled():
                # ZeRO-3 copies whole tensors, so the slices of kept layers are materialized.
                kept = {key: value[:] if hasattr(value, "get_shape") else value for key, value in kept.items()}
            # The files are not passed on: offloading to disk would read tensors from them by their new names.
            given.update(state_dict=kept, checkpoint_files=None)
        found, offloaded = original(*bound.args, **bound.kwargs)
    # Tensors of missing sub-layers are skipped on purpose and need not be reported.
    names = checkpoint_layers.names_of_sublayers(model)
    found.unexpected_keys = {key for key in found.unexpected_keys if not names.match(key)}
    # A tied tensor is stored under one name and read under both. With files, transformers handles this itself.
    for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if offloaded and source in offloaded:
            offloaded.setdefault(name, offloaded[source])
    return found, offloaded


def load_distributed(original: Original, /, self: PreTrainedModel, folder: Any, *args: Any, **kwargs: Any) -> Any:
    config, saved = self.config, functools.cache(lambda: saved_config(self.config, folder))
    require_same_checkpoint(map(str, sorted(Path(folder).glob("*.safetensors"))), saved)
    if record(config).dropped and checkpoint_layers.positions_on_disk(config, saved()) is not None:
        raise ValueError(
            f"drop_layers: layers cannot be dropped while loading the distributed checkpoint {str(folder)!r}; "
            "load the whole model and use hf_lnscale.drop_layers(model, layers)"
        )
    return original(self, folder, *args, **kwargs)


def _checkpoint_tensors(files: list[str], load_config: Any, opened: contextlib.ExitStack) -> dict[str, Any]:
    """All tensors of a checkpoint by name. Tensors in safetensors files are not read yet."""
    tensors: dict[str, Any] = {}
    for file in files:
        if file.endswith(".safetensors"):
            backend = "pread" if load_config.disable_mmap or sys.platform == "win32" else "mmap"
            pointer = opened.enter_context(safe_open(file, framework="pt", device="cpu", backend=backend))
            tensors.update({name: pointer.get_slice(name) for name in pointer.keys()})  # noqa: SIM118
        else:
            tensors.update(load_state_dict(file, weights_only=load_config.weights_only))
    return tensors
