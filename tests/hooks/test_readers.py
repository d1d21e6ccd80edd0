"""Programs that read weights by the names of tensors, build layers from a configuration, or average models.

Each is run as its users do; the oracle is a model whose layers are deleted by hand, or a formula.
"""

import copy
import gc
import pickle
import types

import accelerate
import accelerate.utils.modeling
import bitsandbytes
import peft
import pytest
import torch
from accelerate.commands import estimate
from datasets import Dataset
from peft import (
    LNTuningConfig,
    LoraConfig,
    LoraGAConfig,
    PeftModel,
    get_peft_model,
    preprocess_loraga,
    replace_lora_weights_loftq,
)
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from safetensors.torch import load_model
from torch.distributed import checkpoint as distributed
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.trainer_utils import load_sharded_checkpoint
from trl import BEMACallback, DPOConfig, DPOTrainer

import hf_lnscale
import tiny
from hf_lnscale.measuring.sample import documents, train_tokenizer
from hf_lnscale.training import LNScalingWarmupCallback

CUT = "Matched by index, weights would be loaded into the wrong layers"
KEPT = [0, 2, 3]


@pytest.fixture
def whole(tmp_path):
    tiny.model(hidden_size=64, head_dim=16).save_pretrained(tmp_path / "whole", max_shard_size="100KB")
    tiny.model(hidden_size=64, head_dim=16).save_pretrained(tmp_path / "one file")
    return tmp_path / "whole"


def cut_by_hand(folder):
    """The oracle: a plain model of which a layer is deleted."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    del model.model.layers[1]
    return model


def cut(folder, **flags):
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), drop_layers=[1], **flags)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- accelerate, safetensors, load_state_dict ------------------------------------------------------------------------


def with_map(model, path):
    accelerate.load_checkpoint_and_dispatch(model, path, device_map={"": "cpu"})


def from_shards(model, path):
    load_sharded_checkpoint(model, str(path), strict=False)


LOADERS = {
    "dispatch with a device map": with_map,
    "dispatch": accelerate.load_checkpoint_and_dispatch,
    "accelerate": lambda model, path: accelerate.load_checkpoint_in_model(model, path, device_map={"": "cpu"}),
    "accelerate.utils": lambda model, path: accelerate.utils.load_checkpoint_in_model(model, str(path), {"": "cpu"}),
    "accelerate.utils.modeling": lambda model, path: accelerate.utils.modeling.load_checkpoint_in_model(
        model, path / "model.safetensors.index.json", {"": "cpu"}
    ),
    "one file": lambda model, path: with_map(model, str(path.parent / "one file/model.safetensors")),
    "safetensors": lambda model, path: load_model(model, path.parent / "one file/model.safetensors", strict=False),
    "load_state_dict": lambda model, path: model.load_state_dict(
        AutoModelForCausalLM.from_pretrained(path).state_dict(), strict=False
    ),
    "load_sharded_checkpoint": from_shards,
}


@pytest.mark.slow
@pytest.mark.parametrize("how", LOADERS)
def test_the_whole_models_weights_are_refused_by_a_cut_one(how, whole):
    model = cut(whole)
    with pytest.raises(ValueError, match=f"{CUT}.*drop_layers=\\[1\\]"):
        LOADERS[how](model, whole)


@pytest.mark.slow
@pytest.mark.parametrize("how", LOADERS)
def test_a_cut_models_own_weights_are_loaded(how, whole, tmp_path):
    expected = AutoModelForCausalLM.from_pretrained(whole, drop_layers=[1])
    (tmp_path / "own").mkdir()
    expected.save_pretrained(tmp_path / "own/whole", max_shard_size="100KB")
    expected.save_pretrained(tmp_path / "own/one file")
    model = cut(whole)
    LOADERS[how](model, tmp_path / "own/whole")
    assert equal(weights(model), weights(expected))
    assert equal(weights(model), weights(cut_by_hand(whole)))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_weights_without_a_configuration_beside_them(file, whole, tmp_path):
    state = AutoModelForCausalLM.from_pretrained(whole).state_dict()
    (tmp_path / "alone").mkdir()
    if file.endswith(".bin"):
        torch.save(state, tmp_path / "alone" / file)
    else:
        (tmp_path / "one file" / file).rename(tmp_path / "alone" / file)
    model = cut(whole)
    before = weights(model)
    with pytest.raises(ValueError, match=CUT):
        with_map(model, tmp_path / "alone")
    assert equal(weights(model), before)


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: get_peft_model(model, LoraConfig())])
def test_every_wrapper_and_every_part_of_the_state(wrap, whole):
    """Also LoRA's own weights alone, as set_peft_model_state_dict loads them."""
    model, other = wrap(cut(whole)), wrap(AutoModelForCausalLM.from_pretrained(whole))
    for part in ("", "lora", "mlp"):
        state = {name: tensor for name, tensor in other.state_dict().items() if part in name}
        if not state:
            continue
        with pytest.raises(ValueError, match=CUT):
            model.load_state_dict(state, strict=False)
    model.load_state_dict(model.state_dict())


