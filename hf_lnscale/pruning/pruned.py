"""The result of `prune`: a table of results before and after, and the model card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard
from transformers import PreTrainedConfig

from ..checkpoints.card import Table, model_card
from ..checkpoints.folders import public_name
from ..core.display import Markdown, as_text, markdown_code, show_bytes, terminal, with_error
from ..core.record import record
from ..evaluation.abilities import about_abilities
from ..evaluation.speed import Speed, relative_change
from ..evaluation.tasks import TaskResult
from .plan import PLAN_FILE, PruningPlan

if TYPE_CHECKING:
    import rich.table

_HEADER = ("", "before", "after", "change")
Row = tuple[str, str, str, str]


@dataclass(frozen=True, eq=False)
class Pruned:
    """The result of `prune`. Prints as a table of results before and after.

    Attributes:
        plan: the dropped layers, how they were chosen, and all results.
        model: the model without them.
        rows: rows of the table: name, before, after, change.
        path: the folder written, or None.
    """

    plan: PruningPlan
    model: Any
    rows: list[Row]
    path: Path | None = None

    @property
    def title(self) -> str:
        return f"{self.plan.model_name} without {self.plan.dropped}".lstrip()

    def table(self) -> rich.table.Table:
        """The rows for a terminal."""
        return terminal(_HEADER, self.rows, self.title)

    def __str__(self) -> str:
        return as_text(self.table(), width=None)


def rows_of(plan: PruningPlan, costs: Sequence[Speed] = (), sizes: Sequence[int | None] = ()) -> list[Row]:
    total = plan.model["num_hidden_layers"]
    parameters = [cost.parameters for cost in costs] or plan.notes["params"]
    figures: list[tuple[str, Sequence[Any], Callable[[Any], str]]] = [
        ("layers", [total, total - len(plan.layers)], str),
        ("parameters", parameters, lambda value: f"{value / 1e6:,.1f} M"),
        ("checkpoint", sizes, show_bytes) if sizes else ("weights", plan.notes["weight_bytes"], show_bytes),
    ]
    if plan.notes.get("cache_of", {}).get("tokens") and (plan.attention or plan.mlp):
        figures.append(("KV cache", plan.notes["cache_bytes"], show_bytes))
    if costs:
        figures.append(("prefill, tokens/s", [cost.prefill_tokens_per_second for cost in costs], str))
        figures.append(("decode, tokens/s", [cost.decode_tokens_per_second for cost in costs], str))
    rows = [
        (name, show(old), show(new), "" if (change := relative_change(new, old)) is None else f"{change:+.1%}")
        for name, (old, new), show in figures
    ]
    if costs:  # single measurements, so no relative change is shown
        before, after = (show_bytes(cost.peak_bytes) for cost in costs)
        rows.append(("peak memory", before, after, ""))
    perplexities = []
    for name, which in (("held out", "after"), ("healed", "healed")):
        if which in plan.perplexity:
            before, after = (with_error(plan.perplexity[key], plan.errors.get(key)) for key in ("before", which))
            increase = f"{plan.perplexity[which] / plan.perplexity['before'] - 1:+.1%}"
            increase += f" ± {error:.1%}" if (error := plan.errors.get(f"{which}_change")) else ""
            perplexities.append((f"perplexity, {name}", before, after, increase))
    if "healed" in plan.perplexity and (never := (plan.heal or {}).get("never_fitted")):
        before, after = (with_error(never[which], never.get(f"{which}_error")) for which in ("full", "after"))
        perplexities.append(("never fitted, healed", before, after, ""))  # an estimate, so no relative change is shown
    rows[3:3] = perplexities
    for ability, results in plan.notes.get("abilities", {}).items():
        value, error = results["change"]
        before, after = (with_error(*results[which]) for which in ("before", "after"))
        rows.append((ability, before, after, with_error(value, error, sign="+")))
    return rows


def compare_abilities(before: list[TaskResult], after: list[TaskResult]) -> dict[str, dict[str, Any]]:
    """Value and standard error of each ability before and after, and of the change; None if not available."""
    results_before = {result.name: result for result in before}
    compared = {}
    for result in after:
        old = results_before.get(result.name)
        figures = {"before": old, "change": result.minus(old)[0] if old else None, "after": result}
        compared[result.name] = {
            which: [one.value, one.stderr] if one else [None, None] for which, one in figures.items()
        }
    return compared


def card_of(
    checkpoint: str | None, plan: PruningPlan, rows: list[Row], command: str, config: PreTrainedConfig
) -> ModelCard:
    """The model card, which describes how the checkpoint was made and what the cut cost."""
    if plan.heal is None:
        healing = "It was not healed or trained afterwards."
    elif "healed" in plan.perplexity:
        healing = f"The cut was healed in closed form ({plan.heal['method']}), without training."
    else:
        healing = f"Healing ({plan.heal['method']}) did not help on held-out data and was not applied."
    search, held_out = plan.method["search"], plan.data["held_out"]
    how = "as given" if search == "given" else f"chosen by the method {markdown_code(search)}"
    notes = [
        Markdown(f"{plan.dropped[0].upper()}{plan.dropped[1:]} (counted from 0) were dropped, {how}."),
        healing,
        *(["LayerNorm Scaling is active, so it needs hf_lnscale to load."] if record(config).active else []),
        *(["Some layers lack attention or MLP, so it needs hf_lnscale to load."] if record(config).sublayers else []),
        Markdown(f"All results of the search are in {markdown_code(PLAN_FILE)}."),
    ]
    note = (
        f"Perplexity: on {held_out['num_tokens']:,} tokens of {held_out['source']}, ± its standard error over "
        f"{held_out['num_sequences']} sequences. {''.join(f'{caution} ' for caution in plan.notes['cautions'])}Pruning "
        "preserves classification better than generation: reasoning and code suffer more than perplexity suggests "
        "(arXiv 2602.01997)."
    )
    if costs := plan.notes.get("cost"):
        timing = costs["after"]["decode_tokens_per_second"]
        note += (
            f" Speed and memory: batch size 1, on the machine used to prune; median of {timing['runs']} runs (lowest "
            f"to highest){' in turn' if timing['in_turn'] else ', one model after the other'}. Peak memory is a single "
            "measurement."
        )
    if "abilities" in plan.notes:
        note += f" {about_abilities('whole')}"
    name = public_name(checkpoint) if checkpoint else plan.model_name or "A model"
    what = f"{len(plan.layers)} of {plan.model['num_hidden_layers']} layers dropped"
    if plan.attention or plan.mlp:
        what += f", {len(plan.attention)} without attention, {len(plan.mlp)} without MLP"
    return model_card(
        f"{name}, {what}",
        base_model=checkpoint,
        pipeline_tag="text-generation",
        notes=notes,
        parts=[Table(_HEADER, rows, note)],
        made_by=command or "hf_lnscale.prune",
    )
