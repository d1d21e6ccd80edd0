"""What a run leaves besides the model: `metrics.json`, curves, and a model card that says how it came about."""

from __future__ import annotations

import json
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from rich.console import Console
from rich.table import Table
from transformers import Trainer

from .._version import __version__
from ..checkpoints.folders import public_name
from ..core.families import text_config
from ..core.record import ACTIVE, DROPPED
from ..evaluation.speed import peak_memory
from ..measuring.losses import perplexity_of
from .depth_stats import plot_depth_stats

# What the card says of the training, besides what the recipe was told.
_SETTINGS = (
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "optim", "max_grad_norm", "bf16",
    "gradient_checkpointing",
)  # fmt: skip
_OF_ADAPTERS = ("lora_", "use_dora", "use_rslora", "bnb_")


def write_report(
    recipe: str,
    trainer: Trainer,
    told: dict[str, Any],
    command: str,
    resumed: str | None,
    since: int,
    seconds: float,
) -> dict[str, Any]:
    """Evaluates, and writes model, card, `metrics.json` and plots to the output folder; every process calls it.

    Args:
        recipe: name of the script.
        trainer: at the end of its training.
        told: what the recipe was told, for the card.
        command: the command line, for the card.
        resumed: the checkpoint that this process started from.
        since: the step of that checkpoint; without one, -1.
        seconds: of training, in this process: with its evaluations and checkpoints.

    Returns:
        What `metrics.json` holds.
    """
    peak = torch.tensor(peak_memory(trainer.args.device.type), device=trainer.args.device)
    peak_bytes = int(trainer.accelerator.gather(peak).max())
    if trainer.is_fsdp_enabled:
        # Checkpoints on the way may be sharded; what is shipped is one that opens like any other.
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()  # first, so that nothing that goes wrong from here on costs the model
    loss = trainer.evaluate()["eval_loss"]
    state = trainer.state
    session_tokens = state.num_input_tokens_seen - trainer._initial_num_input_tokens_seen
    evaluations = [entry for entry in state.log_history[:-1] if "eval_loss" in entry and entry["step"] > since]
    before = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry and entry["step"] == 0]
    model = trainer.accelerator.unwrap_model(trainer.model)
    metrics = {
        "recipe": recipe,
        "eval_loss_before": before[0] if before else None,
        "eval_loss": loss,
        "perplexity": perplexity_of(loss),
        "steps": state.global_step,
        "tokens_seen": state.num_input_tokens_seen,
        "tokens_per_second": session_tokens / (seconds - sum(entry["eval_runtime"] for entry in evaluations)),
        "wall_seconds": seconds,
        "resumed_from": public_name(resumed) if resumed else None,
        "peak_memory_bytes": peak_bytes,
        "peak_memory_of": trainer.args.device.type if trainer.args.device.type != "cpu" else "process",
        "processes": trainer.args.world_size,
        "device": torch.cuda.get_device_name() if trainer.args.device.type == "cuda" else trainer.args.device.type,
        "parameters": model.num_parameters(),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "versions": _versions(),
    }
    if trainer.is_world_process_zero():
        folder = Path(trainer.args.output_dir or "")
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        state.save_to_json(str(folder / "trainer_state.json"))
        learned = "divergence from the teacher, training" if told.get("teacher") else "training"
        pictures = _plot(state.log_history, folder, learned)
        told = {key: value for key, value in told.items() if told.get("use_peft") or not key.startswith(_OF_ADAPTERS)}
        settings = ((key, getattr(trainer.args, key)) for key in _SETTINGS)
        told |= {key: value.value if isinstance(value, Enum) else value for key, value in settings}
        _card(recipe, model, metrics, told, command, pictures).save(folder / "README.md")
        console = Console(highlight=False)
        console.print(_table(metrics))
        console.print(f"wrote {folder}: the model, README.md, metrics.json{''.join(f', {name}' for name in pictures)}")
    trainer.accelerator.wait_for_everyone()
    return metrics


def _versions() -> dict[str, str]:
    import accelerate
    import datasets
    import peft
    import trl

    named = (torch, transformers, trl, peft, accelerate, datasets)
    return {"hf_lnscale": __version__} | {module.__name__: module.__version__ for module in named}


