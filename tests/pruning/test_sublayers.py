"""Layers without attention or MLP, against the whole model whose attention or MLP adds nothing: its last weights are
zero."""

import copy
import dataclasses
import json
import re
from functools import partial

import pytest
import torch
import transformers as tf
from peft import PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import tiny
from hf_lnscale import (
    diagnose,
    draft_model,
    drop_layers,
    fold_ln_scaling,
    heal,
    ln_scales,
    plan_pruning,
    prune,
    score_layers,
)
from hf_lnscale.checkpoints.export import export, read_info
from hf_lnscale.checkpoints.gguf import export_gguf
from hf_lnscale.checkpoints.hub import push
from hf_lnscale.checkpoints.zeros import export_zeros
from hf_lnscale.core.record import known_text, record
from hf_lnscale.pruning.cut import droppable_units
from hf_lnscale.pruning.target import Target
from oracles import decoder_layers

# Of the hybrids, layers 1 and 3 alone have attention with a KV cache.
CUTS = {family: ([1], [0, 2]) for family in tiny.VARIANTS if family.startswith(("qwen3_next", "qwen3_5"))}
LAST = {"attention": "self_attn", "mlp": "mlp"}


def reload(family, folder, **kwargs):
    return tiny.auto_class(family).from_pretrained(folder, experts_implementation="eager", **kwargs)


def cut_of(variant):
    return CUTS.get(variant, ([0, 2], [1]))


def zeroed(model, attention, mlp, in_place=False):
    """A copy whose attention and MLP of some layers add nothing to the residual stream."""
    model = model if in_place else copy.deepcopy(model)
    with torch.no_grad():
        for kind, layers in (("attention", attention), ("mlp", mlp)):
            for layer in layers:
                for name, parameter in decoder_layers(model)[layer].named_parameters():
                    if name.startswith(f"{LAST[kind]}.") and ("o_proj" in name or "down_proj" in name):
                        parameter.zero_()
    return model


def gone(name, attention, mlp, norms=tiny.LLAMA_NORMS):
    """Whether a parameter belongs to a sub-layer that is missing."""
    match = re.search(r"layers\.(\d+)\.(\w+)", name)
    parts = {"self_attn": attention, norms[0]: attention, "mlp": mlp, norms[1]: mlp}
    if "pre_feedforward_layernorm" in norms:
        parts |= {"post_attention_layernorm": attention, "post_feedforward_layernorm": mlp}
    return bool(match and int(match[1]) in parts.get(match[2], ()))


def generated(model, **settings):
    settings |= {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    ids = tiny.tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # padded on the left
    found = model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **settings)
    return torch.stack(found.logits)


def assert_adds_nothing(cut, zero):
    """The same numbers as the oracle: logits, gradients of what both have, and generation with every cache."""
    for model in (cut, zero):
        model.zero_grad()
        model(tiny.tokens(), labels=tiny.tokens(), use_cache=False).loss.backward()
    assert torch.equal(cut(tiny.tokens()).logits, zero(tiny.tokens()).logits)
    grads = {name: parameter.grad for name, parameter in zero.named_parameters()}
    for name, parameter in cut.named_parameters():
        assert (parameter.grad is None) == (grads[name] is None), name
        assert parameter.grad is None or torch.equal(parameter.grad, grads[name]), name
    for settings in ({}, {"cache_implementation": "static", "disable_compile": True}, {"num_beams": 2}):
        assert torch.equal(generated(cut, **settings), generated(zero, **settings)), settings


