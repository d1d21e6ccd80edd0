"""From Pre-LN to LNS: the exponent led up over optimizer steps, and where it stands in every checkpoint."""

import copy
import json
import math
import pickle
import sys
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import oracles
import tiny
from hf_lnscale import (
    LNScalingConfig,
    apply_ln_scaling,
    draft_model,
    drop_layers,
    fold_ln_scaling,
    ln_scales,
    set_ln_scaling_step,
    unfold_ln_scaling,
)
from hf_lnscale.checkpoints.export import export, read_info
from hf_lnscale.commands.main import main
from hf_lnscale.core.norm import scale_parameter
from hf_lnscale.training import LNScalingWarmupCallback

WARMUP = {"warmup_steps": 4}
# After two of four steps, linearly: exponent 1/4.
HALF_WAY = {"exponent": 0.5, "depths": [1, 2, 3, 4], "warmup_steps": 4, "schedule": "linear", "step": 2}
HALF_WAY_SCALES = pytest.approx([1.0, 2**-0.25, 3**-0.25, 4**-0.25], rel=1e-15)
FULL = pytest.approx([1.0, 2**-0.5, 3**-0.5, 0.5], rel=1e-15)


def half_way(family="llama", **changes):
    return set_ln_scaling_step(tiny.model(family, ln_scaling=WARMUP, **changes), 2)


@torch.no_grad()
def logits(model):
    return model(tiny.tokens(), use_cache=False).logits


