"""The plugin's keys in a configuration: edited by hand, copied, changed in the number of layers, and kept private."""

import copy
import json
import pickle
import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import hf_lnscale
import tiny
from hf_lnscale.checkpoints.export import export

DEFAULT = {"exponent": 0.5, "depths": [1, 2, 3, 4]}
SCALES = pytest.approx([1.0, 2**-0.5, 3**-0.5, 0.5], rel=1e-15)


@pytest.fixture
def edited(tmp_path):
    """A plain checkpoint of four layers with unreadable weights; called with keys, writes them into its config.json."""
    tiny.config().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    plain = json.loads((tmp_path / "config.json").read_text())

    def edit(**keys):
        (tmp_path / "config.json").write_text(json.dumps(plain | keys))
        return tmp_path

    return edit


NOT_DROPPED = [1, "abc", {}, [], [99], "01", [1, 1], True, {"layers": [1]}, {"num_hidden_layers": 5}]
NOT_DROPPED += [
    {"layers": layers, "num_hidden_layers": 5} for layers in (1, "1", [5], [-1], [1, 1], [True], [1.0], [{}])
]
NOT_DROPPED += [{"layers": [0], "num_hidden_layers": 1}, {"layers": [0], "num_hidden_layers": "5"}]
NOT_DROPPED += [{"layers": [0], "num_hidden_layers": 5, "base": 3}]
NOT_DROPPED += [
    {"layers": [0], "num_hidden_layers": 5, kind: value} for kind in ("attention", "mlp") for value in (1, [0])
]
NOT_DROPPED += [{"layers": [0], "num_hidden_layers": 5, "attention": [1], "mlp": [1]}]


@pytest.mark.parametrize("value", NOT_DROPPED, ids=repr)
def test_dropped_layers_edited_by_hand(value, edited):
    message = rf"^dropped_layers in .* must look like .*, got {re.escape(repr(value))}$"
    for load in (AutoConfig, AutoModelForCausalLM, LlamaConfig):
        with pytest.raises(ValueError, match=message):
            load.from_pretrained(edited(dropped_layers=value))


def test_dropped_layers_that_do_not_fit_the_number_of_layers(edited):
    path = edited(dropped_layers={"layers": [1], "num_hidden_layers": 6, "base": ""})
    with pytest.raises(
        ValueError, match=r"dropped_layers.*'layers': \[1\].*leaves 5 layers, but num_hidden_layers is 4"
    ):
        AutoModelForCausalLM.from_pretrained(path)


WRONG = [
    ("x", "must be True, False, a dict.*'x'"),
    (3, "must be True, False, a dict.*3"),
    ([], r"must be True, False, a dict.*\[\]"),
    ({"exponnet": 1}, "unknown key 'exponnet'.*the keys are"),
    ({"depths": [1, 2]}, None),  # the default, for whatever number of layers
    ({"depths": [1, 3]}, r"one entry per layer, 4 for this model, got 2: \[1, 3\]"),
]


@pytest.mark.parametrize(("value", "message"), WRONG, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("key", ["ln_scaling", "ln_scaling_folded"])
def test_scaling_edited_by_hand(key, value, message, edited):
    if message is None:
        assert AutoConfig.from_pretrained(edited(**{key: value})).model_type == "llama"
        return
    with pytest.raises(ValueError, match=rf"^{key}\b.*{message}"):
        AutoModelForCausalLM.from_pretrained(edited(**{key: value}))


def test_active_and_folded_at_once_is_refused(edited):
    with pytest.raises(ValueError, match="both ln_scaling and ln_scaling_folded"):
        AutoConfig.from_pretrained(edited(ln_scaling=True, ln_scaling_folded=True))


@pytest.mark.parametrize("value", [True, {}, {"exponent": 0.5}, {"depths": [1, 2, 3, 4]}], ids=repr)
def test_switched_on_by_hand(value, tmp_path, recwarn):
    model = tiny.model()
    model.save_pretrained(tmp_path)
    plain = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(plain | {"ln_scaling": value}))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert hf_lnscale.ln_scales(loaded) == SCALES
    expected = hf_lnscale.apply_ln_scaling(model)(tiny.tokens()).logits
    assert torch.equal(loaded(tiny.tokens()).logits, expected)
    assert not [one for one in recwarn if "ln_scaling" in str(one.message)]  # the file says so: not a cold switch
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["model_type"] == "hf_lnscale_llama"


