"""A transformers that is not as the hooks know it: models without a flag are the same, and a flag raises one error."""

import pytest

import hf_lnscale
import tiny

# How transformers is changed before the plugin is imported, and what the error must name.
CHANGES = {
    "a new parameter": (
        """
        inner = vars(PreTrainedModel)["_load_pretrained_model"].__func__
        def changed(model, state_dict, checkpoint_files, load_config, expected_keys=None, *, streamed=False):
            return inner(model, state_dict, checkpoint_files, load_config, expected_keys)
        PreTrainedModel._load_pretrained_model = staticmethod(changed)
        """,
        "PreTrainedModel._load_pretrained_model has the parameters model, state_dict, checkpoint_files, load_config, "
        "expected_keys, streamed",
    ),
    "a method gone": (
        """
        from transformers.integrations.peft import PeftAdapterMixin
        del PeftAdapterMixin.load_adapter
        """,
        "PeftAdapterMixin.load_adapter is missing",
    ),
    "a method renamed": (
        """
        PreTrainedModel.finish_init = PreTrainedModel.post_init
        del PreTrainedModel.post_init
        LlamaModel.post_init = LlamaForCausalLM.post_init = lambda self: self.finish_init()
        """,
        "PreTrainedModel.post_init is missing",
    ),
    "post_init is not called": (
        """
        # As these models' own, it is called in place of the one that the plugin replaces.
        LlamaModel.post_init = LlamaForCausalLM.post_init = PreTrainedModel.post_init
        """,
        "was constructed without calling post_init",
    ),
    "_dict_from_json_file gone": (
        """
        import json
        from transformers import PreTrainedConfig
        del PreTrainedConfig._dict_from_json_file
        class Reader:
            def __get__(self, instance, owner):
                return lambda file: json.load(open(file, encoding="utf-8"))
        PreTrainedConfig.read_json = Reader()
        source = inspect.getsource(vars(PreTrainedConfig)["_get_config_dict"].__func__)
        source = textwrap.dedent(source).replace("_dict_from_json_file", "read_json")
        scope = vars(sys.modules["transformers.configuration_utils"])
        exec(source, scope)
        PreTrainedConfig._get_config_dict = scope["_get_config_dict"]
        """,
        "PreTrainedConfig._dict_from_json_file is missing",
    ),
}

CODE = """
import inspect, os, sys, textwrap, torch, transformers
import tiny
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaModel

plain, scaled, pruned, partial = (f"{sys.argv[1]}/{name}" for name in ("plain", "scaled", "pruned", "partial"))
exec(textwrap.dedent(CHANGE))

def outputs():
    torch.manual_seed(0)
    models = [AutoModelForCausalLM.from_config(tiny.config()), LlamaForCausalLM(tiny.config())]
    models += [AutoModelForCausalLM.from_pretrained(plain), LlamaForCausalLM.from_pretrained(plain)]
    models[0].save_pretrained(sys.argv[2])
    models += [AutoModelForCausalLM.from_pretrained(sys.argv[2])]
    with open(sys.argv[2] + "/config.json") as file:
        return [model(tiny.tokens()).logits for model in models], file.read()

before, saved = outputs()
import hf_lnscale
after, saved_after = outputs()
assert all(map(torch.equal, before, after)) and saved == saved_after

def run(model):
    return model(tiny.tokens())

uses = {
    "keyword of from_config": lambda: run(AutoModelForCausalLM.from_config(tiny.config(), ln_scaling=True)),
    "keyword of from_pretrained": lambda: run(AutoModelForCausalLM.from_pretrained(plain, ln_scaling=True)),
    "beside a configuration": lambda: run(
        LlamaForCausalLM.from_pretrained(plain, config=tiny.config(), ln_scaling=True)
    ),
    "configuration": lambda: run(LlamaForCausalLM(tiny.config(ln_scaling=True))),
    "checkpoint": lambda: run(AutoModelForCausalLM.from_pretrained(scaled)),
    "drop_layers": lambda: AutoModelForCausalLM.from_pretrained(plain, drop_layers=[1]),
    "drop_layers beside a configuration": lambda: LlamaForCausalLM.from_pretrained(
        plain, config=tiny.config(), drop_layers=[1]
    ),
    "drop_attention": lambda: run(AutoModelForCausalLM.from_pretrained(plain, drop_attention=[1])),
    "partial checkpoint": lambda: run(AutoModelForCausalLM.from_pretrained(partial)),
    "pruned configuration": lambda: LlamaForCausalLM.from_pretrained(plain, config=AutoConfig.from_pretrained(pruned)),
}
if "post_init" in NAMED and "constructed" in NAMED:  # layers are dropped without it
    uses = {name: use for name, use in uses.items() if "drop_layers" not in name and "pruned" not in name}
for name, use in uses.items():
    try:
        use()
    except hf_lnscale.UnsupportedTransformersError as error:
        assert NAMED in str(error), error
        if "constructed" not in NAMED:
            assert f"transformers {transformers.__version__}" in str(error) and "5.16.1" in str(error), error
    else:
        raise AssertionError(f"{name}: no error")
print(len(uses))
"""


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_changed(change, run_python, tmp_path):
    tiny.model().save_pretrained(tmp_path / "plain")
    tiny.model(ln_scaling=True).save_pretrained(tmp_path / "scaled")
    hf_lnscale.drop_layers(tiny.model(), [1]).save_pretrained(tmp_path / "pruned")
    hf_lnscale.drop_layers(tiny.model(), mlp=[1]).save_pretrained(tmp_path / "partial")
    code, named = CHANGES[change]
    program = f"CHANGE, NAMED = {code!r}, {named!r}\n{CODE}"
    # The plugin is imported by the program itself, so the check is that it is there at the end.
    out = run_python(program + "\ndel sys.modules['hf_lnscale']", tmp_path, tmp_path / "again", plugin=False)
    assert int(out.split()[-1]) >= 5