@pytest.mark.skipif(not hasattr(peft, "set_base_model_state_dict"), reason="an older PEFT")
@pytest.mark.parametrize("module", [peft, peft.utils, peft.utils.save_and_load], ids=lambda module: module.__name__)
def test_the_state_of_a_base_that_peft_translates(module, whole):
    """With strict=False; PEFT has left out the layer that the cut model lacks before it loads the state."""
    model = get_peft_model(cut(whole), LoraConfig(target_modules=["q_proj"]))
    before = weights(model)
    for keep_metadata in (True, False):
        state = AutoModelForCausalLM.from_pretrained(whole).state_dict()
        with pytest.raises(ValueError, match=CUT):
            module.set_base_model_state_dict(model, state if keep_metadata else dict(state), strict=False)
    other = AutoModelForCausalLM.from_pretrained(whole, drop_layers=[2])
    with pytest.raises(ValueError, match="belongs to a model of 4 layers without layers 2"):
        module.set_base_model_state_dict(model, other.state_dict())
    assert equal(weights(model), before)
    own = AutoModelForCausalLM.from_pretrained(whole, drop_layers=[1])
    module.set_base_model_state_dict(model, own.state_dict())
    assert torch.equal(model(tiny.tokens()).logits, own(tiny.tokens()).logits)


def accelerated(folder, *models, load=False):
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.prepare(*models)
    (accelerator.load_state if load else accelerator.save_state)(str(folder))
    accelerator.free_memory()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["scaled", "another step of the warmup", "cut", "without attention", "plain"])
def test_the_state_of_a_loop_of_accelerate(case, tmp_path):
    there, here = RIGHT[case]
    saved, model = build(0, **there), build(1, **here)
    accelerated(tmp_path, saved)
    accelerated(tmp_path, model, load=True)
    assert equal(weights(model), weights(saved))
    assert (tmp_path / "hf_lnscale.json").exists() == (case != "plain")


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["a scale, into a plain model", "another exponent", "another layer", "another attention"]
)
def test_the_state_of_a_loop_of_accelerate_for_another_model_is_refused(case, tmp_path):
    there, here = WRONG[case]
    accelerated(tmp_path, build(2), build(0, **there))
    models = build(2), build(1, **here)
    before = weights(models[1])
    with pytest.raises(ValueError, match=r"the weights in .* were saved by a model with .*but this"):
        accelerated(tmp_path, *models, load=True)
    assert equal(weights(models[1]), before)
    for text in ("[", "[1]", "{}", "[1, 2]", '["[]", 3]'):
        (tmp_path / "hf_lnscale.json").write_text(text)
        with pytest.raises(ValueError, match=r"hf_lnscale\.json"):
            accelerated(tmp_path, *models, load=True)
    accelerated(tmp_path, build(3), build(4))  # plain ones over it
    accelerated(tmp_path, build(5), build(6), load=True)


