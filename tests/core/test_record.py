"""Save and reload, and what programs without the plugin make of a scaled checkpoint."""

import json
import re
import warnings

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments

import tiny
from hf_lnscale import apply_ln_scaling, ln_scales, remove_ln_scaling
from hf_lnscale.core.record import protect, unprotect

SCALES = pytest.approx([1.0, 2**-0.5, 3**-0.5, 0.5], rel=1e-15)

# For each family folder below sys.argv[1]: loads the model and compares with the logits saved beside it.
RELOAD = """
import pathlib, sys, torch, tiny, transformers as tf
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    model = tiny.auto_class(folder.name).from_pretrained(folder, experts_implementation="eager")
    assert torch.equal(model(tiny.tokens()).logits, torch.load(folder / "logits.pt")), folder.name
    if "hf_lnscale" in sys.modules:
        assert model.config.ln_scaling == {"exponent": 0.5, "depths": [1, 2, 3, 4]}, folder.name
        assert sys.modules["hf_lnscale"].ln_scales(model)[3] == 0.5
    print(folder.name)
"""

REFUSED = """
import pathlib, sys, tiny, transformers as tf
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    cls = tiny.FAMILIES[folder.name][0]
    text = cls.sub_configs.get("text_config", cls)
    model = tiny.auto_class(folder.name)._model_mapping[cls]
    for attempt in (tf.AutoConfig, tf.AutoModel, tiny.auto_class(folder.name), cls, text, model):
        try:
            attempt.from_pretrained(folder)
        except Exception as error:
            message = str(error)
        else:
            raise SystemExit(f"{folder.name} was opened by {attempt.__name__}")
        if attempt in (cls, text, model):
            assert "install hf_lnscale and import it" in message, message
        else:
            assert "hf_lnscale_" in message and "does not recognize" in message, message
    print(folder.name)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A scaled checkpoint of every family, with the logits of the model that was saved."""
    root = tmp_path_factory.mktemp("scaled")
    for family in tiny.FAMILIES:
        model = tiny.model(family, ln_scaling=True)
        model.save_pretrained(root / family)
        backend = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
        tf.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(root / family)
        torch.save(model(tiny.tokens()).logits.detach(), root / family / "logits.pt")
    return root


@pytest.mark.slow
def test_reloaded_in_a_new_process(saved, run_python):
    assert run_python(RELOAD, saved, plugin=True).split() == sorted(tiny.FAMILIES)


@pytest.mark.slow
def test_refused_without_the_plugin(saved, run_python):
    assert run_python(REFUSED, saved, plugin=False).split() == sorted(tiny.FAMILIES)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_tokenizer_of_a_scaled_checkpoint(family, saved):
    assert tf.AutoTokenizer.from_pretrained(saved / family).unk_token == "<unk>"


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_names_on_disk_and_in_memory(family, saved):
    """On disk nothing that goes by names can take it for the family's own; in memory everything can."""
    on_disk = json.loads((saved / family / "config.json").read_text())
    plain = tiny.model(family)
    assert on_disk["model_type"] == "hf_lnscale_" + plain.config.model_type
    assert on_disk["architectures"] == ["LNS" + type(plain).__name__]
    loaded = tiny.auto_class(family).from_pretrained(saved / family)
    assert type(loaded) is type(plain)
    assert type(loaded.config) is type(plain.config)
    assert loaded.config.model_type == plain.config.model_type
    assert loaded.config.architectures == [type(plain).__name__]
    assert loaded.config.id2label == plain.config.id2label
    assert loaded.config.get_text_config().id2label == plain.config.get_text_config().id2label


def test_protection_is_undone_exactly():
    config = {"model_type": "llama", "architectures": ["LlamaForX"], "id2label": {"0": "no", "1": "yes"}}
    scaled = config | {"ln_scaling": {"exponent": 0.5, "depths": [1]}}
    protected = protect(json.loads(json.dumps(scaled)))
    assert protected["id2label"].keys() > {"0", "1"}
    undone = unprotect(protected)
    assert undone.pop("_ln_scaling_on_disk") == scaled["ln_scaling"]
    assert undone == scaled
    for other in (config, {"model_type": "hf_lnscale_x"}, {"ln_scaling": None, "model_type": "hf_lnscale_x"}):
        assert protect(dict(other)) == unprotect(dict(other)) == other


def test_labels_survive(tmp_path):
    labels = {0: "no", 1: "yes", 2: "perhaps"}
    config = tiny.config(ln_scaling=True, id2label=labels, label2id={v: k for k, v in labels.items()})
    tf.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    loaded = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.id2label == labels
    assert loaded.score.out_features == 3


def test_sharded(tmp_path):
    model = tiny.model(ln_scaling=True)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tiny.tokens()).logits, model(tiny.tokens()).logits)


def test_saved_twice_is_saved_alike(tmp_path):
    model = tiny.model(ln_scaling=True)
    model.save_pretrained(tmp_path / "first")
    AutoModelForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert (tmp_path / "first/config.json").read_bytes() == (tmp_path / "second/config.json").read_bytes()


def test_removed_and_saved_is_plain(tmp_path):
    model = tiny.model(ln_scaling=True)
    model.save_pretrained(tmp_path / "scaled")
    remove_ln_scaling(AutoModelForCausalLM.from_pretrained(tmp_path / "scaled")).save_pretrained(tmp_path / "removed")
    tiny.model().save_pretrained(tmp_path / "plain")
    assert (tmp_path / "removed/config.json").read_bytes() == (tmp_path / "plain/config.json").read_bytes()