def _rows(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    before = metrics["eval_loss_before"]
    rows = [] if before is None else [("evaluation loss before", f"{before:.4f}")]
    rows += [
        ("evaluation loss", f"{metrics['eval_loss']:.4f}"),
        ("perplexity", f"{metrics['perplexity']:,.2f}"),
        ("steps", f"{metrics['steps']:,}"),
        ("tokens seen", f"{metrics['tokens_seen']:,}"),
        ("tokens per second", f"{metrics['tokens_per_second']:,.0f}"),
        ("wall time", f"{metrics['wall_seconds']:,.0f} s"),
        (f"peak memory, {metrics['peak_memory_of']}", f"{metrics['peak_memory_bytes'] / 2**30:.2f} GiB"),
        ("processes", f"{metrics['processes']} x {metrics['device']}"),
    ]
    if metrics["resumed_from"]:
        rows.append(("resumed from", f"{metrics['resumed_from']}; speed and time are of the part since"))
    return rows


def _table(metrics: dict[str, Any]) -> Table:
    table = Table("", metrics["recipe"], show_header=False)
    for row in _rows(metrics):
        table.add_row(*row)
    return table


def _card(
    recipe: str, model: Any, metrics: dict[str, Any], told: dict[str, Any], command: str, pictures: list[str]
) -> ModelCard:
    base, data = told.get("model_name_or_path"), told.get("dataset_name")
    front = ModelCardData(
        base_model=base if base and not Path(base).exists() else None,
        datasets=[data] if data and not Path(data).exists() else None,
        library_name="peft" if hasattr(model, "peft_config") else "transformers",
        tags=["hf-lnscale", "trl"],
        pipeline_tag="text-generation",
    )
    text = vars(text_config(model.config))
    notes = []
    if text.get(ACTIVE):
        notes.append(
            "LayerNorm Scaling (arXiv 2502.05795) is active in it: `import hf_lnscale` before loading, or write a "
            "plain checkpoint with `hf-lnscale export`."
        )
    if record := text.get(DROPPED):
        gone = ", ".join(map(str, record["layers"]))
        notes.append(f"Layers {gone} (counted from 0) of {record['num_hidden_layers']} were dropped.")
    if hasattr(model, "peft_config"):
        notes.append("It is an adapter, for the base model loaded in the same way as it was trained on.")
    figures = "\n".join(f"| {name} | {value} |" for name, value in _rows(metrics))
    told = {key: public_name(value) if isinstance(value, str) and value else value for key, value in told.items()}
    given = "\n".join(f"| `{key}` | `{value}` |" for key, value in told.items() if value not in (None, [], False, {}))
    plots = "\n\n".join(f"![{Path(name).stem}]({name})" for name in pictures)
    made_with = ", ".join(f"{name} {version}" for name, version in metrics["versions"].items())
    name = Path(base).name if base else f"{model.config.model_type}, {metrics['parameters'] / 1e6:,.0f} M parameters"
    return ModelCard(
        f"""---
{front.to_yaml()}
---

# {name}: {recipe.replace("_", " ")}

{" ".join(notes)}

| | |
| --- | --- |
{figures}

{plots}

Made by `{command}`, with {made_with}, from the data `{told.get("dataset_name") or "text that comes with Python"}`.

| argument | |
| --- | --- |
{given}
"""
    )


def _plot(history: list[dict[str, float]], folder: Path, learned: str) -> list[str]:
    """Loss over steps, and what was measured over depth.

    Args:
        history: what the trainer logged.
        folder: to write to.
        learned: what the training loss is.

    Returns:
        The names of the pictures; none without matplotlib.
    """
    if find_spec("matplotlib") is None:
        print("no plots: pip install 'hf-lnscale[plot]'")
        return []
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    style: dict[Any, Any] = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
    }
    pictures = []
    with plt.rc_context(style):
        figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
        for key, label, marker in (("loss", learned, ""), ("eval_loss", "evaluation", "o")):
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                axis.plot(*zip(*points, strict=True), marker=marker, ms=4, label=label)
        axis.set(xlabel="step", ylabel="loss, nats a token")
        axis.legend(frameon=False)
        figure.savefig(folder / "loss.png", dpi=150)
        plt.close(figure)
        pictures.append("loss.png")
    if any(key.startswith("depth/") for entry in history for key in entry):
        plot_depth_stats(history, folder / "depth.png")
        pictures.append("depth.png")
    return pictures
