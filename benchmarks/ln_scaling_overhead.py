"""What LayerNorm Scaling costs: times a forward pass and a training step with and without the scale, in alternation.

    python benchmarks/ln_scaling_overhead.py                       # a small Llama, on the GPU if there is one
    python benchmarks/ln_scaling_overhead.py --size 130M --mode eager --mode compile --mode liger

Prints one table per mode. A ratio of 1.00 means that the scale costs nothing. The two models alternate, one forward
pass (or training step) each, so that changes in the speed of the machine affect both. The table shows the median and
quartiles of the ratio over all pairs. The row "plain" compares two models without the scale: its distance from 1.00 is
the noise of the measurement. "warmup" is a model whose exponent changes after every training step, as with
LNScalingWarmupCallback. Peak memory is measured in a separate process for each model.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from timing import DEVICE, SIZES, machine, one_of, quartiles, random_llama, ratios

import hf_lnscale
from hf_lnscale.evaluation import speed

SCALINGS = {"plain": False, "LNS": True, "warmup": {"warmup_steps": 1_000_000}}
MODES = ("eager", "compile", "liger")


def build(size: str, scaling: str, mode: str = "eager") -> torch.nn.Module:
    model = random_llama(size, ln_scaling=SCALINGS[scaling], use_cache=False)
    if mode == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=model)
    if mode == "compile":
        model.compile()
    return model


def forward(model: torch.nn.Module, tokens_BT: torch.Tensor) -> Callable[[], None]:
    @torch.no_grad()
    def run() -> None:
        model(tokens_BT)

    return run


def train_step(model: torch.nn.Module, tokens_BT: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    warming_up = "warmup_steps" in (getattr(model, "module", model).config.ln_scaling or {})
    steps = itertools.count(1)

    def run() -> None:
        model(tokens_BT, labels=tokens_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if warming_up:
            hf_lnscale.set_ln_scaling_step(model, next(steps))

    return run


def peaks_of_memory(size: str, mode: str, shape: tuple[int, int]) -> list[str]:
    """Peak MiB of three training steps, plain and with the scale, each in its own process."""
    code = "import ln_scaling_overhead as b; print(b.own_peak({!r}, {!r}, {!r}, {!r}))"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code.format(size, scaling, mode, shape)],
            cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True,
        )
        for scaling in ("plain", "LNS")
    ]  # fmt: skip
    printed = [one.communicate()[0] for one in running]
    return [f"{float(one.split()[-1]):.0f} MiB" if one.strip() else "failed" for one in printed]


def own_peak(size: str, scaling: str, mode: str, shape: tuple[int, int]) -> float:
    run = train_step(build(size, scaling, mode), torch.randint(0, SIZES[size][4], shape, device=DEVICE))
    for _ in range(3):
        run()
    return speed.peak_memory(DEVICE) / 2**20


def main(
    size: Annotated[str, one_of(SIZES)] = "10M",
    mode: Annotated[list[str], one_of(MODES, "{}; repeatable.")] = ["eager"],  # noqa: B006
    count: Annotated[int, typer.Option(help="Number of pairs to time.")] = 60,
    batch: Annotated[int, typer.Option(help="Sequences per batch.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
) -> None:
    title = f"LayerNorm Scaling, Llama {size}, {batch} x {length} tokens, {count} pairs\n{machine()}"
    columns = ("mode", "what", "compared", "median ratio", "quartiles", "peak memory, plain", "with the scale")
    for one in mode:
        table = Table(*columns, title=title)
        memory = peaks_of_memory(size, one, (batch, length))
        for work in (forward, train_step):
            torch._dynamo.reset()
            tokens_BT = torch.randint(0, SIZES[size][4], (batch, length), device=DEVICE)
            plain = work(build(size, "plain", one), tokens_BT)
            for scaling in SCALINGS:
                scaled = work(build(size, scaling, one), tokens_BT)
                times, _ = ratios(scaled, plain, count, f"{one} {work.__name__}", warmup=3)
                peaks = memory if scaling == "LNS" and work is train_step else ("", "")
                table.add_row(one, work.__name__, f"{scaling} / plain", *quartiles(times, "inclusive"), *peaks)
        Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