@pytest.mark.slow
def test_torch_save(tmp_path, run_python):
    for family in ("llama", "gemma2"):
        model = tiny.model(family, ln_scaling=True)
        torch.save(model, tmp_path / f"{family}.pt")
        torch.save(model(tiny.tokens()).logits.detach(), tmp_path / f"{family}.logits")
    code = """
    import sys, torch, tiny
    for family in ("llama", "gemma2"):
        model = torch.load(f"{sys.argv[1]}/{family}.pt", weights_only=False)
        assert torch.equal(model(tiny.tokens()).logits, torch.load(f"{sys.argv[1]}/{family}.logits"))
    """
    run_python(code, tmp_path, plugin=True)


def test_a_missing_norm_is_initialized_as_in_a_plain_model(tmp_path):
    for family, value in (("llama", 1.0), ("gemma2", 0.0)):
        tiny.model(family, ln_scaling=True).save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        del weights["model.layers.2.input_layernorm.weight"]
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        weight = model.get_parameter("model.layers.2.input_layernorm.weight")
        assert isinstance(weight, torch.nn.Parameter)
        assert torch.equal(weight, torch.full_like(weight, value))
        assert ln_scales(model) == SCALES


class Tokens(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = tiny.tokens(1, 12, seed=index)[0]
        return {"input_ids": ids, "labels": ids}


def trainer(model, folder, **arguments):
    settings = {"max_steps": 6, "save_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2}
    settings |= {"report_to": "none", "use_cpu": True, "seed": 1, "learning_rate": 1e-2, "disable_tqdm": True}
    return Trainer(model, TrainingArguments(str(folder), **(settings | arguments)), train_dataset=Tokens())


def test_trainer_checkpoints_and_resume(tmp_path):
    """Stopped and resumed, with the model built anew from the checkpoint, equals never stopped."""
    whole = trainer(tiny.model(ln_scaling=True), tmp_path / "whole")
    whole.train()
    checkpoint = tmp_path / "whole/checkpoint-3"
    assert json.loads((checkpoint / "config.json").read_text())["model_type"] == "hf_lnscale_llama"

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert ln_scales(model) == SCALES
    resumed = trainer(model, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name

    def losses(run):
        return [entry["loss"] for entry in run.state.log_history if "loss" in entry]

    assert losses(resumed)[-3:] == losses(whole)[-3:]


@pytest.mark.parametrize(("trained", "resumed"), [(True, False), (False, True), (True, {"exponent": 1.0})])
def test_resuming_with_another_scaling_is_refused(trained, resumed, tmp_path):
    trainer(tiny.model(ln_scaling=trained), tmp_path).train()
    for checkpoint in (True, str(tmp_path / "checkpoint-3")):
        with pytest.raises(ValueError, match=r"resume_from_checkpoint.*was trained with ln_scaling="):
            trainer(tiny.model(ln_scaling=resumed), tmp_path).train(resume_from_checkpoint=checkpoint)


@pytest.fixture(scope="module")
def plain_and_scaled(tmp_path_factory):
    root = tmp_path_factory.mktemp("both")
    tiny.model().save_pretrained(root / "plain")
    tiny.model(ln_scaling=True).save_pretrained(root / "scaled")
    return root


COLD = [
    ("plain", True, "enabled.*trained without it.*from_config.*hf-lnscale adopt"),
    ("scaled", False, "disabled.*trained with it.*fold_ln_scaling"),
    ("scaled", {"exponent": 1.0}, "was changed"),
    ("scaled", {"depths": [2, 3, 4, 5]}, "was changed"),
]


@pytest.mark.parametrize(("which", "value", "message"), COLD, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("cls", [AutoModelForCausalLM, LlamaForCausalLM, tf.AutoModel])
def test_a_cold_switch_is_done_and_warned_of_once(which, value, message, cls, plain_and_scaled):
    with pytest.warns(UserWarning, match="ln_scaling") as caught:
        model = cls.from_pretrained(plain_and_scaled / which, ln_scaling=value)
    ours = [str(warning.message) for warning in caught if "ln_scaling" in str(warning.message)]
    assert len(ours) == 1
    assert caught[0].filename == __file__
    assert re.search(message, ours[0])
    reference = apply_ln_scaling(cls.from_pretrained(plain_and_scaled / "plain"), value)
    assert torch.equal(model(tiny.tokens())[0], reference(tiny.tokens())[0])


def test_no_warning_where_nothing_is_cold(plain_and_scaled):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for value in (None, True, {"exponent": 0.5}, {"depths": [1, 2, 3, 4]}):
            model = AutoModelForCausalLM.from_pretrained(plain_and_scaled / "scaled", ln_scaling=value)
            assert ln_scales(model) == SCALES
        for value in (None, False, {"exponent": 0.0}):
            AutoModelForCausalLM.from_pretrained(plain_and_scaled / "plain", ln_scaling=value)
        config = AutoConfig.from_pretrained(plain_and_scaled / "plain", ln_scaling=True)
        AutoModelForCausalLM.from_config(config)  # new weights: nothing was trained otherwise


def test_true_keeps_the_depths_of_the_checkpoint(tmp_path):
    tiny.model(ln_scaling={"exponent": 1.0, "depths": [1, 2, 5, 10]}).save_pretrained(tmp_path)
    assert ln_scales(AutoModelForCausalLM.from_pretrained(tmp_path, ln_scaling=True)) == [1.0, 0.5, 0.2, 0.1]


def test_fewer_layers_than_depths_is_refused(tmp_path):
    """Layers cut away by a configuration value would otherwise get, or keep, depths by chance (1, 2, ... do not)."""
    tiny.model(ln_scaling={"depths": [1, 2, 3, 5]}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="one entry per layer, 2 for this model, got 4"):
        AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2)
    with pytest.warns(UserWarning, match="was changed"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=2, ln_scaling={"depths": [1, 2]})
    assert ln_scales(model) == pytest.approx([1.0, 2**-0.5])
