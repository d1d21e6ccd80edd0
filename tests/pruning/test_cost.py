"""The cost that is announced before a search, against what the search then runs."""

import logging
from dataclasses import replace

import pytest

import tiny
from hf_lnscale import plan_pruning
from hf_lnscale.measuring import split_model
from hf_lnscale.measuring.sample import documents, train_tokenizer
from hf_lnscale.measuring.text import token_batches
from hf_lnscale.pruning import cost, heal_fit
from hf_lnscale.pruning.cost import Cost, estimate_cost, work_of_search
from hf_lnscale.pruning.search import SEARCH_METHODS, Request, Text, search_layers
from hf_lnscale.pruning.target import Target
from oracles import decoder_layers

L = 12
DATA = token_batches([tiny.tokens(16, 16, seed=seed) for seed in range(4)])
CALIBRATION, JUDGED = DATA.split(0.25)


RUNS = [(method, heal, 1) for method in (*SEARCH_METHODS, "sublayers") for heal in (None, "linear")]


# Beside the default sources twice as much is fitted and judged.
@pytest.mark.slow
@pytest.mark.parametrize(("method", "heal", "more"), [*RUNS, ("best_of", "linear", 2)])
def test_the_work_of_a_search(method, heal, more, monkeypatch):
    """Tokens through decoder layers and through the head, counted by hooks."""
    model = tiny.speaker(num_hidden_layers=L, vocab_size=300)
    # Steps of healing that have to be shortened are not foreseen. On its own text, the model needs none.
    calibration, judged = token_batches([tiny.said_by(model, 16, seed=seed) for seed in range(4)]).split(0.25)
    if more == 2:
        monkeypatch.setattr(heal_fit, "_BLENDS", (1.0,))  # to this model, English and code are noise
        calibration.tokenizer = train_tokenizer(documents()[:20], 300)
    if method == "greedy_healed":
        heal = "linear"
    run = {"layers": 0, "head": 0}

    def count(name, tokens):
        run[name] += tokens

    for layer in decoder_layers(model):
        layer.register_forward_hook(lambda _, args, __: count("layers", args[0].shape[0] * args[0].shape[1]))
    model.lm_head.register_forward_hook(lambda _, args, __: count("head", args[0].shape[0] * args[0].shape[1]))
    request, text = Request(("num_layers", 3), method, heal=heal), Text(calibration, judged)
    if method == "sublayers":  # one step
        params = sum(parameter.numel() for parameter in model.parameters())
        request = Request(("target_params", params - 1), "greedy", "sublayers", heal)
    target = Target(model, request.goal)
    search_layers(model, target, request, text, progress=False)
    said = work_of_search(L, target, request, text, features=32, more=more)
    # Backward passes are not run by hooks, and penalties are not all tried.
    backward = 2 * CALIBRATION.num_tokens if method == "taylor" else 0
    assert 0.7 < said.layers / (run["layers"] + backward * L) < 1.5
    assert 0.7 < said.head / (run["head"] + backward) < 1.6


def test_the_head_is_timed_with_its_loss_in_the_parts_that_are_run(monkeypatch):
    model = tiny.model(num_hidden_layers=2, vocab_size=300)
    ran, lost = [], []
    model.lm_head.register_forward_hook(lambda _, __, logits: ran.append(logits[..., 0].numel()))
    whole = cost.token_losses
    monkeypatch.setattr(cost, "token_losses", lambda *given: lost.append(len(given[0])) or whole(*given))
    monkeypatch.setattr(split_model, "_MAX_LOGITS", 6 * 300)
    cost._unit_times(model, CALIBRATION.batches[0], 48)
    # The first 16 tokens, 15 of them followed by another; twice, as the first run is slower.
    assert ran == lost == [6, 6, 3] * 2


def test_memory_and_words(caplog, monkeypatch):
    model = tiny.model(num_hidden_layers=L)
    request, text = Request(("num_layers", 3), "greedy"), Text(CALIBRATION, JUDGED)
    target = Target(model, request.goal)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    # Timed once, so that the two differ by their work alone.
    times = cost._unit_times(model, CALIBRATION.batches[0], 48)
    monkeypatch.setattr(cost, "_unit_times", lambda *_: times)
    plain = estimate_cost(model, target, request, text)
    assert (plain.device_bytes, plain.state_bytes) == (weights, 0)
    healed = estimate_cost(model, target, replace(request, heal="refit"), text)
    # Two matrices of (I, I) and three of (I, D) in float64; I = 48, D = 32. States at both ends of a cut, and pruned.
    assert healed.device_bytes == weights + 8 * (2 * 48**2 + 3 * 48 * 32)
    assert healed.state_bytes == 3 * CALIBRATION.num_tokens * 32 * 4
    assert 0 < plain.seconds < healed.seconds < 60
    # 256 tokens: states and activations, and logits three times, in float32. I = 48, D = 32.
    assert plain.batch_bytes == healed.batch_bytes == 4 * 256 * (8 * 32 + 4 * 48 + 3 * tiny.VOCAB)
    shown = "; 2.0 GiB for the model and the fits, 1.0 GiB for states of the residual stream, 512.0 MiB for a batch"
    for seconds, words in ((12, "about 12 s"), (100, "about 2 min"), (7200, "about 2.0 h")):
        assert str(Cost(seconds, 2 * 2**30, 2**30, 2**29)) == words + shown
    with caplog.at_level(logging.INFO, logger="hf_lnscale"):
        plan_pruning(model, DATA, num_layers=1, method="greedy", progress=False)
        plan_pruning(model, DATA, max_perplexity_increase=0.5, heal="linear", method="angular", progress=False)
        plan_pruning(model, DATA, target_params=weights // 4 - 1, units="sublayers", progress=False)
    assert caplog.messages[0].startswith("choosing layers: about ")
    assert caplog.messages[1].startswith("choosing layers and healing for each number of layers tried: about ")
    assert caplog.messages[-1].startswith("choosing layers for each layer, attention or MLP dropped: about ")
