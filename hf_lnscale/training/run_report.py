"""The output of a run besides the model: `metrics.json`, plots and a model card."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard

from .._version import __version__
from ..checkpoints.card import Table, model_card
from ..checkpoints.folders import public_name
from ..core.display import Markdown, one_line, show_bytes, with_error
from ..core.json_file import to_json
from ..core.record import record
from ..evaluation.speed import peak_memory
from ..measuring.losses import perplexity_of
from .control import Control
from .depth_stats import plot_depth_stats
from .trainer import RecipeTrainer

# Training arguments shown on the card in addition to those that identify a run.
_SETTINGS = (
    "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "bf16", "gradient_checkpointing",
    "eval_strategy", "eval_steps", "early_stopping_patience",
)  # fmt: skip
_LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
_PEFT_ONLY = ("lora_", "use_dora", "use_rslora", "bnb_")
_SCALED = "LayerNorm Scaling (arXiv 2502.05795) is active: `import hf_lnscale` before loading"
_WITHOUT_SUBLAYERS = Markdown(
    "Some layers lack attention or MLP: `import hf_lnscale` before loading, or write a plain checkpoint with "
    "`hf-lnscale export --format zeros`."
)
_ADAPTER = Markdown(
    "It is an adapter: after `import hf_lnscale`, `AutoPeftModelForCausalLM.from_pretrained(...)` restores the base "
    "model it was trained on; `.merge_and_unload().save_pretrained(...)` writes a model for `hf-lnscale export`."
)


def write_report(
    trainer: RecipeTrainer, given: dict[str, Any], command: str, cost: dict[str, Any], control: Control | None
) -> None:
    """Evaluates, and writes model, card, `metrics.json` and plots to the output folder. Every process must call it.

    Args:
        trainer: the Trainer after training.
        given, command: the arguments of the recipe and its command line, for the card.
        cost: from `training_cost`.
        control: the comparison for a healing run.
    """
    arguments, state = trainer.args, trainer.state
    if trainer.is_fsdp_enabled:
        # Intermediate checkpoints may be sharded; the final one loads like any other.
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()  # first, so that no later error can lose the model
    found = trainer.evaluate()
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    metrics = {
        "recipe": given["recipe"],
        **_losses(state.log_history, found),
        **(dict(control.metrics()) if control else {}),
        "steps": state.global_step,
        "best_step": state.best_global_step if arguments.load_best_model_at_end else None,
        "train_rows": trainer.num_rows[0],
        "eval_rows": trainer.num_rows[1],
        **cost,
        "parameters": model.num_parameters(),
        "trainable_parameters": model.num_parameters(only_trainable=True),
        "length": [arguments.max_steps, arguments.num_train_epochs],  # as requested; a run of this length is finished
        "versions": {"hf_lnscale": __version__} | {name: version(name) for name in _LIBRARIES},
    }
    trainer.save_state()
    trainer.log_metrics(given["recipe"], dict(_rows(metrics)))
    if trainer.is_world_process_zero():
        folder = Path(arguments.output_dir or "")
        learned = "divergence from the teacher, training" if given.get("teacher") else "training"
        pictures = _plot(state.log_history, folder, learned)
        _card(model, metrics, _settings(trainer, model, given), command, pictures).save(folder / "README.md")
        # Written last, since it marks the run as finished.
        (folder / "metrics.json").write_text(to_json(metrics, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {one_line(folder)}: {', '.join(['the model', 'README.md', 'metrics.json', *pictures])}")
    trainer.accelerator.wait_for_everyone()


def training_cost(
    trainer: RecipeTrainer, resumed: str | None, before: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """Speed and memory of the `seconds` of training, evaluations and saving since the checkpoint `resumed`, whose
    Trainer state is `before`. Every process must call it."""
    arguments, state = trainer.args, trainer.state
    since = before.get("global_step", -1)
    evaluating = sum(
        entry.get("eval_runtime", 0.0) + entry.get("eval_other_runtime", 0.0)
        for entry in state.log_history
        if entry["step"] > since
    )
    tokens = state.num_input_tokens_seen - before.get("num_input_tokens_seen", 0)
    peak = torch.tensor(peak_memory(arguments.device.type), device=arguments.device)
    return {
        "tokens_seen": state.num_input_tokens_seen,
        "tokens_per_second": tokens / (seconds - evaluating),
        "wall_seconds": seconds,
        "resumed_from": public_name(resumed) if resumed else None,
        "peak_memory_bytes": int(trainer.accelerator.gather(peak).max()),
        "peak_memory_of": arguments.device.type if arguments.device.type != "cpu" else "process",
        "processes": arguments.world_size,
        "device": torch.cuda.get_device_name() if arguments.device.type == "cuda" else arguments.device.type,
    }


def _losses(history: list[dict[str, float]], found: dict[str, float]) -> dict[str, float | None]:
    """The evaluation loss before and after training, with standard errors."""
    start = next((entry for entry in history if "eval_loss" in entry and entry["step"] == 0), {})
    loss, error = found["eval_loss"], found.get("eval_loss_stderr")
    return {
        "eval_loss_before": start.get("eval_loss"),
        "eval_loss_before_stderr": start.get("eval_loss_stderr"),
        "eval_loss": loss,
        "eval_loss_stderr": error,
        "perplexity": perplexity_of(loss),
        # Delta method: d exp(x) = exp(x) dx.
        "perplexity_stderr": None if error is None else perplexity_of(loss) * error,
        **{key: value for key, value in found.items() if key.startswith("eval_other_loss")},
    }


def data_names(given: dict[str, Any]) -> list[str]:
    """The data that a run is trained on, by the arguments of its recipe."""
    return [given["dataset_name"]] if given["dataset_name"] else [part["path"] for part in given["datasets"]]


def _settings(trainer: RecipeTrainer, model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments for the card, with the actual values in place of defaults."""
    arguments: Any = trainer.args
    state = trainer.state
    names = [name for name in given if given.get("use_peft") or not name.startswith(_PEFT_ONLY)]
    values = given | arguments.to_dict()
    found = {name: values.get(name) for name in (*names, *_SETTINGS)} | {
        "max_steps": state.max_steps,
        "warmup_steps": arguments.get_warmup_steps(state.max_steps),
        "completion_only_loss": trainer.completion_only_loss,
        "eos_token": arguments.eos_token,  # omitted by `to_dict`, which mistakes it for a secret
        "dtype": str(model.dtype).removeprefix("torch."),
        "datasets": data_names(given),
        "fractions": [part["fraction"] for part in given["datasets"] if part["fraction"]],
    }
    if adapters := getattr(model, "peft_config", None):
        modules = next(iter(adapters.values())).target_modules
        found["lora_target_modules"] = modules if isinstance(modules, str) else sorted(modules)
    return found


