"""Does it pay to convert a trained Pre-LN model to LayerNorm Scaling? Compares several ways of converting it.

    python benchmarks/converting.py TEXT_FILE                  # trains, then prints the table; resumes when run again
    python benchmarks/converting.py TEXT_FILE --only-print     # the table of the finished runs

A deep, narrow Pre-LN Llama is trained to convergence on the first part of a text. Starting from it, each way trains for
the same number of steps on a second part, with the same data in the same order and the same learning rate schedule,
which starts with a new warmup:

- plain: continues as Pre-LN. This is the baseline to beat.
- cold: the full scale at once.
- ramp N: the exponent rises from 0 to 0.5 over N steps (LNScalingWarmupCallback), linearly or along a cosine.
- ramp N, deeper half: the same for the deeper half of the layers only.
- compensated: the full scale at once, with norm weights multiplied by sqrt(l): the same function, other dynamics.
- compensated, decayed N: the same, with that factor removed from the weights again over N steps.
- LNS from the start: no conversion. LNS on both parts, from the same random weights; shows what there is to gain.

Losses are measured on a third part that is never trained on. Each seed has its own weights and its own data order;
"against plain" is the mean of the differences within each seed, with its standard error. Writes results.json and
converting.png to the folder of the runs.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

import hf_lnscale
from hf_lnscale.core.stack import text_stack
from hf_lnscale.training import LNScalingWarmupCallback


@dataclass(frozen=True)
class Settings:
    """Settings shared by all runs in a folder."""

    layers: int = 12
    hidden: int = 96
    mlp: int = 256
    heads: int = 4
    vocabulary: int = 2048
    window: int = 128  # tokens per sequence
    batch: int = 8  # sequences per step
    base_steps: int = 800
    steps: int = 240  # of each way
    base_learning_rate: float = 3e-3
    learning_rate: float = 1e-3
    measured_windows: int = 40  # from the held-out part, for the curves and the measurements over depth


Convert = Callable[[Path, Settings], tuple[LlamaForCausalLM, list[TrainerCallback]]]


def plain(base: Path, settings: Settings) -> tuple[LlamaForCausalLM, list[TrainerCallback]]:
    return LlamaForCausalLM.from_pretrained(base), []


def cold(base: Path, settings: Settings) -> tuple[LlamaForCausalLM, list[TrainerCallback]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the warning about a cold switch
        return LlamaForCausalLM.from_pretrained(base, ln_scaling=True), []


def ramp(share: float, schedule: str = "linear", deeper_half: bool = False) -> Convert:
    """Ramps the exponent up over a share of the steps."""

    def convert(base: Path, settings: Settings) -> tuple[LlamaForCausalLM, list[TrainerCallback]]:
        half = settings.layers // 2
        depths = [1] * half + list(range(half + 1, settings.layers + 1)) if deeper_half else None
        ln_scaling = {"warmup_steps": round(share * settings.steps), "schedule": schedule, "depths": depths}
        return LlamaForCausalLM.from_pretrained(base, ln_scaling=ln_scaling), [LNScalingWarmupCallback()]

    return convert


def multiply_norm_weights(model: torch.nn.Module, exponent: float) -> None:
    """Multiplies the pre-norm weights of layer l by l ** exponent."""
    with torch.no_grad():
        for layer, norm in text_stack(model).norms:
            norm.weight.mul_((layer + 1) ** exponent)


class DecayBack(TrainerCallback):
    """Removes the factor sqrt(l) from the pre-norm weights over a number of steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step <= self.steps:
            multiply_norm_weights(kwargs["model"], -0.5 / self.steps)


def compensated(decay_share: float | None = None) -> Convert:
    def convert(base: Path, settings: Settings) -> tuple[LlamaForCausalLM, list[TrainerCallback]]:
        model = LlamaForCausalLM.from_pretrained(base)
        multiply_norm_weights(model, 0.5)
        hf_lnscale.apply_ln_scaling(model)
        return model, [DecayBack(round(decay_share * settings.steps))] if decay_share else []

    return convert


# Name ({} is replaced by the number of steps in the share), share, conversion.
WAYS: list[tuple[str, float, Convert]] = [
    ("plain", 0, plain),
    ("cold", 0, cold),
    ("ramp {}", 0.1, ramp(0.1)),
    ("ramp {}", 0.4, ramp(0.4)),
    ("ramp {}", 0.8, ramp(0.8)),
    ("ramp {}, cosine", 0.4, ramp(0.4, "cosine")),
    ("ramp {}, deeper half", 0.4, ramp(0.4, deeper_half=True)),
    ("compensated", 0, compensated()),
    ("compensated, decayed {}", 0.4, compensated(0.4)),
]
FROM_THE_START = "LNS from the start"


