"""Measures what happens when LayerNorm Scaling is switched on in a finished Pre-LN checkpoint.

    python benchmarks/cold_switch.py CHECKPOINT TEXT_FILE

Prints the perplexity on the first windows of a text, of the checkpoint as it is and with the scale switched on without
any training.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_lnscale  # noqa: F401


@torch.no_grad()
def perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """Next-token perplexity over windows of shape (N, T)."""
    losses = [model(window[None], labels=window[None]).loss.double() for window in windows]
    return math.exp(torch.stack(losses).mean().item())


def main(
    checkpoint: Annotated[str, typer.Argument(help="A Pre-LN checkpoint: a folder or a name on the Hub.")],
    text: Annotated[Path, typer.Argument(help="A UTF-8 text file.")],
    count: Annotated[int, typer.Option(help="Number of windows.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
) -> None:
    ids = AutoTokenizer.from_pretrained(checkpoint)(text.read_text(encoding="utf-8")).input_ids[: count * length]
    windows = torch.tensor(ids).reshape(-1, length)
    table = Table("ln_scaling", "perplexity", title=f"{checkpoint}, {len(windows)} windows of {length} tokens")
    for ln_scaling in (None, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model = AutoModelForCausalLM.from_pretrained(checkpoint, ln_scaling=ln_scaling)
        table.add_row(str(ln_scaling), f"{perplexity(model.eval(), windows):,.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
