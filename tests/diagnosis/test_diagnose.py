"""`diagnose` against the papers' formulas in double precision, and its verdict on cases whose answer is known."""

import copy
import dataclasses
import gc
import itertools
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import logging

import hf_lnscale
import tiny
from hf_lnscale import Diagnosis, diagnose
from hf_lnscale.core.display import compact
from hf_lnscale.diagnosis import figures, png, verdict
from hf_lnscale.diagnosis.measure import jacobian_distances
from hf_lnscale.measuring.text import token_batches
from oracles import (
    angular_distance,
    decoder_layers,
    distance_from_identity,
    mean_cosine,
    residual_stream,
    sublayer_outputs,
)

LAYERS = tiny.LAYERS
ATTENTION, MLP = ("self_attn", "linear_attn"), ("mlp",)
# What is added to the stream, module by module; in Gemma 2 norms come between.
SUBLAYERS = {
    "llama": (ATTENTION, MLP),
    "granite": (ATTENTION, MLP),
    "qwen3_next": (ATTENTION, MLP),
    "deepseek_v3": (ATTENTION, MLP),
    "qwen2_5_vl_text": (ATTENTION, MLP),
    "gemma2": (("post_attention_layernorm",), ("post_feedforward_layernorm",)),
}
CHEAP = {"loss": False, "jacobian": False, "progress": False}


@pytest.fixture
def ids():
    return tiny.tokens(6, 11, seed=1)


def of(diagnosis, name):
    return [layer[name] for layer in diagnosis.layers]


def near(expected, rel=1e-9):
    return pytest.approx([float(value) for value in expected], rel=rel)


# --- one pass -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SUBLAYERS)
def test_the_stream_is_the_papers(family, ids):
    model = tiny.loud(family)
    stream = residual_stream(model, ids)
    found = diagnose(model, tiny.two_batches(ids), **CHEAP)
    places = found.residual
    assert [place["place"] for place in places] == list(range(LAYERS + 1))
    assert [place["variance"] for place in places] == near(x.var(correction=0) for x in stream)
    assert [place["variance_without_first"] for place in places] == near(x[:, 1:].var(correction=0) for x in stream)
    typical = [x[:, 1:].square().mean(-1).log().mean().exp() for x in stream]
    assert [place["typical"] for place in places] == near(typical)
    logs = [x[:, 1:].square().mean(-1).log().mean(1) for x in stream]  # of each sequence; all are of one length
    root = len(ids) ** 0.5
    errors = [value * one.std() / root for value, one in zip(typical, logs, strict=True)]
    assert [place["typical_error"] for place in places] == near(errors)
    for name, skipped in (("variance", 0), ("variance_without_first", 1)):  # of a variance, that of the mean square
        squares = [x[:, skipped:].square().mean((1, 2)) for x in stream]
        assert [place[f"{name}_error"] for place in places] == near(one.std() / root for one in squares)
    growth = [(one - logs[1]).mean().exp() * (one - logs[1]).std() / root for one in logs]
    assert [place["growth_error"] for place in places] == near(growth)
    assert found.verdict["growth"]["factor_error"] == pytest.approx(growth[-1].item())
    channels = [x.flatten(0, 1).var(0, correction=0) for x in stream]
    assert [place["largest_channel"] for place in places] == [int(c.argmax()) for c in channels]
    assert [place["largest_channel_variance"] for place in places] == near(c.max() for c in channels)
    rest = [x[:, 1:].flatten(0, 1).var(0, correction=0).max() for x in stream]
    assert [place["largest_channel_variance_without_first"] for place in places] == near(rest)

    influence = [1 - mean_cosine(stream[i], stream[i + 1]) for i in range(LAYERS)]
    assert of(found, "block_influence") == near(influence)
    by_sequence = [nn.functional.cosine_similarity(stream[i], stream[i + 1], dim=-1).mean(1) for i in range(LAYERS)]
    assert of(found, "block_influence_error") == near(one.std() / root for one in by_sequence)
    for start in range(LAYERS):
        for size in range(1, LAYERS + 1):
            value = found.angular[start][size - 1]
            if start + size > LAYERS:
                assert value is None
            else:
                assert value == pytest.approx(angular_distance(stream, start, size), rel=1e-9)
    assert of(found, "angular_distance") == [row[0] for row in found.angular]
    last = [x[:, -1] for x in stream]
    angles = [nn.functional.cosine_similarity(*pair, dim=-1).acos() / math.pi for pair in itertools.pairwise(last)]
    assert of(found, "angular_distance_error") == near((one.std() / root for one in angles), rel=1e-6)


