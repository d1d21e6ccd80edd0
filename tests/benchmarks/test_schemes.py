"""benchmarks/schemes.py: each scheme against its paper's formula, and a queue that trains no model twice."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import get_scheduler
from typer.testing import CliRunner

import oracles
import tiny

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import scheme_models
import schemes

LAYERS = 8  # Mix-LN: two of them Post-LN
CONFIG = tiny.config(num_hidden_layers=LAYERS, attn_implementation="eager")


def built(scheme, randomized=True):
    """A model of a scheme with random weights in its norms and gains too, in float64."""
    model = scheme_models.build(scheme, CONFIG, seed=0).eval()
    if randomized:
        tiny.randomize_norms(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "gains" in name:
                    parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    return model.double()


def formula(scheme, weights):
    """The stream behind a sub-layer by each paper's formula; f the sub-layer, n its norm, i the layer from 0."""

    def gain(i, k):
        return weights[f"model.layers.{i}.gains.{k}"]

    def second(i, k, x):
        return oracles.rms_norm(x, weights[f"model.layers.{i}.output_norms.{k}.weight"], CONFIG.rms_norm_eps)

    return {
        "lns": lambda x, f, n, i, k: x + f(n(x) / math.sqrt(i + 1)),
        "lns_scaled_init": lambda x, f, n, i, k: x + f(n(x) / math.sqrt(i + 1)),
        "post_ln": lambda x, f, n, i, k: n(x + f(x)),
        "deepnorm": lambda x, f, n, i, k: n(2.0 * x + f(x)),  # (2 * 8) ** 0.25
        "mix_ln": lambda x, f, n, i, k: n(x + f(x)) if i < 2 else x + f(n(x)),
        "sandwich": lambda x, f, n, i, k: x + second(i, k, f(n(x))),
        "layerscale": lambda x, f, n, i, k: x + gain(i, k) * f(n(x)),
        "skipinit": lambda x, f, n, i, k: x + gain(i, k) * f(n(x)),
        "residual_scaling": lambda x, f, n, i, k: x + f(n(x)) / 4,  # sqrt(2 * 8)
    }.get(scheme, lambda x, f, n, i, k: x + f(n(x)))


@pytest.mark.parametrize("scheme", scheme_models.SCHEMES)
def test_a_scheme_computes_its_papers_formula(scheme):
    model = built(scheme)
    weights, config = model.state_dict(), json.loads(CONFIG.to_json_string())
    with torch.no_grad():
        logits = model(tiny.tokens()).logits
    torch.testing.assert_close(
        logits, oracles.llama(weights, config, tiny.tokens(), formula(scheme, weights)), rtol=1e-5, atol=1e-6
    )


def test_prores_warms_deeper_layers_up_later():
    """a(l, t) = min(t / (T l), 1), T 1 % of the steps: layer 3 is half way at 1.5 %, and all are there at 8 %."""
    model = built("prores")
    weights, config = model.state_dict(), json.loads(CONFIG.to_json_string())
    # fmt: off
    for progress, alphas in [
        (0.0, [0.0] * 8), (0.015, [1, 3/4, 1/2, 3/8, 3/10, 1/4, 3/14, 3/16]), (0.08, [1.0] * 8), (1.0, [1.0] * 8),
    ]:
        # fmt: on
        scheme_models.set_progress(model, progress)
        with torch.no_grad():
            logits = model(tiny.tokens()).logits
        expected = oracles.llama(
            weights, config, tiny.tokens(), lambda x, f, n, i, k, alphas=alphas: x + alphas[i] * f(n(x))
        )
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheme", [name for name in scheme_models.SCHEMES if name != "deepnorm"])
def test_all_start_from_the_same_draws_but_for_their_factor(scheme):
    found = dict(built(scheme, randomized=False).named_parameters())
    for name, drawn in built("pre_ln", randomized=False).named_parameters():
        factor = 1.0
        if scheme == "depth_scaled_init" and name.endswith("_proj.weight"):
            factor = 1 / math.sqrt(int(name.split(".")[2]) + 1)
        if scheme in ("scaled_init", "lns_scaled_init") and ("o_proj" in name or "down_proj" in name):
            factor = 1 / math.sqrt(2 * LAYERS)
        torch.testing.assert_close(found[name], drawn * factor, rtol=1e-6, atol=0)