def _rows(metrics: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The metrics as text, with standard errors if available."""
    for key, value in metrics.items():
        name, error = key.replace("_", " "), metrics.get(f"{key}_stderr")
        if key == "peak_memory_bytes":
            yield f"peak memory, {metrics['peak_memory_of']}", show_bytes(value)
        elif error is not None:
            yield name, with_error(value, error)
        elif key in ("recipe", "peak_memory_of") or key.endswith("_stderr"):
            continue
        elif isinstance(value, float):
            yield name, f"{value:.4f}" if value < 100 else f"{value:,.0f}"
        elif isinstance(value, (int, str)):
            yield name, f"{value:,}" if isinstance(value, int) else value
    if metrics["eval_loss_stderr"] is not None:
        yield "±", "standard error over the evaluated rows"
    yield "single measurements", "tokens per second, wall seconds, peak memory"
    if metrics["resumed_from"]:
        yield "measured", "speed and time since then"


def _card(
    model: Any, metrics: dict[str, Any], settings: dict[str, Any], command: str, pictures: list[str]
) -> ModelCard:
    base, data = settings.get("model_name_or_path"), settings["datasets"]
    adapter, found = hasattr(model, "peft_config"), record(model.config)
    notes: list[str] = []
    if found.dropped:
        text, total = str(found.dropped), found.dropped.num_hidden_layers
        notes.append(f"{text[0].upper()}{text[1:]} (counted from 0) of the original {total} were dropped.")
    if found.active:
        plain = "" if adapter else ", or write a plain checkpoint with `hf-lnscale export`"
        notes.append(Markdown(f"{_SCALED}{plain}."))
    if adapter:
        notes.append(_ADAPTER)
    elif found.sublayers:
        notes.append(_WITHOUT_SUBLAYERS)
    if whole := metrics.get("whole_model"):
        notes.append(f"Gaps are nats per token above {whole}; the other text is shipped with Python.")
    settings["datasets"] = [public_name(name) for name in data]
    own = "text that the full model generated after prompts from " if settings.get("self_data") else ""
    notes.append(f"It was trained on {own}{', '.join(settings['datasets']) or 'text shipped with Python'}.")
    name = public_name(base) if base else f"{model.config.model_type}, {metrics['parameters'] / 1e6:,.0f} M parameters"
    return model_card(
        f"{name}: {metrics['recipe'].replace('_', ' ')}",
        base_model=base,
        dataset=data[0] if len(data) == 1 else None,
        library_name="peft" if adapter else "transformers",
        tags=["trl"],
        pipeline_tag="text-generation",
        notes=notes,
        parts=[Table(("", ""), [*_rows(metrics)])],
        pictures=pictures,
        settings={key: public_name(one) if isinstance(one, str) and one else one for key, one in settings.items()},
        made_by=command,
        versions=metrics["versions"],
    )


def _plot(history: list[dict[str, float]], folder: Path, learned: str) -> list[str]:
    """Plots losses and depth statistics; returns the file names, none if matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        print("no plots: install the extra hf-lnscale[plot]")
        return []
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for key, label, marker in (("loss", learned, ""), ("eval_loss", "evaluation ± standard error", "o")):
        points = [(one["step"], one[key], one.get(f"{key}_stderr", 0.0)) for one in history if key in one]
        if points:
            steps, losses, errors = zip(*points, strict=True)
            axis.errorbar(steps, losses, errors if any(errors) else None, marker=marker, ms=4, label=label)
    axis.set(xlabel="step", ylabel="loss, nats per token")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    figure.savefig(folder / "loss.png", dpi=150)
    if not any(key.startswith("depth/") for entry in history for key in entry):
        return ["loss.png"]
    plot_depth_stats(history, folder / "depth.png")
    return ["loss.png", "depth.png"]
