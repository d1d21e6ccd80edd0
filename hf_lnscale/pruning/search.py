"""Searches for layers to drop, by number, budget or size, and evaluates the result on held-out text."""

from __future__ import annotations

import functools
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..checkpoints.folders import public_name, write_atomically
from ..core.display import brief, with_error
from ..core.errors import ArgumentError, require_integers
from ..core.json_file import are_layers, is_positive, read_object
from ..core.record import SUBLAYERS
from ..core.stack import Stack, text_stack
from ..core.sublayers import Unit, parts
from ..measuring.known_text import sketch
from ..measuring.losses import SourceLosses, layer_of, losses_by_source, perplexity_of, sweep, token_losses
from ..measuring.split_model import SplitModel, pick_tokens, predictions
from ..measuring.stream import capture_residual_stream, eval_mode, kv_cache
from ..measuring.text import TokenBatches
from .cut import counting_layers, droppable_units, normalize_layers
from .heal import Healer, HealReport
from .plan import PruningPlan, by_kind, fingerprint, units_of
from .scores import LayerScores, score_layers, score_stream

ONE_SHOT = ("block_influence", "taylor", "perplexity", "kl")
STEPWISE = ("greedy", "greedy_healed")
SEARCH_METHODS = ("best_of", *ONE_SHOT, "angular", *STEPWISE)

# "best_of": number of blocks proposed, number of proposals healed, and their largest perplexity relative to the lowest.
BLOCKS = 8
HEALED = 6
_APART = 1.5
# How many larger numbers of layers to try after one that exceeds the budget.
_LOOK_FURTHER = 2
_MET = "is already met by the unchanged model. Nothing was written."


# --- how far to go --------------------------------------------------------------------------------------------------


def one_goal(**given: Any) -> tuple[str, Any]:
    """The name and value of the one argument that sets the target.

    Raises:
        ArgumentError: if none or several are given, or the value is not a positive number (`drop` and the range of
            `num_layers` are not checked).
    """
    found = {name: value for name, value in given.items() if value is not None}
    if len(found) != 1:
        shown = ", ".join(f"`{name}`={value!r}" for name, value in found.items()) or "none"
        names = [f"`{name}`" for name in given]
        problem = f"exactly one of {', '.join(names[:-1])} and {names[-1]} must be given, got {shown}"
        raise ArgumentError(next(iter(found or given)), problem=problem)
    name, value = next(iter(found.items()))
    value = value.item() if hasattr(value, "item") and name != "drop" else value  # a NumPy scalar
    # The range of `num_layers` depends on the model; see `require_possible`.
    free = name == "drop" or (name == "num_layers" and isinstance(value, int) and not isinstance(value, bool))
    if not free and (isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf):
        raise ArgumentError(name, value, "a positive number")
    return name, value


def require_possible(goal: tuple[str, Any], num_layers: int) -> None:
    """Refuses to drop layers that a model with `num_layers` layers does not have, or all of them."""
    name, value = goal
    if num_layers < 2:
        raise ArgumentError("model", problem="it has only one layer, which cannot be dropped")
    if name == "num_layers" and (not isinstance(value, int) or not 1 <= value < num_layers):
        raise ArgumentError(name, value, f"an integer from 1 to {num_layers - 1} for this model")
    if name == "drop":
        normalize_layers(value, num_layers, name)


@dataclass(frozen=True)
class Target:
    """The target of a search.

    Attributes:
        words: the goal, as stored in a plan.
        reached: whether dropping a set of units (layers, attention or MLPs) is enough.
        sizes: what is left without a set of units: parameters, bytes of weights and bytes of the KV cache.
        saves: what dropping a unit saves after others were dropped (for a layer without MLP, only its attention): bytes
            of weights and KV cache if there is a cache, otherwise parameters.
        least: the smallest number of layers that can be enough.
        budget: largest relative increase in perplexity, or None.
    """

    words: dict[str, Any]
    reached: Callable[[Sequence[Unit]], bool]
    sizes: Callable[[Sequence[Unit]], dict[str, Any]]
    saves: Callable[[Unit, Sequence[Unit]], float]
    least: int = 1
    budget: float | None = None


