"""The only file that touches the inside of transformers and PEFT: what `enable()` puts in, and `disable()` takes out.

Every hook is a thin wrapper around the function that was there, and does nothing for a model without a scale.
tests/test_hooks.py fails, by name, when a hooked function changes its signature or its role.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import os
import sys
import threading
import warnings
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel, Trainer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.peft import PeftAdapterMixin
from transformers.modeling_utils import load_state_dict
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import ADAPTER_CONFIG_NAME, find_adapter_config_file, is_peft_available

from . import adapters, scaling
from ._warnings import warn
from .checkpoint import parts, protect, unprotect
from .depth import layers

_MISSING = object()
_lock = threading.RLock()
_originals: dict[tuple[type, str], Any] = {}
_installed: dict[tuple[type, str], Any] = {}


def _hooks() -> dict[tuple[type, str], Any]:
    """Each attribute that is replaced, with its replacement."""
    return {
        (PreTrainedConfig, "ln_scaling"): property(
            scaling.get_ln_scaling, scaling.set_ln_scaling, doc="LayerNorm Scaling of the text decoder, or None."
        ),
        (PreTrainedConfig, "drop_layers"): property(
            lambda config: None,
            layers.set_drop_layers,
            doc="Assigned, drops layers from the configuration. `dropped_layers` says which are gone.",
        ),
        (PreTrainedConfig, "from_dict"): _from_dict(PreTrainedConfig.__dict__["from_dict"]),
        (PreTrainedConfig, "to_json_file"): _to_json_file(PreTrainedConfig.__dict__["to_json_file"]),
        # Private: the one place through which every reading of a config.json goes, before `model_type` is looked at.
        (PreTrainedConfig, "_dict_from_json_file"): _dict_from_json_file(
            PreTrainedConfig.__dict__["_dict_from_json_file"]
        ),
        (PreTrainedModel, "post_init"): _post_init(PreTrainedModel.__dict__["post_init"]),
        (PreTrainedModel, "save_pretrained"): _save_pretrained(PreTrainedModel.__dict__["save_pretrained"]),
        (PreTrainedModel, "from_pretrained"): _from_pretrained(PreTrainedModel.__dict__["from_pretrained"]),
        # Private: what every `AutoModel.from_config` calls; unknown keywords would go on to the model's `__init__`.
        (PreTrainedModel, "_from_config"): _from_config(PreTrainedModel.__dict__["_from_config"]),
        # Private: the last place where the names of a checkpoint's tensors are known and none has been read. The public
        # `key_mapping` is kept with the model and reverted on saving: old numbers beside a config with fewer layers.
        (PreTrainedModel, "_load_pretrained_model"): _load_pretrained_model(
            PreTrainedModel.__dict__["_load_pretrained_model"]
        ),
        # Private: reads a checkpoint of torch.distributed.checkpoint by names, past the function above.
        (PreTrainedModel, "_load_and_finalize_distributed_pretrained_model"): _load_distributed(
            PreTrainedModel._load_and_finalize_distributed_pretrained_model
        ),
        (PeftAdapterMixin, "load_adapter"): _load_adapter_into_model(PeftAdapterMixin.__dict__["load_adapter"]),
        (Trainer, "train"): _train(Trainer.__dict__["train"]),
    }


def _peft_hooks() -> dict[tuple[type, str], Any]:
    """The same for PEFT. Where it is installed, transformers' Trainer has imported it already."""
    from peft import PeftModel
    from peft.auto import _BaseAutoPeftModel
    from peft.config import PeftConfigMixin

    return {
        (PeftConfigMixin, "from_json_file"): _from_json_file(PeftConfigMixin.__dict__["from_json_file"]),
        (PeftConfigMixin, "save_pretrained"): _save_adapter_config(PeftConfigMixin.__dict__["save_pretrained"]),
        (PeftModel, "save_pretrained"): _save_adapter(PeftModel.__dict__["save_pretrained"]),
        (PeftModel, "from_pretrained"): _adapter_from_pretrained(PeftModel.__dict__["from_pretrained"]),
        (PeftModel, "load_adapter"): _load_adapter(PeftModel.__dict__["load_adapter"]),
        # Private: what AutoPeftModelForCausalLM and its sisters share, the one place that loads the base by its path.
        (_BaseAutoPeftModel, "from_pretrained"): _auto_adapter(_BaseAutoPeftModel.__dict__["from_pretrained"]),
    }


def enable() -> None:
    """Makes transformers understand `ln_scaling`. Importing `hf_lnscale` calls it; a second call changes nothing."""
    with _lock:
        if _installed:
            return
        _install(_hooks())
        if is_peft_available():
            _install(_peft_hooks())