@pytest.mark.slow
@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_equals_the_model_whose_sublayer_adds_nothing(variant, tmp_path):
    family, changes = tiny.VARIANTS[variant]
    attention, mlp = cut_of(variant)
    full = tiny.model(family, **changes)
    full.save_pretrained(tmp_path / "full")
    cut, info = reload(family, tmp_path / "full", drop_attention=attention, drop_mlp=mlp, output_loading_info=True)
    assert not any(info.values())
    norms = tiny.FAMILIES[family][2]
    expected = [name for name in full.state_dict() if not gone(name, attention, mlp, norms)]
    assert list(cut.state_dict()) == expected
    # Not a copy: where weights lie in memory can decide the last bit.
    zero = zeroed(reload(family, tmp_path / "full"), attention, mlp, in_place=True)
    assert_adds_nothing(cut, zero)
    in_memory = drop_layers(reload(family, tmp_path / "full"), attention=attention, mlp=mlp)
    assert torch.equal(in_memory(tiny.tokens()).logits, zero(tiny.tokens()).logits)
    cut.save_pretrained(tmp_path / "cut", max_shard_size="20KB")
    again, info = reload(family, tmp_path / "cut", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(again(tiny.tokens()).logits, zero(tiny.tokens()).logits)
    assert again.config.get_text_config().dropped_layers == cut.config.get_text_config().dropped_layers


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_next", "mixtral"])
@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_every_layer_may_lose_it_at_once_or_in_steps(family, kind, tmp_path):
    full = tiny.model(family)
    full.save_pretrained(tmp_path / "full")
    layers = [1, 3] if (family, kind) == ("qwen3_next", "attention") else [0, 1, 2, 3]
    lacking = {"attention": [], "mlp": []} | {kind: layers}
    zero = zeroed(reload(family, tmp_path / "full"), **lacking, in_place=True)
    in_steps = AutoConfig.from_pretrained(tmp_path / "full")
    setattr(in_steps, f"drop_{kind}", layers[:1])
    setattr(in_steps, f"drop_{kind}", layers[1:])
    for cut in (
        drop_layers(reload(family, tmp_path / "full"), **{kind: layers}),
        reload(family, tmp_path / "full", **{f"drop_{kind}": layers}),
        reload(family, tmp_path / "full", config=in_steps),
    ):
        assert_adds_nothing(cut, zero)
    cut.save_pretrained(tmp_path / "cut")
    assert torch.equal(reload(family, tmp_path / "cut")(tiny.tokens()).logits, zero(tiny.tokens()).logits)


@pytest.mark.slow
def test_no_kv_cache_for_what_has_no_attention():
    cut = drop_layers(tiny.model(), attention=[0, 3])
    cache = cut(tiny.tokens(2, 12), use_cache=True).past_key_values
    sizes = [layer.keys.numel() + layer.values.numel() for layer in cache.layers]
    assert sizes == [2 * 12, 2 * 2 * 12 * 16, 2 * 2 * 12 * 16, 2 * 12]  # one number a token, or 2 x 2 heads of 8
    assert cache.get_seq_length() == 12


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_token_by_token_behind_a_prompt(implementation):
    cut = drop_layers(tiny.model(), attention=[0])
    cut.set_attn_implementation(implementation)
    ids = tiny.tokens(2, 12)
    cache = cut(ids[:, :8], use_cache=True).past_key_values
    for at in range(8, 12):
        step = cut(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits[:, -1]
        torch.testing.assert_close(step, cut(ids[:, : at + 1], use_cache=False).logits[:, -1])


@pytest.mark.slow
def test_sliding_windows_beyond_their_size():
    """The first sliding layer, by which the mask is made, has no attention."""
    changes = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    full = tiny.model("ministral", **changes)
    cut, zero = drop_layers(copy.deepcopy(full), attention=[0, 1]), zeroed(full, [0, 1], [])
    assert_adds_nothing(cut, zero)


@pytest.mark.slow
def test_with_dropped_layers_all_three_count_the_model_that_is_loaded(tmp_path):
    full = tiny.model(num_hidden_layers=6)
    full.save_pretrained(tmp_path / "full")
    zero = drop_layers(zeroed(full, [3], [4]), [1, 2])
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "full", drop_layers=[1, 2], drop_attention=[3], drop_mlp=[-2])
    assert_adds_nothing(cut, zero)
    dropped = {"layers": [1, 2], "num_hidden_layers": 6, "base": "full", "attention": [3], "mlp": [4]}
    assert cut.config.dropped_layers == dropped | {"base": cut.config.dropped_layers["base"]}
    cut.save_pretrained(tmp_path / "cut")
    # Counted in what is left, layers 0, 3, 4 and 5 of the original.
    more = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", drop_layers=[0], drop_attention=[3])
    assert record(more.config).dropped.sublayers == {"attention": [0, 2], "mlp": [1]}
    assert torch.equal(
        more(tiny.tokens()).logits, drop_layers(zeroed(full, [3, 5], [4]), [0, 1, 2])(tiny.tokens()).logits
    )


FLAGS = {"drop_layers": [1], "drop_attention": [2], "drop_mlp": [2, 3], "ln_scaling": {"depths": [1, 4, 6]}}


@pytest.mark.parametrize("order", [list(FLAGS), list(FLAGS)[::-1]])
@pytest.mark.parametrize("how", ["constructor", "for_model", "update", "from_dict"])
def test_flags_given_at_once_mean_the_same_in_any_order(order, how):
    flags = {name: FLAGS[name] for name in order}
    plain = tiny.config(num_hidden_layers=5)
    if how == "update":
        config = plain
        config.update(flags)
    elif how == "from_dict":
        config = tf.LlamaConfig.from_dict(plain.to_dict(), **flags)
    else:
        make = tf.LlamaConfig if how == "constructor" else partial(AutoConfig.for_model, "llama")
        config = make(**flags, **{key: value for key, value in plain.to_dict().items() if key != "model_type"})
    assert str(record(config).dropped) == "layers 1, 2; MLPs of layers 3"
    assert record(config).active.depths == (1, 4, 6)
    assert config.num_hidden_layers == 3


@pytest.mark.slow
def test_a_layer_that_loses_both_is_dropped(tmp_path):
    full = tiny.model()
    full.save_pretrained(tmp_path / "full")
    expected = drop_layers(copy.deepcopy(full), [1])
    for cut in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "full", drop_attention=[1], drop_mlp=[1]),
        drop_layers(drop_layers(copy.deepcopy(full), mlp=[1]), attention=[1]),
        AutoModelForCausalLM.from_pretrained(tmp_path / "full", drop_layers=[1], drop_attention=[1]),
    ):
        assert len(decoder_layers(cut)) == cut.config.num_hidden_layers == 3
        assert set(cut.config.dropped_layers) == {"layers", "num_hidden_layers", "base"}
        assert torch.equal(cut(tiny.tokens()).logits, expected(tiny.tokens()).logits)


