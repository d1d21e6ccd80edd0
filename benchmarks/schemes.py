"""Does scaling pay? Compares LayerNorm Scaling with twelve other schemes on one Llama, each at its best learning rate.

    python benchmarks/schemes.py                          # on two CPU cores: about an hour; resumes
    python benchmarks/schemes.py --part settings          # only the question that decides
    python benchmarks/schemes.py --part schemes --steps 200  # the other schemes, in short runs
    python benchmarks/schemes.py --size medium --data FOLDER --jobs 8  # on a GPU: parallel runs fill it
    python benchmarks/schemes.py --size 130M --data c4.txt
    python benchmarks/schemes.py --only-tables            # the results so far

Runs are queued. Each finished run is a line of the file --out and is never repeated. The contents of the file decide
which runs come next: the short parts find the learning rates of the longer ones. Parts:

- settings: Pre-LN against LNS as trained in the paper (256 tokens, no weight decay, Adam) and as is common today (1,024
  tokens, decay 0.1, warmup - stable - decay), with the same number of tokens per step. All learning rates of the grid,
  the best one with three seeds.
- shallow: the same pair with a quarter of the layers, at the learning rates found, to see whether depth helps at all;
  three seeds.
- schemes: all schemes as trained in the paper, at all learning rates; the pair and the two best others with three
  seeds.
- decay: the pair as trained today, with a weight decay that does as much in a short run as 0.1 does in a long one;
  three seeds.
- depth: the pair with two and four times the layers, at the learning rates found; three seeds.
- promising: the two best others as trained today, at all learning rates, the best one with three seeds.

The Pre-LN and LNS models of seed 0 are then examined: the cost of removing layers, angular distances, gradients.

The text comes with Python: the topics of the language reference and the source of the standard library. It therefore
differs between versions of Python. Whole documents are held out. --data replaces it with text files or folders of
Python files.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
import random
import statistics
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from judging import DEVICE, Records
from rich.console import Console
from rich.table import Table
from scheme_models import SCHEMES, build, set_progress
from timing import one_of
from transformers import LlamaConfig, LlamaForCausalLM

import hf_lnscale
from hf_lnscale.measuring.sample import documents, train_tokenizer

PAIR = ("pre_ln", "lns")
SEEDS = (0, 1, 2)
# The seed whose Pre-LN and LNS models are examined.
LOOKED_AT = SEEDS[0]
PARTS = ("settings", "shallow", "schemes", "decay", "depth", "promising")


class Size(NamedTuple):
    """A Llama, and how long it is trained.

    Attributes:
        tokens: tokens per step.
        micro: tokens per forward pass.
        rates: the grid of learning rates, in the order they are tried.
    """

    hidden: int
    mlp: int
    heads: int
    layers: int
    vocabulary: int
    tokens: int
    micro: int
    steps: int
    rates: tuple[float, ...]


SIZES = {
    "small": Size(64, 176, 2, 8, 1024, 1024, 1024, 500, (3e-3, 1e-3, 1e-2)),
    "medium": Size(256, 688, 4, 12, 8192, 16_384, 16_384, 3000, (1e-3, 5e-4, 2e-3)),
    # The shape and steps of the smallest model in the paper; 2.2 B tokens.
    "130M": Size(768, 2048, 12, 12, 32_000, 131_072, 32_768, 16_785, (1e-3, 5e-4, 2e-3)),
}


class Setting(NamedTuple):
    """How a model is trained; gradients are clipped at norm 1 in all of them.

    Attributes:
        length: tokens per sequence.
        warmup: fraction of the steps.
        decay: True for a constant rate with a linear decay to 0 in the last fifth, False for a cosine decay to a tenth.
    """

    length: int
    weight_decay: float
    betas: tuple[float, float]
    warmup: float
    decay: bool

    def rate(self, progress: float) -> float:
        """Fraction of the peak learning rate when `progress` of the steps are done."""
        if progress < self.warmup:
            return progress / self.warmup
        if self.decay:
            return min(1.0, (1 - progress) / 0.2)
        cosine = math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup))
        return 0.1 + 0.9 * (1 + cosine) / 2


SETTINGS = {
    "paper": Setting(256, 0.0, (0.9, 0.999), 0.1, False),
    "modern": Setting(1024, 0.1, (0.9, 0.95), 0.05, True),
    # The effect of weight decay grows with peak learning rate x decay x steps. With decay 0.1, this is 1.7 for the
    # 16,785 steps of the paper at 1e-3, but 0.15 for 500 steps at 3e-3. With decay 1, it is 1.5 for the latter.
    "strong_decay": Setting(1024, 1.0, (0.9, 0.95), 0.05, True),
}
# Settings that use the learning rates of another setting.
TUNED_AS = {"strong_decay": "modern"}


@dataclass(frozen=True)
class Run:
    """One training run; equal runs are not repeated. `text` is a hash of the training and held-out tokens."""

    size: str
    setting: str
    scheme: str
    layers: int
    rate: float
    seed: int
    steps: int
    text: str


class Text(NamedTuple):
    """Token ids of the training and held-out documents, each ending with an end-of-text token."""

    train: torch.Tensor
    held_out: torch.Tensor
    name: str


def read_text(data: Sequence[Path], vocabulary: int) -> Text:
    """Tokenizes the text of Python, or the given files, with a tokenizer trained on the training part.

    Args:
        data: text files, with documents separated by blank lines, or folders of Python files, each of which is a
            document; empty for the text that comes with Python.
        vocabulary: the number of tokens in the vocabulary.
    """
    if data:
        found = []
        for path in data:
            if path.is_dir():
                found += [file.read_text("utf-8", "replace") for file in sorted(path.rglob("*.py"))]
            else:
                found += path.read_text(encoding="utf-8").split("\n\n")
        found = [one for one in found if one.strip()]
    else:
        sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        found = documents(standard_library=False)
        found += [path.read_text("utf-8", "replace") for path in sources if path.stem in sys.stdlib_module_names]
    random.Random(0).shuffle(found)
    held_out, train = found[::12], [one for index, one in enumerate(found) if index % 12]
    tokenizer = train_tokenizer(train, vocabulary)

    def ids(texts: list[str]) -> torch.Tensor:
        encoded = tokenizer(texts, verbose=False)["input_ids"]
        return torch.tensor([token for one in encoded for token in (*one, tokenizer.eos_token_id)])

    parts = ids(train), ids(held_out)
    name = hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()[:12]
    return Text(*parts, name)


def windows(ids: torch.Tensor, length: int) -> torch.Tensor:
    """Token ids as sequences, shape (N, length), without the remainder."""
    return ids[: len(ids) // length * length].view(-1, length)


def loss_of(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    batch = batch.to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
        return model(input_ids=batch, labels=batch).loss


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, batches: Sequence[torch.Tensor]) -> float:
    """In nats per token; the batches must be of equal size."""
    model.eval()
    loss = statistics.fmean(loss_of(model, batch).item() for batch in batches)
    model.train()
    return loss


def train(run: Run, text: Text) -> dict[str, Any]:
    """Trains one model. Returns its held-out loss at each quarter of the run and, for Pre-LN and LNS, `look`'s results.

    A run stops when its gradients are no longer finite; its losses from then on are infinite.
    """
    size, setting = SIZES[run.size], SETTINGS[run.setting]
    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.mlp, use_cache=False,
        num_attention_heads=size.heads, num_hidden_layers=run.layers, max_position_embeddings=setting.length,
    )  # fmt: skip
    model = build(run.scheme, config, run.seed).to(DEVICE).train()
    groups = [
        {"params": [one for one in model.parameters() if one.dim() >= 2], "weight_decay": setting.weight_decay},
        {"params": [one for one in model.parameters() if one.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=run.rate, betas=setting.betas, fused=True)
    sequences, per_pass = windows(text.train, setting.length), size.micro // setting.length
    held_out = windows(text.held_out[:16_384], setting.length).split(max(per_pass, 8))
    count, passes = size.tokens // setting.length, size.tokens // size.micro
    needed = run.steps * count
    generator = torch.Generator().manual_seed(run.seed)
    epochs = [torch.randperm(len(sequences), generator=generator) for _ in range(-(-needed // len(sequences)))]
    order = torch.cat(epochs)[:needed].view(run.steps, count)
    losses = [math.inf] * 4
    started = time.perf_counter()
    for step in range(run.steps):
        set_progress(model, step / run.steps)
        for group in optimizer.param_groups:
            group["lr"] = run.rate * setting.rate((step + 0.5) / run.steps)
        for part in sequences[order[step]].split(per_pass):
            (loss_of(model, part) / passes).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not norm.isfinite():
            break
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        quarter, rest = divmod(4 * (step + 1), run.steps)
        if rest < 4:
            set_progress(model, (step + 1) / run.steps)
            losses[quarter - 1] = held_out_loss(model, held_out)
    seconds = time.perf_counter() - started
    found: dict[str, Any] = {"loss": losses[-1], "quarters": losses, "seconds": round(seconds, 1)}
    if run.scheme in PAIR and run.seed == LOOKED_AT and math.isfinite(losses[-1]):
        found |= look(model, held_out)
    return found


def trained(runs: Sequence[Run], text: Text, jobs: int) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Yields each run and its results as it ends, `jobs` at once in separate processes; errors are raised last."""
    if jobs == 1:
        yield from ((run, train(run, text)) for run in runs)
        return
    with ProcessPoolExecutor(jobs, torch.multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(train, run, text): run for run in runs}
        failed = []
        for future in as_completed(futures):
            if error := future.exception():
                failed.append(error)
            else:
                yield futures[future], future.result()
    if failed:
        raise failed[0]


