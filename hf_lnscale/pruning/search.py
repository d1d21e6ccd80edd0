"""Searches for layers to drop, by number, budget or size, and evaluates the result on held-out text."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..checkpoints.folders import public_name, write_atomically
from ..core.display import brief, with_error
from ..core.errors import ArgumentError
from ..core.json_file import are_layers, is_positive, read_object
from ..core.record import SUBLAYERS
from ..core.stack import text_stack
from ..core.sublayers import Unit
from ..measuring.known_text import sketch
from ..measuring.losses import layer_of, losses_by_source, losses_of_sets, perplexity_of, sweep, why_not_finite
from ..measuring.text import TokenBatches
from .cut import counting_layers, droppable_units
from .heal import Healer, HealReport
from .plan import PruningPlan, by_kind, fingerprint, units_of
from .scores import LayerScores, score_layers, score_stream
from .target import Target

ONE_SHOT = ("block_influence", "taylor", "perplexity", "kl")
STEPWISE = ("greedy", "greedy_healed")
SEARCH_METHODS = ("best_of", *ONE_SHOT, "angular", *STEPWISE)

# "best_of": number of blocks proposed, number of proposals healed, and their largest perplexity relative to the lowest,
# which healing was not found to outweigh (docs/tried.md).
BLOCKS = 8
HEALED = 6
_APART = 1.5
# How many larger numbers of layers to try after one that exceeds the budget.
_LOOK_FURTHER = 2


@dataclass(frozen=True)
class Request:
    """The arguments of `plan_pruning`, with `goal` the name and value of the one that sets the target."""

    goal: tuple[str, Any]
    method: str = "best_of"
    units: str = "layers"
    heal: str | None = None


@dataclass(frozen=True)
class Text:
    """The text of a search, and cautions about it for the plan."""

    calibration: TokenBatches
    held_out: TokenBatches
    cautions: tuple[str, ...] = ()


def search_layers(
    model: nn.Module, target: Target, request: Request, text: Text, resume: Any = None, progress: bool = True
) -> tuple[PruningPlan, HealReport | None]:
    """Chooses layers on the calibration text and, if requested, heals the model in place to compensate for them.

    The plan's results are measured on the held-out text, which also decides how many layers fit the budget and whether
    healing is kept. `resume` is the path of a file that records the search.

    Returns:
        The plan, and the report with which healing can be undone; None if it was not tried. Healing that does not help
        on held-out text has already been undone.
    """
    search = _Search(model, target, request, text, resume, progress)
    chosen, steps = search.choose()
    if target.budget is None and not target.reached(units_of(chosen)):
        problem = f"finds nothing to drop for {target.words}: one of layers {sorted(search.counting)} must be kept, "
        problem += "since linear attention alone cannot generate; choose another method, or fewer layers"
        raise ArgumentError("method", request.method, problem=problem)
    plan = search.plan(chosen, steps)
    return search.heal(plan, chosen) if search.healer and plan.units else (plan, None)


class _Search:
    """What the steps of a search share.

    A step is a dict with `layers`, and with `attention` and `mlp` if sub-layers are dropped, and the results for it.
    """

    def __init__(
        self, model: nn.Module, target: Target, request: Request, text: Text, resume: Any, progress: bool
    ) -> None:
        self.model, self.target, self.request, self.text, self.progress = model, target, request, text, progress
        self.stack = text_stack(model)
        config = self.stack.model.config
        self.given: list[int] | None = target.words.get("drop")
        # What the plan says about the search.
        self.method: dict[str, Any] = {"search": "given" if self.given else request.method}
        if request.units != "layers":
            self.method |= {"units": request.units, "cache_of": target.cache_of}
        used = request.heal or not self.given
        chosen_by = text.calibration.describe() | sketch(text.calibration).to_dict() if used else None
        self.data = {"calibration": chosen_by, "held_out": text.held_out.describe()}
        self.fingerprint = fingerprint(config)
        key = {"method": self.method, "heal": request.heal, "data": self.data, "model": self.fingerprint}
        self.log = _Log(None if self.given else resume, key)
        if not self.given:  # not part of the log's key, since steps do not depend on the target
            self.method = {**self.method, "target": target.words}
        self.healer = Healer(model, text.calibration, method=request.heal) if request.heal else None
        self.baseline = losses_by_source(model, text.held_out)
        self.before = perplexity_of(self.baseline.mean)
        if not math.isfinite(self.before):
            problem = f"its perplexity on the held-out data is {self.before}, so nothing can be compared with it"
            if not math.isfinite(self.baseline.mean):
                problem += f"; {why_not_finite(model)}"
            raise ArgumentError("model", problem=problem)
        if not math.isclose(self.log.values.setdefault("before", self.before), self.before, rel_tol=1e-3):
            raise OtherSearchError("resume", resume, problem="belongs to another model, with a different perplexity")
        self.counting = counting_layers(config)

    def choose(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The step with the largest set within the target, and all steps that were tried."""
        target, tried = self.target, list[dict[str, Any]]()
        chosen: dict[str, Any] = {"layers": [], "perplexity": self.before}
        outside, fit = 0, None
        steps = iter([{"layers": self.given}]) if self.given else _steps(self)
        desc = f"Dropping layers ({self.method['search']})"
        with logging.tqdm(total=target.words.get("num_layers"), desc=desc, disable=not self.progress) as bar:
            while not target.reached(units_of(chosen)) and (step := next(steps, None)):
                self.evaluate(step)
                tried.append(step)
                increase = min(step["perplexity"], step.get("healed", math.inf)) / self.before - 1.0
                if target.budget is not None and not increase <= target.budget:
                    outside += 1
                    if self.request.method in STEPWISE or outside > _LOOK_FURTHER:
                        break
                    continue
                bar.update(len(step["layers"]) - len(chosen["layers"]))
                shown = with_error(step["perplexity"], step.get("perplexity_error"))
                bar.set_postfix(perplexity=shown, layers=len(step["layers"]))
                chosen, outside = step, 0
                fit = self.healer.fit if self.healer else None
        if self.healer:
            self.healer.fit = fit  # larger sets have replaced it
        return chosen, tried

    def evaluate(self, step: dict[str, Any]) -> None:
        """Adds the perplexity without the step's units on held-out text, and with a budget that after healing."""
        units = units_of(step)
        if "perplexity" not in step:
            step |= self.figures(units)
            self.log.write()
        if self.healer and self.target.budget is not None:
            if "healed" not in step:
                with self.healer.healed(units, progress=self.progress):
                    step["healed"] = perplexity_of(losses_by_source(self.model, self.text.held_out, units).mean)
                self.log.write()
            self.healer.forget()  # the cuts of other numbers of layers are in other places

    def figures(self, units: list[Unit]) -> dict[str, float]:
        """Perplexity without units (geometric mean over sources) and the standard errors of it and of its change."""
        losses = losses_by_source(self.model, self.text.held_out, units)
        perplexity, change = perplexity_of(losses.mean), perplexity_of(losses.mean - self.baseline.mean)
        # Delta method: d exp(x) = exp(x) dx.
        errors = {"perplexity_error": perplexity * losses.error(), "change_error": change * losses.error(self.baseline)}
        return {"perplexity": perplexity} | {name: error for name, error in errors.items() if math.isfinite(error)}

    def plan(self, chosen: dict[str, Any], tried: list[dict[str, Any]]) -> PruningPlan:
        """The plan without healing."""
        units = units_of(chosen)
        return PruningPlan(
            layers=tuple(sorted(chosen["layers"])),
            attention=tuple(chosen.get("attention", ())),
            mlp=tuple(chosen.get("mlp", ())),
            model=self.fingerprint,
            model_name=public_name(self.stack.model.config.name_or_path or ""),
            method=self.method,
            data=self.data,
            perplexity={"before": self.before, **({"after": chosen["perplexity"]} if units else {})},
            errors={"before": self.before * self.baseline.error()} | _errors("after", chosen),
            steps=[] if self.given else [{**step, "layers": sorted(step["layers"])} for step in tried],
            notes=self.target.sizes(units),
        )

    def heal(self, plan: PruningPlan, chosen: dict[str, Any]) -> tuple[PruningPlan, HealReport]:
        """Heals the model in place if that helps on held-out text; adds the results to the plan."""
        assert self.healer is not None
        report = self.healer.heal_again(plan.units, progress=self.progress)
        try:
            healed = self.figures(plan.units)
        except BaseException:
            report.undo()
            raise
        if healed["perplexity"] < chosen["perplexity"]:
            perplexity = {**plan.perplexity, "healed": healed["perplexity"]}
            errors = plan.errors | _errors("healed", healed)
            return replace(plan, perplexity=perplexity, errors=errors, heal=report.to_dict()), report
        report.undo()
        return replace(plan, heal=report.to_dict() | {"kept": False}), report

    def can_go(self, layers: Iterable[int]) -> bool:
        """Whether a layer that generation needs is left."""
        return not self.counting or not self.counting <= set(layers)