def ways(settings: Settings) -> dict[str, Convert]:
    named = {name.format(round(share * settings.steps)): convert for name, share, convert in WAYS}
    return {**named, FROM_THE_START: plain}


# --- data -----------------------------------------------------------------------------------------------------------


def windows(text: Path, settings: Settings) -> list[torch.Tensor]:
    """The first, second and held-out parts (45, 45 and 10 % of the text), each of shape (N, T)."""
    content = text.read_text(encoding="utf-8")
    cuts = [0] + [content.index("\n", int(len(content) * share)) for share in (0.45, 0.9)] + [len(content)]
    parts = [content[start:end] for start, end in pairwise(cuts)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(parts[:2], trainer)  # not the held-out part
    ids = [tokenizer.encode(part).ids for part in parts]
    return [torch.tensor(i[: len(i) // settings.window * settings.window]).view(-1, settings.window) for i in ids]


def dataset(windows_NT: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": window, "labels": window} for window in windows_NT]


# --- training -------------------------------------------------------------------------------------------------------


def new_model(settings: Settings, seed: int, ln_scaling: bool) -> LlamaForCausalLM:
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.mlp,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=settings.window,
        use_cache=False,
        ln_scaling=ln_scaling,
    )
    return LlamaForCausalLM(config)


def train(
    model: LlamaForCausalLM,
    train_NT: torch.Tensor,
    measured_NT: torch.Tensor,
    steps: int,
    learning_rate: float,
    settings: Settings,
    seed: int,
    callbacks: list[TrainerCallback],
    folder: Path,
) -> list[tuple[int, float]]:
    """Trains in place, as the paper does at scale. Returns (step, evaluation loss): at the start, then eight times."""
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=settings.batch,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=steps // 10,
        adam_beta2=0.95,
        weight_decay=0.0,
        max_grad_norm=1.0,
        eval_strategy="steps",
        eval_steps=max(1, steps // 8),
        eval_on_start=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
        disable_tqdm=not sys.stderr.isatty(),
        seed=seed,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=dataset(train_NT),
        eval_dataset=dataset(measured_NT),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [(entry["step"], entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry]


@torch.no_grad()
def loss(model: LlamaForCausalLM, windows_NT: torch.Tensor, batch: int) -> float:
    """Mean cross-entropy of the next token, in nats."""
    model.eval()
    losses = [model(ids, labels=ids).loss.item() * len(ids) for ids in windows_NT.to(model.device).split(batch)]
    return sum(losses) / len(windows_NT)


def figures(model: LlamaForCausalLM, held_out_NT: torch.Tensor, settings: Settings) -> dict[str, Any]:
    measured = measured_windows(held_out_NT, settings)
    found = hf_lnscale.diagnose(model, measured, jacobian=False, progress=False)
    return {
        "evaluation_loss": loss(model, held_out_NT, settings.batch),
        "residual_variance": [place["variance_without_first"] for place in found.residual],
        "loss_added_by_removing_each_layer": found.values("loss_added"),
        "scales": hf_lnscale.ln_scales(model),
    }


def measured_windows(held_out_NT: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Some of the held-out windows, spread evenly."""
    return held_out_NT[torch.linspace(0, len(held_out_NT) - 1, min(settings.measured_windows, len(held_out_NT))).long()]


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes atomically, so that an existing file is always complete."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def run_base(data: list[torch.Tensor], settings: Settings, seed: int, folder: Path, ln_scaling: bool) -> Path:
    """The base checkpoint, trained if it does not exist yet."""
    name = "base-lns" if ln_scaling else "base"
    if (folder / f"{name}.json").exists():
        return folder / name
    start = time.perf_counter()
    base_NT, _, held_out_NT = data
    model = new_model(settings, seed, ln_scaling)
    measured = measured_windows(held_out_NT, settings)
    history = train(
        model, base_NT, measured, settings.base_steps, settings.base_learning_rate, settings, seed, [], folder
    )
    shutil.rmtree(folder / name, ignore_errors=True)
    model.save_pretrained(folder / name)
    found = figures(model, held_out_NT, settings)
    found["loss_on_its_own_part"] = loss(model, measured_windows(base_NT, settings), settings.batch)
    write(folder / f"{name}.json", {**found, "history": history, "seconds": time.perf_counter() - start})
    log(f"seed {seed}, {name}: loss {found['evaluation_loss']:.4f}, {time.perf_counter() - start:.0f} s")
    return folder / name


def run_way(name: str, convert: Convert, data: list[torch.Tensor], settings: Settings, seed: int, folder: Path) -> None:
    path = folder / f"{name.replace(' ', '-').replace(',', '')}.json"
    if path.exists():
        return
    base = run_base(data, settings, seed, folder, ln_scaling=name == FROM_THE_START)
    start = time.perf_counter()
    _, new_NT, held_out_NT = data
    model, callbacks = convert(base, settings)
    history = train(
        model,
        new_NT,
        measured_windows(held_out_NT, settings),
        settings.steps,
        settings.learning_rate,
        settings,
        seed,
        callbacks,
        folder,
    )
    found = figures(model, held_out_NT, settings)
    seconds = time.perf_counter() - start
    write(path, {"way": name, "seed": seed, **found, "history": history, "seconds": seconds})
    log(f"seed {seed}, {name}: loss {found['evaluation_loss']:.4f}, {seconds:.0f} s")


def log(line: str) -> None:
    print(time.strftime("%H:%M:%S"), line, flush=True)


# --- results --------------------------------------------------------------------------------------------------------


def collect(out: Path, settings: Settings) -> dict[str, dict[int, dict[str, Any]]]:
    """The finished runs: from the name of the way (or "base") to the seed to its figures."""
    found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in ["base", *ways(settings)]}
    for folder in sorted(out.glob("seed-*")):
        seed = int(folder.name.removeprefix("seed-"))
        for path in sorted(folder.glob("*.json")):
            run = json.loads(path.read_text(encoding="utf-8"))
            name = run.get("way", path.stem)
            if name in found:
                found[name][seed] = run
    return {name: runs for name, runs in found.items() if runs}


def deeper_half(values: list[float]) -> float:
    return statistics.mean(values[len(values) // 2 :])


def mean_and_spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def against(runs: dict[int, dict[str, Any]], plain_runs: dict[int, dict[str, Any]]) -> tuple[float, float] | None:
    """The mean difference in evaluation loss within each seed, and its standard error."""
    pairs = [run["evaluation_loss"] - plain_runs[s]["evaluation_loss"] for s, run in runs.items() if s in plain_runs]
    if len(pairs) < 2:
        return None
    return statistics.mean(pairs), statistics.stdev(pairs) / math.sqrt(len(pairs))


def report(out: Path, settings: Settings) -> None:
    found = collect(out, settings)
    seeds = sorted({seed for runs in found.values() for seed in runs})
    table = Table(
        "way",
        "seeds",
        "evaluation loss (± sd)",
        "against plain (± se)",
        f"residual variance, after layer 1 / {settings.layers}",
        "loss added by removing a layer: shallower / deeper half",
        title=f"Llama, {settings.layers} layers of {settings.hidden}; {settings.base_steps} steps of "
        f"{settings.batch * settings.window:,} tokens on the first part, {settings.steps} on the second; seeds {seeds}",
    )
    summary = {}
    for name, runs in found.items():
        difference = against(runs, found.get("plain", {})) if name not in ("base", "plain") else None
        variances = [[run["residual_variance"][place] for run in runs.values()] for place in (1, -1)]
        added = [run["loss_added_by_removing_each_layer"] for run in runs.values()]
        half = settings.layers // 2
        table.add_row(
            "before (Pre-LN)" if name == "base" else name,
            str(len(runs)),
            mean_and_spread([run["evaluation_loss"] for run in runs.values()]),
            f"{difference[0]:+.4f} ± {difference[1]:.4f}" if difference else "",
            " / ".join(f"{statistics.mean(values):.3g}" for values in variances),
            " / ".join(
                f"{statistics.mean(statistics.mean(values[part]) for values in added):.4f}"
                for part in (slice(0, half), slice(half, None))
            ),
        )
        summary[name] = {"against_plain": difference, "runs": runs}
    Console(width=150).print(table)
    write(out / "results.json", {"settings": asdict(settings), "versions": versions(), "ways": summary})
    plot(found, settings, out / "converting.png")
    print(f"{out / 'results.json'}, {out / 'converting.png'}")


def versions() -> dict[str, str]:
    import transformers

    return {"hf_lnscale": hf_lnscale.__version__, "transformers": transformers.__version__, "torch": torch.__version__}


def plot(found: dict[str, dict[int, dict[str, Any]]], settings: Settings, path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    def over_seeds(name: str, key: str) -> list[float]:
        return [statistics.mean(values) for values in zip(*(run[key] for run in found[name].values()), strict=True)]

    colors = plt.get_cmap("tab10").colors
    style: dict[Any, Any] = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "grid.alpha": 0.25,
        "font.size": 9.5,
    }
    with plt.rc_context(style):
        figure, (curves, end, growth, worth) = plt.subplots(1, 4, figsize=(18, 4.6), layout="constrained")
        curves.set(title="Evaluation loss", xlabel="step on the second part", ylabel="nats per token")
        end.set(title="Final loss minus plain", xlabel="nats per token, mean and standard error")
        growth.set(title="Residual stream", xlabel="after layer", ylabel="variance", yscale="log")
        worth.set(title="What each layer does", xlabel="layer removed", ylabel="loss added, nats per token")
        names = [name for name in ways(settings) if name in found]
        top = 0.0
        for number, name in enumerate(names):
            color, dashes = colors[number % 10], ":" if name == FROM_THE_START else "-"
            runs = list(found[name].values())
            steps = [step for step, _ in runs[0]["history"]]
            losses = [statistics.mean(run["history"][i][1] for run in runs) for i in range(len(steps))]
            curves.plot(steps, losses, dashes, color=color, label=name)
            top = max(top, losses[0] if name == "plain" else 0)
            difference = against(found[name], found.get("plain", {})) if name != "plain" else None
            if difference:
                end.errorbar(difference[0], number, xerr=difference[1], fmt="o", color=color, capsize=3)
            growth.plot(over_seeds(name, "residual_variance"), dashes, color=color)
            worth.plot(
                range(1, settings.layers + 1),
                over_seeds(name, "loss_added_by_removing_each_layer"),
                dashes,
                color=color,
            )
        end.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
        end.axvline(0, color="gray", lw=1)
        curves.set_ylim(top=top + 0.4)  # a cold switch starts far above this
        worth.set_yscale("symlog", linthresh=1e-2)
        curves.legend(frameon=False, fontsize=8)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def main(
    text: Annotated[
        Path, typer.Argument(help="A UTF-8 text file of at least one megabyte.", exists=True, dir_okay=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder of the runs; finished runs are not repeated.")] = Path(
        "build/converting"
    ),
    seeds: Annotated[int, typer.Option(help="Number of seeds, counted from 0.", min=1)] = 3,
    base_steps: Annotated[int, typer.Option(help="Steps of the Pre-LN model on the first part.")] = Settings.base_steps,
    steps: Annotated[int, typer.Option(help="Training steps of each way on the second part.", min=10)] = Settings.steps,
    layers: Annotated[int, typer.Option(help="Number of layers.", min=2)] = Settings.layers,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of each way.")] = Settings.learning_rate,
    way: Annotated[list[str], typer.Option(help="Run only this way, by its name in the table; repeatable.")] = [],  # noqa: B006
    only_print: Annotated[bool, typer.Option("--only-print", help="Print the finished runs without training.")] = False,
) -> None:
    settings = Settings(base_steps=base_steps, steps=steps, layers=layers, learning_rate=learning_rate)
    if unknown := [name for name in way if name not in ways(settings)]:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(ways(settings))}", param_hint="--way")
    saved = out / "settings.json"
    if saved.exists() and json.loads(saved.read_text(encoding="utf-8")) != asdict(settings):
        raise typer.BadParameter(
            f"{out} contains runs with other settings ({saved}); choose another folder", param_hint="--out"
        )
    out.mkdir(parents=True, exist_ok=True)
    write(saved, asdict(settings))
    if not only_print:
        logging.disable_progress_bar()  # for loading and saving
        data = windows(text, settings)
        log(f"tokens: {', '.join(f'{part.numel():,}' for part in data)} (first, second, held-out part)")
        for seed in range(seeds):
            folder = out / f"seed-{seed}"
            folder.mkdir(exist_ok=True)
            for name, convert in ways(settings).items():
                if not way or name in way:
                    run_way(name, convert, data, settings, seed, folder)
    report(out, settings)


if __name__ == "__main__":
    typer.run(main)