class Tokens(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        ids = tiny.tokens(1, 12, seed=index)[0]
        return {"input_ids": ids, "labels": ids}


def trainer(model, folder, callbacks=(), model_init=None, **arguments):
    settings = {"max_steps": 6, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2}
    settings |= {"report_to": "none", "use_cpu": True, "seed": 1, "learning_rate": 1e-2, "disable_tqdm": True}
    arguments = TrainingArguments(str(folder), **(settings | arguments))
    if callbacks == ():
        callbacks = [LNScalingWarmupCallback()]
    data = {"train_dataset": Tokens(), "eval_dataset": Tokens()}
    return Trainer(model, arguments, **data, model_init=model_init, callbacks=list(callbacks))


class Watch(TrainerCallback):
    """The scale of the last layer at each event."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.seen.append(("train", state.global_step, ln_scales(model)[3]))

    def on_substep_end(self, args, state, control, model, **kwargs):
        self.seen.append(("micro", state.global_step, ln_scales(model)[3]))

    def on_evaluate(self, args, state, control, model, **kwargs):
        self.seen.append(("evaluate", state.global_step, ln_scales(model)[3]))


# --- the schedule ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_exponent_over_steps(schedule):
    shares = {
        "linear": [0.0, 0.25, 0.5, 0.75, 1.0],
        "cosine": [math.sin(math.pi / 2 * share) ** 2 for share in (0, 0.25, 0.5, 0.75, 1)],
    }[schedule]
    for step, share in enumerate(shares):
        scaling = LNScalingConfig(0.8, warmup_steps=4, schedule=schedule, step=step)
        assert scaling.scales(3) == pytest.approx([depth ** -(0.8 * share) for depth in (1, 2, 3)], rel=1e-15)
    assert LNScalingConfig(0.8, warmup_steps=4, schedule=schedule, step=4).scales(3) == LNScalingConfig(0.8).scales(3)
    assert LNScalingConfig(0.8, warmup_steps=4, schedule=schedule).scales(3) == [1.0] * 3


def test_a_model_without_a_warmup_has_nothing_of_it(tmp_path):
    assert LNScalingConfig().to_dict() == {"exponent": 0.5, "depths": None}
    assert all(isinstance(norm.ln_scale, float) for norm in scaled_norms(tiny.model(ln_scaling=True)))
    assert all(isinstance(norm.ln_scale, float) for norm in scaled_norms(tiny.model(ln_scaling=HALF_WAY | {"step": 4})))


def scaled_norms(model):
    return [module for module in model.modules() if hasattr(module, "ln_scale")]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps must be an integer >= 0, got -1"),
        ({"warmup_steps": 1.5}, "warmup_steps must be an integer >= 0, got 1.5"),
        ({"warmup_steps": True}, "warmup_steps must be an integer >= 0, got True"),
        ({"warmup_steps": 4, "schedule": "sqrt"}, "schedule must be one of linear, cosine, got 'sqrt'"),
        ({"warmup_steps": 4, "schedule": ["linear"]}, "schedule must be one of linear, cosine, got"),
        ({"warmup_steps": 4, "step": 5}, "step must be an integer from 0 to warmup_steps, 4, got 5"),
        ({"warmup_steps": 4, "step": -1}, "step must be an integer from 0 to warmup_steps, 4, got -1"),
        ({"step": 1}, "step must be an integer from 0 to warmup_steps, 0, got 1"),
        ({"exponent": 1e308, "warmup_steps": 4}, "a layer a scale of zero"),
    ],
    ids=repr,
)
def test_wrong_values(value, message):
    with pytest.raises(ValueError, match=message):
        LlamaForCausalLM(tiny.config(ln_scaling=value))


def test_wrong_steps():
    with pytest.raises(ValueError, match=r"ln_scaling is None, which has no warmup"):
        set_ln_scaling_step(tiny.model(), 1)
    with pytest.raises(ValueError, match=r"'exponent': 0.5.*which has no warmup"):
        set_ln_scaling_step(tiny.model(ln_scaling=True), 1)
    for step in (-1, 1.0, True):
        with pytest.raises(ValueError, match=rf"step must be an integer >= 0, got {step}"):
            set_ln_scaling_step(tiny.model(ln_scaling=WARMUP), step)


# --- what is computed -----------------------------------------------------------------------------------------------


def test_each_step_computes_the_papers_formula_with_its_exponent():
    model = tiny.model(ln_scaling=WARMUP).double()
    config = json.loads(tiny.config().to_json_string())
    for step, exponent in [(0, 0.0), (1, 0.125), (3, 0.375), (4, 0.5), (9, 0.5)]:
        set_ln_scaling_step(model, step)
        expected = oracles.llama_with_layernorm_scaling(model.state_dict(), config, tiny.tokens(), exponent)
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(logits(tiny.model(ln_scaling=WARMUP)), logits(tiny.model()))  # the start is the Pre-LN model


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_half_way_is_the_model_of_that_exponent(family):
    """Bit for bit, though one holds its scales as tensors and the other as numbers."""
    model = half_way(family)
    expected = tiny.model(family, ln_scaling={"exponent": 0.25})
    assert torch.equal(logits(model), logits(expected))
    assert ln_scales(model) == ln_scales(expected)
    assert model.config.ln_scaling == HALF_WAY
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in expected.named_buffers()]


@pytest.mark.parametrize("one_plus_weight", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_scale_in_a_tensor_gives_the_same_bits(dtype, one_plus_weight):
    weight = torch.randn(4096).to(dtype)
    for scale in (1.0, 3**-0.1, 62**-0.5, 0.9999):
        held = torch.tensor(scale, dtype=torch.float64)
        expected = scale_parameter(weight, scale, one_plus_weight)
        assert torch.equal(scale_parameter(weight, held, one_plus_weight), expected)


def test_after_the_warmup_it_is_an_lns_model(tmp_path):
    model = set_ln_scaling_step(tiny.model(ln_scaling=WARMUP), 4)
    expected = logits(tiny.model(ln_scaling=True))
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for value in (None, True, {"exponent": 0.5}):
            assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path, ln_scaling=value)), expected)
    assert torch.equal(logits(fold_ln_scaling(model)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_moved_to_another_dtype_the_scale_stays_exact(family, dtype):
    model = half_way(family).to(dtype)
    assert ln_scales(model) == HALF_WAY_SCALES
    assert torch.equal(logits(model), logits(tiny.model(family, ln_scaling={"exponent": 0.25}).to(dtype)))


def test_deepcopy_and_pickle_are_independent():
    model = half_way()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), logits(model))
        set_ln_scaling_step(twin, 4)
        assert ln_scales(twin) == FULL
        assert ln_scales(model) == HALF_WAY_SCALES
        assert model.config.ln_scaling == HALF_WAY


def test_a_kernel_bound_to_the_norms_and_a_draft_follow():
    def kernel(self, hidden):
        return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * self.weight

    model = tiny.model(ln_scaling=WARMUP)
    for norm in scaled_norms(model):
        norm.forward = kernel.__get__(norm)
    model(tiny.tokens())
    draft = draft_model(model, [1])
    set_ln_scaling_step(model, 2)
    torch.testing.assert_close(logits(model), logits(tiny.model(ln_scaling={"exponent": 0.25})))
    assert ln_scales(draft) == pytest.approx([1.0, 3**-0.25, 4**-0.25])


def test_a_scale_that_moves_between_forward_and_backward_is_an_error():
    model = half_way().train()
    loss = model(tiny.tokens(), labels=tiny.tokens()).loss
    set_ln_scaling_step(model, 3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    def gradients(model):
        model.train()(tiny.tokens(), labels=tiny.tokens(), use_cache=False).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    model = half_way()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    for got, expected in zip(gradients(model), gradients(tiny.model(ln_scaling={"exponent": 0.25})), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["whole", "layer by layer"])
def test_nothing_is_compiled_anew(way):
    """Neither from step to step, nor at the end of the warmup."""
    torch._dynamo.reset()
    model = tiny.model(ln_scaling=WARMUP, num_hidden_layers=2).train()
    if way == "whole":
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    else:
        compiled = model
        for layer in oracles.decoder_layers(model):
            layer.compile(fullgraph=True, backend="aot_eager")

    def step(number):
        set_ln_scaling_step(model, number)
        model.zero_grad()
        loss = compiled(tiny.tokens(), labels=tiny.tokens(), use_cache=False).loss
        loss.backward()
        fixed = tiny.model(ln_scaling={"exponent": 0.5 * min(number, 4) / 4}, num_hidden_layers=2).train()
        expected = fixed(tiny.tokens(), labels=tiny.tokens(), use_cache=False).loss
        expected.backward()
        torch.testing.assert_close(loss, expected)
        for got, other in zip(model.parameters(), fixed.parameters(), strict=True):
            torch.testing.assert_close(got.grad, other.grad)

    step(0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in range(1, 7):
            step(number)


@pytest.mark.slow
def test_compiled_with_inductor_follows():
    torch._dynamo.reset()
    model = tiny.model(ln_scaling=WARMUP)
    norm = oracles.decoder_layers(model)[1].input_layernorm
    hidden = torch.randn(2, 5, tiny.HIDDEN)
    compiled = torch.compile(norm, fullgraph=True)
    with torch.no_grad():
        expected = compiled(hidden)  # step 0: the norm as it was
        with torch._dynamo.config.patch(error_on_recompile=True):
            for step in range(5):
                set_ln_scaling_step(model, step)
                torch.testing.assert_close(compiled(hidden), expected * 2 ** -(0.5 * step / 4))


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_saved_half_way_and_reloaded(tmp_path, run_python):
    for family in ("llama", "gemma2", "qwen2_5_vl_text"):
        model = half_way(family)
        model.save_pretrained(tmp_path / family)
        torch.save(logits(model), tmp_path / f"{family}.pt")
    code = """
    import pathlib, sys, torch, tiny, hf_lnscale
    for family in ("llama", "gemma2", "qwen2_5_vl_text"):
        model = tiny.auto_class(family).from_pretrained(f"{sys.argv[1]}/{family}")
        with torch.no_grad():
            got = model(tiny.tokens(), use_cache=False).logits
        assert torch.equal(got, torch.load(f"{sys.argv[1]}/{family}.pt")), family
        assert model.config.ln_scaling["step"] == 2
        hf_lnscale.set_ln_scaling_step(model, 4)
        assert hf_lnscale.ln_scales(model)[3] == 0.5
    """
    run_python(code, tmp_path, plugin=True)


def test_on_the_meta_device():
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny.config(ln_scaling=HALF_WAY))
    source = half_way()
    model.load_state_dict(source.state_dict(), assign=True)
    model.model.rotary_emb = source.model.rotary_emb
    assert torch.equal(logits(model.eval()), logits(source))
    assert ln_scales(set_ln_scaling_step(model, 4)) == FULL


def test_starting_a_warmup_is_no_cold_switch(tmp_path):
    tiny.model().save_pretrained(tmp_path / "plain")
    half_way().save_pretrained(tmp_path / "half")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", ln_scaling=WARMUP)
        assert torch.equal(logits(model), logits(tiny.model()))
        AutoModelForCausalLM.from_pretrained(tmp_path / "half")
        AutoModelForCausalLM.from_pretrained(tmp_path / "half", ln_scaling=HALF_WAY)
        AutoModelForCausalLM.from_pretrained(tmp_path / "half", ln_scaling=True)  # as it stands
    for value in (WARMUP, {"exponent": 0.5}, HALF_WAY | {"step": 3}):
        with pytest.warns(UserWarning, match="ln_scaling was changed"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "half", ln_scaling=value)
    with pytest.warns(UserWarning, match="ln_scaling was enabled"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "plain", ln_scaling=HALF_WAY)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_folded_half_way(family, tmp_path, monkeypatch, capsys):
    model = half_way(family)
    model.save_pretrained(tmp_path / "scaled")
    before = logits(model)
    disk = export(tmp_path / "scaled", tmp_path / "disk", progress=False)
    assert torch.equal(logits(fold_ln_scaling(model)), before)
    model.save_pretrained(tmp_path / "memory")
    for folder in (disk, tmp_path / "memory"):
        config = json.loads((folder / "config.json").read_text())
        assert config["ln_scaling_folded"] == HALF_WAY
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert not scaled_norms(loaded)
        assert torch.equal(logits(loaded), before)
        assert torch.equal(logits(unfold_ln_scaling(loaded)), before)
        assert loaded.config.ln_scaling == HALF_WAY
        assert ln_scales(set_ln_scaling_step(loaded, 4)) == FULL
    for folder, state in ((tmp_path / "scaled", "active"), (disk, "folded")):
        monkeypatch.setattr(sys, "argv", ["hf-lnscale", "info", str(folder)])
        with pytest.raises(SystemExit):
            main()
        shown = capsys.readouterr().out
        assert "exponent 0.25 (warmup step 2 of 4 to 0.5)" in shown
        assert state in shown
    assert read_info(tmp_path / "scaled")["scales"] == HALF_WAY_SCALES


def test_dropped_layers_keep_their_depths(tmp_path):
    half_way().save_pretrained(tmp_path)
    for model in (
        drop_layers(half_way(), [1]),
        AutoModelForCausalLM.from_pretrained(tmp_path, drop_layers=[1]),
        AutoModelForCausalLM.from_pretrained(tmp_path, drop_layers=[1], ln_scaling=HALF_WAY | {"depths": [1, 3, 4]}),
    ):
        assert ln_scales(model) == pytest.approx([1.0, 3**-0.25, 4**-0.25])
        assert model.config.ln_scaling == HALF_WAY | {"depths": [1, 3, 4]}
        assert ln_scales(set_ln_scaling_step(model, 4)) == pytest.approx([1.0, 3**-0.5, 0.5])


# --- training -------------------------------------------------------------------------------------------------------


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("start", ["from the base", "from the checkpoint"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_resumed_half_way_equals_never_stopped(start, schedule, tmp_path):
    """Losses, weights and the position, bit for bit, with two batches a step."""
    tiny.model().save_pretrained(tmp_path / "base")
    value = WARMUP | {"schedule": schedule}
    arguments = {"gradient_accumulation_steps": 2}

    def build():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", ln_scaling=value)

    whole = trainer(build(), tmp_path / "whole", **arguments)
    whole.train()
    checkpoint = tmp_path / "whole/checkpoint-2"
    assert json.loads((checkpoint / "config.json").read_text())["ln_scaling"] == HALF_WAY | {"schedule": schedule}

    model = build() if start == "from the base" else AutoModelForCausalLM.from_pretrained(checkpoint)
    resumed = trainer(model, tmp_path / "resumed", **arguments)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == losses(whole)
    assert len(losses(whole)) == 6
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert resumed.model.config.ln_scaling == whole.model.config.ln_scaling
    for step in (2, 4, 6):  # and every checkpoint is the model that it was
        for other in ("config.json", "trainer_state.json"):
            first = json.loads((tmp_path / f"whole/checkpoint-{step}" / other).read_text())
            if other == "config.json":
                assert first["ln_scaling"]["step"] == min(step, 4)
            else:
                saved = first["stateful_callbacks"]["LNScalingWarmupCallback"]["attributes"]
                assert saved == {"ln_scaling": HALF_WAY | {"schedule": schedule, "step": min(step, 4)}}


@pytest.mark.slow
def test_the_steps_are_those_of_the_optimizer(tmp_path):
    watch = Watch()
    callbacks = [LNScalingWarmupCallback(), watch]
    trainer(
        tiny.model(ln_scaling={"exponent": 1.0, "warmup_steps": 2}),
        tmp_path,
        callbacks,
        gradient_accumulation_steps=3,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
    ).train()
    scales = [1.0, 0.5, 0.25, 0.25]
    expected = []
    for step in range(3):
        expected += [("train", step, scales[step])] + [("micro", step, scales[step])] * 2
        expected += [("evaluate", step + 1, scales[step + 1])]
    assert watch.seen == expected


@pytest.mark.slow
def test_a_run_that_starts_from_a_half_way_checkpoint_goes_on_from_there(tmp_path):
    half_way().save_pretrained(tmp_path / "half")
    watch = Watch()
    first = trainer(
        AutoModelForCausalLM.from_pretrained(tmp_path / "half"), tmp_path / "first", [LNScalingWarmupCallback(), watch],
        max_steps=3, save_steps=1,
    )  # fmt: skip
    first.train()
    exponents = [-math.log(scale, 4) for _, _, scale in watch.seen]
    assert exponents == pytest.approx([0.25, 0.375, 0.5])
    # Its own checkpoint, resumed: step 3 of the warmup after one step of the run.
    resumed = trainer(
        AutoModelForCausalLM.from_pretrained(tmp_path / "half"), tmp_path / "resumed", max_steps=3, save_steps=1
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "first/checkpoint-1"))
    assert losses(resumed) == losses(first)
    for a, b in zip(first.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_the_weights_of_the_best_checkpoint_come_with_its_scale(lora, tmp_path):
    tiny.model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", ln_scaling=WARMUP)
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    run = trainer(
        model, tmp_path,
        eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="score",
    )  # fmt: skip
    scores = iter([3, 1, 2])
    run.compute_metrics = lambda predictions: {"score": next(scores)}
    run.train()
    assert run.state.best_global_step == 2
    assert ln_scales(run.model) == HALF_WAY_SCALES
    if not lora:
        best = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
        assert torch.equal(logits(run.model.eval()), logits(best))


@pytest.mark.slow
def test_resumed_with_a_model_that_the_trainer_builds_anew(tmp_path):
    """By `model_init`, after the checkpoint's position has been looked up for the first one."""

    def build():
        return tiny.model(ln_scaling=WARMUP)

    whole = trainer(None, tmp_path / "whole", model_init=build)
    whole.train()
    resumed = trainer(None, tmp_path / "resumed", model_init=build)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert losses(resumed) == losses(whole)
    assert ln_scales(resumed.model) == FULL


@pytest.mark.slow
@pytest.mark.parametrize("start", [0, 1])
def test_lora_resumed(start, tmp_path):
    """An adapter's checkpoint has no config.json: the position is in that of the Trainer."""
    base = set_ln_scaling_step(tiny.model(ln_scaling={"warmup_steps": 5}), start)
    base.save_pretrained(tmp_path / "base")

    def build():
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(0)
        return get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))

    whole = trainer(build(), tmp_path / "whole")
    whole.train()
    checkpoint = tmp_path / "whole/checkpoint-2"
    assert not (checkpoint / "config.json").exists()
    watch = Watch()
    resumed = trainer(build(), tmp_path / "resumed", [LNScalingWarmupCallback(), watch])
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert watch.seen[0] == ("train", 2, pytest.approx(4 ** -(0.5 * (start + 2) / 5)))
    assert losses(resumed) == losses(whole)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    another = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    apply_ln_scaling(another, {"warmup_steps": 6})
    another = trainer(get_peft_model(another, LoraConfig(r=2, target_modules="all-linear")), tmp_path / "another")
    with pytest.raises(ValueError, match=r"ln_scaling=.*'warmup_steps': 5"):
        another.train(resume_from_checkpoint=str(checkpoint))
    # The adapter belongs to the base at the end of the warmup, and only the base's own config.json can say so.
    resumed.model.get_base_model().config.save_pretrained(tmp_path / "config")
    assert json.loads((tmp_path / "config/config.json").read_text())["ln_scaling"]["step"] == 5
    assert isinstance(resumed.model, PeftModel)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trained", "resumed"),
    [
        (WARMUP, {"warmup_steps": 5}),
        (WARMUP, WARMUP | {"schedule": "cosine"}),
        (WARMUP, WARMUP | {"exponent": 1.0}),
        (WARMUP, WARMUP | {"depths": [1, 1, 3, 4]}),
        (WARMUP, None),
        (WARMUP, {"exponent": 0.25}),  # the same scale, but it would stay
        (None, WARMUP),
        ({"exponent": 0.5}, WARMUP),
    ],
    ids=repr,
)
def test_resuming_with_another_warmup_is_refused(trained, resumed, tmp_path):
    leads = [LNScalingWarmupCallback()]
    trainer(tiny.model(ln_scaling=trained), tmp_path, leads if trained == WARMUP else [], max_steps=4).train()
    run = trainer(tiny.model(ln_scaling=resumed), tmp_path, leads)
    with pytest.raises(ValueError, match=r"resume_from_checkpoint.*was trained with ln_scaling="):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.slow