def _errors(name: str, figures: dict[str, Any]) -> dict[str, float]:
    """The standard errors of `_Search.figures`, as stored in `PruningPlan.errors`."""
    errors = {name: figures.get("perplexity_error"), f"{name}_change": figures.get("change_error")}
    return {name: error for name, error in errors.items() if error is not None}


# --- the sets that a method tries -------------------------------------------------------------------------------------


def _steps(search: _Search) -> Iterator[dict[str, Any]]:
    """Yields sets that grow by one unit, first those in the log."""
    stepwise = search.request.method in STEPWISE or search.request.units == "sublayers"
    return _greedy(search) if stepwise else _by_number(search)


def _greedy(search: _Search) -> Iterator[dict[str, Any]]:
    """Extends each set by the unit whose removal costs least."""
    yield from list(search.log.steps)
    dropped = units_of(search.log.steps[-1]) if search.log.steps else []
    while candidates := _candidates(search, dropped):
        repaired: AbstractContextManager[Any] = nullcontext()
        if search.request.method == "greedy_healed" and search.healer and dropped:
            repaired = search.healer.healed(dropped, progress=False)
        with repaired:
            now, without = sweep(search.model, search.text.calibration, dropped, candidates, progress=search.progress)
        cost = {unit: loss.mean for unit, loss in without.items()}
        if search.request.units == "sublayers":
            cost = {unit: (loss - now.mean) / max(search.target.saves(unit, dropped), 1) for unit, loss in cost.items()}
        cheapest = min(candidates, key=lambda unit: cost[unit])
        step = by_kind([*dropped, cheapest])
        dropped = units_of(step)
        yield search.log.add({**step, "calibration_loss": without[cheapest].mean})


