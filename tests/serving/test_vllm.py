"""What vLLM is given. That it serves the same tokens is seen by `make serve-test`, which installs it."""

import dataclasses
import sys
from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

import tiny
from hf_lnscale import apply_ln_scaling, fold_ln_scaling
from hf_lnscale.core.families import FAMILIES, RENAMED
from hf_lnscale.serving.vllm import register, scaled


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_are_those_of_a_folded_checkpoint(family, dtype, tmp_path):
    """In a warmup too, and with layers numbered as in the checkpoint; two norms a layer and nothing else differ."""
    for name, scaling in (("whole", {"depths": [1, 3, 4, 9]}), ("warmup", {"warmup_steps": 10, "step": 4})):
        model = tiny.model(family, ln_scaling=scaling).to(dtype)
        model.save_pretrained(tmp_path / name, max_shard_size="50GB")
        fold_ln_scaling(model).save_pretrained(tmp_path / f"{name}-folded")
        before = load_file(tmp_path / name / "model.safetensors")
        served = dict(scaled(before.items(), AutoConfig.from_pretrained(tmp_path / name)))
        folded = load_file(tmp_path / f"{name}-folded" / "model.safetensors")
        assert served.keys() == folded.keys()
        assert all(torch.equal(served[key], folded[key]) and served[key].dtype == dtype for key in served)
        changed = [key for key in served if not torch.equal(served[key], before[key])]
        assert len(changed) == 2 * 3  # the first layer's scale is 1


def test_a_layer_behind_the_last_one_is_left_alone():
    model = apply_ln_scaling(tiny.model("deepseek_v3"))
    weights = [(f"model.layers.{layer}.input_layernorm.weight", torch.ones(4)) for layer in (3, 4)]
    assert [float(weight[0]) for _, weight in scaled(weights, model.config)] == [0.5, 1.0]


def test_what_is_registered(monkeypatch):
    """Families of the table that vLLM has, but for those whose norms it would not find in a checkpoint."""
    seen = []
    registry = SimpleNamespace(
        get_supported_archs=lambda: ["LlamaForCausalLM", "Qwen2ForCausalLM", "MistralForCausalLM", "Unknown"],
        register_model=lambda name, where: seen.append((name, where)),
    )
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(ModelRegistry=registry))
    monkeypatch.setitem(FAMILIES, "mistral", dataclasses.replace(FAMILIES["mistral"], no_dropping=RENAMED))
    register()
    names = ["LNSLlamaForCausalLM", "LNSQwen2ForCausalLM"]
    assert sorted(seen) == [(name, f"hf_lnscale.serving.vllm:{name}") for name in names]


def test_the_entry_point():
    (ours,) = entry_points(group="vllm.general_plugins", name="hf_lnscale")
    assert ours.load() is register


# A stand-in for the one function of vLLM's that is hooked.
PARSER = """
from transformers import AutoConfig, PreTrainedConfig
class HFConfigParser:
    def parse(self, {model}, trust_remote_code, revision=None, code_revision=None, **kwargs):
        values, _ = PreTrainedConfig.get_config_dict({model})
        return values, AutoConfig.from_pretrained({model})
"""
CODE = """
import sys
sys.path.insert(0, sys.argv[1])
from vllm.transformers_utils.config import AutoConfig, HFConfigParser
for path in sys.argv[2:]:
    config = HFConfigParser().parse(path, False)[1]
    print(config.model_type, *config.architectures, *AutoConfig.from_pretrained(path).architectures)
"""


def make_vllm(folder, parameter):
    package = folder / "vllm" / "transformers_utils"
    package.mkdir(parents=True)
    (folder / "vllm" / "__init__.py").write_text("__version__ = '9.9'")
    (package / "config.py").write_text(PARSER.format(model=parameter))


