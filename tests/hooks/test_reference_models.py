"""TRL's reference models are the policy before training: it loads them by the name in the policy's configuration.

Teachers and reward models are loaded by a name that is given, and students by their own.
"""

import copy
import json
import math
import queue

import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub import ModelCardData
from peft import LoraConfig, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
    create_reference_model,
)
from trl.experimental.a2po import A2POConfig, A2POTrainer
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer
from trl.experimental.bema_for_ref_model import BEMACallback
from trl.experimental.bema_for_ref_model import DPOTrainer as BEMADPOTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

try:
    from trl import DistillationConfig, DistillationTrainer
except ImportError:  # older ones read other columns
    DistillationConfig = DistillationTrainer = None

import hf_lnscale
import tiny
from hf_lnscale.measuring.sample import documents, train_tokenizer
from hf_lnscale.training import LNScalingWarmupCallback

PLAIN, SCALED = {}, {"ln_scaling": True}
MAKE = {
    "plain": (PLAIN, AutoModelForCausalLM.from_pretrained),
    "cut on loading": (PLAIN, lambda path: AutoModelForCausalLM.from_pretrained(path, drop_layers=[1, 2])),
    "cut in memory": (PLAIN, lambda path: hf_lnscale.drop_layers(AutoModelForCausalLM.from_pretrained(path), [1])),
    "scaled": (SCALED, AutoModelForCausalLM.from_pretrained),
    "scaled and cut": (SCALED, lambda path: AutoModelForCausalLM.from_pretrained(path, drop_layers=[1])),
    "scaled cold": (PLAIN, lambda path: hf_lnscale.apply_ln_scaling(AutoModelForCausalLM.from_pretrained(path))),
}


@pytest.fixture(scope="module")
def tokenizer():
    made = train_tokenizer(documents(standard_library=False), 300)
    made.pad_token = made.eos_token
    return made


@pytest.fixture
def policy(request, tokenizer, tmp_path):
    flags, make = MAKE[request.param]
    size = {"vocab_size": len(tokenizer), "max_position_embeddings": 64}
    tiny.model(**size, **flags).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return make(tmp_path / "model")


def settings(cls, tmp_path, **more):
    return cls(
        output_dir=str(tmp_path / "out"), max_steps=1, learning_rate=0.0, per_device_train_batch_size=2,
        report_to="none", use_cpu=True, bf16=False, logging_steps=1, save_strategy="no", **more,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("policy", MAKE, indirect=True)
def test_the_first_loss_of_dpo_is_ln_2(policy, peft, tokenizer, tmp_path):
    rows = Dataset.from_dict({"prompt": ["a b"] * 4, "chosen": [" good"] * 4, "rejected": [" bad"] * 4})
    trainer = DPOTrainer(
        policy,
        args=settings(DPOConfig, tmp_path),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules=["q_proj"]) if peft else None,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx([math.log(2)], abs=1e-5)


@pytest.mark.parametrize("policy", ["cut on loading", "scaled and cut"], indirect=True)
def test_the_first_loss_of_kto_is_one_half(policy, tokenizer, tmp_path):
    """1 - sigmoid(0), for either label (arXiv 2402.01306, equation 8)."""
    completions = [" good", " bad", " so", " such"]
    rows = {"prompt": ["a b"] * 4, "completion": completions, "label": [True, False] * 2}
    trainer = KTOTrainer(
        policy, args=settings(KTOConfig, tmp_path), train_dataset=Dataset.from_dict(rows), processing_class=tokenizer
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx([0.5], abs=1e-5)


@pytest.mark.parametrize("policy", ["cut in memory", "scaled cold"], indirect=True)
def test_a_copy_as_a_reference_model(policy):
    reference = create_reference_model(policy)
    assert torch.equal(reference(tiny.tokens()).logits, policy(tiny.tokens()).logits)
    assert hf_lnscale.ln_scales(reference) == hf_lnscale.ln_scales(policy)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "cls"), [(GRPOConfig, GRPOTrainer), (RLOOConfig, RLOOTrainer)])
