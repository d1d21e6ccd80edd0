"""The scale under the settings that people train with: one step of TRL's SFTTrainer, its loss and its gradients.

The reference is a plain model in which hooks multiply the outputs of the pre-norms, trained by the same trainer.
"""

import types

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

import hf_lnscale  # noqa: F401
import tiny
from oracles import with_hooked_norms

SCALES = [1.0, 2**-0.5, 3**-0.5, 0.5]
TOKENIZER = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 2} | {f"w{i}": i for i in range(3, 90)}, unk_token="<pad>"))
TOKENIZER.pre_tokenizer = pre_tokenizers.Whitespace()


def texts(count=8):
    """Sequences of different lengths."""
    rows = tiny.tokens(count, 14).tolist()
    return [" ".join(f"w{token}" for token in row[: 5 + number]) for number, row in enumerate(rows)]


LANGUAGE = Dataset.from_dict({"text": texts()})
PROMPTS = Dataset.from_dict(
    {
        "prompt": [text[: text.index(" ", 6)] for text in texts()],
        "completion": [text[text.index(" ", 6) :] for text in texts()],
    }
)
SETTINGS = {
    "padding": (LANGUAGE, {}),
    "packing": (LANGUAGE, {"packing": True, "max_length": 16}),
    "packing, wrapped": (LANGUAGE, {"packing": True, "packing_strategy": "wrapped", "max_length": 16}),
    "completion_only_loss": (PROMPTS, {"completion_only_loss": True}),
    "gradient accumulation": (LANGUAGE, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
    "bf16": (LANGUAGE, {"bf16": True}),
    "gradient checkpointing": (LANGUAGE, {"gradient_checkpointing": True}),
    "gradient checkpointing, reentrant": (
        LANGUAGE,
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ),
    "all at once": (
        PROMPTS,
        {
            "packing": True,
            "max_length": 16,
            "completion_only_loss": True,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 4,
            "bf16": True,
            "gradient_checkpointing": True,
        },
    ),
}


class Gradients(TrainerCallback):
    """Keeps what the optimizer is given."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trained(model, data, folder, **settings):
    """The loss and the gradients of one step."""
    gradients = Gradients()
    args = {"per_device_train_batch_size": 8, "gradient_checkpointing": False, "bf16": False} | settings
    config = SFTConfig(
        folder, max_steps=1, max_grad_norm=0, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", **args
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER, eos_token="</s>", pad_token="<pad>")
    trainer = SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer, callbacks=[gradients])
    loss = trainer.train().training_loss
    return loss, gradients.found


def distance(one, other):
    assert one.keys() == other.keys()
    return sum((one[name] - other[name]).square().sum() for name in one).sqrt().item()


def size(one):
    return sum(value.square().sum() for value in one.values()).sqrt().item()


def rebound(model):
    """As Liger does it: a forward bound to each norm instance, which reads `self.weight`."""

    def forward(self, hidden_states):
        wide = hidden_states.float()
        normalized = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (normalized * self.weight.float()).to(hidden_states.dtype)

    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            vars(module)["forward"] = types.MethodType(forward, module)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [False, True], ids=["", "forward rebound"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_step_is_that_of_the_scaled_function(setting, kernels, tmp_path):
    data, arguments = SETTINGS[setting]
    model = tiny.model(ln_scaling=True)
    got = trained(rebound(model) if kernels else model, data, tmp_path, **arguments)
    reference = with_hooked_norms(tiny.model(), tiny.LLAMA_NORMS, SCALES)
    expected = trained(reference, data, tmp_path, **arguments)
    low = arguments.get("bf16")
    assert got[0] == pytest.approx(expected[0], rel=2e-3 if low else 1e-6)
    assert distance(got[1], expected[1]) < (2e-2 if low else 1e-5) * size(expected[1])
    plain = trained(tiny.model(), data, tmp_path, **arguments)
    assert distance(plain[1], expected[1]) > 0.2 * size(expected[1])  # or nothing was tested


def test_packed_sequences_are_each_scaled_as_alone(tmp_path):
    """Packing changes neither the loss nor the gradients, so that the two settings above test the same function."""
    alone = trained(tiny.model(ln_scaling=True), LANGUAGE, tmp_path)
    packed = trained(tiny.model(ln_scaling=True), LANGUAGE, tmp_path, packing=True, max_length=16)
    assert packed[0] == pytest.approx(alone[0], rel=1e-5)
    assert distance(packed[1], alone[1]) < 1e-4 * size(alone[1])


# --- stopped and resumed ----------------------------------------------------------------------------

BASES = {
    "plain": {},
    "scaled": {"ln_scaling": True},
    "pruned": {"drop_layers": [1]},
    "scaled and pruned": {"ln_scaling": True, "drop_layers": [1]},
}


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def lora_run(tmp_path, folder, which, stop=None, resume=None):
    """Six steps of LoRA with dropout, on a base that is loaded with keywords; losses and weights."""
    tiny_path = tmp_path / "base"
    if not tiny_path.exists():
        tiny.model().save_pretrained(tiny_path)
    torch.manual_seed(1)
    config = SFTConfig(
        tmp_path / folder,
        max_steps=6,
        per_device_train_batch_size=2,
        logging_steps=1,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        model_init_kwargs={"dtype": "float32", **BASES[which]},
    )
    trainer = SFTTrainer(
        str(tiny_path),
        config,
        train_dataset=LANGUAGE,
        processing_class=PreTrainedTokenizerFast(tokenizer_object=TOKENIZER, eos_token="</s>", pad_token="<pad>"),
        peft_config=LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.2, task_type="CAUSAL_LM"),
        callbacks=[StopAfter(stop)],
    )
    trainer.train(resume_from_checkpoint=resume)
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    return losses, {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:ln_scaling was")
@pytest.mark.parametrize("which", BASES)
def test_resumed_it_is_the_run_that_was_not_stopped(which, tmp_path):
    losses, weights = lora_run(tmp_path, "whole", which)
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    stopped, _ = lora_run(tmp_path, "parts", which, stop=3)
    assert list(stopped) == [1, 2, 3]
    again, weights_again = lora_run(tmp_path, "parts", which, resume=str(tmp_path / "parts" / "checkpoint-3"))
    assert again == losses
    assert weights_again.keys() == weights.keys()
    assert all(torch.equal(weights_again[name], weights[name]) for name in weights)


@pytest.mark.filterwarnings("ignore:ln_scaling was")
def test_resuming_on_another_base_is_refused(tmp_path):
    lora_run(tmp_path, "run", "scaled and pruned", stop=2)
    for which in ("plain", "scaled", "pruned"):
        with pytest.raises(ValueError, match=r"checkpoint-2' was trained on a base with .* layers \[0, 2, 3\] of 4"):
            lora_run(tmp_path, "run", which, resume=str(tmp_path / "run" / "checkpoint-2"))
    adapter = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
    assert adapter.config.num_hidden_layers == 3