OTHER_STATES = {
    "another layer": ({"layers": [2]}, {"layers": [1]}, "without layers 2, .*has 4, without layers 1"),
    "a layer more": ({"layers": [1, 2]}, {"layers": [1]}, "without layers 1, 2, .*has 4, without layers 1"),
    "another attention": ({"attention": [2]}, {"attention": [1]}, "without attention of layers 2"),
    "the other part": ({"attention": [1]}, {"mlp": [1]}, "without attention of layers 1.* without MLPs of layers 1"),
    "a layer, into a whole model": ({"layers": [1]}, {}, "without layers 1, .*has 4, all present"),
    "attention, into a whole model": ({"attention": [1]}, {}, "without attention of layers 1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHER_STATES)
@pytest.mark.parametrize("through_a_file", [False, True])
def test_the_state_of_a_model_that_lacks_others_is_refused(case, through_a_file, tmp_path):
    there, here, message = OTHER_STATES[case]
    state = hf_lnscale.drop_layers(tiny.model(), **there).state_dict()
    if through_a_file:
        torch.save(state, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
    model = hf_lnscale.drop_layers(tiny.model(seed=1), **here)
    with pytest.raises(ValueError, match=f"the state_dict belongs to a model of 4 layers {message}"):
        model.load_state_dict(state, strict=False)


def test_the_state_of_a_model_that_lacks_less_is_loaded():
    """Layers have the same numbers, and what is missing is left out."""
    less = hf_lnscale.drop_layers(tiny.model(), [0], attention=[1])
    more = hf_lnscale.drop_layers(tiny.model(seed=1), [0], attention=[1], mlp=[3])
    assert not more.load_state_dict(less.state_dict(), strict=False).missing_keys
    assert equal(weights(more), weights(hf_lnscale.drop_layers(less, mlp=[2])))
    # A model of as many layers that does not say where they are from.
    plain = AutoModelForCausalLM.from_config(tiny.config(num_hidden_layers=3))
    plain.load_state_dict(hf_lnscale.drop_layers(tiny.model(), [0]).state_dict())


@pytest.mark.slow
def test_a_plain_model_loads_what_it_always_has(whole):
    """Promise 1: a model of three layers without a record takes the first three layers of any state."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(whole, num_hidden_layers=3))
    state = AutoModelForCausalLM.from_pretrained(whole).state_dict()
    assert len(model.load_state_dict(state, strict=False).unexpected_keys) == 9
    with_map(model, whole)
    assert torch.equal(model.model.layers[2].mlp.up_proj.weight, state["model.layers.2.mlp.up_proj.weight"])


@pytest.mark.slow
def test_a_cold_scale_is_warned_of(whole, recwarn):
    with_map(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(whole), ln_scaling=True), whole)
    assert sum("enabled for" in str(warning.message) for warning in recwarn) == 1


@pytest.mark.slow
def test_an_accelerate_that_is_not_as_the_hook_knows_it(run_python, whole):
    code = """
    import sys, accelerate, accelerate.big_modeling
    original = accelerate.big_modeling.load_checkpoint_in_model
    def load_checkpoint_in_model(net, checkpoint, *args, **kwargs):
        return original(net, checkpoint, *args, **kwargs)
    accelerate.big_modeling.load_checkpoint_in_model = load_checkpoint_in_model
    import hf_lnscale
    from transformers import AutoConfig, AutoModelForCausalLM
    config = AutoConfig.from_pretrained(sys.argv[1])
    accelerate.load_checkpoint_and_dispatch(AutoModelForCausalLM.from_config(config), sys.argv[1], {"": "cpu"})
    try:
        model = AutoModelForCausalLM.from_config(config, drop_layers=[1])
        accelerate.load_checkpoint_and_dispatch(model, sys.argv[1], {"": "cpu"})
    except hf_lnscale.UnsupportedTransformersError as error:
        print(error)
    del sys.modules["hf_lnscale"]
    """
    assert "load_checkpoint_in_model has the parameters net, checkpoint" in run_python(code, whole, plugin=False)


@pytest.mark.slow
def test_accelerate_without_transformers_stays_without(run_python):
    code = "import sys, hf_lnscale, accelerate; print('transformers.modeling_utils' in sys.modules)"
    assert run_python(code, plugin=True).strip() == "False"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("missing", "problem"),
    [
        ("accelerate.accelerator.Accelerator.save_model", "Accelerator.save_model is missing"),
        ("accelerate.utils.fsdp_utils._distributed_checkpoint_to_merged_weights", ""),  # private: only a mark is lost
    ],
)
def test_an_accelerate_that_lacks_a_function_is_imported_without_transformers(missing, problem, run_python):
    code = f"""
    import sys, accelerate.utils.fsdp_utils
    del {missing}
    import hf_lnscale
    from hf_lnscale.hooks.install import problems
    print(*problems.get("accelerate", []))
    print("transformers" in sys.modules)
    del sys.modules["hf_lnscale"]
    """
    assert run_python(code, plugin=False).splitlines() == [problem, "False"]


def test_a_scaled_checkpoint_read_by_a_plain_model_is_warned_of(tmp_path, recwarn):
    tiny.model(ln_scaling=True).save_pretrained(tmp_path)
    with_map(tiny.model(), tmp_path)
    assert sum("disabled for" in str(warning.message) for warning in recwarn) == 1


def test_a_checkpoint_without_a_sublayer_is_refused_by_a_model_that_has_it(tmp_path):
    hf_lnscale.drop_layers(tiny.model(), attention=[1]).save_pretrained(tmp_path)
    for model in (tiny.model(), hf_lnscale.drop_layers(tiny.model(), mlp=[1])):
        with pytest.raises(ValueError, match=r"drop_attention: the checkpoint .* has no attention in layers \[1\]"):
            with_map(model, tmp_path)
    own = hf_lnscale.drop_layers(tiny.model(seed=1), attention=[1])
    with_map(own, tmp_path)
    assert torch.equal(own(tiny.tokens()).logits, AutoModelForCausalLM.from_pretrained(tmp_path)(tiny.tokens()).logits)


@pytest.mark.parametrize("flags", [{}, {"ln_scaling": True}, {"drop_layers": [1]}, {"drop_attention": [1]}])
def test_the_memory_that_accelerate_estimates(flags, tmp_path, monkeypatch):
    """It asks the Hub what library a model is of, reads the configuration by its name, and counts an empty model."""
    model = AutoModelForCausalLM.from_config(tiny.config(), **flags)
    model.save_pretrained(tmp_path)
    known = types.SimpleNamespace(config={}, library_name="transformers")
    monkeypatch.setattr(estimate, "verify_on_hub", lambda name, token: known)
    arguments = estimate.estimate_command_parser().parse_args([str(tmp_path), "--dtypes", "float32"])
    (_, _, total, _), *_ = estimate.gather_data(arguments)
    held = [*model.model.parameters(), *model.model.buffers()]
    assert total == sum(4 * tensor.numel() for tensor in held)


# --- torch.distributed.checkpoint ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("state", [lambda model: {"model": model.state_dict()}, lambda model: model.model.state_dict()])
def test_a_distributed_checkpoint_of_the_whole_model_is_refused_by_a_cut_one(state, whole, tmp_path):
    original = AutoModelForCausalLM.from_pretrained(whole)
    named = state(original)
    distributed.save(named, checkpoint_id=tmp_path / "stored")
    model = cut(whole)
    before = weights(model)
    with pytest.raises(distributed.CheckpointException, match=rf"has a layer 3, .*{CUT}.*drop_layers=\[1\]"):
        distributed.load(state(model), checkpoint_id=tmp_path / "stored")
    assert equal(weights(model), before)
    # Whoever reads another model meanwhile may.
    other = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(whole))
    distributed.load(state(other), checkpoint_id=tmp_path / "stored")
    assert equal(weights(other.model), weights(original.model))


def test_a_distributed_checkpoint_of_a_cut_model_is_loaded(whole, tmp_path):
    expected = AutoModelForCausalLM.from_pretrained(whole, drop_layers=[1])
    distributed.save({"model": expected.state_dict()}, checkpoint_id=tmp_path / "stored")
    model = cut(whole)
    distributed.load({"model": model.state_dict()}, checkpoint_id=tmp_path / "stored")
    assert equal(weights(model), weights(cut_by_hand(whole)))


def test_a_plain_model_reads_the_first_layers_of_a_distributed_checkpoint(whole, tmp_path):
    """Promise 1, as for load_state_dict."""
    original = AutoModelForCausalLM.from_pretrained(whole)
    distributed.save(original.state_dict(), checkpoint_id=tmp_path / "stored")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(whole, num_hidden_layers=2))
    distributed.load(model.state_dict(), checkpoint_id=tmp_path / "stored")
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, original.model.layers[1].mlp.up_proj.weight)


IN_WARMUP = {"warmup_steps": 4, "step": 1}
# What is saved and what then reads it; right are those that do the same with the same weights.
RIGHT = {
    "plain": ({}, {}),
    "scaled": ({"ln_scaling": True}, {"ln_scaling": True}),
    "another step of the warmup": ({"ln_scaling": IN_WARMUP}, {"ln_scaling": {**IN_WARMUP, "step": 3}}),
    "after the warmup": ({"ln_scaling": {"warmup_steps": 4, "step": 4}}, {"ln_scaling": True}),
    "cut": ({"drop_layers": [1]}, {"drop_layers": [1]}),
    "without attention": ({"drop_attention": [1]}, {"drop_attention": [1]}),
}
WRONG = {
    "a scale, into a plain model": ({"ln_scaling": True}, {}),
    "another exponent": ({"ln_scaling": True}, {"ln_scaling": {"exponent": 0.3}}),
    "other depths": ({"ln_scaling": True}, {"ln_scaling": {"depths": [1, 1, 2, 2]}}),
    "in a warmup, into one without": ({"ln_scaling": IN_WARMUP}, {"ln_scaling": True}),
    "another warmup": ({"ln_scaling": IN_WARMUP}, {"ln_scaling": {"warmup_steps": 9, "step": 1}}),
    "another layer": ({"drop_layers": [1]}, {"drop_layers": [2]}),
    "a layer, into a plain model": ({"drop_layers": [1]}, {"num_hidden_layers": 3}),
    "another attention": ({"drop_attention": [1]}, {"drop_attention": [2]}),
    "scaled, of other layers": (
        {"ln_scaling": True, "drop_layers": [1]},
        {"ln_scaling": True, "drop_layers": [2]},
    ),
}
# How a state is taken: the model's own tensors, or copies of them (as accelerate's SHARDED_STATE_DICT takes it).
STATES = {
    "state_dict": lambda model: model.state_dict(),
    "nested": lambda model: {"model": model.state_dict(), "step": 3},
    "get_model_state_dict": lambda model: {"model": get_model_state_dict(model)},
    "copies": lambda model: {"model": get_model_state_dict(model, options=StateDictOptions(cpu_offload=True))},
    "full": lambda model: get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)),
    "the decoder": lambda model: model.model.state_dict(),
}


@pytest.fixture
def nothing_else_in_memory():
    """Models of other tests are hidden from the collector, which is asked for the models in memory."""
    gc.freeze()
    yield
    gc.unfreeze()


def build(seed, num_hidden_layers=4, **flags):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny.config(num_hidden_layers=num_hidden_layers), **flags)


@pytest.mark.parametrize(
    ("case", "state"), [*((case, "nested") for case in RIGHT), *(("scaled", state) for state in STATES)]
)
def test_a_distributed_checkpoint_of_a_model_of_the_same_kind(case, state, tmp_path, nothing_else_in_memory):
    there, here = RIGHT[case]
    saved = build(0, **there)
    distributed.save(STATES[state](saved), checkpoint_id=tmp_path / "stored")
    model = build(1, **here)
    read = STATES[state](model)
    distributed.load(read, checkpoint_id=tmp_path / "stored")
    read = read.get("model", read)
    expected = saved.model.state_dict() if state == "the decoder" else saved.state_dict()
    assert equal(dict(read), dict(expected))


@pytest.mark.parametrize(
    ("case", "state"), [*((case, "nested") for case in WRONG), *(("another exponent", state) for state in STATES)]
)
def test_a_distributed_checkpoint_of_another_kind_of_model_is_refused(case, state, tmp_path, nothing_else_in_memory):
    there, here = WRONG[case]
    saved = build(0, **there)
    distributed.save(STATES[state](saved), checkpoint_id=tmp_path / "stored")
    del saved
    gc.collect()
    model = build(1, **here)
    before = weights(model)
    with pytest.raises(distributed.CheckpointException, match=r"the checkpoint was saved by a model with .*but this"):
        distributed.load(STATES[state](model), checkpoint_id=tmp_path / "stored")
    assert equal(weights(model), before)


def test_a_plain_model_beside_a_scaled_one(tmp_path):
    """A checkpoint belongs to the model whose tensors are given, whatever else is in memory."""
    scaled, plain = build(0, ln_scaling=True), build(1)
    distributed.save(scaled.state_dict(), checkpoint_id=tmp_path / "scaled")
    distributed.save(plain.state_dict(), checkpoint_id=tmp_path / "plain")
    distributed.load(scaled.state_dict(), checkpoint_id=tmp_path / "scaled")
    distributed.load(plain.state_dict(), checkpoint_id=tmp_path / "plain")
    with pytest.raises(distributed.CheckpointException, match="saved by a model with"):
        distributed.load(plain.state_dict(), checkpoint_id=tmp_path / "scaled")


def test_the_distributed_checkpoint_of_a_plain_model_is_as_without_the_plugin(tmp_path, nothing_else_in_memory):
    """Promise 1; and one of a scaled model is read without the plugin, and converted by torch with it."""
    plain, scaled = build(0), build(0, ln_scaling=True)
    for name, model in (("plain", plain), ("scaled", scaled)):
        distributed.save({"model": model.state_dict()}, checkpoint_id=tmp_path / name)
    files = [distributed.FileSystemReader(tmp_path / name).read_metadata() for name in ("plain", "scaled")]
    assert files[1].planner_data.pop("hf_lnscale")
    assert files[0].planner_data == files[1].planner_data
    assert "hf_lnscale" not in files[0].planner_data
    del scaled
    gc.collect()
    dcp_to_torch_save(tmp_path / "scaled", tmp_path / "converted.pt")
    assert equal(torch.load(tmp_path / "converted.pt")["model"], weights(plain))


# What reads weights that say no scale, as those of a plain model do, and whether they may have been trained without it.
UNMARKED = {
    "scaled": ({"ln_scaling": True}, True),
    "in a warmup": ({"ln_scaling": IN_WARMUP}, True),
    "folded": ({"ln_scaling": True}, True),
    "at the start of a warmup": ({"ln_scaling": {"warmup_steps": 4}}, False),
    "plain": ({}, False),
}


@pytest.mark.parametrize("case", UNMARKED)
@pytest.mark.parametrize("how", ["torch", "accelerate"])
def test_weights_of_a_plain_model_are_warned_of_by_a_scaled_one(how, case, tmp_path, recwarn, nothing_else_in_memory):
    """As from_pretrained(..., ln_scaling=True) does of a plain checkpoint: it loads, and is a cold switch."""
    flags, warned = UNMARKED[case]
    plain = build(0)
    if how == "torch":
        distributed.save(plain.state_dict(), checkpoint_id=tmp_path)
    else:
        accelerated(tmp_path, plain)
    expected = weights(plain)
    del plain
    gc.collect()
    model = build(1, **flags)
    if case == "folded":
        hf_lnscale.fold_ln_scaling(model)
    if how == "torch":
        distributed.load(model.state_dict(), checkpoint_id=tmp_path)
    else:
        accelerated(tmp_path, model, load=True)
    assert equal(weights(model), expected)
    said = [warning for warning in recwarn if "saved by a model with no recorded scale" in str(warning.message)]
    assert [warning.filename for warning in said] == [__file__] * warned


# A scale in the metadata of a state_dict, and whether the model that reads it does the same with trained weights.
OTHER_SCALES = {
    "the same": ({"ln_scaling": True}, {"ln_scaling": True}, False),
    "another step of the warmup": (*RIGHT["another step of the warmup"], False),
    "another exponent": (*WRONG["another exponent"], True),
    "into a plain model": ({"ln_scaling": True}, {}, True),
    "a plain model's, which has no metadata": ({}, {"ln_scaling": True}, False),
    "scaled and cut": ({"ln_scaling": True, "drop_layers": [1]}, {"drop_layers": [1]}, True),
}


@pytest.mark.parametrize("case", OTHER_SCALES)
@pytest.mark.parametrize("through_a_file", [False, True])
def test_a_state_of_another_scale_is_warned_of(case, through_a_file, tmp_path, recwarn):
    """And loaded: models that are compared may start from the same weights, which were never trained."""
    there, here, warned = OTHER_SCALES[case]
    saved, model = build(0, **there), build(1, **here)
    state = saved.state_dict()
    if through_a_file:
        torch.save(state, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
    get_peft_model(model, LoraConfig()).base_model.model.load_state_dict(state, strict=False)
    said = [warning for warning in recwarn if "the state_dict was saved by a model with {" in str(warning.message)]
    assert [warning.filename for warning in said] == [__file__] * warned


def test_the_state_of_a_model_before_it_was_folded_is_warned_of(recwarn):
    model = build(0, ln_scaling=True)
    before = copy.deepcopy(model.state_dict())
    hf_lnscale.fold_ln_scaling(model).load_state_dict(before)
    assert sum('ln_scaling_folded": {"depths": [1, 2, 3, 4]' in str(warning.message) for warning in recwarn) == 1


# --- lm-eval ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deltas(tmp_path_factory):
    """A model and the difference to another, each whole and without a layer, scaled and folded."""
    folder = tmp_path_factory.mktemp("deltas")
    tokenizer = train_tokenizer(documents(standard_library=False), 300)
    for seed, name in enumerate(("base", "delta")):
        size = {"vocab_size": len(tokenizer), "max_position_embeddings": 64}
        model = tiny.model(seed=seed, **size)
        model.save_pretrained(folder / name)
        hf_lnscale.drop_layers(model, [1]).save_pretrained(folder / f"cut {name}")
        scaled = tiny.model(seed=seed, ln_scaling=True, **size)
        scaled.save_pretrained(folder / f"scaled {name}")
        hf_lnscale.fold_ln_scaling(scaled).save_pretrained(folder / f"folded {name}")
        partial = hf_lnscale.drop_layers(tiny.model(seed=seed, **size), attention=[1])
        partial.save_pretrained(folder / f"partial {name}")
    for path in folder.iterdir():
        tokenizer.save_pretrained(path)
    return folder


def with_delta(folder, base, delta, **flags):
    lm_eval = pytest.importorskip("lm_eval.models.huggingface")
    names = {"pretrained": str(folder / base), "delta": str(folder / delta)}
    return lm_eval.HFLM(**names, device="cpu", dtype="float32", **flags).model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "delta", "flags"),
    [
        ("base", "delta", {"drop_layers": [1]}),
        ("cut base", "cut delta", {}),
        ("scaled base", "scaled delta", {}),
        ("partial base", "partial delta", {}),
        ("partial base", "delta", {}),
    ],
)
def test_the_delta_of_lm_eval_is_added_layer_by_layer(base, delta, flags, deltas):
    found = with_delta(deltas, base, delta, **flags)
    both = [AutoModelForCausalLM.from_pretrained(deltas / name).state_dict() for name in (base, delta)]
    wanted = AutoModelForCausalLM.from_pretrained(deltas / base)
    wanted.load_state_dict({name: both[0][name] + both[1][name] for name in both[0]})  # all that the model has
    if flags:
        del wanted.model.layers[1]
    assert equal(weights(found), weights(wanted))


@pytest.mark.parametrize(
    ("base", "delta"),
    [("cut base", "delta"), ("base", "cut delta"), ("folded base", "scaled delta"), ("folded base", "delta")],
)
def test_a_delta_of_other_layers_or_scale_is_refused(base, delta, deltas):
    with pytest.raises(ValueError, match=r"delta .* belong to different layers or scales"):
        with_delta(deltas, base, delta)


def test_a_delta_that_lacks_a_sublayer_is_refused(deltas):
    with pytest.raises(ValueError, match=r"delta .* lacks the attention of layers \[1\], which the model has"):
        with_delta(deltas, "base", "partial delta")


# --- mergekit --------------------------------------------------------------------------------------------------------


def merging(folder, *names, **more):
    config = pytest.importorskip("mergekit.config")
    merge = pytest.importorskip("mergekit.merge")
    models = [{"model": str(folder / name), "parameters": {"weight": 0.5}} for name in names]
    plan = {"merge_method": "linear", "dtype": "float32", **({"models": models} if models else {}), **more}
    options = merge.MergeOptions(copy_tokenizer=False, write_model_card=False)
    merge.run_merge(config.MergeConfiguration.model_validate(plan), out_path=str(folder / "merged"), options=options)
    return AutoModelForCausalLM.from_pretrained(folder / "merged")


@pytest.mark.parametrize("kind", ["", "cut ", "scaled ", "folded "])
def test_mergekit_averages_models_of_one_kind(kind, deltas):
    names = [f"{kind}base", f"{kind}delta"]
    found = merging(deltas, *names)
    both = [weights(AutoModelForCausalLM.from_pretrained(deltas / name)) for name in names]
    wanted = AutoModelForCausalLM.from_pretrained(deltas / names[0])
    wanted.load_state_dict({name: (both[0][name] + both[1][name]) / 2 for name in both[0]})
    torch.testing.assert_close(found(tiny.tokens()).logits, wanted(tiny.tokens()).logits)
    assert hf_lnscale.ln_scales(found) == hf_lnscale.ln_scales(wanted)


@pytest.mark.parametrize("pair", [("scaled base", "delta"), ("folded base", "scaled delta"), ("base", "cut delta")])
def test_mergekit_of_models_of_different_kinds_is_refused(pair, deltas):
    with pytest.raises(ValueError, match=r"merge_config .* other layers or scales"):
        merging(deltas, *pair)


def test_mergekit_of_some_layers_of_a_scaled_model_is_refused(deltas):
    def slices(name):
        parts = [{"model": str(deltas / name), "layer_range": part} for part in ([0, 1], [2, 4])]
        return {"merge_method": "passthrough", "slices": [{"sources": [part]} for part in parts]}

    with pytest.raises(ValueError, match=r"merge_config .* use drop_layers"):
        merging(deltas, **slices("scaled base"))
    expected = AutoModelForCausalLM.from_pretrained(deltas / "base")
    del expected.model.layers[1]
    assert equal(weights(merging(deltas, **slices("base"))), weights(expected))


# --- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def loftq_on_cpu(monkeypatch):
    """PEFT's LoftQ computes on "cuda"; where there is none, that is the CPU."""
    original = torch.Tensor.to

    def to(self, *args, **kwargs):
        return original(self, *args, **{**kwargs, **({"device": "cpu"} if kwargs.get("device") == "cuda" else {})})

    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.Tensor, "to", to)


def four_bit(folder, **flags):
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, **flags)
    return get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "down_proj"]))


