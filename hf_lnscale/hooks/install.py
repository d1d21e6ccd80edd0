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
import inspect
import re
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

SUPPORTED = "5.16.1 to 5.24"

CONFIGURATION, MODELS = "transformers.configuration_utils", "transformers.modeling_utils"
TRAINER, PEFT, ACCELERATE = "transformers.trainer", "peft", "accelerate"
VLLM, SGLANG = "vllm.transformers_utils.config", "sglang.srt.utils.hf_transformers.config"
DISTRIBUTED, LM_EVAL = "torch.distributed.checkpoint.default_planner", "lm_eval.models.huggingface"
MERGEKIT = "mergekit.merge"
# transformers imports two of them in the midst of its own import, so their hooks import nothing until they are called.
EARLY = (ACCELERATE, DISTRIBUTED, LM_EVAL, MERGEKIT)
GROUPS = (CONFIGURATION, MODELS, TRAINER, PEFT, VLLM, SGLANG, *EARLY)

# The function that a hook replaces.
Original = Callable[..., Any]
# Keywords of from_pretrained, and configuration fields, that drop parts. All use layer indices from before the drop.
DROPS = ("drop_layers", "drop_attention", "drop_mlp")
FLAGS = (*DROPS, "ln_scaling")


@dataclass(frozen=True)
class Hook:
    """One replaced attribute."""

    group: str  # the module whose import triggers the hook
    owner: str  # the class, as `module:name`, or the module itself, as `module:`
    file: str  # the module of this folder that defines the replacement
    name: str
    # Required parameters of the original, separated by spaces: all for a private function, the leading ones for a
    # public function. Empty if the hook relies on none.
    parameters: str = ""
    # The replacement, called with the original as first argument. Its default is `name` without underscores around it.
    # A `flag_property` is called with the attribute's name and returns a property.
    function: str = ""
    # The first release of transformers in which the hook is needed; in earlier ones the function may be missing.
    needed_since: str = ""
    optional: bool = False  # supported releases of another library may lack the function or its module
    without_model: bool = False  # in an early group: reads or writes checkpoints with no model in memory

    def replacement(self) -> Any:
        return getattr(importlib.import_module(f".{self.file}", __package__), self.function or self.name.strip("_"))


_CONFIG, _MODEL = f"{CONFIGURATION}:PreTrainedConfig", f"{MODELS}:PreTrainedModel"
_PEFT_MODEL, _PEFT_MIXED = "peft.peft_model:PeftModel", "peft.mixed_model:PeftMixedModel"
_PEFT_CONFIG, _HOTSWAP = "peft.config:PeftConfigMixin", "peft.utils.hotswap:"
_TRAINER, _ACCELERATOR = f"{TRAINER}:Trainer", "accelerate.accelerator:Accelerator"
_config = functools.partial(Hook, CONFIGURATION, _CONFIG, "configuration")
_model = functools.partial(Hook, MODELS, _MODEL, "models")
_PROPERTIES = tuple(_config(name, function="flag_property") for name in FLAGS)

