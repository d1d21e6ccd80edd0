"""What is hooked, that it comes out again, and that a change of transformers' inside is noticed by name."""

import inspect
import sys

import accelerate
import accelerate.utils.bnb
import accelerate.utils.fsdp_utils
import peft
import peft.auto
import peft.tuners.cartridge.utils
import peft.tuners.lora.model
import peft.tuners.xlora.model
import peft.utils.hotswap
import peft.utils.loftq_utils
import pytest
import safetensors.torch
import torch
import transformers
from packaging.version import Version
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.optim.swa_utils import AveragedModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    modeling_utils,
)
from transformers.integrations.peft import PeftAdapterMixin

import hf_lnscale
import tiny
from hf_lnscale.hooks import install as hooks

HOOKED = {
    (PreTrainedConfig, "ln_scaling"),
    (PreTrainedConfig, "drop_layers"),
    (PreTrainedConfig, "drop_attention"),
    (PreTrainedConfig, "drop_mlp"),
    (PreTrainedConfig, "__post_init__"),
    (PreTrainedConfig, "update"),
    (PreTrainedConfig, "from_dict"),
    (PreTrainedConfig, "to_dict"),
    (PreTrainedConfig, "to_json_file"),
    (PreTrainedConfig, "_dict_from_json_file"),
    (PreTrainedConfig, "get_mtp_config"),
    (PreTrainedModel, "__init__"),
    (PreTrainedModel, "post_init"),
    (PreTrainedModel, "save_pretrained"),
    (PreTrainedModel, "from_pretrained"),
    (PreTrainedModel, "_from_config"),
    (PreTrainedModel, "_load_pretrained_model"),
    (PreTrainedModel, "_load_and_finalize_distributed_pretrained_model"),
    (modeling_utils, "safe_save_file"),
    (safetensors.torch, "save"),
    (PreTrainedModel, "_save_to_state_dict"),
    (PreTrainedModel, "_load_from_state_dict"),
    (AveragedModel, "update_parameters"),
    (DefaultLoadPlanner, "set_up_planner"),
    (DefaultSavePlanner, "create_global_plan"),
    (PeftAdapterMixin, "load_adapter"),
    (Trainer, "train"),
    (Trainer, "save_model"),
}
HOOKED_IN_PEFT = {
    (peft.config.PeftConfigMixin, "from_json_file"),
    (peft.config.PeftConfigMixin, "save_pretrained"),
    (peft.PeftModel, "save_pretrained"),
    (peft.PeftModel, "from_pretrained"),
    (peft.PeftModel, "load_adapter"),
    (peft.auto._BaseAutoPeftModel, "from_pretrained"),
    (peft.PeftMixedModel, "from_pretrained"),
    (peft.PeftMixedModel, "load_adapter"),
    (peft.utils.hotswap, "hotswap_adapter"),
    (peft.utils.hotswap, "hotswap_adapter_from_state_dict"),
    (peft.tuners.xlora.model, "_load_adapter_into_lora_model"),
    (peft.tuners.lora.model, "replicate_layers"),
    (peft.utils.loftq_utils._SafetensorLoader, "__init__"),
}
IN_ACCELERATE = {
    (module, "load_checkpoint_in_model")
    for module in (
        accelerate,
        accelerate.big_modeling,
        accelerate.utils,
        accelerate.utils.bnb,
        accelerate.utils.modeling,
    )
}
HOOKED |= {(accelerate.Accelerator, name) for name in ("save_state", "load_state", "save_model")}
HOOKED |= {
    (accelerate.accelerator, "save"),
    (accelerate.utils.fsdp_utils, "save"),
    (accelerate.utils.fsdp_utils, "_distributed_checkpoint_to_merged_weights"),
    (accelerate.utils.other, "safe_save_file"),
}
HOOKED_IN_PEFT |= {
    (peft, "compose_cartridge_adapters"),
    (peft.tuners.cartridge.utils, "compose_cartridge_adapters"),
}
HOOKED_IN_PEFT |= {
    (module, "set_base_model_state_dict")
    for module in (peft, peft.utils, peft.utils.save_and_load)
    if hasattr(module, "set_base_model_state_dict")
}


@pytest.fixture
def disabled():
    hf_lnscale.disable()
    yield
    hf_lnscale.enable()