@pytest.mark.parametrize("policy", ["cut on loading", "scaled and cut"], indirect=True)
def test_the_first_divergence_of_grpo_and_rloo_is_0(config, cls, policy, tokenizer, tmp_path):
    rows = Dataset.from_dict({"prompt": ["a b"] * 4})
    arguments = settings(config, tmp_path, beta=0.1, num_generations=2, max_completion_length=4)
    trainer = cls(
        policy,
        reward_funcs=lambda completions, **_: [float(len(one)) for one in completions],
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
    )
    assert len(trainer.ref_model.model.layers) == len(policy.model.layers)
    trainer.train()
    divergences = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert divergences == pytest.approx([0.0], abs=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["cut on loading", "cut in memory", "scaled and cut"], indirect=True)
def test_the_first_loss_of_sdft_is_0_for_a_teacher_that_is_told_no_more(policy, tokenizer, tmp_path):
    rows = Dataset.from_dict({"prompt": ["a b"] * 4, "privileged_context": [""] * 4})
    template = {"teacher_prompt_template": "{prompt}{privileged_context}"}
    arguments = settings(SDFTConfig, tmp_path, max_completion_length=4, num_generations=2, **template)
    trainer = SDFTTrainer(policy, args=arguments, train_dataset=rows, processing_class=tokenizer)
    assert len(trainer.teacher_model.model.layers) == len(policy.model.layers)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx([0.0], abs=1e-6)


def first(trainer, key="loss"):
    """What the first step logs, before any weight has changed."""
    trainer.train()
    return next(entry[key] for entry in trainer.state.log_history if key in entry)


PROMPTS = Dataset.from_dict({"prompt": ["a b"] * 4})


@pytest.mark.parametrize("policy", ["cut in memory", "scaled cold"], indirect=True)
def test_the_first_loss_of_a2po_is_0_if_all_answers_are_right(policy, tokenizer, tmp_path):
    """(beta log(p / reference) - (reward - value))^2, where the value of a prompt is that reward (arXiv 2505.20686)."""
    trainer = A2POTrainer(
        policy,
        reward_funcs=lambda completions, **_: [1.0 for _ in completions],
        args=settings(A2POConfig, tmp_path, max_completion_length=4),
        train_dataset=PROMPTS,
        processing_class=tokenizer,
    )
    assert trainer.ref_model is not policy
    assert first(trainer) == pytest.approx(0.0, abs=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("policy", ["cut in memory", "scaled and cut"], indirect=True)
def test_the_first_loss_of_online_dpo_is_ln_2(policy, peft, tokenizer, tmp_path):
    trainer = OnlineDPOTrainer(
        policy,
        reward_funcs=lambda completions, **_: [float(number) for number, _ in enumerate(completions)],
        args=settings(OnlineDPOConfig, tmp_path, max_new_tokens=4),
        train_dataset=PROMPTS,
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules=["q_proj"]) if peft else None,
    )
    assert first(trainer) == pytest.approx(math.log(2), abs=1e-4)  # rounded by TRL
    assert trainer.state.log_history[0]["objective/kl"] == 0


MESSAGES = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]
CHATS = Dataset.from_dict({"messages": [MESSAGES] * 4})
DISTILLED = {
    "GKD": (GKDTrainer, GKDConfig, CHATS, {"lmbda": 0.0, "max_new_tokens": 4}),
    "GOLD": (GOLDTrainer, GOLDConfig, CHATS, {"lmbda": 0.0, "max_completion_length": 4}),
    "distillation": (DistillationTrainer, DistillationConfig, PROMPTS, {"max_completion_length": 4}),
    "IW-OPD": (IWOPDTrainer, IWOPDConfig, CHATS, {"max_completion_length": 4}),
}
if DistillationTrainer is None:
    del DISTILLED["distillation"]


def distilling(how, student, teacher, tokenizer, tmp_path):
    cls, config, rows, more = DISTILLED[how]
    chats = copy.deepcopy(tokenizer)
    chats.chat_template = "{% for one in messages %}{{ one['content'] }} {% endfor %}"
    arguments = settings(config, tmp_path, **more)
    return cls(student, teacher_model=teacher, args=arguments, train_dataset=rows, processing_class=chats)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["cut on loading", "scaled cold"], indirect=True)