def _candidates(search: _Search, dropped: list[Unit]) -> list[Unit]:
    """The units that can be dropped next; none if only one layer is left."""
    layers, touched = {unit for unit in dropped if isinstance(unit, int)}, set(map(layer_of, dropped))
    left = [layer for layer in range(len(search.stack.layers)) if layer not in layers]
    if len(left) == 1:
        return []
    sublayers = droppable_units(search.stack.model.config) if search.request.units == "sublayers" else []
    return [
        *(layer for layer in left if search.can_go((*layers, layer))),
        *(unit for unit in sublayers if layer_of(unit) not in touched),
    ]


def _by_number(search: _Search) -> Iterator[dict[str, Any]]:
    """Finds the set of each size independently of the others."""
    logged = {len(step["layers"]): step for step in search.log.steps}
    calibration, method = search.text.calibration, search.request.method
    scores: list[dict[str, LayerScores]] = []  # for "best_of" one entry per source of text, otherwise one
    for count in range(search.target.least, len(search.stack.layers)):
        if count in logged:
            yield logged[count]
            continue
        if not scores and method == "best_of":
            fitted = [name for name, weight in calibration.weights.items() if weight]
            scores = [score_stream(search.model, calibration.only(name), progress=search.progress) for name in fitted]
        elif not scores:
            scores = [{method: score_layers(search.model, calibration, method, progress=search.progress)}]
        proposed = _proposals(scores, count) if method == "best_of" else [scores[0][method].lowest(count)]
        if not (sets := [layers for layers in proposed if search.can_go(layers)]):
            return
        yield search.log.add(_best_of(search, sets) if method == "best_of" else {"layers": sets[0]})


