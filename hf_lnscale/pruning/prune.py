"""From a model to a smaller one: layers are chosen, the cut is healed, and the price is measured.

`prune` does all of it. `plan_pruning` is the same search and healing with the model left as it was, and
`hf-lnscale prune` calls `prune` with a path and a folder to write.
"""

from __future__ import annotations

import copy
import logging
import os
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from ..checkpoints.folders import atomic_directory, require_free
from ..checkpoints.names import Placement, load_tokenizer, read_config, size_on_disk
from ..core.errors import ArgumentError
from ..core.families import family_of, text_config
from ..core.stack import text_stack
from ..core.warnings import warn
from ..evaluation.abilities import Continuations, ability_results
from ..evaluation.speed import measure
from ..measuring.known_text import caution, percent, sequences_of, share_known, sketch
from ..measuring.losses import loss_without, perplexity_of
from ..measuring.sample import default_sources, first_token
from ..measuring.text import TOKEN_IDS, TokenBatches, Windows, token_batches, window_length
from ..measuring.uncertainty import ends_early, too_little
from .cost import estimate_cost
from .cut import Cut, counting_layers, droppable_units, normalize_layers
from .depth_fields import prune_config
from .heal import METHODS as HEAL_METHODS
from .heal import HealReport, why_not_healable
from .layers import drop_layers, note_text, require_droppable
from .plan import PLAN_FILE, PruningPlan
from .pruned import Pruned, card_of, compare_abilities, rows_of
from .search import SEARCH_METHODS, OtherSearchError, one_goal, require_possible, search_layers, search_target

logger = logging.getLogger(__name__)

UNITS = ("layers", "sublayers")


