"""PEFT adapters come back on the base that they were trained on, or not at all."""

import json
import shutil
import warnings

import peft
import pytest
import torch
import yaml
from peft import (
    ArrowConfig,
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    CartridgeConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    PromptTuningConfig,
    XLoraConfig,
    create_arrow_model,
    get_peft_model,
)
from peft.utils import hotswap
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

import tiny
from hf_lnscale import fold_ln_scaling, ln_scales
from hf_lnscale.hooks.adapter_note import TRIPWIRE

SCALED, PRUNED = {"ln_scaling": True}, {"drop_layers": [1]}
# What the checkpoint on disk is made with, and what is given as keywords on top of it.
BASES = {
    "plain": ({}, {}),
    "scaled by keyword": ({}, SCALED),
    "scaled on disk": (SCALED, {}),
    "scaled on disk, off by keyword": (SCALED, {"ln_scaling": False}),
    "another exponent by keyword": (SCALED, {"ln_scaling": {"exponent": 1.0}}),
    "pruned by keyword": ({}, PRUNED),
    "pruned on disk": (PRUNED, {}),
    "pruned on disk and again by keyword": (PRUNED, PRUNED),
    "both by keyword": ({}, SCALED | PRUNED),
    "scaled on disk, pruned by keyword": (SCALED, PRUNED),
    "both on disk": (SCALED | PRUNED, {}),
    "without attention by keyword": ({}, {"drop_attention": [1]}),
    "without MLP on disk, without attention by keyword": ({"drop_mlp": [1]}, PRUNED | {"drop_attention": [2]}),
}
# Those whose path gives them back to a program without the plugin.
STOCK = ["plain", "pruned on disk"]
pytestmark = pytest.mark.filterwarnings("error:.*ln_scaling was", "error:.*Unexpected keyword arguments")


