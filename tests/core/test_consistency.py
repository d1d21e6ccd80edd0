"""A scale that is not what it seems: refused or warned of, and nothing changed half-way."""

import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

import tiny
from hf_lnscale import LNScalingConfig, apply_ln_scaling, fold_ln_scaling, ln_scales, remove_ln_scaling
from hf_lnscale.core import families
from oracles import decoder_layers

SCALES = pytest.approx([1.0, 2**-0.5, 3**-0.5, 0.5], rel=1e-15)


def test_two_models_that_share_a_config_are_not_saved_as_each_other(tmp_path):
    config = tiny.config()
    plain, scaled = LlamaForCausalLM(config), apply_ln_scaling(LlamaForCausalLM(config))
    with pytest.raises(ValueError, match="two models share one config object"):
        plain.save_pretrained(tmp_path)
    scaled.save_pretrained(tmp_path)
    assert ln_scales(AutoModelForCausalLM.from_pretrained(tmp_path)) == SCALES


@pytest.mark.parametrize("built", [True, False])
def test_a_config_that_is_changed_afterwards(built, tmp_path):
    model = LlamaForCausalLM(tiny.config(ln_scaling=built))
    model.config.ln_scaling = {"exponent": 1.0}
    with pytest.raises(ValueError, match=r"was changed after the model was built.*apply_ln_scaling"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    apply_ln_scaling(model, {"exponent": 1.0}).save_pretrained(tmp_path)
    assert ln_scales(AutoModelForCausalLM.from_pretrained(tmp_path)) == [1.0, 0.5, 1 / 3, 0.25]


def test_the_value_that_is_read_from_a_config_is_a_copy():
    config = tiny.config(ln_scaling=True)
    config.ln_scaling["exponent"] = -1
    assert config.ln_scaling["exponent"] == 0.5


@pytest.mark.parametrize("cls", [AutoModelForCausalLM, LlamaForCausalLM])
def test_a_config_object_is_compared_with_the_folder(cls, tmp_path):
    """What was trained is said by the folder of the weights, whatever the configuration was taken from."""
    scaled = tiny.model(ln_scaling=True)
    scaled.save_pretrained(tmp_path / "scaled")
    tiny.model().save_pretrained(tmp_path / "plain")
    with pytest.warns(UserWarning, match="disabled"):
        cls.from_pretrained(tmp_path / "scaled", config=LlamaConfig.from_pretrained(tmp_path / "plain"))
    with pytest.warns(UserWarning, match="enabled"):
        cls.from_pretrained(tmp_path / "plain", config=LlamaConfig.from_pretrained(tmp_path / "scaled"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = cls.from_pretrained(tmp_path / "scaled", config=scaled.config)
        cls.from_pretrained(tmp_path / "plain", config=tiny.config())
    assert torch.equal(model(tiny.tokens()).logits, scaled(tiny.tokens()).logits)


def test_a_class_that_replaces_the_layers():
    class Rebuilt(LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            made = type(self.model.layers[0])
            self.model.layers = nn.ModuleList(made(config, index) for index in range(config.num_hidden_layers))
            self.post_init()

    assert ln_scales(Rebuilt(tiny.config(ln_scaling=True))) == SCALES


class RawTextConfig(PreTrainedConfig):
    """As in code from outside transformers: the text configuration is a plain dict."""

    model_type = "raw_text"

    def __init__(self, text_config=None, **kwargs):
        self.text_config = text_config or {"hidden_size": 4}
        super().__init__(**kwargs)


class RawTextModel(PreTrainedModel):
    config_class = RawTextConfig

    def __init__(self, config):
        super().__init__(config)
        self.linear = nn.Linear(config.text_config["hidden_size"], 2)
        self.post_init()


def test_a_model_from_elsewhere_without_the_flag(tmp_path):
    model = RawTextModel(RawTextConfig())
    model.save_pretrained(tmp_path)
    loaded = RawTextModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.linear.weight, model.linear.weight)


class HelperNorm(nn.LayerNorm):
    def forward(self, hidden_states):
        return self.compute(hidden_states)

    def compute(self, hidden_states):
        return nn.functional.layer_norm(hidden_states, self.normalized_shape, self.weight, self.bias, self.eps)


def test_a_norm_that_reads_its_weight_in_a_method():
    model = tiny.model()
    for layer in decoder_layers(model):
        layer.input_layernorm = HelperNorm(tiny.HIDDEN)
    hidden = torch.randn(2, 3, tiny.HIDDEN)
    expected = decoder_layers(model)[3].input_layernorm(hidden) / 2
    apply_ln_scaling(model)
    torch.testing.assert_close(decoder_layers(model)[3].input_layernorm(hidden), expected)


def unchanged_by(model, function):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    classes, config = [type(module) for module in model.modules()], model.config.to_dict()
    with pytest.raises(ValueError, match="layer") as raised:
        function(model)
    assert [type(module) for module in model.modules()] == classes
    assert model.config.to_dict() == config
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    return str(raised.value)


@pytest.mark.parametrize("function", [fold_ln_scaling, remove_ln_scaling])
def test_a_norm_that_was_wrapped_is_refused_before_anything_changes(function):
    model = tiny.model(ln_scaling={"depths": [2, 3, 4, 5]})
    norm = decoder_layers(model)[2].input_layernorm
    norm.__class__ = type("Sharded", (type(norm),), {})
    assert "wrapped as Sharded" in unchanged_by(model, function)


@pytest.mark.parametrize("function", [fold_ln_scaling, remove_ln_scaling, apply_ln_scaling])
def test_a_model_that_accelerate_holds_is_refused_before_anything_changes(function):
    model = tiny.model(ln_scaling=function is not apply_ln_scaling)
    expected = model(tiny.tokens()).logits
    for module in model.modules():
        add_hook_to_module(module, ModelHook())
    assert "accelerate" in unchanged_by(model, function)
    assert torch.equal(model(tiny.tokens()).logits, expected)


def test_partitioned_weights_are_refused():
    model = tiny.model(ln_scaling=True)
    norm = decoder_layers(model)[1].input_layernorm
    norm.weight.data = torch.empty(0)  # as ZeRO-3 leaves it
    assert "layer 1 are not in memory" in unchanged_by(model, fold_ln_scaling)


@pytest.mark.slow
def test_a_pickled_config_brings_the_plugin_along(tmp_path):
    """As a process that is spawned gets it, which has imported nothing yet."""
    (tmp_path / "config.pkl").write_bytes(pickle.dumps(tiny.config(ln_scaling=True)))
    code = """
import pickle, sys
from transformers import LlamaForCausalLM
assert "hf_lnscale" not in sys.modules
model = LlamaForCausalLM(pickle.load(open(sys.argv[1], "rb")))
assert sys.modules["hf_lnscale"].ln_scales(model)[3] == 0.5
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "config.pkl")], check=True)


def test_new_weights_have_nothing_folded_into_them(tmp_path):
    fold_ln_scaling(tiny.model(ln_scaling=True)).save_pretrained(tmp_path)
    config = LlamaConfig.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(config, ln_scaling=True)
    assert ln_scales(model) == SCALES
    assert not hasattr(model.config, "ln_scaling_folded")


@pytest.mark.parametrize("scaling", [LNScalingConfig(1e308), LNScalingConfig(10**400), LNScalingConfig(2, [10**400])])
def test_a_scale_of_zero_is_refused(scaling):
    depths = scaling.depths and scaling.depths * 4
    with pytest.raises(ValueError, match=r"a layer a scale of zero"):
        LlamaForCausalLM(tiny.config(ln_scaling=LNScalingConfig(scaling.exponent, depths)))


def test_deepcopied_configs_are_independent(tmp_path):
    config = tiny.config()
    plain = LlamaForCausalLM(copy.deepcopy(config))
    apply_ln_scaling(LlamaForCausalLM(copy.deepcopy(config)))
    plain.save_pretrained(tmp_path)
    assert families.text_config(plain.config).ln_scaling is None