def prune(
    model: Any,
    data: Any = None,
    *,
    num_layers: int | None = None,
    max_perplexity_increase: float | None = None,
    target_params: int | None = None,
    target_memory: int | None = None,
    drop: Any = None,
    cache_tokens: int = 0,
    cache_batch: int = 1,
    method: str | None = None,
    units: str = "layers",
    heal: str | None = "auto",
    held_out: Any = None,
    tokenizer: Any = None,
    windows: Windows = Windows(),
    placement: Placement = Placement(),
    resume: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    force: bool = False,
    abilities: bool = False,
    prompt_tokens: int = 512,
    new_tokens: int = 32,
    command: str = "",
    progress: bool = True,
) -> Pruned:
    """Makes a model smaller: chooses layers by measurement, heals the cut, and drops them.

    A model in memory is changed in place. With `out`, the result is written as an ordinary checkpoint with tokenizer,
    plan and model card; the folder appears under its name when it is complete. A search that is interrupted leaves
    `.NAME.search.json` next to it, from which the next one continues, also for another number of layers.

    Exactly one of the first five arguments sets the target:

    Args:
        model: a causal language model of a known family, in memory; or a folder or a name on the Hub.
        data: texts, a dataset, a path or token ids, see `token_batches`; to choose layers and fit the healing on. None
            takes English and Python code that come with Python.
        num_layers: drop that many layers.
        max_perplexity_increase: drop as many as stay inside it on held-out data, 0.1 being ten percent more; with
            `heal`, after healing.
        target_params: drop as many as it takes to have at most that many parameters.
        target_memory: drop as many as it takes for weights and KV cache to fit into that many bytes, the cache being
            that of `cache_batch` sequences of `cache_tokens` tokens.
        drop: drop these layers, counted from 0, negative ones from the end.
        cache_tokens, cache_batch: see `target_memory`.
        method: how layers are chosen, see `plan_pruning`.
        units: "layers", or "sublayers" to choose among layers, attention and MLPs, see `plan_pruning`; then `drop`
            and `num_layers` cannot set the target.
        heal: a method of `heal`; "auto" is "refit" for models that can be healed, None does not heal. Healing is kept
            if it lowers the perplexity on held-out data.
        held_out: data as above, to judge by; None holds out the last quarter of `data`.
        tokenizer: turns text into ids, and is written with the model; None loads it by the model's name.
        windows: see `token_batches`; without `held_out`, `windows.num_tokens` counts both parts.
        placement: device and type of the weights, also of those written; for a model that is loaded here.
        resume: file in which the search notes each step, from which an interrupted one continues; None is the hidden
            file next to `out`.
        out: folder to write.
        force: replace a checkpoint that is at `out`.
        abilities: measure sums, copying, MMLU questions and agreement with the whole model as `evaluate` does; they
            decide nothing.
        prompt_tokens, new_tokens: lengths that prefill and decoding are timed with, for a model given by path or name
            and written to `out`.
        command: the command line, for the model card.
        progress: show progress bars.

    Returns:
        The plan, the model without the layers, and a table of before and after.

    Raises:
        FileExistsError: if `out` is not empty, without `force`, or holds something else than a checkpoint.
        ValueError: for wrong arguments, for a budget that not one layer meets, for a model that cannot be pruned or
            healed, and if the written checkpoint does not have the perplexity that the plan says; nothing is written
            then.
        UnsupportedArchitectureError: if the model's family is not in the table.
    """
    goal = one_goal(
        num_layers=num_layers, max_perplexity_increase=max_perplexity_increase, target_params=target_params,
        target_memory=target_memory, drop=drop,
    )  # fmt: skip
    method, heal = _require_methods(method, units, heal, goal)
    checkpoint = None if isinstance(model, nn.Module) else os.fspath(model)
    target = record = None
    if out is not None:
        target = Path(out).resolve()
        require_free(target, (checkpoint, *_paths(data), *_paths(held_out)), str(out), force)
        record = target.parent / f".{target.name}.search.json" if resume is None else None
    if checkpoint is not None:
        config: PreTrainedConfig = read_config(checkpoint)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            problem = "is not a causal language model; load it, and prune it in memory"
            raise ArgumentError("model", checkpoint, problem=problem)
        windows, inner = replace(windows, seq_len=window_length(windows.seq_len, [config])), None
    else:
        config = next(part.config for part in model.modules() if isinstance(part, PreTrainedModel))
        inner = text_stack(model).model
    _require_prunable(config, goal, units)
    asked = tokenizer
    if asked is None and (checkpoint is not None or target is not None or abilities):
        if not (name := checkpoint or config.name_or_path):
            problem = f"give the one to {'write' if target else 'ask with'}: the model has no name to load it by"
            raise ArgumentError("tokenizer", problem=problem)
        asked = load_tokenizer(name)
    if abilities:
        first_token(asked)
    if checkpoint is not None or target is not None:
        tokenizer = asked  # not for abilities alone: with one, English and code are fitted beside token ids
    text = _split(data, held_out, tokenizer, windows, config, inner)
    if checkpoint is not None:
        model = placement.load(checkpoint)
    require_droppable(model, text_stack(model), Cut(tuple(range(len(text_stack(model).layers)))))
    whole = (ability_results(model, asked), Continuations(model, asked)) if abilities else None

    search = partial(_choose_and_heal, model, goal, method, units, heal, text, cache_tokens, cache_batch)
    try:
        plan, report = search(resume or record, progress)
    except OtherSearchError:
        if record is None:
            raise
        record.unlink()  # an interrupted search left it
        plan, report = search(record, progress)
    if not plan.units:
        if record is not None:
            record.unlink(missing_ok=True)
        if goal[0] != "max_perplexity_increase":
            raise ArgumentError(*goal, problem="is met by the model as it is. Nothing was written.")
        raise ValueError(
            f"not one {'layer' if units == 'layers' else 'sub-layer'} can go: the cheapest raises perplexity from "
            f"{plan.perplexity['before']:.2f} by more than {max_perplexity_increase:.0%} on held-out data. "
            "Nothing was written."
        )
    try:
        drop_layers(model, list(plan.layers), attention=plan.attention or None, mlp=plan.mlp or None)
    except BaseException:
        if report is not None:
            report.undo()
        raise
    if report is not None:
        report.forget()
    if whole is not None:
        cut = [*ability_results(model, asked), *whole[1].agreement(model, asked)]
        plan = replace(plan, notes={**plan.notes, "abilities": compare_abilities(whole[0], cut)})
    if plan.known_text:
        note_text(model, plan.known_text)
    if target is None:
        return Pruned(plan, model, rows_of(plan))

    with atomic_directory(target, force) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        rows = rows_of(plan)
        if checkpoint is not None:
            del model, search  # one at a time
            if placement.main_device.startswith("cuda"):
                torch.cuda.empty_cache()  # for the processes that measure
            costs = measure(checkpoint, folder, placement=placement, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
            sizes = [size_on_disk(path) for path in (checkpoint, folder)]
            before, after = (asdict(cost) | {"size_on_disk": size} for cost, size in zip(costs, sizes, strict=True))
            plan = replace(plan, notes={**plan.notes, "cost": {"before": before, "after": after}})
            rows = rows_of(plan, costs, sizes)
            model = _read_again(folder, plan, text[1], placement)
            model.config.name_or_path = model.name_or_path = str(target)
        plan.save(folder / PLAN_FILE)
        card_of(checkpoint, plan, rows, command, model.config).save(folder / "README.md")
    if record is not None:
        record.unlink(missing_ok=True)
    return Pruned(plan, model, rows, target)


def plan_pruning(
    model: nn.Module,
    data: Any = None,
    *,
    num_layers: int | None = None,
    max_perplexity_increase: float | None = None,
    target_params: int | None = None,
    target_memory: int | None = None,
    cache_tokens: int = 0,
    cache_batch: int = 1,
    method: str | None = None,
    units: str = "layers",
    heal: str | None = None,
    held_out: Any = None,
    tokenizer: Any = None,
    windows: Windows = Windows(),
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> PruningPlan:
    """Chooses layers to drop from a model without changing the model; `prune` also drops them.

    A budget gives the largest number of layers that stays inside it. One layer more can cost less if each number has
    its own set of layers, so all methods but the stepwise ones ("greedy", "greedy_healed") try two larger numbers after
    one that is outside.

    Methods:

    - "best_of": tries the proposals of one pass over the data (the contiguous blocks of lowest angular distance, and
      the layers of lowest Block Influence, on all sources of text and on each), and takes the best; with `heal`, the
      best after quick healing of the six best before it.
    - "greedy": removes the layer whose removal raises the loss least, measures again, and so on (SLEB, arXiv
      2402.09025, algorithm 1, with the loss of the next token as its metric). Every candidate is measured on all of
      the data, from the states before it on.
    - "greedy_healed": the same, with the cut so far healed (by `heal`, or "refit") before candidates are measured.
    - "angular": the contiguous block of lowest angular distance (Gromov et al., arXiv 2403.17887).
    - "block_influence", "taylor", "perplexity", "kl": the layers of lowest score, all at once; see `score_layers`.

    Args:
        model: a causal language model of a known family, in memory.
        data: see `prune`. A small set decides badly.
        num_layers, max_perplexity_increase, target_params, target_memory: how far to go, exactly one of them; see
            `prune`.
        cache_tokens, cache_batch: see `prune`.
        method: see above; None is "best_of", and "greedy" for sub-layers.
        units: "layers"; or "sublayers", which removes at each step the layer, the attention or the MLP whose removal
            raises the loss least for what it saves, and measures all again. What counts is the number of parameters; if
            `cache_tokens` is given, the bytes of the weights and of that KV cache.
        heal: a method of `heal` to try on the result, or "auto", see `prune`; the plan records what it gives. None does
            not try.
        held_out, tokenizer, windows, resume: see `prune`.
        progress: show progress bars.

    Returns:
        The plan, with perplexities on held-out data. It is deterministic: same model, same data, same plan. It has no
        layers if not one can go.

    Raises:
        ValueError: for a wrong argument, for a target that cannot be reached, for too little data, for a model whose
            loss is not finite, or that cannot be healed if that is asked for, and (`OtherSearchError`) if `resume` is
            the record of another search.
        UnsupportedArchitectureError: if the model's family is not in the table.
    """
    goal = one_goal(
        num_layers=num_layers, max_perplexity_increase=max_perplexity_increase, target_params=target_params,
        target_memory=target_memory,
    )  # fmt: skip
    if method == "greedy_healed":
        heal = heal or "refit"
    method, heal = _require_methods(method, units, heal, goal)
    inner = text_stack(model).model
    text = _split(data, held_out, tokenizer, windows, inner.config, inner)
    plan, report = _choose_and_heal(model, goal, method, units, heal, text, cache_tokens, cache_batch, resume, progress)
    if report is not None:
        report.undo()
        report.forget()
    return plan


def _choose_and_heal(
    model: nn.Module,
    goal: tuple[str, Any],
    method: str,
    units: str,
    heal: str | None,
    text: tuple[TokenBatches, TokenBatches, list[str]],
    cache_tokens: int,
    cache_batch: int,
    resume: str | os.PathLike[str] | None,
    progress: bool,
) -> tuple[PruningPlan, HealReport | None]:
    """Checks what needs the model, and searches; see `search_layers`. The text is what `_split` returns."""
    calibration, judged, cautions = text
    if units == "sublayers":
        droppable_units(text_stack(model).model.config)
    target = search_target(model, goal, cache_tokens, cache_batch)
    reason = why_not_healable(model) if heal else None
    if reason and (heal != "auto" or method == "greedy_healed"):
        raise ArgumentError("heal", heal, problem=f"is not possible: {reason}")
    if heal == "auto":
        heal = None if reason else "refit"
    if reason:
        cautions = [*cautions, f"the cut is not healed: {reason}."]
        warn(cautions[-1])
    if heal and calibration.num_sequences < 2:
        raise ArgumentError(
            "data",
            problem=f"{calibration.num_sequences} sequence of calibration data is too little for `heal={heal}`, which "
            "chooses its penalty on sequences that it is not fitted on; give more text, or a smaller `seq_len`",
        )
    cost = estimate_cost(model, target, method if units == "layers" else units, heal, calibration, judged)
    each = " for each number of layers that is tried" if target.budget is not None else ""
    each = " for each layer, attention or MLP that goes" if units == "sublayers" else each
    logger.info("choosing layers%s%s: %s", " and healing" if heal else "", each, cost)
    plan, report = search_layers(model, target, method, heal, calibration, judged, resume, progress, units)
    return replace(plan, notes={**plan.notes, "cautions": cautions}), report


# --- checks before anything expensive ---------------------------------------------------------------------------------


def _require_methods(method: str | None, units: str, heal: str | None, goal: tuple[str, Any]) -> tuple[str, str | None]:
    """The method of the search and of the healing; refuses those that do not go together."""
    if units not in UNITS:
        raise ArgumentError("units", units, f"one of {', '.join(UNITS)}")
    method = method or ("best_of" if units == "layers" else "greedy")
    if method not in SEARCH_METHODS:
        raise ArgumentError("method", method, f"one of {', '.join(SEARCH_METHODS)}")
    if heal not in (None, "auto", *HEAL_METHODS):
        raise ArgumentError("heal", heal, f"one of auto, {', '.join(HEAL_METHODS)} or None")
    if method == "greedy_healed" and heal is None:
        raise ArgumentError("method", method, problem="heals; `heal=None` goes with another method")
    if units == "layers":
        return method, heal
    if method != "greedy":
        raise ArgumentError("method", method, problem="chooses whole layers; `units=sublayers` goes with 'greedy'")
    if goal[0] in ("num_layers", "drop"):
        problem = "counts layers; with `units=sublayers`, give `target_params`, `target_memory` or "
        raise ArgumentError(goal[0], goal[1], problem=problem + "`max_perplexity_increase`")
    return method, heal


def _require_prunable(config: PreTrainedConfig, goal: tuple[str, Any], units: str) -> None:
    """Refuses a model whose configuration cannot lose layers, or does not have those that shall go."""
    family_of(config, "drop_layers")
    if units == "sublayers":
        droppable_units(config)
    text = text_config(config)
    total = text.num_hidden_layers
    require_possible(goal, total)
    any_layer = [min(set(range(total)) - counting_layers(text))]
    prune_config(copy.deepcopy(config), normalize_layers(goal[1], total, "drop") if goal[0] == "drop" else any_layer)


def _paths(data: Any) -> list[Any]:
    """The possible paths in a `data` argument: itself, or each of several sources."""
    if not isinstance(data, dict):
        return [data]
    return [one[0] if isinstance(one, tuple) else one for one in data.values()]


def _split(
    data: Any, held_out: Any, tokenizer: Any, windows: Windows, config: PreTrainedConfig, model: Any = None
) -> tuple[TokenBatches, TokenBatches, list[str]]:
    """Text to choose by, text to judge by, and cautions about them, which are also shown as warnings."""
    data = default_sources() if data is None else data
    whole = token_batches(data, model, tokenizer=tokenizer, windows=windows)
    if held_out is None:
        calibration, judged = whole.split(0.25)
    else:
        calibration, judged = whole, token_batches(held_out, model, tokenizer=tokenizer, windows=windows)
    cautions = []
    for given, batches in (("data", whole), *(() if held_out is None else (("held_out", judged),))):
        if batches.source != TOKEN_IDS and batches is not given:
            longest = max(batch.input_ids.shape[1] for batch in batches)
            ends = ends_early(batches.num_tokens, windows.num_tokens, longest * len(batches.weights))
            cautions += [f"{given}: {ends}"] if ends else []
    for part, batches in (("calibration", calibration), ("held-out", judged)):
        few = too_little(batches.num_tokens, batches.num_sequences)
        cautions += [f"{part} data: {few}"] if few else []
    if known := caution(config, sequences_of(judged)):
        cautions.append(f"held-out data: {known}")
    if held_out is not None and (share := share_known(sketch(calibration), sequences_of(judged))):
        cautions.append(f"held-out data: about {percent(share)} of it is calibration data, too: choose other text.")
    for one in cautions:
        warn(one)
    return calibration, judged, cautions


# --- what is written --------------------------------------------------------------------------------------------------


def _read_again(folder: Path, plan: PruningPlan, judged: TokenBatches, placement: Placement) -> Any:
    """The written model, which must have the perplexity in the plan."""
    written = placement.load(folder)
    found = perplexity_of(loss_without(written, judged))
    said = plan.perplexity.get("healed", plan.perplexity["after"])
    if not abs(found - said) <= 0.01 * said:  # nor if one is not a number
        raise ValueError(
            f"the written checkpoint has perplexity {found:.3f}, the plan says {said:.3f}; nothing is kept"
        )
    return written