def quietly(load):
    """Without the warnings of a scale that is switched in a checkpoint trained otherwise."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="ln_scaling was")
        return load()


def base(tmp_path, which):
    """A model loaded from disk, with the scales and the layers that `which` says."""
    on_disk, keywords = BASES[which]
    folder = tmp_path / "base"
    if not folder.exists():
        tiny.model().save_pretrained(tmp_path / "full")
        quietly(lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "full", **on_disk)).save_pretrained(folder)
        shutil.rmtree(tmp_path / "full")
    return quietly(lambda: AutoModelForCausalLM.from_pretrained(folder, **keywords))


def lora(model, seed=0, **settings):
    torch.manual_seed(seed)
    config = LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM", **settings
    )
    return get_peft_model(model, config).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=tiny.tokens()).logits


def adapter_of(tmp_path, which, folder="adapter"):
    """An adapter on disk, and what the model that it was saved from computes."""
    model = lora(base(tmp_path, which))
    model.save_pretrained(tmp_path / folder)
    return logits(model)


TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")))
LOADERS = {
    "AutoPeftModelForCausalLM": lambda path: AutoPeftModelForCausalLM.from_pretrained(path),
    "AutoModelForCausalLM": lambda path: AutoModelForCausalLM.from_pretrained(path),
    "LlamaForCausalLM": lambda path: LlamaForCausalLM.from_pretrained(path),
    "LlamaForCausalLM, a string": lambda path: LlamaForCausalLM.from_pretrained(str(path)),
    "pipeline": lambda path: pipeline("text-generation", model=str(path), tokenizer=TOKENIZER, device="cpu").model,
}


@pytest.mark.slow
@pytest.mark.parametrize("which", BASES)
def test_an_adapter_comes_back_on_its_base(which, tmp_path):
    expected = adapter_of(tmp_path, which)
    for name, load in LOADERS.items():
        assert torch.equal(logits(load(tmp_path / "adapter")), expected), name
    given = base(tmp_path, which)
    assert torch.equal(logits(PeftModel.from_pretrained(given, tmp_path / "adapter")), expected)
    given = base(tmp_path, which)
    given.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(given), expected)


@pytest.mark.slow
@pytest.mark.parametrize("which", BASES)
def test_an_adapter_on_another_base_is_refused(which, tmp_path):
    """Every other base than its own, by PEFT and by transformers; the base stays as it was."""
    adapter_of(tmp_path, which)
    shutil.rmtree(tmp_path / "base")
    for other in BASES:
        others = base(tmp_path / other.replace(" ", "-"), other)
        mine = base(tmp_path, which)
        if (ln_scales(others), dropped(others)) == (ln_scales(mine), dropped(mine)):
            continue
        names = [name for name, _ in others.named_modules()]
        for load in (PeftModel.from_pretrained, lambda model, path: model.load_adapter(path)):
            with pytest.raises(ValueError, match=r"was trained on a base with .*; this base has "):
                load(others, tmp_path / "adapter")
        assert [name for name, _ in others.named_modules()] == names


@pytest.mark.slow
@pytest.mark.parametrize("mapping", [3, "x", [1], None, {}, {"other": 1}, {"hf_lnscale": None}])
def test_a_note_that_is_lost(mapping, tmp_path):
    """What is left in `peft_type` says that there was one."""
    adapter_of(tmp_path, "both by keyword")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_mapping": mapping}))
    for load in (*LOADERS.values(), lambda path: PeftModel.from_pretrained(base(tmp_path, "both by keyword"), path)):
        with pytest.raises(ValueError, match=r"auto_mapping\['hf_lnscale'\].* is missing in its adapter_config\.json"):
            load(tmp_path / "adapter")


def dropped(model):
    return {**(getattr(model.config, "dropped_layers", None) or {}), "base": ""}


def test_what_the_refusal_says(tmp_path):
    adapter_of(tmp_path, "both by keyword")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="was trained on") as refusal:
        PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert str(refusal.value) == (
        f"the adapter '{tmp_path / 'adapter'}' was trained on a base with ln_scaling={{'exponent': 0.5, 'depths': "
        "[1, 3, 4]} and layers [0, 2, 3] of 4 (dropped: [1]); this base has ln_scaling=None and all its layers. Load "
        "the base with from_pretrained(..., drop_layers=[1], ln_scaling={'exponent': 0.5, 'depths': [1, 3, 4]})"
    )
    advice = {"drop_layers": [1], "ln_scaling": {"exponent": 0.5, "depths": [1, 3, 4]}}
    PeftModel.from_pretrained(
        quietly(lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "base", **advice)), tmp_path / "adapter"
    )
    # A base that lacks layers cannot be made into the one that was trained on.
    adapter_of(tmp_path, "plain", "plain adapter")
    with pytest.raises(
        ValueError, match=r"all its layers; .* layers \[0, 2, 3\] of 4 .*\. Load it on that base, '.*base'"
    ):
        PeftModel.from_pretrained(base(tmp_path, "pruned by keyword"), tmp_path / "plain adapter")


def test_keywords_that_contradict_the_adapter_are_refused(tmp_path):
    """LoRA of layer 2 would sit on what was layer 3."""
    adapter_of(tmp_path, "plain")
    for load in (AutoPeftModelForCausalLM, AutoModelForCausalLM, LlamaForCausalLM):
        with pytest.raises(
            ValueError, match="was trained on a base with ln_scaling=None and all its layers; this base"
        ):
            load.from_pretrained(tmp_path / "adapter", drop_layers=[1])
        with pytest.raises(
            ValueError, match="was trained on a base with ln_scaling=None and all its layers; this base"
        ):
            quietly(lambda load=load: load.from_pretrained(tmp_path / "adapter", ln_scaling=True))


@pytest.mark.slow
def test_without_the_plugin(tmp_path, run_python):
    """PEFT alone refuses what it would get wrong, and loads the rest, to the same numbers and without a warning."""
    for which in BASES:
        (tmp_path / which).mkdir()
        torch.save(adapter_of(tmp_path / which, which), tmp_path / which / "expected")
        kind = json.loads((tmp_path / which / "adapter" / "adapter_config.json").read_text())["peft_type"]
        assert kind == ("LORA" if which in STOCK else "LORA" + TRIPWIRE)
    torch.save(tiny.tokens(), tmp_path / "tokens")
    code = """
    import sys, torch, warnings
    from pathlib import Path
    from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    warnings.filterwarnings("error", message=".*nexpected")
    plain = lambda: LlamaForCausalLM(LlamaConfig(**eval(sys.argv[2])))
    tokens = torch.load("tokens")
    for folder in (path for path in Path().iterdir() if path.is_dir()):
        for load in (
            lambda path: AutoPeftModelForCausalLM.from_pretrained(path),
            lambda path: AutoModelForCausalLM.from_pretrained(path),
            lambda path: PeftModel.from_pretrained(plain(), path),
            lambda path: plain().load_adapter(path),
        ):
            try:
                model = load(folder / "adapter")
            except (KeyError, ValueError) as error:
                assert folder.name not in eval(sys.argv[1])
                assert "install hf_lnscale" in str(error) or "hf_lnscale_llama" in str(error), error  # adapter or base
                continue
            assert folder.name in eval(sys.argv[1]), folder
            if folder.name == "pruned on disk" and isinstance(model, torch.nn.Module):
                print(torch.equal(model(input_ids=tokens).logits, torch.load(folder / "expected")))
    """
    sizes = {key: value for key, value in tiny.config().to_dict().items() if key.endswith("_size") or "num" in key}
    # The last is on a base of random weights.
    assert run_python(code, STOCK, sizes, plugin=False).split() == ["True", "True", "False"]


@pytest.mark.slow
def test_merged_it_is_a_plain_checkpoint(tmp_path, run_python):
    for which in ("scaled by keyword", "pruned by keyword", "both by keyword"):
        (tmp_path / which).mkdir()
        expected = adapter_of(tmp_path / which, which)
        merged = AutoPeftModelForCausalLM.from_pretrained(tmp_path / which / "adapter").merge_and_unload()
        if "ln_scaling" in BASES[which][1]:
            merged = fold_ln_scaling(merged)
        merged.save_pretrained(tmp_path / which / "merged")
        torch.save(expected, tmp_path / which / "expected")
    torch.save(tiny.tokens(), tmp_path / "tokens")
    code = """
    import torch
    from pathlib import Path
    from transformers import AutoModelForCausalLM
    for folder in (path for path in Path().iterdir() if path.is_dir()):
        model, info = AutoModelForCausalLM.from_pretrained(folder / "merged", output_loading_info=True)
        assert type(model).__name__ == "LlamaForCausalLM" and not any(info.values()), info
        got, expected = model(torch.load("tokens")).logits, torch.load(folder / "expected")
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    """
    run_python(code, plugin=False)


@pytest.mark.slow
def test_an_adapter_made_without_the_plugin(tmp_path, run_python):
    """On a plain base and on one that is pruned on disk, which is a plain one to PEFT."""
    for which in STOCK:
        (tmp_path / which).mkdir()
        base(tmp_path / which, which)
    torch.save(tiny.tokens(), tmp_path / "tokens")
    code = """
    import torch
    from pathlib import Path
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    for folder in (path for path in Path().iterdir() if path.is_dir()):
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(folder.absolute() / "base"),
            LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
        ).eval()
        model.save_pretrained(folder / "adapter")
        torch.save(model(torch.load("tokens")).logits.detach(), folder / "expected")
    """
    run_python(code, plugin=False)
    for which in STOCK:
        expected = torch.load(tmp_path / which / "expected")
        for load in LOADERS.values():
            assert torch.equal(logits(load(tmp_path / which / "adapter")), expected)
        with pytest.raises(ValueError, match="was trained on a base with"):
            PeftModel.from_pretrained(base(tmp_path / "other", "both by keyword"), tmp_path / which / "adapter")
        if which != "plain":
            with pytest.raises(ValueError, match="was trained on a base with"):
                PeftModel.from_pretrained(base(tmp_path / "whole", "plain"), tmp_path / which / "adapter")
    with pytest.raises(ValueError, match="was trained on a base with"):
        base(tmp_path / "pruned on disk", "pruned on disk and again by keyword").load_adapter(
            tmp_path / "pruned on disk" / "adapter"
        )
    adapter_of(tmp_path / "plain", "plain", "adapter with the plugin")
    one, other = (
        json.loads((tmp_path / "plain" / folder / "adapter_config.json").read_text())
        for folder in ("adapter", "adapter with the plugin")
    )
    assert one | {"target_modules": 0} == other | {"target_modules": 0}  # a set, in no order
    pruned = base(tmp_path / "pruned on disk", "pruned on disk")
    (tmp_path / "pruned on disk" / "base").rename(tmp_path / "moved")
    with pytest.warns(UserWarning, match=r"cannot tell whether the adapter .* was trained on this base"):
        PeftModel.from_pretrained(pruned, tmp_path / "pruned on disk" / "adapter")


def test_several_adapters_on_one_model(tmp_path):
    which = "both by keyword"
    model = lora(base(tmp_path, which))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    expected = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        expected[name] = logits(model)
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    again.load_adapter(tmp_path / "adapter" / "second", "second")
    plain = lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    for name in ("default", "second"):
        again.set_adapter(name)
        assert torch.equal(logits(again), expected[name])
        folder = tmp_path / "adapter" if name == "default" else tmp_path / "adapter" / name
        with pytest.raises(ValueError, match="was trained on a base with"):
            plain.load_adapter(folder, "third")
    assert list(plain.peft_config) == ["default"]


def with_experts(model, adapter):
    model.config.use_cache = False
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=tiny.HIDDEN, xlora_depth=1, adapters={"0": str(adapter)})
    return get_peft_model(model, config)


def hotswapped(model, adapter, swap=None):
    model = lora(model, seed=1)
    (swap or hotswap.hotswap_adapter)(model, str(adapter), adapter_name="default")
    return model


def second_of_mixed(model, adapter):
    mixed = get_peft_model(model, LoraConfig(target_modules=["v_proj"]), mixed=True)
    mixed.load_adapter(str(adapter), "second")
    mixed.set_adapter("second")
    return mixed.eval()


OTHER_WAYS = {
    "PeftMixedModel": lambda model, adapter: PeftMixedModel.from_pretrained(model, str(adapter)).eval(),
    "PeftMixedModel, a second one": second_of_mixed,
    "hotswap_adapter": hotswapped,
    "hotswap_adapter imported before": lambda model, adapter: hotswapped(
        model, adapter, hotswap.hotswap_adapter.__wrapped__
    ),
    "X-LoRA": with_experts,
}


@pytest.mark.slow
@pytest.mark.parametrize("way", OTHER_WAYS)
def test_other_ways_to_load_an_adapter(way, tmp_path):
    expected = adapter_of(tmp_path, "both by keyword")
    load = OTHER_WAYS[way]
    found = load(base(tmp_path, "both by keyword"), tmp_path / "adapter")
    if way != "X-LoRA":  # it weighs its experts
        assert torch.equal(logits(found), expected)
    with pytest.raises(ValueError, match=r"was trained on a base with .*Load the base with from_pretrained\(\.\.\., "):
        load(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")


DIFFERENT = ["both by keyword", "pruned by keyword", "scaled on disk", "without attention by keyword"]


@pytest.mark.parametrize("which", DIFFERENT)
def test_arrow_routes_between_adapters_of_its_base(which, tmp_path):
    """Between twice the same one, which is then that one (arXiv 2405.11157: the weights of the experts add up to 1)."""
    expected = adapter_of(tmp_path, which)
    experts = [str(tmp_path / "adapter")] * 2
    routed = create_arrow_model(base(tmp_path, which), experts, ArrowConfig(top_k=2)).eval()
    torch.testing.assert_close(logits(routed), expected)
    other = tiny.model() if which == "scaled on disk" else AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match="was trained on a base with "):
        create_arrow_model(other, experts, ArrowConfig(top_k=2))


def cartridge(model, seed, folder):
    """Keys and values of three tokens for each layer; returns them."""
    torch.manual_seed(seed)
    tuned = get_peft_model(model, CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    tuned.save_pretrained(folder)
    return load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]


@pytest.mark.parametrize("which", DIFFERENT[:3])
def test_cartridges_are_composed_for_their_base(which, tmp_path):
    parts = [cartridge(base(tmp_path, which), seed, tmp_path / f"part {seed}") for seed in (0, 1)]
    peft.compose_cartridge_adapters([tmp_path / "part 0", tmp_path / "part 1"], output_path=tmp_path / "both")
    expected = get_peft_model(
        base(tmp_path, which), CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=6)
    ).eval()
    expected.prompt_encoder["default"].load_prompt_embeddings(torch.cat(parts))
    for name in ("part 0", "both"):
        loaded = PeftModel.from_pretrained(base(tmp_path, which), tmp_path / name).eval()
        assert torch.equal(logits(loaded), logits(expected)) == (name == "both")
        with pytest.raises(ValueError, match="was trained on a base with "):
            PeftModel.from_pretrained(tiny.model(), tmp_path / name)
        saved = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert saved["peft_type"] == "CARTRIDGE" + TRIPWIRE


def test_cartridges_of_different_bases_are_not_composed(tmp_path):
    """All have the same shapes; the last lacks another layer."""
    AutoModelForCausalLM.from_config(tiny.config()).save_pretrained(tmp_path / "base")
    bases = {"plain": {}, "scaled": SCALED}, {"one": PRUNED, "another": {"drop_layers": [2]}}
    for pair in bases:
        for name, flags in pair.items():
            model = quietly(lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "base", **flags))  # noqa: B023
            cartridge(model, 0, tmp_path / name)
        with pytest.raises(ValueError, match=r"adapter_paths .* were trained on different bases"):
            peft.compose_cartridge_adapters([tmp_path / name for name in pair], output_path=tmp_path / "both")
        assert not (tmp_path / "both").exists()


def test_a_cartridge_that_is_not_there_is_refused_as_without_the_plugin(tmp_path):
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json' at '.*none'"):
        peft.compose_cartridge_adapters([tmp_path / "none", tmp_path / "nor this"], output_path=tmp_path / "both")


def test_a_configuration_that_is_saved_again_keeps_its_note(tmp_path):
    adapter_of(tmp_path, "both by keyword")
    PeftConfig.from_pretrained(tmp_path / "adapter").save_pretrained(tmp_path / "again")
    first, again = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("adapter", "again"))
    assert again["peft_type"] == first["peft_type"] == "LORA" + TRIPWIRE
    assert again["auto_mapping"] == first["auto_mapping"]


@pytest.mark.slow
@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize("which", DIFFERENT)
def test_the_vocabulary_of_a_base_and_the_card_of_its_adapter(which, resized, tmp_path):
    """PEFT reads the base's configuration by its name, to save embeddings of another size with the adapter."""
    model = base(tmp_path, which)
    if resized:
        model.resize_token_embeddings(100)
    tuned = lora(model)
    expected = logits(tuned)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Could not find a config file")
        tuned.save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("embed_tokens" in name for name in stored) == resized
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == str(tmp_path / "base")
    again = base(tmp_path, which)
    if resized:
        again.resize_token_embeddings(100)
    assert torch.equal(logits(PeftModel.from_pretrained(again, tmp_path / "adapter").eval()), expected)


