"""Every way in which a model comes into being."""

import copy

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

import tiny
from hf_lnscale import LNScalingConfig, apply_ln_scaling, ln_scales, remove_ln_scaling
from oracles import with_hooked_norms

SCALES = pytest.approx([1.0, 2**-0.5, 3**-0.5, 0.5], rel=1e-15)


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    tiny.model().save_pretrained(folder)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, tiny.VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(plain_folder):
    plain = LlamaForCausalLM.from_pretrained(plain_folder)
    return with_hooked_norms(plain, tiny.LLAMA_NORMS, [1.0, 2**-0.5, 3**-0.5, 0.5])(tiny.tokens()).logits


VALUES = [
    True,
    {},
    {"exponent": 0.5},
    {"depths": [1, 2, 3, 4]},
    LNScalingConfig(),
    LNScalingConfig(depths=(1, 2, 3, 4)),
]


@pytest.mark.filterwarnings("ignore:ln_scaling was enabled")
@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_every_form_of_the_argument(value, plain_folder, expected):
    model = AutoModelForCausalLM.from_pretrained(plain_folder, ln_scaling=value)
    torch.testing.assert_close(model(tiny.tokens()).logits, expected)
    assert model.config.ln_scaling == {"exponent": 0.5, "depths": [1, 2, 3, 4]}


FROM_PRETRAINED = {
    "auto": lambda folder: AutoModelForCausalLM.from_pretrained(folder, ln_scaling=True),
    "concrete": lambda folder: LlamaForCausalLM.from_pretrained(folder, ln_scaling=True),
    "auto with config": lambda folder: AutoModelForCausalLM.from_pretrained(
        folder, config=AutoConfig.from_pretrained(folder), ln_scaling=True
    ),
    "concrete with config": lambda folder: LlamaForCausalLM.from_pretrained(
        folder, config=LlamaConfig.from_pretrained(folder), ln_scaling=True
    ),
    "flag in auto config": lambda folder: AutoModelForCausalLM.from_pretrained(
        folder, config=AutoConfig.from_pretrained(folder, ln_scaling=True)
    ),
    "flag in concrete config": lambda folder: LlamaForCausalLM.from_pretrained(
        folder, config=LlamaConfig.from_pretrained(folder, ln_scaling=True)
    ),
    "with loading info": lambda folder: LlamaForCausalLM.from_pretrained(
        folder, ln_scaling=True, output_loading_info=True
    )[0],
    "device map": lambda folder: AutoModelForCausalLM.from_pretrained(folder, ln_scaling=True, device_map="cpu"),
    "pipeline": lambda folder: (
        tf.pipeline("text-generation", model=str(folder), model_kwargs={"ln_scaling": True}, device="cpu").model
    ),
    "in memory": lambda folder: apply_ln_scaling(LlamaForCausalLM.from_pretrained(folder)),
}


@pytest.mark.filterwarnings("ignore:ln_scaling was enabled")
@pytest.mark.parametrize("way", FROM_PRETRAINED)
def test_from_pretrained(way, plain_folder, expected):
    model = FROM_PRETRAINED[way](plain_folder)
    torch.testing.assert_close(model(tiny.tokens()).logits, expected)
    assert ln_scales(model) == SCALES


FROM_CONFIG = {
    "class": lambda: LlamaForCausalLM(tiny.config(ln_scaling=True)),
    "base class": lambda: LlamaModel(tiny.config(ln_scaling=True)),
    "auto": lambda: AutoModelForCausalLM.from_config(tiny.config(ln_scaling=True)),
    "auto keyword": lambda: AutoModelForCausalLM.from_config(tiny.config(), ln_scaling=True),
    "auto base keyword": lambda: tf.AutoModel.from_config(tiny.config(), ln_scaling=True),
    "attribute": lambda: LlamaForCausalLM(_with_attribute(tiny.config())),
    "for_model": lambda: LlamaForCausalLM(AutoConfig.for_model("llama", **tiny._BASE, ln_scaling=True)),
    "to_dict and back": lambda: LlamaForCausalLM(LlamaConfig.from_dict(tiny.config(ln_scaling=True).to_dict())),
    "deepcopy of config": lambda: LlamaForCausalLM(copy.deepcopy(tiny.config(ln_scaling=True))),
    "sequence classification": lambda: tf.AutoModelForSequenceClassification.from_config(tiny.config(ln_scaling=True)),
    "token classification": lambda: tf.AutoModelForTokenClassification.from_config(tiny.config(ln_scaling=True)),
    "question answering": lambda: tf.AutoModelForQuestionAnswering.from_config(tiny.config(ln_scaling=True)),
}


def _with_attribute(config):
    config.ln_scaling = True
    return config


@pytest.mark.parametrize("way", FROM_CONFIG)
def test_from_config(way):
    assert ln_scales(FROM_CONFIG[way]()) == SCALES


def test_a_configuration_that_is_passed_in_is_not_changed():
    config = tiny.config()
    before = config.to_dict()
    AutoModelForCausalLM.from_config(config, ln_scaling=True)
    assert config.ln_scaling is None
    assert config.to_dict() == before | {"dtype": config.to_dict()["dtype"]}