@pytest.mark.parametrize("family", SUBLAYERS)
def test_ratios_are_those_of_what_the_sublayers_return(family, ids):
    changes = {"residual_multiplier": 0.5} if family == "granite" else {}
    model = tiny.loud(family, **changes)
    stream = residual_stream(model, ids)[:-1]
    attention, mlp = (
        changes.get("residual_multiplier", 1) * x for x in sublayer_outputs(model, ids, SUBLAYERS[family])
    )
    by_attention = attention.norm(dim=-1) / stream.norm(dim=-1)
    by_mlp = mlp.norm(dim=-1) / (stream + attention).norm(dim=-1)
    found = diagnose(model, tiny.two_batches(ids), **CHEAP)
    for name, ratio in (("attention_ratio", by_attention), ("mlp_ratio", by_mlp)):
        assert of(found, f"{name}_all_tokens") == near(ratio.mean((1, 2)), rel=1e-6)
        assert of(found, name) == near(ratio[:, :, 1:].mean((1, 2)), rel=1e-6)
        assert of(found, f"{name}_error") == near(ratio[:, :, 1:].mean(2).std(1) / len(ids) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side, ids):
    model = tiny.loud()
    lengths = [11, 7, 5, 11, 3, 8]
    batch, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(11 - length, 11) if side == "left" else slice(0, length)
        batch[row, place], mask[row, place] = ids[row, :length], 1
    single = [ids[row : row + 1, :length] for row, length in enumerate(lengths)]
    found = diagnose(model, {"input_ids": batch, "attention_mask": mask}, loss=True, progress=False)
    expected = diagnose(model, single, loss=True, progress=False)
    # Rotary embeddings are rounded to single precision, and with padding on the left positions are others.
    exact = 1e-5 if side == "left" else 1e-8
    for one, other in zip(found.residual, expected.residual, strict=True):
        assert list(one.values()) == near(other.values(), rel=exact)
    names = ["attention_ratio", "mlp_ratio_all_tokens", "block_influence", "angular_distance", "loss_added"]
    for name in names:
        assert of(found, name) == near(of(expected, name), rel=exact * 100)
    for name in ("jacobian_distance",):  # other random vectors
        assert of(found, name) == near(of(expected, name), rel=0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_variance_of_half_precision_is_taken_in_float32(dtype, ids):
    """Of the very states of the model in half precision, in double precision."""
    model = tiny.loud(dtype=dtype)
    stream = [x.double() for x in residual_stream(model, ids)]
    places = diagnose(model, ids, **CHEAP).residual
    assert [place["variance"] for place in places] == near((x.var(correction=0) for x in stream), rel=1e-5)
    assert [place["variance_without_first"] for place in places] == near(
        (x[:, 1:].var(correction=0) for x in stream), rel=1e-5
    )
    typical = [x[:, 1:].square().mean(-1).log().mean().exp() for x in stream]
    assert [place["typical"] for place in places] == near(typical, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accumulated_wider(dtype, ids):
    low, high = (diagnose(tiny.loud(dtype=one), ids, progress=False) for one in (dtype, torch.float64))
    assert [place["typical"] for place in low.residual] == near((p["typical"] for p in high.residual), rel=0.05)
    for name in ("attention_ratio", "mlp_ratio", "block_influence", "jacobian_distance"):
        assert of(low, name) == near(of(high, name), rel=0.15)


def test_the_pass_runs_each_layer_once_and_not_the_head(ids):
    model = tiny.loud()
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append("head"))
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: calls.append("layer"))
    diagnose(model, tiny.two_batches(ids), **CHEAP)
    assert calls == ["layer"] * LAYERS * 2


@pytest.mark.parametrize("parts", [{}, {"jacobian": True, "jacobian_sequences": 99}])
def test_memory_does_not_grow_with_the_batches(parts, ids):
    model = tiny.loud()
    size, live = ids.numel() * tiny.HIDDEN, []

    def count(module, args):
        gc.collect()
        live.append(sum(isinstance(o, torch.Tensor) and o.numel() >= size for o in gc.get_objects()))

    model.model.embed_tokens.register_forward_pre_hook(count)
    gc.collect()
    gc.freeze()  # what was there before need not be gone through each time
    try:
        diagnose(model, [ids] * 4, **CHEAP | parts)
    finally:
        gc.unfreeze()
    assert len(live) >= 4
    assert live[-1] == live[-3]


