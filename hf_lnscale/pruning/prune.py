"""Makes a model smaller: chooses layers, heals the cut and measures the cost."""

from __future__ import annotations

import copy
import logging
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..checkpoints.folders import atomic_directory, require_free
from ..checkpoints.names import Placement, load_tokenizer, read_config, require_weights, size_on_disk
from ..core.errors import ArgumentError, require_integers
from ..core.families import family_of, text_config
from ..core.stack import text_stack
from ..core.warnings import warn
from ..evaluation.abilities import Continuations, ability_results
from ..evaluation.speed import measure
from ..measuring.known_text import caution, percent, sequences_of, share_known, sketch
from ..measuring.losses import losses_by_source, perplexity_of
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
from .pruned import Pruned, Row, card_of, compare_abilities, rows_of
from .search import SEARCH_METHODS, OtherSearchError, Request, Text, search_layers
from .target import Target, one_goal, require_possible

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
    windows: Windows = Windows(num_tokens=16_384),
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
    """Makes a model smaller: chooses layers by measurement, drops them and heals the cut.

    A model in memory is changed in place. With `out`, the result is written as an ordinary checkpoint with tokenizer,
    plan and model card; the folder appears only when complete. An interrupted search leaves `.NAME.search.json` next to
    it, from which the next search continues, even with a different number of layers.

    Exactly one of the arguments from `num_layers` to `drop` sets the target.

    Args:
        model: a causal language model of a known family, in memory; or a folder or Hub repository.
        data: the text to choose layers and fit the healing on, see `token_batches`. None uses English and Python code
            shipped with Python.
        num_layers: drop this many layers.
        max_perplexity_increase: drop as many layers as possible within this relative increase on held-out data (0.1
            means ten percent), measured after healing if `heal` is set.
        target_params: drop layers until at most this many parameters are left.
        target_memory: drop layers until weights and KV cache fit in this many bytes, with a cache of `cache_batch`
            sequences of `cache_tokens` tokens.
        drop: drop these layers, counted from 0 (negative ones from the end).
        method, units: how layers are chosen, and among what, see `plan_pruning`. With units "sublayers", `drop` and
            `num_layers` cannot set the target.
        heal: a method of `heal`; "auto" means "refit" for models that can be healed; None disables healing. Healing is
            kept if it lowers the perplexity on held-out data.
        held_out: data for evaluation; None holds out the last quarter of `data`.
        tokenizer: converts text to ids and is written with the model; None loads it by the model's name.
        windows: see `token_batches`; without `held_out`, `windows.num_tokens` includes the held-out part.
        placement: device and dtype for a model that is loaded here; the dtype also applies to the weights written.
        resume: file in which the search records each step, to continue after an interruption; defaults to the hidden
            file next to `out`.
        out: folder to write.
        force: whether to replace a checkpoint at `out`.
        abilities: whether to measure addition, copying, MMLU questions and agreement with the original model, as
            `evaluate` does. They do not affect the choice.
        prompt_tokens, new_tokens: lengths for timing prefill and decoding, if the model is given by path or name and
            written to `out`.
        command: the command line, for the model card.
        progress: whether to show progress bars.

    Returns:
        The plan, the model without the layers, and a table of results before and after.

    Raises:
        FileExistsError: if `out` is not empty and `force` is False, or contains anything but a checkpoint.
        ValueError: if an argument is invalid, no layer fits the budget, the model cannot be pruned or healed, or the
            written checkpoint does not reproduce the plan's perplexity. Nothing is written in these cases.
        UnsupportedArchitectureError: if the model's family is not in the table.
    """
    goal = one_goal(
        num_layers=num_layers, max_perplexity_increase=max_perplexity_increase, target_params=target_params,
        target_memory=target_memory, drop=drop,
    )  # fmt: skip
    require_integers(1, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    request = _request(goal, method, units, heal)
    checkpoint = None if isinstance(model, nn.Module) else os.fspath(model)
    path = None if out is None else Path(out).resolve()
    search_file = None
    if path is not None:
        require_free(path, (checkpoint, *_paths(data), *_paths(held_out)), str(out), force)
        search_file = path.parent / f".{path.name}.search.json" if resume is None else None
    config, decoder = _config_of(checkpoint or model)
    if checkpoint is not None:
        windows = replace(windows, seq_len=window_length(windows.seq_len, [config]))
    _require_prunable(config, request)
    writes = checkpoint is not None or path is not None
    own_tokenizer = tokenizer
    if own_tokenizer is None and (writes or abilities):
        if not (name := checkpoint or config.name_or_path):
            problem = f"required for {'`out`' if path else '`abilities`'}, as the model has no name to load it by"
            raise ArgumentError("tokenizer", problem=problem)
        own_tokenizer = load_tokenizer(name)
    if abilities:
        first_token(own_tokenizer)
    # Not for `abilities` only: it would add English and code to token ids.
    text = _split(data, held_out, own_tokenizer if writes else tokenizer, windows, config, decoder)
    if checkpoint is not None:
        require_weights(checkpoint)
        if not cache_tokens and getattr(config, "quantization_config", None) is None:  # else it takes the model
            with torch.device("meta"):
                dtype = None if placement.dtype == "auto" else placement.dtype
                meta: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
                Target(meta, goal, cache_tokens, cache_batch).require_not_met()
        model = placement.load(checkpoint)
    require_droppable(model, text_stack(model), Cut(tuple(range(len(text_stack(model).layers)))))
    target = Target(model, goal, cache_tokens, cache_batch)
    target.require_not_met()
    whole = (ability_results(model, own_tokenizer), Continuations(model, own_tokenizer)) if abilities else None

    plan, report = _choose_and_heal(model, target, request, text, resume, progress, search_file)
    if not plan.units:
        if search_file is not None:
            search_file.unlink(missing_ok=True)
        raise ValueError(
            f"no {'layer' if units == 'layers' else 'sub-layer'} can be dropped: even the cheapest raises perplexity "
            f"from {plan.perplexity['before']:.2f} by more than {goal[1]:.0%} on held-out data. Nothing was written."
        )
    _drop(model, plan, report)
    if whole is not None:
        cut = [*ability_results(model, own_tokenizer), *whole[1].agreement(model, own_tokenizer)]
        plan = replace(plan, notes={**plan.notes, "abilities": compare_abilities(whole[0], cut)})
    if path is None:
        return Pruned(plan, model, rows_of(plan))

    with atomic_directory(path, force) as folder:
        model.save_pretrained(folder)
        own_tokenizer.save_pretrained(folder)
        rows = rows_of(plan)
        if checkpoint is not None:
            del model, target  # frees memory for other processes
            plan, rows = _with_cost(plan, checkpoint, folder, placement, prompt_tokens, new_tokens)
            model = _read_again(folder, plan, text.held_out, placement)
            model.config.name_or_path = model.name_or_path = str(path)
        plan.save(folder / PLAN_FILE)
        card_of(checkpoint, plan, rows, command, model.config).save(folder / "README.md")
    if search_file is not None:
        search_file.unlink(missing_ok=True)
    return Pruned(plan, model, rows, path)


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
    windows: Windows = Windows(num_tokens=16_384),
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> PruningPlan:
    """Chooses layers to drop without changing the model; `prune` also drops them.

    A budget selects the largest number of layers within it. Since each number has its own set of layers, one more layer
    may cost less, so all methods except the stepwise ones ("greedy", "greedy_healed") try two larger numbers after one
    that exceeds the budget.

    Args:
        model: a causal language model of a known family, in memory.
        data: see `prune`. A small set leads to poor choices.
        num_layers, max_perplexity_increase, target_params, target_memory: the target, exactly one of them; see `prune`.
        cache_tokens, cache_batch: see `prune`.
        method: one of

            - "best_of" (default): evaluates the proposals of one pass over the data (the contiguous blocks of lowest
              angular distance, and the layers of lowest Block Influence, on all sources of text and on each) and takes
              the best. With `heal`, the six best are healed quickly and compared again.
            - "greedy" (default for sub-layers): repeatedly removes the layer whose removal raises the next-token loss
              least (SLEB, arXiv 2402.09025, algorithm 1). Every candidate is evaluated on all data.
            - "greedy_healed": the same, healing the cut so far (by `heal`, or "refit") before evaluating candidates.
            - "angular": the contiguous block of lowest angular distance (Gromov et al., arXiv 2403.17887).
            - "block_influence", "taylor", "perplexity", "kl": the layers of lowest score at once; see `score_layers`.
        units: "layers"; or "sublayers", which at each step removes the layer, attention or MLP whose removal raises the
            loss least relative to what it saves, then evaluates all again. Savings are counted in parameters, or, if
            `cache_tokens` is given, in bytes of weights and KV cache.
        heal: a method of `heal` to try on the result, or "auto", see `prune`; the plan records the effect. None
            disables healing.
        held_out, tokenizer, windows, resume, progress: see `prune`.

    Returns:
        The plan, with perplexities on held-out data. It is deterministic for a given model and data. It has no layers
        if none can be dropped.

    Raises:
        ValueError: if an argument is invalid, the target cannot be reached, there is too little data, the model's loss
            is not finite, or the model cannot be healed as requested; `OtherSearchError` if `resume` is the record of
            another search.
        UnsupportedArchitectureError: if the model's family is not in the table.
    """
    goal = one_goal(
        num_layers=num_layers, max_perplexity_increase=max_perplexity_increase, target_params=target_params,
        target_memory=target_memory,
    )  # fmt: skip
    if method == "greedy_healed":
        heal = heal or "refit"
    request = _request(goal, method, units, heal)
    decoder = text_stack(model).model
    text = _split(data, held_out, tokenizer, windows, decoder.config, decoder)
    if units == "sublayers":
        droppable_units(decoder.config)
    target = Target(model, goal, cache_tokens, cache_batch)
    plan, report = _choose_and_heal(model, target, request, text, resume, progress)
    if report is not None:
        report.undo()
        report.forget()
    return plan


def _choose_and_heal(
    model: nn.Module, target: Target, request: Request, text: Text, resume: Any, progress: bool, own: Path | None = None
) -> tuple[PruningPlan, HealReport | None]:
    """Checks whether the model can be healed, then searches; see `search_layers`.

    The file `own` takes the place of `resume`, but is removed if it belongs to another search.
    """
    if reason := why_not_healable(model) if request.heal else None:
        if request.heal != "auto" or request.method == "greedy_healed":
            raise ArgumentError("heal", request.heal, problem=f"is not possible: {reason}")
        caution = f"the cut is not healed: {reason}."
        text = replace(text, cautions=(*text.cautions, caution))
        warn(caution)
    if request.heal == "auto":
        request = replace(request, heal=None if reason else "refit")
    if request.heal and (count := text.calibration.num_sequences) < 2:
        problem = f"{count} sequence of calibration data is too little for `heal={request.heal}`, which chooses its "
        problem += "penalty on sequences that are not fitted; use more text or a smaller `seq_len`"
        raise ArgumentError("data", problem=problem)
    cost = estimate_cost(model, target, request, text)
    each = " for each number of layers tried" if target.budget is not None else ""
    each = " for each layer, attention or MLP dropped" if request.units == "sublayers" else each
    logger.info("choosing layers%s%s: %s", " and healing" if request.heal else "", each, cost)
    try:
        plan, report = search_layers(model, target, request, text, resume or own, progress)
    except OtherSearchError:
        if own is None:
            raise
        own.unlink()  # left behind by an interrupted search
        plan, report = search_layers(model, target, request, text, own, progress)
    return replace(plan, notes={**plan.notes, "cautions": list(text.cautions)}), report


def _drop(model: nn.Module, plan: PruningPlan, report: HealReport | None) -> None:
    """Drops what the plan says from a model that has been healed for it, or restores its weights."""
    try:
        drop_layers(model, list(plan.layers), attention=plan.attention or None, mlp=plan.mlp or None)
    except BaseException:
        if report is not None:
            report.undo()
        raise
    if report is not None:
        report.forget()
    if plan.known_text:
        note_text(model, plan.known_text)


# --- checks before anything expensive ---------------------------------------------------------------------------------


def _request(goal: tuple[str, Any], method: str | None, units: str, heal: str | None) -> Request:
    """Validates the methods of search and healing."""
    if units not in UNITS:
        raise ArgumentError("units", units, f"one of {', '.join(UNITS)}")
    method = method or ("best_of" if units == "layers" else "greedy")
    if method not in SEARCH_METHODS:
        raise ArgumentError("method", method, f"one of {', '.join(SEARCH_METHODS)}")
    if heal not in (None, "auto", *HEAL_METHODS):
        raise ArgumentError("heal", heal, f"one of auto, {', '.join(HEAL_METHODS)} or None")
    if method == "greedy_healed" and heal is None:
        raise ArgumentError("method", method, problem="requires healing; with `heal=None`, use another method")
    if units == "sublayers":
        if method != "greedy":
            raise ArgumentError("method", method, problem="chooses whole layers; with `units=sublayers`, use 'greedy'")
        if goal[0] in ("num_layers", "drop"):
            problem = "counts layers; with `units=sublayers`, use `target_params`, `target_memory` or "
            raise ArgumentError(*goal, problem=problem + "`max_perplexity_increase`")
    return Request(goal, method, units, heal)


def _config_of(model: Any) -> tuple[PreTrainedConfig, PreTrainedModel | None]:
    """The configuration of a model, and its decoder if it is in memory."""
    if isinstance(model, nn.Module):
        config = next(part.config for part in model.modules() if isinstance(part, PreTrainedModel))
        return config, text_stack(model).model
    config = read_config(model)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ArgumentError("model", model, problem="is not a causal language model; load it and prune it in memory")
    return config, None


def _require_prunable(config: PreTrainedConfig, request: Request) -> None:
    """Refuses a model from whose configuration layers cannot be dropped, or that lacks the layers to drop."""
    family_of(config, "drop_layers")
    if request.units == "sublayers":
        droppable_units(config)
    text = text_config(config)
    total = text.num_hidden_layers
    require_possible(request.goal, total)
    name, value = request.goal
    any_layer = [min(set(range(total)) - counting_layers(text))]
    prune_config(copy.deepcopy(config), normalize_layers(value, total, "drop") if name == "drop" else any_layer)


def _paths(data: Any) -> list[Any]:
    """The values of a `data` argument that may be paths: itself, or each of several sources."""
    if not isinstance(data, dict):
        return [data]
    return [source[0] if isinstance(source, tuple) else source for source in data.values()]


def _split(
    data: Any, held_out: Any, tokenizer: Any, windows: Windows, config: PreTrainedConfig, model: Any = None
) -> Text:
    """Calibration text, held-out text, and cautions about them, which are also issued as warnings."""
    whole = token_batches(default_sources() if data is None else data, model, tokenizer=tokenizer, windows=windows)
    whole.given &= data is not None
    given = {"data": whole}
    if held_out is None:
        calibration, judged = whole.split(0.25)
    else:
        try:
            given["held_out"] = token_batches(held_out, model, tokenizer=tokenizer, windows=windows)
        except (ValueError, FileNotFoundError) as error:  # which name `data`
            raise type(error)(str(error).replace("data", "held_out", 1)) from None
        calibration, judged = given.values()
    cautions = []
    for argument, batches in given.items():
        if batches.source != TOKEN_IDS:
            longest = max(batch.input_ids.shape[1] for batch in batches)
            ends = ends_early(batches.num_tokens, windows.num_tokens, longest * len(batches.weights))
            cautions += [f"{argument}: {ends}"] if ends else []
    for part, batches in (("calibration", calibration), ("held-out", judged)):
        few = too_little(batches.num_tokens, batches.num_sequences)
        cautions += [f"{part} data: {few}"] if few else []
    if known := caution(config, sequences_of(judged)):
        cautions.append(f"held-out data: {known}")
    if held_out is not None and (share := share_known(sketch(calibration), sequences_of(judged))):
        cautions.append(f"held-out data: about {percent(share)} of it is also calibration data; use other text.")
    for text in cautions:
        warn(text)
    return Text(calibration, judged, tuple(cautions))


# --- what is written --------------------------------------------------------------------------------------------------


def _with_cost(
    plan: PruningPlan, checkpoint: str, folder: Path, placement: Placement, prompt_tokens: int, new_tokens: int
) -> tuple[PruningPlan, list[Row]]:
    """The plan with speed and size of both checkpoints, and the rows of its table."""
    if placement.main_device.startswith("cuda"):
        torch.cuda.empty_cache()
    costs = measure(checkpoint, folder, placement=placement, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
    sizes = [size_on_disk(path) for path in (checkpoint, folder)]
    before, after = (asdict(cost) | {"size_on_disk": size} for cost, size in zip(costs, sizes, strict=True))
    plan = replace(plan, notes={**plan.notes, "cost": {"before": before, "after": after}})
    return plan, rows_of(plan, costs, sizes)


def _read_again(folder: Path, plan: PruningPlan, judged: TokenBatches, placement: Placement) -> Any:
    """Loads the written model and checks that it reproduces the plan's perplexity."""
    written = placement.load(folder)
    perplexity = perplexity_of(losses_by_source(written, judged).mean)
    expected = plan.perplexity.get("healed", plan.perplexity["after"])
    if not abs(perplexity - expected) <= 0.01 * expected:  # also true for NaN
        has = f"has perplexity {perplexity:.3f}, but the plan says {expected:.3f}"
        raise ValueError(f"the written checkpoint {has}; nothing was kept")
    return written