@pytest.mark.parametrize("how", DISTILLED)
def test_a_teacher_by_the_name_of_the_student_is_the_student(how, policy, tokenizer, tmp_path):
    """And the divergence from it 0; a path written anew is the whole, unscaled checkpoint."""
    assert first(distilling(how, policy, policy.config._name_or_path, tokenizer, tmp_path)) == 0
    trainer = distilling(how, policy, str(tmp_path / "model"), tokenizer, tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(trainer.teacher_model(tiny.tokens()).logits, whole(tiny.tokens()).logits)
    assert abs(first(trainer)) > 1e-5


@pytest.mark.parametrize("policy", ["cut on loading", "scaled cold"], indirect=True)
def test_a_reward_model_by_the_name_of_the_policy_has_its_layers_and_scale(policy, tokenizer, tmp_path):
    rows = Dataset.from_dict({"prompt": ["a b"] * 4, "chosen": [" good"] * 4, "rejected": [" bad"] * 4})
    trainer = RewardTrainer(
        policy.config._name_or_path,
        args=settings(RewardConfig, tmp_path),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    hidden = [one.model(tiny.tokens()).last_hidden_state for one in (trainer.model.eval(), policy.eval())]
    assert torch.equal(*hidden)
    trainer.train()
    trainer.save_model(str(tmp_path / "reward"))
    judge = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    assert torch.equal(judge(tiny.tokens()).logits, trainer.model.eval()(tiny.tokens()).logits)
    online = GRPOTrainer(
        policy,
        reward_funcs=str(tmp_path / "reward"),
        args=settings(GRPOConfig, tmp_path, num_generations=2, max_completion_length=4),
        train_dataset=PROMPTS,
        processing_class=tokenizer,
    )
    assert torch.equal(online.reward_funcs[0].eval()(tiny.tokens()).logits, judge(tiny.tokens()).logits)


@pytest.mark.slow
@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("policy", ["cut in memory", "scaled and cut"], indirect=True)
@pytest.mark.parametrize("cls", [SDFTTrainer, SDPOTrainer])
def test_the_average_of_an_adapter_is_on_the_same_base(cls, policy, warmup, tokenizer, tmp_path):
    """TRL's PEFTAdapterEMACallback: the student's adapter, averaged from 0 on."""
    if warmup:
        hf_lnscale.apply_ln_scaling(policy, {"warmup_steps": 4, "step": 3})
    sdft = cls is SDFTTrainer
    more = {"teacher_model_kind": "ema", "teacher_update_rate": 0.25, "num_generations": 2, "max_completion_length": 4}
    arguments = settings(SDFTConfig if sdft else SDPOConfig, tmp_path, **more)
    arguments.learning_rate = 0.1
    trainer = cls(
        policy,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["a b"] * 4, "privileged_context": ["c"] * 4}),
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules=["q_proj"]),
        callbacks=[LNScalingWarmupCallback()] if warmup else [],
        **({} if sdft else {"reward_funcs": lambda completions, **_: [1.0 for _ in completions]}),
    )
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    student, teacher = (get_peft_model_state_dict(model, adapter_name=one) for one in ("default", "teacher"))
    for name, tensor in student.items():
        torch.testing.assert_close(teacher[name], 0.25 * tensor)
    # What the teacher says is said by the base with these weights added to it.
    model.set_adapter("teacher")
    found = model(tiny.tokens()).logits
    if warmup:
        assert policy.config.ln_scaling["step"] == 4
    oracle = model.merge_and_unload(adapter_names=["teacher"])
    torch.testing.assert_close(oracle(tiny.tokens()).logits, found)


@pytest.mark.parametrize("kind", ["base", "ema"])
@pytest.mark.parametrize("policy", ["cut in memory", "scaled and cut"], indirect=True)
def test_the_teacher_of_sdpo_is_the_model(policy, kind, tokenizer, tmp_path):
    arguments = settings(SDPOConfig, tmp_path, num_generations=2, teacher_model_kind=kind)
    trainer = SDPOTrainer(
        policy,
        reward_funcs=lambda completions, **_: [1.0 for _ in completions],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["a b"] * 4}),
        processing_class=tokenizer,
    )
    assert trainer.teacher_model is not policy
    assert torch.equal(trainer.teacher_model(tiny.tokens()).logits, policy.eval()(tiny.tokens()).logits)