# --- with gradients, and without layers ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_jacobians_are_near_the_exact_ones(family):
    ids = tiny.tokens(3, 5)
    model = tiny.loud(family)
    exact = torch.stack([distance_from_identity(model, ids, layer) for layer in range(LAYERS)])
    many = {"jacobian": True, "jacobian_probes": 100}
    found = diagnose(model, ids, **CHEAP | many)
    assert of(found, "jacobian_distance") == near(exact.mean(1).sqrt(), rel=0.07)
    assert max(of(found, "jacobian_distance")) > 2 * min(of(found, "jacobian_distance"))
    # The error bar is that of the mean over sequences, through the root.
    samples = jacobian_distances(model, token_batches(ids), 100, lambda share: None)
    assert torch.allclose(samples, exact.T, rtol=0.15)
    error = samples.std(0) / 3**0.5 / (2 * samples.mean(0).sqrt())
    assert of(found, "jacobian_distance_error") == near(error)
    # On fewer sequences, those that are asked for.
    one = diagnose(model, ids, **CHEAP | many | {"jacobian_sequences": 1})
    assert of(one, "jacobian_distance") == near(exact[:, 0].sqrt(), rel=0.1)
    assert of(one, "jacobian_distance_error") == [None] * LAYERS


def test_a_layer_that_does_nothing_is_the_identity(ids):
    model = tiny.loud()
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
    found = diagnose(model, ids, progress=False)
    for name in ("attention_ratio", "mlp_ratio", "jacobian_distance", "loss_added"):
        assert of(found, name)[2] == pytest.approx(0, abs=1e-12)
        assert abs(of(found, name)[1]) > 1e-4
    assert of(found, "block_influence")[2] == pytest.approx(0, abs=1e-12)
    assert 2 in found.verdict["idle_layers"]


def test_losses_and_cuts_are_those_of_deleted_layers(ids):
    model = tiny.loud()

    def loss(removed, ids=ids):
        cut = copy.deepcopy(model)
        cut.model.layers = nn.ModuleList(layer for i, layer in enumerate(cut.model.layers) if i not in removed)
        cut.config.num_hidden_layers = len(cut.model.layers)
        with torch.no_grad():
            logits = cut(ids, use_cache=False).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()

    found = diagnose(model, tiny.two_batches(ids), jacobian=False, progress=False)
    assert found.baseline["loss"] == pytest.approx(loss([]), rel=1e-9)
    assert found.baseline["perplexity"] == pytest.approx(math.exp(loss([])), rel=1e-9)
    # Standard errors, of sequences of equal length those of a plain mean, in pairs.
    rows = {i: torch.tensor([loss([] if i is None else [i], row[None]) for row in ids]) for i in (None, *range(LAYERS))}
    assert found.baseline["loss_error"] == pytest.approx(rows[None].std().item() / 6**0.5, rel=1e-5)
    assert found.baseline["perplexity_error"] == pytest.approx(
        found.baseline["loss_error"] * found.baseline["perplexity"], rel=1e-9
    )
    errors = [(rows[i] - rows[None]).std().item() / 6**0.5 for i in range(LAYERS)]
    assert of(found, "loss_added_error") == pytest.approx(errors, rel=1e-5)
    assert of(found, "loss_added") == pytest.approx([loss([i]) - loss([]) for i in range(LAYERS)], rel=1e-6)
    assert of(found, "perplexity_without") == near(math.exp(loss([i])) for i in range(LAYERS))
    spread = [math.exp(loss([i])) * error for i, error in enumerate(of(found, "loss_added_error"))]
    assert of(found, "perplexity_without_error") == near(spread)
    order = sorted(range(LAYERS), key=of(found, "loss_added").__getitem__)
    assert [cut["layers"] for cut in found.cuts] == [order[: i + 1] for i in range(len(found.cuts))]
    assert [cut["perplexity"] for cut in found.cuts] == near(math.exp(loss(cut["layers"])) for cut in found.cuts)
    assert all(cut["perplexity"] <= 1.1 * found.baseline["perplexity"] for cut in found.cuts[:-1])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_is_diagnosed_and_left_as_it_was(family, ids):
    model = tiny.loud(family, torch.float32).train()
    decoder_layers(model)[2].eval()
    next(model.parameters()).requires_grad_(False)

    def state():
        parts = {
            name: (type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks))
            for name, m in model.named_modules()
        }
        values = {name: (p.grad, p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
        return parts, values

    parts, values = state()
    found = diagnose(model, ids, progress=False)
    assert all(value is not None for layer in found.layers for value in layer.values())
    after, now = state()
    assert parts == after
    assert all(now[name][:2] == old[:2] and torch.equal(now[name][2], old[2]) for name, old in values.items())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("place", ["layers.3.mlp", "norm"])
@pytest.mark.parametrize("passes", range(1, 9))
def test_hooks_are_gone_after_an_exception(place, passes, ids):
    model = tiny.loud()
    flags = [p.requires_grad for p in model.parameters()]
    count = []

    def fail(module, args):
        count.append(1)
        if len(count) == passes:
            raise RuntimeError("broken")

    handle = model.model.get_submodule(place).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        diagnose(model, tiny.two_batches(ids), progress=False)
    handle.remove()
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.is_grad_enabled()


# --- models that are not simply in memory ----------------------------------------------------------------------------


def test_offloaded_to_disk(tmp_path, ids):
    pytest.importorskip("accelerate")
    model = tiny.loud(dtype=torch.float32)
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")  # sharded, too
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "cpu" if i % 2 else "disk" for i in range(LAYERS)}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
    )
    assert offloaded.get_parameter("model.layers.0.mlp.up_proj.weight").is_meta
    expected, found = (diagnose(one, ids, progress=False) for one in (model, offloaded))
    assert found.residual == expected.residual
    assert found.angular == expected.angular
    for name in ("attention_ratio", "mlp_ratio", "loss_added", "jacobian_distance"):
        assert of(found, name) == near(of(expected, name), rel=1e-5)
    assert found.notes == []