def test_after_the_warmup_a_run_is_resumed_without_the_callback(tmp_path):
    whole = trainer(tiny.model(ln_scaling=WARMUP), tmp_path / "whole")
    whole.train()
    checkpoint = tmp_path / "whole/checkpoint-4"
    for model in (AutoModelForCausalLM.from_pretrained(checkpoint), tiny.model(ln_scaling=WARMUP)):
        resumed = trainer(model, tmp_path / "resumed", [])
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert losses(resumed) == losses(whole)


def test_a_warmup_that_nothing_moves_is_refused(tmp_path):
    run = trainer(half_way(), tmp_path, [])
    message = r"is at step 2 of 4, and no callback of this Trainer advances it.*WarmupCallback"
    with pytest.raises(ValueError, match=message) as error:
        run.train()
    # What the message proposes.
    assert str(error.value).endswith("apply_ln_scaling(model, {'exponent': 0.25, 'depths': [1, 2, 3, 4]})")
    held = apply_ln_scaling(half_way(), {"exponent": 0.25, "depths": [1, 2, 3, 4]})
    trainer(held, tmp_path, [], max_steps=1).train()
    assert ln_scales(held) == HALF_WAY_SCALES


@pytest.mark.slow
def test_a_callback_without_a_warmup_is_refused(tmp_path):
    for value, message in ((None, "the model has no ln_scaling"), (True, "the model has ln_scaling={'exponent': 0.5")):
        with pytest.raises(ValueError, match=f"LNScalingWarmupCallback: {message}.*so there is no warmup"):
            trainer(tiny.model(ln_scaling=value), tmp_path).train()