@pytest.mark.slow
def test_vllm_is_told_of_the_scale_and_transformers_is_not(tmp_path, run_python):
    make_vllm(tmp_path, "model")
    tiny.model(ln_scaling=True).save_pretrained(tmp_path / "scaled")
    tiny.model().save_pretrained(tmp_path / "plain")
    ran = run_python(CODE, tmp_path, tmp_path / "scaled", tmp_path / "plain", plugin=True)
    assert ran.splitlines() == [
        "llama LNSLlamaForCausalLM LlamaForCausalLM",
        "llama LlamaForCausalLM LlamaForCausalLM",
    ]


OVERRIDDEN = """
import sys
sys.path.insert(0, sys.argv[1])
from vllm.transformers_utils.config import HFConfigParser
plain = {"architectures": ["LlamaForCausalLM"]}
for overrides in (plain, lambda config: config.update(plain) or config):
    try:
        HFConfigParser().parse(sys.argv[2], False, hf_overrides=overrides)
    except ValueError as error:
        assert "hf_overrides {'architectures': ['LlamaForCausalLM']} removes the prefix 'LNS' from" in str(error)
    else:
        raise SystemExit("it was taken")
    HFConfigParser().parse(sys.argv[3], False, hf_overrides=overrides)
for overrides in ({"rope_theta": 1.0}, lambda config: config, None):
    config = HFConfigParser().parse(sys.argv[2], False, hf_overrides=overrides)[1]
    assert config.architectures == ["LNSLlamaForCausalLM"]
"""


@pytest.mark.slow
def test_overrides_that_take_the_mark_away_are_refused(tmp_path, run_python):
    make_vllm(tmp_path, "model")
    tiny.model(ln_scaling=True).save_pretrained(tmp_path / "scaled")
    tiny.model().save_pretrained(tmp_path / "plain")
    run_python(OVERRIDDEN, tmp_path, tmp_path / "scaled", tmp_path / "plain", plugin=True)


@pytest.mark.slow
def test_another_vllm_gets_no_scaled_checkpoint(tmp_path, run_python):
    make_vllm(tmp_path, "source")
    tiny.model(ln_scaling=True).save_pretrained(tmp_path / "scaled")
    refused = run_python(CODE, tmp_path, tmp_path / "scaled", plugin=True, expect_failure=True)
    assert "and vllm 9.9: HFConfigParser.parse has the parameters self, source" in refused
    tiny.model().save_pretrained(tmp_path / "plain")
    assert "llama LlamaForCausalLM" in run_python(CODE, tmp_path, tmp_path / "plain", plugin=True)


SGLANG = """
import sys
sys.path.insert(0, sys.argv[1])
from sglang.srt.utils.hf_transformers.config import get_config
for path in sys.argv[2:]:
    try:
        print(*get_config(path, trust_remote_code=False).architectures)
    except (ValueError, RuntimeError) as error:
        print(error)
"""


@pytest.mark.slow
def test_sglang_in_the_same_process_is_refused_what_it_would_lose(tmp_path, run_python):
    package = tmp_path / "sglang" / "srt" / "utils" / "hf_transformers"
    package.mkdir(parents=True)
    (tmp_path / "sglang" / "__init__.py").write_text("__version__ = '9.9'")
    models = {"plain": {}, "scaled": {"ln_scaling": True}, "partial": {"drop_mlp": [1]}}
    for name, flags in models.items():
        tiny.model(**flags).save_pretrained(tmp_path / name)
    folders = [tmp_path / name for name in models]
    body = "(model, trust_remote_code, **kwargs):\n    return AutoConfig.from_pretrained(model)"
    answers = {"get_config": "serve what hf-lnscale export writes", "another": "config.get_config is missing"}
    for function, expected in answers.items():
        (package / "config.py").write_text(f"from transformers import AutoConfig\ndef {function}{body}")
        code = SGLANG.replace("import get_config", f"import {function} as get_config")
        plain, *refused = run_python(code, tmp_path, *folders, plugin=True).splitlines()
        assert plain == "LlamaForCausalLM"
        assert len(refused) == 2
        assert all(expected in line for line in refused), refused
