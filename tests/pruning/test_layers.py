"""Layers taken out: on loading, in memory, on disk, against deletion by hand."""

import copy
import json
import warnings

import numpy as np
import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments

import hf_lnscale
import tiny
from hf_lnscale import PruningPlan, draft_model, drop_layers, fold_ln_scaling, ln_scales
from hf_lnscale.checkpoints.export import export, read_info
from hf_lnscale.core import families
from hf_lnscale.hooks.trainer import require_same_model
from hf_lnscale.pruning.plan import fingerprint
from oracles import decoder_layers

CUTS = [[1], [0, 2], [2, 3]]


def reload(family, folder, **kwargs):
    return tiny.auto_class(family).from_pretrained(folder, experts_implementation="eager", **kwargs)


def deleted(model, dropped):
    """A copy with the modules deleted by hand, and every list over layers that the model reads while it runs."""
    model = copy.deepcopy(model)
    layers = decoder_layers(model)
    kept = [layer for layer in range(len(layers)) if layer not in dropped]
    for layer in reversed(dropped):
        del layers[layer]
    for position, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = position
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        if hasattr(config, "num_hidden_layers") and config.model_type == model.config.get_text_config().model_type:
            if getattr(config, "layer_types", None):
                config.layer_types = [config.layer_types[layer] for layer in kept]
            config.num_hidden_layers = len(kept)
    return model


def gradients(model):
    model.zero_grad()
    model(tiny.tokens(), labels=tiny.tokens(), use_cache=False).loss.backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def assert_same_model(got, expected):
    assert torch.equal(got(tiny.tokens(), use_cache=False).logits, expected(tiny.tokens(), use_cache=False).logits)
    for one, other in zip(gradients(got), gradients(expected), strict=True):
        assert torch.equal(one, other)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "eos_token_id": None, "use_cache": True}
    assert torch.equal(got.generate(tiny.tokens(2, 6), **settings), expected.generate(tiny.tokens(2, 6), **settings))


@pytest.mark.slow
@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_equals_deletion(variant, tmp_path):
    """Loaded without the layers, dropped in memory, saved and loaded again: the model with the modules deleted."""
    family, changes = tiny.VARIANTS[variant]
    full = tiny.model(family, **changes)
    full.save_pretrained(tmp_path / "full")
    for dropped in CUTS:
        expected = deleted(full, dropped)
        loaded = reload(family, tmp_path / "full", drop_layers=dropped)
        assert_same_model(loaded, expected)
        in_memory = drop_layers(copy.deepcopy(full), dropped)
        assert_same_model(in_memory, expected)
        loaded.save_pretrained(tmp_path / "pruned")
        assert_same_model(reload(family, tmp_path / "pruned"), expected)


STOCK = """
import pathlib, sys, torch, tiny
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    model, info = tiny.auto_class(folder.name).from_pretrained(
        folder, experts_implementation="eager", output_loading_info=True)
    assert not any(info.values()), (folder.name, info)
    assert torch.equal(model(tiny.tokens(), use_cache=False).logits, torch.load(folder / "logits.pt")), folder.name
    print(folder.name)
"""


@pytest.mark.slow
def test_saved_it_is_a_plain_checkpoint(tmp_path, run_python):
    """For every family, in a process without the plugin; one of them pruned twice, and one with LNS folded."""
    for family in tiny.FAMILIES:
        tiny.model(family).save_pretrained(tmp_path / "full" / family)
        model = reload(family, tmp_path / "full" / family, drop_layers=[1])
        if family == "llama":
            model.save_pretrained(tmp_path / "once")
            model = reload(family, tmp_path / "once", drop_layers=[0])
        model.save_pretrained(tmp_path / "pruned" / family)
        torch.save(model(tiny.tokens(), use_cache=False).logits.detach(), tmp_path / "pruned" / family / "logits.pt")
    assert run_python(STOCK, tmp_path / "pruned", plugin=False).split() == sorted(tiny.FAMILIES)


