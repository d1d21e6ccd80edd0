"""Plans: the search against deletion by hand, targets, resuming."""

import copy
import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from hf_lnscale import PruningPlan, drop_layers, plan_pruning
from hf_lnscale.core.stack import text_stack
from hf_lnscale.measuring.losses import losses_by_source, losses_of_sets
from hf_lnscale.measuring.text import token_batches
from hf_lnscale.pruning import heal_fit, search, target
from hf_lnscale.pruning.scores import LayerScores, score_layers
from hf_lnscale.pruning.search import SEARCH_METHODS
from hf_lnscale.pruning.target import cache_bytes
from oracles import decoder_layers

L = 6
DATA = [tiny.tokens(4, 12, seed=seed) for seed in range(4)]
CALIBRATION, HELD_OUT = DATA[:3], DATA[3:]


def model(family="llama", **changes):
    return tiny.model(family, num_hidden_layers=L, **changes)


def loss_of(full, dropped, batches):
    """By deletion."""
    pruned = copy.deepcopy(full)
    for layer in sorted(dropped, reverse=True):
        del decoder_layers(pruned)[layer]
    with torch.no_grad():
        losses = [pruned(ids, labels=ids, use_cache=False).loss.double() for ids in batches]
    return torch.stack(losses).mean().item()


def plan(full=None, **options):
    settings = {"held_out": HELD_OUT, "method": "greedy", "progress": False} | options
    return plan_pruning(full or model(), CALIBRATION, **settings)


@pytest.mark.slow
def test_greedy_is_greedy():
    full, dropped = model(), []
    for _ in range(3):
        rest = [layer for layer in range(L) if layer not in dropped]
        dropped.append(min(rest, key=lambda layer: loss_of(full, [*dropped, layer], CALIBRATION)))
    before = full(tiny.tokens()).logits
    found = plan(full, num_layers=3)
    assert [step["layers"] for step in found.steps] == [sorted(dropped[:n]) for n in (1, 2, 3)]
    assert found.layers == tuple(sorted(dropped))
    assert found.perplexity["before"] == pytest.approx(math.exp(loss_of(full, [], HELD_OUT)), rel=1e-5)
    assert found.perplexity["after"] == pytest.approx(math.exp(loss_of(full, dropped, HELD_OUT)), rel=1e-5)
    assert torch.equal(full(tiny.tokens()).logits, before)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["block_influence", "taylor", "perplexity", "kl", "angular"])
def test_one_shot_takes_the_lowest_scores(method):
    full = model()
    scores = score_layers(full, CALIBRATION, method, progress=False)
    assert plan(full, num_layers=2, method=method).layers == tuple(sorted(scores.lowest(2)))


def test_best_of_takes_the_best_proposal():
    full = model()
    found = plan(full, num_layers=2, method="best_of")
    angular, influence = (score_layers(full, CALIBRATION, m, progress=False) for m in ("angular", "block_influence"))
    proposals = {(i, i + 1) for i in range(L - 1)} | {tuple(sorted(influence.lowest(2)))}
    assert tuple(angular.best_block(2)) in proposals
    assert found.layers == min(proposals, key=lambda layers: loss_of(full, layers, CALIBRATION))
    assert {tuple(one["layers"]) for one in found.steps[0]["tried"]} == proposals
    assert len(found.steps) == 1  # sets of other sizes need not be looked at


def test_best_of_takes_what_heals_best():
    full = model()
    before = full(tiny.tokens()).logits
    found = plan(full, num_layers=2, method="best_of", heal="refit")
    tried = found.steps[0]["tried"]
    assert len(tried) == 6
    assert all(one["healed"] <= one["perplexity"] for one in tried)
    assert list(found.layers) == min(tried, key=lambda one: one["healed"])["layers"]
    assert torch.equal(full(tiny.tokens()).logits, before)


def test_each_source_of_text_proposes_layers():
    full = tiny.speaker(num_hidden_layers=L)
    sources = {"random": [tiny.tokens(8, seed=3)], "said": [tiny.said_by(full, 12, 12, seed=3)]}
    found = plan_pruning(full, sources, held_out=HELD_OUT, num_layers=3, method="best_of", progress=False)
    lowest = [sorted(score_layers(full, data, progress=False).lowest(3)) for data in sources.values()]
    assert lowest == [[2, 4, 5], [2, 3, 4]]
    assert all(layers in [one["layers"] for one in found.steps[0]["tried"]] for layers in lowest)


