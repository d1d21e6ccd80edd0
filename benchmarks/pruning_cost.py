"""What choosing the layers to remove costs, and what removing them saves.

    python benchmarks/pruning_cost.py                                           # a small random Llama
    python benchmarks/pruning_cost.py --part scores --checkpoint NAME --text FILE

Prints one table per part. Two ways of computing the same numbers alternate, so that changes in the speed of the machine
affect both. The table shows the median and quartiles of the ratio of times over all pairs. "largest difference" is the
largest difference between the numbers that the two ways found.

Part "scores":

- Block Influence, and the angular distances of all blocks, compared with a plain forward pass of the decoder on the
  same data.
- The same angular distances as computed by PruneMe, with one pass for each block size (arXiv 2403.17887, on all hidden
  states of `output_hidden_states=True`), and by short-transformers, with one pass of single sequences and Python loops
  over all pairs of CPU copies. Both are reimplemented here. They use the state after the final norm as the state after
  the last layer, so blocks that end there are excluded from the comparison.
- The loss without each layer, compared with running each candidate in full, from the embedding on.

Part "search": two layers chosen greedily, compared with the same search with each candidate run in full on all of the
data.

Part "load": loading a checkpoint without a quarter of its layers, compared with loading all layers and then deleting
these. Each load runs in its own process and converts to float16. The bytes read are counted by the system, in further
processes that do not map files.

Part "decode": tokens per second without a quarter and without half of the layers, compared with the ideal speedup,
L / (L - n).

Part "prune": time and peak memory of a full `hf_lnscale.prune` for two layers. The memory is the peak of this process,
including any other parts of the same run.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import DEVICE, SIZES, Subject, one_of, quartiles, ratios, subject, timed
from torch import nn
from transformers import AutoModelForCausalLM

import hf_lnscale
from hf_lnscale.evaluation.speed import measure, peak_memory
from hf_lnscale.measuring.losses import sweep
from hf_lnscale.pruning.prune import plan_pruning
from hf_lnscale.pruning.scores import score_layers

# --- scores -----------------------------------------------------------------------------------------


@torch.no_grad()
def plain_pass(it: Subject) -> None:
    for batch in it.data:
        it.model.model(**batch.to(DEVICE).model_inputs(), use_cache=False)


def angles(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).clamp(-1, 1).arccos() / math.pi


@torch.no_grad()
def angular_by_block_size(it: Subject) -> torch.Tensor:
    """As in PruneMe: one pass for each block size; shape (L, L), NaN for blocks that end at the last layer."""
    num_layers = it.model.config.num_hidden_layers
    scores = torch.full((num_layers, num_layers), math.nan, dtype=torch.float64)
    for n in range(1, num_layers):
        total = torch.zeros(num_layers - n, dtype=torch.float64)
        for batch in it.data:
            states = it.model(**batch.to(DEVICE).model_inputs(), output_hidden_states=True, use_cache=False)
            last = [state[:, -1] for state in states.hidden_states]
            for i in range(num_layers - n):
                total[i] += angles(last[i], last[i + n]).sum().cpu()
        scores[: num_layers - n, n - 1] = total / it.data.num_sequences
    return scores


@torch.no_grad()
def angular_by_loops(it: Subject) -> torch.Tensor:
    """As in short-transformers: one sequence at a time, and a loop over all pairs of states copied to the CPU."""
    num_layers = it.model.config.num_hidden_layers
    scores = torch.full((num_layers, num_layers), math.nan, dtype=torch.float64)
    for i in range(num_layers):
        scores[i, : num_layers - i - 1] = 0.0
    for batch in it.data:
        for ids_T in batch.input_ids:
            output = it.model(ids_T[None].to(DEVICE), output_hidden_states=True, use_cache=False)
            states = [state.cpu() for state in output.hidden_states]
            for i in range(num_layers):
                for j in range(i + 1, num_layers):
                    scores[i, j - i - 1] += angles(states[i][0, -1], states[j][0, -1]) / it.data.num_sequences
    return scores


@contextmanager
def only(it: Subject, kept: list[int]) -> Iterator[None]:
    """Context in which the model has only some of its layers."""
    base = it.model.model
    layers = base.layers
    base.layers, base.config.num_hidden_layers = nn.ModuleList(layers[i] for i in kept), len(kept)
    yield
    base.layers, base.config.num_hidden_layers = layers, len(layers)


@torch.no_grad()
def sweep_whole(it: Subject) -> dict[int, float]:
    """The loss of the model without each layer, with each candidate run in full."""
    losses, layers = {}, range(len(it.model.model.layers))
    for removed in layers:
        with only(it, [i for i in layers if i != removed]):
            batches = [batch.input_ids.to(DEVICE) for batch in it.data]
            total = sum(it.model(ids, labels=ids, use_cache=False).loss.item() * len(ids) for ids in batches)
            losses[removed] = total / it.data.num_sequences
    return losses


def scores(it: Subject, count: int) -> Table:
    """Time of the layer scores, and their agreement with the alternatives."""
    table = Table("what", "compared with", "median ratio of times", "quartiles", "largest difference")
    table.title = it.title("scores of layers", count)

    def score(method: str) -> Callable[[], torch.Tensor]:
        return lambda: score_layers(it.model, it.data, method, progress=False).scores

    def decoder() -> None:
        plain_pass(it)

    plain = "a plain pass of the decoder"
    for what, against, ours in (
        (plain, "itself", decoder),
        ("block_influence", plain, score("block_influence")),
        ("angular", plain, score("angular")),
    ):
        times, _ = ratios(ours, decoder, count, what)
        table.add_row(what, against, *quartiles(times), "")
    # The alternatives take a pass for each layer, so fewer pairs are timed.
    few = max(1, count // 5)
    for against, peer in {
        "a pass for each block size": angular_by_block_size,
        "loops over pairs, batch size 1": angular_by_loops,
    }.items():
        times, (ours, theirs) = ratios(score("angular"), lambda peer=peer: peer(it), few, against)
        difference = (ours - theirs)[~theirs.isnan()].abs().max().item()
        table.add_row("angular", against, *quartiles(times), f"{difference:.1e}")
    times, ((_, swept), theirs) = ratios(
        lambda: sweep(it.model, it.data, progress=False), lambda: sweep_whole(it), few, "sweep"
    )
    ours = {layer: loss.mean for layer, loss in swept.items()}
    same = "same" if sorted(ours, key=ours.get) == sorted(theirs, key=theirs.get) else "another"
    difference = max(abs(ours[i] - theirs[i]) for i in ours)
    table.add_row(
        "loss without each layer", "each candidate whole", *quartiles(times), f"{difference:.1e} nats, {same} order"
    )
    return table


# --- search, load, decode ---------------------------------------------------------------------------


def naive_search(it: Subject, layers: int) -> list[int]:
    """Greedy search by deletion, with every candidate run in full on all of the data."""
    rest = list(range(len(it.model.model.layers)))
    dropped = []
    for _ in range(layers):
        with only(it, rest):
            losses = sweep_whole(it)
        dropped.append(rest.pop(min(losses, key=losses.get)))
    return sorted(dropped)


def search(it: Subject, count: int) -> Table:
    """The search of `plan_pruning`, compared with the naive one."""
    table = Table("what", "compared with", "median ratio of times", "quartiles", "layers")
    table.title = it.title("greedy search for two layers", count)
    ahead, held_out = it.data.split(1 / it.data.num_sequences)  # only judges the cut, so it is left out of the search
    ahead = it._replace(data=ahead)

    def ours() -> list[int]:
        plan = plan_pruning(it.model, ahead.data, num_layers=2, method="greedy", held_out=held_out, progress=False)
        return list(plan.layers)

    times, (found, theirs) = ratios(ours, lambda: naive_search(ahead, 2), max(1, count // 10), "search")
    table.add_row("plan_pruning", "each candidate whole", *quartiles(times), f"{found} and {theirs}")
    return table


@contextmanager
def on_disk(it: Subject) -> Iterator[str]:
    """The folder of the checkpoint; a random model is saved first."""
    if it.model.config.name_or_path:
        yield it.model.config.name_or_path
        return
    with tempfile.TemporaryDirectory() as folder:
        it.model.save_pretrained(folder)
        yield folder


# Loads a checkpoint without some layers, or loads all layers and then deletes these, as is done by hand. The dtype is
# not that of the file, because tensors that are only mapped do not count as memory of the process. The system counts
# the bytes read only if files are not mapped.
LOADING = """
import json, sys, time
from pathlib import Path
import hf_lnscale
from hf_lnscale.evaluation.speed import peak_memory
from transformers import AutoModelForCausalLM