def test_no_load_report_and_every_kept_tensor_is_read(tmp_path, caplog):
    tiny.model().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    model, info = LlamaForCausalLM.from_pretrained(tmp_path, drop_layers=[0, 2], output_loading_info=True)
    assert not any(info.values())
    assert "UNEXPECTED" not in caplog.text
    assert_same_model(model, deleted(tiny.model(), [0, 2]))


@pytest.mark.parametrize(
    "kind", ["base into head", "head into base", "bin", "float16", "meta map", "disk", "classifier"]
)
def test_other_ways_of_loading(kind, tmp_path):
    full = tiny.model()
    expected = deleted(full, [1, 2])
    hidden = expected.model(tiny.tokens())[0]
    if kind == "base into head":
        full.model.save_pretrained(tmp_path)
        torch.testing.assert_close(
            LlamaForCausalLM.from_pretrained(tmp_path, drop_layers=[1, 2]).model(tiny.tokens())[0], hidden
        )
        return
    full.save_pretrained(tmp_path)
    if kind == "head into base":
        model = tf.AutoModel.from_pretrained(tmp_path, drop_layers=[1, 2])
        assert torch.equal(model(tiny.tokens())[0], hidden)
    elif kind == "classifier":
        model = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path, drop_layers=[1, 2])
        assert torch.equal(model.model(tiny.tokens())[0], hidden)
    elif kind == "bin":
        (tmp_path / "model.safetensors").unlink()
        torch.save(full.state_dict(), tmp_path / "pytorch_model.bin")
        assert_same_model(LlamaForCausalLM.from_pretrained(tmp_path, drop_layers=[1, 2]), expected)
    elif kind == "float16":
        model = LlamaForCausalLM.from_pretrained(tmp_path, drop_layers=[1, 2], dtype=torch.float16)
        expected = deleted(LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float16), [1, 2])
        assert torch.equal(model(tiny.tokens()).logits, expected(tiny.tokens()).logits)
    else:
        places = {"model.layers.0": "cpu", "model.layers.1": "disk" if kind == "disk" else "cpu"}
        places |= {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        model = LlamaForCausalLM.from_pretrained(
            tmp_path, drop_layers=[1, 2], device_map=places, offload_folder=str(tmp_path / "offload")
        )
        with torch.no_grad():
            assert torch.equal(model(tiny.tokens()).logits, expected(tiny.tokens()).logits)


def plan(**changes):
    return PruningPlan(**({"layers": (1, 2), "model": fingerprint(tiny.config())} | changes))


VALUES = {
    "list": [1, 2],
    "negative": (-2, -3),
    "numpy": np.array([2, 1]),
    "range": range(1, 3),
    "plan": plan(),
    "file": lambda folder: str(plan().save(folder / "p.json")),
    "folder": lambda folder: plan().save(folder / "with a plan").parent,
}


@pytest.mark.slow
@pytest.mark.parametrize("value", VALUES)
def test_every_form_of_the_argument(value, tmp_path):
    value = VALUES[value](tmp_path) if callable(VALUES[value]) else VALUES[value]
    full = tiny.model()
    full.save_pretrained(tmp_path / "full")
    expected = deleted(full, [1, 2])(tiny.tokens()).logits
    for model in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "full", drop_layers=value),
        LlamaForCausalLM.from_pretrained(tmp_path / "full", drop_layers=value),
        LlamaForCausalLM.from_pretrained(tmp_path / "full", config=tiny.config(), drop_layers=value),
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "full", config=AutoConfig.from_pretrained(tmp_path / "full", drop_layers=value)
        ),
        drop_layers(copy.deepcopy(full), value),
    ):
        assert torch.equal(model(tiny.tokens()).logits, expected)
        assert model.config.dropped_layers["layers"] == [1, 2]
    for model in (
        AutoModelForCausalLM.from_config(tiny.config(), drop_layers=value),
        LlamaForCausalLM(tiny.config(drop_layers=value)),
    ):
        assert len(model.model.layers) == 2