@pytest.mark.parametrize("head", [tf.AutoModelForSequenceClassification, tf.AutoModelForTokenClassification])
def test_heads_on_a_trained_base(head, tmp_path):
    base = tiny.model(ln_scaling=True)
    base.save_pretrained(tmp_path)
    model = head.from_pretrained(tmp_path, num_labels=3)
    assert ln_scales(model) == SCALES
    assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    torch.testing.assert_close(model.model(tiny.tokens())[0], base.model(tiny.tokens())[0], rtol=0, atol=0)


def test_sft_config(plain_folder, tmp_path):
    """TRL builds the model from its name and `model_init_kwargs`."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    with pytest.warns(UserWarning, match="enabled"):
        trainer = SFTTrainer(
            model=str(plain_folder),
            args=SFTConfig(
                output_dir=str(tmp_path),
                model_init_kwargs={"ln_scaling": True},
                max_steps=1,
                per_device_train_batch_size=2,
                max_length=16,
                report_to="none",
                use_cpu=True,
                bf16=False,
            ),
            train_dataset=Dataset.from_dict({"text": ["w3 w4 w5 w6 w7", "w8 w9 w10 w11"] * 4}),
        )
    assert ln_scales(trainer.model) == SCALES
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert ln_scales(AutoModelForCausalLM.from_pretrained(tmp_path / "final")) == SCALES


@pytest.mark.filterwarnings("ignore:ln_scaling was enabled")
@pytest.mark.parametrize("family", tiny.COMPOSITE)
def test_text_stack_of_a_vision_model(family, tmp_path):
    """The flag is the text decoder's, wherever it is said, and its vision tower is left alone."""
    tiny.model(family).save_pretrained(tmp_path)
    model = tf.AutoModelForImageTextToText.from_pretrained(tmp_path, ln_scaling=True)
    assert ln_scales(model) == SCALES
    assert model.config.text_config.ln_scaling == model.config.ln_scaling == {"exponent": 0.5, "depths": [1, 2, 3, 4]}
    assert "ln_scaling" not in model.config.to_dict()
    assert "ln_scaling" not in model.config.to_dict()["vision_config"]


def test_a_supported_decoder_inside_another_composite_model():
    text = {key: value for key, value in tiny._BASE.items()} | {"model_type": "llama"}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, "projection_dim": 16}
    config = tf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=90, ln_scaling=True)
    assert ln_scales(tf.LlavaForConditionalGeneration(config)) == SCALES


def test_apply_and_remove_in_memory():
    model = tiny.model()
    classes = [type(module) for module in model.modules()]
    before = model(tiny.tokens()).logits
    assert apply_ln_scaling(model) is model
    assert apply_ln_scaling(model) is model  # once more: still scaled once
    assert ln_scales(model) == SCALES
    expected = with_hooked_norms(tiny.model(), tiny.LLAMA_NORMS, [1.0, 2**-0.5, 3**-0.5, 0.5])(tiny.tokens()).logits
    torch.testing.assert_close(model(tiny.tokens()).logits, expected)
    assert remove_ln_scaling(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(tiny.tokens()).logits, before)
    assert model.config.ln_scaling is None
    assert ln_scales(model) == [1.0] * 4
    remove_ln_scaling(model)


def test_apply_replaces_a_scaling_but_true_keeps_it():
    model = tiny.model(ln_scaling={"exponent": 1.0, "depths": [2, 4, 5, 8]})
    apply_ln_scaling(model, True)
    assert ln_scales(model) == [0.5, 0.25, 0.2, 0.125]
    apply_ln_scaling(model, {"exponent": 0.0})
    assert ln_scales(model) == [1.0] * 4
    apply_ln_scaling(model, False)
    assert model.config.ln_scaling is None


THREADS = """
import sys, threading
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM
import tiny

plain_folder, scaled_folder, expected = sys.argv[1:]
plain = LlamaForCausalLM.from_pretrained(plain_folder)(tiny.tokens()).logits
scaled = AutoModelForCausalLM.from_pretrained(scaled_folder)(tiny.tokens()).logits
torch.testing.assert_close(scaled, torch.load(expected))
wrong = []

def work(folder, logits):
    try:
        for _ in range(8):
            if not torch.equal(AutoModelForCausalLM.from_pretrained(folder)(tiny.tokens()).logits, logits):
                wrong.append(folder)
    except Exception as error:
        wrong.append(repr(error))

threads = [threading.Thread(target=work, args=pair) for pair in ((plain_folder, plain), (scaled_folder, scaled)) * 2]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not wrong, wrong
"""


@pytest.mark.slow
def test_two_models_in_two_threads(plain_folder, expected, tmp_path, run_python):
    """One with the scale and one without, loaded and run at the same time in one process, over and over.

    In a process of its own: while it loads, transformers replaces `PreTrainedModel.tie_weights`, and two threads that
    do so at once may put back each other's replacement; later models then are not tied.
    """
    tiny.model(ln_scaling=True).save_pretrained(tmp_path / "scaled")
    torch.save(expected.detach(), tmp_path / "expected.pt")
    run_python(THREADS, plain_folder, tmp_path / "scaled", tmp_path / "expected.pt", plugin=True)
