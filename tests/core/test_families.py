"""Each family against the same model without the flag whose pre-norm outputs are multiplied by hooks."""

import hashlib
import json

import kinds
import pytest
import torch
import transformers as tf
from packaging.version import Version
from torch import nn

import hf_lnscale
import tiny
from hf_lnscale import UnsupportedArchitectureError, apply_ln_scaling, ln_scales, register_family
from hf_lnscale.core import families
from oracles import decoder_layers, llama_with_layernorm_scaling, with_hooked_norms

SCALES = [1.0, 2**-0.5, 3**-0.5, 0.5]


def logits_and_gradients(model: nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    output = model(tokens, labels=tokens)
    output.loss.backward()
    return output.logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(a: tuple, b: tuple, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(a[0], b[0], rtol=rtol, atol=rtol)
    assert a[1].keys() == b[1].keys()
    for name in a[1]:
        torch.testing.assert_close(a[1][name], b[1][name], rtol=rtol, atol=rtol, msg=lambda m, n=name: f"{n}: {m}")


def test_the_table_holds_every_family_that_is_tested():
    tested = {*tiny.FAMILIES, *kinds.text_kinds().values()}  # the latter in test_kinds.py
    untested = set(families.FAMILIES) - tested
    assert not untested & set(tf.CONFIG_MAPPING)
    # The table holds kinds of transformers 5.24, which older releases lack.
    assert not untested or Version(tf.__version__) < Version("5.24")


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_and_gradients_agree_with_hooks_on_the_norms(family):
    norms = tiny.FAMILIES[family][2]
    plain = tiny.model(family).double()
    scaled = tiny.model(family, ln_scaling=True).double()
    hooked = with_hooked_norms(plain, norms, SCALES)
    tokens = tiny.tokens()
    got, expected, without = (logits_and_gradients(model, tokens) for model in (scaled, hooked, plain))
    # Gemma's and Qwen3-Next's norms compute in float32 whatever the model's dtype is.
    assert_same(got, expected, rtol=1e-5 if families.FAMILIES[family].one_plus_weight else 1e-9)
    assert not torch.allclose(got[0], without[0], rtol=1e-3)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_nothing_but_the_pre_norms_is_touched(family):
    norms = tiny.FAMILIES[family][2]
    plain, scaled = tiny.model(family), tiny.model(family, ln_scaling=True)
    pre_norms = {id(layer.get_submodule(name)) for layer in decoder_layers(scaled) for name in norms}
    for (name, before), after in zip(plain.named_modules(), scaled.modules(), strict=True):
        assert isinstance(after, type(before))
        assert (type(after) is type(before)) == (id(after) not in pre_norms), name
        assert type(after).__name__ == type(before).__name__
    assert list(plain.state_dict()) == list(scaled.state_dict())
    for name, parameter in scaled.named_parameters():
        assert type(parameter) is nn.Parameter
        assert torch.equal(parameter, plain.state_dict()[name])
    assert ln_scales(scaled) == pytest.approx(SCALES, rel=1e-15)
    assert ln_scales(plain) == [1.0] * 4


def test_llama_agrees_with_the_formulas_in_float64():
    model = tiny.model(ln_scaling=True).double()
    config = json.loads(model.config.to_json_string())
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    tokens = tiny.tokens()
    expected = llama_with_layernorm_scaling(weights, config, tokens)
    got, gradients = logits_and_gradients(model, tokens)
    # transformers computes the loss, and the sum in RMSNorm, in float32.
    torch.testing.assert_close(got, expected.detach(), rtol=1e-5, atol=1e-5)
    loss = nn.functional.cross_entropy(expected[:, :-1].reshape(-1, tiny.VOCAB), tokens[:, 1:].reshape(-1))
    loss.backward()
    for name, weight in weights.items():
        torch.testing.assert_close(
            gradients[name], weight.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    "scaling", [{"exponent": 1.0}, {"depths": [1, 3, 7, 20]}, {"exponent": 0.3, "depths": [2] * 4}]
)
def test_exponent_and_depths_reach_the_norms(scaling):
    depths = scaling.get("depths", [1, 2, 3, 4])
    scales = [depth ** -scaling.get("exponent", 0.5) for depth in depths]
    hooked = with_hooked_norms(tiny.model(), tiny.LLAMA_NORMS, scales)
    torch.testing.assert_close(tiny.model(ln_scaling=scaling)(tiny.tokens()).logits, hooked(tiny.tokens()).logits)


FINGERPRINT = """
import hashlib, json, sys
import torch, tiny
torch.set_num_threads(1)
found = {}
for family in tiny.FAMILIES:
    model = tiny.model(family)
    logits = model(tiny.tokens()).logits
    found[family] = [
        hashlib.sha256(logits.detach().numpy().tobytes()).hexdigest(),
        [f"{type(m).__module__}.{type(m).__qualname__}" for m in model.modules()],
        model.config.to_json_string(),
    ]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_model_without_the_flag_is_untouched(run_python):
    """Bit-identical outputs, the same classes and the same configuration as in a process without the plugin."""
    without = json.loads(run_python(FINGERPRINT, plugin=False).splitlines()[-1])
    with_plugin = json.loads(run_python(FINGERPRINT, plugin=True).splitlines()[-1])
    assert set(without) == set(tiny.FAMILIES)
    for family in without:
        assert with_plugin[family] == without[family], family
    # The fingerprint is of something: other families have others.
    assert len({hashlib.sha256(json.dumps(entry).encode()).hexdigest() for entry in without.values()}) == len(without)


UNSUPPORTED = [
    (tf.Olmo2Config, "no pre-norm"),
    (tf.BertConfig, "Post-LN"),
    (tf.DeepseekV4Config, "no plain residual stream"),
    (tf.T5Config, "pre-norms are not known"),
    (tf.CohereConfig, "parallel"),
    (tf.CLIPConfig, "pre-norms are not known"),
]


@pytest.mark.parametrize(("config_class", "reason"), UNSUPPORTED, ids=[c.__name__ for c, _ in UNSUPPORTED])
def test_other_families_are_refused_with_the_reason_and_the_way_out(config_class, reason, tmp_path):
    with pytest.raises(
        UnsupportedArchitectureError, match=rf"(?s){config_class.model_type}.*{reason}.*register_family"
    ):
        config_class(ln_scaling=True)
    config_class().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitectureError, match=reason):
        tf.AutoConfig.from_pretrained(tmp_path, ln_scaling=True)
    assert issubclass(UnsupportedArchitectureError, ValueError)


def test_a_model_in_memory_of_another_family_is_refused():
    model = tf.Olmo2ForCausalLM(tf.Olmo2Config(**tiny._BASE))
    for function in (apply_ln_scaling, hf_lnscale.remove_ln_scaling, ln_scales, hf_lnscale.fold_ln_scaling):
        with pytest.raises(UnsupportedArchitectureError, match="olmo2"):
            function(model)


@pytest.fixture
def own_table(monkeypatch):
    others = {name: row for name, row in families.FAMILIES.items() if name not in ("starcoder2", "gpt2", "olmo")}
    monkeypatch.setattr(families, "FAMILIES", others)
    monkeypatch.setattr("hf_lnscale.core.stack.FAMILIES", others)


def test_register_family(own_table, tmp_path):
    """Starcoder2: LayerNorms with a bias, which is part of the norm's output and is scaled too."""
    config = tf.Starcoder2Config(**tiny._BASE)
    torch.manual_seed(0)
    plain = tiny.randomize_norms(tf.Starcoder2ForCausalLM(config).eval())
    with pytest.raises(UnsupportedArchitectureError, match="starcoder2"):
        apply_ln_scaling(plain)

    register_family("starcoder2")
    scaled = tf.Starcoder2ForCausalLM(tf.Starcoder2Config(**tiny._BASE, ln_scaling=True)).eval()
    scaled.load_state_dict(plain.state_dict())
    assert sum("bias" in name and "layernorm" in name for name in scaled.state_dict()) == 8
    hooked = with_hooked_norms(plain, tiny.LLAMA_NORMS, SCALES)
    assert_same(*(logits_and_gradients(m.double(), tiny.tokens()) for m in (scaled, hooked)))

    scaled.save_pretrained(tmp_path)
    reloaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    expected = reloaded(tiny.tokens()).logits
    assert ln_scales(reloaded) == pytest.approx(SCALES)
    assert torch.equal(hf_lnscale.fold_ln_scaling(reloaded)(tiny.tokens()).logits, expected)


def test_register_family_with_layers_elsewhere(own_table):
    register_family("gpt2", layers="h", attention_norm="ln_1", mlp_norm="ln_2")
    config = tf.GPT2Config(vocab_size=96, n_embd=32, n_layer=4, n_head=4, n_positions=64)
    torch.manual_seed(0)
    plain = tf.GPT2LMHeadModel(config).eval()
    torch.manual_seed(0)
    scaled = tf.AutoModelForCausalLM.from_config(config, ln_scaling=True).eval()
    hooked = with_hooked_norms(plain, ("ln_1", "ln_2"), SCALES)
    torch.testing.assert_close(scaled(tiny.tokens()).logits, hooked(tiny.tokens()).logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_type": ""}, "model_type must be a non-empty string"),
        ({"model_type": "new", "layers": None}, "layers must be a non-empty string, got None"),
        ({"model_type": "llama"}, "'llama' is already in the table"),
        ({"model_type": "new", "attention_norm": "n", "mlp_norm": "n"}, "both 'n'"),
        ({"model_type": "new", "one_plus_weight": "yes"}, "one_plus_weight.*'yes'"),
    ],
)
def test_register_family_refuses(own_table, arguments, message):
    with pytest.raises(ValueError, match=message):
        register_family(**arguments)


def test_a_row_whose_norms_do_not_exist(own_table):
    register_family("starcoder2", mlp_norm="ffn_norm")
    with pytest.raises(
        UnsupportedArchitectureError, match="'ffn_norm' of layer 0 is missing in Starcoder2DecoderLayer"
    ):
        tf.Starcoder2ForCausalLM(tf.Starcoder2Config(**tiny._BASE, ln_scaling=True))


def test_a_norm_without_weight(own_table):
    register_family("olmo")
    with pytest.raises(UnsupportedArchitectureError, match="has no weight"):
        tf.OlmoForCausalLM(tf.OlmoConfig(**tiny._BASE, ln_scaling=True))
