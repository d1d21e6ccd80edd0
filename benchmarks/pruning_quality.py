"""What dropping layers costs, by the rule that chose them: perplexity before and after healing, without any training.

    python benchmarks/pruning_quality.py CHECKPOINT TEXT_FILE --dtype bfloat16

Layers are chosen and healing is fitted on the first part of the text; perplexity is on its last windows, which neither
has seen. Peers are run by their rule, on the same data: "deepest" and "angular" of Gromov et al. (arXiv 2403.17887),
"block_influence" of ShortGPT (2403.03853), "angular" with "linear" healing, which is ReplaceMe (2505.02819).
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from hf_lnscale.depth.data import TokenBatches, token_batches
from hf_lnscale.depth.heal import healed
from hf_lnscale.depth.scores import loss_without
from hf_lnscale.depth.search import plan_pruning

PEERS = ("deepest", "block_influence", "angular")
OURS = ("perplexity", "kl", "greedy", "greedy_healed", "beam", "best_of")


def parts(
    text: Path, model: torch.nn.Module, calibration: int, test: int, seq_len: int
) -> tuple[TokenBatches, TokenBatches]:
    """The first windows of the text, and the last ones."""
    batches = token_batches(text, model, num_tokens=None, seq_len=seq_len)
    rest, last = batches.split(test / batches.num_tokens)
    first, _ = rest.split(1 - calibration / rest.num_tokens)
    return first, last


def choose(model: torch.nn.Module, method: str, counts: list[int], data: TokenBatches, cache: Path | None) -> dict:
    """The layers that a rule drops, for each number of layers."""
    total = model.config.num_hidden_layers
    if method == "deepest":
        return {n: list(range(total - 1 - n, total - 1)) for n in counts}
    if method in ("greedy", "greedy_healed", "beam"):  # nested: the longest search has them all
        file = cache / f"{method}.json" if cache else None
        plan = plan_pruning(model, data, num_layers=max(counts), method=method, resume=file)
        return {n: plan.steps[n - 1]["layers"] for n in counts}
    return {n: list(plan_pruning(model, data, num_layers=n, method=method).layers) for n in counts}


def main(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint: a folder or a name on the Hub.")],
    text: Annotated[Path, typer.Argument(help="A UTF-8 text file.")],
    layers: Annotated[str, typer.Option(help="Numbers of layers to drop.")] = "2,4,6,8",
    methods: Annotated[str, typer.Option(help="Rules to run.")] = ",".join((*PEERS, *OURS)),
    heals: Annotated[str, typer.Option(help="Healings to run after each.")] = "linear,refit",
    calibration: Annotated[int, typer.Option(help="Tokens to choose and to fit by; a quarter judges.")] = 32_768,
    test: Annotated[int, typer.Option(help="Tokens at the end of the text to measure on.")] = 8_192,
    seq_len: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    dtype: Annotated[str, typer.Option(help="Of the weights.")] = "auto",
    cache: Annotated[Path | None, typer.Option(help="Folder for what searches have found, to go on from.")] = None,
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).to(device).eval()
    data, last = parts(text, model, calibration, test, seq_len)
    counts = [int(n) for n in layers.split(",")]
    full = math.exp(loss_without(model, last))
    table = Table(
        "rule",
        "healing",
        *(f"{n} layers" for n in counts),
        title=f"{os.path.basename(checkpoint)}, {dtype}: perplexity {full:.2f} with all layers; "
        f"{data.num_tokens:,} tokens to choose by, {last.num_tokens:,} others to measure on",
    )
    notes = []
    for method in methods.split(","):
        chosen = choose(model, method, counts, data, cache)
        notes += [f"{method}, {n}: {sorted(gone)}" for n, gone in chosen.items()]
        for heal in (None, *heals.split(",")):
            if method == "best_of" and heal:  # it chooses by what healing makes of the proposals
                chosen = {n: list(plan_pruning(model, data, num_layers=n, heal=heal).layers) for n in counts}
                notes += [f"{method} with {heal}, {n}: {sorted(gone)}" for n, gone in chosen.items()]
            cells = []
            for gone in chosen.values():
                if heal is None:
                    loss = loss_without(model, last, gone)
                else:
                    with healed(model, gone, data, method=heal, progress=False):
                        loss = loss_without(model, last, gone)
                cells.append(f"{math.exp(loss):,.1f}")
            table.add_row(method, heal or "none", *cells)
            print(method, heal, *cells, flush=True)
        table.add_section()
    Console().print(table)
    print(*notes, sep="\n")


if __name__ == "__main__":
    typer.run(main)