def test_an_adapter_in_memory_is_swapped_into_its_own_base(tmp_path):
    model = lora(base(tmp_path, "both by keyword"), seed=1)
    state = {name: torch.zeros_like(one) for name, one in peft.get_peft_model_state_dict(model).items()}
    state = hotswap._insert_adapter_name_into_state_dict(state, adapter_name="default", parameter_prefix="lora_")
    hotswap.hotswap_adapter_from_state_dict(model, state, "default", model.peft_config["default"])
    assert torch.equal(logits(model), logits(base(tmp_path, "both by keyword")))


def test_an_adapter_that_transformers_holds(tmp_path):
    """`model.add_adapter` and `Trainer.save_model`, without PEFT's own model around it."""
    model = base(tmp_path, "both by keyword")
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    Trainer(model.eval(), TrainingArguments(str(tmp_path / "run"), use_cpu=True)).save_model(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()  # by which it would be resumed as a whole model
    for name, load in LOADERS.items():
        assert torch.equal(logits(load(tmp_path / "adapter")), logits(model)), name


def test_without_a_task_type(tmp_path):
    """PEFT then notes the class of the base, in the same field."""
    model = get_peft_model(base(tmp_path, "both by keyword"), LoraConfig(target_modules=["q_proj"])).eval()
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(AutoPeftModel.from_pretrained(tmp_path / "adapter")), logits(model))


