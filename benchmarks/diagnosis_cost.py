"""What each part of a diagnosis costs, measured in plain forward passes over the same data.

    python benchmarks/diagnosis_cost.py                                    # a small random Llama
    python benchmarks/diagnosis_cost.py --checkpoint NAME --text FILE --dtype bfloat16

Prints one table. Each part alternates with plain passes, so that changes in the speed of the machine affect both. The
table shows the median and quartiles of the ratio over all pairs, beside the cost that `diagnose` announces. The plain
pass is that of the model itself in evaluation mode, without gradients and without a cache. It includes the head for the
parts that need it, but not for the stream, which is documented to take at most 2 passes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from timing import DEVICE, quartiles, ratios, subject

from hf_lnscale.core.stack import text_stack
from hf_lnscale.diagnosis.examine import first_sequences, forward_passes
from hf_lnscale.diagnosis.measure import jacobian_distances
from hf_lnscale.measuring.losses import sweep
from hf_lnscale.measuring.stream_pass import measure_stream

PROBES, SEQUENCES = 2, 8


def main(
    checkpoint: Annotated[str | None, typer.Option(help="A folder or a name on the Hub; requires --text.")] = None,
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text file to measure on.")] = None,
    dtype: Annotated[str, typer.Option(help="Data type of the weights.")] = "float32",
    count: Annotated[int, typer.Option(help="Pairs to time for the stream; a fifth as many for other parts.")] = 20,
    sequences: Annotated[int, typer.Option(help="Number of sequences.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
) -> None:
    it = subject(checkpoint, text, sequences, length, dtype=dtype)
    model, data = it.model, it.data
    few = first_sequences(data, SEQUENCES)
    announced = forward_passes(text_stack(model), few.num_tokens / data.num_tokens, PROBES)

    @torch.no_grad()
    def plain(module: Any = model) -> None:
        for batch in data:
            module(**batch.to(DEVICE).model_inputs(), use_cache=False)

    def decoder() -> None:
        plain(model.model)

    slow = max(2, count // 5)
    parts: list[tuple[str, str, Callable[[], object], Callable[[], object], float, int]] = [
        ("a plain pass of the decoder", "itself", decoder, decoder, 1.0, count),
        ("stream", "decoder", lambda: measure_stream(model, data), decoder, 1.0, count),
        ("loss", "decoder and head", lambda: sweep(model, data, progress=False), plain, announced["loss"], slow),
        ("jacobian", "decoder and head", lambda: jacobian_distances(model, few, PROBES, lambda share: None), plain,
         announced["jacobian"], slow),
    ]  # fmt: skip
    table = Table("part", "in passes of", "median of pairs", "quartiles", "announced")
    table.title = it.title("cost of a diagnosis")
    for part, unit, ours, other, said, pairs in parts:
        times, _ = ratios(ours, other, pairs, part)
        table.add_row(part, unit, *quartiles(times, digits=2), f"{said:.1f}")
    Console(width=130).print(table)


if __name__ == "__main__":
    typer.run(main)