def test_a_number_is_the_rule_of_thumb_and_warned_of(tmp_path):
    full = tiny.model()
    full.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"drop_layers=2 drops layers \[1, 2\].*rule of thumb") as caught:
        model = AutoModelForCausalLM.from_pretrained(tmp_path, drop_layers=np.int64(2))
    assert caught[0].filename == __file__
    assert torch.equal(model(tiny.tokens()).logits, deleted(full, [1, 2])(tiny.tokens()).logits)
    for two in (torch.tensor(2), np.array(2)):
        with pytest.warns(UserWarning, match=r"drop_layers=2 drops layers \[1, 2\]"):
            assert drop_layers(tiny.model(), two).config.dropped_layers["layers"] == [1, 2]


WRONG = [
    ([4], r"layer 4 does not exist in a model of 4 layers; valid are integers from -4 to 3"),
    ([-5], "layer -5 does not exist"),
    ([1, 1], r"layer 1 is given twice"),
    ([1, -3], r"layer 1 is given twice"),
    ([0, 1, 2, 3], "are all 4 layers"),
    ([True], "True in .* is not a layer index"),
    (torch.tensor([True, False]), "is not a layer index"),
    ([1.0], "1.0 in .* is not a layer index"),
    (True, "must be a list of layer indices.*got True"),
    (1.5, "must be a list of layer indices.*got 1.5"),
    (torch.tensor(1.5), "must be a list of layer indices.*got 1.5"),
    (4, "a number of layers must be between 1 and 3"),
    (0, "a number of layers must be between 1 and 3"),
    (plan(model=fingerprint(tiny.config("qwen2"))), "made for another model .* with model_type 'qwen2'"),
    (plan(model=fingerprint(tiny.config(num_hidden_layers=5))), "with num_hidden_layers 5; this one has 4"),
]


@pytest.mark.parametrize(("value", "message"), WRONG, ids=lambda value: repr(value)[:30])
def test_wrong_values_are_refused_before_a_weight_is_read(value, message, tmp_path):
    tiny.model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not to be read")
    for load in (AutoModelForCausalLM.from_pretrained, LlamaForCausalLM.from_pretrained, AutoConfig.from_pretrained):
        with pytest.raises(ValueError, match=f"drop_layers.*{message}"):
            load(tmp_path, drop_layers=value)
    model = tiny.model()
    before = model(tiny.tokens()).logits
    with pytest.raises(ValueError, match=message):
        drop_layers(model, value)
    assert torch.equal(model(tiny.tokens()).logits, before)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_config(tiny.config(), drop_layers=value)


def test_a_missing_or_broken_plan(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no pruning plan at"):
        AutoModelForCausalLM.from_pretrained(tmp_path, drop_layers=str(tmp_path))
    (tmp_path / "pruning_plan.json").write_text('{"format": 1, "layers": 3}')
    with pytest.raises(ValueError, match="is not a pruning plan"):
        AutoModelForCausalLM.from_pretrained(tmp_path, drop_layers=str(tmp_path))


def test_a_plan_for_a_model_that_was_cut_elsewhere_is_refused():
    """All have four layers of one shape; layer 1 is another one in each."""

    def cut(gone):
        return drop_layers(tiny.model(num_hidden_layers=5), [gone])

    made = PruningPlan(layers=(1,), model=fingerprint(cut(1).config))
    assert len(drop_layers(cut(1), made).model.layers) == 3
    for other in (cut(3), tiny.model()):
        with pytest.raises(ValueError, match=r"made for another model.*dropped_before \[1\]"):
            drop_layers(other, made)


def test_plan_survives_its_file(tmp_path):
    full = plan(method={"search": "greedy"}, perplexity={"before": 10.0, "after": 12.0}, steps=[{"layers": [1]}])
    assert PruningPlan.load(full.save(tmp_path / "a" / "folder")) == full
    assert full.perplexity_increase == pytest.approx(0.2)
    assert str(full).startswith("drop 2 of 4 layers: [1, 2]")


def test_a_plan_that_healed_says_that_dropping_does_not(tmp_path):
    full = tiny.model()
    full.save_pretrained(tmp_path)
    healed = plan(perplexity={"before": 10.0, "after": 15.0, "healed": 12.0})
    said = r"12.00 was measured on the healed model; without healing it is 15.00.*heal\(model, plan, data\)"
    for drop in (
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path, drop_layers=healed),
        lambda: drop_layers(tiny.model(), healed),
    ):
        with pytest.warns(UserWarning, match=said) as caught:
            drop()
        assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drop_layers(tiny.model(), healed.layers)
        drop_layers(tiny.model(), plan(perplexity={"before": 10.0, "after": 15.0}))
        draft_model(full, healed)