HOOKS = (
    *_PROPERTIES,
    # transformers assigns constructor keywords that are not fields, and the values of a dict, one by one.
    _config("__post_init__", "self"),
    _config("update", "self config_dict"),
    _config("from_dict", "cls config_dict"),
    _config("to_dict", "self"),
    _config("to_json_file", "self json_file_path use_diff"),
    # Private: reads every config.json, before `model_type` is looked up.
    _config("_dict_from_json_file", "cls json_file"),
    _config("get_mtp_config", "self"),
    _model("__init__", "self config"),
    _model("post_init", "self"),
    _model("save_pretrained", "self save_directory"),
    _model("from_pretrained", "cls pretrained_model_name_or_path"),
    # Private: every `AutoModel.from_config` calls it; unknown keywords would be passed to the model's `__init__`.
    _model("_from_config", "cls config kwargs"),
    # Private: the last function called while tensor names are known and no tensor has been read. The public
    # `key_mapping` is stored with the model and reverted on saving: old layer indices with a config of fewer layers.
    _model("_load_pretrained_model", "model state_dict checkpoint_files load_config expected_keys"),
    # Private: loads torch.distributed.checkpoint checkpoints by tensor name, bypassing `_load_pretrained_model`. Before
    # 5.20, from_pretrained does not support such checkpoints.
    _model(
        "_load_and_finalize_distributed_pretrained_model", "self distributed_checkpoint_dir device_map device_mesh",
        "load_distributed", needed_since="5.20",
    ),
    # A module-level function: the only one that writes a model's safetensors files and their metadata.
    Hook(MODELS, f"{MODELS}:", "saving", "safe_save_file", "tensors filename", "save_file"),
    # torch.distributed.checkpoint imports it for each safetensors file: `save_pretrained(distributed_checkpoint=True)`.
    Hook(MODELS, "safetensors.torch:", "saving", "save", "tensors metadata", "save_file"),
    # Private to torch: every load_state_dict calls it, including on a module that wraps the model.
    Hook(
        MODELS, _MODEL, "readers", "_load_from_state_dict",
        "self state_dict prefix local_metadata strict missing_keys unexpected_keys error_msgs",
    ),
    Hook(MODELS, _MODEL, "readers", "_save_to_state_dict", "self destination prefix keep_vars"),
    Hook(MODELS, "torch.optim.swa_utils:AveragedModel", "readers", "update_parameters", "self model"),
    Hook(MODELS, "transformers.integrations.peft:PeftAdapterMixin", "peft", "load_adapter", "self peft_model_id"),
    Hook(TRAINER, _TRAINER, "trainer", "train", "self resume_from_checkpoint"),
    Hook(TRAINER, _TRAINER, "trainer", "save_model", "self output_dir"),
    Hook(PEFT, _PEFT_CONFIG, "peft", "from_json_file", "cls path_json_file"),
    Hook(PEFT, _PEFT_CONFIG, "peft", "save_pretrained", "self save_directory", "save_adapter_config"),
    Hook(PEFT, _PEFT_MODEL, "peft", "save_pretrained", "self save_directory", "save_adapter"),
    Hook(PEFT, _PEFT_MODEL, "peft", "from_pretrained", "cls model model_id", "own_base_only"),
    Hook(PEFT, _PEFT_MODEL, "peft", "load_adapter", "self model_id", "own_base_only"),
    Hook(PEFT, _PEFT_MIXED, "peft", "from_pretrained", "cls model model_id", "own_base_only"),
    Hook(PEFT, _PEFT_MIXED, "peft", "load_adapter", "self model_id", "own_base_only"),
    Hook(PEFT, _HOTSWAP, "peft", "hotswap_adapter", "model model_name_or_path", "own_base_only"),
    Hook(PEFT, _HOTSWAP, "peft", "hotswap_adapter_from_state_dict", "model state_dict adapter_name config"),
    # Private: X-LoRA loads each of its experts with it.
    Hook(
        PEFT, "peft.tuners.xlora.model:", "peft", "_load_adapter_into_lora_model",
        "lora_model adapter_name model_id torch_device ephemeral_gpu_offload autocast_adapter_dtype subfolder kwargs",
        "own_base_only",
    ),
    # Shared by AutoPeftModelForCausalLM and similar classes: the only function that loads the base by its path.
    Hook(
        PEFT, "peft.auto:_BaseAutoPeftModel", "peft", "from_pretrained", "cls pretrained_model_name_or_path",
        "auto_adapter",
    ),
    # Reads adapters without a base. PEFT itself imports it by name. New in PEFT 0.19.
    *(
        Hook(PEFT, f"{module}:", "peft", "compose_cartridge_adapters", "adapter_paths", optional=True)
        for module in ("peft", "peft.tuners.cartridge.utils")
    ),
    Hook(PEFT, "peft.tuners.lora.model:", "readers", "replicate_layers", "model layer_map"),
    # Private: LoftQ uses it to read the base's weights by their names in memory.
    Hook(
        PEFT, "peft.utils.loftq_utils:_SafetensorLoader", "readers", "__init__", "self peft_model model_path",
        "init_loftq_loader",
    ),
    # Several modules of PEFT import it by name. New in PEFT 0.21.
    *(
        Hook(PEFT, f"{module}:", "readers", "set_base_model_state_dict", "model state_dict", optional=True)
        for module in ("peft", "peft.utils", "peft.utils.save_and_load")
    ),
    # The state of a custom training loop has no configuration.
    Hook(ACCELERATE, _ACCELERATOR, "readers", "save_state", "self output_dir"),
    Hook(ACCELERATE, _ACCELERATOR, "readers", "load_state", "self input_dir"),
    # Write weights without a configuration, in a dict without the metadata of a `state_dict()`.
    Hook(ACCELERATE, _ACCELERATOR, "readers", "save_model", "self model"),
    # Private: `merge_fsdp_weights`, which several modules import by name, calls it. If it goes, only the mark is lost.
    Hook(
        ACCELERATE, "accelerate.utils.fsdp_utils:", "readers", "_distributed_checkpoint_to_merged_weights",
        "checkpoint_dir save_path safe_serialization", "merge_weights", optional=True, without_model=True,
    ),
    *(
        Hook(ACCELERATE, f"accelerate.{module}:", "saving", "save", "obj f", "save_weights")
        for module in ("accelerator", "utils.fsdp_utils")
    ),
    Hook(ACCELERATE, "accelerate.utils.other:", "saving", "safe_save_file", "tensors filename", "save_file"),
    # Several modules of accelerate import the function by name.
    *(
        Hook(ACCELERATE, f"accelerate{module}:", "readers", "load_checkpoint_in_model", "model checkpoint")
        for module in ("", ".big_modeling", ".utils", ".utils.bnb", ".utils.modeling")
    ),
    # Plan every save and load of torch.distributed.checkpoint.
    Hook(DISTRIBUTED, f"{DISTRIBUTED}:DefaultSavePlanner", "readers", "create_global_plan", "self all_plans"),
    Hook(DISTRIBUTED, f"{DISTRIBUTED}:DefaultLoadPlanner", "readers", "set_up_planner", "self state_dict metadata"),
    # Private: the only function that receives the names of both checkpoints. The hook reads its parameters by name.
    Hook(LM_EVAL, f"{LM_EVAL}:HFLM", "readers", "_create_model", without_model=True),
    # Merges the tensors of checkpoints by name, and writes the configuration of one of them.
    Hook(
        MERGEKIT, f"{MERGEKIT}:", "readers", "run_merge", "merge_config out_path options", without_model=True
    ),
    # vLLM selects a model class by `architectures`, from which the hooks above remove serving/vllm.py's prefix.
    Hook(VLLM, f"{VLLM}:HFConfigParser", "serving", "parse", "self model"),
    # SGLang reads the weights itself.
    Hook(SGLANG, f"{SGLANG}:", "serving", "get_config", "model"),
)  # fmt: skip

