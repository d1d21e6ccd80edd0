"""Plans: the search against deletion by hand, targets, resuming, and `hf-lnscale prune`."""

import copy
import json
import math
import subprocess
import sys
from dataclasses import replace
from itertools import combinations

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM

import tiny
from hf_lnscale import PruningPlan, draft_model, drop_layers
from hf_lnscale.measuring.text import Windows, token_batches
from hf_lnscale.pruning import prune as prune_module
from hf_lnscale.pruning import search
from hf_lnscale.pruning.layers import text_stack
from hf_lnscale.pruning.scores import score_layers
from hf_lnscale.pruning.search import SEARCH_METHODS, cache_bytes, plan_pruning
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


def test_a_wide_beam_finds_the_best_pair():
    full = model()
    best = min(combinations(range(L), 2), key=lambda pair: loss_of(full, pair, CALIBRATION))
    assert plan(full, num_layers=2, method="beam", beam_width=L).layers == best


@pytest.mark.parametrize("method", ["block_influence", "magnitude", "taylor", "perplexity", "kl", "angular"])
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
    assert len(tried) == 4
    assert all(one["healed"] <= one["perplexity"] for one in tried)
    assert list(found.layers) == min(tried, key=lambda one: one["healed"])["layers"]
    assert torch.equal(full(tiny.tokens()).logits, before)


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
        full.lm_head.weight.mul_(50)  # every layer matters now
    found = plan(full, max_perplexity_increase=1e-9, method="magnitude")
    assert found.layers == ()
    assert found.perplexity.keys() == {"before"}
    full.save_pretrained(tmp_path)
    assert len(AutoModelForCausalLM.from_pretrained(tmp_path, drop_layers=found).model.layers) == L


def test_a_budget_looks_two_numbers_further(tmp_path):
    """Sets of several sizes are found without each other: one layer more can cost less."""
    full = model()
    scores = score_layers(full, CALIBRATION, "magnitude", progress=False)
    before = loss_of(full, [], HELD_OUT)
    increases = [math.exp(loss_of(full, scores.lowest(n), HELD_OUT) - before) - 1 for n in range(1, L)]
    one, two, three, four, five = increases
    assert five < three < one < four < two  # or it shows nothing
    search_of = {"method": "magnitude", "resume": tmp_path / "search.json"}
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
    with pytest.raises(ValueError, match="heal='linear': healing is not possible for model_type 'gemma2'"):
        plan(model("gemma2"), num_layers=1, method=method, heal="linear")
    with pytest.raises(ValueError, match="data: 1 sequence of calibration data is too little for heal='linear'"):
        plan_pruning(model(), tiny.tokens(2, 12), num_layers=1, method=method, heal="linear", progress=False)


def test_a_broken_model_is_no_candidate():
    full = model()
    with torch.no_grad():
        full.model.layers[3].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"perplexity on the held-out data is (nan|inf)"):
        plan(full, max_perplexity_increase=0.1)


def test_size_targets():
    full = model()
    total = sum(p.numel() for p in full.parameters())
    layer = sum(p.numel() for p in full.model.layers[0].parameters())
    assert len(plan(full, target_params=total - 2 * layer, method="magnitude").layers) == 2
    assert len(plan(full, target_params=total - 2 * layer - 1, method="magnitude").layers) == 3
    assert plan(full, target_params=total, method="magnitude").layers == ()
    notes = plan(full, target_memory=4 * (total - layer), method="magnitude").notes
    assert notes["params"] == [total, total - layer]
    assert notes["weight_bytes"] == [4 * total, 4 * (total - layer)]
    # With the cache of 2 x 1000 tokens (2 key/value heads of 8 in float32) one layer less is enough or not.
    cache = 2 * 1000 * 2 * 2 * 8 * 4
    memory = 4 * total + L * cache - (4 * layer + cache)
    sizes = {"method": "magnitude", "cache_tokens": 1000, "cache_batch": 2}
    assert len(plan(full, target_memory=memory, **sizes).layers) == 1
    assert len(plan(full, target_memory=memory - 1, **sizes).layers) == 2
    with pytest.raises(ValueError, match=r"target_params=10: with a single layer left this model still has"):
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
    real = [sum(t.numel() * t.element_size() for t in search._tensors(vars(layer))) for layer in cache.layers]
    token = [0 if not getattr(layer, "is_sliding", False) else real[0] // 24 for layer in cache.layers]
    assert cache_bytes(text_stack(full), 24, 2) == [r + t for r, t in zip(real, token, strict=True)]


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
        "sweep_losses",
        lambda _, __, gone, **___: {i: (i not in (1, 4)) + i / 100 for i in range(6) if i not in gone},
    )
    for method in ("best_of", "greedy", "beam"):
        for count in (2, 4):
            found = plan(full, num_layers=count, method=method)
            assert len(found.layers) == count
            drop_layers(copy.deepcopy(full), found.layers)  # refuses what cannot generate
    with pytest.raises(ValueError, match=r"of layers \[1, 4\] one must stay"):
        plan(full, num_layers=2, method="block_influence")