def test_what_was_dropped_is_noted_in_the_original_numbering(tmp_path):
    tiny.model(num_hidden_layers=8).save_pretrained(tmp_path / "full")
    once = AutoModelForCausalLM.from_pretrained(tmp_path / "full", drop_layers=[0, 3])
    once.save_pretrained(tmp_path / "once")
    twice = AutoModelForCausalLM.from_pretrained(tmp_path / "once", drop_layers=[0, -1])  # 1 and 7 of the original
    twice.save_pretrained(tmp_path / "twice")
    record = json.loads((tmp_path / "twice/config.json").read_text())["dropped_layers"]
    assert record == {"layers": [0, 1, 3, 7], "num_hidden_layers": 8, "base": "full"}
    expected = deleted(tiny.model(num_hidden_layers=8), [0, 1, 3, 7])(tiny.tokens()).logits
    assert torch.equal(twice(tiny.tokens()).logits, expected)
    # Whatever holds these layers can be loaded from: the full checkpoint, the one in between, and itself.
    for folder in ("full", "once", "twice"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder, config=twice.config)
        assert torch.equal(model(tiny.tokens()).logits, expected), folder
    with pytest.raises(ValueError, match=r"needs layers \[1, 2, 4, 5, 6, 7\].*has layers \[2, 4, 5, 6\]"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "twice", config=once.config)
    tiny.model(num_hidden_layers=6).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"of a model with 8 layers, but the checkpoint .* has 6 layers"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "other", config=once.config)


@pytest.mark.slow
@pytest.mark.filterwarnings("error:ln_scaling")
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_vl_text"])
def test_each_layer_keeps_its_own_depth(family, tmp_path, run_python):
    """Through dropping, saving, reloading, dropping again, and folding."""
    full = tiny.model(family, ln_scaling=True)
    full.save_pretrained(tmp_path / "full")
    once = reload(family, tmp_path / "full", drop_layers=[1])
    assert ln_scales(once) == pytest.approx([1.0, 3**-0.5, 0.5])
    assert torch.equal(
        once(tiny.tokens(), use_cache=False).logits, deleted(full, [1])(tiny.tokens(), use_cache=False).logits
    )
    once.save_pretrained(tmp_path / "once")
    twice = drop_layers(reload(family, tmp_path / "once"), [1])
    assert ln_scales(twice) == pytest.approx([1.0, 0.5])
    expected = deleted(full, [1, 2])(tiny.tokens(), use_cache=False).logits
    assert torch.equal(twice(tiny.tokens(), use_cache=False).logits, expected)
    folder = tmp_path / "pruned" / family
    fold_ln_scaling(twice).save_pretrained(folder)
    torch.save(expected.detach(), folder / "logits.pt")
    run_python(STOCK, tmp_path / "pruned", plugin=False)
    folded = drop_layers(fold_ln_scaling(copy.deepcopy(full)), [1])
    assert ln_scales(hf_lnscale.unfold_ln_scaling(folded)) == pytest.approx([1.0, 3**-0.5, 0.5])


def test_folded_on_disk(tmp_path):
    pruned = drop_layers(tiny.model(ln_scaling=True), [1])
    pruned.save_pretrained(tmp_path / "pruned")
    export(tmp_path / "pruned", tmp_path / "plain", progress=False)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(plain(tiny.tokens()).logits, pruned(tiny.tokens()).logits)
    info = read_info(tmp_path / "plain")
    assert info["dropped"]["layers"] == [1]
    assert info["folded"]["depths"] == [1, 3, 4]
    assert read_info(tmp_path / "pruned")["scales"] == ln_scales(pruned)