@pytest.mark.parametrize("checkpoint", ["whole/", "one file/", "one file/model.safetensors", "cut/", "alone/"])
def test_loftq_corrects_each_layer_by_its_own_weights(checkpoint, whole, tmp_path, loftq_on_cpu):
    original = AutoModelForCausalLM.from_pretrained(whole)
    AutoModelForCausalLM.from_pretrained(whole, drop_layers=[1]).save_pretrained(tmp_path / "cut")
    model = four_bit(whole, drop_layers=[1])
    if checkpoint == "alone/":
        (tmp_path / "alone").mkdir()
        (tmp_path / "one file/model.safetensors").rename(tmp_path / "alone/model.safetensors")
    replace_lora_weights_loftq(model, model_path=f"{tmp_path}/{checkpoint}")
    for layer, source in zip(model.base_model.model.model.layers, KEPT, strict=True):
        for name in ("self_attn.q_proj", "mlp.down_proj"):
            wanted = original.model.layers[source].get_submodule(name).weight
            lora = layer.get_submodule(name)
            held = bitsandbytes.functional.dequantize_4bit(
                lora.base_layer.weight.data, lora.base_layer.weight.quant_state
            )
            # The best correction of rank 8 leaves the other singular values (Eckart and Young).
            left = torch.linalg.svdvals(wanted - held.cpu())[8:].norm()
            found = lora.lora_B["default"].weight @ lora.lora_A["default"].weight
            torch.testing.assert_close((wanted - held.cpu() - found.cpu()).norm(), left, rtol=1e-3, atol=1e-5)