def test_a_plan_for_a_draft(tmp_path):
    """The plan says what is promised, and whether it pays; on a model of random weights, nothing should be assumed."""
    full = model()
    prompts = [tiny.tokens(2, 6, seed=seed) for seed in range(2)]
    found = plan_pruning(full, prompts, objective="draft", num_layers=2, progress=False)
    assert 1 <= len(found.layers) <= 2
    assert found.notes["pays"] == (found.notes["speedup"] > 1.0)
    assert PruningPlan.load(found.save(tmp_path)).notes == found.notes
    for speedup, pays in ((1.234, "it pays"), (0.8, "it does not pay, plain decoding is faster")):
        notes = found.notes | {"speedup": speedup, "pays": speedup > 1}
        assert str(replace(found, notes=notes)) == (
            f"drop {len(found.layers)} of 6 layers: {list(found.layers)} "
            f"(as a draft it promises {speedup:.2f} times the speed of plain decoding: {pays})"
        )
    for wrong in (0, 9):
        with pytest.raises(ValueError, match=f"num_layers must be an integer of 1 ... 5, got {wrong}"):
            plan_pruning(full, prompts, objective="draft", num_layers=wrong, progress=False)
    with pytest.raises(ValueError, match="num_assistant_tokens must be an integer of at least 1, got 0"):
        draft_model(full, found, num_assistant_tokens=0)
    draft = draft_model(full, found)
    assert draft.generation_config.num_assistant_tokens == found.notes["num_assistant_tokens"]
    assert len(draft.model.layers) == L - len(found.layers)
    expected = full.generate(tiny.tokens(1, 5), max_new_tokens=8, do_sample=False)
    assert torch.equal(
        full.generate(tiny.tokens(1, 5), max_new_tokens=8, do_sample=False, assistant_model=draft), expected
    )
    with pytest.raises(ValueError, match="objective must be 'perplexity' or 'draft', got 'speed'"):
        plan(full, num_layers=1, objective="speed")
    with pytest.raises(ValueError, match="objective='draft' goes with"):
        plan(full, max_perplexity_increase=0.1, objective="draft")