def test_saved_again_the_note_is_that_of_the_base_of_then(tmp_path):
    model = lora(base(tmp_path, "scaled by keyword"))
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    fold_ln_scaling(model)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="folded into its weights"):
        PeftModel.from_pretrained(base(tmp_path, "scaled by keyword"), tmp_path / "adapter")
    with pytest.raises(ValueError, match="folded into its weights"):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    folded = fold_ln_scaling(base(tmp_path, "scaled by keyword"))
    assert torch.equal(logits(PeftModel.from_pretrained(folded, tmp_path / "adapter")), expected)


@pytest.mark.parametrize("kind", ["IA3", "prompt tuning"])
def test_other_kinds_of_adapters(kind, tmp_path):
    if kind == "IA3":
        config = IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["k_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            init_ia3_weights=False,
        )
    else:
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(base(tmp_path, "both by keyword"), config).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ValueError, match="was trained on a base with"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")


@pytest.mark.parametrize("family", ["gemma2", "qwen3_vl_text"])
def test_other_families(family, tmp_path):
    tiny.model(family).save_pretrained(tmp_path / "base")
    auto = tiny.auto_class(family)
    scaled = quietly(lambda: auto.from_pretrained(tmp_path / "base", ln_scaling=True, drop_layers=[2]))
    model = get_peft_model(scaled, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(auto.from_pretrained(tmp_path / "adapter")), logits(model))
    with pytest.raises(ValueError, match=r"drop_layers=\[2\], ln_scaling="):
        PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "base"), tmp_path / "adapter")