def _install(hooks: dict[tuple[type, str], Any]) -> None:
    for (owner, name), hook in hooks.items():
        _originals[owner, name] = owner.__dict__.get(name, _MISSING)
        _installed[owner, name] = hook
        setattr(owner, name, hook)


def disable() -> None:
    """Puts back exactly the functions that were there.

    Models that are scaled stay scaled in memory; save or fold them before: without the plugin, `save_pretrained`
    writes an unprotected `config.json`.

    Raises:
        RuntimeError: if another library has since replaced one of the functions; nothing is changed then.
    """
    with _lock:
        for (owner, name), hook in _installed.items():
            if owner.__dict__.get(name) is not hook:
                raise RuntimeError(
                    f"{owner.__name__}.{name} was replaced after hf_lnscale.enable(), by "
                    f"{getattr(owner.__dict__.get(name), '__module__', 'another library')}; undo that first"
                )
        for (owner, name), original in _originals.items():
            if original is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
        _installed.clear()
        _originals.clear()


def is_enabled() -> bool:
    """Whether transformers understands `ln_scaling` in this process."""
    return bool(_installed)


# --- the hooks --------------------------------------------------------------------------------------


def _from_dict(original: Any) -> Any:
    @functools.wraps(original.__func__)
    def from_dict(
        cls: type[PreTrainedConfig],
        config_dict: dict[str, Any],
        ln_scaling: Any = None,
        drop_layers: Any = None,
        **kwargs: Any,
    ) -> Any:
        made = original.__func__(cls, config_dict, **kwargs)
        # After every other keyword: what is valid depends on the number of layers.
        config = made[0] if isinstance(made, tuple) else made
        layers.set_drop_layers(config, drop_layers)
        scaling.set_ln_scaling(config, ln_scaling)
        return made

    return classmethod(from_dict)


