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
import shutil
import statistics
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import transformers
import typer
from judging import Records
from matplotlib.figure import Figure
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
from hf_lnscale.checkpoints.folders import write_atomically
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


class Way(NamedTuple):
    """A way of converting.

    Attributes:
        name: in the table; {} stands for the number of steps in the share.
        share: the fraction of the steps that the warmup, or the decay of the compensation, takes.
        scaled: False to stay Pre-LN.
        schedule: of the warmup.
        deeper_half: whether only the deeper half of the layers is scaled.
        compensated: whether the norm weights are multiplied by sqrt(l) to make up for the scale.
    """

    name: str
    share: float = 0.0
    scaled: bool = True
    schedule: str = "linear"
    deeper_half: bool = False
    compensated: bool = False

    def convert(self, base: Path, settings: Settings) -> tuple[LlamaForCausalLM, list[TrainerCallback]]:
        """The model that training continues with, and the callbacks that it needs."""
        steps, layers = round(self.share * settings.steps), settings.layers
        if self.compensated or not self.scaled:
            model = LlamaForCausalLM.from_pretrained(base)
            if self.compensated:
                multiply_norm_weights(model, 0.5)
                hf_lnscale.apply_ln_scaling(model)
            return model, [DecayBack(steps)] if steps else []
        ln_scaling: Any = True
        if steps:
            depths = [*[1] * (layers // 2), *range(layers // 2 + 1, layers + 1)] if self.deeper_half else None
            ln_scaling = {"warmup_steps": steps, "schedule": self.schedule, "depths": depths}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the warning about a cold switch
            model = LlamaForCausalLM.from_pretrained(base, ln_scaling=ln_scaling)
        return model, [LNScalingWarmupCallback()] if steps else []


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


DEFAULT_OUT = Path("build/converting")
FROM_THE_START = "LNS from the start"
WAYS = (
    Way("plain", scaled=False),
    Way("cold"),
    Way("ramp {}", 0.1),
    Way("ramp {}", 0.4),
    Way("ramp {}", 0.8),
    Way("ramp {}, cosine", 0.4, schedule="cosine"),
    Way("ramp {}, deeper half", 0.4, deeper_half=True),
    Way("compensated", compensated=True),
    Way("compensated, decayed {}", 0.4, compensated=True),
    Way(FROM_THE_START, scaled=False),  # its base is scaled already
)


def ways(settings: Settings) -> dict[str, Way]:
    return {way.name.format(round(way.share * settings.steps)): way for way in WAYS}


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


# --- training -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A training run of a way, or of the "base" or "base-lns" that it starts from."""

    way: str
    seed: int


class Bench:
    """The runs of a folder.

    Args:
        out: the folder.
        settings: those of all runs.
        data: the first, second and held-out parts; may be empty if nothing is trained.
    """

    def __init__(self, out: Path, settings: Settings, data: list[torch.Tensor]) -> None:
        self.out, self.settings, self.data = out, settings, data
        self.records = Records(out / "runs.jsonl", Run)

    def convert(self, name: str, seed: int) -> None:
        """Trains one of the ways, unless this is done."""
        if (run := Run(name, seed)) not in self.records:
            base = self.base(seed, "base-lns" if name == FROM_THE_START else "base")
            model, callbacks = ways(self.settings)[name].convert(base, self.settings)
            self.train(run, model, callbacks, self.data[1], self.settings.steps, self.settings.learning_rate)

    def base(self, seed: int, name: str) -> Path:
        """The base checkpoint, trained if it does not exist yet."""
        path, settings = self.out / f"seed-{seed}" / name, self.settings
        if (run := Run(name, seed)) not in self.records:
            set_seed(seed)
            config = LlamaConfig(
                vocab_size=settings.vocabulary, hidden_size=settings.hidden, intermediate_size=settings.mlp,
                num_hidden_layers=settings.layers, num_attention_heads=settings.heads,
                max_position_embeddings=settings.window, use_cache=False, ln_scaling=name == "base-lns",
            )  # fmt: skip
            model = LlamaForCausalLM(config)
            self.train(run, model, [], self.data[0], settings.base_steps, settings.base_learning_rate, path)
        return path

    def train(
        self, run: Run, model: LlamaForCausalLM, callbacks: list[TrainerCallback], train_NT: torch.Tensor, steps: int,
        learning_rate: float, save: Path | None = None,
    ) -> None:  # fmt: skip
        """Trains in place, as the paper does at scale, measures, and adds the figures to the records.

        `history` holds (step, evaluation loss) at the start and then eight times.
        """
        start, settings = time.perf_counter(), self.settings
        arguments = TrainingArguments(
            output_dir=str(self.out / "trainer"), max_steps=steps, seed=run.seed,
            per_device_train_batch_size=settings.batch, per_device_eval_batch_size=settings.batch,
            learning_rate=learning_rate, lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.1}, warmup_steps=steps // 10, adam_beta2=0.95, weight_decay=0.0,
            max_grad_norm=1.0, eval_strategy="steps", eval_steps=max(1, steps // 8), eval_on_start=True,
            logging_strategy="no", save_strategy="no", report_to="none", use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False, disable_tqdm=not sys.stderr.isatty(),
        )  # fmt: skip
        held_out_NT, measured_NT = self.data[2], self.some_of(self.data[2])
        rows = ([{"input_ids": ids, "labels": ids} for ids in windows_NT] for windows_NT in (train_NT, measured_NT))
        trainer = Trainer(model, arguments, None, *rows, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        if save:
            shutil.rmtree(save, ignore_errors=True)
            model.save_pretrained(save)
        found = hf_lnscale.diagnose(model, measured_NT, jacobian=False, progress=False)
        figures = {
            "evaluation_loss": loss(model, held_out_NT, settings.batch),
            "loss_on_its_own_part": loss(model, self.some_of(train_NT), settings.batch),
            "residual_variance": [place["variance_without_first"] for place in found.residual],
            "loss_added_by_removing_each_layer": found.values("loss_added"),
            "scales": hf_lnscale.ln_scales(model),
            "history": [(entry["step"], entry["eval_loss"]) for entry in log],
            "seconds": time.perf_counter() - start,
        }
        self.records.add(run, figures)
        shown = f"loss {figures['evaluation_loss']:.4f}, {figures['seconds']:.0f} s"
        print(time.strftime("%H:%M:%S"), f"seed {run.seed}, {run.way}: {shown}", flush=True)

    def some_of(self, windows_NT: torch.Tensor) -> torch.Tensor:
        """Some of the windows, spread evenly."""
        count = min(self.settings.measured_windows, len(windows_NT))
        return windows_NT[torch.linspace(0, len(windows_NT) - 1, count).long()]


@torch.no_grad()
def loss(model: LlamaForCausalLM, windows_NT: torch.Tensor, batch: int) -> float:
    """Mean cross-entropy of the next token, in nats."""
    model.eval()
    losses = [model(ids, labels=ids).loss.item() * len(ids) for ids in windows_NT.to(model.device).split(batch)]
    return sum(losses) / len(windows_NT)


# --- results --------------------------------------------------------------------------------------------------------


def against(runs: dict[int, dict[str, Any]], plain_runs: dict[int, dict[str, Any]]) -> tuple[float, float] | None:
    """The mean difference in evaluation loss within each seed, and its standard error."""
    pairs = [run["evaluation_loss"] - plain_runs[s]["evaluation_loss"] for s, run in runs.items() if s in plain_runs]
    if len(pairs) < 2:
        return None
    return statistics.mean(pairs), statistics.stdev(pairs) / math.sqrt(len(pairs))


def report(bench: Bench) -> None:
    out, settings = bench.out, bench.settings
    runs = sorted(bench.records.items(), key=lambda one: one[0].seed)
    names = ["base", *ways(settings)]
    found = {name: {run.seed: figures for run, figures in runs if run.way == name} for name in names}
    found = {name: runs for name, runs in found.items() if runs}
    half, seeds = settings.layers // 2, sorted({seed for runs in found.values() for seed in runs})
    table = Table(
        "way", "seeds", "evaluation loss (± sd)", "against plain (± se)",
        f"residual variance, after layer 1 / {settings.layers}",
        "loss added by removing a layer: shallower / deeper half",
        title=f"Llama, {settings.layers} layers of {settings.hidden}; {settings.base_steps} steps of "
        f"{settings.batch * settings.window:,} tokens on the first part, {settings.steps} on the second; seeds {seeds}",
    )  # fmt: skip
    summary = {}
    for name, runs in found.items():
        difference = against(runs, found.get("plain", {})) if name not in ("base", "plain") else None
        losses, variances, added = (
            [run[key] for run in runs.values()]
            for key in ("evaluation_loss", "residual_variance", "loss_added_by_removing_each_layer")
        )
        spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
        halves = (slice(0, half), slice(half, None))
        table.add_row(
            "before (Pre-LN)" if name == "base" else name,
            str(len(runs)),
            f"{statistics.mean(losses):.3f}{spread}",
            f"{difference[0]:+.4f} ± {difference[1]:.4f}" if difference else "",
            " / ".join(f"{statistics.mean(one[place] for one in variances):.3g}" for place in (1, -1)),
            " / ".join(f"{statistics.mean(statistics.mean(one[part]) for one in added):.4f}" for part in halves),
        )
        summary[name] = {"against_plain": difference, "runs": runs}
    Console(width=150).print(table)
    versions = {module.__name__: module.__version__ for module in (hf_lnscale, transformers, torch)}
    results = {"settings": asdict(settings), "versions": versions, "ways": summary}
    write_atomically(out / "results.json", json.dumps(results, indent=2) + "\n")
    plot({name: found[name] for name in ways(settings) if name in found}, settings, out / "converting.png")
    print(f"{out / 'results.json'}, {out / 'converting.png'}")


def plot(found: dict[str, dict[int, dict[str, Any]]], settings: Settings, path: Path) -> None:
    figure = Figure(figsize=(18, 4.6), layout="constrained")
    curves, end, growth, worth = figure.subplots(1, 4)
    curves.set(title="Evaluation loss", xlabel="step on the second part", ylabel="nats per token")
    end.set(title="Final loss minus plain", xlabel="nats per token, mean and standard error")
    growth.set(title="Residual stream", xlabel="after layer", ylabel="variance", yscale="log")
    worth.set(title="What each layer does", xlabel="layer removed", ylabel="loss added, nats per token")
    for number, (name, runs) in enumerate(found.items()):
        histories = [zip(*run["history"], strict=True) for run in runs.values()]  # steps and losses
        (steps, *_), each = zip(*histories, strict=True)
        losses, variance, added = (
            [statistics.mean(values) for values in zip(*lists, strict=True)]
            for lists in (
                each,
                [run["residual_variance"] for run in runs.values()],
                [run["loss_added_by_removing_each_layer"] for run in runs.values()],
            )
        )
        line: dict[str, Any] = {"color": f"C{number % 10}", "ls": ":" if name == FROM_THE_START else "-"}
        curves.plot(steps, losses, label=name, **line)
        if name == "plain":
            curves.set_ylim(top=losses[0] + 0.4)  # a cold switch starts far above this
        elif difference := against(runs, found.get("plain", {})):
            end.errorbar(difference[0], number, xerr=difference[1], fmt="o", color=line["color"], capsize=3)
        growth.plot(variance, **line)
        worth.plot(range(1, settings.layers + 1), added, **line)
    end.set(yticks=range(len(found)), yticklabels=list(found), ylim=(len(found) - 0.5, -0.5))
    end.axvline(0, color="gray", lw=1)
    worth.set_yscale("symlog", linthresh=1e-2)
    curves.legend(frameon=False, fontsize=8)
    for axis in (curves, end, growth, worth):
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=150)


def main(
    text: Annotated[
        Path, typer.Argument(help="A UTF-8 text file of at least one megabyte.", exists=True, dir_okay=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder of the runs; finished runs are not repeated.")] = DEFAULT_OUT,
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
        problem = f"{out} contains runs with other settings ({saved}); choose another folder"
        raise typer.BadParameter(problem, param_hint="--out")
    write_atomically(saved, json.dumps(asdict(settings), indent=2) + "\n")
    bench = Bench(out, settings, [] if only_print else windows(text, settings))
    if not only_print:
        logging.disable_progress_bar()  # for loading and saving
        sizes = ", ".join(f"{part.numel():,}" for part in bench.data)
        print(time.strftime("%H:%M:%S"), f"tokens: {sizes} (first, second, held-out part)", flush=True)
        for seed in range(seeds):
            for name in ways(settings):
                if not way or name in way:
                    bench.convert(name, seed)
    report(bench)


if __name__ == "__main__":
    typer.run(main)