def search_target(model: nn.Module, goal: tuple[str, Any], cache_tokens: int = 0, cache_batch: int = 1) -> Target:
    """Creates the target for a goal and a model.

    Raises:
        ArgumentError: if the model cannot reach the goal.
    """
    name, value = goal
    require_integers(0, cache_tokens=cache_tokens)
    require_integers(1, cache_batch=cache_batch)
    stack = text_stack(model)
    total = len(stack.layers)
    most = total - 1
    require_possible(goal, total)
    params = sum(p.numel() for p in model.parameters())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    cache_L, counter_L = cache_bytes(stack, cache_tokens, cache_batch) if cache_tokens else ([0] * total,) * 2

    @functools.cache
    def size_of(unit: Unit) -> tuple[int, int, int]:
        layer = layer_of(unit)
        whole = stack.layers[layer]
        modules = parts(whole, stack.family, unit[0]) if isinstance(unit, tuple) else [whole]
        parameters = [p for module in modules for p in module.parameters()]
        cache = 0 if unit == ("mlp", layer) else cache_L[layer]
        if unit == ("attention", layer):  # the tokens are still counted
            cache -= counter_L[layer]
        return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters), cache

    def sizes(dropped: Sequence[Unit]) -> dict[str, Any]:
        saved = [sum(column) for column in zip((0, 0, 0), *map(size_of, dropped), strict=True)]
        return {
            "params": [params, params - saved[0]],
            "weight_bytes": [weights, weights - saved[1]],
            "cache_bytes": [sum(cache_L), sum(cache_L) - saved[2]],
            "cache_of": {"tokens": cache_tokens, "batch": cache_batch},
        }

    def size(dropped: Sequence[Unit]) -> float:
        after: dict[str, list[int]] = sizes(dropped)
        return after["params"][1] if name == "target_params" else after["weight_bytes"][1] + after["cache_bytes"][1]

    def saves(unit: Unit, dropped: Sequence[Unit]) -> float:
        units = (unit, *(one for one in dropped if layer_of(one) == unit))
        whole, *before = (sum(size_of(one)[1:]) if cache_tokens else size_of(one)[0] for one in units)
        return whole - sum(before)

    def one_left(dropped: Sequence[Unit]) -> bool:
        return sum(isinstance(one, int) for one in dropped) == most

    if name == "drop":
        given = normalize_layers(value, total, name)
        if not given:
            raise ArgumentError(name, value, problem=_MET)
        return Target({name: given}, lambda dropped: len(dropped) == len(given), sizes, saves, least=len(given))
    if name == "num_layers":
        return Target({name: value}, lambda dropped: len(dropped) == value, sizes, saves, least=value)
    if name == "max_perplexity_increase":
        return Target({name: value}, one_left, sizes, saves, budget=value)
    if size(()) <= value:
        raise ArgumentError(name, value, problem=_MET)
    cache_of = {"cache_tokens": cache_tokens, "cache_batch": cache_batch} if name == "target_memory" else {}
    by_size = sorted(range(total), key=lambda layer: -size((layer,)), reverse=True)  # largest layer first
    if value < (smallest := size(tuple(by_size[:most]))):
        raise ArgumentError(name, value, f"at least {smallest}, the size of this model with one layer left")
    least = next((n for n in range(1, most) if size(tuple(by_size[:n])) <= value), most)
    return Target(
        {name: value} | cache_of, lambda dropped: size(dropped) <= value or one_left(dropped), sizes, saves, least
    )


def cache_bytes(stack: Stack, tokens: int, batch: int) -> tuple[list[int], list[int]]:
    """The size of each layer's KV cache in bytes, with and without its attention.

    Extrapolated from a cache of a few tokens: linear attention has a state of constant size, and the cache of a sliding
    window stops growing. Without attention, one element per token remains, see `AbsentAttention`.

    Args:
        tokens: length of each sequence.
        batch: number of sequences.
    """
    probe = 3
    embedding: torch.Tensor = stack.model.get_input_embeddings().weight  # type: ignore[assignment]
    ids = torch.zeros(1, probe, dtype=torch.long, device=embedding.device)
    with eval_mode(stack.model):  # in training mode with gradient checkpointing, there is no cache
        (cache,) = kv_cache(stack.model(input_ids=ids, use_cache=True, return_dict=True)).values()
    found, counters = [], []
    for layer in cache.layers:
        window = getattr(layer, "sliding_window", None) if getattr(layer, "is_sliding", False) else None
        total = 0
        for tensor in _tensors(vars(layer)):
            size = tensor.numel() * tensor.element_size()
            grows = tensor.dim() == 4 and tensor.shape[-2] == probe
            total += size * min(tokens, window or tokens) // probe if grows else size
        found.append(total * batch)
        counters.append(embedding.element_size() * min(tokens, window or tokens) * batch)
    return found, counters


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        if values.is_floating_point():  # not a counter
            yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


