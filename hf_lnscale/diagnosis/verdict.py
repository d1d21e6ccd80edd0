"""The verdict: how the residual stream grows, which layers do little, and how many could be dropped.

Every sentence gives its numbers, and all thresholds are defined here. There are no sentences about what was not
measured.
"""

from __future__ import annotations

import math
from itertools import groupby
from statistics import median
from typing import Any

from ..core.display import number, with_error
from ..measuring.uncertainty import ends_early, too_little

# A model shows a sign of the curse of depth if ...
GROWTH = 10.0  # ... the stream of a typical token grows this much from the first layer to the last,
SHARE = 0.5  # ... the deeper half of the layers has less than this fraction of the other half's measure.
# A layer does almost nothing if perplexity rises by less than this without it.
IDLE = 0.01
BUDGETS = (0.05, 0.10)
# Signs that compare the two halves of the layers: the measure, its minimum in the first half (if neither half adds
# anything, as in an untrained model, the difference is noise), the sentence, and the name in `compare`.
_HALVES = {
    "near_identity": (
        "jacobian_distance",
        0.0,
        "Distance of a layer's Jacobian from the identity: median {} in the deeper half of the layers, {} in the "
        "other half.",
        "distance of the Jacobian from the identity",
    ),
    "deep_layers_worth_little": (
        "loss_added",
        math.log1p(IDLE),
        "Loss added by removing a layer: median {} nats in the deeper half, {} in the other half.",
        "loss added by removing a layer, nats",
    ),
}
# Massive activations: a few tokens make the variance this much larger than a typical token's.
MASSIVE = 3.0


def growth(residual: list[dict[str, Any]]) -> dict[str, Any]:
    """Growth of a typical token's mean square, from after the first layer to after the last."""
    values = [place["typical"] for place in residual[1:]]
    found: dict[str, Any] = {"first": values[0], "last": values[-1], "factor": values[-1] / values[0]}
    found["factor_error"] = residual[-1].get("growth_error")
    window = max(1, round(len(values) / 4))
    if len(values) > window:
        at = max(range(len(values) - window), key=lambda i: values[i + window] / values[i])
        found["fastest"] = {"layers": [at + 1, at + window], "factor": values[at + window] / values[at]}
    return found