def test_an_interrupted_search_goes_on(tmp_path, monkeypatch):
    whole = plan(num_layers=3)
    sweeps = []

    def interrupted(*args, **kwargs):
        sweeps.append(args)
        if len(sweeps) == 2:
            raise KeyboardInterrupt
        return sweep(*args, **kwargs)

    sweep = search.sweep_losses
    file = tmp_path / "search.json"
    monkeypatch.setattr(search, "sweep_losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plan(num_layers=3, resume=file)
    assert len(json.loads(file.read_text())["steps"]) == 1
    assert plan(num_layers=3, resume=file) == whole
    assert len(sweeps) == 4  # the first, the interrupted one, and the two that were left
    assert plan(num_layers=3, resume=file) == whole
    assert len(sweeps) == 4
    with pytest.raises(ValueError, match="is of another search, with other method"):
        plan(num_layers=3, method="beam", resume=file)
    other = model()
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
    with pytest.raises(ValueError, match="is of another model"):
        plan(other, num_layers=3, resume=file)
    assert plan(num_layers=2, resume=file) == plan(num_layers=2)  # the steps do not depend on how far to go
    with pytest.raises(ValueError, match="is of another search, with other data"):
        plan(num_layers=3, held_out=DATA[2:], resume=file)
    file.write_text("[]")
    with pytest.raises(ValueError, match="is no record of a search"):
        plan(num_layers=3, resume=file)


WRONG = [
    ({}, "exactly one of num_layers.*got none"),
    ({"num_layers": 1, "target_params": 5}, "exactly one of .*num_layers=1, target_params=5"),
    ({"num_layers": L}, "num_layers must be an integer from 1 to 5 for this model, got 6"),
    ({"num_layers": True}, "num_layers must be a positive number, got True"),
    ({"num_layers": 1.5}, "num_layers must be an integer"),
    ({"max_perplexity_increase": -0.1}, "max_perplexity_increase must be a positive number, got -0.1"),
    ({"num_layers": 1, "method": "best"}, "method must be one of best_of.*got 'best'"),
    ({"num_layers": 1, "heal": "magic"}, "heal must be one of .*got 'magic'"),
    ({"num_layers": 1, "method": "beam", "beam_width": 0}, "beam_width must be a positive integer, got 0"),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda value: repr(value)[:40])
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        plan(**options)


# --- hf-lnscale prune -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model(ln_scaling=True).save_pretrained(folder)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, tiny.VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(f"w{token}" for token in tiny.tokens(1, 800)[0].tolist()))
    return file


def prune(*arguments, expect=0):
    command = [sys.executable, "-m", "hf_lnscale", "prune", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == expect, done.stderr
    return done.stdout + done.stderr


def test_prune(checkpoint, text, tmp_path):
    """Layers by count, healed: what is written is plain but for its own depths, and does what its plan says."""
    printed = prune(
        checkpoint, "--data", text, "--layers", 2, "--heal", "linear", "--seq-len", 16, "--out", tmp_path / "out"
    )
    assert "LayerNorm Scaling is active" in printed
    for word in ("layers", "parameters", "checkpoint", "perplexity", "prefill", "decode", "peak memory"):
        assert word in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # no record of the search, no temporary folder
    found = PruningPlan.load(tmp_path / "out")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert pruned.config.dropped_layers["layers"] == list(found.layers)
    assert pruned.config.ln_scaling["depths"] == [i + 1 for i in range(L) if i not in found.layers]
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path / "out")
    _, held_out = token_batches(text, tokenizer=tokenizer, windows=Windows(seq_len=16)).split(0.25)
    with torch.no_grad():
        losses = [pruned(batch.input_ids, labels=batch.input_ids).loss for batch in held_out]
    sizes = torch.tensor([batch.input_ids[:, 1:].numel() for batch in held_out])
    perplexity = math.exp((torch.stack(losses) * sizes).sum() / sizes.sum())
    assert perplexity == pytest.approx(found.perplexity.get("healed", found.perplexity["after"]), rel=1e-4)
    card = (tmp_path / "out/README.md").read_text()
    assert f"without_layers {found.layers}" not in card
    assert "2 of 6 layers dropped" in card
    assert "hf-lnscale prune" in card
    assert "| perplexity, held out |" in card
    assert not tiny.uploaded_that_say(tmp_path.parent, tmp_path / "out")
    # The plan names the same layers to whoever loads the whole checkpoint with it.
    again = AutoModelForCausalLM.from_pretrained(checkpoint, drop_layers=tmp_path / "out")
    assert again.config.dropped_layers["layers"] == pruned.config.dropped_layers["layers"]


def test_the_method_that_heals_writes_what_it_says(checkpoint, text, tmp_path):
    given = ("--method", "greedy_healed", "--layers", 1, "--seq-len", 16, "--out", tmp_path / "out")
    prune(checkpoint, "--data", text, *given)
    assert PruningPlan.load(tmp_path / "out").heal["method"] == "refit"
    assert "goes with another method" in prune(
        checkpoint, "--data", text, *given, "--heal", "none", "--force", expect=1
    )


def test_an_interrupted_prune_is_not_in_the_way(checkpoint, text, tmp_path):
    record = tmp_path / ".out.search.json"
    record.write_text(json.dumps({"key": {"method": {"search": "beam"}}, "steps": []}))
    prune(checkpoint, "--data", text, "--layers", 1, "--seq-len", 16, "--out", tmp_path / "out")
    assert not record.exists()


def test_prune_given_layers(checkpoint, text, tmp_path):
    given = ("--data", text, "--drop", "1,-2", "--heal", "none", "--seq-len", 16, "--out", tmp_path / "out", "--json")
    command = [sys.executable, "-m", "hf_lnscale", "prune", *map(str, (checkpoint, *given))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)  # and nothing else is printed there
    assert found["layers"] == [1, 4]
    costs = found["notes"]["cost"]
    assert costs["after"]["size_on_disk"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert costs["after"]["parameters"] < costs["before"]["parameters"]
    assert PruningPlan.load(tmp_path / "out").notes["cost"] == costs
    expected = drop_layers(AutoModelForCausalLM.from_pretrained(checkpoint), [1, 4])
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(got(tiny.tokens()).logits, expected(tiny.tokens()).logits)


def test_prune_heals_where_it_can(checkpoint, text, tmp_path):
    prune(checkpoint, "--data", text, "--drop", 2, "--seq-len", 16, "--out", tmp_path / "llama")
    assert PruningPlan.load(tmp_path / "llama").heal["method"] == "refit"
    model("gemma2").save_pretrained(tmp_path / "gemma2")
    tf.AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "gemma2")
    given = (tmp_path / "gemma2", "--data", text, "--drop", 2, "--seq-len", 16, "--out", tmp_path / "out")
    prune(*given)
    assert PruningPlan.load(tmp_path / "out").heal is None
    assert "healing is not possible" in prune(*given, "--heal", "linear", "--force", expect=1)


def in_process(checkpoint, text, out, **options):
    return prune_module.prune(
        str(checkpoint), str(text), out, progress=False, **{"windows": Windows(seq_len=16), **options}
    )


def test_prune_that_finds_no_layer_writes_nothing(checkpoint, tmp_path):
    """On what the model says itself, every layer matters."""
    sharp = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        sharp.lm_head.weight.mul_(50)
    sharp.save_pretrained(tmp_path / "sharp")
    tf.AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "sharp")
    said = sharp.generate(tiny.tokens(20, 1), min_new_tokens=31, max_new_tokens=31, suppress_tokens=[0, 1, 2])
    (tmp_path / "text.txt").write_text(" ".join(f"w{token}" for token in said.flatten().tolist()))
    budget = {"max_perplexity_increase": 1e-9, "method": "magnitude"}
    with pytest.raises(ValueError, match="not one layer can go: the cheapest raises perplexity from"):
        in_process(tmp_path / "sharp", tmp_path / "text.txt", tmp_path / "out", **budget)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sharp", "text.txt"]