def test_what_is_far_worse_before_healing_is_not_healed():
    """The first layer of this model carries nearly all that it says."""
    full = tiny.speaker(num_hidden_layers=L)
    with torch.no_grad():
        for layer in decoder_layers(full)[1:]:
            layer.mlp.down_proj.weight.mul_(0.2)
            layer.self_attn.o_proj.weight.mul_(0.2)
    said = [tiny.said_by(full)]
    (step,) = plan_pruning(full, said, num_layers=4, method="best_of", heal="refit", progress=False).steps
    assert [one["layers"] for one in step["tried"]] == [[2, 3, 4, 5], [1, 2, 3, 4]]


@pytest.mark.slow
@pytest.mark.parametrize("method", SEARCH_METHODS)
def test_every_method_gives_the_same_plan_again(method, tmp_path):
    first, second = (plan(num_layers=2, method=method) for _ in range(2))
    assert first == second
    assert PruningPlan.load(first.save(tmp_path)) == PruningPlan.load(second.save(tmp_path / "again"))
    assert len(first.layers) == 2
    assert first.data["calibration"]["sha256"] != first.data["held_out"]["sha256"]


def test_a_part_is_held_out_of_the_data():
    found = plan_pruning(model(), DATA, num_layers=1, method="greedy", progress=False)
    assert found.data["calibration"]["num_sequences"] == 12
    assert found.data["held_out"]["num_sequences"] == 4
    assert found.perplexity == plan(num_layers=1).perplexity


@pytest.mark.slow
@pytest.mark.parametrize("heal", [None, "linear"])
def test_a_budget_is_kept_on_held_out_data(heal):
    full = model()
    curve = plan(full, num_layers=L - 1)
    for n in (1, 3):
        after = curve.steps[n - 1]["perplexity"] / curve.perplexity["before"] - 1
        found = plan(full, max_perplexity_increase=max(after, 0) + 1e-6, heal=heal)
        assert len(found.layers) >= n or any(
            step["perplexity"] / curve.perplexity["before"] - 1 > max(after, 0) + 1e-6 for step in curve.steps[:n]
        )
        assert found.perplexity_increase is None or found.perplexity_increase <= max(after, 0) + 1e-6


def test_a_budget_that_no_layer_meets_gives_an_empty_plan(tmp_path):
    full = model()
    with torch.no_grad():
        full.lm_head.weight.mul_(50)
    said = full.generate(
        tiny.tokens(8, 1), max_new_tokens=15, do_sample=False, eos_token_id=None
    )  # every layer matters
    found = plan(full, max_perplexity_increase=1e-9, method="block_influence", held_out=said)
    assert found.layers == ()
    assert found.perplexity.keys() == {"before"}
    full.save_pretrained(tmp_path)
    assert len(AutoModelForCausalLM.from_pretrained(tmp_path, drop_layers=found).model.layers) == L


def test_a_budget_that_is_met_exactly_is_met():
    full = model()
    with torch.no_grad():
        full.lm_head.weight.mul_(50)
    said = full.generate(tiny.tokens(8, 1), max_new_tokens=15, do_sample=False, eos_token_id=None)
    curve = plan(full, num_layers=2, held_out=said)
    costs = [step["perplexity"] / curve.perplexity["before"] - 1.0 for step in curve.steps]
    assert 0 < costs[0] < costs[1]
    assert len(plan(full, max_perplexity_increase=costs[1], held_out=said).layers) >= 2
    assert len(plan(full, max_perplexity_increase=math.nextafter(costs[1], 0), held_out=said).layers) == 1


@pytest.mark.slow
def test_a_budget_looks_two_numbers_further(tmp_path, monkeypatch):
    """Sets of several sizes are found without each other: one layer more can cost less."""
    full = model()
    # An order in which it does.
    sizes = [sum(p.abs().sum() for p in layer.parameters() if p.dim() > 1) for layer in decoder_layers(full)]
    scores = LayerScores("block_influence", torch.stack(sizes).detach().double())
    monkeypatch.setattr(search, "score_layers", lambda *_, **__: scores)
    before = loss_of(full, [], HELD_OUT)
    increases = [math.exp(loss_of(full, scores.lowest(n), HELD_OUT) - before) - 1 for n in range(1, L)]
    one, two, three, four, five = increases
    assert five < three < one < four < two  # or it shows nothing
    search_of = {"method": "block_influence", "resume": tmp_path / "search.json"}
    for budget, deepest, looked_at in (
        ((three + one) / 2, 5, 5),  # 1 and 2 are outside, 3 is inside, 4 outside, 5 inside
        ((five + three) / 2, 0, 3),  # 1, 2 and 3 are outside: the search ends there
        (two * 2, 5, 5),
    ):
        for _ in range(2):  # the second time by what is noted
            found = plan(full, max_perplexity_increase=budget, **search_of)
            assert found.layers == tuple(sorted(scores.lowest(deepest)))
            assert [step["layers"] for step in found.steps] == [sorted(scores.lowest(n + 1)) for n in range(looked_at)]
    curve = plan(full, num_layers=L - 1)
    costs = [step["perplexity"] / curve.perplexity["before"] - 1 for step in curve.steps]
    outside = next(n for n, cost in enumerate(costs) if cost > 1e-9)
    assert len(plan(full, max_perplexity_increase=1e-9).steps) == outside + 1  # greedy stops there


