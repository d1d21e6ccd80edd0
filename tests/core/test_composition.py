"""The scale together with what else people do to a model."""

import copy
import types

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForCausalLM, StaticCache

import tiny
from hf_lnscale import apply_ln_scaling, fold_ln_scaling, ln_scales
from hf_lnscale.core.norm import ScaledNorm, _ScaledView, scale_parameter
from oracles import decoder_layers, with_hooked_norms

SCALES = [1.0, 2**-0.5, 3**-0.5, 0.5]
# Some of each kind: plain, (1 + w) with norms around both sub-layers, linear attention with experts, MLA.
SOME = ["llama", "gemma2", "qwen3_next", "deepseek_v3"]


def hooked(family="llama"):
    return with_hooked_norms(tiny.model(family), tiny.FAMILIES[family][2], SCALES)


def gradients(model):
    model.zero_grad()
    model(tiny.tokens(), labels=tiny.tokens(), use_cache=False).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_close(got, expected, **tolerance):
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], **tolerance)


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(family, use_reentrant):
    expected = gradients(tiny.model(family, ln_scaling=True).train())
    model = tiny.model(family, ln_scaling=True).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    assert_close(gradients(model), expected, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_compile_without_graph_breaks(family):
    torch._dynamo.reset()
    model = tiny.model(family, ln_scaling=True, num_hidden_layers=2)
    reference = with_hooked_norms(tiny.model(family, num_hidden_layers=2), tiny.FAMILIES[family][2], SCALES[:2])
    expected, before = gradients(reference), reference(tiny.tokens()).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tiny.tokens(), use_cache=False).logits, before)
    assert_close(gradients(compiled), {f"_orig_mod.{name}": grad for name, grad in expected.items()})


def test_compiled_code_calls_nothing_that_torch_2_6_cannot_trace():
    """`vars(self)` is a graph break there; `self.__dict__` is none."""
    for function in (ScaledNorm.__call__, ScaledNorm.forward, _ScaledView.__getattr__, scale_parameter):
        assert "vars" not in function.__code__.co_names


@pytest.mark.slow
def test_compile_with_inductor():
    torch._dynamo.reset()
    layer = decoder_layers(tiny.model(ln_scaling=True))[1]
    norm = torch.compile(layer.input_layernorm, fullgraph=True)
    hidden = torch.randn(2, 5, tiny.HIDDEN)
    expected = decoder_layers(tiny.model())[1].input_layernorm(hidden) * 2**-0.5
    torch.testing.assert_close(norm(hidden), expected)