@pytest.mark.slow
def test_disable_puts_back_exactly_what_was_there(run_python):
    code = """
    import sys
    import accelerate
    import accelerate.utils.bnb
    import accelerate.utils.fsdp_utils
    import safetensors.torch
    import peft.tuners.cartridge.utils
    import peft.tuners.lora.model
    import peft.tuners.xlora.model
    import peft.utils.hotswap
    from peft import PeftMixedModel, PeftModel
    from peft.auto import _BaseAutoPeftModel
    from peft.config import PeftConfigMixin
    from peft.utils.loftq_utils import _SafetensorLoader
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
    from torch.optim.swa_utils import AveragedModel
    from transformers import PreTrainedConfig, PreTrainedModel, Trainer, modeling_utils
    from transformers.integrations.peft import PeftAdapterMixin
    classes = (PreTrainedConfig, PreTrainedModel, PeftAdapterMixin, Trainer, modeling_utils)
    classes += (PeftModel, _BaseAutoPeftModel, PeftConfigMixin, PeftMixedModel, _SafetensorLoader, AveragedModel)
    classes += (DefaultLoadPlanner, DefaultSavePlanner, accelerate.Accelerator, safetensors.torch)
    classes += (peft, peft.utils, peft.utils.save_and_load)
    classes += (peft.utils.hotswap, peft.tuners.xlora.model, peft.tuners.lora.model)
    classes += (accelerate, accelerate.big_modeling, accelerate.utils, accelerate.utils.bnb, accelerate.utils.modeling)
    classes += (accelerate.accelerator, accelerate.utils.fsdp_utils, accelerate.utils.other)
    classes += (peft.tuners.cartridge.utils,)
    before = [dict(vars(cls)) for cls in classes]

    import hf_lnscale
    assert hf_lnscale.is_enabled()
    hf_lnscale.enable()  # a second time changes nothing
    changed = [f"{cls.__name__}.{name}" for cls, attributes in zip(classes, before)
               for name, value in vars(cls).items() if attributes.get(name) is not value]

    hf_lnscale.disable()
    assert not hf_lnscale.is_enabled()
    hf_lnscale.disable()
    for cls, attributes in zip(classes, before):
        assert vars(cls).keys() == attributes.keys()
        assert all(vars(cls)[name] is value for name, value in attributes.items())
    print(*changed)
    del sys.modules["hf_lnscale"]
    """
    changed = run_python(code, plugin=False).split()
    assert sorted(changed) == sorted(f"{cls.__name__}.{name}" for cls, name in HOOKED | HOOKED_IN_PEFT | IN_ACCELERATE)


def installed():
    """What is hooked, without lm-eval and mergekit, which another test may have imported."""
    others = {"_create_model": "lm_eval", "run_merge": "mergekit"}
    return {(owner, name) for owner, name in hooks._installed if others.get(name) not in sys.modules}


def test_exactly_these_attributes_are_hooked():
    assert installed() == HOOKED | HOOKED_IN_PEFT | IN_ACCELERATE


def test_disabled_is_stock(disabled, tmp_path):
    assert not hf_lnscale.is_enabled()
    assert not hasattr(PreTrainedConfig, "ln_scaling")
    tiny.model().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="ln_scaling"):
        AutoModelForCausalLM.from_pretrained(tmp_path, ln_scaling=True)


@pytest.mark.parametrize("missing", [True, False])
def test_a_checkpoint_that_is_not_there_is_refused_by_trainer(missing, tmp_path):
    """The hook on `train` does nothing before Trainer itself has looked: the same error as without the plugin."""
    (tmp_path / "checkpoint-15").mkdir()
    name = "no/such/checkpoint-15" if missing else str(tmp_path / "checkpoint-15")
    messages = []
    for switch in (hf_lnscale.enable, hf_lnscale.disable):
        switch()
        try:
            with pytest.raises(ValueError, match=r"Can't find a valid checkpoint at .*checkpoint-15") as raised:
                Trainer(tiny.model(), TrainingArguments(str(tmp_path), use_cpu=True)).train(name)
        finally:
            hf_lnscale.enable()
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def test_in_memory_functions_need_no_hooks(disabled):
    model = hf_lnscale.apply_ln_scaling(tiny.model())
    assert hf_lnscale.ln_scales(model)[3] == 0.5
    before = model(tiny.tokens()).logits
    assert torch.equal(hf_lnscale.fold_ln_scaling(model)(tiny.tokens()).logits, before)


