"""What importing the plugin costs, and that everything is hooked in whatever order things are imported."""

import os
import pickle
import subprocess
import sys

import pytest

import tiny

# In one process: what does not depend on the order is imported once, and each order then runs in a fork of it.
ORDERS = {
    "plugin first": "import hf_lnscale; import transformers",
    "plugin last": "import transformers; import hf_lnscale",
    "from configurations to models": (
        "from transformers import AutoConfig, LlamaConfig; import hf_lnscale; LlamaConfig(ln_scaling=True)"
    ),
    "models before": "from transformers import LlamaForCausalLM; import hf_lnscale",
    "base classes before": "from transformers import PreTrainedConfig, PreTrainedModel; import hf_lnscale",
    "Trainer later": "import hf_lnscale; from transformers import AutoModel, Trainer",
    "Trainer before": "from transformers import Trainer; import hf_lnscale",
    "peft before": "import peft; import hf_lnscale",
    "peft later": "import hf_lnscale; import peft",
    "a part of peft later": "import hf_lnscale; from peft.auto import AutoPeftModelForCausalLM",
    "between models and peft": "from transformers import AutoModel; import hf_lnscale; from peft import LoraConfig",
    # One of our modules imports transformers, and the hooks need that module.
    "families first": "import hf_lnscale.core.families",
    "the record first": "import hf_lnscale.core.record",
    "dropping first": "import hf_lnscale.pruning.layers",
    "the demo first": "import hf_lnscale.commands.demo",
    "off and on": "import hf_lnscale; hf_lnscale.disable(); import peft; hf_lnscale.enable()",
    "reloaded": """
        import importlib, hf_lnscale, peft
        importlib.reload(hf_lnscale)
        importlib.reload(peft)
    """,
    "transformers reloaded": """
        import importlib, hf_lnscale, transformers.modeling_utils
        importlib.reload(transformers.modeling_utils)
    """,
    "looked for": """
        import importlib.util, inspect, hf_lnscale
        for name in ("transformers.modeling_utils", "peft", "transformers.trainer"):
            spec = importlib.util.find_spec(name)
            assert spec.loader.get_filename(name) == spec.origin
            assert "import" in spec.loader.get_source(name)
            assert name not in sys.modules
        assert importlib.util.find_spec("transformers.no_such_module") is None
        import transformers.modeling_utils
        assert type(transformers.modeling_utils.__loader__) is type(transformers.modeling_utils.__spec__.loader)
        assert type(transformers.modeling_utils.__loader__).__name__ == "SourceFileLoader"
        inspect.getsource(transformers.modeling_utils)
    """,
    "from within transformers": """
        class Early:  # the plugin is imported while transformers.modeling_utils is
            def find_spec(self, name, path=None, target=None):
                if name == "transformers.integrations.peft":
                    assert sys.modules["transformers.modeling_utils"].__spec__._initializing
                    import hf_lnscale
        sys.meta_path.insert(0, Early())
        import transformers.modeling_utils
    """,
    "threads": """
        import threading
        def first():
            from transformers import AutoModelForCausalLM
        def second():
            import hf_lnscale
        def third():
            import peft
        threads = [threading.Thread(target=one) for one in (first, second, second, third, first, third)]
        for one in threads:
            one.start()
        for one in threads:
            one.join(60)
            assert not one.is_alive()
        import hf_lnscale
    """,
    "unpickled": "import pickle; assert pickle.load(open(sys.argv[1], 'rb')).ln_scaling",
    "nothing of transformers": "import hf_lnscale; assert not any('transformers' in name for name in sys.modules)",
}

FORKS = """
import importlib.machinery, os, sys, textwrap, traceback
import accelerate, datasets, torch, torch._dynamo
assert not [name for name in sys.modules if name.partition(".")[0] in ("transformers", "peft", "hf_lnscale")]

ran = []  # files of the plugin
execute = importlib.machinery.SourceFileLoader.exec_module

def noted(loader, module):
    execute(loader, module)
    if module.__name__.startswith("hf_lnscale."):  # not one that failed, which is run again
        ran.append(module.__name__)

importlib.machinery.SourceFileLoader.exec_module = noted

def check():
    import hf_lnscale
    assert hf_lnscale.is_enabled()
    import hf_lnscale.hooks.saving
    twice = {name for name in ran if ran.count(name) > 1}
    assert not twice, f"run twice, so that two copies do not share what is set in one: {sorted(twice)}"
    from transformers import AutoModelForCausalLM, LlamaConfig
    config = LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=4, num_attention_heads=2)
    assert hf_lnscale.ln_scales(AutoModelForCausalLM.from_config(config, ln_scaling=True))[3] == 0.5
    from hf_lnscale.hooks import install
    assert not install.problems, install.problems
    for hook in install.HOOKS:
        if hook.group in sys.modules:
            module, _, cls = hook.owner.partition(":")
            owner = getattr(sys.modules[module], cls) if cls else sys.modules[module]
            assert vars(owner)[hook.name] is install._installed[owner, hook.name].hook, hook
            original = install._installed[owner, hook.name].original
            code = getattr(getattr(original, "__func__", original), "__code__", None)
            assert code is None or "hf_lnscale" not in code.co_filename, hook  # not hooked twice

for name, code in ORDERS.items():
    pid = os.fork()
    if pid == 0:
        try:
            exec(textwrap.dedent(code), {"sys": sys})
            check()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, name
    print(name)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_every_order_of_imports(run_python, tmp_path):
    (tmp_path / "config.pkl").write_bytes(pickle.dumps(tiny.config(ln_scaling=True)))
    ran = run_python(f"ORDERS = {ORDERS!r}\n{FORKS}", tmp_path / "config.pkl", plugin=False)
    assert ran.splitlines() == list(ORDERS)


def test_importing_it_imports_nothing_else():
    code = (
        "import sys; before = set(sys.modules); import hf_lnscale; dir(hf_lnscale); "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["hf_lnscale"]


@pytest.mark.slow
def test_using_a_model_imports_no_trainer(run_python):
    """No Trainer, PEFT, datasets or bitsandbytes unless the user imports them."""
    code = """
    import sys, tiny
    model = tiny.model(ln_scaling=True)
    model.save_pretrained(sys.argv[1])
    type(model).from_pretrained(sys.argv[1], drop_layers=[1])
    for name in ("transformers.trainer", "peft", "datasets", "bitsandbytes", "trl"):
        assert name not in sys.modules, name
    """
    run_python(code, "model", plugin=True)


def test_public_names():
    import hf_lnscale

    assert set(hf_lnscale.__all__) <= set(dir(hf_lnscale))
    assert {name: getattr(hf_lnscale, name) for name in hf_lnscale.__all__}
    assert set(hf_lnscale._MODULE_OF) == set(hf_lnscale.__all__) - {"__version__", "enable", "disable", "is_enabled"}
    with pytest.raises(AttributeError, match="'hf_lnscale' has no attribute 'no_such_name'"):
        hf_lnscale.no_such_name  # noqa: B018