@pytest.mark.slow
def test_an_import_of_the_hooks_may_fail(run_python, tmp_path):
    """The hooks on accelerate and torch.distributed.checkpoint import at the call, and must not break plain models."""
    code = """
    import sys, torch, transformers.utils, transformers.modeling_utils, transformers.models.auto.auto_factory
    from torch.distributed import checkpoint
    del transformers.utils.find_adapter_config_file
    import hf_lnscale, accelerate, tiny
    model, (plain, scaled, state) = tiny.model(), sys.argv[1:]
    before = model(tiny.tokens()).logits
    accelerate.load_checkpoint_in_model(model, plain)
    checkpoint.save(model.state_dict(), checkpoint_id=state)
    checkpoint.load(model.state_dict(), checkpoint_id=state)
    assert torch.equal(model(tiny.tokens()).logits, before)
    for use in (lambda: tiny.model(ln_scaling=True), lambda: type(model).from_pretrained(scaled)):
        try:
            use()
        except hf_lnscale.UnsupportedTransformersError as error:
            print(error)
    del sys.modules["hf_lnscale"]
    """
    tiny.model().save_pretrained(tmp_path / "plain")
    tiny.model(ln_scaling=True).save_pretrained(tmp_path / "scaled")
    told = run_python(code, *(tmp_path / name for name in ("plain", "scaled", "state")), plugin=False).splitlines()
    assert len(told) == 2
    assert all("find_adapter_config_file" in line for line in told)


@pytest.mark.slow
def test_torch_may_be_built_without_distributed(run_python):
    code = """
    import sys, torch

    class Without:
        def find_spec(self, name, path=None, target=None):
            if name.startswith("torch.distributed.checkpoint"):
                raise ImportError(name)

    torch.distributed.is_available = lambda: False
    sys.meta_path.insert(0, Without())
    import hf_lnscale, tiny
    print(hf_lnscale.ln_scales(tiny.model(ln_scaling=True))[3])
    del sys.modules["hf_lnscale"]
    """
    assert run_python(code, plugin=False).strip() == "0.5"


@pytest.mark.slow
def test_an_older_release_may_lack_what_was_not_needed_there(run_python):
    """`_load_and_finalize_distributed_pretrained_model` came with 5.20; all others are in the oldest release."""
    code = """
    import sys, transformers
    from transformers.distributed import mixin
    for cls in vars(mixin).values():
        if isinstance(cls, type) and "_load_and_finalize_distributed_pretrained_model" in vars(cls):
            del cls._load_and_finalize_distributed_pretrained_model
    transformers.__version__ = RELEASE
    MORE
    import hf_lnscale, tiny
    try:
        print(hf_lnscale.ln_scales(tiny.model(ln_scaling=True))[3])
    except hf_lnscale.UnsupportedTransformersError as error:
        print(error)
    del sys.modules["hf_lnscale"]
    """

    def run(release, more=""):
        return run_python(code.replace("RELEASE", repr(release)).replace("MORE", more), plugin=False).strip()

    assert run("5.16.1") == "0.5"
    assert "PreTrainedModel._load_and_finalize_distributed_pretrained_model is missing" in run("5.23.0")
    refused = run("5.16.1", "del transformers.PreTrainedConfig.get_mtp_config")
    assert "PreTrainedConfig.get_mtp_config is missing" in refused


@pytest.mark.slow
def test_an_older_peft_may_lack_a_function_and_its_module(run_python):
    """`compose_cartridge_adapters` came with PEFT 0.19."""
    code = """
    import sys, peft
    del peft.compose_cartridge_adapters
    sys.modules["peft.tuners.cartridge.utils"] = None
    import hf_lnscale, tiny
    from hf_lnscale.hooks import install
    peft.get_peft_model(tiny.model(ln_scaling=True), peft.LoraConfig(target_modules=["q_proj"]))
    print(install.problems)
    del sys.modules["hf_lnscale"]
    """
    assert run_python(code, plugin=False).strip() == "{}"