def test_quantized(tmp_path, ids):
    pytest.importorskip("bitsandbytes")
    model = tiny.loud(dtype=torch.float32, hidden_size=128, intermediate_size=256, head_dim=32, num_key_value_heads=4)
    model.save_pretrained(tmp_path)
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32),
        dtype=torch.float32,
    )
    assert type(quantized.model.layers[0].mlp.down_proj).__name__ == "Linear4bit"
    found, expected = (diagnose(one, ids, progress=False) for one in (quantized, model))
    assert found.model["quantized"]
    assert found.model["parameters"] == expected.model["parameters"]
    measured = ["attention_ratio", "mlp_ratio"]
    if getattr(quantized.model.layers[0].mlp.down_proj.weight.quant_state, "packing_format_for_cpu", False):
        # On this processor bitsandbytes has a kernel without a backward; autograd would go around it.
        assert len(found.notes) == 1
        assert "a kernel that is not differentiable" in found.notes[0]
        assert of(found, "jacobian_distance") == [None] * LAYERS
        assert found.verdict["signs"]["near_identity"] is None
    else:
        measured += ["jacobian_distance"]
    for name in measured:
        assert of(found, name) == near(of(expected, name), rel=0.4)
    assert all(value is not None for value in of(found, "loss_added"))


def test_kernels_without_a_backward_are_noticed(ids):
    """Autograd goes around an operation without a derivative, with a warning at most, and the result is just wrong."""
    library = torch.library.Library("hf_lnscale_test", "DEF")
    library.define("double(Tensor x) -> Tensor")
    library.impl("double", lambda x: x.detach() * 2, "CPU")
    model = tiny.loud()
    model.model.layers[2].mlp.register_forward_hook(lambda *told: torch.ops.hf_lnscale_test.double(told[2]))
    found = diagnose(model, ids, **CHEAP | {"jacobian": True})
    assert len(found.notes) == 1
    assert "a kernel that is not differentiable" in found.notes[0]
    assert set(of(found, "jacobian_distance")) == {None}
    assert "a kernel that is not differentiable" in " ".join(str(found).split())  # a line may break there


def test_scaled_and_pruned_models_are_told(ids):
    model = tiny.model(ln_scaling=True)
    hf_lnscale.drop_layers(model, [1])
    found = diagnose(model, ids, **CHEAP)
    assert found.model["ln_scaling"]["depths"] == [1, 3, 4]
    assert found.model["dropped_layers"] == [1]
    assert "LayerNorm Scaling" in found.report()


# --- the verdict -----------------------------------------------------------------------------------------------------


def places(typical, variance=None):
    """Entries of `residual` with the embedding in front."""
    return [
        {"place": i, "typical": t, "variance": v, "variance_without_first": t, "largest_channel": 3}
        for i, (t, v) in enumerate(zip([0.1, *typical], [0.1, *(variance or typical)], strict=True))
    ]