def gradient_norms(model: LlamaForCausalLM, batches: Sequence[torch.Tensor]) -> list[float]:
    """The norm of the gradient of the loss with respect to the weights of each layer, averaged over batches."""
    found = torch.zeros(len(model.model.layers), dtype=torch.float64)
    for ids in batches:
        model.zero_grad()
        loss_of(model, ids).backward()
        for index, layer in enumerate(model.model.layers):
            norm = torch.stack([weight.grad.norm() for weight in layer.parameters()]).norm()
            found[index] += norm.item() / len(batches)
    model.zero_grad()
    return found.tolist()


def look(model: LlamaForCausalLM, held_out: Sequence[torch.Tensor]) -> dict[str, Any]:
    """Measures what each layer of a trained model does, and the held-out loss without layers.

    `order` starts with the layer that costs least on its own; `without[k]` is the loss without the first k of them.
    """
    few = held_out[: max(1, len(held_out) // 2)]
    diagnosis = hf_lnscale.diagnose(model, few, jacobian=False, progress=False)
    order = sorted(range(len(diagnosis.layers)), key=lambda index: diagnosis.layers[index]["loss_added"])
    losses = [held_out_loss(model, held_out)]
    for count in range(1, len(order)):
        losses.append(held_out_loss(hf_lnscale.drop_layers(copy.deepcopy(model), sorted(order[:count])), held_out))
    return {
        "loss_added": [one["loss_added"] for one in diagnosis.layers],
        "gradient_norm": gradient_norms(model, few),
        "angular": [row[0] for row in diagnosis.angular],
        "variance": [one["variance"] for one in diagnosis.residual],
        "order": order,
        "without": losses,
    }


class Queue:
    """Decides what to run next, based on the results so far.

    Args:
        size: a key of `SIZES`.
        text: the hash of the text.
        records: the results so far; the caller adds each run before asking for the next.
    """

    def __init__(self, size: str, text: str, records: dict[Run, dict[str, Any]]) -> None:
        self.size, self.text, self.records = size, text, records
        self.rates, self.layers = SIZES[size].rates, SIZES[size].layers

    def run(self, setting: str, scheme: str, rate: float, seed: int = 0, layers: int | None = None) -> Run:
        return Run(self.size, setting, scheme, layers or self.layers, rate, seed, SIZES[self.size].steps, self.text)

    def loss(self, run: Run) -> float:
        """The held-out loss of a run, or NaN if it has not been run."""
        return self.records[run]["loss"] if run in self.records else math.nan

    def best(self, setting: str, scheme: str) -> float:
        """The learning rate with the lowest loss at seed 0, among those that have been run."""
        setting = TUNED_AS.get(setting, setting)
        rates = [rate for rate in self.rates if self.run(setting, scheme, rate) in self.records]
        return min(rates, key=lambda rate: self.loss(self.run(setting, scheme, rate)), default=math.nan)

    def losses(self, setting: str, scheme: str) -> list[float]:
        """The loss of each seed at the best learning rate; NaN if it has not been run."""
        return [self.loss(self.run(setting, scheme, self.best(setting, scheme), seed)) for seed in SEEDS]

    def promising(self) -> list[str]:
        """The two best other schemes in the setting of the paper."""
        others = [scheme for scheme in SCHEMES if scheme not in PAIR and not math.isnan(self.best("paper", scheme))]
        return sorted(others, key=lambda scheme: self.losses("paper", scheme)[0])[:2]

    def grid(self, settings: Sequence[str], schemes: Sequence[str]) -> list[Run]:
        return [self.run(*one, rate) for rate in self.rates for one in itertools.product(settings, schemes)]

    def repeat(self, settings: Sequence[str], schemes: Sequence[str], seeds: Sequence[int] = SEEDS[1:]) -> list[Run]:
        pairs = list(itertools.product(settings, schemes))
        return [self.run(*one, self.best(*one), seed) for seed in seeds for one in pairs]

    def part(self, name: str) -> Iterator[list[Run]]:
        """The runs of a part in stages; each stage depends on the results of those before it."""
        both = ("paper", "modern")
        if name == "settings":
            yield self.grid(both, PAIR)
            yield self.repeat(both, PAIR)
        if name == "schemes":
            yield self.grid(("paper",), list(SCHEMES))
            yield self.repeat(("paper",), [*PAIR, *self.promising()])
        if name == "decay":
            yield self.grid(("modern",), PAIR)
            yield self.repeat(("strong_decay",), PAIR, SEEDS)
        if name in ("shallow", "depth"):
            yield self.grid(both, PAIR)
            factors = (0.25,) if name == "shallow" else (2, 4)
            some = itertools.product(SEEDS, both, factors)
            yield [run for seed, setting, factor in some for run in self.pair(setting, factor, seed)]
        if name == "promising":
            yield self.grid(("paper",), list(SCHEMES))
            yield self.grid(("modern",), self.promising())
            yield self.repeat(("modern",), self.promising())

    def pair(self, setting: str, factor: float = 1, seed: int = LOOKED_AT) -> list[Run]:
        """Pre-LN and LNS with `factor` times the layers, at their best learning rates."""
        layers = int(factor * self.layers)
        return [self.run(setting, scheme, self.best(setting, scheme), seed, layers) for scheme in PAIR]


def spread(values: Sequence[float], signed: bool = False) -> str:
    """The mean of the values that are not NaN, with their range."""
    found = [value for value in values if not math.isnan(value)]
    if not found:
        return ""
    sign = "+" if signed else ""
    mean = f"{statistics.fmean(found):{sign}.3f}"
    return mean if len(found) == 1 else f"{mean} ({min(found):{sign}.3f} to {max(found):{sign}.3f})"


def number(values: Sequence[float]) -> str:
    """How many values are not NaN."""
    return str(sum(not math.isnan(value) for value in values))


def tables(queue: Queue) -> Iterator[Table]:
    size, depth = SIZES[queue.size], queue.layers
    about = f"Llama of {depth} layers, {size.hidden} channels, {size.steps} steps of {size.tokens} tokens"

    table = Table("setting", "Pre-LN at rate", "Pre-LN", "LNS at rate", "LNS", "LNS - Pre-LN, same seed", "seeds",
                  title=f"{about}: held-out loss in nats per token, mean (range) of seeds")  # fmt: skip
    for name in SETTINGS:
        losses = [queue.losses(name, scheme) for scheme in PAIR]
        differences = [scaled - plain for plain, scaled in zip(*losses, strict=True)]
        cells = [(f"{queue.best(name, scheme):g}", spread(one)) for scheme, one in zip(PAIR, losses, strict=True)]
        table.add_row(name, *cells[0], *cells[1], spread(differences, signed=True), number(differences))
    yield table

    for setting in SETTINGS:
        table = Table("scheme", *(f"rate {rate:g}" for rate in sorted(size.rates)), "best rate, mean (range)", "seeds",
                      title=f"{setting}: seed 0 at each learning rate")  # fmt: skip
        losses = {scheme: queue.losses(setting, scheme) for scheme in SCHEMES}
        tried = [scheme for scheme, one in losses.items() if not math.isnan(one[0])]
        for scheme in sorted(tried, key=lambda scheme: losses[scheme][0]):
            cells = [spread([queue.loss(queue.run(setting, scheme, rate))]) for rate in sorted(size.rates)]
            table.add_row(SCHEMES[scheme].title, *cells, spread(losses[scheme]), number(losses[scheme]))
        if tried:
            yield table

    table = Table("layers", "setting", "Pre-LN", "LNS", "LNS - Pre-LN, same seed", "seeds",
                  title=f"By depth, at the learning rates of {depth} layers: mean (range) of seeds")  # fmt: skip
    factors = (0.25, 1, 2, 4)
    for factor, setting in itertools.product(factors, ("paper", "modern")):
        pairs = [[queue.loss(run) for run in queue.pair(setting, factor, seed)] for seed in SEEDS]
        plain, scaled = map(list, zip(*pairs, strict=True))
        differences = [b - a for a, b in pairs]
        cells = spread(plain), spread(scaled), spread(differences, signed=True), number(differences)
        table.add_row(f"{factor * depth:g}", setting, *cells)
    yield table

    for setting, factor in itertools.product(SETTINGS, factors):
        found = [queue.records.get(run, {}) for run in queue.pair(setting, factor)]
        if all("without" in one for one in found):
            yield from looked_at(setting, *found)


def looked_at(setting: str, plain: dict[str, Any], scaled: dict[str, Any]) -> Iterator[Table]:
    """Compares two models layer by layer, and with layers removed."""
    table = Table("layer", "variance after", "loss added without", "angular distance", "gradient norm",
                  title=f"{setting}, {len(plain['order'])} layers, seed {LOOKED_AT}: Pre-LN / LNS")  # fmt: skip
    for index in range(len(plain["order"])):
        cells = [(one["variance"][index + 1], one["loss_added"][index], one["angular"][index],
                  one["gradient_norm"][index]) for one in (plain, scaled)]  # fmt: skip
        table.add_row(str(index), *(f"{a:.3g} / {b:.3g}" for a, b in zip(*cells, strict=True)))
    yield table
    table = Table("removed", "Pre-LN", "LNS", title="Held-out loss without layers, removing the cheapest first")
    for count, (a, b) in enumerate(zip(plain["without"], scaled["without"], strict=True)):
        table.add_row(str(count), f"{a:.3f}", f"{b:.3f}")
    as_good = max((count for count, loss in enumerate(scaled["without"]) if loss <= plain["without"][0]), default=None)
    shown = "none, as it is worse even whole" if as_good is None else as_good
    table.caption = f"Layers that LNS can lose and still be no worse than the whole Pre-LN model: {shown}"
    yield table


def main(
    size: Annotated[str, one_of(SIZES)] = "small",
    part: Annotated[list[str], one_of(PARTS, "One of {}; repeatable.")] = [*PARTS],  # noqa: B006
    data: Annotated[
        list[Path], typer.Option(help="A text file, or a folder of Python files; repeatable.", exists=True)
    ] = [],  # noqa: B006
    out: Annotated[Path, typer.Option(help="A JSON line for each finished run.")] = Path("build/schemes.jsonl"),
    steps: Annotated[int | None, typer.Option(help="Overrides the steps of the size.", min=4)] = None,
    jobs: Annotated[int, typer.Option(help="Number of parallel runs, each in its own process.", min=1)] = 1,
    only_tables: Annotated[bool, typer.Option("--only-tables", help="Print the tables without training.")] = False,
) -> None:
    if steps is not None:
        SIZES[size] = SIZES[size]._replace(steps=steps)
    text = read_text(data, SIZES[size].vocabulary)
    records = Records(out, Run)
    queue = Queue(size, text.name, records)
    console = Console(width=140)
    console.print(f"{len(text.train):,} tokens to train on, {len(text.held_out):,} held out; {DEVICE}")
    for stage in () if only_tables else (stage for name in part for stage in queue.part(name)):
        for run, found in trained([run for run in dict.fromkeys(stage) if run not in records], text, jobs):
            records.add(run, found)
            what = f"{run.setting} {run.scheme}, {run.layers} layers, rate {run.rate:g}, seed {run.seed}"
            console.print(f"{what}: {found['loss']:.4f} in {found['seconds']:.0f} s")
    for table in tables(queue):
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
