"""Shared by the benchmarks of time: models, options, and two ways of doing the same that run in alternation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import typer
from judging import DEVICE
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import hf_lnscale
from hf_lnscale.measuring.text import TokenBatches, Windows, token_batches

# Name: hidden size, MLP size, heads, layers, vocabulary; from 130M on as in the paper (arXiv 2502.05795, table 8).
SIZES = {
    "tiny": (64, 192, 2, 4, 1024),
    "10M": (256, 688, 4, 12, 4096),
    "130M": (768, 2048, 12, 12, 32000),
    "350M": (1024, 2736, 16, 24, 32000),
    "1B": (2048, 5461, 32, 24, 32000),
    "7B": (4096, 11008, 32, 32, 32000),
    "16 layers of 512": (512, 1376, 8, 16, 8192),
}


def one_of(names: Iterable[str], text: str = "One of {}.") -> Any:
    """An option that takes a name, or several names, and no other value; {} in its help stands for the names."""
    known = list(names)

    def check(value: str | list[str]) -> str | list[str]:
        for one in [value] if isinstance(value, str) else value:
            if one not in known:
                raise typer.BadParameter(f"{one!r} is not one of {', '.join(known)}")
        return value

    return typer.Option(help=text.format(", ".join(known)), callback=check)


def random_llama(size: str, dtype: torch.dtype | None = None, ln_scaling: Any = None, **config: Any) -> Any:
    """A Llama with the same random weights in every call; in bfloat16 on a GPU unless a dtype is given."""
    hidden, mlp, heads, layers, vocabulary = SIZES[size]
    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=hidden, intermediate_size=mlp, num_attention_heads=heads, num_hidden_layers=layers,
        vocab_size=vocabulary, **config,
    )  # fmt: skip
    dtype = dtype or (torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(shape, dtype=dtype, ln_scaling=ln_scaling)


def machine(threads: bool = True) -> str:
    cpu = f"CPU, {torch.get_num_threads()} threads" if threads else "CPU"
    hardware = torch.cuda.get_device_name() if DEVICE == "cuda" else cpu
    return f"{hardware}, torch {torch.__version__}, hf_lnscale {hf_lnscale.__version__}"


class Subject(NamedTuple):
    """The model and the data to measure on."""

    name: str
    model: Any
    data: TokenBatches

    def title(self, what: str, pairs: int | None = None) -> str:
        counted = f", {pairs} pairs" if pairs else ""
        data = f"{self.data.num_sequences} sequences, {self.data.num_tokens:,} tokens{counted}"
        return f"{what}: {self.name}, {data}\n{machine()}"


def subject(
    checkpoint: str | None, text: Path | None, sequences: int, length: int, size: str = "16 layers of 512",
    dtype: str | None = None, **config: Any,
) -> Subject:  # fmt: skip
    """A checkpoint with the start of a text, or a random Llama with random tokens."""
    if bool(checkpoint) != bool(text):
        raise typer.BadParameter("pass both --checkpoint and --text, or neither", param_hint="--text")
    shown = f", {dtype}" if dtype else ""
    if checkpoint:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype or "float32").to(DEVICE)
        tokenizer, windows = AutoTokenizer.from_pretrained(checkpoint), Windows(sequences * length, length, 4)
        data = token_batches(str(text), tokenizer=tokenizer, windows=windows)
        return Subject(Path(checkpoint).name + shown, model.eval(), data)
    model = random_llama(size, getattr(torch, dtype) if dtype else None, **config)
    data = token_batches(list(torch.randint(0, model.config.vocab_size, (sequences, length)).split(4)))
    return Subject(f"random Llama, {size}{shown}", model.eval(), data)


def now() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = now()
    found = run()
    return now() - start, found


def ratios(
    ours: Callable[[], Any], other: Callable[[], Any], count: int, what: str, warmup: int = 1
) -> tuple[list[float], list[Any]]:
    """Ratios of the times of `ours` to those of `other`, run in alternation, and the last result of each."""
    runs = (ours, other)
    for _ in range(warmup):
        found = [run() for run in runs]
    times = []
    for number in track(range(count), what, transient=True):
        pair = {}
        for which in (0, 1) if number % 2 else (1, 0):
            pair[which], found[which] = timed(runs[which])
        times.append(pair[0] / pair[1])
    return times, found


def quartiles(times: list[float], method: str = "exclusive", digits: int = 3) -> tuple[str, str]:
    """The median, and the range between the other two quartiles, as text."""
    low, _, high = statistics.quantiles(times, n=4, method=method) if len(times) > 1 else times * 3
    return f"{statistics.median(times):.{digits}f}", f"{low:.{digits}f} to {high:.{digits}f}"