def test_loftq_is_refused_where_the_layers_are_not(whole, tmp_path, loftq_on_cpu):
    AutoModelForCausalLM.from_pretrained(whole, drop_layers=[2]).save_pretrained(tmp_path / "other")
    model = four_bit(whole, drop_layers=[1])
    before = weights(model)
    with pytest.raises(ValueError, match=r"needs layers \[0, 2, 3\] .* has layers \[0, 1, 3\]"):
        replace_lora_weights_loftq(model, model_path=str(tmp_path / "other"))
    assert equal(weights(model), before)


@pytest.mark.parametrize("how", ["CorDA", "LoRA-GA"])
def test_a_cache_of_the_whole_model_begins_an_adapter_of_a_cut_one(how, whole, tmp_path):
    """PEFT reads it by names, so that layers begin with the directions of others. What the model says stays."""

    def begun(model):
        def run():
            loss = model(input_ids=tiny.tokens(1), labels=tiny.tokens(1)).loss
            if how == "LoRA-GA":
                loss.backward()

        cache = str(tmp_path / "cache" / "file")
        if how == "CorDA":
            settings = CordaConfig(cache_file=cache, corda_method="ipm")
            config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="corda", corda_config=settings)
            preprocess_corda(model, config, run_model=run)
        else:
            config = LoraConfig(
                r=2, target_modules=["q_proj"], init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()
            )
            preprocess_loraga(model, config, run, cache_file=cache)
        return get_peft_model(model, config).eval()

    begun(AutoModelForCausalLM.from_pretrained(whole))
    tuned = begun(AutoModelForCausalLM.from_pretrained(whole, drop_layers=[1]))
    torch.testing.assert_close(tuned(tiny.tokens()).logits, cut_by_hand(whole)(tiny.tokens()).logits)