def test_prune_heals_once(checkpoint, text, tmp_path, monkeypatch):
    """What the search ends with is healed in place, and that is what is written."""
    healings = []
    heal = search.heal_model

    def counted(model, layers, *args, **options):
        healings.append(tuple(layers))
        return heal(model, layers, *args, **options)

    monkeypatch.setattr(search, "heal_model", counted)
    found, _ = in_process(checkpoint, text, tmp_path / "out", num_layers=2, heal="linear")
    assert healings == [found.layers]
    whole = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = tf.AutoTokenizer.from_pretrained(checkpoint)
    expected = plan_pruning(
        whole, str(text), num_layers=2, heal="linear", tokenizer=tokenizer, windows=Windows(seq_len=16), progress=False
    )
    assert (found.layers, found.perplexity, found.heal) == (expected.layers, expected.perplexity, expected.heal)


def test_prune_refuses_before_the_search_what_cannot_be_healed(checkpoint, text, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "_steps", lambda *_: pytest.fail("searched"))
    model("gemma2").save_pretrained(tmp_path / "gemma2")
    tf.AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "gemma2")
    for options in ({"heal": "linear"}, {"method": "greedy_healed"}):
        with pytest.raises(ValueError, match="healing is not possible for model_type 'gemma2'"):
            in_process(tmp_path / "gemma2", text, tmp_path / "out", num_layers=1, **options)
    for options in ({"num_layers": 1}, {"drop": [1]}):
        with pytest.raises(ValueError, match="1 sequence of calibration data is too little"):
            in_process(checkpoint, text, tmp_path / "out", windows=Windows(32, 16), **options)
    assert [path.name for path in tmp_path.iterdir()] == ["gemma2"]