def _to_json_file(original: Any) -> Any:
    @functools.wraps(original)
    def to_json_file(self: PreTrainedConfig, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        if not any(part.get(scaling.ACTIVE) or scaling.ON_DISK in part for part in parts(self.to_dict())):
            return original(self, json_file_path, use_diff=use_diff)
        config = protect(json.loads(self.to_json_string(use_diff=use_diff)))
        with open(json_file_path, "w", encoding="utf-8") as file:
            file.write(json.dumps(config, indent=2, sort_keys=True) + "\n")

    return to_json_file


def _dict_from_json_file(original: Any) -> Any:
    @functools.wraps(original.__func__)
    def _dict_from_json_file(cls: type[PreTrainedConfig], json_file: str | os.PathLike) -> dict[str, Any]:
        return unprotect(original.__func__(cls, json_file))

    return classmethod(_dict_from_json_file)


def _post_init(original: Any) -> Any:
    @functools.wraps(original)
    def post_init(self: PreTrainedModel) -> None:
        original(self)
        scaling.apply_from_config(self)

    return post_init


def _save_pretrained(original: Any) -> Any:
    @functools.wraps(original)
    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        scaling.require_consistent(self)
        with _noting(self.config):  # it may hold adapters, which are then what is saved
            return original(self, *args, **kwargs)

    return save_pretrained


def _from_pretrained(original: Any) -> Any:
    @functools.wraps(original.__func__)
    def from_pretrained(
        cls: type[PreTrainedModel],
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        config: Any = None,
        **kwargs: Any,
    ) -> Any:
        adapter = _adapter_to_load(pretrained_model_name_or_path, kwargs)
        if adapter is not None:
            given = config if isinstance(config, PreTrainedConfig) else None
            kwargs = {**adapters.keywords(adapter, given), **kwargs}
        if isinstance(config, PreTrainedConfig):
            config = copy.deepcopy(config)
            # With a configuration object, keywords would go on to the model's `__init__`.
            layers.set_drop_layers(config, kwargs.pop("drop_layers", None))
            scaling.set_ln_scaling(config, kwargs.pop("ln_scaling", None))
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
    pruned = isinstance(config, PreTrainedConfig) and scaling.DROPPED in vars(scaling.text_config(config))
    if kwargs.get("gguf_file") and (pruned or kwargs.get("drop_layers") is not None):
        raise ValueError(
            "drop_layers: layers cannot be left out of a GGUF file; load it whole and use "
            "hf_lnscale.drop_layers(model, layers)"
        )


def _note_what_is_on_disk(config: PreTrainedConfig, name: Any, kwargs: dict[str, Any]) -> None:
    part = vars(scaling.text_config(config))
    part.pop(scaling.ON_DISK, None)
    where = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
    try:
        saved, _ = type(config).get_config_dict(name, **{key: kwargs[key] for key in where if key in kwargs})
    except (OSError, ValueError):  # no configuration beside the weights, as for a single file
        return
    if active := _active(saved):
        if positions := layers.positions_on_disk(config, saved):
            active = {**active, "depths": [active["depths"][position] for position in positions]}
        part[scaling.ON_DISK] = active


def _active(saved: dict[str, Any]) -> dict[str, Any] | None:
    """The scaling in a dict read from a config.json."""
    return next((part[scaling.ACTIVE] for part in parts(saved) if part.get(scaling.ACTIVE)), None)


def _warn_if_cold(config: PreTrainedConfig, name: Any) -> None:
    change = scaling.trained_without(config)
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
            vars(scaling.text_config(config)).pop(scaling.FOLDED, None)
            scaling.set_ln_scaling(config, kwargs.pop("ln_scaling"))
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
        if expected_keys is None and scaling.DROPPED in vars(scaling.text_config(model.config)):
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


def _load_distributed(original: Any) -> Any:
    @functools.wraps(original)
    def _load_and_finalize_distributed_pretrained_model(self: PreTrainedModel, folder: Any, *args: Any) -> Any:
        if scaling.DROPPED in vars(scaling.text_config(self.config)):
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


def _train(original: Any) -> Any:
    @functools.wraps(original)
    def train(self: Trainer, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        # Trainer loads the weights of a checkpoint without a look at its configuration.
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        config = getattr(self.model, "config", None)
        if folder and isinstance(config, PreTrainedConfig):
            has_config = os.path.isfile(os.path.join(folder, "config.json"))  # not of an adapter, nor sharded
            step = _require_same_model(config, str(folder)) if has_config else _recorded_step(config, Path(folder))
            if step is not None and self.model is not None:  # the weights that are loaded next belong to it
                scaling.set_ln_scaling_step(self.model, step)
            if not has_config:
                _require_base(folder, {}, self.model)
        _require_led_warmup(self, config)
        return original(self, resume_from_checkpoint, *args, **kwargs)

    return train


def _recorded_step(config: PreTrainedConfig, folder: Path) -> int | None:
    """The step of a warmup that was saved with the state of the Trainer, if the model has a warmup."""
    from .training.warmup import recorded_scaling

    own, state = scaling.LNScalingConfig.of(scaling.get_ln_scaling(config)), folder / "trainer_state.json"
    if own is None or not own.warmup_steps or not state.is_file():
        return None
    recorded = recorded_scaling(json.loads(state.read_text(encoding="utf-8")).get("stateful_callbacks") or {})
    return recorded.step if recorded else None


def _require_led_warmup(trainer: Trainer, config: Any) -> None:
    scale = scaling.LNScalingConfig.of(scaling.get_ln_scaling(config)) if isinstance(config, PreTrainedConfig) else None
    if scale is None or not scale.warming_up:
        return
    from .training.warmup import LNScalingWarmupCallback

    if not any(isinstance(callback, LNScalingWarmupCallback) for callback in trainer.callback_handler.callbacks):
        held = scaling.LNScalingConfig(scale.exponent_now, scale.depths).to_dict()
        raise ValueError(
            f"the warmup of the model's ln_scaling stands at step {scale.step} of {scale.warmup_steps}, and nothing in "
            "this Trainer moves it. Add LNScalingWarmupCallback(), from hf_lnscale.training, to its callbacks, or keep "
            f"it where it is: hf_lnscale.apply_ln_scaling(model, {held})"
        )


def _require_same_model(config: PreTrainedConfig, folder: str) -> int | None:
    """The step of a warmup that the checkpoint stands at, if the model has the same one."""
    saved, _ = type(config).get_config_dict(folder)
    both = (type(config).from_dict(dict(saved)), config)
    if any(scaling.DROPPED in vars(scaling.text_config(one)) for one in both):  # others need not count their layers
        there, here = map(layers.original_layers, both)
        if there != here:
            raise ValueError(
                f"resume_from_checkpoint={folder!r} was trained with layers {there[0]} of {there[1]}, the model has "
                f"layers {here[0]} of {here[1]}; load the model with the same drop_layers to resume"
            )
    active = _active(saved)
    resumed = copy.deepcopy(config)
    vars(scaling.text_config(resumed))[scaling.ON_DISK] = active
    own, trained = (scaling.LNScalingConfig.of(one) for one in (scaling.get_ln_scaling(config), active))
    if own and trained and trained.warmup_steps and own == dataclasses.replace(trained, step=own.step):
        return trained.step
    warming_up = any(one and one.warming_up for one in (own, trained))
    if warming_up or scaling.trained_without(resumed) is not None:
        raise ValueError(
            f"resume_from_checkpoint={folder!r} was trained with ln_scaling={active}, the model has "
            f"ln_scaling={scaling.get_ln_scaling(config)}; build the model with the same ln_scaling to resume"
        )
    return None


# --- adapters ---------------------------------------------------------------------------------------

# Of the model whose adapter is being saved.
_base: ContextVar[PreTrainedConfig | None] = ContextVar("_base", default=None)


@contextlib.contextmanager
def _noting(base: PreTrainedConfig | None) -> Any:
    token = _base.set(base)
    try:
        yield
    finally:
        _base.reset(token)


def _read_adapter(name: Any, where: dict[str, Any]) -> dict[str, Any] | None:
    """The dict of an adapter's adapter_config.json, or None if there is none."""
    known = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
    where = {key: where[key] for key in known if where.get(key) is not None}
    file = find_adapter_config_file(os.fspath(name), **where)
    return adapters.without_tripwire(json.loads(Path(file).read_text(encoding="utf-8"))) if file else None


def _adapter_to_load(name: Any, kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The adapter that `from_pretrained` is going to put on the base it loads."""
    given = kwargs.get("adapter_kwargs") or {}
    if (found := given.get("_adapter_model_path")) is not None:  # AutoModel has looked
        return _read_adapter(found, {**kwargs, **given})
    # On the Hub, looking would cost every model a request; `load_adapter` will look there, and refuse.
    folder = isinstance(name, (str, os.PathLike)) and os.path.isdir(name)
    return _read_adapter(name, {"subfolder": kwargs.get("subfolder")}) if folder else None


def _require_base(name: Any, where: dict[str, Any], model: Any) -> None:
    """Refuses to put an adapter on another base than its own."""
    adapter = _read_adapter(name, where)
    if adapter is not None:
        base = next((part.config for part in model.modules() if isinstance(part, PreTrainedModel)), None)
        adapters.require_base(adapter, os.fspath(name), base)


def _load_adapter_into_model(original: Any) -> Any:
    @functools.wraps(original)
    def load_adapter(self: PreTrainedModel, peft_model_id: Any = None, *args: Any, **kwargs: Any) -> Any:
        load_config = kwargs.get("load_config")
        name = peft_model_id or getattr(load_config, "pretrained_model_name_or_path", None)
        if name is not None:
            where = getattr(load_config, "download_kwargs", None) or {}
            _require_base(name, {**where, **kwargs, **(kwargs.get("adapter_kwargs") or {})}, self)
        return original(self, peft_model_id, *args, **kwargs)

    return load_adapter


def _from_json_file(original: Any) -> Any:
    @functools.wraps(original.__func__)
    def from_json_file(cls: type, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        return adapters.without_tripwire(original.__func__(cls, path_json_file, **kwargs))

    return classmethod(from_json_file)


def _save_adapter_config(original: Any) -> Any:
    @functools.wraps(original)
    def save_pretrained(self: Any, save_directory: str, **kwargs: Any) -> None:
        original(self, save_directory, **kwargs)
        if (base := _base.get()) is not None:
            adapters.add_note(Path(save_directory) / ADAPTER_CONFIG_NAME, base)

    return save_pretrained


def _save_adapter(original: Any) -> Any:
    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> None:
        scaling.require_consistent(self)
        base = next((part.config for part in self.modules() if isinstance(part, PreTrainedModel)), None)
        with _noting(base):
            original(self, *args, **kwargs)

    return save_pretrained


def _adapter_from_pretrained(original: Any) -> Any:
    @functools.wraps(original.__func__)
    def from_pretrained(cls: type, model: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        _require_base(model_id, kwargs, model)  # before the model is changed
        return original.__func__(cls, model, model_id, *args, **kwargs)

    return classmethod(from_pretrained)


def _load_adapter(original: Any) -> Any:
    @functools.wraps(original)
    def load_adapter(self: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        _require_base(model_id, kwargs, self)
        return original(self, model_id, *args, **kwargs)

    return load_adapter


def _auto_adapter(original: Any) -> Any:
    @functools.wraps(original.__func__)
    def from_pretrained(cls: type, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        adapter = _read_adapter(pretrained_model_name_or_path, kwargs)
        with warnings.catch_warnings():
            if adapter is not None and (found := adapters.keywords(adapter)):
                kwargs = {**found, **kwargs}
                # Not cold: that is how the adapter was trained.
                warnings.filterwarnings("ignore", message="ln_scaling was")
            return original.__func__(cls, pretrained_model_name_or_path, *args, **kwargs)

    return classmethod(from_pretrained)