def test_growth_and_where_it_is_fastest():
    assert verdict.growth(places([2.0 * i for i in range(1, 9)]))["factor"] == 8
    assert verdict.growth(places([2.0 * 1.5**i for i in range(8)]))["fastest"]["layers"] == [1, 2]
    step = verdict.growth(places([1.0] * 5 + [9.0] * 3))["fastest"]
    assert step["factor"] == 9
    assert 5 in range(step["layers"][0], step["layers"][1] + 1)


def layers_of(jacobian, added):
    return [
        {"layer": i, "jacobian_distance": j, "loss_added": a, "perplexity_without": 10 * math.exp(a)}
        for i, (j, a) in enumerate(zip(jacobian, added, strict=True))
    ]


def test_a_model_with_the_disease_has_all_signs():
    found = verdict.judge(
        places([1.5**i for i in range(8)]),
        layers_of([9, 1, 1, 1, 0.2, 0.2, 0.2, 9], [3, 0.5, 0.4, 0.3, 0.004, 0.02, 0.001, 2]),
        {"loss": math.log(10), "perplexity": 10.0},
        [
            {"layers": [6], "perplexity": 10.01},
            {"layers": [6, 4], "perplexity": 10.6},
            {"layers": [6, 4, 5], "perplexity": 12},
        ],
    )
    assert found["headline"] == "3 of 3 signs of the curse of depth"
    assert found["idle_layers"] == [4, 6]
    assert {budget: part["count"] for budget, part in found["removable"].items()} == {"5%": 1, "10%": 2}
    text = " ".join(found["sentences"])
    assert "2 layers (4, 6) do almost nothing" in text
    within = "Within 5 % of perplexity layer 6 could be dropped (perplexity 10.0, +0.1 %), within 10 % 2 layers (4, 6)"
    assert within in text


def test_of_layers_that_are_worth_nothing_the_deeper_half_is_not_worth_less():
    """As in a model that has learned nothing: what is measured is noise."""
    for added in ([0.002] * 4 + [0.0001] * 4, [-0.001] * 4 + [-0.003] * 4):
        found = verdict.judge(
            places([2.0] * 8), layers_of([1] * 8, added), {"loss": math.log(10), "perplexity": 10.0}, None
        )
        assert not found["signs"]["deep_layers_worth_little"]["present"]


def test_massive_activations_are_not_growth():
    found = verdict.judge(places([2.0] * 8, [2.0] * 4 + [2000.0] * 4), layers_of([1] * 8, [1] * 8), None, None)
    assert found["massive_activations"]["layer"] == 4
    assert found["growth"]["factor"] == 1
    assert not found["signs"]["growth"]["present"]
    text = " ".join(found["sentences"])
    assert "massive activations, from layer 4 on" in text
    assert "all of that is the first token" in text


@pytest.mark.parametrize("token", [0, 5])
def test_massive_activations_of_any_token_are_found_in_a_model(token, ids):
    """Not only those of the first token, where most models have them."""
    model = tiny.loud()
    expected = diagnose(model, ids, **CHEAP).verdict["growth"]["factor"]

    def spike(layer, args, output):
        output[:2, token, 7] += 1e4
        return output

    model.model.layers[1].register_forward_hook(spike)
    found = diagnose(model, ids, **CHEAP)
    assert found.verdict["massive_activations"]["layer"] == 1
    assert found.verdict["massive_activations"]["channel"] == 7
    assert found.residual[3]["variance"] > 1e4
    assert (found.residual[3]["variance_without_first"] > 1e4) == (token > 0)
    # Two of sixty tokens move a geometric mean by their share of the logarithm.
    assert found.verdict["growth"]["factor"] == pytest.approx(expected, rel=0.1 if token == 0 else 1.0)


def test_what_was_not_measured_is_not_judged():
    found = diagnose(tiny.loud(), tiny.tokens(64, 33), **CHEAP)
    assert found.verdict["headline"].endswith("of 1 signs of the curse of depth")
    assert found.verdict["idle_layers"] is None
    assert found.verdict["removable"] is None
    assert found.baseline is None
    assert found.cuts is None
    assert set(of(found, "loss_added") + of(found, "jacobian_distance")) == {None}
    assert "perplexity" not in " ".join(found.verdict["sentences"])


@pytest.mark.parametrize("layers", [1, 2])
def test_models_of_few_layers(layers, ids):
    found = diagnose(tiny.loud(num_hidden_layers=layers), ids, progress=False)
    assert len(found.layers) == layers
    assert found.report().count("<svg class") == 6
    assert f"│{layers - 1} " in str(found)
    for what in ("variance", "angular", "loss_added", "layers"):
        assert found.plot(what).axes[0].get_title(loc="left") == found.name