def test_an_averaged_teacher_is_refused_in_a_warmup(tokenizer, tmp_path):
    size = {"vocab_size": len(tokenizer), "max_position_embeddings": 64}
    tiny.model(**size, ln_scaling={"warmup_steps": 10}).save_pretrained(tmp_path / "model")
    trainer = SDFTTrainer(
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
        args=settings(SDFTConfig, tmp_path, max_completion_length=4, num_generations=2, teacher_model_kind="ema"),
        train_dataset=Dataset.from_dict({"prompt": ["a b"] * 4, "privileged_context": ["c"] * 4}),
        processing_class=tokenizer,
        callbacks=[LNScalingWarmupCallback()],
    )
    with pytest.raises(ValueError, match=r"SyncTeacherModelCallback averages the model's weights.*step 0 of 10"):
        trainer.train()


PREFERENCES = Dataset.from_dict({"prompt": ["a b"] * 4, "chosen": [" good"] * 4, "rejected": [" bad"] * 4})


@pytest.mark.parametrize("policy", ["cut in memory", "scaled and cut"], indirect=True)
def test_a_reference_that_bema_updates_is_the_average(policy, tokenizer, tmp_path):
    callback = BEMACallback(update_freq=1, update_ref_model=True, ref_model_update_freq=1)
    arguments = settings(DPOConfig, tmp_path)
    arguments.learning_rate = 0.1
    trainer = BEMADPOTrainer(
        policy, args=arguments, train_dataset=PREFERENCES, processing_class=tokenizer, callbacks=[callback]
    )
    assert first(trainer) == pytest.approx(math.log(2), abs=1e-5)
    reference = trainer.ref_model.eval()
    assert torch.equal(reference(tiny.tokens()).logits, callback.running_model.eval()(tiny.tokens()).logits)
    assert not torch.equal(
        reference.model.norm.weight, AutoModelForCausalLM.from_pretrained(tmp_path / "model").model.norm.weight
    )
    assert hf_lnscale.ln_scales(reference) == hf_lnscale.ln_scales(policy)


class NoVLLM:
    """In place of TRL's VLLMGeneration, which loads the checkpoint of `model.name_or_path` into vLLM."""

    def __init__(self, model, **kwargs):
        self.loaded = model.name_or_path


def generating_with_vllm(policy, tokenizer, tmp_path, monkeypatch, callbacks=()):
    monkeypatch.setattr("trl.trainer.grpo_trainer.VLLMGeneration", NoVLLM)
    arguments = settings(GRPOConfig, tmp_path, num_generations=2, max_completion_length=4, use_vllm=True)
    return GRPOTrainer(
        policy,
        reward_funcs=lambda completions, **_: [1.0 for _ in completions],
        args=arguments,
        train_dataset=PROMPTS,
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("policy", ["cut on loading", "cut in memory", "scaled and cut", "scaled cold"], indirect=True)
def test_vllm_that_would_load_another_model_is_refused(policy, tokenizer, tmp_path, monkeypatch):
    trainer = generating_with_vllm(policy, tokenizer, tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=r"use_vllm.*would load the checkpoint .*model'.*Save the model"):
        trainer.train()


@pytest.mark.parametrize("policy", ["plain", "scaled"], indirect=True)
def test_vllm_that_loads_the_same_model_is_not_refused(policy, tokenizer, tmp_path, monkeypatch):
    trainer = generating_with_vllm(policy, tokenizer, tmp_path, monkeypatch)
    with pytest.raises(AttributeError, match="sync_weights"):  # the first thing that a step asks of vLLM
        trainer.train()


@pytest.mark.parametrize("policy", ["cut in memory", "scaled and cut"], indirect=True)
def test_what_the_refusal_of_vllm_says_works(policy, tokenizer, tmp_path, monkeypatch):
    policy.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    with pytest.raises(AttributeError, match="sync_weights"):
        generating_with_vllm(saved, tokenizer, tmp_path, monkeypatch).train()


@pytest.mark.parametrize("policy", ["plain"], indirect=True)
def test_vllm_is_refused_in_a_warmup(policy, tokenizer, tmp_path, monkeypatch):
    hf_lnscale.apply_ln_scaling(policy, {"warmup_steps": 1}).save_pretrained(tmp_path / "warm")
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "warm")
    trainer = generating_with_vllm(policy, tokenizer, tmp_path, monkeypatch, [LNScalingWarmupCallback()])
    with pytest.raises(ValueError, match=r"use_vllm.*step 0 of 1 of the ln_scaling warmup"):
        trainer.train()