@pytest.mark.slow
def test_a_warmup_longer_than_the_run_is_refused_before_the_first_step(tmp_path):
    model = tiny.model(ln_scaling={"warmup_steps": 7})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"7 steps left \(warmup_steps=7\), but the run has only 6"):
        trainer(model, tmp_path).train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    trainer(set_ln_scaling_step(model, 1), tmp_path).train()
    assert ln_scales(model) == FULL


@pytest.mark.slow
def test_given_twice_it_goes_no_faster(tmp_path):
    model = tiny.model(ln_scaling=WARMUP)
    watch = Watch()
    trainer(model, tmp_path, [LNScalingWarmupCallback(), LNScalingWarmupCallback(), watch], max_steps=4).train()
    assert [-math.log(scale, 4) for _, _, scale in watch.seen] == pytest.approx([0, 0.125, 0.25, 0.375])
    resumed = trainer(tiny.model(ln_scaling=WARMUP), tmp_path, [LNScalingWarmupCallback(), LNScalingWarmupCallback()])
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert ln_scales(resumed.model) == FULL


@pytest.mark.slow
def test_restoring_the_state_of_callbacks(tmp_path):
    trainer(tiny.model(ln_scaling=WARMUP), tmp_path, max_steps=4).train()
    watch = Watch()
    run = trainer(
        tiny.model(ln_scaling=WARMUP), tmp_path, [LNScalingWarmupCallback(), watch],
        restore_callback_states_from_checkpoint=True,
    )  # fmt: skip
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [-math.log(scale, 4) for _, _, scale in watch.seen][:3] == pytest.approx([0.25, 0.375, 0.5])
