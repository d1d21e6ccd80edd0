"""Configuration fields over depth, per_layer_config, and what a user of another family is told."""

import copy

import kinds
import pytest
import torch
import transformers as tf

import hf_lnscale
import tiny
from hf_lnscale import UnsupportedArchitectureError, propose_family
from hf_lnscale.core import families
from hf_lnscale.pruning.depth_fields import prune_config
from hf_lnscale.pruning.probe import tiny_config


@pytest.fixture
def own_table(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", families.FAMILIES.copy())
    monkeypatch.setattr("hf_lnscale.core.stack.FAMILIES", families.FAMILIES)


@pytest.mark.parametrize(
    ("model_type", "fields"), [("llama4_text", ("layer_types", "no_rope_layers")), ("ernie4_5_moe", ())]
)
def test_a_row_that_lacks_a_field_is_refused(own_table, model_type, fields):
    hf_lnscale.register_family(model_type, depth_fields=fields, overwrite=True)
    config = kinds.config(model_type)
    before = config.to_dict()
    with pytest.raises(ValueError, match=rf"no {model_type} configuration describes only layers \[.*depth_fields"):
        config.drop_layers = [0 if model_type == "ernie4_5_moe" else 1]
    assert config.to_dict() == before


def test_lists_that_nobody_named(own_table):
    config = tiny.config(layer_inter_size=[1, 2, 3, 4])
    config.drop_layers = [1]
    assert config.layer_inter_size == [1, 3, 4]
    config = tiny.config(widths=[1, 2, 3, 4])
    with pytest.raises(ValueError, match="widths has 4 entries, as many as there are layers"):
        config.drop_layers = [1]
    hf_lnscale.register_family("llama", depth_fields={"widths": "each"}, overwrite=True)
    config.drop_layers = [1]
    assert config.widths == [1, 3, 4]
    with pytest.raises(ValueError, match="'every' is not a rule; use each"):
        hf_lnscale.register_family("llama", depth_fields={"widths": "every"}, overwrite=True)


# (rule, the field of a whole model of six layers, what it is without layers 1 and 4)
RULES = [
    ("each", ["a", "b", "c", "d", "e", "f"], ["a", "c", "d", "f"]),
    ("cycle", ["a", "b", "c"], ["a", "c", "a", "c"]),
    ("first", 2, 1),
    ("first", 5, 3),
    ("last", 4, 2),
    ("indices", [0, 1, 3], [0, 2]),
    ("count", 6, 4),
    ("shared", ["full", "shared", "shared", "full", "shared", "shared"], ["full", "shared", "full", "shared"]),
    ("unset", 0, 0),
    ("period", 3, 2),
]


@pytest.mark.parametrize(("rule", "before", "after"), RULES)
def test_rules(own_table, rule, before, after):
    hf_lnscale.register_family("llama", depth_fields={"the_field": rule}, overwrite=True)
    config = tiny.config(num_hidden_layers=6, the_field=before)
    config.drop_layers = [1, 4]
    assert config.the_field == after


@pytest.mark.parametrize(
    ("rule", "value", "message"),
    [
        ("period", 2, "no period does so"),
        ("shared", ["full", "full", "shared", "full", "full", "full"], "layer 2 uses the the_field of layer 1"),
        ("unset", 3, "the_field=3, layers depend on each other"),
    ],
)
def test_what_no_value_can_say_is_refused(own_table, rule, value, message):
    hf_lnscale.register_family("llama", depth_fields={"the_field": rule}, overwrite=True)
    config = tiny.config(num_hidden_layers=6, the_field=value)
    with pytest.raises(ValueError, match=message):
        config.drop_layers = [1, 4]
    assert config.num_hidden_layers == 6


def test_per_layer_config_is_followed(tmp_path):
    kinds_of_layers = ["sliding_attention", "full_attention"] * 2
    overrides = {"1": {"head_dim": 16}, "3": {"head_dim": 16}}
    config = kinds.config("gemma4_text", layer_types=kinds_of_layers, per_layer_config=overrides)
    config.drop_layers = [0]
    assert [one.head_dim for one in config.per_layer_config] == [16, 8, 16]
    config.save_pretrained(tmp_path)
    again = tf.AutoConfig.from_pretrained(tmp_path)
    assert [one.head_dim for one in again.per_layer_config] == [16, 8, 16]


@pytest.mark.slow
def test_propose_family_gives_the_row_or_the_reason():
    model = tf.Starcoder2ForCausalLM(tf.Starcoder2Config(**tiny._BASE))
    found = propose_family(model)
    assert found.family == families.FAMILIES["starcoder2"]
    assert str(found) == "hf_lnscale.register_family('starcoder2', depth_fields=())"
    found = propose_family(tf.Olmo2ForCausalLM(tf.Olmo2Config(**tiny._BASE)))
    assert "normalizes the output of attention and MLP" in found.no_scaling
    assert str(found).endswith("layers can be dropped")
    with torch.device("meta"):
        t5, glm4v = tf.T5Model(tf.T5Config()), tf.Glm4vTextModel(tf.Glm4vTextConfig())
    assert str(propose_family(t5)) == f"t5: no row: {families.ENCODER_DECODER}"
    assert str(propose_family(glm4v)) == "hf_lnscale.register_family('glm4v_text', depth_fields=())"
    with pytest.raises(UnsupportedArchitectureError, match="Linear contains no transformers model"):
        propose_family(torch.nn.Linear(2, 2))
    with torch.device("meta"):
        blt = tf.BltForCausalLM(kinds.config("blt"))
    with pytest.raises(UnsupportedArchitectureError, match=r"it has [\d,]{13,} parameters"):
        propose_family(blt)  # the tiny one would have the twelve gigabytes of the default configuration


class MovedNorm(tf.LlamaForCausalLM):
    """A Llama whose third layer reads the residual stream past its norm."""

    def __init__(self, config):
        super().__init__(config)
        layer = self.model.layers[2]
        layer.mlp.register_forward_hook(lambda _m, _a, out: out + self.seen)
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _m, args: setattr(self, "seen", args[0]))


def test_the_probe_notices_what_reads_past_the_norm():
    found = propose_family(MovedNorm(tiny_config(tf.LlamaConfig)))
    assert found.no_scaling == families.UNEQUAL


def test_settings_with_which_norms_are_no_pre_norms():
    config = kinds.config("opt", do_layer_norm_before=False)
    with pytest.raises(UnsupportedArchitectureError, match="only with do_layer_norm_before=True, not with False"):
        config.ln_scaling = True
    prune_config(copy.deepcopy(config), [1])
