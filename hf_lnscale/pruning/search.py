"""Choosing layers to drop: by count, by budget or by size, judged on data that the choice never saw."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..checkpoints.folders import public_name
from ..core.stack import Stack, text_stack
from ..measuring.losses import loss_without, perplexity_of, sweep_losses
from ..measuring.text import TokenBatches, Windows, token_batches
from .heal import METHODS as HEAL_METHODS
from .heal import HealReport, healed, why_not_healable
from .heal import heal as heal_model
from .layers import counting_layers
from .plan import PruningPlan, fingerprint
from .scores import LayerScores, score_layers
from .speculative import _require_count, choose_draft

ONE_SHOT = ("block_influence", "magnitude", "taylor", "perplexity", "kl")
STEPWISE = ("greedy", "greedy_healed", "beam")
SEARCH_METHODS = ("best_of", *ONE_SHOT, "angular", *STEPWISE)

# "best_of": blocks that are proposed, and proposals that are healed.
_BLOCKS = 8
_HEALED = 4
# Numbers of layers that are looked at behind one that is outside the budget.
_LOOK_FURTHER = 2


def plan_pruning(
    model: nn.Module,
    data: Any,
    *,
    num_layers: int | None = None,
    max_perplexity_increase: float | None = None,
    target_params: int | None = None,
    target_memory: int | None = None,
    cache_tokens: int = 0,
    cache_batch: int = 1,
    objective: str = "perplexity",
    method: str = "best_of",
    heal: str | None = None,
    held_out: Any = None,
    tokenizer: Any = None,
    windows: Windows = Windows(),
    beam_width: int = 3,
    resume: str | os.PathLike | None = None,
    progress: bool = True,
) -> PruningPlan:
    """Finds layers to drop from a model; the model itself is left as it is.

    With `objective="draft"`, the layers are those that a draft for speculative decoding leaves out (see `choose_draft`
    and `draft_model`): as many as promise the most speed, `num_layers` at most. The plan's notes say what is promised,
    and whether it pays; `data` are prompts, and of the other arguments only `tokenizer` and `windows.batch_size` apply.
    Otherwise, exactly one of the first four arguments says how far to go:

    - `num_layers`: that many layers.
    - `max_perplexity_increase`: as many as stay inside it on held-out data, 0.1 being ten percent more; with `heal`,
      after healing. One layer more can cost less where each number has its own set of layers, so all methods but
      the stepwise ones ("greedy", "greedy_healed", "beam") look at two more numbers behind one that is outside.
    - `target_params`: as many as it takes to have at most that many parameters.
    - `target_memory`: as many as it takes for weights and KV cache to fit into that many bytes, the cache being that of
      `cache_batch` sequences of `cache_tokens` tokens.

    Methods:

    - "best_of": tries what one pass over the data proposes (the contiguous blocks of lowest angular distance, and the
      layers of lowest Block Influence), and takes what does best; with `heal`, what does best when healed.
    - "greedy": removes the layer whose removal raises the loss least, measures again, and so on (SLEB, arXiv
      2402.09025, algorithm 1, with the loss of the next token as its metric). Every candidate is measured on all of
      the data, from the states in front of it on.
    - "greedy_healed": the same, with the cut so far healed (`heal`, or "refit") before candidates are measured.
    - "beam": as "greedy", keeping the `beam_width` best sets of each size.
    - "angular": the contiguous block of lowest angular distance (Gromov et al., arXiv 2403.17887).
    - "block_influence", "magnitude", "taylor", "perplexity", "kl": the layers of lowest score, all at once; see
      `score_layers`.

    Args:
        model: a causal language model of a known family, in memory.
        data: texts, a dataset, a path or token ids, see `token_batches`. A small set decides badly.
        held_out: the same, to judge by; None keeps the last quarter of `data` back for it.
        heal: a method of `heal` to try on the result; the plan records what it gives, and uses it if that is better on
            held-out data. None does not try.
        tokenizer, windows: see `token_batches`; without `held_out`, `windows.num_tokens` counts both parts.
        resume: path of a file in which the search notes each step; an interrupted one goes on from there.
        progress: show progress bars.

    Returns:
        The plan, with perplexities on held-out data. Same model, same data, same plan: nothing in it is random. It may
        hold no layers, if not one can go.

    Raises:
        ValueError: for a wrong argument, for a target that cannot be reached, for too little data, for a model whose
            loss is not finite, or that cannot be healed where that is asked for, and (`OtherSearchError`) for a
            `resume` file of another search.
        UnsupportedArchitectureError: if the model's family is not in the table.
    """
    stack = text_stack(model)
    if objective == "draft":
        others = (max_perplexity_increase, target_params, target_memory, heal, held_out, resume)
        if any(value is not None for value in others) or method != "best_of":
            raise ValueError("objective='draft' goes with num_layers, tokenizer and batch_size alone")
        return _draft_plan(model, stack, data, tokenizer, num_layers, windows.batch_size)
    if objective != "perplexity":
        raise ValueError(f"objective must be 'perplexity' or 'draft', got {objective!r}")
    target = search_target(stack, model, num_layers, max_perplexity_increase, target_params, target_memory,
                           cache_tokens, cache_batch)  # fmt: skip
    if method not in SEARCH_METHODS:
        raise ValueError(f"method must be one of {', '.join(SEARCH_METHODS)}, got {method!r}")
    if heal is not None and heal not in HEAL_METHODS:
        raise ValueError(f"heal must be one of {', '.join(HEAL_METHODS)} or None, got {heal!r}")
    if method == "greedy_healed":
        heal = heal or "refit"
    if not isinstance(beam_width, int) or beam_width < 1:
        raise ValueError(f"beam_width must be a positive integer, got {beam_width!r}")
    require_healable(model, heal)
    settings: dict[str, Any] = {"windows": windows, "tokenizer": tokenizer}
    calibration = token_batches(data, stack.model, **settings)
    if held_out is None:
        calibration, judged = calibration.split(0.25)
    else:
        judged = token_batches(held_out, stack.model, **settings)
    require_healing_data(calibration, heal)
    plan = search_layers(model, target, method, heal, calibration, judged, beam_width, resume, progress)
    if heal and plan.layers:
        plan, report = heal_as_planned(model, plan, calibration, judged, heal, progress)
        report.undo()
        report.forget()
    return plan


def require_num_layers(value: Any, total: int) -> None:
    """Refuses a number of layers to drop of which a model does not have more."""
    if not isinstance(value, int) or not 0 < value < total:
        raise ValueError(f"num_layers must be an integer from 1 to {total - 1} for this model, got {value!r}")


def require_healable(model: nn.Module, heal: str | None) -> None:
    """Refuses a model that `heal` would refuse, before a search."""
    if heal is not None and (reason := why_not_healable(model)):
        raise ValueError(f"heal={heal!r}: {reason}")


def require_healing_data(calibration: TokenBatches, heal: str | None) -> None:
    """Refuses calibration data of which `heal` can hold nothing out, before a search."""
    if heal is not None and calibration.num_sequences < 2:
        raise ValueError(
            f"data: {calibration.num_sequences} sequence of calibration data is too little for heal={heal!r}, which "
            "chooses its penalty on one that it is not fitted on; give more text, or a smaller seq_len"
        )


def search_layers(
    model: nn.Module,
    target: Target,
    method: str,
    heal: str | None,
    calibration: TokenBatches,
    judged: TokenBatches,
    beam_width: int = 3,
    resume: str | os.PathLike | None = None,
    progress: bool = True,
) -> PruningPlan:
    """`plan_pruning` without a look at its arguments, and without healing what it ends with."""
    stack = text_stack(model)
    how: dict[str, Any] = {"search": method}
    if method == "beam":
        how["beam_width"] = beam_width
    about = {"calibration": calibration.describe(), "held_out": judged.describe()}
    model_print = fingerprint(stack.model.config)
    log = _Log(resume, {"method": how, "heal": heal, "data": about, "model": model_print})
    how = {**how, "target": target.words}  # which the steps do not depend on
    before = perplexity_of(loss_without(model, judged))
    if not math.isfinite(before):
        raise ValueError(f"model: its perplexity on the held-out data is {before}; nothing can be compared with that")
    if not math.isclose(log.values.setdefault("before", before), before, rel_tol=1e-3):
        raise OtherSearchError(f"resume: {str(resume)!r} is of another model: its perplexity is another")

    chosen: tuple[int, ...] = ()
    used: list[dict[str, Any]] = []
    outside = 0
    total = target.words.get("num_layers")
    bar = logging.tqdm(total=total, desc=f"Dropping layers ({method})", disable=not progress)
    steps = _steps(model, stack, method, heal, calibration, beam_width, target.least, log, progress)
    with bar:
        while not target.reached(chosen) and (step := next(steps, None)):
            layers = tuple(step["layers"])
            if "perplexity" not in step:
                step["perplexity"] = perplexity_of(loss_without(model, judged, layers))
                log.write()
            if heal and target.budget is not None and "healed" not in step:
                step["healed"] = _healed_perplexity(model, layers, calibration, judged, heal, progress)
                log.write()
            used.append(step)
            increase = min(step["perplexity"], step.get("healed", math.inf)) / before - 1.0
            if target.budget is not None and not increase <= target.budget:
                outside += 1
                if method in STEPWISE or outside > _LOOK_FURTHER:
                    break
                continue
            bar.update(len(layers) - len(chosen))
            chosen, outside = layers, 0
            bar.set_postfix(perplexity=f"{step['perplexity']:.2f}", layers=len(chosen))

    if target.budget is None and not target.reached(chosen):
        counting = sorted(counting_layers(stack.model.config))
        raise ValueError(
            f"method {method!r} finds no set of layers for {target.words}: of layers {counting} one must stay, as "
            "linear attention alone cannot generate; choose another method, or fewer layers"
        )
    perplexity = {"before": before}
    if chosen:
        perplexity["after"] = perplexity_of(loss_without(model, judged, chosen))
    return PruningPlan(
        layers=tuple(sorted(chosen)),
        model=model_print,
        model_name=public_name(stack.model.config.name_or_path or ""),
        method=how,
        data=about,
        perplexity=perplexity,
        steps=[{**step, "layers": sorted(step["layers"])} for step in used],
        notes=target.sizes(chosen),
    )


def heal_as_planned(
    model: nn.Module, plan: PruningPlan, calibration: TokenBatches, judged: TokenBatches, method: str, progress: bool
) -> tuple[PruningPlan, HealReport]:
    """Heals the model, in place, for a plan that knows its perplexity without, and notes in it what that gives.

    What does not help on the data to judge by is taken back. Healing chooses its penalties on a part of the calibration
    data, so that what is held out judges alone.
    """
    report = heal_model(model, plan.layers, calibration, method=method, progress=progress)
    try:
        healed_to = perplexity_of(loss_without(model, judged, plan.layers))
    except BaseException:
        report.undo()
        raise
    if healed_to < plan.perplexity["after"]:
        return replace(plan, perplexity={**plan.perplexity, "healed": healed_to}, heal=report.to_dict()), report
    report.undo()
    return replace(plan, heal=report.to_dict() | {"kept": False}), report


def _draft_plan(
    model: nn.Module, stack: Stack, data: Any, tokenizer: Any, num_layers: int | None, batch_size: int
) -> PruningPlan:
    if num_layers is not None:
        _require_count("num_layers", num_layers, len(stack.layers) - 1)
    choice = choose_draft(model, data, tokenizer=tokenizer, max_drop=num_layers, batch_size=batch_size)
    found = choice.to_dict()
    return PruningPlan(
        layers=tuple(choice.layers),
        model=fingerprint(stack.model.config),
        model_name=public_name(stack.model.config.name_or_path or ""),
        method={"search": "draft", "target": {"num_layers": num_layers} if num_layers else {}},
        data={"prompts": found.pop("data")},
        steps=found.pop("steps"),
        notes=found,
    )


def _healed_perplexity(
    model: nn.Module,
    layers: tuple[int, ...],
    calibration: TokenBatches,
    judged: TokenBatches,
    heal: str,
    progress: bool,
) -> float:
    with healed(model, sorted(layers), calibration, method=heal, progress=progress):
        return perplexity_of(loss_without(model, judged, layers))


# --- how far to go --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """How far to go.

    Attributes:
        words: for the plan.
        reached: whether a set of layers is enough.
        sizes: what is left without a set of layers.
        least: no set of fewer layers is enough.
        budget: of perplexity, relative.
    """

    words: dict[str, Any]
    reached: Callable[[tuple[int, ...]], bool]
    sizes: Callable[[tuple[int, ...]], dict[str, Any]]
    least: int = 1
    budget: float | None = None


def search_target(
    stack: Stack,
    model: nn.Module,
    num_layers: int | None,
    max_perplexity_increase: float | None,
    target_params: int | None = None,
    target_memory: int | None = None,
    cache_tokens: int = 0,
    cache_batch: int = 1,
) -> Target:
    given = {
        "num_layers": num_layers,
        "max_perplexity_increase": max_perplexity_increase,
        "target_params": target_params,
        "target_memory": target_memory,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        raise ValueError(
            "exactly one of num_layers, max_perplexity_increase, target_params and target_memory says how far to go; "
            f"got {', '.join(f'{name}={value!r}' for name, value in given.items()) or 'none'}"
        )
    name, total = next(iter(given)), len(stack.layers)
    value: Any = given[name]
    most = total - 1
    value = value.item() if hasattr(value, "item") else value  # of numpy
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    if name == "num_layers":
        require_num_layers(value, total)

    params_L = [sum(p.numel() for p in layer.parameters()) for layer in stack.layers]
    bytes_L = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in stack.layers]
    params = sum(p.numel() for p in model.parameters())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    cache_L = cache_bytes(stack, cache_tokens, cache_batch) if cache_tokens else [0] * total

    def sizes(dropped: tuple[int, ...]) -> dict[str, Any]:
        return {
            "params": [params, params - sum(params_L[layer] for layer in dropped)],
            "weight_bytes": [weights, weights - sum(bytes_L[layer] for layer in dropped)],
            "cache_bytes": [sum(cache_L), sum(cache_L) - sum(cache_L[layer] for layer in dropped)],
            "cache_of": {"tokens": cache_tokens, "batch": cache_batch},
        }

    def size(dropped: tuple[int, ...]) -> float:
        after = sizes(dropped)
        return after["params"][1] if name == "target_params" else after["weight_bytes"][1] + after["cache_bytes"][1]

    words = {name: value}
    if name == "num_layers":
        return Target(words, lambda dropped: len(dropped) == value, sizes, least=int(value))
    if name == "max_perplexity_increase":
        return Target(words, lambda dropped: len(dropped) == most, sizes, budget=value)
    if name == "target_memory":
        words |= {"cache_tokens": cache_tokens, "cache_batch": cache_batch}
    by_size = sorted(range(total), key=lambda layer: -size((layer,)), reverse=True)  # the largest layer first
    if value < size(tuple(by_size[:most])):
        raise ValueError(f"{name}={value}: with a single layer left this model still has {size(tuple(by_size[:most]))}")
    least = next((n for n in range(1, most) if size(tuple(by_size[:n])) <= value), most)
    return Target(words, lambda dropped: size(dropped) <= value or len(dropped) == most, sizes, least)


def cache_bytes(stack: Stack, tokens: int, batch: int) -> list[int]:
    """The KV cache of each layer, in bytes: measured on a cache of a few tokens, and multiplied.

    A layer of linear attention has a state of one size, and one with a sliding window stops growing.

    Args:
        tokens: length of each sequence.
        batch: number of sequences.
    """
    probe = 3
    device: torch.device = stack.model.get_input_embeddings().weight.device  # type: ignore[assignment]
    ids = torch.zeros(1, probe, dtype=torch.long, device=device)
    with torch.no_grad():
        cache = stack.model(input_ids=ids, use_cache=True).past_key_values
    found = []
    for layer in cache.layers:
        window = getattr(layer, "sliding_window", None) if getattr(layer, "is_sliding", False) else None
        total = 0
        for tensor in _tensors(vars(layer)):
            size = tensor.numel() * tensor.element_size()
            grows = tensor.dim() == 4 and tensor.shape[-2] == probe
            total += size * min(tokens, window or tokens) // probe if grows else size
        found.append(total * batch)
    return found


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        if values.is_floating_point():  # and not a counter
            yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _tensors(value)
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _tensors(value)


# --- step by step ---------------------------------------------------------------------------------------------------


class OtherSearchError(ValueError):
    """The file to resume from is of another search."""


class _Log:
    """The steps of a search, in a file if there is one, so that it can go on after an interruption."""

    def __init__(self, path: str | os.PathLike | None, key: dict[str, Any]) -> None:
        self.path = Path(path) if path is not None else None
        self.values: dict[str, Any] = {"key": json.loads(json.dumps(key)), "steps": []}
        if self.path and self.path.exists():
            try:
                found = json.loads(self.path.read_text(encoding="utf-8"))
                there = found["key"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"resume: {str(path)!r} is no record of a search") from None
            if there != self.values["key"]:
                differ = [name for name in self.values["key"] if there.get(name) != self.values["key"][name]]
                raise OtherSearchError(f"resume: {str(path)!r} is of another search, with other {' and '.join(differ)}")
            self.values = found

    @property
    def steps(self) -> list[dict[str, Any]]:
        return self.values["steps"]

    def write(self) -> None:
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_name(self.path.name + ".partial")
            partial.write_text(json.dumps(self.values) + "\n", encoding="utf-8")
            os.replace(partial, self.path)


def _steps(
    model: nn.Module,
    stack: Stack,
    method: str,
    heal: str | None,
    calibration: TokenBatches,
    beam_width: int,
    least: int,
    log: _Log,
    progress: bool,
) -> Iterator[dict[str, Any]]:
    """One more layer each time, from the log as far as that goes: dicts with `layers`, in order of removal."""

    def done(step: dict[str, Any]) -> dict[str, Any]:
        log.steps.append(step)
        log.write()
        return step

    most = len(stack.layers) - 1
    counting = counting_layers(stack.model.config)

    def can_go(dropped: Iterable[int]) -> bool:
        return not counting or not counting <= set(dropped)

    if method not in STEPWISE:
        # Sets of one size are found without those of another.
        known = {len(step["layers"]): step for step in log.steps}
        scores: dict[str, LayerScores] = {}
        for count in range(least, most + 1):
            if count not in known and not scores:
                for name in ("block_influence", "angular") if method == "best_of" else (method,):
                    scores[name] = score_layers(model, calibration, name, progress=progress)
            if count in known:
                yield known[count]
            elif method == "best_of":
                if not (proposals := list(filter(can_go, _proposals(scores, count)))):
                    return
                yield done(_best_of(model, proposals, heal, calibration, progress))
            elif can_go(layers := scores[method].lowest(count)):
                yield done({"layers": layers})
            else:
                return
        return
    yield from list(log.steps)
    width = beam_width if method == "beam" else 1
    sets = [tuple(one) for one in log.steps[-1]["beam"]] if log.steps else [()]
    for _ in range(len(log.steps), most):
        found: dict[frozenset[int], tuple[float, tuple[int, ...]]] = {}
        for dropped in sets:
            repaired = (
                healed(model, sorted(dropped), calibration, method=heal or "refit", progress=False)
                if method == "greedy_healed" and dropped
                else nullcontext()
            )
            with repaired:
                for layer, loss in sweep_losses(model, calibration, dropped, progress=progress).items():
                    if not can_go((*dropped, layer)):
                        continue
                    found.setdefault(frozenset((*dropped, layer)), (loss, (*dropped, layer)))
        if not found:
            return
        best = sorted(found.values())[:width]
        sets = [dropped for _, dropped in best]
        yield done({"layers": list(sets[0]), "calibration_loss": best[0][0], "beam": [list(one) for one in sets]})


def _proposals(scores: dict[str, LayerScores], count: int) -> list[tuple[int, ...]]:
    """Sets of layers that one pass over the data suggests."""
    distances = scores["angular"].scores[:, count - 1]
    starts = distances.nan_to_num(math.inf).argsort(stable=True)[: min(_BLOCKS, len(distances) - count + 1)].tolist()
    blocks = [tuple(range(start, start + count)) for start in starts]
    return list(dict.fromkeys([*blocks, tuple(sorted(scores["block_influence"].lowest(count)))]))


def _best_of(
    model: nn.Module,
    proposals: list[tuple[int, ...]],
    heal: str | None,
    calibration: TokenBatches,
    progress: bool,
) -> dict[str, Any]:
    """The set of layers without which the model does best; with `heal`, after healing."""
    fit, choose = (calibration, calibration) if heal is None else calibration.split(0.25)
    tried: list[dict[str, Any]] = []
    for layers in logging.tqdm(proposals, desc="proposals", disable=not progress, leave=False):
        tried.append({"layers": list(layers), "perplexity": perplexity_of(loss_without(model, choose, layers))})
    tried.sort(key=lambda one: one["perplexity"])
    if heal is not None:
        tried = tried[:_HEALED]
        for one in logging.tqdm(tried, desc="healing proposals", disable=not progress, leave=False):
            with healed(model, one["layers"], fit, method=heal, held_out=choose, progress=False) as report:
                one["healed"] = report.perplexity_after
    best = min(tried, key=lambda one: one.get("healed", one["perplexity"]))
    return {"layers": best["layers"], "tried": tried}