@pytest.mark.parametrize("family", ["llama", "qwen3_vl_text"])
def test_private_state_is_not_shown(family, tmp_path):
    """What the checkpoint said is kept in memory; a loaded configuration shows what the saved one showed."""
    model = tiny.model(family, ln_scaling=True)
    model.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    for config in (loaded, loaded.get_text_config()):
        shown = [repr(config), config.to_json_string(use_diff=False), str(config.to_dict()), str(config.to_diff_dict())]
        assert not [text for text in shown if "on_disk" in text]
    ours, theirs = loaded.to_dict(), model.config.to_dict()
    assert {key for key in ours if ours[key] != theirs[key]} == {"_name_or_path"}


def test_private_state_is_not_read_from_or_written_to_a_file(edited, tmp_path):
    path = edited(_ln_scaling_on_disk={"exponent": 0.5, "depths": [1, 2, 3, 4]})
    config = AutoConfig.from_pretrained(path)
    assert not hasattr(config, "_ln_scaling_on_disk")
    tiny.model(ln_scaling=True).save_pretrained(tmp_path / "scaled")
    export(tmp_path / "scaled", tmp_path / "folded", progress=False)
    AutoModelForCausalLM.from_pretrained(tmp_path / "scaled").save_pretrained(tmp_path / "again")
    for name in ("folded", "again"):
        assert "on_disk" not in (tmp_path / name / "config.json").read_text()


def test_a_copy_made_of_the_dict_is_no_cold_switch(tmp_path, recwarn):
    """Libraries copy configurations through `to_dict`, which does not hold what the checkpoint said."""
    tiny.model(ln_scaling=True).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    for model in (
        AutoModelForCausalLM.from_pretrained(tmp_path, config=LlamaConfig.from_dict(config.to_dict())),
        AutoModelForCausalLM.from_pretrained(tmp_path, config=LlamaConfig(**config.to_dict())),
    ):
        assert hf_lnscale.ln_scales(model) == SCALES
    assert not [one for one in recwarn if "ln_scaling" in str(one.message)]


def test_default_depths_follow_the_number_of_layers(tmp_path, recwarn):
    tiny.model(ln_scaling=True).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    shorter = copy.deepcopy(loaded)
    shorter.num_hidden_layers = 1
    longer = LlamaConfig(**{**loaded.to_dict(), "num_hidden_layers": 6})
    assert shorter.ln_scaling == {"exponent": 0.5, "depths": [1]}
    assert hf_lnscale.ln_scales(AutoModelForCausalLM.from_config(shorter)) == [1.0]
    assert hf_lnscale.ln_scales(AutoModelForCausalLM.from_config(longer))[4:] == [5**-0.5, 6**-0.5]
    model = AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2)
    assert hf_lnscale.ln_scales(model) == [1.0, 2**-0.5]
    assert not [one for one in recwarn if "ln_scaling" in str(one.message)]
    assert loaded.ln_scaling == DEFAULT


@pytest.mark.slow
def test_a_folded_config_is_unpickled_without_the_plugin(tmp_path, run_python):
    folded = hf_lnscale.fold_ln_scaling(tiny.model(ln_scaling=True))
    (tmp_path / "config.pkl").write_bytes(pickle.dumps(folded.config))
    code = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb')).ln_scaling_folded['depths'])"
    assert run_python(code, tmp_path / "config.pkl", plugin=False).strip() == "[1, 2, 3, 4]"