@pytest.mark.filterwarnings("ignore:ln_scaling was enabled")
def test_scaled_after_dropping_a_layer_has_its_own_depth(tmp_path):
    """Both keywords at once, or one after the other: depth belongs to the layer, not to its position."""
    tiny.model().save_pretrained(tmp_path / "full")
    both = AutoModelForCausalLM.from_pretrained(tmp_path / "full", drop_layers=[0, 2], ln_scaling=True)
    after = hf_lnscale.apply_ln_scaling(AutoModelForCausalLM.from_pretrained(tmp_path / "full", drop_layers=[0, 2]))
    assert ln_scales(both) == ln_scales(after) == pytest.approx([2**-0.5, 0.5])


def test_dropping_layers_of_a_scaled_checkpoint_is_no_cold_switch(tmp_path):
    tiny.model(ln_scaling=True).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        AutoModelForCausalLM.from_pretrained(tmp_path, drop_layers=[1])
        pruned = AutoConfig.from_pretrained(tmp_path, drop_layers=[1])
        AutoModelForCausalLM.from_pretrained(tmp_path, config=pruned)
        AutoModelForCausalLM.from_pretrained(tmp_path, config=tiny.config(drop_layers=[1]), ln_scaling=True)


@pytest.mark.parametrize("tied", [False, True])
def test_offloaded_to_disk(tied, tmp_path):
    full = tiny.model(tie_word_embeddings=tied)
    full.save_pretrained(tmp_path / "full")
    where = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "offloaded"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full", drop_layers=[1], **where)
    assert torch.equal(model(tiny.tokens()).logits, deleted(full, [1])(tiny.tokens()).logits)


def test_pipeline(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    made = tf.pipeline(
        "text-generation", model=str(tmp_path), model_kwargs={"drop_layers": [1]}, device="cpu",
        tokenizer=tf.PreTrainedTokenizerFast(tokenizer_object=_tokenizer()),
    )  # fmt: skip
    assert len(made.model.model.layers) == 3


def _tokenizer():
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))


def test_an_adapter_is_refused():
    model = get_peft_model(tiny.model(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="has a PEFT adapter"):
        drop_layers(model, [1])


def test_an_optimizer_is_refused():
    model = tiny.model()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"an optimizer \(AdamW\) holds parameters"):
        drop_layers(model, [1])
    del optimizer
    assert len(drop_layers(model, [1]).model.layers) == 3