# --- the search -----------------------------------------------------------------------------------------------------


def search_layers(
    model: nn.Module,
    target: Target,
    method: str,
    heal_method: str | None,
    calibration: TokenBatches,
    judged: TokenBatches,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
    units: str = "layers",
) -> tuple[PruningPlan, HealReport | None]:
    """Chooses layers and, with `heal_method`, heals the model in place to compensate for them.

    See `plan_pruning` for the arguments, which are already validated; a target that names the layers needs no method.
    Layers are chosen on `calibration`. The plan's results are measured on `judged`, which also decides how many layers
    fit the budget and whether healing is kept.

    Returns:
        The plan, and the report with which healing can be undone; None if it was not tried. Healing that does not help
        on `judged` has already been undone.

    Raises:
        ValueError: if the loss is not finite or no set of layers reaches the target; `OtherSearchError` if `resume` is
            the file of another search.
    """
    stack = text_stack(model)
    given: list[int] | None = target.words.get("drop")
    how: dict[str, Any] = {"search": "given" if given else method}
    if units != "layers":
        how |= {"units": units, "cache_of": target.sizes(())["cache_of"]}
    chosen_by = calibration.describe() | sketch(calibration).to_dict() if heal_method or not given else None
    about = {"calibration": chosen_by, "held_out": judged.describe()}
    model_print = fingerprint(stack.model.config)
    log = _Log(None if given else resume, {"method": how, "heal": heal_method, "data": about, "model": model_print})
    if not given:  # not part of the log's key, since steps do not depend on the target
        how = {**how, "target": target.words}
    healer = _Healer(model, calibration, heal_method) if heal_method else None
    search = _Search(model, stack, target, method, units, calibration, healer, log, progress)
    whole = losses_by_source(model, judged)
    before = perplexity_of(whole.mean)
    if not math.isfinite(before):
        raise ArgumentError(
            "model", problem=f"its perplexity on the held-out data is {before}, so nothing can be compared with it"
        )
    if not math.isclose(log.values.setdefault("before", before), before, rel_tol=1e-3):
        raise OtherSearchError("resume", resume, problem="belongs to another model, with a different perplexity")

    chosen: dict[str, Any] = {"layers": [], "perplexity": before}
    used: list[dict[str, Any]] = []
    outside, fit = 0, None
    bar = logging.tqdm(
        total=target.words.get("num_layers"), desc=f"Dropping layers ({how['search']})", disable=not progress
    )
    steps = iter([{"layers": given}]) if given else _steps(search)
    with bar:
        while not target.reached(units_of(chosen)) and (step := next(steps, None)):
            if "perplexity" not in step:
                step |= _figures(losses_by_source(model, judged, units_of(step)), whole)
                log.write()
            if healer and target.budget is not None:
                if "healed" not in step:
                    with healer.healed(units_of(step), progress):
                        step["healed"] = perplexity_of(losses_by_source(model, judged, units_of(step)).mean)
                    log.write()
                healer.forget()
            used.append(step)
            increase = min(step["perplexity"], step.get("healed", math.inf)) / before - 1.0
            if target.budget is not None and not increase <= target.budget:
                outside += 1
                if method in STEPWISE or outside > _LOOK_FURTHER:
                    break
                continue
            bar.update(len(step["layers"]) - len(chosen["layers"]))
            chosen, outside = step, 0
            fit = healer.fit if healer else None  # trying larger sets replaces it
            bar.set_postfix(
                perplexity=with_error(step["perplexity"], step["perplexity_error"]), layers=len(step["layers"])
            )

    layers, dropped = tuple(sorted(chosen["layers"])), units_of(chosen)
    if target.budget is None and not target.reached(dropped):
        counting = sorted(counting_layers(stack.model.config))
        raise ArgumentError(
            "method", method,
            problem=f"finds nothing to drop for {target.words}: one of layers {counting} must be kept, since linear "
            "attention alone cannot generate; choose another method, or fewer layers",
        )  # fmt: skip
    errors = {"before": before * whole.error()} | _errors_of("after", chosen)
    lacking: dict[str, Any] = {kind: tuple(chosen[kind]) for kind in SUBLAYERS if kind in chosen}
    plan = PruningPlan(
        layers=layers,
        model=model_print,
        model_name=public_name(stack.model.config.name_or_path or ""),
        method=how,
        data=about,
        perplexity={"before": before, **({"after": chosen["perplexity"]} if dropped else {})},
        errors=errors,
        steps=[] if given else [{**step, "layers": sorted(step["layers"])} for step in used],
        notes=target.sizes(dropped),
        **lacking,
    )
    if not (healer and dropped):
        return plan, None
    healer.fit = fit
    report = healer.heal(dropped, progress)
    try:
        healed = _figures(losses_by_source(model, judged, dropped), whole)
    except BaseException:
        report.undo()
        raise
    if (healed_to := healed["perplexity"]) < chosen["perplexity"]:
        figures, errors = {**plan.perplexity, "healed": healed_to}, errors | _errors_of("healed", healed)
        return replace(plan, perplexity=figures, errors=errors, heal=report.to_dict()), report
    report.undo()
    return replace(plan, heal=report.to_dict() | {"kept": False}), report