# Installed instead of a group that differs from the table, to refuse flags. The properties refuse them on their own.
GUARDS = (
    *_PROPERTIES,
    Hook(CONFIGURATION, _CONFIG, "install", "get_config_dict", function="refuse_scaled_file"),
    Hook(MODELS, _MODEL, "install", "__init__", function="refuse"),
    Hook(MODELS, _MODEL, "install", "from_pretrained", function="refuse"),
    Hook(MODELS, _MODEL, "install", "_from_config", function="refuse"),
    Hook(TRAINER, _TRAINER, "install", "__init__", function="refuse"),
    Hook(PEFT, _PEFT_MODEL, "install", "__init__", function="refuse"),
    Hook(ACCELERATE, "accelerate.big_modeling:", "install", "load_checkpoint_in_model", function="refuse"),
    Hook(VLLM, _CONFIG, "install", "get_config_dict", function="refuse_scaled_file"),
    Hook(SGLANG, _CONFIG, "install", "get_config_dict", function="refuse_scaled_file"),
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

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
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

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        if _enabled:
            _install(module.__name__)


_finder = _Finder()
_PACKAGE = __name__.partition(".")[0]


def _install_what_is_imported() -> None:
    for group in GROUPS:
        if group in _waiting and sys.modules.get(group) is not None and not _initializing(group):
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
    _waiting.discard(group)
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
            replacement = _at_the_call(hook) if group in EARLY else hook.replacement()
        except (ImportError, AttributeError) as error:
            if _importing_this_package():
                raise
            if not hook.optional:
                found.append(str(error))
            continue
        if (owner, hook.name) in _installed and owner.__dict__[hook.name] is _installed[owner, hook.name].hook:
            continue  # the module was reloaded with the same class
        if hook.function == "flag_property":
            made[owner, hook.name] = replacement(hook.name)
            continue
        original = _unhooked(inspect.getattr_static(owner, hook.name, None))
        if original is None:
            release = getattr(sys.modules.get("transformers"), "__version__", "")  # accelerate may be used without it
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


def _at_the_call(hook: Hook) -> Callable[..., Any]:
    """A replacement that is imported when it is called, if it concerns models and there may be one then."""

    def replacement(original: Original, /, *args: Any, **kwargs: Any) -> Any:
        if MODELS not in sys.modules and not hook.without_model:
            return original(*args, **kwargs)
        try:
            function = hook.replacement()
        except (ImportError, AttributeError):  # reported in `problems` of another group, which imports the same file
            function = refuse
        return function(original, *args, **kwargs)

    return replacement


def _wrapper(original: Original, replacement: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    return wrapper


def _unhooked(value: Any) -> Any:
    """The original of a function that was hooked in one module before another imported it by name."""
    return next((installed.original for installed in _installed.values() if installed.hook is value), value)


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", release)[:3])


# --- in an unsupported release --------------------------------------------------------------------------------------


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


def refuse(original: Original, /, *args: Any, **kwargs: Any) -> Any:
    """Refuses flags, and configurations and models that have one; passes through everything else."""
    from ..core.record import is_flagged

    if any(is_flagged(getattr(value, "config", value)) for value in (*args, *kwargs.values())):
        require_supported(*(group for group in GROUPS if group not in (VLLM, SGLANG)))
    flags = [kwargs.pop(name, None) for name in FLAGS]
    if any(value is not None and value is not False for value in flags):
        require_supported()
    return original(*args, **kwargs)


def refuse_scaled_file(original: Original, /, *args: Any, **kwargs: Any) -> Any:
    from ..core.record import parts, protected_part

    found = original(*args, **kwargs)
    if any(protected_part(part).needs_plugin for part in parts(found[0])):
        require_supported(CONFIGURATION, MODELS, VLLM, SGLANG)
    return found
