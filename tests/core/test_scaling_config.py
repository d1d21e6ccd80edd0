import json

import numpy as np
import pytest
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

import tiny
from hf_lnscale import LNScalingConfig, apply_ln_scaling


def test_default_is_the_papers_formula():
    assert LNScalingConfig().scales(9) == pytest.approx([1 / layer**0.5 for layer in range(1, 10)], abs=0, rel=1e-15)


@pytest.mark.parametrize("depths", [range(2, 6), [np.int64(depth) for depth in range(2, 6)]])
def test_numbers_of_numpy_and_ranges(depths, tmp_path):
    given = {"exponent": np.float32(0.5), "depths": depths, "warmup_steps": np.int64(8), "step": np.int64(4)}
    model = tiny.model(ln_scaling=given)
    expected = {"exponent": 0.5, "depths": [2, 3, 4, 5], "warmup_steps": 8, "schedule": "linear", "step": 4}
    assert model.config.ln_scaling == expected
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["ln_scaling"] == expected


def test_exponent_and_depths():
    assert LNScalingConfig(exponent=1, depths=[1, 4, 10]).scales(3) == [1.0, 0.25, 0.1]
    assert LNScalingConfig(exponent=0).scales(3) == [1.0, 1.0, 1.0]


WRONG = [
    ({"exponent": -0.5}, "exponent.*-0.5"),
    ({"exponent": float("nan")}, "exponent.*nan"),
    ({"exponent": float("inf")}, "exponent.*inf"),
    ({"exponent": "0.5"}, "exponent.*'0.5'"),
    ({"exponent": None}, "exponent.*None"),
    ({"exponent": True}, "exponent.*True"),
    ({"depths": [1, 2, 0, 4]}, "depths.*positive integers.*0"),
    ({"depths": [1, 2, -3, 4]}, "depths.*positive integers.*-3"),
    ({"depths": [1, 2, 2.5, 4]}, "depths.*positive integers.*2.5"),
    ({"depths": [True, 2, 3, 4]}, "depths.*positive integers.*True"),
    ({"depths": []}, "depths.*list of positive integers"),
    ({"depths": 4}, "depths.*list of positive integers.*4"),
    ({"depths": "1234"}, "depths.*list of positive integers.*'1234'"),
    ({"exponnet": 0.5}, "unknown key 'exponnet'.*exponent.*depths"),
    ("true", "ln_scaling must be True, False, a dict.*'true'"),
    (0.5, "ln_scaling must be True, False, a dict.*0.5"),
    (1, "ln_scaling must be True, False, a dict.*1"),
]


@pytest.mark.parametrize(("value", "message"), WRONG, ids=[repr(value) for value, _ in WRONG])
def test_wrong_values_are_refused_everywhere_before_weights_are_read(value, message, tmp_path):
    """The folder holds no readable weights, so any look at them would fail otherwise."""
    tiny.config().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match=message):
        LlamaForCausalLM.from_pretrained(tmp_path, ln_scaling=value)
    with pytest.raises(ValueError, match=message):
        tiny.auto_class("llama").from_pretrained(tmp_path, ln_scaling=value)
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(tmp_path, ln_scaling=value)
    with pytest.raises(ValueError, match=message):
        LlamaConfig(ln_scaling=value)
    with pytest.raises(ValueError, match=message):
        apply_ln_scaling(tiny.model(), value)


def test_depths_of_the_wrong_length(tmp_path):
    tiny.config().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    match = r"depths must have one entry per layer, 4 for this model, got 3: \[1, 2, 3\]"
    for call in (
        lambda: LlamaForCausalLM.from_pretrained(tmp_path, ln_scaling={"depths": [1, 2, 3]}),
        lambda: LlamaForCausalLM(tiny.config(ln_scaling={"depths": [1, 2, 3]})),
        lambda: apply_ln_scaling(tiny.model(), {"depths": [1, 2, 3]}),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_a_refused_value_leaves_a_model_in_memory_as_it_was():
    model = tiny.model(ln_scaling={"exponent": 1.0})
    before = json.loads(model.config.to_json_string())
    with pytest.raises(ValueError, match="depths"):
        apply_ln_scaling(model, {"depths": [1, 2, 3]})
    assert json.loads(model.config.to_json_string()) == before


def test_the_configuration_is_stored_with_its_depths(tmp_path):
    model = tiny.model(ln_scaling={"exponent": 0.25})
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["ln_scaling"] == {"exponent": 0.25, "depths": [1, 2, 3, 4]}


@pytest.mark.parametrize("value", [False, None])
def test_off_leaves_no_trace(value, tmp_path):
    tiny.config().save_pretrained(tmp_path / "plain")
    tiny.config(ln_scaling=value).save_pretrained(tmp_path / "off")
    assert (tmp_path / "off/config.json").read_bytes() == (tmp_path / "plain/config.json").read_bytes()