def massive(residual: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The first layer after which a few tokens dominate the variance, and by how much; None if there is none."""
    for place in residual[1:]:
        if place["variance"] > MASSIVE * place["typical"]:
            return {
                "layer": place["place"] - 1,
                "factor": place["variance"] / place["typical"],
                "factor_without_first": place["variance_without_first"] / place["typical"],
                "channel": place["largest_channel"],
            }
    return None


def judge(
    residual: list[dict[str, Any]],
    layers: list[dict[str, Any]],
    baseline: dict[str, Any] | None,
    cuts: list[dict[str, Any]] | None,
    data: dict[str, Any] | None = None,
    num_tokens: int | None = None,
) -> dict[str, Any]:
    """The verdict on the parts of a diagnosis: numbers, and sentences that state them.

    `data` is the description of the text (None skips the check for enough text), and `num_tokens` the number of tokens
    requested, if known.
    """
    grown, spikes = growth(residual), massive(residual)
    signs = {
        "growth": {"present": grown["factor"] >= GROWTH, "value": grown["factor"], "threshold": GROWTH},
        **{sign: _halves(layers, field, least) for sign, (field, least, _, _) in _HALVES.items()},
    }
    idle = inside = None
    known: list[dict[str, Any]] = []
    if baseline:
        known = [one for one in layers if one["loss_added"] is not None]
        idle = [one["layer"] for one in known if one["loss_added"] < math.log1p(IDLE)]
        inside = {f"{budget:.0%}": _inside(cuts or [], baseline["perplexity"], budget) for budget in BUDGETS}
    measured = [sign for sign in signs.values() if sign]
    count = sum(sign["present"] for sign in measured)
    few = too_little(data["num_tokens"], data["num_sequences"]) if data else None
    ends = ends_early(data["num_tokens"], num_tokens, data["seq_len"]) if data else None
    headline = f"{count} of {len(measured)} signs of the curse of depth"
    return {
        "headline": "too little text to count signs of the curse of depth" if few else headline,
        "sufficient": few is None,
        "cautions": [caution for caution in (few, ends) if caution],
        "growth": grown,
        "massive_activations": spikes,
        "signs": signs,
        "idle_layers": idle,
        "removable": inside,
        "sentences": [
            _on_growth(grown),
            *_on_massive(spikes),
            *(
                text.format(*(shown(found, half) for half in ("deeper_half", "first_half")))
                for sign, (_, _, text, _) in _HALVES.items()
                if (found := signs[sign])
            ),
            *(_on_layers(idle or [], known, baseline) if baseline and known else ()),
            *(_on_cuts(inside) if inside else ()),
        ],
    }


def _halves(layers: list[dict[str, Any]], name: str, least: float) -> dict[str, Any] | None:
    """Compares medians over the two halves of the layers, since the first and last layers differ in most models."""
    values = [one[name] for one in layers]
    if len(values) < 2 or any(value is None for value in values):
        return None
    middle = len(values) // 2
    first, deep = median(values[:middle]), median(values[middle:])
    present = first > least and deep < SHARE * first
    found = {"present": present, "first_half": first, "deeper_half": deep, "threshold": SHARE}
    errors: list[Any] = [one.get(f"{name}_error") for one in layers]
    if None not in errors:
        # That of the layers, which another text moves together: of a median no smaller.
        found |= {"first_half_error": median(errors[:middle]), "deeper_half_error": median(errors[middle:])}
    return found


def shown(found: dict[str, Any], name: str) -> str:
    """A value as text, with its standard error if it has one."""
    return with_error(found[name], found.get(f"{name}_error"))


def _inside(cuts: list[dict[str, Any]], perplexity: float, budget: float) -> dict[str, Any]:
    fitting = [cut for cut in cuts if cut["perplexity"] <= perplexity * (1 + budget)]
    best: dict[str, Any] = fitting[-1] if fitting else {"layers": [], "perplexity": perplexity}
    return {
        "count": len(best["layers"]),
        "layers": sorted(best["layers"]),
        "perplexity": best["perplexity"],
        "increase": best["perplexity"] / perplexity - 1,
        "increase_error": best.get("increase_error"),
    }


def _on_growth(grown: dict[str, Any]) -> str:
    factor = grown["factor"]
    text = (
        f"A typical token's mean square goes from {number(grown['first'])} after the first layer to "
        f"{number(grown['last'])} after the last, {times(factor)} as much"
    )
    if error := grown.get("factor_error"):
        text += f" (standard error {number(error)})"
    if factor > 1.5 and "fastest" in grown:
        first, last = grown["fastest"]["layers"]
        text += f"; fastest in layers {first} to {last}"
    return text + "."


def _on_massive(spikes: dict[str, Any] | None) -> list[str]:
    if not spikes:
        return []
    text = (
        f"A few tokens carry massive activations, from layer {spikes['layer']} on: with them, the variance after it "
        f"is {times(spikes['factor'])} that of a typical token"
    )
    if spikes["factor_without_first"] < MASSIVE:
        text += ", and all of that is the first token of each sequence"
    elif spikes["factor_without_first"] < spikes["factor"] / 2:
        text += f"; {times(spikes['factor_without_first'])} without the first token of each sequence"
    return [text + ". These are single measurements. This is not growth of the stream."]


def _on_layers(idle: list[int], layers: list[dict[str, Any]], baseline: dict[str, Any]) -> list[str]:
    if idle:
        does, it = ("does", "it") if len(idle) == 1 else ("do", "them")
        largest = max(one.get("loss_added_error") or 0.0 for one in layers if one["layer"] in idle)
        errors = f" (standard errors up to {100 * largest:.1f} %)" if largest else ""
        return [
            f"{_layers(idle).capitalize()} {does} almost nothing: without {it}, one at a time, perplexity rises by "
            f"less than {100 * IDLE:.0f} %{errors}."
        ]
    least = min(layers, key=lambda one: float(one["loss_added"]))
    rise = f"{100 * math.expm1(least['loss_added']):+.1f} %"
    if error := least.get("loss_added_error"):  # delta method: d exp(x) = exp(x) dx
        rise += f", standard error {100 * math.exp(least['loss_added']) * error:.1f}"
    return [
        f"No layer does almost nothing: the least important is layer {least['layer']}, without which perplexity rises "
        f"from {number(baseline['perplexity'])} to {number(least['perplexity_without'])} ({rise})."
    ]


def _on_cuts(inside: dict[str, Any]) -> list[str]:
    five, ten = (inside[f"{budget:.0%}"] for budget in BUDGETS)
    same = five["count"] == ten["count"]
    text = f"Within {'5 % or 10 %' if same else '5 %'} of perplexity {_could_go(five)}"
    if not same:
        text += f", within 10 % {_could_go(ten)}"
    return [
        f"{text}. Layers are removed together, in the order of their individual cost, without healing; hf-lnscale "
        "prune searches and heals."
    ]


def _could_go(part: dict[str, Any]) -> str:
    if not part["count"]:
        return "no layer could be dropped"
    shown = f"perplexity {number(part['perplexity'])}, {100 * part['increase']:+.1f} %"
    if error := part["increase_error"]:
        shown += f", standard error {100 * error:.1f}"
    return f"{_layers(part['layers'])} could be dropped ({shown})"


def _layers(layers: list[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers ({ranges(layers)})"


def ranges(layers: list[int]) -> str:
    """Formats sorted numbers: [1, 2, 3, 7] becomes "1-3, 7"."""
    # Consecutive numbers have the same difference from their index.
    runs = [[layer for _, layer in run] for _, run in groupby(enumerate(layers), lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def times(factor: float) -> str:
    """Formats a factor: "2.50 times"."""
    return f"{number(factor) if factor >= 10 else format(factor, '.2f')} times"


def compare(before: Any, after: Any) -> list[tuple[str, str, str]]:
    """Rows that compare two diagnoses: name, value in the first, value in the second."""
    first, second = _figures(before), _figures(after)
    shown = [name for name in first if first[name] or second[name]]
    return [(name, first[name] or "not measured", second[name] or "not measured") for name in shown]


def _figures(one: Any) -> dict[str, str | None]:
    """The values of a diagnosis to compare, as text; None if not measured."""
    judged, base, grown = one.verdict, one.baseline, one.verdict["growth"]
    found: dict[str, str | None] = {
        "layers": str(one.model["num_layers"]),
        "perplexity": shown(base, "perplexity") if base else None,
        "growth of a typical token, first to last layer, times": shown(grown, "factor"),
    }
    for half in ("first_half", "deeper_half"):
        for sign, (_, _, _, name) in _HALVES.items():
            values = judged["signs"][sign]
            found[f"{name}, median of the {half.replace('_', ' ')}"] = shown(values, half) if values else None
    idle, removable = judged["idle_layers"], judged["removable"]
    found["layers that do almost nothing"] = None if idle is None else str(len(idle))
    for budget in BUDGETS:
        name = f"layers that could be dropped within {100 * budget:.0f} % of perplexity"
        found[name] = str(removable[f"{budget:.0%}"]["count"]) if removable else None
    return found