class Nothing:
    """In place of what talks to a vLLM server."""

    rollout_buffer = queue.Queue()

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


@pytest.mark.skipif(DistillationTrainer is None, reason="an older TRL, which asks for kernels of the Hub")
@pytest.mark.parametrize("flags", [{}, {"drop_layers": [1]}, {"ln_scaling": True}])
def test_asynchronous_grpo_loads_what_it_is_told_to_and_what_vllm_serves(flags, tokenizer, tmp_path, monkeypatch):
    """Its attention needs a GPU, so that no step is taken."""
    monkeypatch.setattr(f"{AsyncGRPOTrainer.__module__}.get_peak_flops_per_device", lambda *_: 1.0)
    tiny.model(vocab_size=len(tokenizer), max_position_embeddings=64).save_pretrained(tmp_path / "model")
    trainer = AsyncGRPOTrainer(
        str(tmp_path / "model"),
        reward_funcs=lambda completions, **_: [1.0 for _ in completions],
        args=AsyncGRPOConfig(
            output_dir=str(tmp_path / "out"), max_steps=1, report_to="none", use_cpu=True, model_init_kwargs=dict(flags)
        ),
        train_dataset=PROMPTS,
        processing_class=tokenizer,
        rollout_worker=Nothing(),
        weight_transfer=Nothing(),
    )
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **flags)
    assert {name: one.shape for name, one in trainer.model.named_parameters()} == {
        name: one.shape for name, one in wanted.named_parameters()
    }
    assert hf_lnscale.ln_scales(trainer.model) == hf_lnscale.ln_scales(wanted)
    if flags:
        with pytest.raises(
            ValueError, match=r"^trainer 'AsyncGRPOTrainer' would load the checkpoint .*model'.*Save the"
        ):
            trainer.train()


@pytest.fixture
def policy_from_hub(request, tokenizer, tmp_path, monkeypatch):
    """A policy whose name is that of a repository on the Hub, as it lies in the cache."""
    flags, make = MAKE[request.param]
    repository = tmp_path / "cache" / "models--user--model"
    snapshot = repository / "snapshots" / ("0" * 40)
    tiny.model(vocab_size=len(tokenizer), max_position_embeddings=64, **flags).save_pretrained(snapshot)
    tokenizer.save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return make("user/model")


@pytest.mark.slow
@pytest.mark.parametrize("policy_from_hub", MAKE, indirect=True)
def test_training_saves_a_card_that_names_the_base_model(policy_from_hub, tokenizer, tmp_path):
    """TRL writes a model card with every checkpoint if the model's name is not a folder."""
    rows = Dataset.from_dict({"text": ["one two three four"] * 4})
    arguments = SFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=2, save_steps=1, per_device_train_batch_size=2, report_to="none",
        use_cpu=True, bf16=False, max_length=32,
    )  # fmt: skip
    SFTTrainer(policy_from_hub, args=arguments, train_dataset=rows, processing_class=tokenizer).train()
    card = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "user/model"
    assert len(list((tmp_path / "out").glob("checkpoint-*/model.safetensors"))) == 2


@pytest.mark.parametrize("policy_from_hub", MAKE, indirect=True)
def test_the_name_is_written_as_a_plain_string(policy_from_hub):
    name = policy_from_hub.config._name_or_path
    assert json.loads(json.dumps({"name": name})) == {"name": "user/model"}
    dumpers = [
        yaml.Dumper,
        yaml.SafeDumper,
        *(getattr(yaml, one) for one in ("CDumper", "CSafeDumper") if hasattr(yaml, one)),
    ]
    for dumper in dumpers:
        assert yaml.dump({"name": name}, Dumper=dumper) == "name: user/model\n"
    assert "!!" not in ModelCardData(base_model=name).to_yaml()