def test_disable_does_not_undo_another_library(monkeypatch):
    def theirs(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(PreTrainedModel, "post_init", theirs)
    with pytest.raises(RuntimeError, match=r"PreTrainedModel\.post_init was replaced after"):
        hf_lnscale.disable()
    assert hf_lnscale.is_enabled()
    assert installed() == HOOKED | HOOKED_IN_PEFT | IN_ACCELERATE


# What each hook relies on. A failure here says: transformers changed, read hooks/install.py again.
SIGNATURES = {
    (PreTrainedConfig, "__post_init__"): ["self", "kwargs"],
    (PreTrainedConfig, "update"): ["self", "config_dict"],
    (PreTrainedConfig, "from_dict"): ["cls", "config_dict", "kwargs"],
    (PreTrainedConfig, "to_dict"): ["self"],
    (PreTrainedConfig, "to_json_file"): ["self", "json_file_path", "use_diff"],
    (PreTrainedConfig, "_dict_from_json_file"): ["cls", "json_file"],
    (PreTrainedConfig, "get_mtp_config"): ["self"],
    (PreTrainedModel, "__init__"): ["self", "config"],
    (PreTrainedModel, "post_init"): ["self"],
    (PreTrainedModel, "save_pretrained"): ["self", "save_directory"],
    (PreTrainedModel, "from_pretrained"): ["cls", "pretrained_model_name_or_path", "model_args", "config"],
    (PreTrainedModel, "_from_config"): ["cls", "config", "kwargs"],
    (PreTrainedModel, "_load_pretrained_model"): [
        "model",
        "state_dict",
        "checkpoint_files",
        "load_config",
        "expected_keys",
    ],
    (PreTrainedModel, "_load_and_finalize_distributed_pretrained_model"): ["self", "distributed_checkpoint_dir"],
    (PreTrainedModel, "_save_to_state_dict"): ["self", "destination", "prefix", "keep_vars"],
    (PreTrainedModel, "_load_from_state_dict"): ["self", "state_dict", "prefix"],
    (safetensors.torch, "save"): ["tensors", "metadata"],
    (AveragedModel, "update_parameters"): ["self", "model"],
    (PeftAdapterMixin, "load_adapter"): ["self", "peft_model_id", "adapter_name"],
    (Trainer, "train"): ["self", "resume_from_checkpoint"],
    (Trainer, "save_model"): ["self", "output_dir"],
    (peft.config.PeftConfigMixin, "from_json_file"): ["cls", "path_json_file"],
    (peft.config.PeftConfigMixin, "save_pretrained"): ["self", "save_directory", "kwargs"],
    (peft.PeftModel, "save_pretrained"): ["self", "save_directory"],
    (peft.PeftModel, "from_pretrained"): ["cls", "model", "model_id"],
    (DefaultLoadPlanner, "set_up_planner"): ["self", "state_dict", "metadata"],
    (DefaultSavePlanner, "create_global_plan"): ["self", "all_plans"],
    (accelerate.Accelerator, "save_state"): ["self", "output_dir"],
    (accelerate.Accelerator, "load_state"): ["self", "input_dir"],
    (accelerate.Accelerator, "save_model"): ["self", "model"],
    (accelerate.accelerator, "save"): ["obj", "f", "save_on_each_node", "safe_serialization"],
    (accelerate.utils.fsdp_utils, "save"): ["obj", "f", "save_on_each_node", "safe_serialization"],
    (accelerate.utils.fsdp_utils, "_distributed_checkpoint_to_merged_weights"): ["checkpoint_dir", "save_path"],
    (accelerate.utils.other, "safe_save_file"): ["tensors", "filename", "metadata"],
    (peft, "compose_cartridge_adapters"): ["adapter_paths"],
    (peft.PeftModel, "load_adapter"): ["self", "model_id", "adapter_name"],
    (peft.auto._BaseAutoPeftModel, "from_pretrained"): ["cls", "pretrained_model_name_or_path"],
    (peft.PeftMixedModel, "from_pretrained"): ["cls", "model", "model_id"],
    (peft.PeftMixedModel, "load_adapter"): ["self", "model_id", "adapter_name"],
    (peft.utils.hotswap, "hotswap_adapter"): ["model", "model_name_or_path", "adapter_name"],
    (peft.utils.hotswap, "hotswap_adapter_from_state_dict"): ["model", "state_dict", "adapter_name", "config"],
    (peft.tuners.xlora.model, "_load_adapter_into_lora_model"): ["lora_model", "adapter_name", "model_id"],
    (peft.tuners.lora.model, "replicate_layers"): ["model", "layer_map"],
    (peft.utils.loftq_utils._SafetensorLoader, "__init__"): ["self", "peft_model", "model_path"],
    **{
        (module, name): ["model", "checkpoint", "device_map"]
        for module, name in sorted(IN_ACCELERATE, key=lambda one: one[0].__name__)  # one order for all workers
    },
}
if Version(transformers.__version__) < Version("5.20"):  # from_pretrained reads no distributed checkpoint there
    HOOKED.remove(newer := (PreTrainedModel, "_load_and_finalize_distributed_pretrained_model"))
    del SIGNATURES[newer]


@pytest.mark.parametrize(("owner", "name"), SIGNATURES, ids=lambda value: getattr(value, "__name__", value))
def test_signature_of_the_hooked_function(owner, name):
    original = hooks._installed[owner, name].original
    if original is hooks._MISSING:  # inherited
        original = getattr(super(owner, owner), name)
    function = original.__func__ if isinstance(original, (classmethod, staticmethod)) else original
    parameters = list(inspect.signature(function).parameters)
    expected = SIGNATURES[owner, name]
    assert parameters[: len(expected)] == expected, f"{owner.__name__}.{name} has changed: {parameters}"
    hooked = owner.__dict__[name]
    assert isinstance(hooked, classmethod) == isinstance(original, classmethod)
    assert getattr(hooked, "__func__", hooked).__doc__ == function.__doc__


def test_every_reading_of_a_config_goes_through_the_hooked_function(tmp_path):
    """`_dict_from_json_file` is private; should another way appear, scaled checkpoints would stop loading."""
    tiny.model(ln_scaling=True).save_pretrained(tmp_path)
    for load in (
        lambda: LlamaForCausalLM.from_pretrained(tmp_path).config,
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path).config,
        lambda: AutoConfig.from_pretrained(tmp_path),
        lambda: type(tiny.config()).from_json_file(tmp_path / "config.json"),
        lambda: type(tiny.config()).from_pretrained(tmp_path / "config.json"),
    ):
        assert load().model_type == "llama"
        assert load().ln_scaling["depths"] == [1, 2, 3, 4]