@pytest.mark.parametrize("value", [math.nan, 1e6])
def test_prune_refuses_figures_that_are_none(value, checkpoint, text, tmp_path):
    broken = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        broken.lm_head.weight.mul_(value)
    broken.save_pretrained(tmp_path / "broken")
    tf.AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "broken")
    for given in ({"drop": [1]}, {"num_layers": 1}):
        with pytest.raises(ValueError, match=r"its perplexity on the held-out data is (nan|inf)"):
            in_process(tmp_path / "broken", text, tmp_path / "out", heal=None, **given)
    # And of what was written, whatever the plan says.
    batches = token_batches(text, tokenizer=tf.AutoTokenizer.from_pretrained(checkpoint), windows=Windows(seq_len=16))
    for said in (90.0, math.nan):
        with pytest.raises(ValueError, match="nothing is kept"):
            prune_module._require_as_planned(
                tmp_path / "broken", PruningPlan((1,), {}, perplexity={"after": said}), batches, "auto", "cpu"
            )


def test_prune_refuses_before_a_weight_is_read(checkpoint, text, tmp_path, monkeypatch):
    monkeypatch.setattr(prune_module.Placement, "load", lambda *_, **__: pytest.fail("loaded"))
    for given, message in (
        ({"num_layers": 0}, "num_layers must be an integer from 1 to 5"),
        ({"num_layers": 6}, "num_layers must be an integer from 1 to 5"),
        ({"drop": [9]}, "layer 9 does not exist in a model of 6"),
        ({"drop": [1], "windows": Windows(seq_len=10_000)}, "seq_len must be at most"),
    ):
        with pytest.raises(ValueError, match=message):
            in_process(checkpoint, text, tmp_path / "out", **given)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        in_process(checkpoint, "none.txt", tmp_path / "out", num_layers=1)


def test_prune_refuses(checkpoint, text, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("x")
    given = (checkpoint, "--data", text, "--seq-len", 16)
    assert "exists and is not empty" in prune(*given, "--layers", 1, "--out", tmp_path / "full", expect=1)
    assert "give one of the three" in prune(*given, "--out", tmp_path / "out", expect=1)
    assert "is no share" in prune(*given, "--max-ppl-increase", "10", "--out", tmp_path / "out", expect=2)
    assert "is no checkpoint; --force" in prune(*given, "--layers", 1, "--force", "--out", tmp_path / "full", expect=1)
    for out in (checkpoint, checkpoint / "inside", checkpoint.parent, text.parent):
        assert "must not be, hold or lie in" in prune(*given, "--layers", 1, "--force", "--out", out, expect=1)
    assert "--drop: '' is no list" in prune(*given, "--drop", "", "--out", tmp_path / "out", expect=2)
    assert "--drop: 'a' is no list" in prune(*given, "--drop", "a", "--out", tmp_path / "out", expect=2)
    assert "does not exist in a model of 6" in prune(*given, "--drop", "9", "--out", tmp_path / "out", expect=1)
    assert "no share" in prune(*given, "--max-ppl-increase", "x", "--out", tmp_path / "out", expect=2)
    assert "there is no file" in prune(checkpoint, "--data", "none.txt", "--layers", 1, "--out", "o", expect=1)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