@pytest.mark.slow
def test_each_layer_keeps_its_own_scale(tmp_path):
    scaled = tiny.model(ln_scaling=True)
    scaled.save_pretrained(tmp_path / "scaled")
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "scaled", drop_layers=[0], drop_attention=[1], drop_mlp=[3])
    assert ln_scales(cut) == [2**-0.5, 3**-0.5, 4**-0.5]
    expected = drop_layers(zeroed(scaled, [1], [3]), [0])
    assert_adds_nothing(cut, expected)
    assert torch.equal(fold_ln_scaling(cut)(tiny.tokens()).logits, expected(tiny.tokens()).logits)
    on = AutoModelForCausalLM.from_config(tiny.config(), drop_attention=[0], ln_scaling=True)
    assert ln_scales(on) == ln_scales(scaled)


@pytest.mark.slow
def test_experts_lose_nothing_but_themselves():
    """The loss that balances experts counts the layers that have some, of which router logits are returned."""
    full = tiny.model("qwen3_moe", output_router_logits=True, router_aux_loss_coef=1.0)
    cut = drop_layers(copy.deepcopy(full), mlp=[1])
    inputs = {"input_ids": tiny.tokens(), "labels": tiny.tokens()}
    got, whole = cut(**inputs), zeroed(full, [], [1])(**inputs)
    assert torch.equal(got.logits, whole.logits)
    assert len(got.router_logits) == 3
    for one, other in zip(got.router_logits, [whole.router_logits[at] for at in (0, 2, 3)], strict=True):
        assert torch.equal(one, other)
    assert torch.isfinite(got.aux_loss)


REFUSED = """
import sys, transformers as tf
for attempt in (tf.AutoConfig, tf.AutoModel, tf.AutoModelForCausalLM, tf.LlamaConfig, tf.LlamaForCausalLM):
    try:
        attempt.from_pretrained(sys.argv[1])
    except Exception as error:
        message = str(error)
    else:
        raise SystemExit(f"it was opened by {attempt.__name__}")
    named = "install hf_lnscale and import it" if "Auto" not in attempt.__name__ else "hf_lnscale_llama"
    assert named in message, message
"""


@pytest.mark.slow
@pytest.mark.parametrize("scaled", [False, True])
def test_without_the_plugin_it_is_refused(scaled, tmp_path, run_python):
    drop_layers(tiny.model(ln_scaling=scaled), attention=[1]).save_pretrained(tmp_path / "cut")
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert config["architectures"] == ["PartialLNSLlamaForCausalLM" if scaled else "PartialLlamaForCausalLM"]
    run_python(REFUSED, tmp_path / "cut", plugin=False)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert again.config.architectures == ["LlamaForCausalLM"]
    assert not hasattr(again.config, "id2label") or all(isinstance(key, int) for key in again.config.id2label)


def test_what_is_missing_is_not_allocated():
    with torch.device("meta"):
        whole = LlamaForCausalLM(tiny.config())
    cut = AutoModelForCausalLM.from_config(tiny.config(), drop_attention=[0, 2], drop_mlp=[1])
    kept = [p.numel() for name, p in whole.named_parameters() if not gone(name, [0, 2], [1])]
    assert sum(p.numel() for p in cut.parameters()) == sum(kept)


