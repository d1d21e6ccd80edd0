"""What DepthStatsCallback costs: times a measured Trainer step against the next step, which is not measured.

    python benchmarks/depth_stats.py                      # a small Llama, on the GPU if there is one
    python benchmarks/depth_stats.py --size 130M --mode eager --mode compile

Prints one table: every second step of a run is measured, and the table shows the median and quartiles of the ratio over
all pairs of steps. The row "none" is the same run without the callback, as a measure of the noise. The callback does
nothing between measured steps, so the last column, the cost at the default interval, is the excess of the median
divided by that interval. This also holds for a compiled model, whose measured steps run eagerly.
"""

from __future__ import annotations

import inspect
import statistics
import tempfile
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset
from ln_scaling_overhead import build
from rich.console import Console
from rich.table import Table
from timing import DEVICE, SIZES, machine, now, one_of, quartiles
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lnscale.training import DepthStatsCallback

INTERVAL = inspect.signature(DepthStatsCallback).parameters["every_n_steps"].default


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def note(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(now())


class Start(Clock):
    """Records when each step begins; added first, so that it runs before the other callbacks."""

    on_step_begin = Clock.note


class End(Clock):
    """Records when each step ends; added last, so that it runs after the other callbacks."""

    on_step_end = Clock.note


def step_ratios(size: str, mode: str, measured: bool, shape: tuple[int, int], count: int) -> list[float]:
    """The time of each measured step divided by that of the next one, without the first pairs (warmup)."""
    model = build(size, "LNS")
    ids = torch.randint(0, SIZES[size][4], (64, shape[1])).tolist()
    start, end, warm = Start(), End(), 4
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, per_device_train_batch_size=shape[0], max_steps=2 * (count + warm) + 1, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=DEVICE == "cpu",
            torch_compile=mode == "compile",
        )  # fmt: skip
        data = Dataset.from_dict({"input_ids": ids, "labels": ids})
        trainer = Trainer(model, args, train_dataset=data, callbacks=[start])
        if measured:
            trainer.add_callback(DepthStatsCallback(trainer, every_n_steps=2))
        trainer.add_callback(end)
        trainer.train()
    seconds = [after - before for before, after in zip(start.times, end.times, strict=True)]
    seconds = seconds[1 + 2 * warm :]  # steps 2, 4, ... are measured
    return [one / other for one, other in zip(seconds[::2], seconds[1::2], strict=True)]


def main(
    size: Annotated[str, one_of(SIZES)] = "10M",
    mode: Annotated[list[str], one_of(("eager", "compile"), "{}; repeatable.")] = ["eager"],  # noqa: B006
    count: Annotated[int, typer.Option(help="Number of pairs to time.")] = 40,
    batch: Annotated[int, typer.Option(help="Sequences per batch.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
) -> None:
    table = Table("mode", "callback", "measured step / next step", "quartiles", f"cost at one step in {INTERVAL}")
    table.title = f"DepthStatsCallback, Llama {size}, {batch} x {length} tokens, {count} pairs\n{machine()}"
    for one in mode:
        for measured in (False, True):
            torch._dynamo.reset()
            times = step_ratios(size, one, measured, (batch, length), count)
            cost = f"{(statistics.median(times) - 1) / INTERVAL:.3%}" if measured else ""
            table.add_row(one, "every 2nd step" if measured else "none", *quartiles(times), cost)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