def _figures(losses: SourceLosses, whole: SourceLosses) -> dict[str, float]:
    """Perplexity (geometric mean over sources) and the standard errors of it and of its change from the full model."""
    perplexity, change = perplexity_of(losses.mean), perplexity_of(losses.mean - whole.mean)
    # Delta method: d exp(x) = exp(x) dx.
    errors = {"perplexity_error": perplexity * losses.error(), "change_error": change * losses.error(whole)}
    return {"perplexity": perplexity} | {name: error for name, error in errors.items() if math.isfinite(error)}


def _errors_of(name: str, figures: dict[str, Any]) -> dict[str, float]:
    """The part of `_figures` that is stored in `PruningPlan.errors`."""
    found = {name: figures.get("perplexity_error"), f"{name}_change": figures.get("change_error")}
    return {name: error for name, error in found.items() if error is not None}


class _Healer:
    """Heals the model for one set of units after another, and caches the last fit."""

    def __init__(self, model: nn.Module, calibration: TokenBatches, method: str) -> None:
        self.healer = Healer(model, calibration, method=method)
        self.fit: tuple[HealReport, Callable[[], None]] | None = None

    def heal(self, units: Iterable[Unit], progress: bool) -> HealReport:
        parts = by_kind(units)
        if self.fit and list(self.fit[0].dropped) == units_of(parts):
            report, reapply = self.fit
            reapply()
            return report
        return self.healer.heal(**parts, quick=False, progress=progress)

    @contextmanager
    def healed(self, units: Iterable[Unit], progress: bool) -> Iterator[HealReport]:
        """Context in which the model is healed."""
        report = self.heal(units, progress)
        try:
            yield report
        finally:
            self.fit = report, report.set_aside()

    def forget(self) -> None:
        """Frees the full model's states, since other numbers of layers have cuts in other places."""
        self.healer.forget()


class OtherSearchError(ArgumentError):
    """The file to resume from belongs to another search."""