def test_what_is_missing_is_not_read(tmp_path):
    """Tensors of the checkpoint that nobody may read have a wrong shape in it."""
    full = tiny.model()
    state = full.state_dict()
    for name in state:
        if gone(name, [0], [2]):
            state[name] = torch.zeros(1)
    full.save_pretrained(tmp_path, state_dict=state)
    cut, info = LlamaForCausalLM.from_pretrained(tmp_path, drop_attention=[0], drop_mlp=[2], output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(cut(tiny.tokens()).logits, zeroed(full, [0], [2])(tiny.tokens()).logits)


def test_a_base_model_and_other_heads(tmp_path):
    full = tiny.model()
    full.save_pretrained(tmp_path / "full")
    zero = zeroed(full, [1], [])
    base, info = tf.AutoModel.from_pretrained(tmp_path / "full", drop_attention=[1], output_loading_info=True)
    assert set(info["unexpected_keys"]) == {"lm_head.weight"}
    assert torch.equal(base(tiny.tokens()).last_hidden_state, zero.model(tiny.tokens()).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    head = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    assert torch.equal(head.model(tiny.tokens()).last_hidden_state, zero.model(tiny.tokens()).last_hidden_state)


WRONG = {
    "out of range": ({"drop_attention": [4]}, "drop_attention: layer 4 does not exist in a model of 4 layers"),
    "no list": ({"drop_mlp": 2}, "drop_mlp must be a list of layer indices, got 2"),
    "a word": ({"drop_mlp": "12"}, "drop_mlp must be a list of layer indices, got '12'"),
    "twice": ({"drop_attention": [1, -3]}, "drop_attention: layer 1 is given twice"),
    "nothing left": (
        {"drop_attention": [0, 1, 2], "drop_mlp": [0, 1, 2], "drop_layers": [3]},
        "^drop_layers and drop_attention and drop_mlp: nothing would be left of 4 layers",
    ),
    "both of all": (
        {"drop_attention": [0, 1, 2, 3], "drop_mlp": [0, 1, 2, 3]},
        "^drop_attention and drop_mlp: nothing would be left of 4 layers",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_values_are_refused(case, tmp_path):
    keywords, message = WRONG[case]
    tiny.config().save_pretrained(tmp_path)
    for refused in (
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path, **keywords),
        lambda: AutoModelForCausalLM.from_config(tiny.config(), **keywords),
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path, config=tiny.config(), **keywords),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    in_memory = {key.removeprefix("drop_"): value for key, value in keywords.items()}
    with pytest.raises(ValueError, match=re.sub("drop_(attention|mlp)", r"\1", message)):
        drop_layers(tiny.model(), **in_memory)


@pytest.mark.slow
def test_what_is_missing_already_is_refused():
    cut = drop_layers(tiny.model(), attention=[1])
    with pytest.raises(ValueError, match=r"^attention: layers \[1\] have none, as it has already been dropped"):
        drop_layers(cut, attention=[1, 2])


def test_a_number_of_layers_that_was_changed_afterwards():
    config = tiny.config(drop_attention=[3])
    config.num_hidden_layers = 2
    with pytest.raises(ValueError, match="which leaves 4 layers, but num_hidden_layers is 2"):
        AutoModelForCausalLM.from_config(config)


def test_a_plan_of_all_layers_is_named():
    plan = plan_pruning(tiny.model(), tiny.tokens(8, 16), num_layers=1, progress=False)
    for layers, parts, message in (
        ((0, 1, 2, 3), {}, r"^drop_layers: the plan: \[0, 1, 2, 3\] are all 4 layers"),
        ((), {"attention": (0, 1, 2, 3), "mlp": (0, 1, 2, 3)}, "^drop_layers: nothing would be left"),
    ):
        with pytest.raises(ValueError, match=message):
            drop_layers(tiny.model(), dataclasses.replace(plan, layers=layers, **parts))


FAMILIES = {
    "opt": (tf.OPTConfig(), "mlp", "its layers have no known module that computes only mlp"),
    "bloom": (tf.BloomConfig(), "attention", "drop_attention is not supported for model_type 'bloom'"),
    "gpt_oss": (tf.GptOssConfig(), "mlp", "Use drop_layers to drop whole layers"),
    "qwen3_next": (tiny.config("qwen3_next"), "attention", r"layers \[0\] have .* instead of attention with"),
    "stablelm": (tf.StableLmConfig(use_parallel_residual=True), "attention", "only with use_parallel_residual=False"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_cannot_are_refused_with_the_reason(family):
    config, kind, message = FAMILIES[family]
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_config(config, **{f"drop_{kind}": [0]})


@pytest.mark.slow
def test_a_checkpoint_without_it_cannot_be_loaded_as_a_whole_model(tmp_path):
    drop_layers(tiny.model(), attention=[1]).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    for name in ("dropped_layers", "_name_or_path"):
        delattr(config, name)
    with pytest.raises(ValueError, match=r"has no attention in layers \[1\], which the config needs"):
        AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    # Without the mark in its metadata, as another program may have written it.
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors", metadata={"format": "pt"})
    other = AutoModelForCausalLM.from_config(tiny.config(), drop_attention=[2]).config
    with pytest.raises(ValueError, match=r"has no attention in layers \[1\], which the config needs"):
        AutoModelForCausalLM.from_pretrained(tmp_path, config=other)


def test_assigned_to_a_model_that_is_built_it_is_not_saved(tmp_path):
    model = tiny.model()
    model.config.drop_attention = [1]
    with pytest.raises(ValueError, match=r"lacks sub-layers of layers .*, but its config says \{'attention': \[1\]\}"):
        model.save_pretrained(tmp_path)


@pytest.mark.slow
def test_an_optimizer_that_holds_the_sublayer_is_refused():
    model = tiny.model()
    optimizer = torch.optim.SGD(model.model.layers[1].self_attn.parameters())
    with pytest.raises(ValueError, match=r"an optimizer .* holds parameters"):
        drop_layers(model, attention=[1])
    assert optimizer
    assert drop_layers(model, mlp=[1]) is model


@pytest.mark.slow
def test_resuming_with_other_sublayers_is_refused(tmp_path):
    def trainer(**drop):
        arguments = TrainingArguments(
            tmp_path, max_steps=1, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
            per_device_train_batch_size=2,
        )  # fmt: skip
        rows = [{"input_ids": ids, "labels": ids} for ids in tiny.tokens(4)]
        return Trainer(AutoModelForCausalLM.from_config(tiny.config(), **drop), arguments, train_dataset=rows)

    trainer(drop_attention=[1]).train()
    with pytest.raises(ValueError, match=r"without attention in \[1\], but the model has layers .* of 4 without mlp"):
        trainer(drop_mlp=[1]).train(resume_from_checkpoint=True)
    trainer(drop_attention=[1]).train(resume_from_checkpoint=True)


@pytest.mark.slow
def test_what_other_commands_say(tmp_path):
    cut = drop_layers(tiny.model(), attention=[1], mlp=[2])
    cut.save_pretrained(tmp_path / "cut")
    assert read_info(str(tmp_path / "cut"))["dropped"] | {"base": ""} == {
        "layers": [], "num_hidden_layers": 4, "base": "", "attention": [1], "mlp": [2],
    }  # fmt: skip
    with pytest.raises(ValueError, match="loading it requires hf_lnscale"):
        push(tmp_path / "cut", "user/model", dry_run=True)
    card = push(tmp_path / "cut", "user/model", allow_scaled=True, dry_run=True).card
    assert "import hf_lnscale" in card
    assert "Attention of layers 1; MLPs of layers 2 (counted from 0) of the original 4" in card
    with pytest.raises(ValueError, match="without attention or MLP"):
        export_gguf(tmp_path / "cut", tmp_path / "cut.gguf", converter=__file__)
    with pytest.raises(ValueError, match="drop_layers: layers cannot be dropped while loading a GGUF file"):
        AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", config=tiny.config(), drop_mlp=[1])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe", "olmo2"])
@pytest.mark.parametrize("scaled", [False, True])
def test_filled_with_zeros_it_is_a_plain_checkpoint_with_the_same_outputs(family, scaled, tmp_path):
    if family == "olmo2":
        if scaled:
            pytest.skip("its norms cannot be scaled")
        full = AutoModelForCausalLM.from_config(tf.Olmo2Config(**tiny._BASE)).eval()
    else:
        full = tiny.model(family, **({"ln_scaling": True} if scaled else {}))
    cut = drop_layers(full, [0], attention=[1], mlp=[3])
    cut.save_pretrained(tmp_path / "cut")
    (tmp_path / "cut" / "tokenizer_config.json").write_text("{}")
    assert export_zeros(tmp_path / "cut", tmp_path / "zeros") == tmp_path / "zeros"
    filled, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "zeros", experts_implementation="eager", output_loading_info=True
    )
    assert not any(info.values())
    assert (tmp_path / "zeros" / "tokenizer_config.json").exists()
    assert not record(filled.config).needs_plugin
    assert filled.config.dropped_layers["layers"] == [0]
    cut.set_experts_implementation("eager")
    assert torch.equal(filled(tiny.tokens()).logits, cut(tiny.tokens()).logits)
    assert torch.equal(generated(filled), generated(cut))
    absent = [p for name, p in filled.named_parameters() if name not in dict(cut.named_parameters())]
    assert absent
    assert not any(parameter.any() for parameter in absent)
    filled.train()(tiny.tokens(), labels=tiny.tokens()).loss.backward()
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in absent)
    with pytest.raises(ValueError, match="needs no zeros: all its layers have attention and MLP"):
        export_zeros(tmp_path / "zeros", tmp_path / "again")


LOADED = """
import sys, torch, tiny, transformers as tf
model = tf.LlamaForCausalLM.from_pretrained(sys.argv[1])
assert torch.equal(model(tiny.tokens()).logits, torch.load(sys.argv[2]))
"""


@pytest.mark.slow
def test_filled_with_zeros_it_loads_without_the_plugin(tmp_path, run_python):
    cut = drop_layers(tiny.model(ln_scaling=True), attention=[1], mlp=[0])
    cut.save_pretrained(tmp_path / "cut")
    torch.save(cut(tiny.tokens()).logits, tmp_path / "logits.pt")
    export_zeros(tmp_path / "cut", tmp_path / "zeros")
    run_python(LOADED, tmp_path / "zeros", tmp_path / "logits.pt", plugin=False)


@pytest.mark.slow
def test_folded_on_disk_its_scale_is_gone_and_its_sublayers_still_are(tmp_path):
    cut = drop_layers(tiny.model(ln_scaling=True), attention=[1], mlp=[0])
    cut.save_pretrained(tmp_path / "cut")
    export(tmp_path / "cut", tmp_path / "folded", progress=False)
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    assert record(folded.config).active is None
    assert record(folded.config).sublayers == {"attention": [1], "mlp": [0]}
    assert torch.equal(folded(tiny.tokens()).logits, cut(tiny.tokens()).logits)
    with pytest.raises(ValueError, match="export --format zeros"):
        export(tmp_path / "folded", tmp_path / "again")


@pytest.mark.slow
def test_what_measures_and_prunes_works_on_it():
    cut = drop_layers(tiny.model(num_hidden_layers=6), attention=[1], mlp=[3])
    ids = tiny.tokens(8, 16)
    scores = score_layers(cut, ids, "perplexity", progress=False)
    assert scores.num_layers == 6
    plan = plan_pruning(cut, ids, num_layers=2, method="greedy", held_out=ids, progress=False)
    assert plan.model["dropped_before"] == ["attention 1", "mlp 3"]
    with pytest.raises(ValueError, match="the plan was made for another model"):
        drop_layers(tiny.model(num_hidden_layers=6), plan)
    gone = set(plan.layers)
    smaller = drop_layers(cut, plan)
    assert record(smaller.config).dropped.layers == plan.layers
    assert set(record(smaller.config).dropped.attention) == {1} - gone
    lacking = drop_layers(tiny.model(num_hidden_layers=6), attention=[1], mlp=[3])
    draft, expected = draft_model(lacking, [2]), drop_layers(copy.deepcopy(lacking), [2])
    assert torch.equal(generated(draft), generated(expected))
    (step,) = heal(drop_layers(tiny.model(), mlp=[1]), [2], ids).steps
    assert step.layer == 0
    assert diagnose(drop_layers(tiny.model(), attention=[1], mlp=[0]), ids, progress=False)


def loss_of(model, ids):
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[:, :-1].double()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()


def weight(model, cache_tokens):
    """Parameters, or bytes with keys and values, of 2 heads of 8 numbers, of each layer with attention; a layer without
    it counts each token by a number."""
    params = sum(parameter.numel() for parameter in model.parameters())
    held = [2 * 2 * 8 if hasattr(layer.self_attn, "q_proj") else 1 for layer in decoder_layers(model)]
    return params if not cache_tokens else 4 * (params + cache_tokens * sum(held))


@pytest.mark.slow
@pytest.mark.parametrize("cache_tokens", [0, 4096])
def test_chosen_one_by_one_by_loss_for_what_is_saved(cache_tokens):
    """Against models from which the parts are really taken out."""
    model, ids = tiny.loud(dtype=torch.float32), tiny.tokens(8, 16)
    goal = {"target_params": 1} if not cache_tokens else {"target_memory": 1, "cache_tokens": cache_tokens}
    name = next(iter(goal))
    chosen, losses = model, loss_of(model, ids)
    units = [unit for layer in range(4) for unit in (layer, ("attention", layer), ("mlp", layer))]
    expected = []
    for _ in range(3):
        taken = {unit for unit in expected if isinstance(unit, int)}
        ratio = {}
        for unit in units:
            layer = unit if isinstance(unit, int) else unit[1]
            parts = {one for one in expected if not isinstance(one, int) and one[1] == layer}
            if layer in taken or unit in expected or (parts and not isinstance(unit, int)):
                continue
            kept = [one for one in expected if one not in parts or not isinstance(unit, int)] + [unit]
            cut = drop_layers(
                copy.deepcopy(model),
                [one for one in kept if isinstance(one, int)],
                attention=[one[1] for one in kept if not isinstance(one, int) and one[0] == "attention"],
                mlp=[one[1] for one in kept if not isinstance(one, int) and one[0] == "mlp"],
            )
            saved = weight(chosen, cache_tokens) - weight(cut, cache_tokens)
            ratio[unit] = (loss_of(cut, ids) - losses) / saved, cut, kept
        best = min(ratio, key=lambda unit: ratio[unit][0])
        chosen, expected = ratio[best][1:]
        losses = loss_of(chosen, ids)
    goal[name] = weight(chosen, cache_tokens)
    plan = plan_pruning(model, ids, held_out=ids, units="sublayers", progress=False, **goal)
    assert set(plan.units) == set(expected)
    assert plan.method["search"] == "greedy"
    assert plan.perplexity["after"] == pytest.approx(torch.tensor(losses).exp().item(), rel=1e-5)
    assert plan.notes["params"][1] == sum(parameter.numel() for parameter in chosen.parameters())
    assert len(plan.steps) == 3


SIZED = {
    "llama": (torch.bfloat16, {}),
    "gemma2": (torch.float32, {"sliding_window": 8}),
    "deepseek_v3": (torch.float32, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", SIZED)
def test_the_sizes_in_a_plan_are_those_of_the_model_without_its_units(family):
    """Its cache as well, of more tokens than a window has, each layer's a whole one."""
    dtype, changes = SIZED[family]
    full = tiny.model(family, **changes).to(dtype)
    target = Target(full, ("max_perplexity_increase", 1.0), cache_tokens=24, cache_batch=2)
    for layers, attention, mlp in (([2], [0], [3]), ([], [0, 1, 2, 3], []), ([1], [], [0])):
        sizes = target.sizes([*layers, *(("attention", at) for at in attention), *(("mlp", at) for at in mlp)])
        cut = drop_layers(copy.deepcopy(full), layers, attention=attention, mlp=mlp)
        parameters = list(cut.parameters())
        held = [
            tensor
            for layer in cut(tiny.tokens(2, 24), use_cache=True).past_key_values.layers
            for tensor in (layer.keys, layer.values)
        ]
        if family == "gemma2":  # a window keeps one token less than it is wide, as the next one comes on top
            held = [torch.zeros(*t.shape[:2], 8, t.shape[-1]) if t.shape[-2] == 7 else t for t in held]
        assert sizes["params"][1] == sum(one.numel() for one in parameters)
        assert sizes["weight_bytes"][1] == sum(one.numel() * one.element_size() for one in parameters)
        assert sizes["cache_bytes"][1] == sum(one.numel() * one.element_size() for one in held)


@pytest.mark.slow
def test_a_plan_of_sublayers_is_dropped_and_saved(tmp_path):
    model, ids = tiny.loud(dtype=torch.float32), tiny.tokens(8, 16)
    goal = {"target_memory": weight(model, 4096) - 1, "cache_tokens": 4096}
    found = prune(copy.deepcopy(model), ids, units="sublayers", heal=None, held_out=ids, progress=False, **goal)
    plan = found.plan
    assert plan.attention or plan.mlp
    path = plan.save(tmp_path / "plan.json")
    for given in (plan, path):
        again = drop_layers(copy.deepcopy(model), given)
        assert torch.equal(again(ids).logits, found.model(ids).logits)
    assert torch.tensor(loss_of(found.model, ids)).exp().item() == pytest.approx(plan.perplexity["after"], rel=1e-5)
    assert "attention of layers" in str(found) or "MLPs of layers" in str(found)
    with pytest.raises(ValueError, match="the plan drops attention or MLPs separately"):
        draft_model(model, plan)
    broken = json.loads(path.read_text()) | {"mlp": [-1]}
    path.write_text(json.dumps(broken))
    with pytest.raises(ValueError, match="its mlp must be distinct integers >= 0, got"):
        drop_layers(model, path)
    everywhere = drop_layers(copy.deepcopy(model), dataclasses.replace(plan, layers=(), attention=(0, 1, 2, 3), mlp=()))
    assert record(everywhere.config).sublayers == {"attention": [0, 1, 2, 3]}


NOT_TOGETHER = {
    "units": ({"units": "heads", "num_layers": 1}, "units must be one of layers, sublayers, got 'heads'"),
    "num_layers": ({"units": "sublayers", "num_layers": 1}, "num_layers 1 counts layers; with units=sublayers"),
    "method": ({"units": "sublayers", "target_params": 9, "method": "angular"}, "'angular' chooses whole layers"),
}


@pytest.mark.parametrize("case", NOT_TOGETHER)
def test_what_does_not_go_together(case):
    keywords, message = NOT_TOGETHER[case]
    with pytest.raises(ValueError, match=message):
        plan_pruning(tiny.model(), tiny.tokens(8, 16), progress=False, **keywords)


def test_a_family_without_sublayers_is_refused_when_they_are_to_be_chosen():
    model = AutoModelForCausalLM.from_config(tf.BloomConfig(vocab_size=96, hidden_size=32, n_layer=4, n_head=4))
    with pytest.raises(ValueError, match="units='sublayers' is not supported for model_type 'bloom'"):
        plan_pruning(model, tiny.tokens(8, 16), target_params=1000, units="sublayers", progress=False)


def test_a_budget_that_is_never_spent_ends_at_one_layer():
    """And not at as many sub-layers as there are layers but one."""
    model, ids = tiny.model(num_hidden_layers=3), tiny.tokens(8, 16)
    plan = plan_pruning(model, ids, held_out=ids, max_perplexity_increase=1e9, units="sublayers", progress=False)
    assert len(plan.layers) == 2


@pytest.mark.slow
def test_what_is_left_of_a_layer_is_chosen_as_a_layer():
    """Its last sub-layer cannot go alone, so that the last layer of all does not go with it."""
    model, ids = drop_layers(tiny.model(num_hidden_layers=2), attention=[0]), tiny.tokens(8, 16)
    assert droppable_units(model.config) == [("attention", 1), ("mlp", 1)]
    plan = plan_pruning(model, ids, held_out=ids, max_perplexity_increase=1e9, units="sublayers", progress=False)
    assert len(plan.layers) == 1
    assert len(drop_layers(model, plan).model.layers) == 1


@pytest.mark.slow
def test_a_plan_that_names_attention_and_the_argument_that_does_are_not_both_taken():
    ids = tiny.tokens(8, 16)
    plan = plan_pruning(tiny.model(), ids, held_out=ids, num_layers=1, progress=False)
    plan = dataclasses.replace(plan, layers=(), attention=(0,))
    with pytest.raises(ValueError, match=r"^attention: \[3\] conflicts with the plan's \[0\]"):
        drop_layers(tiny.model(), plan, attention=[3])
    both = drop_layers(tiny.model(), plan, mlp=[3])
    assert record(both.config).sublayers == {"attention": [0], "mlp": [3]}


@pytest.mark.slow
@pytest.mark.parametrize("head", [AutoModel, AutoModelForSequenceClassification, AutoModelForCausalLM])
def test_filled_with_zeros_it_keeps_its_head(head, tmp_path):
    torch.manual_seed(0)
    cut = head.from_config(tiny.config(), drop_attention=[1], drop_mlp=[0]).eval()
    cut.save_pretrained(tmp_path / "cut")
    export_zeros(tmp_path / "cut", tmp_path / "zeros")
    filled, info = head.from_pretrained(tmp_path / "zeros", output_loading_info=True)
    assert not any(info.values())
    assert filled.config.architectures == [type(cut).__name__]
    assert torch.equal(filled(tiny.tokens())[0], cut(tiny.tokens())[0])


@pytest.mark.slow
def test_filled_with_zeros_inside_another_model(tmp_path):
    cut = drop_layers(tiny.model("qwen2_vl_text"), attention=[1], mlp=[0])
    cut.save_pretrained(tmp_path / "cut")
    export_zeros(tmp_path / "cut", tmp_path / "zeros")
    filled = reload("qwen2_vl_text", tmp_path / "zeros")
    assert torch.equal(filled(input_ids=tiny.tokens()).logits, cut(input_ids=tiny.tokens()).logits)


@pytest.mark.slow
def test_the_text_that_sublayers_were_chosen_on_is_noted():
    model, ids = tiny.model(), tiny.tokens(8, 16)
    plan = plan_pruning(model, ids, held_out=ids, num_layers=1, progress=False)
    plan = dataclasses.replace(plan, layers=(), attention=(0,))
    drop_layers(model, plan)
    assert known_text(model.config) == plan.known_text


@pytest.mark.parametrize("parts", [{"attention": [7]}, {"mlp": "x"}])
def test_a_record_with_sublayers_that_do_not_exist_is_not_gone_on_with(parts, tmp_path):
    model, ids = tiny.model(), tiny.tokens(8, 16)
    goal = {"target_params": weight(model, 0) - 1, "units": "sublayers", "resume": tmp_path / "record.json"}
    plan_pruning(model, ids, held_out=ids, progress=False, **goal)
    record_of_search = json.loads(goal["resume"].read_text())
    record_of_search["steps"][0] |= parts
    goal["resume"].write_text(json.dumps(record_of_search))
    with pytest.raises(ValueError, match="is not the record of a search: a step must have distinct layers"):
        plan_pruning(model, ids, held_out=ids, progress=False, **goal)


@pytest.mark.slow
def test_a_cache_that_holds_keys_of_others_already():
    """PEFT's prefix tuning, and a static cache that is allocated before the first token."""
    full = tiny.loud(dtype=torch.float32)
    cut, expected = drop_layers(copy.deepcopy(full), attention=[0, 2]), zeroed(full, [0, 2], [])
    logits, written = [], []
    for model in (cut, expected):
        torch.manual_seed(0)
        tuned = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
        logits.append(tuned(input_ids=tiny.tokens()).logits)
        written.append(tuned.generate(input_ids=tiny.tokens(), max_new_tokens=4, do_sample=False))
        cache = tf.StaticCache(config=model.config, max_cache_len=32)
        cache.early_initialization(len(tiny.tokens()), 2, 8, torch.float32, "cpu")
        logits.append(model(tiny.tokens(), past_key_values=cache).logits)
    assert torch.equal(logits[0], logits[2])
    assert torch.equal(logits[1], logits[3])
    assert torch.equal(*written)
