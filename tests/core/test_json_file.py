"""JSON of ours, as readers other than Python's take it."""

import json
import math

import pytest
import torch

from hf_lnscale.core.json_file import number_of, to_json
from hf_lnscale.pruning.plan import PruningPlan
from hf_lnscale.pruning.scores import LayerScores


def strictly(text):
    def refuse(word):
        raise ValueError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_what_is_not_finite_is_a_string():
    value = {"a": [1.5, math.inf, (-math.inf, {"b": math.nan})], "c": "NaN", "d": None}
    assert strictly(to_json(value)) == {"a": [1.5, "Infinity", ["-Infinity", {"b": "NaN"}]], "c": "NaN", "d": None}
    assert number_of("-Infinity") == -math.inf
    assert math.isnan(number_of("NaN"))
    assert number_of("inf") == "inf"
    assert number_of([1]) == [1]


@pytest.mark.parametrize("figure", [math.inf, math.nan])
def test_the_figures_of_a_broken_model_are_saved_and_read(figure, tmp_path):
    figures = {"before": 2.0, "after": figure}
    path = PruningPlan((1,), {}, perplexity=figures, errors={"after": figure}).save(tmp_path / "plan.json")
    strictly(path.read_text())
    read = PruningPlan.load(path)
    assert str(read.perplexity) == str(figures)
    assert str(read.errors) == str({"after": figure})
    LayerScores("perplexity", torch.tensor([1.0, figure]), baseline=figure).save(tmp_path / "scores.json")
    strictly((tmp_path / "scores.json").read_text())
    scores = LayerScores.load(tmp_path / "scores.json")
    assert str(scores.scores.tolist()) == str([1.0, figure])
    assert str(scores.baseline) == str(figure)
