"""The thresholds of the verdict, each at its boundary."""

import math

import pytest

from hf_lnscale.diagnosis import verdict


def places(typical, variance=None, without_first=None):
    """Entries of `residual` with the embedding before them."""
    rows = zip(typical, variance or typical, without_first or typical, strict=True)
    found = [
        {"place": i, "typical": t, "variance": v, "variance_without_first": w, "largest_channel": 3}
        for i, (t, v, w) in enumerate(rows, start=1)
    ]
    return [found[0] | {"place": 0}, *found]


def layers_of(jacobian, added):
    return [
        {"layer": i, "jacobian_distance": j, "loss_added": a, "perplexity_without": 10 * math.exp(a)}
        for i, (j, a) in enumerate(zip(jacobian, added, strict=True))
    ]


BASELINE = {"loss": math.log(10), "perplexity": 10.0}


def judged(jacobian=(1, 1, 1, 1), added=(1, 1, 1, 1), cuts=(), typical=(1.0, 1.0, 1.0, 1.0), **changes):
    return verdict.judge(places(typical, **changes), layers_of(jacobian, added), BASELINE, list(cuts))


@pytest.mark.parametrize(("last", "present"), [(9.99, False), (10.0, True)])
def test_growth(last, present):
    sign = judged(typical=[1.0, 2.0, 3.0, last])["signs"]["growth"]
    assert sign == {"present": present, "value": last, "threshold": 10.0}


@pytest.mark.parametrize(("deep", "present"), [(0.5, False), (0.499, True), (0.7, False)])
def test_the_deeper_half_against_the_other(deep, present):
    found = judged([1, 1, deep, deep], [1, 1, deep, deep])["signs"]
    for name in ("near_identity", "deep_layers_worth_little"):
        assert found[name] == {"present": present, "first_half": 1, "deeper_half": deep, "threshold": 0.5}


@pytest.mark.parametrize(("first", "present"), [(math.log(1.0099), False), (math.log(1.0101), True)])
def test_halves_below_one_percent_of_perplexity_are_noise(first, present):
    assert judged(added=[first, first, 0, 0])["signs"]["deep_layers_worth_little"]["present"] == present


def test_medians_of_an_odd_number_of_layers():
    sign = verdict.judge(places([1.0] * 5), layers_of([9, 1, 0.1, 0.2, 5], [1] * 5), BASELINE, [])["signs"]
    assert sign["near_identity"]["first_half"] == 5
    assert sign["near_identity"]["deeper_half"] == 0.2


@pytest.mark.parametrize(("added", "idle"), [(math.log(1.0099), [2]), (math.log(1.0101), [])])
def test_a_layer_does_almost_nothing_below_one_percent(added, idle):
    found = judged(added=[1, 1, added, 1])
    assert found["idle_layers"] == idle
    assert ("Layer 2 does almost nothing: without it" in " ".join(found["sentences"])) == bool(idle)


@pytest.mark.parametrize(("variance", "layer"), [(3.0, None), (3.01, 2), (5.9, 2)])
def test_massive_activations(variance, layer):
    found = judged(variance=[1.0, 1.0, variance, 1.0])["massive_activations"]
    assert (found and found["layer"]) == layer
    if found:
        assert (found["factor"], found["channel"]) == (variance, 3)


@pytest.mark.parametrize(
    ("without_first", "text"),
    [
        (2.99, "all of that is the first token"),
        (3.0, "3.00 times without the first"),
        (4.99, "4.99 times"),
        (5.0, None),
    ],
)
def test_whose_activations_are_massive(without_first, text):
    variances = {"variance": [1.0, 1.0, 10.0, 1.0], "without_first": [1.0, 1.0, without_first, 1.0]}
    sentence = next(one for one in judged(**variances)["sentences"] if "massive" in one)
    assert "from layer 2 on" in sentence
    assert (text in sentence) if text else "first token" not in sentence


@pytest.mark.parametrize(("perplexity", "counts"), [(10.5, (1, 1)), (10.51, (0, 1)), (11.0, (0, 1)), (11.01, (0, 0))])
def test_budgets(perplexity, counts):
    found = judged(cuts=[{"layers": [2], "perplexity": perplexity}])["removable"]
    assert tuple(found[budget]["count"] for budget in ("5%", "10%")) == counts


DATA = {"num_tokens": 2048, "num_sequences": 4, "seq_len": 512, "source": "text.txt"}


@pytest.mark.parametrize(
    ("changes", "sufficient"),
    [
        ({}, True),
        ({"num_tokens": 2047}, False),
        ({"num_sequences": 3}, False),
        ({"num_tokens": 4, "num_sequences": 1, "seq_len": 4}, False),
    ],
)
def test_a_verdict_takes_some_text(changes, sufficient):
    data = DATA | changes
    found = verdict.judge(places([1.0] * 4), layers_of([1] * 4, [1] * 4), BASELINE, [], data)
    assert found["sufficient"] == sufficient
    if sufficient:
        assert found["cautions"] == []
        assert found["headline"] == "0 of 3 signs of the curse of depth"
    else:
        assert "too little text" in found["headline"]
        (caution,) = found["cautions"]
        assert f"{data['num_tokens']:,} tokens in {data['num_sequences']} sequence" in caution
        assert "which takes 2,048 tokens in 4 sequences" in caution


@pytest.mark.parametrize(("wanted", "short"), [(None, False), (2048, False), (2559, False), (2560, True)])
def test_a_text_that_ends_early(wanted, short):
    """A remainder that fills no window of 512 is left out of any text."""
    found = verdict.judge(places([1.0] * 4), layers_of([1] * 4, [1] * 4), BASELINE, [], DATA, wanted)
    assert found["cautions"] == (["The text has only 2,048 of the 2,560 tokens requested."] if short else [])


def test_the_rise_has_its_standard_error():
    layers = layers_of([1] * 4, [1, 0.5, 0.2, 1])
    layers[2]["loss_added_error"] = 0.01
    text = " ".join(verdict.judge(places([1.0] * 4), layers, BASELINE, [])["sentences"])
    assert "layer 2, without which perplexity rises from 10.0 to 12.2 (+22.1 %, standard error 1.2)" in text


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (None, None, "-"),
        (0.26711, None, "0.267"),
        (0.26711, 0.01234, "0.267 ± 0.012"),
        (19.83, 0.6, "19.83 ± 0.60"),
        (1234.5, 56.7, "1,234 ± 57"),
        (0.2, 0.0996, "0.200 ± 0.100"),
        (3e-13, 1e-12, "3.0e-13 ± 1.0e-12"),
        (1.2e9, 3e7, "1.2e+09 ± 3.0e+07"),
    ],
)
def test_a_number_with_its_error(value, error, text):
    assert verdict.with_error(value, error) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.000999, "1.0e-03"),
        (0.001, "0.00100"),
        (999.4, "999"),
        (999.6, "1,000"),
        (1e7, "1.0e+07"),
        (12, "12.0"),
    ],
)
def test_numbers(value, text):
    assert verdict.number(value) == text