@pytest.mark.parametrize("method", ["best_of", "greedy", "greedy_healed"])
def test_what_cannot_be_healed_is_refused_before_the_search(method, monkeypatch):
    monkeypatch.setattr(search, "_steps", lambda *_: pytest.fail("searched"))
    with monkeypatch.context() as patch:
        patch.setattr(heal_fit, "OUTPUT_WEIGHTS", ("mlp.other",))
        with pytest.raises(ValueError, match=r"heal 'linear' is not possible: .* model_type 'llama'"):
            plan(model(), num_layers=1, method=method, heal="linear")
    with pytest.raises(ValueError, match="data: 1 sequence of calibration data is too little for heal=linear"):
        plan_pruning(model(), tiny.tokens(2, 12), num_layers=1, method=method, heal="linear", progress=False)


def test_a_broken_model_is_no_candidate():
    full = model()
    with torch.no_grad():
        full.model.layers[3].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"model: its perplexity on the held-out data is (nan|inf)"):
        plan(full, max_perplexity_increase=0.1)


def test_size_targets():
    full = model()
    total = sum(p.numel() for p in full.parameters())
    layer = sum(p.numel() for p in full.model.layers[0].parameters())
    assert len(plan(full, target_params=total - 2 * layer, method="block_influence").layers) == 2
    assert len(plan(full, target_params=total - 2 * layer - 1, method="block_influence").layers) == 3
    assert plan(full, target_params=total, method="block_influence").layers == ()
    notes = plan(full, target_memory=4 * (total - layer), method="block_influence").notes
    assert notes["params"] == [total, total - layer]
    assert notes["weight_bytes"] == [4 * total, 4 * (total - layer)]
    # With the cache of 2 x 1000 tokens (2 key/value heads of 8 in float32) one layer less is enough or not.
    cache = 2 * 1000 * 2 * 2 * 8 * 4
    memory = 4 * total + L * cache - (4 * layer + cache)
    sizes = {"method": "block_influence", "cache_tokens": 1000, "cache_batch": 2}
    assert len(plan(full, target_memory=memory, **sizes).layers) == 1
    assert len(plan(full, target_memory=memory - 1, **sizes).layers) == 2
    with pytest.raises(ValueError, match=r"target_params must be at least .*, the size of this .* layer left, got 10"):
        plan(full, target_params=10)


CACHES = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    "deepseek_v3": {},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"] * 3},
}


