"""The table of all functions replaced in transformers, PEFT and vLLM. `enable()` installs it, `disable()` removes it.

A module that is not imported yet is hooked right after its import. This file imports only the standard library.

Each hook is a thin wrapper that, for a model without a flag, only calls the original function. If any function in a
group differs from the table, none in the group is wrapped: models without a flag work as before, and using a flag
raises an `UnsupportedTransformersError`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import inspect
import re
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

SUPPORTED = "5.16.1 to 5.24"

CONFIGURATION, MODELS = "transformers.configuration_utils", "transformers.modeling_utils"
TRAINER, PEFT, ACCELERATE = "transformers.trainer", "peft", "accelerate"
VLLM, SGLANG = "vllm.transformers_utils.config", "sglang.srt.utils.hf_transformers.config"
DISTRIBUTED, LM_EVAL = "torch.distributed.checkpoint.default_planner", "lm_eval.models.huggingface"
MERGEKIT = "mergekit.merge"
GROUPS = (CONFIGURATION, MODELS, TRAINER, PEFT, ACCELERATE, VLLM, SGLANG, DISTRIBUTED, LM_EVAL, MERGEKIT)

# The function that a hook replaces.
Original = Callable[..., Any]
# Keywords of from_pretrained, and configuration fields, that drop parts. All use layer indices from before the drop.
DROPS = ("drop_layers", "drop_attention", "drop_mlp")


@dataclass(frozen=True)
class Hook:
    """One replaced attribute."""

    group: str  # the module whose import triggers the hook
    owner: str  # the class, as `module:name`, or the module itself, as `module:`
    name: str
    # The replacement, as `module:name` in this folder, called with the original as first argument; a name that ends in
    # `_property` is called with the attribute's name and returns a property.
    replacement: str
    # Required parameters of the original, separated by spaces: all for a private function, the leading ones for a
    # public function. Empty if the hook relies on none.
    parameters: str = ""
    # The first release of transformers in which the hook is needed; in earlier ones the function may be missing.
    needed_since: str = ""
    optional: bool = False  # supported releases of another library may lack the function


_CONFIG, _MODEL = f"{CONFIGURATION}:PreTrainedConfig", f"{MODELS}:PreTrainedModel"
_PEFT_MODEL, _PEFT_CONFIG = "peft.peft_model:PeftModel", "peft.config:PeftConfigMixin"
_PEFT_MIXED = "peft.mixed_model:PeftMixedModel"

_PROPERTIES = (
    Hook(CONFIGURATION, _CONFIG, "ln_scaling", "configuration:ln_scaling_property"),
    *(Hook(CONFIGURATION, _CONFIG, name, "configuration:drop_property") for name in DROPS),
)

HOOKS = (
    *_PROPERTIES,
    # transformers assigns constructor keywords that are not fields, and the values of a dict, one by one.
    Hook(CONFIGURATION, _CONFIG, "__post_init__", "configuration:post_init", "self"),
    Hook(CONFIGURATION, _CONFIG, "update", "configuration:update", "self config_dict"),
    Hook(CONFIGURATION, _CONFIG, "from_dict", "configuration:from_dict", "cls config_dict"),
    Hook(CONFIGURATION, _CONFIG, "to_dict", "configuration:to_dict", "self"),
    Hook(CONFIGURATION, _CONFIG, "to_json_file", "configuration:to_json_file", "self json_file_path use_diff"),
    # Private: reads every config.json, before `model_type` is looked up.
    Hook(CONFIGURATION, _CONFIG, "_dict_from_json_file", "configuration:dict_from_json_file", "cls json_file"),
    Hook(CONFIGURATION, _CONFIG, "get_mtp_config", "configuration:get_mtp_config", "self"),
    Hook(MODELS, _MODEL, "__init__", "models:init", "self config"),
    Hook(MODELS, _MODEL, "post_init", "models:post_init", "self"),
    Hook(MODELS, _MODEL, "save_pretrained", "models:save_pretrained", "self save_directory"),
    Hook(MODELS, _MODEL, "from_pretrained", "models:from_pretrained", "cls pretrained_model_name_or_path"),
    # Private: every `AutoModel.from_config` calls it; unknown keywords would be passed to the model's `__init__`.
    Hook(MODELS, _MODEL, "_from_config", "models:from_config", "cls config kwargs"),
    # Private: the last function called while tensor names are known and no tensor has been read. The public
    # `key_mapping` is stored with the model and reverted on saving: old layer indices with a config of fewer layers.
    Hook(
        MODELS, _MODEL, "_load_pretrained_model", "models:load_pretrained_model",
        "model state_dict checkpoint_files load_config expected_keys",
    ),
    # A module-level function: the only one that writes a model's safetensors files and their metadata.
    Hook(MODELS, f"{MODELS}:", "safe_save_file", "saving:save_file", "tensors filename"),
    # torch.distributed.checkpoint imports it for each safetensors file: `save_pretrained(distributed_checkpoint=True)`.
    Hook(MODELS, "safetensors.torch:", "save", "saving:save_file", "tensors metadata"),
    # Private: loads torch.distributed.checkpoint checkpoints by tensor name, bypassing `_load_pretrained_model`. Before
    # 5.20, from_pretrained does not support such checkpoints.
    Hook(
        MODELS, _MODEL, "_load_and_finalize_distributed_pretrained_model", "models:load_distributed",
        "self distributed_checkpoint_dir device_map device_mesh", needed_since="5.20",
    ),
    # Private to torch: every load_state_dict calls it, including on a module that wraps the model.
    Hook(
        MODELS, _MODEL, "_load_from_state_dict", "readers:load_from_state_dict",
        "self state_dict prefix local_metadata strict missing_keys unexpected_keys error_msgs",
    ),
    Hook(
        MODELS, _MODEL, "_save_to_state_dict", "readers:save_to_state_dict", "self destination prefix keep_vars"
    ),
    Hook(
        MODELS, "torch.optim.swa_utils:AveragedModel", "update_parameters", "readers:update_parameters", "self model"
    ),
    Hook(
        MODELS, "transformers.integrations.peft:PeftAdapterMixin", "load_adapter", "peft:load_adapter_into_model",
        "self peft_model_id",
    ),
    Hook(TRAINER, f"{TRAINER}:Trainer", "train", "trainer:train", "self resume_from_checkpoint"),
    Hook(TRAINER, f"{TRAINER}:Trainer", "save_model", "trainer:save_model", "self output_dir"),
    Hook(PEFT, _PEFT_CONFIG, "from_json_file", "peft:from_json_file", "cls path_json_file"),
    Hook(PEFT, _PEFT_CONFIG, "save_pretrained", "peft:save_adapter_config", "self save_directory"),
    Hook(PEFT, _PEFT_MODEL, "save_pretrained", "peft:save_adapter", "self save_directory"),
    Hook(PEFT, _PEFT_MODEL, "from_pretrained", "peft:own_base_only", "cls model model_id"),
    Hook(PEFT, _PEFT_MODEL, "load_adapter", "peft:own_base_only", "self model_id"),
    Hook(PEFT, _PEFT_MIXED, "from_pretrained", "peft:own_base_only", "cls model model_id"),
    Hook(PEFT, _PEFT_MIXED, "load_adapter", "peft:own_base_only", "self model_id"),
    Hook(PEFT, "peft.utils.hotswap:", "hotswap_adapter", "peft:own_base_only", "model model_name_or_path"),
    Hook(
        PEFT, "peft.utils.hotswap:", "hotswap_adapter_from_state_dict", "peft:hotswap_from_state_dict",
        "model state_dict adapter_name config",
    ),
    # Private: X-LoRA loads each of its experts with it.
    Hook(
        PEFT, "peft.tuners.xlora.model:", "_load_adapter_into_lora_model", "peft:own_base_only",
        "lora_model adapter_name model_id torch_device ephemeral_gpu_offload autocast_adapter_dtype subfolder kwargs",
    ),
    # Shared by AutoPeftModelForCausalLM and similar classes: the only function that loads the base by its path.
    Hook(
        PEFT, "peft.auto:_BaseAutoPeftModel", "from_pretrained", "peft:auto_adapter",
        "cls pretrained_model_name_or_path",
    ),
    # Reads adapters without a base. PEFT itself imports it by name.
    *(
        Hook(PEFT, f"{module}:", "compose_cartridge_adapters", "peft:compose_cartridges", "adapter_paths")
        for module in ("peft", "peft.tuners.cartridge.utils")
    ),
    Hook(PEFT, "peft.tuners.lora.model:", "replicate_layers", "readers:replicate_layers", "model layer_map"),
    # Private: LoftQ uses it to read the base's weights by their names in memory.
    Hook(
        PEFT, "peft.utils.loftq_utils:_SafetensorLoader", "__init__", "readers:init_loftq_loader",
        "self peft_model model_path",
    ),
    # Several modules of PEFT import it by name. New in PEFT 0.21.
    *(
        Hook(
            PEFT, f"{module}:", "set_base_model_state_dict", "readers:set_base_state", "model state_dict",
            optional=True,
        )
        for module in ("peft", "peft.utils", "peft.utils.save_and_load")
    ),
    # The state of a custom training loop has no configuration.
    Hook(ACCELERATE, "accelerate.accelerator:Accelerator", "save_state", "early:save_state", "self output_dir"),
    Hook(ACCELERATE, "accelerate.accelerator:Accelerator", "load_state", "early:load_state", "self input_dir"),
    # Write weights without a configuration, in a dict without the metadata of a `state_dict()`.
    Hook(ACCELERATE, "accelerate.accelerator:Accelerator", "save_model", "early:save_model", "self model"),
    # Private: `merge_fsdp_weights`, which several modules import by name, calls it.
    Hook(
        ACCELERATE, "accelerate.utils.fsdp_utils:", "_distributed_checkpoint_to_merged_weights", "early:merge_weights",
        "checkpoint_dir save_path safe_serialization",
    ),
    *(
        Hook(ACCELERATE, f"{module}:", "save", "early:save_weights", "obj f")
        for module in ("accelerate.accelerator", "accelerate.utils.fsdp_utils")
    ),
    Hook(ACCELERATE, "accelerate.utils.other:", "safe_save_file", "early:save_file", "tensors filename"),
    # Several modules of accelerate import the function by name.
    *(
        Hook(ACCELERATE, f"{module}:", "load_checkpoint_in_model", "early:load_checkpoint_in_model", "model checkpoint")
        for module in (
            "accelerate", "accelerate.big_modeling", "accelerate.utils", "accelerate.utils.bnb",
            "accelerate.utils.modeling",
        )
    ),
    # Plan every save and load of torch.distributed.checkpoint.
    Hook(
        DISTRIBUTED, f"{DISTRIBUTED}:DefaultSavePlanner", "create_global_plan", "early:create_global_plan",
        "self all_plans",
    ),
    Hook(
        DISTRIBUTED, f"{DISTRIBUTED}:DefaultLoadPlanner", "set_up_planner", "early:set_up_planner",
        "self state_dict metadata",
    ),
    # Private: the only function that receives the names of both checkpoints. The hook reads its parameters by name.
    Hook(LM_EVAL, f"{LM_EVAL}:HFLM", "_create_model", "early:create_model"),
    # Merges the tensors of checkpoints by name, and writes the configuration of one of them.
    Hook(MERGEKIT, f"{MERGEKIT}:", "run_merge", "early:run_merge", "merge_config out_path options"),
    # vLLM selects a model class by `architectures`, from which the hooks above remove serving/vllm.py's prefix.
    Hook(VLLM, f"{VLLM}:HFConfigParser", "parse", "vllm:parse", "self model"),
    # SGLang reads the weights itself.
    Hook(SGLANG, f"{SGLANG}:", "get_config", "guard:refuse_to_serve", "model"),
)  # fmt: skip

# Installed instead of a group that differs from the table, to refuse flags. The properties refuse them on their own.
GUARDS = (
    *_PROPERTIES,
    Hook(CONFIGURATION, _CONFIG, "get_config_dict", "guard:refuse_scaled_file"),
    Hook(MODELS, _MODEL, "__init__", "guard:refuse"),
    Hook(MODELS, _MODEL, "from_pretrained", "guard:refuse"),
    Hook(MODELS, _MODEL, "_from_config", "guard:refuse"),
    Hook(TRAINER, f"{TRAINER}:Trainer", "__init__", "guard:refuse"),
    Hook(PEFT, _PEFT_MODEL, "__init__", "guard:refuse"),
    Hook(ACCELERATE, "accelerate.big_modeling:", "load_checkpoint_in_model", "guard:refuse"),
    Hook(VLLM, _CONFIG, "get_config_dict", "guard:refuse_scaled_file"),
    Hook(SGLANG, _CONFIG, "get_config_dict", "guard:refuse_scaled_file"),
)

_MISSING = object()


class _Installed(NamedTuple):
    original: Any  # _MISSING if the class itself did not define the attribute
    hook: Any


_lock = threading.RLock()
_enabled = False
_installed: dict[tuple[Any, str], _Installed] = {}
_waiting: set[str] = set()  # groups not imported yet
problems: dict[str, list[str]] = {}  # group: differences from the table


def enable() -> None:
    """Enables the flags in transformers. Importing `hf_lnscale` calls it; repeated calls have no effect."""
    global _enabled
    with _lock:
        if _enabled:
            return
        _enabled = True
        _waiting.update(GROUPS)
        sys.meta_path.insert(0, _finder)
    for group in GROUPS:
        if sys.modules.get(group) is not None:
            importlib.import_module(group)  # waits if another thread is importing it
    _install_what_is_imported()


def disable() -> None:
    """Restores the original functions.

    Scaled models in memory stay scaled. Save or fold them first: without the plugin, `save_pretrained` writes an
    unprotected `config.json`.

    Raises:
        RuntimeError: if another library has since replaced one of the functions; nothing is changed in that case.
    """
    global _enabled
    with _lock:
        for (owner, name), (_, hook) in _installed.items():
            if (current := owner.__dict__.get(name)) is not hook:
                raise RuntimeError(
                    f"{owner.__name__}.{name} was replaced after hf_lnscale.enable(), by "
                    f"{getattr(current, '__module__', 'another library')}; undo that first"
                )
        for (owner, name), (original, _) in _installed.items():
            if original is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
        _installed.clear()
        _waiting.clear()
        problems.clear()
        if _finder in sys.meta_path:
            sys.meta_path.remove(_finder)
        _enabled = False


def is_enabled() -> bool:
    """Whether the flags are enabled in this process, or will be once transformers is imported."""
    return _enabled


# --- after an import ------------------------------------------------------------------------------------------------


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules to hook as usual, but with a loader that hooks them once they are loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in GROUPS:
            # Hook modules whose import had begun before this finder was installed. Not during the search for a module
            # of this package: installing hooks may import that very module, which would then be executed twice.
            if name.partition(".")[0] != _PACKAGE:
                _install_what_is_imported()
            return None
        others = (finder for finder in list(sys.meta_path) if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:  # get_source, get_filename and others that work without an import
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        if _enabled:
            _waiting.discard(module.__name__)
            _install(module.__name__)


_finder = _Finder()
_PACKAGE = __name__.partition(".")[0]


def _install_what_is_imported() -> None:
    for group in GROUPS:
        module = sys.modules.get(group)
        if group in _waiting and module is not None:
            if _initializing(group):
                continue
            _waiting.discard(group)
            _install(group)


def _initializing(name: str) -> bool:
    """Whether a module is currently being imported."""
    return bool(getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False))


def _importing_this_package() -> bool:
    return any(_initializing(name) for name in list(sys.modules) if name.startswith(f"{_PACKAGE}."))


def _install(group: str) -> None:
    """Hooks the classes of a group, or only refuses flags there if anything differs from the table.

    If a module of this package is importing transformers and a replacement needs that module, the group waits for the
    next import.
    """
    try:
        made, found = _made(HOOKS, group)
    except (ImportError, AttributeError):
        if not _importing_this_package():
            raise
        _waiting.add(group)
        return
    if found:
        problems[group] = found
        made, _ = _made(GUARDS, group)
    # Import nothing while holding the lock: another thread could hold the import lock and wait for this one.
    with _lock:
        for (owner, name), hook in made.items():
            _installed[owner, name] = _Installed(_unhooked(owner.__dict__.get(name, _MISSING)), hook)
            setattr(owner, name, hook)


def _made(table: Sequence[Hook], group: str) -> tuple[dict[tuple[Any, str], Any], list[str]]:
    """The replacements for a group, and its differences from the table."""
    made: dict[tuple[Any, str], Any] = {}
    found: list[str] = []
    for hook in table:
        if hook.group != group:
            continue
        module, _, cls = hook.owner.partition(":")
        try:
            owner: Any = importlib.import_module(module)
            owner = getattr(owner, cls) if cls else owner
            file, _, factory = hook.replacement.partition(":")
            replacement = getattr(importlib.import_module(f".{file}", __package__), factory)
        except (ImportError, AttributeError) as error:
            if _importing_this_package():
                raise
            found.append(str(error))
            continue
        if (owner, hook.name) in _installed and owner.__dict__[hook.name] is _installed[owner, hook.name].hook:
            continue  # the module was reloaded with the same class
        if factory.endswith("_property"):
            made[owner, hook.name] = replacement(hook.name)
            continue
        original = _unhooked(inspect.getattr_static(owner, hook.name, None))
        if original is None:
            release = sys.modules["transformers"].__version__
            if not hook.optional and _numbers(release) >= _numbers(hook.needed_since):
                found.append(f"{cls or module}.{hook.name} is missing")
            continue
        kind = type(original) if isinstance(original, (classmethod, staticmethod)) else None
        function: Callable[..., Any] = original.__func__ if kind else original
        given, known = list(inspect.signature(function).parameters), hook.parameters.split()
        private = hook.name.startswith("_") and not hook.name.startswith("__")
        if known and (given if private else given[: len(known)]) != known:
            found.append(f"{cls or module}.{hook.name} has the parameters {', '.join(given)}, not {', '.join(known)}")
            continue
        wrapper = _wrapper(function, replacement)
        made[owner, hook.name] = kind(wrapper) if kind else wrapper
    return made, found


def _unhooked(value: Any) -> Any:
    """The original of a function that was hooked in one module before another imported it by name."""
    return next((installed.original for installed in _installed.values() if installed.hook is value), value)


def _wrapper(original: Original, replacement: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    return wrapper


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", release)[:3])


def require_supported(*groups: str) -> None:
    """Refuses the flags if a hook that they need could not be installed.

    Raises:
        UnsupportedTransformersError: names the release, what is missing and the supported releases.
    """
    _install_what_is_imported()
    found = [problem for group in groups or (CONFIGURATION, MODELS) for problem in problems.get(group, ())]
    if not found:
        return
    from ..core.errors import UnsupportedTransformersError

    packages = ("transformers", "peft", "vllm", "sglang")
    versions = [f"{name} {sys.modules[name].__version__}" for name in packages if name in sys.modules]
    raise UnsupportedTransformersError(
        f"ln_scaling and drop_layers do not work with {' and '.join(versions)}: {'; '.join(found)}. Supported releases "
        f"of transformers: {SUPPORTED}. Models that use neither are not affected."
    )