class _Log:
    """The steps of a search, optionally stored in a file to continue after an interruption."""

    def __init__(self, path: str | os.PathLike[str] | None, key: dict[str, Any]) -> None:
        self.path = Path(path) if path is not None else None
        key = json.loads(json.dumps(key))
        self.values: dict[str, Any] = {"key": key, "steps": []}
        if self.path:
            self.path.with_name(self.path.name + ".partial").unlink(missing_ok=True)  # left behind by a killed run
        if self.path and self.path.exists():
            try:
                self.values = read_object(self.path, key=dict, steps=list)
                if missing := {"key", "steps"} - set(self.values):
                    raise ValueError(f"it has no {min(missing)}")
                _require_steps(self.values)
                differ = [name for name, value in key.items() if self.values["key"].get(name) != value]
                if not differ:
                    _require_steps(self.values, key["model"]["num_hidden_layers"])
            except (OSError, ValueError) as error:
                raise OtherSearchError("resume", path, problem=f"is not the record of a search: {error}") from None
            if differ:
                problem = f"belongs to another search, with different {' and '.join(differ)}"
                raise OtherSearchError("resume", path, problem=problem)
        self.steps: list[dict[str, Any]] = self.values["steps"]

    def add(self, step: dict[str, Any]) -> dict[str, Any]:
        self.steps.append(step)
        self.write()
        return step

    def write(self) -> None:
        if self.path:
            write_atomically(self.path, json.dumps(self.values) + "\n")


def _require_steps(found: dict[str, Any], num_layers: int | None = None) -> None:
    """Refuses invalid values and layers in the record of a search."""
    if not is_positive(found.get("before", 1)):
        raise ValueError(f"its perplexity must be a positive number, got {brief(found['before'])}")
    for step in found["steps"]:
        valid = isinstance(step, dict) and "layers" in step
        valid = valid and all(are_layers(step.get(kind, []), num_layers) for kind in ("layers", *SUBLAYERS))
        errors = (step.get(name) or 1 for name in ("perplexity_error", "change_error")) if valid else ()
        figures = (step.get(name, 1) for name in ("perplexity", "healed")) if valid else ()
        if not valid or not all(map(is_positive, (*figures, *errors))):
            raise ValueError(f"a step must have distinct layers of the model and valid values, got {brief(step)}")


@dataclass(frozen=True)
class _Search:
    """State shared by all steps of a search; see `search_layers`."""

    model: nn.Module
    stack: Stack
    target: Target
    method: str
    units: str
    calibration: TokenBatches
    healer: _Healer | None
    log: _Log
    progress: bool

    def can_go(self, dropped: Iterable[int]) -> bool:
        """Whether a layer that generation needs is left."""
        counting = counting_layers(self.stack.model.config)
        return not counting or not counting <= set(dropped)


def _steps(search: _Search) -> Iterator[dict[str, Any]]:
    """Yields sets that grow by one unit, first those in the log, as dicts with `layers`, `attention` and `mlp`."""
    return _greedy(search) if search.method in STEPWISE or search.units == "sublayers" else _by_number(search)


def _greedy(search: _Search) -> Iterator[dict[str, Any]]:
    """Extends each set by the unit whose removal costs least."""
    yield from list(search.log.steps)
    dropped = units_of(search.log.steps[-1]) if search.log.steps else []
    total = len(search.stack.layers)
    sublayers = droppable_units(search.stack.model.config) if search.units == "sublayers" else []
    while True:
        layers, touched = {unit for unit in dropped if isinstance(unit, int)}, set(map(layer_of, dropped))
        candidates: list[Unit] = [
            *(layer for layer in range(total) if layer not in layers and search.can_go((*layers, layer))),
            *(unit for unit in sublayers if layer_of(unit) not in touched),
        ]
        if not candidates or len(layers) == total - 1:
            return
        repaired: AbstractContextManager[Any] = nullcontext()
        if search.method == "greedy_healed" and search.healer and dropped:
            repaired = search.healer.healed(layers, progress=False)
        with repaired:
            now, without = sweep(search.model, search.calibration, dropped, candidates, "loss", search.progress)
        cost = {unit: loss.mean for unit, loss in without.items()}
        if search.units == "sublayers":
            cost = {unit: (loss - now.mean) / max(search.target.saves(unit, dropped), 1) for unit, loss in cost.items()}
        unit = min(candidates, key=lambda one: cost[one])
        step = by_kind([*dropped, unit])
        dropped = units_of(step)
        yield search.log.add({**step, "calibration_loss": without[unit].mean})