@pytest.mark.parametrize("family", CACHES)
def test_cache_is_estimated_as_it_grows(family):
    full = model(family, **CACHES[family])
    with torch.no_grad():
        cache = full(tiny.tokens(2, 24), use_cache=True).past_key_values
    # A window keeps one token less than it is wide, as the next one comes on top.
    real = [sum(t.numel() * t.element_size() for t in target._tensors(vars(layer))) for layer in cache.layers]
    token = [0 if not getattr(layer, "is_sliding", False) else real[0] // 24 for layer in cache.layers]
    assert cache_bytes(text_stack(full), 24, 2)[0] == [r + t for r, t in zip(real, token, strict=True)]


@pytest.mark.parametrize("setting", ["gradient checkpointing", "return_dict"])
def test_cache_is_estimated_in_any_mode(setting):
    full = model()
    expected = cache_bytes(text_stack(full), 24, 2)
    if setting == "return_dict":
        full.config.return_dict = False
    else:
        full.gradient_checkpointing_enable()
        full.train()
    assert cache_bytes(text_stack(full), 24, 2) == expected
    assert full.training == (setting == "gradient checkpointing")


@pytest.mark.slow
def test_a_hybrid_keeps_a_layer_that_counts_tokens(monkeypatch):
    """Of layers 1 and 4, without which the others cannot generate, the search leaves one; or says why it cannot."""
    types = ["full_attention" if layer in (1, 4) else "linear_attention" for layer in range(6)]
    full = model("qwen3_next", layer_types=types)
    with torch.no_grad():  # what they do is next to nothing, so that they go first
        for layer in (1, 4):
            for weight in decoder_layers(full)[layer].parameters():
                weight.mul_(1e-3)
    monkeypatch.setattr(
        search,
        "sweep",
        lambda _, __, gone, candidates, **___: (
            None,
            {i: SimpleNamespace(mean=(i not in (1, 4)) + i / 100) for i in candidates},
        ),
    )
    for method in ("best_of", "greedy", "greedy_healed"):
        for count in (2, 4):
            found = plan(full, num_layers=count, method=method)
            assert len(found.layers) == count
            drop_layers(copy.deepcopy(full), found.layers)  # refuses what cannot generate
    with pytest.raises(ValueError, match=r"one of layers \[1, 4\] must be kept"):
        plan(full, num_layers=2, method="block_influence")


@pytest.mark.slow
def test_an_interrupted_search_goes_on(tmp_path, monkeypatch):
    whole = plan(num_layers=3)
    sweeps = []

    def interrupted(*args, **kwargs):
        sweeps.append(args)
        if len(sweeps) == 2:
            raise KeyboardInterrupt
        return sweep(*args, **kwargs)

    sweep = search.sweep
    file = tmp_path / "search.json"
    monkeypatch.setattr(search, "sweep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plan(num_layers=3, resume=file)
    assert len(json.loads(file.read_text())["steps"]) == 1
    assert plan(num_layers=3, resume=file) == whole
    assert len(sweeps) == 4  # the first, the interrupted one, and the two that were left
    assert plan(num_layers=3, resume=file) == whole
    assert len(sweeps) == 4
    with pytest.raises(ValueError, match="belongs to another search, with different method"):
        plan(num_layers=3, method="greedy_healed", resume=file)
    other = model()
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    with pytest.raises(ValueError, match="belongs to another model"):
        plan(other, num_layers=3, resume=file)
    assert plan(num_layers=2, resume=file) == plan(num_layers=2)  # the steps do not depend on how far to go
    with pytest.raises(ValueError, match="belongs to another search, with different data"):
        plan(num_layers=3, held_out=DATA[2:], resume=file)
    for content in ("", "[]", "{", '{"key": [], "steps": []}', '{"key": {}, "steps": [1]}', "[" * 100_000):
        file.write_text(content)
        with pytest.raises(ValueError, match="is not the record of a search"):
            plan(num_layers=3, resume=file)


WRONG = [
    ({}, "exactly one of num_layers, .* and target_memory must be given, got none"),
    ({"num_layers": 1, "target_params": 5}, "exactly one of .*num_layers=1, target_params=5"),
    ({"num_layers": L}, "num_layers must be an integer from 1 to 5 for this model, got 6"),
    ({"num_layers": True}, "num_layers must be a positive number, got True"),
    ({"num_layers": 1.5}, "num_layers must be an integer"),
    ({"max_perplexity_increase": -0.1}, "max_perplexity_increase must be a positive number, got -0.1"),
    ({"num_layers": 1, "method": "best"}, "method must be one of best_of.*got 'best'"),
    ({"num_layers": 1, "heal": "magic"}, "heal must be one of .*got 'magic'"),
    ({"num_layers": 1, "cache_tokens": -1}, "cache_tokens must be an integer >= 0, got -1"),
    ({"num_layers": 1, "cache_batch": 0}, "cache_batch must be an integer >= 1, got 0"),
    ({"num_layers": 1, "resume": os.path.dirname(__file__)}, "resume .* is not the record of a search"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda value: repr(value)[:40])
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        plan(**options)


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_next"])
def test_sets_share_the_full_model_s_states(family):
    """The same as each set by itself, bit for bit, in fewer layers run."""
    full = model(
        family, **({"layer_types": ["linear_attention", "full_attention"] * 3} if family == "qwen3_next" else {})
    )
    sets, runs = [(0, 3), (2, 3, 4), (5,)], []
    for layer in decoder_layers(full):
        layer.register_forward_hook(lambda *_: runs.append(1))
    batches = token_batches(CALIBRATION)
    found = losses_of_sets(full, batches, sets, progress=False)
    # The probe for tuples and the full model once for each batch, and of each set what comes after its first layer.
    assert len(runs) == L + len(batches) * (L + 4 + 1 + 0)
    assert [loss.mean for loss in found] == [losses_by_source(full, batches, layers).mean for layers in sets]
