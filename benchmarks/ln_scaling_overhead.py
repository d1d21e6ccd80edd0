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
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_lnscale
from hf_lnscale.evaluation import speed

# Name: hidden size, MLP size, heads, layers, vocabulary; from 130M on as in the paper (arXiv 2502.05795, table 8).
SIZES = {
    "tiny": (64, 192, 2, 4, 1024),
    "10M": (256, 688, 4, 12, 4096),
    "130M": (768, 2048, 12, 12, 32000),
    "350M": (1024, 2736, 16, 24, 32000),
    "1B": (2048, 5461, 32, 24, 32000),
    "7B": (4096, 11008, 32, 32, 32000),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALINGS = {"plain": False, "LNS": True, "warmup": {"warmup_steps": 1_000_000}}


def build(size: str, scaling: str, mode: str) -> torch.nn.Module:
    hidden, mlp, heads, layers, vocabulary = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        use_cache=False,
    )
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, ln_scaling=SCALINGS[scaling])
    if DEVICE == "cuda":
        model = model.to(torch.bfloat16)
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


def seconds(run: Callable[[], None]) -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def pairs(plain: Callable[[], None], scaled: Callable[[], None], count: int, what: str) -> list[float]:
    """Ratios of the times of `scaled` to those of `plain`, run in alternation."""
    runs = (plain, scaled)
    for run in runs * 3:
        seconds(run)
    ratios = []
    for number in track(range(count), what, transient=True):
        order = (0, 1) if number % 2 else (1, 0)
        times = {which: seconds(runs[which]) for which in order}
        ratios.append(times[1] / times[0])
    return ratios


def quartiles(ratios: list[float]) -> str:
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return f"{low:.3f} to {high:.3f}"


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
    size: Annotated[str, typer.Option(help=f"One of {', '.join(SIZES)}.")] = "10M",
    mode: Annotated[list[str], typer.Option(help="eager, compile or liger; repeatable.")] = ["eager"],  # noqa: B006
    count: Annotated[int, typer.Option(help="Number of pairs to time.")] = 60,
    batch: Annotated[int, typer.Option(help="Sequences per batch.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
) -> None:
    if size not in SIZES:
        raise typer.BadParameter(f"{size!r} is not one of {', '.join(SIZES)}", param_hint="--size")
    hardware = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    title = (
        f"LayerNorm Scaling, Llama {size}, {batch} x {length} tokens, {count} pairs\n"
        f"{hardware}, torch {torch.__version__}, hf_lnscale {hf_lnscale.__version__}"
    )
    columns = ("mode", "what", "compared", "median ratio", "quartiles", "peak memory, plain", "with the scale")
    for one in mode:
        table = Table(*columns, title=title)
        memory = peaks_of_memory(size, one, (batch, length))
        for work in (forward, train_step):
            torch._dynamo.reset()
            tokens_BT = torch.randint(0, SIZES[size][4], (batch, length), device=DEVICE)
            plain = work(build(size, "plain", one), tokens_BT)
            for scaling in SCALINGS:
                ratios = pairs(plain, work(build(size, scaling, one), tokens_BT), count, f"{one} {work.__name__}")
                table.add_row(
                    one,
                    work.__name__,
                    f"{scaling} / plain",
                    f"{statistics.median(ratios):.3f}",
                    quartiles(ratios),
                    *(memory if scaling == "LNS" and work is train_step else ("", "")),
                )
        Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
