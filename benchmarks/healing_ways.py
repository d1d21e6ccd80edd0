"""Which ways of training a pruned model, at equal cost, recover most of what the whole model could do?

    python benchmarks/healing_ways.py MODEL --text wiki.txt --layers 12 13 14 17   # a run: 1 to 2 minutes on a core
    python benchmarks/healing_ways.py MODEL --text wiki.txt --layers 12 13 14 17 --only-tables

Any model, whole or pruned, learns the text that it is trained on. Each way is therefore compared with a control: the
whole model trained in the same way on the same tokens or, where the whole model is itself the target, the whole model
as it is. The gap to the control, in nats per token, is what the cut still costs. It is measured on held-out text of the
training kind and on kinds that are never trained on: Python's documentation and the source of its standard library,
a little of which the closed form is fitted on, and the files of `--never`, none of which it is fitted on.

Every run has the same budget: `--budget` forward passes of the pruned model over a batch. A step costs one of them,
another for the gradients of activations and another for those of weights, each to the extent that it is needed, and the
share of the whole model if it is the teacher. Text that the whole model writes before training is not counted, but its
time is printed. Each way starts from the cut healed in closed form (`hf_lnscale.heal` on the same text) and from the
bare cut. It runs at each learning rate of its grid and then, at the rate with the smallest mean gap, with the other
seeds. Each finished run is a line of `--out` and is not repeated.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from judging import DEVICE, Losses, Records, difference, losses, read, split, windows
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_lnscale
from hf_lnscale.core.display import markdown
from hf_lnscale.measuring.sample import default_sources, own_text
from hf_lnscale.measuring.text import Windows
from hf_lnscale.training.generation import continue_prompts

# Texts that the whole model writes at once.
WRITTEN_AT_ONCE = 128 if DEVICE == "cuda" else 16
STARTS = ("closed form", "bare cut")
FULL, LORA, HEAD = (1e-4, 3e-4), (1e-3, 3e-3), (3e-4, 1e-3)


class Way(NamedTuple):
    """Which parameters are trained, on which text, with which loss.

    Attributes:
        trained: "all", "lora" (on the MLPs, rank 16), or "last" (the output head and the last three layers).
        loss: "text" (cross entropy), or the divergence from the whole model: "forward" KL, "reverse" KL, or "hidden"
            (forward KL plus the squared difference of the last hidden states, divided by their mean square).
        text: "given"; "own", written by the whole model without a prompt; or "continued", written by the whole model
            after the first eighth of each window of the given text, which is masked, like `--self_data` in the recipe.
        rates: peak learning rates.
    """

    trained: str
    loss: str
    text: str
    rates: tuple[float, ...]

    def cost(self, model: Any, whole: Any) -> float:
        """The cost of a step in forward passes of the pruned model, computed from the parameters that it uses."""
        size = model.num_parameters()
        layers = model.config.num_hidden_layers
        back = 3 / layers if self.trained == "last" else 1.0
        changed = sum(part.numel() for part in trained_parameters(model, self)) / size
        teacher = whole.num_parameters() / size if self.loss != "text" else 0.0
        return 1 + back + changed + teacher


WAYS = {
    "text, in full": Way("all", "text", "given", FULL),
    "text, LoRA": Way("lora", "text", "given", LORA),
    "text, head and last 3 layers": Way("last", "text", "given", HEAD),
    "the whole model's own text, in full": Way("all", "text", "own", FULL),
    "self data, in full": Way("all", "text", "continued", FULL),
    "forward KL, in full": Way("all", "forward", "given", FULL),
    "forward KL, LoRA": Way("lora", "forward", "given", LORA),
    "reverse KL, in full": Way("all", "reverse", "given", FULL),
    "forward KL and hidden states, in full": Way("all", "hidden", "given", FULL),
    "forward KL on its own text, in full": Way("all", "forward", "own", FULL),
    "forward KL on self data, in full": Way("all", "forward", "continued", FULL),
}


@dataclass(frozen=True)
class Run:
    """One training run; equal runs are not repeated. `start` "whole" is the control, with as many steps."""

    model: str
    layers: str
    way: str
    start: str
    rate: float
    seed: int
    budget: int


def trained_parameters(model: Any, way: Way) -> list[torch.nn.Parameter]:
    if way.trained != "last":
        return [part for part in model.parameters() if part.requires_grad]
    modules = [model.get_output_embeddings(), model.base_model.norm, *model.base_model.layers[-3:]]
    return list({id(part): part for module in modules for part in module.parameters()}.values())


def divergence(model: Any, whole: Any, ids_BT: torch.Tensor, labels_BT: torch.Tensor, kind: str) -> torch.Tensor:
    """Mean over all tokens that are not masked, in nats."""
    learned_BT = labels_BT[:, 1:] != -100
    with torch.no_grad():
        target = whole(input_ids=ids_BT, output_hidden_states=kind == "hidden")
        target_log_p = target.logits[:, :-1][learned_BT].float().log_softmax(-1)
    found = model(input_ids=ids_BT, output_hidden_states=kind == "hidden")
    log_p = found.logits[:, :-1][learned_BT].float().log_softmax(-1)
    pair = (target_log_p, log_p) if kind == "reverse" else (log_p, target_log_p)
    loss = functional.kl_div(*pair, reduction="batchmean", log_target=True)
    if kind == "hidden":
        wanted = target.hidden_states[-1].float()
        loss = loss + (found.hidden_states[-1].float() - wanted).square().mean() / wanted.square().mean()
    return loss


class Bench:
    """The models, the text and the results so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.name, self.layers = Path(args.model).name, " ".join(map(str, args.layers))
        self.records = Records(Path(args.out), Run)

    def load(self) -> None:
        args = self.args
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.whole = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(DEVICE).eval()
        train_text, held_out = split(read(args.text), 5)
        seq_len, count = args.seq_len, args.budget * args.batch_size

        def start(texts: list[str], number: int) -> torch.Tensor:
            return windows(texts, self.tokenizer, number, seq_len)

        # The closed form is fitted on the start of the default sources.
        judged = {"text": held_out} | {name: texts[len(texts) // 2 :] for name, texts in default_sources().items()}
        self.judged = {name: start(texts, args.judged) for name, texts in judged.items()}
        if args.never:
            never = [start([Path(one).read_text(encoding="utf-8")], args.judged // 2) for one in args.never]
            self.judged["never given"] = torch.cat(never)
        given = start(train_text, count)
        self.train = {"given": (given, given)}  # tokens and labels
        prompts = given[:, : seq_len // 8].tolist()
        self.written("own", lambda: self.own(count))
        self.written("continued", lambda: self.continued(prompts))
        bare, healed = copy.deepcopy(self.whole), copy.deepcopy(self.whole)
        size = Windows(args.heal_tokens, seq_len)
        hf_lnscale.heal(healed, args.layers, {"text": train_text}, tokenizer=self.tokenizer, windows=size)
        cuts = {"bare cut": bare, "closed form": healed}
        self.starts = {name: hf_lnscale.drop_layers(model, args.layers) for name, model in cuts.items()}
        self.starts["whole"] = self.whole

    def written(self, kind: str, write: Callable[[], list[torch.Tensor]]) -> None:
        """Adds training text written by the whole model, as tokens and labels; written only once."""
        path = Path(self.args.out).with_suffix(f".{self.name}.{kind}.pt")
        if not path.exists() and any(WAYS[way].text == kind for way in self.args.ways):
            started = time.process_time()
            torch.save(write(), path)
            print(f"{kind} text, written in {time.process_time() - started:.0f} core-seconds", flush=True)
        if path.exists():
            ids, labels = torch.load(path)
            self.train[kind] = ids.to(DEVICE), labels.to(DEVICE)

    def own(self, count: int) -> list[torch.Tensor]:
        """Text that the whole model writes without a prompt."""
        seq_len = self.args.seq_len
        ids = torch.cat(own_text(self.whole, self.tokenizer, count * seq_len, seq_len, batch_size=WRITTEN_AT_ONCE))
        return [ids, ids]

    def continued(self, prompts: list[list[int]]) -> list[torch.Tensor]:
        """The prompts, continued by the whole model, as one stream cut into windows, like in the recipe."""
        ids: list[int] = []
        labels: list[int] = []
        for first in range(0, len(prompts), WRITTEN_AT_ONCE):
            some = prompts[first : first + WRITTEN_AT_ONCE]
            longest = self.args.seq_len - len(some[0])
            written = continue_prompts(self.whole, self.tokenizer, some, longest, seed=first)
            for prompt, continuation in zip(some, written, strict=True):
                ids += prompt + continuation
                labels += [-100] * len(prompt) + continuation
        return [torch.tensor(one).unfold(0, self.args.seq_len, self.args.seq_len) for one in (ids, labels)]

    def run(self, way: str, start: str, rate: float = 0.0, seed: int = 0) -> Run:
        return Run(self.name, self.layers, way, start, rate, seed, self.args.budget)

    def controlled(self, run: Run) -> Run:
        """The run that is the control of this one."""
        if run.way != "none" and WAYS[run.way].loss == "text":
            return self.run(run.way, "whole", run.rate, run.seed)
        return self.run("none", "whole")

    def queue(self) -> Iterator[Run]:
        for start in ("whole", *self.args.starts):
            yield self.run("none", start)
        for seed in range(self.args.seeds):
            for start, way in itertools.product(self.args.starts, self.args.ways):
                rates = WAYS[way].rates[: self.args.rates] if seed == 0 else [self.best(way, start)]
                for run in (self.run(way, start, rate, seed) for rate in rates):
                    yield from dict.fromkeys((self.controlled(run), run))

    def losses(self, model: Any) -> Losses:
        with torch.autocast(DEVICE, torch.bfloat16):
            return losses(model.eval(), self.judged)

    def train_one(self, run: Run) -> dict[str, Any]:
        model = copy.deepcopy(self.starts[run.start])
        if run.way == "none":
            return {"losses": self.losses(model)}
        way, args = WAYS[run.way], self.args
        torch.manual_seed(run.seed)
        if way.trained == "lora":
            targets = ["gate_proj", "up_proj", "down_proj"]
            model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=targets))
        trained = trained_parameters(model, way)
        model.requires_grad_(False)
        for part in trained:
            part.requires_grad_()
        # The control takes as many steps as the pruned model.
        reference = model if way.trained == "lora" else self.starts["bare cut"]
        steps = int(args.budget // way.cost(reference, self.whole))
        rows, labels = self.train[way.text]
        order = torch.cat([torch.randperm(len(rows)) for _ in range(-(-steps * args.batch_size // len(rows)))])
        optimizer = torch.optim.AdamW(trained, lr=run.rate, betas=(0.9, 0.95), weight_decay=0.0)
        model.train()
        started = time.process_time()
        for step in range(steps):
            done = (step + 0.5) / steps
            warmup = min(1.0, done / 0.1)
            optimizer.param_groups[0]["lr"] = run.rate * warmup * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)
            at = order[step * args.batch_size : (step + 1) * args.batch_size]
            ids_BT, labels_BT = rows[at], labels[at]
            with torch.autocast(DEVICE, torch.bfloat16):
                if way.loss == "text":
                    loss = model(input_ids=ids_BT, labels=labels_BT).loss
                else:
                    loss = divergence(model, self.whole, ids_BT, labels_BT, way.loss)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seconds = time.process_time() - started
        return {"losses": self.losses(model), "steps": steps, "core_seconds": round(seconds, 1)}

    def gaps(self, run: Run) -> dict[str, tuple[float, float]]:
        """For each kind of text, the gap to the control in nats per token and its standard error over windows."""
        found, whole = (self.records[one]["losses"] for one in (run, self.controlled(run)))
        return {kind: difference(found, whole, [kind]) for kind in found}

    def best(self, way: str, start: str) -> float:
        """The learning rate with the smallest mean gap at seed 0, among those that have been run."""
        there = [rate for rate in WAYS[way].rates if self.run(way, start, rate) in self.records]
        gap = lambda rate: statistics.fmean(one for one, _ in self.gaps(self.run(way, start, rate)).values())  # noqa: E731
        return min(there, key=gap, default=math.nan)

    def tables(self) -> Iterator[str]:
        for start in STARTS:
            if self.run("none", start) not in self.records:
                continue
            rows = [["not trained", "", "", "", *self.cells([self.run("none", start)])]]
            for way in WAYS:
                rate = self.best(way, start)
                runs = [self.run(way, start, rate, seed) for seed in range(self.args.seeds)]
                if runs := [run for run in runs if run in self.records]:
                    steps = str(self.records[runs[0]]["steps"])
                    rows.append([way, f"{rate:g}", steps, str(len(runs)), *self.cells(runs)])
            kinds = self.records[self.run("none", start)]["losses"]
            head = [name for kind in kinds for name in (f"{kind}: loss", "gap")]
            yield f"\nFrom the {start}, {self.name} without layers {self.layers}, {self.args.budget} passes\n"
            yield markdown(["way", "rate", "steps", "seeds", *head], rows)

    def cells(self, runs: list[Run]) -> list[str]:
        """Mean loss and gap over seeds for each kind; the gap's error is over windows or seeds, whichever is larger."""
        cells = []
        for kind in self.records[runs[0]]["losses"]:
            loss = statistics.fmean(statistics.fmean(self.records[run]["losses"][kind]) for run in runs)
            gaps = [self.gaps(run)[kind] for run in runs]
            over_seeds = statistics.stdev(gap for gap, _ in gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0
            error = max(statistics.fmean(error for _, error in gaps), over_seeds)
            cells += [f"{loss:.3f}", f"{statistics.fmean(gap for gap, _ in gaps):+.3f} ± {error:.3f}"]
        return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a whole model, Llama-like")
    parser.add_argument("--text", required=True, help="a text file; the last fifth is held out")
    parser.add_argument("--layers", type=int, nargs="+", required=True, help="layers to drop")
    parser.add_argument("--budget", type=int, default=192, help="forward passes of the pruned model over a batch")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--heal-tokens", type=int, default=16_384, help="tokens for the closed form")
    parser.add_argument("--judged", type=int, default=16, help="windows of each kind of text to measure")
    parser.add_argument("--rates", type=int, default=2, help="number of learning rates to try from each grid")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--never", nargs="+", default=[], help="text files of other kinds, measured as one kind")
    parser.add_argument("--out", default="build/healing_ways.jsonl")
    parser.add_argument("--only-tables", action="store_true", help="print the results so far without training")
    args = parser.parse_args()
    bench = Bench(args)
    if not args.only_tables:
        bench.records.path.parent.mkdir(parents=True, exist_ok=True)  # the written text is there too
        bench.load()
        for run in bench.queue():
            if run in bench.records:
                continue
            bench.records.add(run, found := bench.train_one(run))
            means = {kind: round(statistics.fmean(one), 3) for kind, one in found["losses"].items()}
            print(f"{run.start}, {run.way}, {run.rate:g}, seed {run.seed}: {means}", flush=True)
    for table in bench.tables():
        print(table)


if __name__ == "__main__":
    main()
