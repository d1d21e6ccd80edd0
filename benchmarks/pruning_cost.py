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
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from ln_scaling_overhead import DEVICE, SIZES
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

import hf_lnscale
from hf_lnscale.evaluation.speed import measure, peak_memory
from hf_lnscale.measuring.losses import sweep
from hf_lnscale.measuring.text import TokenBatches, Windows, token_batches
from hf_lnscale.pruning.prune import plan_pruning
from hf_lnscale.pruning.scores import score_layers

RANDOM = SIZES | {"16 layers of 512": (512, 1376, 8, 16, 8192)}


@dataclass(frozen=True)
class Subject:
    """The model and the data to measure on."""

    name: str
    model: PreTrainedModel
    data: TokenBatches
    count: int

    def title(self, what: str) -> str:
        hardware = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        return (
            f"{what}: {self.name}, {self.data.num_sequences} sequences, {self.data.num_tokens:,} tokens, "
            f"{self.count} pairs\n{hardware}, torch {torch.__version__}, hf_lnscale {hf_lnscale.__version__}"
        )


def subject(
    checkpoint: str | None, text: Path | None, count: int, sequences: int, length: int, size: str = "16 layers of 512"
) -> Subject:
    """A checkpoint with the start of a text, or a random Llama with random tokens."""
    if checkpoint:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        num_tokens = sequences * length
        data = token_batches(
            str(text), tokenizer=tokenizer, windows=Windows(num_tokens=num_tokens, seq_len=length, batch_size=4)
        )
        return Subject(Path(checkpoint).name, model.to(DEVICE).eval(), data, count)
    hidden, mlp, heads, layers, vocabulary = RANDOM[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        # Large weights, so that the layers have different effects.
        initializer_range=0.06,
    )
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if DEVICE == "cuda" else torch.float32)
    data = token_batches(list(torch.randint(0, vocabulary, (sequences, length)).split(4)))
    return Subject(f"random Llama, {size}", model.eval(), data, count)


# --- timing -----------------------------------------------------------------------------------------


def timed(run: Callable[[], object]) -> tuple[float, object]:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    found = run()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, found


def ratios(what: str, ours: Callable[[], object], other: Callable[[], object], count: int) -> tuple[list[float], list]:
    """Ratios of the times of `ours` to those of `other`, run in alternation, and the result of each."""
    found = [ours(), other()]  # not timed, as the first runs are slower
    times = []
    for number in track(range(count), what, transient=True):
        pair = {}
        for which in (0, 1) if number % 2 else (1, 0):
            pair[which], found[which] = timed((ours, other)[which])
        times.append(pair[0] / pair[1])
    return times, found


def row(table: Table, what: str, against: str, times: list[float], difference: str) -> None:
    low, _, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    table.add_row(what, against, f"{statistics.median(times):.3f}", f"{low:.3f} to {high:.3f}", difference)


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


@torch.no_grad()
def sweep_whole(it: Subject) -> dict[int, float]:
    """The loss of the model without each layer, with each candidate run in full."""
    base = it.model.model
    layers, config = base.layers, base.config
    losses = {}
    for removed in range(len(layers)):
        base.layers = nn.ModuleList(layer for i, layer in enumerate(layers) if i != removed)
        config.num_hidden_layers = len(base.layers)
        total = 0.0
        for batch in it.data:
            ids = batch.input_ids.to(DEVICE)
            total += it.model(ids, labels=ids, use_cache=False).loss.item() * len(ids)
        losses[removed] = total / it.data.num_sequences
    base.layers, config.num_hidden_layers = layers, len(layers)
    return losses