def test_deepnorm_draws_by_xavier_with_its_gain():
    config = tiny.config(num_hidden_layers=2, hidden_size=128, intermediate_size=256, num_key_value_heads=4)
    gain = 16**-0.25  # (8 * 2)
    for name, weight in scheme_models.build("deepnorm", config, seed=0).model.layers.named_parameters():
        if "norm" not in name:
            inner = 1.0 if any(one in name for one in ("q_proj", "k_proj", "gate_proj")) else gain
            assert weight.std().item() == pytest.approx(inner * math.sqrt(2 / sum(weight.shape)), rel=0.03), name


@pytest.mark.parametrize(("layers", "first"), [(18, 0.1), (24, 1e-5), (25, 1e-6)])
def test_gains_start_at_their_papers_values(layers, first):
    config = tiny.config(num_hidden_layers=layers)
    for layer in scheme_models.build("layerscale", config, seed=0).model.layers:
        assert [gain.tolist() for gain in layer.gains] == [pytest.approx([first] * config.hidden_size)] * 2
    for layer in scheme_models.build("skipinit", config, seed=0).model.layers:
        assert [gain.item() for gain in layer.gains] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("setting", "name", "kwargs"),
    [
        ("paper", "cosine_with_min_lr", {"min_lr_rate": 0.1}),
        ("modern", "warmup_stable_decay", {"num_decay_steps": 2000, "decay_type": "linear"}),
    ],
)
def test_learning_rates_are_those_of_transformers_schedules(setting, name, kwargs):
    steps, chosen = 10_000, schemes.SETTINGS[setting]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = get_scheduler(name, optimizer, round(steps * chosen.warmup), steps, scheduler_specific_kwargs=kwargs)
    for step in range(steps):
        if step % 99 == 0:
            assert chosen.rate(step / steps) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-3)
        optimizer.step()
        scheduler.step()


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Two schemes beside the two, runs of a second, and a text that they can learn."""
    size = schemes.Size(16, 24, 2, 4, 300, 64, 32, 4, (1e-3, 1e-2))
    monkeypatch.setitem(schemes.SIZES, "small", size)
    few = {name: scheme_models.SCHEMES[name] for name in ("pre_ln", "lns", "post_ln", "prores")}
    monkeypatch.setattr(schemes, "SCHEMES", few)
    for name, setting in schemes.SETTINGS.items():
        monkeypatch.setitem(schemes.SETTINGS, name, setting._replace(length=8 if name == "paper" else 32))
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The {i} of {i * i} is {i % 7}, and the rest of it is {i % 3}." for i in range(200)))
    return ["--data", str(text), "--out", str(tmp_path / "out.jsonl")], tmp_path / "out.jsonl"


def run(*words):
    app = schemes.typer.Typer()
    app.command()(schemes.main)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_the_queue_goes_on_where_it_was_and_repeats_nothing(small, monkeypatch):
    words, out = small
    words += ["--part", "settings"]
    whole = run(*words)
    lines = out.read_text().splitlines()
    assert len({json.dumps(json.loads(line)["run"]) for line in lines}) == len(lines) == 16
    assert ["without" in json.loads(line)["found"] for line in lines].count(True) == 8  # of the seed that is looked at
    # Interrupted: the runs that are missing, and only these, are trained again, to the same figures.
    out.write_text("\n".join(lines[:12]) + "\n")
    again = run(*words)
    assert again.count(" s\n") == 4
    tables = whole[whole.index("Llama of 4 layers") :]
    assert again.endswith(tables)
    # Finished: nothing is trained.
    monkeypatch.setattr(schemes, "train", None)
    assert run(*words).endswith(tables)
    assert run(*words, "--only-tables").endswith(tables)


def test_the_parts_of_the_queue(small):
    queue = schemes.Queue("small", "text", {})
    found = {name: [] for name in schemes.PARTS}
    for name in schemes.PARTS:
        for one in (one for stage in queue.part(name) for one in stage):
            found[name] += [one] * (one not in queue.records)
            # Deeper is better, post_ln the best, the second rate better than the first.
            queue.records[one] = {"loss": 9 - one.layers - (one.scheme == "post_ln") - (one.rate == 1e-2)}
    # 2 settings x 2 schemes x (2 rates + 2 seeds); 3 seeds of one layer; 2 schemes x (2 + 2); 2 x 3 seeds; two depths.
    assert [len(runs) for runs in found.values()] == [16, 12, 8, 6, 24, 8]
    assert len(set(queue.records)) == 74
    assert {one.rate for one in [*found["shallow"], *found["decay"], *found["depth"]]} == {1e-2}
    assert {one.layers for one in [*found["shallow"], *found["depth"]]} == {1, 8, 16}
    assert {(one.setting, one.scheme) for one in found["promising"]} == {("modern", "post_ln"), ("modern", "prores")}
    assert list(schemes.tables(queue))  # without what `look` finds, too


def test_the_best_rate_and_the_most_promising_are_those_of_lowest_loss():
    records = {}
    queue = schemes.Queue("small", "text", records)
    losses = {"pre_ln": (3.0, 2.0, 4.0), "post_ln": (5, 5, 5), "prores": (2.5, 9, math.inf), "skipinit": (9, 9, 2.6)}
    for scheme, found in losses.items():
        for rate, loss in zip(schemes.SIZES["small"].rates, found, strict=True):
            records[queue.run("paper", scheme, rate)] = {"loss": loss}
    assert queue.best("paper", "pre_ln") == schemes.SIZES["small"].rates[1]
    assert queue.promising() == ["prores", "skipinit"]
    assert [one.rate for one in queue.repeat(("paper",), ["skipinit"])] == [schemes.SIZES["small"].rates[2]] * 2


@pytest.mark.slow
def test_runs_at_once_find_what_runs_in_turn_find(tmp_path):
    for number in range(24):
        (tmp_path / f"{number}.py").write_text(f"# {number}\n" + "".join(f"x{i} = {i * number}\n" for i in range(400)))
    text = schemes.read_text([tmp_path], schemes.SIZES["small"].vocabulary)
    queue = schemes.Queue("small", text.name, {})
    runs = [dataclasses.replace(queue.run("paper", "sandwich", 1e-3, seed), layers=2, steps=4) for seed in (0, 1, 2)]
    found = [{run: one["quarters"] for run, one in schemes.trained(runs, text, jobs)} for jobs in (1, 2)]
    assert found[0] == found[1]
    assert len({tuple(losses) for losses in found[0].values()}) == 3


def test_a_diverged_run_is_recorded_as_infinite(small, monkeypatch):
    text = schemes.read_text([Path(small[0][1])], 300)
    found = schemes.train(schemes.Run("small", "paper", "pre_ln", 2, 1e30, 0, 4, text.name), text)
    assert found["loss"] == math.inf
    assert "without" not in found


def test_held_out_documents_are_not_trained_on(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"document {i:02}" for i in range(48)))
    text = schemes.read_text([path], 300)

    def documents(ids):
        """The tokens between one end of text and the next."""
        words = " ".join(map(str, ids.tolist())).split(f" {ids[-1]}")
        assert not words.pop()
        return {word.strip() for word in words}

    train, held_out = documents(text.train), documents(text.held_out)
    assert (len(train), len(held_out), len(train | held_out)) == (44, 4, 48)