folder, dropped, after, count_bytes = json.loads(sys.argv[1])
counters = Path("/proc/self/io")
bytes_read = lambda: int(counters.read_text().split()[1]) if counters.exists() else 0
keywords = {} if after else {"drop_layers": dropped}
read, started = bytes_read(), time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(folder, dtype="float16", disable_mmap=count_bytes, **keywords)
if after:
    for layer in sorted(dropped, reverse=True):
        del model.model.layers[layer]
costs = {"load_seconds": time.perf_counter() - started, "bytes_read": bytes_read() - read}
costs |= {"load_peak_bytes": peak_memory(), "parameters": sum(p.numel() for p in model.parameters())}
print(json.dumps(costs))
"""


def loading(folder: str, dropped: list[int], after: bool, count_bytes: bool = False) -> dict[str, float]:
    """The cost of loading in a new process; if bytes are counted, time and memory are not representative."""
    arguments = json.dumps([folder, dropped, after, count_bytes])
    done = subprocess.run([sys.executable, "-c", LOADING, arguments], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def load(it: Subject, count: int) -> Table:
    """Time, bytes read and peak memory of loading fewer layers."""
    num_layers = it.model.config.num_hidden_layers
    dropped = list(range(num_layers // 2, num_layers // 2 + num_layers // 4))
    without = f"without {len(dropped)} of {num_layers} layers"
    table = Table("loading", without, "all, deleted then", "ratio, median of pairs")
    table.title = it.title("loading fewer layers", count)
    with on_disk(it) as folder:
        pairs = [
            [loading(folder, dropped, after=after) for after in (False, True)]
            for _ in track(range(max(3, count // 5)), "load", transient=True)
        ]
        counted = [loading(folder, dropped, after=after, count_bytes=True) for after in (False, True)]
    for name, unit, size, measured in (
        ("load_seconds", "s", 1.0, pairs),
        ("bytes_read", "MiB read", 2.0**20, [counted]),
        ("load_peak_bytes", "MiB at the peak, including interpreter and libraries", 2.0**20, pairs),
    ):
        ours, theirs = (statistics.median(pair[i][name] for pair in measured) / size for i in (0, 1))
        ratio = statistics.median(a[name] / b[name] for a, b in measured)
        table.add_row(unit, f"{ours:,.2f}", f"{theirs:,.2f}", f"{ratio:.3f}")
    kept = pairs[0][0]["parameters"] * next(it.model.parameters()).element_size()
    table.add_row("bytes read / bytes kept", f"{counted[0]['bytes_read'] / kept:.4f}", "", "")
    return table


def decode(it: Subject, count: int) -> Table:
    """Tokens per second with fewer layers."""
    num_layers = it.model.config.num_hidden_layers
    columns = ("times as fast, median of pairs", "ideal, L / (L - n)", "prefill, times as fast")
    table = Table("layers dropped", "decode, tokens/s", *columns, title=it.title("decoding with fewer layers", count))
    with on_disk(it) as folder, tempfile.TemporaryDirectory() as cut:
        for n in (num_layers // 4, num_layers // 2):
            AutoModelForCausalLM.from_pretrained(folder, drop_layers=range(n)).save_pretrained(cut)
            repeats = track(range(max(3, count // 5)), f"decode, {n} dropped", transient=True)
            pairs = [measure(cut, folder) for _ in repeats]
            decoding, prefill = (
                [[getattr(one, f"{what}_tokens_per_second").median for one in pair] for pair in pairs]
                for what in ("decode", "prefill")
            )
            faster, prefilled = (f"{statistics.median(a / b for a, b in one):.3f}" for one in (decoding, prefill))
            speed, ideal = statistics.median(a for a, _ in decoding), num_layers / (num_layers - n)
            table.add_row(str(n), f"{speed:.1f}", faster, f"{ideal:.3f}", prefilled)
    return table


def prune(it: Subject, count: int) -> Table:
    """Time and peak memory of choosing, healing and dropping two layers."""
    table = Table("layers", "seconds", "peak memory, MiB", "before")
    table.title = it.title("hf_lnscale.prune, two layers", count)
    before = peak_memory(DEVICE)
    seconds, found = timed(lambda: hf_lnscale.prune(it.model, it.data, num_layers=2))
    memory = (f"{peak / 2**20:,.0f}" for peak in (peak_memory(DEVICE), before))
    table.add_row(str(list(found.plan.layers)), f"{seconds:,.0f}", *memory)
    return table


PARTS = {part.__name__: part for part in (scores, search, load, decode, prune)}


def main(
    part: Annotated[list[str], one_of(PARTS, "One of {}; repeatable.")] = list(PARTS),  # noqa: B006
    checkpoint: Annotated[str | None, typer.Option(help="A folder or a name on the Hub; requires --text.")] = None,
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text file to measure on.")] = None,
    count: Annotated[int, typer.Option(help="Number of pairs to time; a fifth as many for slow ones.")] = 20,
    sequences: Annotated[int, typer.Option(help="Number of sequences.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
    size: Annotated[str, one_of(SIZES, "Random Llama: one of {}.")] = "16 layers of 512",
) -> None:
    # Large weights, so that the layers have different effects.
    it = subject(checkpoint, text, sequences, length, size, initializer_range=0.06)
    for one in part:
        Console(width=140).print(PARTS[one](it, count))


if __name__ == "__main__":
    typer.run(main)
