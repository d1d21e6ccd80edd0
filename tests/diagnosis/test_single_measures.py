"""Measurements over depth, against straightforward computations of the same."""

import copy

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import hf_lnscale
from hf_lnscale import diagnose
from oracles import residual_stream

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    # Large weights, so that removing a layer makes a difference.
    "initializer_range": 0.3,
}


def llama(**kwargs):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **kwargs))


def gemma2():
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=4, pad_token_id=None))


def qwen3():
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, ln_scaling=True))


MODELS = {"llama": llama, "llama-lns": lambda: llama(ln_scaling=True), "gemma2": gemma2, "qwen3-lns": qwen3}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.fixture
def ids():
    return torch.randint(0, 61, (6, 17), generator=torch.Generator().manual_seed(1))


def streams(model, ids):
    """The residual stream after the embedding and after each layer, from the model's own outputs, in float64."""
    model = copy.deepcopy(model).double().eval()
    model.model.norm = nn.Identity()  # or the last of `hidden_states` comes normalized
    with torch.no_grad():
        return model(ids, output_hidden_states=True, use_cache=False).hidden_states


def loss_in_float64(logits, ids):
    return nn.functional.cross_entropy(logits[:, :-1].double().flatten(0, 1), ids[:, 1:].flatten()).item()


def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def residual_variance(model, data, counted="variance"):
    found = diagnose(model, data, loss=False, jacobian=False, progress=False)
    return [place[counted] for place in found.residual]


def loss_added(model, data):
    return diagnose(model, data, jacobian=False, progress=False).values("loss_added")


def test_residual_variance_is_that_of_all_entries(model, ids):
    expected = [stream.var(correction=0).item() for stream in streams(model, ids)]
    assert len(expected) == 6
    assert residual_variance(model, ids) == pytest.approx(expected, rel=1e-4)


def test_residual_variance_over_batches_is_that_of_all_tokens(ids):
    model = llama()
    expected = [stream.var(correction=0).item() for stream in streams(model, ids)]
    batches = (part for part in (ids[:1], ids[1:4], ids[4:]))  # a generator is enough
    assert residual_variance(model, batches) == pytest.approx(expected, rel=1e-4)


def test_residual_variance_with_a_mean_far_from_zero(ids):
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight += torch.arange(61.0)[:, None] * 10
    expected = [stream.var(correction=0).item() for stream in streams(model, ids)]
    assert residual_variance(model, list(ids.split(1))) == pytest.approx(expected, rel=1e-4)


def test_residual_variance_without_the_first_tokens(ids):
    model = llama()
    expected = [stream[:, 1:].var(correction=0).item() for stream in streams(model, ids)]
    found = residual_variance(model, [ids[:4], ids[4:]], "variance_without_first")
    assert found == pytest.approx(expected, rel=1e-4)


def test_residual_variance_of_bfloat16_is_computed_in_float32(ids):
    model = llama().bfloat16()
    # Of the very states of the model in bfloat16, in double precision; summed up in bfloat16 it would be off by 1 %.
    states = residual_stream(model.eval(), ids)
    assert residual_variance(model, ids) == pytest.approx([x.var(correction=0).item() for x in states], rel=1e-5)
    assert residual_variance(model, ids) == pytest.approx(residual_variance(llama(), ids), rel=0.05)


def test_removed_layers_are_as_good_as_deleted(model, ids):
    model.eval()
    batches = [ids[:1], ids[1:]]  # of unequal size: the mean is over tokens, not over batches
    with torch.no_grad():
        full = loss_in_float64(model(ids).logits, ids)
        expected = []
        for index in range(5):
            cut = copy.deepcopy(model)
            del cut.model.layers[index]
            cut.config.num_hidden_layers = 4
            if getattr(cut.config, "layer_types", None):
                cut.config.layer_types = [t for i, t in enumerate(cut.config.layer_types) if i != index]
            expected.append(loss_in_float64(cut(ids, use_cache=False).logits, ids) - full)
    assert max(abs(added) for added in expected) > 1e-2
    assert loss_added(model, batches) == pytest.approx(expected, abs=1e-5)


def test_a_model_is_left_as_it_was(model, ids):
    model.train()
    model.model.layers[2].eval()
    modes = [module.training for module in model.modules()]
    weights = copy.deepcopy(model.state_dict())
    residual_variance(model, ids)
    loss_added(model, ids)
    assert [module.training for module in model.modules()] == modes
    assert hook_count(model) == 0
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("function", [residual_variance, loss_added])
@pytest.mark.parametrize("broken", [0, 3])
def test_hooks_are_gone_after_an_exception(ids, function, broken):
    model = llama().train()

    def fail(module, args):
        raise RuntimeError("broken layer")

    handle = model.model.layers[broken].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken layer"):
        function(model, ids)
    handle.remove()
    assert hook_count(model) == 0
    assert all(module.training for module in model.modules())
    assert torch.is_grad_enabled()


def test_a_bypass_is_gone_after_an_exception(ids):
    """The failure comes while a layer is bypassed, not in the pass with all layers."""
    model = llama()
    passes = []

    def fail_in_the_third(module, args):
        passes.append(1)
        if len(passes) == 3:
            raise RuntimeError("third pass")

    handle = model.model.norm.register_forward_pre_hook(fail_in_the_third)
    with pytest.raises(RuntimeError, match="third pass"):
        loss_added(model, ids)
    handle.remove()
    assert hook_count(model) == 0


def test_base_models_have_a_residual_variance(ids):
    model = llama()
    assert residual_variance(model.model, ids) == residual_variance(model, ids)


@pytest.mark.parametrize("function", [residual_variance, loss_added])
def test_no_tokens_are_refused(function):
    with pytest.raises(ValueError, match="data: list is empty"):
        function(llama(), [])


def test_models_without_known_layers_are_refused(ids):
    with pytest.raises(hf_lnscale.UnsupportedArchitectureError):
        residual_variance(nn.Linear(2, 2), ids)