@pytest.mark.slow
def test_compiled_layer_by_layer_does_not_recompile_for_each():
    """One graph for scale 1 and one for the rest, however deep the model is."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny.model(ln_scaling=True, num_hidden_layers=12)
    expected = gradients(tiny.model(ln_scaling=True, num_hidden_layers=12))
    for layer in decoder_layers(model):
        layer.compile(backend="aot_eager", fullgraph=True)
    assert_close(gradients(model), expected, rtol=1e-5, atol=1e-6)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.slow
def test_compile_notices_a_scale_that_changes():
    torch._dynamo.reset()
    model = tiny.model()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        for scaling in (False, True, {"exponent": 1.0}, False):
            apply_ln_scaling(model, scaling)
            torch.testing.assert_close(
                compiled(tiny.tokens(), use_cache=False).logits, model(tiny.tokens(), use_cache=False).logits
            )


@pytest.mark.parametrize("family", SOME)
def test_generate_equals_recomputation(family):
    model = tiny.model(family, ln_scaling=True)
    prompt = tiny.tokens(2, 5)
    expected = prompt
    for _ in range(8):
        with torch.no_grad():
            following = hooked(family)(expected, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat([expected, following], dim=1)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    for cache in ({"use_cache": False}, {"use_cache": True}):
        assert torch.equal(model.generate(prompt, **settings, **cache), expected), cache


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_with_either_cache(cache):
    model = tiny.model(ln_scaling=True)
    prompt = tiny.tokens(2, 5)
    with torch.no_grad():
        expected = hooked()(torch.cat([prompt, tiny.tokens(2, 6, seed=1)], dim=1), use_cache=False).logits
    made = DynamicCache() if cache == "dynamic" else StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        got = [model(prompt, past_key_values=made, use_cache=True).logits]
        for step in range(6):
            token = tiny.tokens(2, 6, seed=1)[:, step : step + 1]
            got.append(model(token, past_key_values=made, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(got, dim=1), expected, rtol=1e-4, atol=1e-5)
    settings = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache, "eos_token_id": None}
    compared = hooked().generate(prompt, **(settings | {"cache_implementation": None}))
    if cache == "static":
        settings["disable_compile"] = True
    assert torch.equal(model.generate(prompt, **settings), compared)


@pytest.mark.parametrize("family", SOME)
def test_lora(family, tmp_path):
    """Trained on top, saved, reloaded onto the reloaded base, merged: all the same function."""
    model = tiny.model(family, ln_scaling=True)
    model.save_pretrained(tmp_path / "base")
    lora = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    torch.testing.assert_close(ln_scales(lora), SCALES)
    assert lora.base_model.model.config.model_type == tiny.config(family).model_type
    lora.eval()
    with torch.no_grad():
        expected = lora(tiny.tokens()).logits
        lora.save_pretrained(tmp_path / "adapter")
        base = tiny.auto_class(family).from_pretrained(tmp_path / "base", experts_implementation="eager")
        again = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        assert torch.equal(again(tiny.tokens()).logits, expected)
        merged = lora.merge_and_unload()
        torch.testing.assert_close(ln_scales(merged), SCALES)
        torch.testing.assert_close(merged(tiny.tokens()).logits, expected, rtol=1e-4, atol=1e-4)
        merged_logits = merged(tiny.tokens()).logits
        assert torch.equal(fold_ln_scaling(merged)(tiny.tokens()).logits, merged_logits)


def test_a_norm_that_peft_trains_in_full_keeps_its_scale():
    model = tiny.model(ln_scaling=True)
    expected = model(tiny.tokens()).logits
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["input_layernorm"]))
    torch.testing.assert_close(tuned(tiny.tokens()).logits, expected)


@pytest.mark.parametrize("family", SOME)
def test_deepcopy_is_independent(family):
    model = tiny.model(family, ln_scaling=True)
    before = model(tiny.tokens()).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tiny.tokens()).logits, before)
    apply_ln_scaling(twin, {"exponent": 1.0})
    assert ln_scales(model) == pytest.approx(SCALES)
    assert model.config.ln_scaling["exponent"] == 0.5
    assert torch.equal(model(tiny.tokens()).logits, before)


@pytest.mark.parametrize("family", SOME)
def test_bfloat16_and_autocast(family):
    """As near to the outputs in float32 as a model in which hooks scale the outputs of the norms."""

    @torch.no_grad()
    def low_precision(model):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            autocast = model(tiny.tokens()).logits.float()
        return autocast, model.to(torch.bfloat16)(tiny.tokens()).logits.float()

    expected = hooked(family)(tiny.tokens()).logits
    without = (tiny.model(family)(tiny.tokens()).logits - expected).norm()
    model = tiny.model(family, ln_scaling=True)
    for got, noise in zip(low_precision(model), low_precision(hooked(family)), strict=True):
        assert (noise - expected).norm() < 0.3 * without
        assert (got - expected).norm() < 1.5 * (noise - expected).norm()
    assert model.state_dict()["model.layers.1.input_layernorm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("family", SOME)
def test_meta_device(family, tmp_path):
    with torch.device("meta"):
        model = tiny.auto_class(family).from_config(
            tiny.config(family, ln_scaling=True), experts_implementation="eager"
        )
    assert all(parameter.is_meta for parameter in model.parameters())
    source = tiny.model(family, ln_scaling=True)
    model.load_state_dict(source.state_dict(), assign=True)
    for (name, buffer), other in zip(model.named_buffers(), source.buffers(), strict=True):
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, other) if buffer.is_meta else None
    assert torch.equal(model.eval()(tiny.tokens()).logits, source(tiny.tokens()).logits)


def kernel_forward(self, hidden_states):
    """A stand-in for a fused RMSNorm kernel: bound to the instance, and all it reads is `self.weight` and epsilon."""
    eps = getattr(self, "variance_epsilon", None) or self.eps
    wide = hidden_states.float()
    normalized = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normalized * (self.kernel_offset + self.weight.float())).to(hidden_states.dtype)


KERNELS = [(binding, order) for binding in ("attribute", "__dict__") for order in ("scale first", "kernel first")]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize(("binding", "order"), [*KERNELS, ("compiled", "scale first")])
def test_a_kernel_bound_to_the_norms(family, order, binding):
    """As Liger and `use_kernels` do it: `forward` rebound on each norm instance."""
    torch._dynamo.reset()

    def bind(model):
        for module in model.modules():
            if "RMSNorm" in type(module).__name__:
                module.kernel_offset = 1.0 if family == "gemma2" else 0.0
                if binding == "attribute":
                    module.forward = types.MethodType(kernel_forward, module)
                else:  # Liger's way
                    vars(module)["forward"] = kernel_forward.__get__(module, type(module))

    model = tiny.model(family, num_hidden_layers=2)
    if order == "kernel first":
        bind(model)
        apply_ln_scaling(model)
    else:
        apply_ln_scaling(model)
        bind(model)
    reference = with_hooked_norms(tiny.model(family, num_hidden_layers=2), tiny.FAMILIES[family][2], SCALES[:2])
    if binding == "compiled":
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tiny.tokens()).logits, reference(tiny.tokens()).logits)
    torch.testing.assert_close(model(tiny.tokens()).logits, reference(tiny.tokens()).logits)
    assert_close(gradients(model), gradients(reference))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tiny.tokens()).logits, model(tiny.tokens()).logits)
    before = model(tiny.tokens()).logits
    assert torch.equal(fold_ln_scaling(model)(tiny.tokens()).logits, before)
    norm = decoder_layers(model)[1].input_layernorm
    assert norm.forward.__func__ is kernel_forward  # folded, the kernel is still the one that runs
    assert norm.forward.__self__ is norm


def test_a_forward_that_hides_what_it_reads_is_refused():
    model = tiny.model(ln_scaling=True)
    norm = decoder_layers(model)[1].input_layernorm
    norm.forward = lambda hidden_states: hidden_states * norm.weight
    with pytest.raises(RuntimeError, match=r"scaled LlamaRMSNorm.*types\.MethodType"):
        model(tiny.tokens())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="Liger's kernels need a GPU")
def test_liger_itself():
    pytest.importorskip("liger_kernel")
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    model = LlamaForCausalLM(tiny.config(ln_scaling=True)).cuda()
    expected = gradients_on(model)
    apply_liger_kernel_to_llama(model=model)
    assert_close(gradients_on(model), expected, rtol=1e-3, atol=1e-4)


def gradients_on(model):
    model.zero_grad()
    tokens = tiny.tokens().to(model.device)
    model(tokens, labels=tokens).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_offloaded_to_disk(tmp_path):
    """Weights that are brought in for each forward are scaled when they come."""
    model = tiny.model(ln_scaling=True)
    model.save_pretrained(tmp_path / "model")
    places = {f"model.layers.{i}": "disk" if i in (1, 2) else "cpu" for i in range(4)}
    places |= {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert offloaded.get_parameter("model.layers.1.input_layernorm.weight").is_meta
    assert torch.equal(offloaded(tiny.tokens()).logits, model(tiny.tokens()).logits)


def test_weights_are_initialized_as_in_a_plain_model():
    """A second initialization, of an already scaled model, reaches the parameters."""
    for family in ("llama", "gemma2"):
        model = tiny.model(family, ln_scaling=True)
        for module in model.modules():
            module._is_hf_initialized = False
        for parameter in model.parameters():
            parameter._is_hf_initialized = False
        model.initialize_weights()
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                assert torch.equal(parameter, torch.full_like(parameter, 0.0 if family == "gemma2" else 1.0)), name
        assert ln_scales(model)[3] == 0.5


def test_get_parameter_returns_the_parameter():
    model = tiny.model(ln_scaling=True)
    for name, parameter in model.named_parameters():
        assert model.get_parameter(name) is parameter
    with pytest.raises(AttributeError):
        model.get_parameter("model.layers.0.input_layernorm.bias")


def test_writing_into_a_norm_weight_by_name():
    """As SmoothQuant and AWQ do it, which move factors from activations into the weight of the norm."""
    model, reference = tiny.model(ln_scaling=True), hooked()
    for each in (model, reference):
        with torch.no_grad():
            for layer in decoder_layers(each):
                layer.input_layernorm.weight.div_(3.0)
                layer.post_attention_layernorm.weight = torch.nn.Parameter(layer.post_attention_layernorm.weight * 2)
    torch.testing.assert_close(model(tiny.tokens()).logits, reference(tiny.tokens()).logits)


def test_functional_call_and_per_sample_gradients():
    model = tiny.model(ln_scaling=True, attn_implementation="eager")
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    doubled = {name: weight * 2 if "input_layernorm" in name else weight for name, weight in weights.items()}
    got = torch.func.functional_call(model, doubled, (tiny.tokens(),)).logits
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(doubled[name])
    torch.testing.assert_close(got, model(tiny.tokens()).logits)
