"""`PreTrainedModel`: construction, loading and saving."""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_utils import load_state_dict

from ..core.apply import apply_from_config, require_consistent
from ..core.families import text_config
from ..core.record import ACTIVE, DROPPED, FOLDED, ON_DISK, parts, set_ln_scaling, trained_without
from ..core.warnings import warn
from ..pruning import layers
from . import adapter_note as adapters
from .peft import adapter_to_load, noting


def post_init_hook(original: Any) -> Any:
    @functools.wraps(original)
    def post_init(self: PreTrainedModel) -> None:
        original(self)
        apply_from_config(self)

    return post_init


def save_pretrained_hook(original: Any) -> Any:
    @functools.wraps(original)
    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        require_consistent(self)
        with noting(self.config):  # it may hold adapters, which are then what is saved
            return original(self, *args, **kwargs)

    return save_pretrained


def from_pretrained_hook(original: Any) -> Any:
    @functools.wraps(original.__func__)
    def from_pretrained(
        cls: type[PreTrainedModel],
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        config: Any = None,
        **kwargs: Any,
    ) -> Any:
        adapter = adapter_to_load(pretrained_model_name_or_path, kwargs)
        if adapter is not None:
            given = config if isinstance(config, PreTrainedConfig) else None
            kwargs = {**adapters.keywords(adapter, given), **kwargs}
        if isinstance(config, PreTrainedConfig):
            config = copy.deepcopy(config)
            # With a configuration object, keywords would go on to the model's `__init__`.
            layers.set_drop_layers(config, kwargs.pop("drop_layers", None))
            set_ln_scaling(config, kwargs.pop("ln_scaling", None))
            name = pretrained_model_name_or_path
            if name is not None and config.name_or_path != str(name):  # it says nothing about these weights
                _note_what_is_on_disk(config, name, kwargs)
        _refuse_gguf_without_layers(config, kwargs)
        loaded = original.__func__(cls, pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        if pretrained_model_name_or_path is not None and adapter is None:
            model = loaded[0] if kwargs.get("output_loading_info") else loaded
            _warn_if_cold(model.config, pretrained_model_name_or_path)
        return loaded

    return classmethod(from_pretrained)


def _refuse_gguf_without_layers(config: Any, kwargs: dict[str, Any]) -> None:
    pruned = isinstance(config, PreTrainedConfig) and DROPPED in vars(text_config(config))
    if kwargs.get("gguf_file") and (pruned or kwargs.get("drop_layers") is not None):
        raise ValueError(
            "drop_layers: layers cannot be left out of a GGUF file; load it whole and use "
            "hf_lnscale.drop_layers(model, layers)"
        )


def _note_what_is_on_disk(config: PreTrainedConfig, name: Any, kwargs: dict[str, Any]) -> None:
    part = vars(text_config(config))
    part.pop(ON_DISK, None)
    where = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
    try:
        saved, _ = type(config).get_config_dict(name, **{key: kwargs[key] for key in where if key in kwargs})
    except (OSError, ValueError):  # no configuration beside the weights, as for a single file
        return
    if active := active_in(saved):
        if positions := layers.positions_on_disk(config, saved):
            active = {**active, "depths": [active["depths"][position] for position in positions]}
        part[ON_DISK] = active


def active_in(saved: dict[str, Any]) -> dict[str, Any] | None:
    """The scaling in a dict read from a config.json."""
    return next((part[ACTIVE] for part in parts(saved) if part.get(ACTIVE)), None)


def _warn_if_cold(config: PreTrainedConfig, name: Any) -> None:
    change = trained_without(config)
    if change is None:
        return
    what = {
        "on": "ln_scaling was switched on for {name!r}, which was trained without it. Its layers do not expect scaled "
        "inputs: SmolLM2-135M goes from perplexity 23 to over two million this way. LayerNorm Scaling is for training: "
        "load this checkpoint without the flag, or train a model from scratch with "
        "AutoModelForCausalLM.from_config(config, ln_scaling=True).",
        "off": "ln_scaling was switched off for {name!r}, which was trained with it. Its layers expect scaled inputs: "
        "expect its outputs to be useless. To run it without hf_lnscale, fold the scale into the weights: "
        "hf_lnscale.fold_ln_scaling(model) or `hf-lnscale export`.",
        "other": "ln_scaling was changed for {name!r}, which was trained with another exponent or other depths. Expect "
        "its outputs to be wrong; leave the keyword out, or give ln_scaling=True, to use the checkpoint's own.",
    }[change]
    warn(what.format(name=str(name)))


def _from_config(original: Any) -> Any:
    @functools.wraps(original.__func__)
    def _from_config(cls: type[PreTrainedModel], config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
        if kwargs.get("drop_layers") is not None:
            config = copy.deepcopy(config)
            layers.set_drop_layers(config, kwargs["drop_layers"])
        kwargs.pop("drop_layers", None)
        if "ln_scaling" in kwargs:
            config = copy.deepcopy(config)
            # The weights are new: nothing is folded into them, whatever the configuration was taken from.
            vars(text_config(config)).pop(FOLDED, None)
            set_ln_scaling(config, kwargs.pop("ln_scaling"))
        return original.__func__(cls, config, **kwargs)

    return classmethod(_from_config)


def _load_pretrained_model(original: Any) -> Any:
    @functools.wraps(original.__func__)
    def _load_pretrained_model(
        model: PreTrainedModel,
        state_dict: dict[str, Any] | None,
        checkpoint_files: list[str] | None,
        load_config: Any,
        expected_keys: list[str] | None = None,
    ) -> Any:
        name = load_config.pretrained_model_name_or_path
        positions = None
        # `expected_keys` are given for an adapter alone, which has the numbers of the model that it is put on.
        if expected_keys is None and DROPPED in vars(text_config(model.config)):
            if name is not None:
                positions = _positions_on_disk(model, name, load_config)
            elif state_dict is not None:
                positions = layers.positions_in_state_dict(model.config, model, state_dict)
        if positions is None:
            return original.__func__(model, state_dict, checkpoint_files, load_config, expected_keys)
        with contextlib.ExitStack() as opened:
            if state_dict is None:
                state_dict = _checkpoint_tensors(checkpoint_files or [], load_config, opened)
            renamed = layers.renumber(state_dict, model, positions)
            kept = {new: state_dict[old] for old, new in renamed.items()}
            if is_deepspeed_zero3_enabled():
                # It copies whole tensors; slices are materialized for those that are kept.
                kept = {key: value[:] if hasattr(value, "get_shape") else value for key, value in kept.items()}
            # Without the files: offloading to disk would read tensors from them by their new names.
            found, offloaded = original.__func__(model, kept, None, load_config, expected_keys)
        # A tied tensor is written under one name, and read under both; of files transformers sees to that itself.
        for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
            if offloaded and source in offloaded:
                offloaded.setdefault(name, offloaded[source])
        return found, offloaded

    return staticmethod(_load_pretrained_model)


def load_distributed_hook(original: Any) -> Any:
    @functools.wraps(original)
    def _load_and_finalize_distributed_pretrained_model(self: PreTrainedModel, folder: Any, *args: Any) -> Any:
        if DROPPED in vars(text_config(self.config)):
            saved, _ = type(self.config).get_config_dict(folder)
            if layers.positions_on_disk(self.config, saved) is not None:
                raise ValueError(
                    f"drop_layers: {str(folder)!r} is a distributed checkpoint, of which no layers can be left out; "
                    "load it whole and use hf_lnscale.drop_layers(model, layers)"
                )
        return original(self, folder, *args)

    return _load_and_finalize_distributed_pretrained_model


def _positions_on_disk(model: PreTrainedModel, name: Any, load_config: Any) -> list[int] | None:
    where = ("cache_dir", "local_files_only", "proxies", "revision", "subfolder", "token")
    kwargs = {key: value for key, value in (load_config.download_kwargs or {}).items() if key in where}
    saved, _ = type(model.config).get_config_dict(name, **kwargs)
    return layers.positions_on_disk(model.config, saved)


def _checkpoint_tensors(files: list[str], load_config: Any, opened: contextlib.ExitStack) -> dict[str, Any]:
    """Every tensor of a checkpoint under its name; of safetensors files none is read yet."""
    tensors: dict[str, Any] = {}
    for file in files:
        if file.endswith(".safetensors"):
            backend = "pread" if load_config.disable_mmap or sys.platform == "win32" else "mmap"
            pointer = opened.enter_context(safe_open(file, framework="pt", device="cpu", backend=backend))
            tensors.update({name: pointer.get_slice(name) for name in pointer.keys()})  # noqa: SIM118
        else:
            tensors.update(load_state_dict(file, weights_only=load_config.weights_only))
    return tensors