REPLICATED = {"target_modules": ["q_proj"], "layer_replication": [(0, 3), (1, 3)], "init_lora_weights": False}


@pytest.mark.parametrize("folded", [False, True])
def test_layers_of_a_scaled_model_are_not_repeated(folded):
    model = tiny.model(ln_scaling=True)
    if folded:
        hf_lnscale.fold_ln_scaling(model)
    with pytest.raises(ValueError, match=r'layer_replication.*"depths": \[1, 2, 3, 2, 3\]'):
        get_peft_model(model, LoraConfig(**REPLICATED))
    assert len(model.model.layers) == 4


def test_what_the_refusal_of_repeated_layers_says_works(tmp_path):
    model = tiny.model(ln_scaling=True)
    repeated = tiny.model(num_hidden_layers=5, ln_scaling={"depths": [1, 2, 3, 2, 3]})
    for position, layer in enumerate([0, 1, 2, 1, 2]):
        repeated.model.layers[position].load_state_dict(model.model.layers[layer].state_dict())
    repeated.save_pretrained(tmp_path)
    assert hf_lnscale.ln_scales(AutoModelForCausalLM.from_pretrained(tmp_path)) == pytest.approx(
        [depth**-0.5 for depth in (1, 2, 3, 2, 3)]
    )


@pytest.mark.parametrize("flags", [{}, {"drop_layers": [1]}])
def test_repeated_layers_of_an_unscaled_base_come_back(flags, tmp_path):
    tiny.model().save_pretrained(tmp_path / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", **flags), LoraConfig(**REPLICATED)
    ).eval()
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **flags)
    again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(again(tiny.tokens()).logits, model(tiny.tokens()).logits)


