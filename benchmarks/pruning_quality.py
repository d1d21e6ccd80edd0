"""What dropping layers costs, by the rule that chose them: perplexity before and after healing, without any training.

    python benchmarks/pruning_quality.py CHECKPOINT TEXT_FILE --dtype bfloat16

Layers are chosen and healing is fitted on the first part of the text; perplexity is on its last windows, which neither
has seen. Peers are run by their rule, on the same data: "deepest" and "angular" of Gromov et al. (arXiv 2403.17887),
"block_influence" of ShortGPT (2403.03853), "angular" healed by "replaceme" as that is published (2505.02819, section 3:
plain least squares over all tokens), and by our "linear", the same map with a penalty that held-out loss chooses.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from hf_lnscale.measuring.losses import loss_without
from hf_lnscale.measuring.text import TokenBatches, Windows, token_batches
from hf_lnscale.pruning.heal import healed
from hf_lnscale.pruning.prune import plan_pruning
from hf_lnscale.pruning.scores import METHODS as ONE_SHOT
from hf_lnscale.pruning.scores import score_layers

PEERS = ("deepest", "block_influence", "angular")
STEPWISE = ("greedy", "greedy_healed")
# They measure the model without each layer, and those above at every step.
COSTLY = ("perplexity", "kl", *STEPWISE)
OURS = (*COSTLY, "best_of")


def parts(
    text: Path, model: torch.nn.Module, calibration: int, test: int, seq_len: int
) -> tuple[TokenBatches, TokenBatches]:
    """The first windows of the text, and the last ones."""
    batches = token_batches(text, model, windows=Windows(num_tokens=None, seq_len=seq_len))
    rest, last = batches.split(test / batches.num_tokens)
    first, _ = rest.split(1 - calibration / rest.num_tokens)
    return first, last


def choose(model: torch.nn.Module, method: str, counts: list[int], data: TokenBatches, cache: Path | None) -> dict:
    """The layers that a rule drops, for each number of layers."""
    total = model.config.num_hidden_layers
    if method == "deepest":
        return {n: list(range(total - 1 - n, total - 1)) for n in counts}
    if method in STEPWISE:  # step by step: the longest one has them all
        file = cache / f"{method}.json" if cache else None
        plan = plan_pruning(model, data, num_layers=max(counts), method=method, resume=file)
        return {n: plan.steps[n - 1]["layers"] for n in counts}
    calibration, _ = data.split(0.25)  # as plan_pruning does
    if method in ONE_SHOT:
        scores = score_layers(model, calibration, method)
        return {n: scores.lowest(n) for n in counts}
    return {n: list(plan_pruning(model, data, num_layers=n, method=method).layers) for n in counts}


@contextmanager
def replaceme(model: torch.nn.Module, gone: list[int], data: TokenBatches) -> Iterator[None]:
    """ReplaceMe's closed form, T = (M^T M)^-1 M^T (L - Y), folded into `down_proj`; written anew from the paper.

    M is the MLP's output in front of the cut, Y what it is added to, L the state behind the cut. No penalty, nothing
    held out.
    """
    layers, seen = model.model.layers, {}
    before, after = layers[gone[0] - 1], layers[gone[-1]]
    mm, ml = 0.0, 0.0
    watched = {"m": before.mlp, "y": before, "l": after}
    hooks = [
        module.register_forward_hook(
            lambda _, __, output, name=name: seen.__setitem__(name, output.double().flatten(0, 1))
        )
        for name, module in watched.items()
    ]
    with torch.no_grad():
        for batch in data:
            model.model(**batch.to(model.device).model_inputs(), use_cache=False)
            mm, ml = mm + seen["m"].T @ seen["m"], ml + seen["m"].T @ (seen["l"] - (seen["y"] - seen["m"]))
        for hook in hooks:
            hook.remove()
        weight = before.mlp.down_proj.weight
        saved = weight.clone()
        weight.copy_(torch.linalg.solve(mm, ml).T @ weight.double())
        yield
        weight.copy_(saved)


def main(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint: a folder or a name on the Hub.")],
    text: Annotated[Path, typer.Argument(help="A UTF-8 text file.")],
    layers: Annotated[str, typer.Option(help="Numbers of layers to drop.")] = "2,4,6,8",
    methods: Annotated[str, typer.Option(help="Rules to run.")] = ",".join((*PEERS, *OURS)),
    heals: Annotated[
        str, typer.Option(help="Healings to run after each; an empty string for none.")
    ] = "replaceme,linear,refit",
    calibration: Annotated[int, typer.Option(help="Tokens to choose and to fit by; a quarter judges.")] = 32_768,
    search: Annotated[
        int | None,
        typer.Option(help=f"Fewer tokens to choose by for {', '.join(COSTLY)}, which measure without each layer."),
    ] = None,
    test: Annotated[int, typer.Option(help="Tokens at the end of the text to measure on.")] = 8_192,
    seq_len: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    dtype: Annotated[str, typer.Option(help="Of the weights.")] = "auto",
    cache: Annotated[Path | None, typer.Option(help="Folder for what searches have found, to go on from.")] = None,
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).to(device).eval()
    data, last = parts(text, model, calibration, test, seq_len)
    fewer, _ = parts(text, model, search or calibration, test, seq_len)
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
        chosen = choose(model, method, counts, fewer if method in COSTLY else data, cache)
        notes += [f"{method}, {n}: {sorted(gone)}" for n, gone in chosen.items()]
        for heal in (None, *filter(None, heals.split(","))):
            if heal == "replaceme" and method not in ("deepest", "angular"):
                continue  # it is for one contiguous block
            if method == "best_of" and heal:  # it chooses by what healing makes of the proposals
                chosen = {n: list(plan_pruning(model, data, num_layers=n, heal=heal).layers) for n in counts}
                notes += [f"{method} with {heal}, {n}: {sorted(gone)}" for n, gone in chosen.items()]
            cells = []
            for gone in chosen.values():
                if heal is None:
                    loss = loss_without(model, last, gone)
                else:
                    block = heal == "replaceme"
                    with (
                        replaceme(model, gone, data)
                        if block
                        else healed(model, gone, data, method=heal, progress=False)
                    ):
                        loss = loss_without(model, last, gone)
                cells.append(f"{math.exp(loss):,.1f}")
            table.add_row(method, heal or "none", *cells)
            print(method, heal, *cells, flush=True)
        table.add_section()
    Console().print(table)
    print(*notes, sep="\n")


if __name__ == "__main__":
    typer.run(main)