def test_a_family_whose_depth_fields_are_not_known_is_refused(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", families.FAMILIES.copy())
    monkeypatch.setattr("hf_lnscale.core.stack.FAMILIES", families.FAMILIES)
    del families.FAMILIES["starcoder2"]
    with pytest.raises(hf_lnscale.UnsupportedArchitectureError, match="not supported for model_type 'starcoder2'"):
        AutoModelForCausalLM.from_config(tf.Starcoder2Config(**tiny._BASE), drop_layers=[1])
    hf_lnscale.register_family("starcoder2")
    with pytest.raises(hf_lnscale.UnsupportedArchitectureError, match=r"fields are not known.*depth_fields"):
        AutoModelForCausalLM.from_config(tf.Starcoder2Config(**tiny._BASE), drop_layers=[1])
    with pytest.raises(ValueError, match="depth_fields: 'depth' is not one of layer_types"):
        hf_lnscale.register_family("starcoder2", depth_fields=("depth",), overwrite=True)
    hf_lnscale.register_family("starcoder2", depth_fields=(), overwrite=True)
    full = AutoModelForCausalLM.from_config(tf.Starcoder2Config(**tiny._BASE)).eval()
    assert_same_model(drop_layers(copy.deepcopy(full), [1]), deleted(full, [1]))


def test_two_models_built_from_one_configuration():
    """Dropping layers of one leaves the other alone; a configuration changed behind a model's back is not saved."""
    config = tiny.config()
    one, other = LlamaForCausalLM(config), LlamaForCausalLM(config)
    before = other(tiny.tokens()).logits
    drop_layers(one, [1])
    assert torch.equal(other(tiny.tokens()).logits, before)
    assert (one.config.num_hidden_layers, other.config.num_hidden_layers, config.num_hidden_layers) == (3, 4, 4)
    assert one.config is one.model.config


def test_assigned_to_a_model_that_is_built_it_is_not_saved(tmp_path):
    model = tiny.model()
    model.config.drop_layers = [1]
    with pytest.raises(ValueError, match="drop_layers was set on the config after the model was built"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*"))


def test_a_state_dict_instead_of_a_checkpoint():
    full = tiny.model()
    for weights in (full.state_dict(), deleted(full, [1, 2]).state_dict()):
        model = LlamaForCausalLM.from_pretrained(
            None, config=tiny.config(), state_dict=dict(weights), drop_layers=[1, 2]
        )
        assert_same_model(model, deleted(full, [1, 2]))
    with pytest.raises(ValueError, match=r"state_dict has 3 layers, but must have 2, .* or 4"):
        LlamaForCausalLM.from_pretrained(
            None, config=tiny.config(drop_layers=[1, 2]), state_dict=deleted(full, [0]).state_dict()
        )


def test_tensors_that_transformers_ignores(tmp_path):
    """Qwen3-Next has layers for predicting several tokens beside the decoder's, DeepSeek-V3 behind them."""
    for family, name in (("qwen3_next", "mtp.layers.0."), ("deepseek_v3", "model.layers.4.")):
        full = tiny.model(family)
        full.save_pretrained(tmp_path / family)
        weights = load_file(tmp_path / family / "model.safetensors")
        weights[f"{name}input_layernorm.weight"] = torch.zeros(tiny.HIDDEN)
        save_file(weights, tmp_path / family / "model.safetensors", metadata={"format": "pt"})
        model, info = tiny.auto_class(family).from_pretrained(
            tmp_path / family, experts_implementation="eager", drop_layers=[1], output_loading_info=True
        )
        assert not any(info.values())
        assert_same_model(model, deleted(full, [1]))


def test_the_text_part_of_a_vision_model(tmp_path):
    full = tiny.model("qwen2_5_vl_text")
    full.save_pretrained(tmp_path)
    model = tf.Qwen2_5_VLTextModel.from_pretrained(tmp_path, drop_layers=[1])
    expected = deleted(full, [1]).model.language_model
    assert torch.equal(model(tiny.tokens(), use_cache=False)[0], expected(tiny.tokens(), use_cache=False)[0])


def test_gguf_is_refused(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="layers cannot be dropped while loading a GGUF file"):
        LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", drop_layers=[1])


def test_a_configuration_is_not_left_half_changed():
    config = tiny.config("qwen3")
    config.layer_types = config.layer_types[:3]
    before = config.to_dict()
    with pytest.raises(ValueError, match="layer_types has 3 entries for 4 layers"):
        config.drop_layers = [1]
    assert config.to_dict() == before


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "mistral", "phi3"])
def test_layer_types_are_followed_in_every_family(family, tmp_path):
    types = ["full_attention", "sliding_attention", "full_attention", "chunked_attention"]
    full = tiny.model(family, layer_types=types)
    full.save_pretrained(tmp_path)
    for model in (reload(family, tmp_path, drop_layers=[0, 2]), drop_layers(full, [0, 2])):
        assert model.config.layer_types == [types[1], types[3]]
    type(full.config)(**full.config.to_dict())  # valid


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_text"])
def test_a_hybrid_without_full_attention_is_refused(family):
    model, config = tiny.model(family), tiny.config(family)
    before = config.to_dict()
    with pytest.raises(ValueError, match=r"drop_layers: without layers \[1, 3\] only linear-attention layers"):
        config.drop_layers = [1, 3]
    assert config.to_dict() == before
    with pytest.raises(ValueError, match="only linear-attention layers"):
        drop_layers(model, [0, 1, 3])
    assert len(model.model.layers) == 4
    for dropped in ([0, 2], [1, 2]):
        pruned = drop_layers(tiny.model(family), dropped)
        assert pruned.generate(tiny.tokens(1, 5), max_new_tokens=3, do_sample=False).shape == (1, 8)