def test_norms_that_an_adapter_trains(tmp_path):
    model = tiny.model(ln_scaling={"warmup_steps": 2, "step": 1})
    scales, expected = hf_lnscale.ln_scales(model), model(tiny.tokens()).logits
    tuned = get_peft_model(model, LNTuningConfig(target_modules=["input_layernorm"]))
    assert torch.equal(tuned(tiny.tokens()).logits, expected)
    assert hf_lnscale.ln_scales(tuned) == scales == pytest.approx([depth**-0.25 for depth in range(1, 5)])
    for change in (
        hf_lnscale.fold_ln_scaling,
        hf_lnscale.remove_ln_scaling,
        hf_lnscale.apply_ln_scaling,
        lambda model: hf_lnscale.set_ln_scaling_step(model, 2),
    ):
        with pytest.raises(ValueError, match=r"PEFT adapter \(LNTuningLayer\).*merge_and_unload"):
            change(tuned)
    assert torch.equal(tuned(tiny.tokens()).logits, expected)
    merged = hf_lnscale.fold_ln_scaling(tuned.merge_and_unload())
    torch.testing.assert_close(merged(tiny.tokens()).logits, expected)


SCALED, DROPPED = {"ln_scaling": True}, {"drop_layers": [1]}


@pytest.mark.skipif(not hasattr(peft, "ShadowConfig"), reason="PEFT has it from 0.21 on")
@pytest.mark.parametrize("flags", [SCALED, DROPPED])
def test_a_shadow_of_one_layer_beside_the_base(flags, tmp_path):
    """PEFT builds it from a copy of the base's configuration, with num_hidden_layers=1."""
    AutoModelForCausalLM.from_config(tiny.config(), **flags).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tuned = get_peft_model(base, peft.ShadowConfig(task_type="CAUSAL_LM")).eval()
    expected = tuned(input_ids=tiny.tokens()).logits
    tuned.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(again.eval()(input_ids=tiny.tokens()).logits, expected)