def _by_number(search: _Search) -> Iterator[dict[str, Any]]:
    """Finds the set of each size independently of the others."""
    known = {len(step["layers"]): step for step in search.log.steps}
    scores: list[dict[str, LayerScores]] = []  # for "best_of" one entry per source of text, otherwise one
    for count in range(search.target.least, len(search.stack.layers)):
        if count in known:
            yield known[count]
            continue
        if not scores and search.method == "best_of":
            fitted = [name for name, weight in search.calibration.weights.items() if weight]
            sources = [search.calibration.only(name) for name in fitted]
            scores = [score_stream(search.model, source, progress=search.progress) for source in sources]
        elif not scores:
            found = score_layers(search.model, search.calibration, search.method, progress=search.progress)
            scores = [{search.method: found}]
        proposed = _proposals(scores, count) if search.method == "best_of" else [scores[0][search.method].lowest(count)]
        if not (sets := [layers for layers in proposed if search.can_go(layers)]):
            return
        yield search.log.add(_best_of(search, sets) if search.method == "best_of" else {"layers": sets[0]})


def _proposals(scores: Sequence[dict[str, LayerScores]], count: int) -> list[list[int]]:
    """The sets of layers to try, given the scores on each source of text."""

    def mean(method: str) -> LayerScores:
        return replace(scores[0][method], scores=torch.stack([one[method].scores for one in scores]).mean(0))

    distances = mean("angular").scores[:, count - 1]
    starts = distances.nan_to_num(math.inf).argsort(stable=True)[: min(BLOCKS, len(distances) - count + 1)].tolist()
    found = [list(range(start, start + count)) for start in starts]
    for influence in (mean("block_influence"), *(one["block_influence"] for one in scores)):
        if (least := sorted(influence.lowest(count))) not in found:
            found.append(least)
    return found


def _best_of(search: _Search, proposals: list[list[int]]) -> dict[str, Any]:
    """The set of layers without which the model does best, after quick healing if there is a healer.

    Healing was not found to outweigh differences as large as `_APART` (docs/tried.md).
    """
    judged = search.healer.healer.given if search.healer else search.calibration
    losses = losses_of_sets(search.model, judged, proposals, search.progress)
    tried: list[dict[str, Any]] = [
        {"layers": layers, "perplexity": perplexity_of(loss)} for layers, loss in zip(proposals, losses, strict=True)
    ]
    tried.sort(key=lambda one: one["perplexity"])
    if search.healer:
        tried = [one for one in tried[:HEALED] if one["perplexity"] <= _APART * tried[0]["perplexity"]]
        compared = tried if len(tried) > 1 else []
        for one in logging.tqdm(compared, desc="healing proposals", disable=not search.progress, leave=False):
            with search.healer.healer.healed(one["layers"], quick=True, progress=False) as report:
                one["healed"] = geometric_mean(report.sources[name].perplexity_after for name in judged.weights)
    chosen = min(tried, key=lambda one: one.get("healed", one["perplexity"]))
    return {"layers": chosen["layers"], "tried": tried}


def losses_of_sets(
    model: nn.Module, batches: TokenBatches, sets: Sequence[Sequence[int]], progress: bool = True
) -> list[float]:
    """The loss of the model without each set of layers, in nats per token, averaged over sources of text.

    Each set runs from its first layer on, starting from states of the full model that are stored in one pass.
    """
    split_model = SplitModel(model)
    starts = {min(layers) for layers in sets}
    counts: dict[str, int] = defaultdict(int)
    totals: list[dict[str, float]] = [defaultdict(float) for _ in sets]

    def keep(place: int, x_BTD: torch.Tensor) -> None:
        if place in starts:
            states[place] = x_BTD

    with eval_mode(model):
        for batch in logging.tqdm(batches, desc="proposals", disable=not progress, leave=False):
            states: dict[int, torch.Tensor] = {}
            with capture_residual_stream(split_model.stack, keep):
                split_model.hidden(batch)
            picked_BT, targets_N = predictions(batch)
            counts[batch.name] += len(targets_N)
            for layers, total in zip(sets, totals, strict=True):
                x_BTD = split_model.hidden(batch, layers, (min(layers), states[min(layers)]))
                x_ND = pick_tokens(x_BTD, picked_BT)
                for part in split_model.parts(len(x_ND)):
                    losses_N = token_losses(split_model.logits(x_ND[part]), targets_N[part])
                    total[batch.name] += losses_N.cpu().double().sum().item()
    return [sum(total[name] / count for name, count in counts.items()) / len(counts) for total in totals]