def _proposals(scores: Sequence[dict[str, LayerScores]], count: int) -> list[list[int]]:
    """The sets of layers to try, given the scores on each source of text."""

    def mean(method: str) -> LayerScores:
        return replace(scores[0][method], scores=torch.stack([source[method].scores for source in scores]).mean(0))

    distances = mean("angular").scores[:, count - 1]
    starts = distances.nan_to_num(math.inf).argsort(stable=True)[: min(BLOCKS, len(distances) - count + 1)].tolist()
    sets = [list(range(start, start + count)) for start in starts]
    for influence in (mean("block_influence"), *(source["block_influence"] for source in scores)):
        if (least := sorted(influence.lowest(count))) not in sets:
            sets.append(least)
    return sets


def _best_of(search: _Search, proposals: list[list[int]]) -> dict[str, Any]:
    """The set of layers without which the model does best, after quick healing if there is a healer."""
    healer = search.healer
    judged = healer.held_out if healer else search.text.calibration
    losses = losses_of_sets(search.model, judged, proposals, search.progress)
    tried: list[dict[str, Any]] = [
        {"layers": layers, "perplexity": perplexity_of(loss.mean)}
        for layers, loss in zip(proposals, losses, strict=True)
    ]
    tried.sort(key=lambda proposal: proposal["perplexity"])
    if healer:
        healer.unhealed |= {tuple(layers): loss for layers, loss in zip(proposals, losses, strict=True)}
        tried = [proposal for proposal in tried[:HEALED] if proposal["perplexity"] <= _APART * tried[0]["perplexity"]]
        compared = tried if len(tried) > 1 else []
        for proposal in logging.tqdm(compared, desc="healing proposals", disable=not search.progress, leave=False):
            with healer.healed(proposal["layers"], quick=True, progress=False) as report:
                proposal["healed"] = geometric_mean(report.sources[name].perplexity_after for name in judged.weights)
    chosen = min(tried, key=lambda proposal: proposal.get("healed", proposal["perplexity"]))
    return {"layers": chosen["layers"], "tried": tried}


# --- the file of an interrupted search --------------------------------------------------------------------------------


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
                differ = [name for name, value in key.items() if self.values["key"].get(name) != value]
                _require_steps(self.values, None if differ else key["model"]["num_hidden_layers"])
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


def _require_steps(values: dict[str, Any], num_layers: int | None) -> None:
    """Refuses invalid values and layers in the record of a search."""
    if not is_positive(values.get("before", 1)):
        raise ValueError(f"its perplexity must be a positive number, got {brief(values['before'])}")
    for step in values["steps"]:
        valid = (
            isinstance(step, dict)
            and "layers" in step
            and all(are_layers(step.get(kind, []), num_layers) for kind in ("layers", *SUBLAYERS))
            and all(is_positive(step.get(name, 1)) for name in ("perplexity", "healed"))
            and all(is_positive(step.get(name) or 1) for name in ("perplexity_error", "change_error"))
        )
        if not valid:
            raise ValueError(f"a step must have distinct layers of the model and valid values, got {brief(step)}")
