"""The only file that touches the inside of transformers and PEFT: what `enable()` puts in, and `disable()` takes out.

Every hook is a thin wrapper around the function that was there, and does nothing for a model without a scale.
tests/test_hooks.py fails, by name, when a hooked function changes its signature or its role.
"""

from __future__ import annotations

import threading
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, Trainer
from transformers.integrations.peft import PeftAdapterMixin
from transformers.utils import is_peft_available

from ..core.record import get_ln_scaling, set_ln_scaling
from ..pruning import layers
from .configuration import _dict_from_json_file, from_dict_hook, to_json_file_hook
from .models import (
    _from_config,
    _load_pretrained_model,
    from_pretrained_hook,
    load_distributed_hook,
    post_init_hook,
    save_pretrained_hook,
)
from .peft import (
    adapter_from_pretrained_hook,
    auto_adapter_hook,
    from_json_file_hook,
    load_adapter_hook,
    load_adapter_into_model_hook,
    save_adapter_config_hook,
    save_adapter_hook,
)
from .trainer import train_hook

_MISSING = object()
_lock = threading.RLock()
_originals: dict[tuple[type, str], Any] = {}
_installed: dict[tuple[type, str], Any] = {}


def _hooks() -> dict[tuple[type, str], Any]:
    """Each attribute that is replaced, with its replacement."""
    return {
        (PreTrainedConfig, "ln_scaling"): property(
            get_ln_scaling, set_ln_scaling, doc="LayerNorm Scaling of the text decoder, or None."
        ),
        (PreTrainedConfig, "drop_layers"): property(
            lambda config: None,
            layers.set_drop_layers,
            doc="Assigned, drops layers from the configuration. `dropped_layers` says which are gone.",
        ),
        (PreTrainedConfig, "from_dict"): from_dict_hook(PreTrainedConfig.__dict__["from_dict"]),
        (PreTrainedConfig, "to_json_file"): to_json_file_hook(PreTrainedConfig.__dict__["to_json_file"]),
        # Private: the one place through which every reading of a config.json goes, before `model_type` is looked at.
        (PreTrainedConfig, "_dict_from_json_file"): _dict_from_json_file(
            PreTrainedConfig.__dict__["_dict_from_json_file"]
        ),
        (PreTrainedModel, "post_init"): post_init_hook(PreTrainedModel.__dict__["post_init"]),
        (PreTrainedModel, "save_pretrained"): save_pretrained_hook(PreTrainedModel.__dict__["save_pretrained"]),
        (PreTrainedModel, "from_pretrained"): from_pretrained_hook(PreTrainedModel.__dict__["from_pretrained"]),
        # Private: what every `AutoModel.from_config` calls; unknown keywords would go on to the model's `__init__`.
        (PreTrainedModel, "_from_config"): _from_config(PreTrainedModel.__dict__["_from_config"]),
        # Private: the last place where the names of a checkpoint's tensors are known and none has been read. The public
        # `key_mapping` is kept with the model and reverted on saving: old numbers beside a config with fewer layers.
        (PreTrainedModel, "_load_pretrained_model"): _load_pretrained_model(
            PreTrainedModel.__dict__["_load_pretrained_model"]
        ),
        # Private: reads a checkpoint of torch.distributed.checkpoint by names, past the function above.
        (PreTrainedModel, "_load_and_finalize_distributed_pretrained_model"): load_distributed_hook(
            PreTrainedModel._load_and_finalize_distributed_pretrained_model
        ),
        (PeftAdapterMixin, "load_adapter"): load_adapter_into_model_hook(PeftAdapterMixin.__dict__["load_adapter"]),
        (Trainer, "train"): train_hook(Trainer.__dict__["train"]),
    }


def _peft_hooks() -> dict[tuple[type, str], Any]:
    """The same for PEFT. Where it is installed, transformers' Trainer has imported it already."""
    from peft import PeftModel
    from peft.auto import _BaseAutoPeftModel
    from peft.config import PeftConfigMixin

    return {
        (PeftConfigMixin, "from_json_file"): from_json_file_hook(PeftConfigMixin.__dict__["from_json_file"]),
        (PeftConfigMixin, "save_pretrained"): save_adapter_config_hook(PeftConfigMixin.__dict__["save_pretrained"]),
        (PeftModel, "save_pretrained"): save_adapter_hook(PeftModel.__dict__["save_pretrained"]),
        (PeftModel, "from_pretrained"): adapter_from_pretrained_hook(PeftModel.__dict__["from_pretrained"]),
        (PeftModel, "load_adapter"): load_adapter_hook(PeftModel.__dict__["load_adapter"]),
        # Private: what AutoPeftModelForCausalLM and its sisters share, the one place that loads the base by its path.
        (_BaseAutoPeftModel, "from_pretrained"): auto_adapter_hook(_BaseAutoPeftModel.__dict__["from_pretrained"]),
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