def scores(it: Subject) -> Table:
    """Time of the layer scores, and their agreement with the alternatives."""
    table = Table("what", "compared with", "median ratio of times", "quartiles", "largest difference")
    table.title = it.title("scores of layers")

    def score(method: str) -> Callable[[], torch.Tensor]:
        return lambda: score_layers(it.model, it.data, method, progress=False).scores

    plain = "a plain pass of the decoder"
    times, _ = ratios("plain", lambda: plain_pass(it), lambda: plain_pass(it), it.count)
    row(table, plain, "itself", times, "")
    for method in ("block_influence", "angular"):
        times, _ = ratios(method, score(method), lambda: plain_pass(it), it.count)
        row(table, method, plain, times, "")
    # The alternatives take a pass for each layer, so fewer pairs are timed.
    few = max(1, it.count // 5)
    for against, peer in {
        "a pass for each block size": angular_by_block_size,
        "loops over pairs, batch size 1": angular_by_loops,
    }.items():
        times, (ours, theirs) = ratios(against, score("angular"), lambda peer=peer: peer(it), few)
        shared = ~theirs.isnan()
        row(table, "angular", against, times, f"{(ours - theirs)[shared].abs().max().item():.1e}")
    times, ((_, swept), theirs) = ratios(
        "sweep", lambda: sweep(it.model, it.data, progress=False), lambda: sweep_whole(it), few
    )
    ours = {layer: loss.mean for layer, loss in swept.items()}
    same = "same" if sorted(ours, key=ours.get) == sorted(theirs, key=theirs.get) else "another"
    difference = max(abs(ours[i] - theirs[i]) for i in ours)
    row(table, "loss without each layer", "each candidate whole", times, f"{difference:.1e} nats, {same} order")
    return table


# --- search, load, decode ---------------------------------------------------------------------------


def naive_search(it: Subject, layers: int) -> list[int]:
    """Greedy search by deletion, with every candidate run in full on all of the data."""
    base, config = it.model.model, it.model.model.config
    whole, dropped = base.layers, []
    for _ in range(layers):
        rest = [i for i in range(len(whole)) if i not in dropped]
        base.layers = nn.ModuleList(whole[i] for i in rest)
        config.num_hidden_layers = len(rest)
        losses = sweep_whole(it)
        dropped.append(rest[min(losses, key=losses.get)])
    base.layers, config.num_hidden_layers = whole, len(whole)
    return sorted(dropped)


def search(it: Subject) -> Table:
    """The search of `plan_pruning`, compared with the naive one."""
    table = Table("what", "compared with", "median ratio of times", "quartiles", "layers")
    table.title = it.title("greedy search for two layers")
    ahead, held_out = it.data.split(1 / it.data.num_sequences)  # only judges the cut, so it is left out of the search
    it = Subject(it.name, it.model, ahead, it.count)

    def ours() -> list[int]:
        plan = plan_pruning(it.model, it.data, num_layers=2, method="greedy", held_out=held_out, progress=False)
        return list(plan.layers)

    times, (found, theirs) = ratios("search", ours, lambda: naive_search(it, 2), max(1, it.count // 10))
    row(table, "plan_pruning", "each candidate whole", times, f"{found} and {theirs}")
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


def load(it: Subject) -> Table:
    """Time, bytes read and peak memory of loading fewer layers."""
    num_layers = it.model.config.num_hidden_layers
    dropped = list(range(num_layers // 2, num_layers // 2 + num_layers // 4))
    table = Table(
        "loading", f"without {len(dropped)} of {num_layers} layers", "all, deleted then", "ratio, median of pairs"
    )
    table.title = it.title("loading fewer layers")
    pairs = []
    with on_disk(it) as folder:
        for _ in track(range(max(3, it.count // 5)), "load", transient=True):
            pairs.append([loading(folder, dropped, after=after) for after in (False, True)])
        counted = [loading(folder, dropped, after=after, count_bytes=True) for after in (False, True)]
    for pair in pairs:
        for costs, bytes_read in zip(pair, counted, strict=True):
            costs["bytes_read"] = bytes_read["bytes_read"]
    for name, unit, size in (
        ("load_seconds", "s", 1.0),
        ("bytes_read", "MiB read", 2.0**20),
        ("load_peak_bytes", "MiB at the peak, including interpreter and libraries", 2.0**20),
    ):
        ours, theirs = (statistics.median(pair[i][name] for pair in pairs) / size for i in (0, 1))
        table.add_row(
            unit, f"{ours:,.2f}", f"{theirs:,.2f}", f"{statistics.median(a[name] / b[name] for a, b in pairs):.3f}"
        )
    kept = pairs[0][0]["parameters"] * next(it.model.parameters()).element_size()
    table.add_row(
        "bytes read / bytes kept", f"{statistics.median(a['bytes_read'] for a, _ in pairs) / kept:.4f}", "", ""
    )
    return table


def decode(it: Subject) -> Table:
    """Tokens per second with fewer layers."""
    num_layers = it.model.config.num_hidden_layers
    table = Table(
        "layers dropped",
        "decode, tokens/s",
        "times as fast, median of pairs",
        "ideal, L / (L - n)",
        "prefill, times as fast",
    )
    table.title = it.title("decoding with fewer layers")
    with on_disk(it) as folder, tempfile.TemporaryDirectory() as cut:
        for n in (num_layers // 4, num_layers // 2):
            AutoModelForCausalLM.from_pretrained(folder, drop_layers=range(n)).save_pretrained(cut)
            pairs = []
            for _ in track(range(max(3, it.count // 5)), f"decode, {n} dropped", transient=True):
                pairs.append(measure(cut, folder))
            ratio = {
                what: statistics.median(
                    getattr(a, f"{what}_tokens_per_second").median / getattr(b, f"{what}_tokens_per_second").median
                    for a, b in pairs
                )
                for what in ("decode", "prefill")
            }
            speed = statistics.median(a.decode_tokens_per_second.median for a, _ in pairs)
            ideal = num_layers / (num_layers - n)
            table.add_row(str(n), f"{speed:.1f}", f"{ratio['decode']:.3f}", f"{ideal:.3f}", f"{ratio['prefill']:.3f}")
    return table


def prune(it: Subject) -> Table:
    """Time and peak memory of choosing, healing and dropping two layers."""
    table = Table("layers", "seconds", "peak memory, MiB", "before", title=it.title("hf_lnscale.prune, two layers"))
    before = peak_memory(DEVICE)
    seconds, found = timed(lambda: hf_lnscale.prune(it.model, it.data, num_layers=2))
    table.add_row(
        str(list(found.plan.layers)), f"{seconds:,.0f}", f"{peak_memory(DEVICE) / 2**20:,.0f}", f"{before / 2**20:,.0f}"
    )
    return table


PARTS: dict[str, Callable[[Subject], Table]] = {
    "scores": scores,
    "search": search,
    "load": load,
    "decode": decode,
    "prune": prune,
}


def main(
    part: Annotated[list[str], typer.Option(help=f"One of {', '.join(PARTS)}; repeatable.")] = list(PARTS),  # noqa: B006
    checkpoint: Annotated[str | None, typer.Option(help="A folder or a name on the Hub; requires --text.")] = None,
    text: Annotated[Path | None, typer.Option(help="A UTF-8 text file to measure on.")] = None,
    count: Annotated[int, typer.Option(help="Number of pairs to time; a fifth as many for slow ones.")] = 20,
    sequences: Annotated[int, typer.Option(help="Number of sequences.")] = 8,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 256,
    size: Annotated[str, typer.Option(help=f"Random Llama: one of {', '.join(RANDOM)}.")] = "16 layers of 512",
) -> None:
    if unknown := [one for one in part if one not in PARTS]:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(PARTS)}", param_hint="--part")
    if bool(checkpoint) != bool(text):
        raise typer.BadParameter("pass both --checkpoint and --text, or neither", param_hint="--text")
    if size not in RANDOM:
        raise typer.BadParameter(f"{size!r} is not one of {', '.join(RANDOM)}", param_hint="--size")
    it = subject(checkpoint, text, count, sequences, length, size)
    for one in part:
        Console(width=140).print(PARTS[one](it))


if __name__ == "__main__":
    typer.run(main)