def test_ranges_in_words():
    assert verdict.ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert verdict.ranges([]) == ""


# --- cost and progress -----------------------------------------------------------------------------------------------


def test_the_cost_is_announced_as_the_layers_run(ids, capsys):
    model = tiny.loud()
    calls = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda layer, args, output: calls.append(len(output)))
    found = diagnose(model, tiny.two_batches(ids), jacobian_sequences=3)
    said = capsys.readouterr().err
    assert re.search(r"about \d+ forward passes over 66 tokens: \d\.\d for the stream, .* for Jacobians", said)
    assert "Jacobians" in said.split("\n", 1)[1]  # the bar's
    head = 96 * 32 / model.model.num_parameters()
    body, cost = 1 - head, {part: one["passes"] for part, one in found.cost.items()}
    assert cost == pytest.approx(
        {"stream": body, "loss": body * 2.5 + head * 5, "cuts": 1, "jacobian": body * 0.5 * 4}, abs=0.01
    )
    # Sequences through layers; the search for tuples runs single ones of two tokens. The stream, the sweep, cuts of
    # two layers and more, and for the Jacobian a pass and its layers one by one.
    extra = sum(4 - len(cut["layers"]) for cut in found.cuts[1:])
    expected = 6 * (4 + 10 + extra) + 3 * (4 + 4)
    assert sum(calls) - expected in (4, 8, 12, 16, 20, 24)
    assert all(one["seconds"] > 0 for one in found.cost.values())
    diagnose(model, ids, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("bars", [True, False])
def test_more_cuts_than_announced_with_and_without_progress_bars(bars, ids, capsys):
    """HF_HUB_DISABLE_PROGRESS_BARS=1 is read on import; this is what it sets."""
    model = tiny.loud()
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    if not bars:
        logging.disable_progress_bar()
    try:
        found = diagnose(model, ids, jacobian=False, progress=True)
    finally:
        logging.enable_progress_bar()
    assert len(found.cuts) == 3
    said = capsys.readouterr().err
    assert "forward passes over 66 tokens" in said
    assert ("100%" in said) == bars


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"jacobian_probes": 0}, "jacobian_probes must be an integer >= 1, got 0"),
        ({"jacobian_sequences": 1.5}, "jacobian_sequences must be an integer >= 1, got 1.5"),
        ({"data": "nowhere.txt", "tokenizer": object()}, "no file 'nowhere.txt'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, ids):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        diagnose(tiny.loud(), **{"data": ids, "progress": False} | arguments)


def test_single_tokens_are_refused(ids):
    with pytest.raises(ValueError, match="no token after the first"):
        diagnose(tiny.loud(), ids[:, :1], progress=False)


def test_models_without_a_head_are_refused_where_one_is_needed(ids):
    model = tiny.loud()
    with pytest.raises(ValueError, match=r"no language modeling head.*loss=False"):
        diagnose(model.model, ids, progress=False)
    found = diagnose(model.model, ids, loss=False, progress=False)
    assert found.layers[0]["jacobian_distance"] > 0


def test_a_stream_that_overflows_is_refused(ids):
    model = tiny.loud(dtype=torch.float16)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(6e4)
    with pytest.raises(ValueError, match=r"after layer 1 is not finite in float16; load the model in bfloat16"):
        diagnose(model, ids, progress=False)


def test_a_token_without_an_embedding_leaves_out_what_is_infinite(ids):
    """As a padding token in some models: the norm of attention's output is divided by that of a state of zeros."""
    model = tiny.loud()
    with torch.no_grad():
        model.model.embed_tokens.weight[ids[0, 3]] = 0.0
    found = diagnose(model, ids, loss=False, jacobian=False, progress=False)
    assert "attention_ratio: not finite in layers 0; a token's state before it is zero" in found.notes
    assert [one["attention_ratio"] is None for one in found.layers] == [True, False, False, False]
    json.loads(found.to_json(), parse_constant=lambda name: pytest.fail(name))


def test_a_layer_without_which_the_stream_overflows_is_left_out_with_a_note(ids):
    """In float16: layer 1 takes back most of what layer 0 adds, and layer 2 adds as much again."""
    model = tiny.loud(dtype=torch.float16, mlp_bias=True)
    with torch.no_grad():
        for layer, added in zip(model.model.layers, (4e4, -3.9e4, 4e4, 0.0), strict=True):
            layer.mlp.down_proj.bias.fill_(added)
    found = diagnose(model, ids, jacobian=False, progress=False)
    assert "loss_added: not finite in layers 1; load the model in bfloat16 or float32" in found.notes
    assert [one["loss_added"] is None for one in found.layers] == [False, True, False, False]
    assert [one["perplexity_without"] is None for one in found.layers] == [False, True, False, False]
    assert all(1 not in cut["layers"] for cut in found.cuts)
    assert found.verdict["signs"]["deep_layers_worth_little"] is None
    json.loads(found.to_json(), parse_constant=lambda name: pytest.fail(name))
    assert "-" in str(found)


def test_weights_that_are_not_finite_are_named(ids):
    model = tiny.loud(dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = math.nan
    message = r"after layer 1 is not finite in float32; the weight layers\.1\.mlp\.up_proj\.weight is not finite$"
    with pytest.raises(ValueError, match=message):
        diagnose(model, ids, progress=False)


def test_activations_that_overflow_in_float32_are_refused(ids):
    model = tiny.loud(dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(3e38)
    with pytest.raises(ValueError, match=r"after layer 1 is not finite in float32; its activations overflow"):
        diagnose(model, ids, progress=False)


def test_a_model_of_zeros_is_refused(ids):
    model = tiny.loud()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    with pytest.raises(ValueError, match=r"^model: the residual stream after layer 0 is zero for a token"):
        diagnose(model, ids, progress=False)


def test_tokens_with_an_embedding_of_zero_are_no_reason_to_refuse(ids):
    model = tiny.loud()
    with torch.no_grad():
        model.model.embed_tokens.weight[ids[2, 3]] = 0
        model.model.layers[0].self_attn.o_proj.weight.add_(0.1)
    assert diagnose(model, ids, **CHEAP).residual[0]["typical"] == 0


@pytest.mark.parametrize("wrong", [96, -1])
def test_token_ids_beyond_the_vocabulary_are_refused(wrong, ids):
    ids[1, 4] = wrong
    with pytest.raises(ValueError, match=rf"^data: token id {wrong} is outside the model's vocabulary of 96"):
        diagnose(tiny.loud(), ids, progress=False)
    ids[1, 4] = 95
    diagnose(tiny.loud(), ids, **CHEAP)


def test_a_loss_beyond_numbers_is_refused(ids):
    model = tiny.loud()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    with pytest.raises(ValueError, match=r"its loss on this data is .* nats per token"):
        diagnose(model, ids, progress=False)


def test_unknown_models_are_refused(ids):
    with pytest.raises(hf_lnscale.UnsupportedArchitectureError):
        diagnose(nn.Linear(2, 2), ids)


# --- what comes back -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    return diagnose(tiny.loud(num_hidden_layers=6), tiny.tokens(6, 11, seed=1), progress=False)


def test_json_comes_back_and_holds_no_nan(small, tmp_path):
    path = small.save(tmp_path)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    again = Diagnosis.load(tmp_path)
    assert again.to_json() == small.to_json()
    assert str(again) == str(small)


def test_a_file_with_measures_that_are_no_longer_taken_loads(small, tmp_path):
    """As an earlier version wrote it, with gradients and fits of the growth."""
    content = json.loads(small.to_json())
    content["cost"]["gradients"] = {"passes": 4.0, "seconds": 1.0}
    content["verdict"]["growth"] |= {"fits": {"linear": {"start": 1.0, "slope": 1.0, "off_by": 1.2}}, "kind": "linear"}
    for layer in content["layers"]:
        layer |= {"gradient_norm": 0.1, "gradient_norm_error": None, "state_gradient_norm": 0.2}
    (tmp_path / "diagnosis.json").write_text(json.dumps(content))
    old = Diagnosis.load(tmp_path)
    assert str(old) == str(small)
    assert json.loads(old.to_json()) == content
    for page in (old.report(), old.report(compare=small), small.report(compare=old)):
        assert page.count("<svg class") % 6 == 0
        assert "gradient norm" not in page


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 2}', '{"format": 1, "model": {}}'])
def test_other_files_are_refused(text, tmp_path):
    (tmp_path / "diagnosis.json").write_text(text)
    with pytest.raises(ValueError, match=r"diagnosis\.json.*contains no diagnosis"):
        Diagnosis.load(tmp_path)


def test_every_key_of_the_json_is_documented(small):
    page = (Path(__file__).parents[2] / "docs/diagnosis.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`([\w.\[\]]+)`", page))

    def keys(value, path):
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value, path = value[0], path + "[]"
        if isinstance(value, dict) and path not in ("cost", "versions", "verdict.removable"):
            for name, part in value.items():
                yield from keys(part, f"{path}.{name}" if path else name)
        else:
            yield path

    content = json.loads(small.to_json())
    content["verdict"]["massive_activations"] = verdict.massive(places([2.0, 2.0], [2.0, 2000.0]))
    found = set(keys(content, ""))
    assert len(found) > 60
    assert found - documented == set()
    # And nothing is documented that is not there.
    described = {key for key in documented if "." in key and key.partition(".")[0].partition("[")[0] in content}
    assert {key for key in described - found if not any(one.startswith(key) for one in found)} == set()


@pytest.mark.parametrize("width", [80, 120])
def test_printed_with_verdict_and_a_row_for_each_layer(width, small, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    text = str(small)
    assert small.verdict["headline"] in text
    assert small.verdict["cautions"][0].split()[0] in text
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == ["0", "1", "2", "3", "4", "5"]
    for row, layer in zip(rows, small.layers, strict=True):
        assert row[5] == compact(layer["loss_added"], layer["loss_added_error"])
        assert all("(" in cell for cell in row[1:])
        assert row[6] == compact(layer["jacobian_distance"], layer["jacobian_distance_error"])
    assert "0.27(1): 0.27 with a standard error of 0.01" in text
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("what", ["variance", "angular", "loss_added", "layers"])
def test_plots_show_what_was_measured(what, small):
    pytest.importorskip("matplotlib")
    other = diagnose(tiny.loud(num_hidden_layers=4, ln_scaling=True), tiny.tokens(6, 11, seed=1), progress=False)
    axes = small.plot(what, other).axes
    assert axes[0].get_ylim() == axes[1].get_ylim()
    if what == "loss_added":
        for axis, one in zip(axes, (small, other), strict=False):
            assert [bar.get_height() for bar in axis.patches] == of(one, "loss_added")
    if what == "angular":
        assert [axis.images[0].get_array().count() for axis in axes[:2]] == [21, 10]
        assert axes[0].images[0].get_clim() == axes[1].images[0].get_clim()
    if what == "variance":
        typical = next(line for line in axes[1].lines if line.get_label() == "typical token")
        assert list(typical.get_ydata()) == [place["typical"] for place in other.residual[1:]]


def test_plots_of_what_was_not_measured(ids):
    found = diagnose(tiny.loud(), ids, **CHEAP)
    with pytest.raises(ValueError, match=r"what must be one of variance, .* got 'tea'"):
        found.plot("tea")
    with pytest.raises(ValueError, match="'loss_added' was not measured"):
        found.plot("loss_added")
    assert [axis.get_ylabel() for axis in found.plot("layers").axes] == ["output norm / stream norm", "Block Influence"]


@pytest.mark.slow
def test_both_backends_draw_every_figure(small, tmp_path):
    pytest.importorskip("matplotlib")
    page = small.report()
    assert re.findall(r'<svg class="chart[^>]*data-figure="(\w+)"', page) == [figure.key for figure in figures.FIGURES]
    pictures = {figure.picture: small.plot(figure.picture) for figure in figures.FIGURES}
    for picture, drawn in pictures.items():
        rows = [figure for figure in figures.FIGURES if figure.picture == picture]
        assert [axis.get_ylabel() for axis in drawn.axes[: len(rows)]] == [figure.unit for figure in rows]
        for axis, figure in zip(drawn.axes, rows, strict=False):
            assert figure.unit in page
            labels = [line.get_label() for line in axis.lines]
            assert all(line.label in labels for line in figure.lines if figure.kind == "lines")
    with_errors = [axis.get_ylabel() for axis in pictures["layers"].axes if axis.collections]
    assert with_errors == ["output norm / stream norm", "distance from the identity", "Block Influence"]
    assert len(pictures["loss_added"].axes[0].collections) == 1
    # Typical token, two variances, attention, MLP, influence, loss added, Jacobian.
    assert page.count('class="error"') == 8 * len(small.layers)
    png.save_all([small], tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {f"{one}.{kind}" for one in pictures for kind in ("png", "svg")}


def test_names_that_are_markup_for_matplotlib(small):
    pytest.importorskip("matplotlib")
    named = dataclasses.replace(small, model=small.model | {"name": "a$b_$"})
    named.plot("variance").canvas.draw()


def test_plotting_without_matplotlib_names_the_extra(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"hf-lnscale\[plot\]"):
        small.plot("variance")