def test_a_model_that_is_not_of_transformers(tmp_path):
    def other():
        return torch.nn.Sequential(torch.nn.Linear(4, 4))

    model = get_peft_model(other(), LoraConfig(target_modules=["0"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(other(), tmp_path)
    weight = "base_model.model.0.lora_A.default.weight"
    assert torch.equal(again.get_parameter(weight), model.get_parameter(weight))


def test_an_adapter_on_the_hub(tmp_path, monkeypatch):
    """As it lies in the cache. A model's own class does not look for an adapter there before it has the base."""
    expected = adapter_of(tmp_path, "both by keyword")
    repository = tmp_path / "cache" / "models--user--adapter"
    shutil.copytree(tmp_path / "adapter", repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for auto in (AutoModelForCausalLM, AutoPeftModelForCausalLM):
        assert torch.equal(logits(auto.from_pretrained("user/adapter")), expected)
    given = base(tmp_path, "both by keyword")
    assert torch.equal(logits(PeftModel.from_pretrained(given, "user/adapter")), expected)
    for load in (
        lambda: LlamaForCausalLM.from_pretrained("user/adapter"),
        lambda: PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), "user/adapter"),
    ):
        with pytest.raises(ValueError, match=r"from_pretrained\(\.\.\., drop_layers=\[1\], ln_scaling="):
            load()