# Each with layers of 16 that it treats in another way than the others, by the documentation of its library.
NAMING_LAYERS = [
    {"quant_method": "fp8", "modules_to_not_convert": ["lm_head", "model.layers.3.mlp"]},
    {"quant_method": "compressed-tensors", "ignore": [r"re:.*layers\.3\.mlp.*"]},
    {"quant_method": "compressed-tensors", "ignore": [r"re:.*layers\.(0|7)\..*"]},
    {"quant_method": "compressed-tensors", "ignore": ["re:.*layers[.]7[.].*"]},
    {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"targets": [r"re:.*\.1\d\.mlp\..*"]}}},
    {"quant_method": "gptq", "dynamic": {r"-:model\.layers\.([2-9]\d*|[1-9]\d+)\..*": {}}},
    {"quant_method": "gptq", "dynamic": {r".*\.5\..*": {"bits": 8}}},
    {"quant_method": "gptq", "dynamic": {r"+:.*\.(?:6|7)\..*": {"bits": 8}}},
    {"quant_method": "bitsandbytes", "llm_int8_skip_modules": ["7.mlp"]},
    {"quant_method": "bitsandbytes", "llm_int8_skip_modules": ["model.layers.[2-3]"]},
    {"quant_method": "torchao", "modules_to_not_convert": [r"re:model\.layers\.[0-3]\..*"]},
    {"quant_method": "aqlm", "linear_weights_not_to_quantize": ["model.layers.3.self_attn.q_proj.weight"]},
    {"quant_method": "spqr", "shapes": {"model.layers.3.self_attn.q_proj.dense_weights.shape": 5}},
    {"quant_method": "quark", "exclude": ["*layers.3.*"]},
    {"quant_method": "quark", "layer_quant_config": {"*layers.[13].*": {}}},
    {"quant_method": "modelopt", "ignore": ["lm_head", "model.layers.1?.*"]},
    {"quant_method": "auto-round", "extra_config": {"model.layers.15.self_attn.q_proj": {"bits": 16}}},
]


@pytest.mark.slow
@pytest.mark.parametrize("quantization", NAMING_LAYERS, ids=str)
def test_quantization_that_names_layers_is_refused(quantization):
    config = tiny.config(num_hidden_layers=16)
    config.quantization_config = quantization
    with pytest.raises(ValueError, match="names single layers"):
        config.drop_layers = [1]
    assert config.num_hidden_layers == 16


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {r"-:.*\.mlp\..*": {}}},
        {"quant_method": "compressed-tensors", "ignore": ["lm_head", r"re:.*self_attn.*", "re:(unbalanced"]},
        {"quant_method": "bitsandbytes", "llm_int8_skip_modules": ["down_proj"], "bnb_4bit_quant_type": "nf4"},
        # Layer 0 stays layer 0.
        {"quant_method": "compressed-tensors", "ignore": [r"re:model\.layers\.0\..*", "model.layers.0.mlp.down_proj"]},
    ],
    ids=str,
)
def test_quantization_that_treats_what_is_left_as_before(quantization):
    config = tiny.config(num_hidden_layers=16)
    config.quantization_config = quantization
    config.drop_layers = [1, 9]
    assert config.num_hidden_layers == 14
    assert config.quantization_config == quantization


