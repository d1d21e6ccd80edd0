"""From a checkpoint to a smaller one on disk, with the price told: what `hf-lnscale prune` runs."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from .._version import __version__
from ..checkpoints.folders import atomic_directory, public_name, require_free
from ..checkpoints.names import Placement, locate, read_config, size_on_disk
from ..core.display import show_bytes
from ..core.families import family_of, text_config
from ..core.record import get_ln_scaling
from ..core.stack import text_stack
from ..evaluation.speed import Speed, measure
from ..measuring.losses import loss_without, perplexity_of
from ..measuring.text import Windows, token_batches, window_length
from .heal import METHODS as HEAL_METHODS
from .heal import why_not_healable
from .layers import drop_layers, normalize_layers
from .plan import PLAN_FILE, PruningPlan, fingerprint
from .search import (
    SEARCH_METHODS,
    OtherSearchError,
    heal_as_planned,
    require_healable,
    require_healing_data,
    require_num_layers,
    search_layers,
    search_target,
)


def prune(
    checkpoint: str,
    data: Any,
    out: str | os.PathLike,
    *,
    num_layers: int | None = None,
    max_perplexity_increase: float | None = None,
    drop: list[int] | None = None,
    method: str = "best_of",
    heal: str | None = "auto",
    windows: Windows = Windows(),
    placement: Placement = Placement(),
    prompt_tokens: int = 512,
    new_tokens: int = 32,
    force: bool = False,
    command: str = "",
    progress: bool = True,
) -> tuple[PruningPlan, Table]:
    """Prunes a checkpoint and writes the result: a plain checkpoint with tokenizer, plan and model card.

    The folder appears under its name when it is complete. A search that is interrupted leaves `.NAME.search.json`
    beside it, and goes on from there when it is asked for again, also with another number of layers.

    Args:
        checkpoint: folder or name on the Hub.
        data: see `token_batches`; a quarter of it is held out to judge by.
        out: folder to write.
        num_layers: number of layers to drop; or
        max_perplexity_increase: drop as many as stay inside it on held-out data; or
        drop: drop these.
        method: see `plan_pruning`.
        heal: how to heal, see `heal`; "auto" is "refit" for models that can be healed, None does not.
        windows: see `token_batches`.
        placement: where the model is computed, and the type of its weights, also of those written.
        prompt_tokens, new_tokens: how many to time prefill and decoding with.
        force: replace a checkpoint that is at `out`.
        command: the command line, for the model card.
        progress: show progress bars.

    Returns:
        The plan, with what both cost in its notes, and a table of before and after: layers, parameters, size,
        perplexity, speed, memory.

    Raises:
        FileExistsError: if `out` is not empty, without `force`, or holds something else than a checkpoint.
        ValueError: for wrong arguments, and if the written checkpoint does not give the perplexity that the plan says.
    """
    target = Path(out).resolve()
    require_free(target, (checkpoint, data), str(out), force)
    if method not in SEARCH_METHODS:
        raise ValueError(f"method must be one of {', '.join(SEARCH_METHODS)}, got {method!r}")
    if heal not in (None, "auto", *HEAL_METHODS):
        raise ValueError(f"heal must be one of auto, {', '.join(HEAL_METHODS)} or None, got {heal!r}")
    if method == "greedy_healed" and heal is None:
        raise ValueError("method 'greedy_healed' heals; heal=None goes with another method")
    if sum(value is not None for value in (num_layers, max_perplexity_increase, drop)) != 1:
        raise ValueError("give one of the three: a number of layers, a budget of perplexity, or the layers to drop")
    name, where = locate(checkpoint)
    config = read_config(checkpoint)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"{checkpoint!r} is no causal language model; prune it from Python, with plan_pruning and drop_layers"
        )
    family_of(config, "drop_layers")
    # What can be known to be wrong is told before a weight is read.
    if drop is not None:
        drop = normalize_layers(drop, text_config(config).num_hidden_layers, "--drop")
    elif num_layers is not None:
        require_num_layers(num_layers, text_config(config).num_hidden_layers)
    tokenizer = AutoTokenizer.from_pretrained(name, **where)
    batches = token_batches(
        data,
        tokenizer=tokenizer,
        windows=replace(windows, seq_len=window_length(windows.seq_len, [config])),
    )
    calibration, held_out = batches.split(0.25)
    model: Any = placement.load(checkpoint)
    if heal == "auto":
        heal = "refit" if method == "greedy_healed" or why_not_healable(model) is None else None
    require_healable(model, heal)
    require_healing_data(calibration, heal)
    if drop is None:
        goal = search_target(text_stack(model), model, num_layers, max_perplexity_increase)
    search = target.parent / f".{target.name}.search.json"
    if drop is not None:
        plan = _given(model, drop, calibration, held_out, heal)
    else:
        settings: dict[str, Any] = {"resume": search, "progress": progress}
        try:
            plan = search_layers(model, goal, method, heal, calibration, held_out, **settings)
        except OtherSearchError:  # left behind by an interrupted one
            search.unlink()
            plan = search_layers(model, goal, method, heal, calibration, held_out, **settings)
    if not plan.layers:
        search.unlink(missing_ok=True)
        raise ValueError(
            f"not one layer can go: the cheapest raises perplexity from {plan.perplexity['before']:.2f} by more than "
            f"{max_perplexity_increase:.0%} on held-out data. Nothing was written."
        )
    if heal is not None:
        plan, report = heal_as_planned(model, plan, calibration, held_out, heal, progress)
        report.forget()
    drop_layers(model, list(plan.layers))

    with atomic_directory(target) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        config = model.config
        del model  # one at a time
        _require_as_planned(partial, plan, held_out, placement)
        device = placement.main_device
        if device.startswith("cuda"):
            torch.cuda.empty_cache()  # for the processes that measure
        costs = [
            measure(path, dtype=placement.dtype, device=device, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
            for path in (checkpoint, str(partial))
        ]
        sizes = [size_on_disk(path) for path in (checkpoint, partial)]
        before, after = (asdict(cost) | {"size_on_disk": size} for cost, size in zip(costs, sizes, strict=True))
        plan = replace(plan, notes={**plan.notes, "cost": {"before": before, "after": after}})
        plan.save(partial / PLAN_FILE)
        rows = _rows(plan, costs, sizes)
        _card(checkpoint, plan, rows, command, config).save(partial / "README.md")
    search.unlink(missing_ok=True)
    table = Table("", "before", "after", "", title=f"{checkpoint} without layers {', '.join(map(str, plan.layers))}")
    for row in rows:
        table.add_row(*row)
    return plan, table


def _given(model: Any, layers: list[int], calibration: Any, held_out: Any, heal: str | None) -> PruningPlan:
    stack = text_stack(model)
    before = perplexity_of(loss_without(model, held_out))
    if not math.isfinite(before):
        raise ValueError(f"model: its perplexity on the held-out data is {before}; nothing can be compared with that")
    after = perplexity_of(loss_without(model, held_out, layers))
    return PruningPlan(
        layers=tuple(layers),
        model=fingerprint(stack.model.config),
        model_name=public_name(stack.model.config.name_or_path or ""),
        method={"search": "given"},
        data={"calibration": calibration.describe() if heal else None, "held_out": held_out.describe()},
        perplexity={"before": before, "after": after},
    )


def _require_as_planned(folder: Path, plan: PruningPlan, held_out: Any, placement: Placement) -> None:
    """What was written is read again: it must do what the plan says."""
    written: Any = placement.load(folder)
    found = perplexity_of(loss_without(written, held_out))
    said = plan.perplexity.get("healed", plan.perplexity["after"])
    if not abs(found - said) <= 0.01 * said:  # nor if one is no number
        raise ValueError(
            f"the written checkpoint has perplexity {found:.3f}, the plan says {said:.3f}; nothing is kept"
        )


def _rows(plan: PruningPlan, costs: list[Speed], sizes: list[int | None]) -> list[tuple[str, str, str, str]]:
    total = plan.model["num_hidden_layers"]
    figures: list[tuple[str, list[Any], Any]] = [
        ("layers", [total, total - len(plan.layers)], str),
        ("parameters", [cost.parameters for cost in costs], lambda value: f"{value / 1e6:,.1f} M"),
        ("checkpoint", list(sizes), show_bytes),
        ("perplexity, held out", [plan.perplexity["before"], plan.perplexity["after"]], lambda value: f"{value:.2f}"),
    ]
    if "healed" in plan.perplexity:
        figures.append(
            ("perplexity, healed", [plan.perplexity["before"], plan.perplexity["healed"]], lambda value: f"{value:.2f}")
        )
    for name in ("prefill", "decode"):
        speeds = [getattr(cost, f"{name}_tokens_per_second").median for cost in costs]
        figures.append((f"{name}, tokens/s", speeds, lambda value: f"{value:,.1f}"))
    figures.append(("peak memory", [cost.peak_bytes for cost in costs], show_bytes))
    rows = []
    for name, (before, after), show in figures:
        change = f"{after / before - 1:+.1%}" if before and after else ""
        rows.append((name, show(before), show(after), change))
    return rows


def _card(
    checkpoint: str, plan: PruningPlan, rows: list[tuple[str, str, str, str]], command: str, config: PreTrainedConfig
) -> ModelCard:
    """Says how the checkpoint was made, and what it cost."""
    on_hub = not Path(checkpoint).exists()
    front = ModelCardData(base_model=checkpoint if on_hub else None, library_name="transformers", tags=["hf-lnscale"])
    name = checkpoint if on_hub else Path(checkpoint).name
    layers = ", ".join(map(str, plan.layers))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    if plan.heal is None:
        healing = "It was not healed or trained afterwards."
    elif "healed" in plan.perplexity:
        healing = f"The cut was healed in closed form ({plan.heal['method']}), without training."
    else:
        healing = f"Healing ({plan.heal['method']}) did not help on held-out data and was left out."
    held_out = plan.data["held_out"]
    scaled = " LayerNorm Scaling is active in it: it needs hf_lnscale to load." if get_ln_scaling(config) else ""
    made = f"`{command}`" if command else "`hf_lnscale.pruning.prune`"
    search = plan.method["search"]
    how = "as given" if search == "given" else f"chosen by the method `{search}`"
    return ModelCard(
        f"""---
{front.to_yaml()}
---

# {name}, {len(plan.layers)} of {plan.model["num_hidden_layers"]} layers dropped

Layers {layers} (counted from 0) were dropped, {how}. {healing}{scaled}

| | before | after | |
| --- | --- | --- | --- |
{table}

Perplexity: on {held_out["num_tokens"]:,} tokens of {held_out["source"]}. Pruning keeps classification better than
generation: reasoning and code suffer more than perplexity says (arXiv 2602.01997). Speed and memory: batch size 1, on
the machine that made this.

Made by {made}, with hf_lnscale {__version__}, transformers {transformers.__version__}, torch {torch.__version__}.
All figures of the search are in `{PLAN_FILE}`.
"""
    )
