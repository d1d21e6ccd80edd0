"""What each part of a diagnosis costs, measured in plain forward passes over the same data.

    python benchmarks/diagnosis_cost.py                                    # a small random Llama
    python benchmarks/diagnosis_cost.py --checkpoint NAME --text FILE --dtype bfloat16

Prints one table. Each part alternates with plain passes, so that changes in the speed of the machine affect both. The
table shows the median and quartiles of the ratio over all pairs, beside the cost that `diagnose` announces. The plain
pass is that of the model itself in evaluation mode, without gradients and without a cache. It includes the head for the
parts that need it, but not for the stream, which is documented to take at most 2 passes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import hf_lnscale
from hf_lnscale.core.stack import text_stack
from hf_lnscale.diagnosis.examine import first_sequences, forward_passes
from hf_lnscale.diagnosis.measure import jacobian_distances
from hf_lnscale.measuring.losses import sweep
from hf_lnscale.measuring.stream_pass import measure_stream
from hf_lnscale.measuring.text import TokenBatches, Windows, token_batches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROBES, SEQUENCES = 2, 8


def subject(checkpoint: str | None, text: Path | None, dtype: str, sequences: int, length: int) -> tuple[str, Any, Any]:
    """A checkpoint with the start of a text, or a random Llama of 16 layers with random tokens."""
    if checkpoint:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
        data = token_batches(
            str(text),
            tokenizer=AutoTokenizer.from_pretrained(checkpoint),
            windows=Windows(sequences * length, length, batch_size=4),
        )
        return f"{Path(checkpoint).name}, {dtype}", model.to(DEVICE).eval(), data
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_attention_heads=8, num_hidden_layers=16, vocab_size=8192
    )
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).to(DEVICE).eval()
    data = token_batches(list(torch.randint(0, 8192, (sequences, length)).split(4)))
    return f"random Llama, 16 layers of 512, {dtype}", model, data


def timed(run: Callable[[], object]) -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def plain(model: Any, data: TokenBatches) -> None:
    for batch in data:
        model(**batch.to(DEVICE).model_inputs(), use_cache=False)


def ratios(ours: Callable[[], object], other: Callable[[], object], count: int, what: str) -> list[float]:
    ours(), other()  # not timed, as the first runs are slower
    found = []
    for number in track(range(count), what, transient=True):
        times = {}
        for which in (0, 1) if number % 2 else (1, 0):
            times[which] = timed((ours, other)[which])
        found.append(times[0] / times[1])
    return found


def main(
    checkpoint: Annotated[str | None, typer.Option(help="A folder or a name on the Hub; requires --text.")] = None,
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text file to measure on.")] = None,
    dtype: Annotated[str, typer.Option(help="Data type of the weights.")] = "float32",
    count: Annotated[int, typer.Option(help="Pairs to time for the stream; a fifth as many for other parts.")] = 20,
    sequences: Annotated[int, typer.Option(help="Number of sequences.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
) -> None:
    if bool(checkpoint) != bool(text):
        raise typer.BadParameter("pass both --checkpoint and --text, or neither", param_hint="--text")
    name, model, data = subject(checkpoint, text, dtype, sequences, length)
    few = first_sequences(data, SEQUENCES)
    announced = forward_passes(text_stack(model), few.num_tokens / data.num_tokens, PROBES)

    def nothing(share: float) -> None: ...

    base, slow = model.model, max(2, count // 5)
    parts: list[tuple[str, str, Callable[[], object], Callable[[], object], float, int]] = [
        ("a plain pass of the decoder", "itself", lambda: plain(base, data), lambda: plain(base, data), 1.0, count),
        ("stream", "decoder", lambda: measure_stream(model, data), lambda: plain(base, data), 1.0, count),
        (
            "loss", "decoder and head", lambda: sweep(model, data, progress=False), lambda: plain(model, data),
            announced["loss"], slow,
        ),
        (
            "jacobian", "decoder and head", lambda: jacobian_distances(model, few, PROBES, nothing),
            lambda: plain(model, data), announced["jacobian"], slow,
        ),
    ]  # fmt: skip
    hardware = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    table = Table("part", "in passes of", "median of pairs", "quartiles", "announced")
    table.title = (
        f"cost of a diagnosis: {name}, {data.num_sequences} sequences, {data.num_tokens:,} tokens\n{hardware}, torch "
        f"{torch.__version__}, hf_lnscale {hf_lnscale.__version__}"
    )
    for part, unit, ours, other, said, pairs in parts:
        found = ratios(ours, other, pairs, part)
        low, _, high = statistics.quantiles(found, n=4)
        table.add_row(part, unit, f"{statistics.median(found):.2f}", f"{low:.2f} to {high:.2f}", f"{said:.1f}")
    Console(width=130).print(table)


if __name__ == "__main__":
    typer.run(main)