def test_quantized(tmp_path):
    """In 4 bits, on loading and of a checkpoint that is quantized already, together with LayerNorm Scaling."""
    pytest.importorskip("bitsandbytes")
    config = tiny.config(hidden_size=128, intermediate_size=256, num_hidden_layers=6, ln_scaling=True)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "full")
    quantized = {
        "quantization_config": tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
        "device_map": "cpu",
    }
    full = AutoModelForCausalLM.from_pretrained(tmp_path / "full", **quantized)
    full.save_pretrained(tmp_path / "quantized")
    expected = drop_layers(full, [1, 3])(tiny.tokens()).logits
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "full", drop_layers=[1, 3], **quantized)
    loaded.save_pretrained(tmp_path / "pruned")
    for model in (
        loaded,
        AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", drop_layers=[1, 3]),
        AutoModelForCausalLM.from_pretrained(tmp_path / "pruned"),
    ):
        assert type(model.model.layers[0].mlp.down_proj).__name__ == "Linear4bit"
        assert torch.equal(model(tiny.tokens()).logits, expected)
        assert ln_scales(model) == pytest.approx([1.0, 3**-0.5, 5**-0.5, 6**-0.5])


class Tokens(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = tiny.tokens(1, 12, seed=index)[0]
        return {"input_ids": ids, "labels": ids}


@pytest.mark.slow
def test_resuming_with_other_layers_is_refused(tmp_path):
    """Trainer would load the tensors by their names: layer 1 of the one into layer 1 of the other."""

    def trainer(model):
        arguments = {"max_steps": 4, "save_steps": 2, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
        return Trainer(model, TrainingArguments(str(tmp_path), **arguments), train_dataset=Tokens())

    trainer(drop_layers(tiny.model(), [1])).train()
    trainer(drop_layers(tiny.model(), [1])).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for other in (drop_layers(tiny.model(), [2]), tiny.model(num_hidden_layers=3)):
        with pytest.raises(ValueError, match=r"trained with layers \[0, 2, 3\] of 4, but the model has layers"):
            trainer(other).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


class Images(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"pixel_values": torch.ones(3, 32, 32), "labels": index % 2}


@pytest.mark.slow
def test_models_that_count_no_layers(tmp_path):
    """Training goes on from their checkpoints as without the plugin; dropping layers is refused by name."""
    config = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])

    def trainer(steps):
        arguments = {"max_steps": steps, "save_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
        model = tf.ResNetForImageClassification(config)
        return Trainer(model, TrainingArguments(str(tmp_path), **arguments), train_dataset=Images())

    trainer(1).train()
    resumed = trainer(2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 2
    checkpoint = tmp_path / "checkpoint-2"
    with pytest.raises(ValueError, match="drop_layers is not supported for model_type 'resnet'"):
        tf.ResNetForImageClassification.from_pretrained(checkpoint, drop_layers=[1])
    info = read_info(str(checkpoint))
    assert (info["family"], info["supported"], info["num_layers"], info["scales"]) == ("resnet", False, None, [])
    tf.LxmertConfig().save_pretrained(tmp_path / "lxmert")
    require_same_model(tf.LxmertConfig(), str(tmp_path / "lxmert"))
    assert read_info(str(tmp_path / "lxmert"))["num_layers"] is None


BYTES = """
import os, sys, resource, torch, transformers as tf
def read():
    return int(open("/proc/self/io").read().split()[1])
folder, dropped = sys.argv[1], eval(sys.argv[2])
tf.AutoModelForCausalLM.from_pretrained(sys.argv[3], drop_layers=[1])  # imports what there is to import
before = read()
model = tf.AutoModelForCausalLM.from_pretrained(folder, drop_layers=dropped, disable_mmap=True)
print(read() - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("shards", ["1GB", "1MB"])
def test_only_what_is_kept_is_read(shards, tmp_path, run_python):
    """Counted by the system: reading through a mapping of the file would not be."""
    config = tiny.config(hidden_size=128, intermediate_size=512, num_hidden_layers=12, vocab_size=1000)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "full", max_shard_size=shards)
    tiny.model().save_pretrained(tmp_path / "tiny")
    got, kept = map(
        int, run_python(BYTES, tmp_path / "full", list(range(1, 11)), tmp_path / "tiny", plugin=True).split()
    )
    assert kept <= got <= 1.02 * kept + 64 * 1024  # the headers and config.json