@pytest.mark.skipif(not hasattr(peft, "ShadowConfig"), reason="PEFT has it from 0.21 on")
def test_a_shadow_of_a_base_with_depths_of_its_own_is_refused():
    base = AutoModelForCausalLM.from_config(tiny.config(), **SCALED, **DROPPED)
    with pytest.raises(ValueError, match=r"depths must have one entry per layer, 1 for this model.*\[1, 3, 4\]"):
        get_peft_model(base, peft.ShadowConfig(task_type="CAUSAL_LM"))


# --- multi-token prediction ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{"drop_layers": [1]}, {"ln_scaling": True}])
def test_multi_token_prediction_says_why_not(flags, tmp_path):
    tiny.model("deepseek_v3").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, **flags)
    what = "dropped layers" if "drop_layers" in flags else "ln_scaling"
    with pytest.raises(ValueError, match=f"use_mtp.*not supported for a model with {what}.*draft_model"):
        model.generate(tiny.tokens(1), use_mtp=True, max_new_tokens=2)


def test_multi_token_prediction_of_a_plain_or_folded_model_is_transformers_own(tmp_path):
    plain = tiny.model("deepseek_v3")
    folded = hf_lnscale.fold_ln_scaling(tiny.model("deepseek_v3", ln_scaling=True))
    for model in (plain, folded):
        assert model.config.get_mtp_config().num_hidden_layers == 1
    plain.save_pretrained(tmp_path)  # without those layers
    with pytest.raises(RuntimeError, match="MtpModel weights are missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path).generate(tiny.tokens(1), use_mtp=True, max_new_tokens=2)


# --- copies in a warmup ----------------------------------------------------------------------------------------------

STEPS = 3


def train(model, after_each):
    for step in range(1, STEPS + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * step)
        hf_lnscale.set_ln_scaling_step(model, step)
        after_each()


def averaged_by_hand(copied, model):
    with torch.no_grad():
        for mine, its in zip(copied.parameters(), model.parameters(), strict=True):
            mine.lerp_(its, 0.5)


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)])
@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: get_peft_model(model, LoraConfig())])
def test_the_scale_of_an_average_is_that_of_the_model(average, wrap, tmp_path):
    model = wrap(tiny.model(ln_scaling={"warmup_steps": 10}))
    mean = AveragedModel(model, multi_avg_fn=average)
    train(model, lambda: mean.update_parameters(model))
    assert hf_lnscale.ln_scales(mean) == pytest.approx([depth ** -(0.5 * STEPS / 10) for depth in range(1, 5)])
    mean.module.save_pretrained(tmp_path)
    if isinstance(model, PeftModel):
        return
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.ln_scaling["step"] == STEPS
    assert torch.equal(again(tiny.tokens()).logits, mean.module(tiny.tokens()).logits)


def test_an_average_without_a_warmup_or_a_scale_is_as_without_the_plugin():
    for model in (tiny.model(), tiny.model(ln_scaling=True), torch.nn.Linear(2, 2)):
        mean = AveragedModel(model)
        mean.update_parameters(model)
        assert equal(weights(mean.module), weights(model))


def test_saving_says_that_the_scale_of_a_copy_stayed(tmp_path):
    model = tiny.model(ln_scaling={"warmup_steps": 10})
    ours, reference = copy.deepcopy(model), copy.deepcopy(model)
    train(model, lambda: averaged_by_hand(ours, model))
    with pytest.raises(ValueError, match=r"stayed at step 0.*set_ln_scaling_step"):
        ours.save_pretrained(tmp_path / "average")
    assert not (tmp_path / "average").exists()
    hf_lnscale.set_ln_scaling_step(ours, STEPS).save_pretrained(tmp_path / "average")
    # Nobody writes to a reference model: it is right at its step, also on disk and after it was pickled.
    reference.save_pretrained(tmp_path / "reference")
    pickle.loads(pickle.dumps(reference)).save_pretrained(tmp_path / "reference")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "reference")
    assert again.config.ln_scaling["step"] == 0
    assert torch.equal(again(tiny.tokens()).logits, reference(tiny.tokens()).logits)
    # A second run is moved by itself, wherever the first one is.
    second = copy.deepcopy(model)
    train(second, lambda: None)
    hf_lnscale.set_ln_scaling_step(model, 9)
    second.save_pretrained(tmp_path / "second")


@pytest.mark.parametrize("average", ["sync_ref_model", "BEMACallback"])
def test_an_average_that_trl_makes_is_refused_in_a_warmup(average, tmp_path):
    tokenizer = train_tokenizer(documents(standard_library=False), 300)
    tokenizer.pad_token = tokenizer.eos_token
    size = {"vocab_size": len(tokenizer), "max_position_embeddings": 64}
    tiny.model(**size, ln_scaling={"warmup_steps": 10}).save_pretrained(tmp_path / "model")
    rows = Dataset.from_dict({"prompt": ["a b"] * 4, "chosen": [" good"] * 4, "rejected": [" bad"] * 4})
    arguments = DPOConfig(
        output_dir=str(tmp_path / "out"),
        max_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        sync_ref_model=average == "sync_ref_model",
    )
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        callbacks=[LNScalingWarmupCallback(), *([BEMACallback()] if average == "BEMACallback" else [])],
    )
    with pytest.raises(ValueError, match=r"Callback averages the model's weights.*step 0 of 10"):
        trainer.train()
