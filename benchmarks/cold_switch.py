"""Measures what happens when LayerNorm Scaling is switched on in a finished Pre-LN checkpoint.

    python benchmarks/cold_switch.py CHECKPOINT TEXT_FILE

Prints the perplexity on the first windows of a text, of the checkpoint as it is and with the scale switched on without
any training.
"""

from __future__ import annotations

import math
import statistics
import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer
from judging import losses
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_lnscale  # noqa: F401


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
        found = losses(model.eval(), {"text": windows})["text"]
        table.add_row(str(ln_scaling), f"{math.exp(statistics.fmean(found)):,.2f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
