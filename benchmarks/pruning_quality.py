"""What dropping layers costs without any training: compares rules on the same data, judged on this and other text.

    python benchmarks/pruning_quality.py MODEL --given wiki.txt --never licences.txt cpp.txt --layers 2 4 6  # resumes
    python benchmarks/pruning_quality.py FOLDER --gguf FILE ...  # with a GGUF file
    python benchmarks/pruning_quality.py MODEL ... --only-tables  # the results so far

Layers are chosen and cuts are repaired on the start of `--given`. Cuts are judged on its end and on the start of each
file of `--never`. The first table shows the increase in perplexity over the whole model, with its standard error over
windows; for the kinds that were never given, it is the increase in the geometric mean. A second table shows how healing
changes the cuts of `prune`. The rules of others are reimplemented from their papers:

- deepest: the last layers except the very last, the simplest strategy of Gromov et al. (arXiv 2403.17887).
- Block Influence: one pass, lowest first (ShortGPT, arXiv 2403.03853).
- Prune&Comp (arXiv 2507.18212): Block Influence one layer at a time, measured again after each. After each cut, a
  factor restores the magnitude (mean absolute value) that the residual stream had at that point.
- SLEB (arXiv 2402.09025): one layer at a time, always the one whose removal gives the lowest loss, on a quarter of the
  tokens.
- angular block: the contiguous block with the smallest angular distance (Gromov et al.).
- LinearPatch (arXiv 2505.24680) on that block: a factor for each channel of the residual stream, in a Hadamard basis
  (with blocks of the largest power of two that divides the hidden size).
- ReplaceMe (arXiv 2505.02819) on that block: a linear map of the last MLP's output, by least squares or by cosine
  distance (Adam, learning rate 1e-4, 10 epochs, 1,024 tokens per batch).
- the same with English and code: ReplaceMe's least squares, with Python's English and code beside that text, half as
  many tokens of each, as `prune` adds them.
- attention alone: removes the attention, but not the MLP, of the same number of layers, which saves as much KV cache.
  These are the layers whose attention costs least on its own, measured on a quarter of the tokens. Without repair or,
  "healed", repaired by `hf_lnscale.heal` on that text.
- prune: `hf_lnscale.prune` with its defaults, on that text, to which it adds Python's English and code; without these,
  "fitted on it alone", as the rules of others are; and without a text (`data=None`), on Python's English and code.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from judging import DEVICE, Losses, Records, difference, losses, read, split, windows
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_lnscale
from hf_lnscale.core.display import markdown
from hf_lnscale.core.record import record
from hf_lnscale.measuring.losses import sweep
from hf_lnscale.measuring.sample import default_sources
from hf_lnscale.measuring.text import TokenBatches, Windows, token_batches
from hf_lnscale.pruning.prune import plan_pruning
from hf_lnscale.pruning.scores import score_layers


class NotApplicableError(Exception):
    """A rule cannot make a cut of a model; its cell stays empty."""


@dataclass(frozen=True)
class Row:
    """One cut; equal cuts are not made again."""

    model: str
    rule: str
    layers: int
    tokens: int


class Data:
    """The data that every rule gets.

    Attributes:
        text: the documents for choosing layers and repairing the cut.
        batches: the same as token ids; `quarter` is the first quarter of them.
        windows: the sizes of the windows.
        most: the largest number of layers that will be dropped.
    """

    def __init__(self, path: Path, tokenizer: Any, tokens: int, seq_len: int, most: int) -> None:
        self.most = most
        self.text, self.judged = split(read(path), 5)
        self.tokenizer, self.windows = tokenizer, Windows(tokens, seq_len)
        self.batches = token_batches(self.text, tokenizer=tokenizer, windows=self.windows)
        self.quarter = token_batches(self.text, tokenizer=tokenizer, windows=Windows(tokens // 4, seq_len))


Rule = Callable[[Any, Data, int], nn.Module]


def cut(model: nn.Module, gone: Iterable[int]) -> nn.Module:
    return hf_lnscale.drop_layers(copy.deepcopy(model), sorted(gone))


@torch.no_grad()
def inputs_of(modules: dict[str, nn.Module], model: Any, batches: TokenBatches, use: Callable[[dict], None]) -> None:
    """Runs a model and calls `use` on the module inputs of each batch, in double precision, shape (N, D)."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, given, keywords: seen.__setitem__(
            name, (given[0] if given else keywords["hidden_states"]).double().flatten(0, 1)
        )

    handles = [one.register_forward_pre_hook(keep(name), with_kwargs=True) for name, one in modules.items()]
    for batch in batches:
        model.model(**batch.to(model.device).model_inputs(), use_cache=False)
        use(seen)
    for handle in handles:
        handle.remove()


def apply_to_output(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def hook(_: Any, __: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0].float()).to(output[0].dtype), *output[1:])
        return change(output.float()).to(output.dtype)

    module.register_forward_hook(hook)


def block(model: Any, data: Data, count: int) -> tuple[list[int], dict[str, nn.Module]]:
    """The angular block, and the modules whose inputs are the residual stream at its start and end."""
    gone = score_layers(model, data.batches, "angular").lowest(count)
    if not gone[0]:
        raise NotApplicableError(
            "the angular block begins with the first layer, so that there is no layer before it to repair"
        )
    places = [*model.model.layers, model.model.norm]
    return gone, {"start": places[gone[0]], "end": places[gone[-1] + 1]}


def mapped(model: Any, gone: list[int], map_DD: torch.Tensor, name: str = "") -> nn.Module:
    """The cut, with a linear map of the output of the layer before it, or of a module in that layer."""
    found: Any = cut(model, gone)
    apply_to_output(found.model.layers[gone[0] - 1].get_submodule(name), lambda x: x @ map_DD)
    return found


def prune_and_compensate(model: Any, data: Data, count: int) -> nn.Module:
    model = copy.deepcopy(model)
    for _ in range(count):
        layers = list(range(len(model.model.layers)))
        modules = {str(index): layer for index, layer in enumerate(model.model.layers)} | {"end": model.model.norm}
        cosines, sizes = [0.0] * len(layers), [[0.0, 0.0] for _ in layers]

        def add(seen: dict[str, torch.Tensor], cosines: list = cosines, sizes: list = sizes) -> None:
            states = list(seen.values())
            for index, (x_ND, y_ND) in enumerate(itertools.pairwise(states)):
                cosines[index] += functional.cosine_similarity(x_ND, y_ND).sum().item()
                sizes[index][0] += x_ND.abs().mean(-1).sum().item()
                sizes[index][1] += y_ND.abs().mean(-1).sum().item()

        inputs_of(modules, model, data.batches, add)
        # The first layer is kept, since there is no layer before it whose output could be rescaled.
        gone = max(layers[1:], key=cosines.__getitem__)
        factor = sizes[gone][1] / sizes[gone][0]
        apply_to_output(model.model.layers[gone - 1], lambda x, factor=factor: x * factor)
        hf_lnscale.drop_layers(model, [gone])
    return model


def hadamard(size: int) -> torch.Tensor:
    """An orthogonal matrix with Sylvester blocks of the largest power of two that divides the size."""
    part = torch.ones(1, 1, dtype=torch.float64)
    while size % (2 * len(part)) == 0:
        part = torch.cat([torch.cat([part, part], 1), torch.cat([part, -part], 1)])
    return torch.block_diag(*[part / math.sqrt(len(part))] * (size // len(part)))


def linear_patch(model: Any, data: Data, count: int) -> nn.Module:
    gone, ends = block(model, data, count)
    h_DD = hadamard(model.config.hidden_size).to(model.device)
    ratios: list[torch.Tensor] = []

    def add(seen: dict[str, torch.Tensor]) -> None:
        ratios.append(((seen["end"] @ h_DD).abs().mean(0)) / ((seen["start"] @ h_DD).abs().mean(0)))

    inputs_of(ends, model, data.batches, add)
    return mapped(model, gone, (h_DD * torch.stack(ratios).mean(0) @ h_DD.T).float())


def replace_me(by: str) -> Callable[[Any, Data, int], nn.Module]:
    def repaired(model: Any, data: Data, count: int) -> nn.Module:
        gone, ends = block(model, data, count)
        before = model.model.layers[gone[0] - 1]
        # A norm on the output of the branch, as in Gemma, is part of the branch.
        name = "post_feedforward_layernorm" if hasattr(before, "post_feedforward_layernorm") else "mlp"
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        outputs: list[torch.Tensor] = []
        handle = before.get_submodule(name).register_forward_hook(
            lambda _, __, output: outputs.append(output.double().flatten(0, 1))
        )

        def add(seen: dict[str, torch.Tensor]) -> None:
            m_ND = outputs.pop()
            pairs.append((m_ND, seen["end"] - (seen["start"] - m_ND)))

        inputs_of(ends, model, data.batches, add)
        handle.remove()
        m_ND, target_ND = (torch.cat(part) for part in zip(*pairs, strict=True))
        map_DD = torch.linalg.lstsq(m_ND, target_ND).solution if by == "least squares" else by_cosine(m_ND, target_ND)
        return mapped(model, gone, map_DD.float(), name)

    return repaired


def with_english_and_code(rule: Rule) -> Rule:
    """The same rule, given the default sources too: half as many tokens of each as of the text."""

    def made(model: Any, data: Data, count: int) -> nn.Module:
        data, windows = copy.copy(data), Windows(data.windows.num_tokens // 2, data.windows.seq_len)
        others = {name: token_batches(texts, tokenizer=data.tokenizer, windows=windows)
                  for name, texts in default_sources().items()}  # fmt: skip
        data.batches = TokenBatches.join({name: (one, 1.0) for name, one in {"given": data.batches, **others}.items()})
        return rule(model, data, count)

    return made


def by_cosine(m_ND: torch.Tensor, target_ND: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    m_ND, target_ND = m_ND.float(), target_ND.float()
    map_DD = nn.Parameter(torch.eye(m_ND.shape[1], device=m_ND.device))
    optimizer = torch.optim.Adam([map_DD], lr=1e-4)
    for _ in range(10):
        for rows in torch.randperm(len(m_ND)).split(1024):
            optimizer.zero_grad()
            (1 - functional.cosine_similarity(m_ND[rows] @ map_DD, target_ND[rows]).mean()).backward()
            optimizer.step()
    return map_DD.detach()


def pruned(model: Any, text: Any, data: Data, count: int) -> nn.Module:
    return hf_lnscale.prune(
        copy.deepcopy(model), text, num_layers=count, tokenizer=data.tokenizer, windows=data.windows, progress=False
    ).model


@functools.cache
def sleb_steps(model: Any, data: Data, most: int) -> list[list[int]]:
    plan = plan_pruning(model, data.quarter, num_layers=most, method="greedy", progress=False)
    return [step["layers"] for step in plan.steps]


def sleb(model: Any, data: Data, count: int) -> nn.Module:
    return cut(model, sleb_steps(model, data, data.most)[count - 1])


@functools.cache
def attention_losses(model: Any, data: Data) -> dict[int, float]:
    candidates = [("attention", layer) for layer in range(model.config.num_hidden_layers)]
    _, losses = sweep(model, data.quarter, candidates=candidates, progress=False)
    return {layer: loss.mean for (_, layer), loss in losses.items()}


def attention_alone(model: Any, data: Data, count: int, heal: bool = False) -> nn.Module:
    losses, model = attention_losses(model, data), copy.deepcopy(model)
    gone = sorted(sorted(losses, key=losses.__getitem__)[:count])
    if heal:
        hf_lnscale.heal(
            model, [], data.text, attention=gone, tokenizer=data.tokenizer, windows=data.windows, progress=False,
            cross_validate=False,
        )  # fmt: skip
    return hf_lnscale.drop_layers(model, [], attention=gone)


def one_pass(method: str) -> Callable[[Any, Data, int], nn.Module]:
    return lambda model, data, count: cut(model, score_layers(model, data.batches, method).lowest(count))


PRUNE: dict[str, Rule] = {
    "prune": lambda model, data, count: pruned(model, data.text, data, count),
    "prune, fitted on it alone": lambda model, data, count: (
        hf_lnscale.prune(
            # Token ids without their tokenizer, so that no other text can be added.
            copy.deepcopy(model),
            [batch.input_ids for batch in data.batches],
            num_layers=count,
            progress=False,
        ).model
    ),
    "prune, without a text": lambda model, data, count: pruned(model, None, data, count),
}
RULES: dict[str, Rule] = {
    "deepest": lambda model, data, count: cut(model, list(range(-1 - count, -1))),
    "Block Influence": one_pass("block_influence"),
    "Prune&Comp": prune_and_compensate,
    "SLEB": sleb,
    "angular block": one_pass("angular"),
    "LinearPatch": linear_patch,
    "ReplaceMe, least squares": replace_me("least squares"),
    "ReplaceMe, least squares, with English and code": with_english_and_code(replace_me("least squares")),
    "ReplaceMe, cosine": replace_me("cosine"),
    "attention alone": attention_alone,
    "attention alone, healed": functools.partial(attention_alone, heal=True),
    **PRUNE,
}


def increase(found: Losses, whole: Losses, kinds: list[str]) -> str:
    """The increase in the geometric mean of perplexities, with its standard error."""
    mean, error = difference(found, whole, kinds)
    if mean > math.log(11):
        return f"x {math.exp(mean):,.0f}"
    return f"{math.expm1(mean):+.1%} ± {math.exp(mean) * error:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a whole model, Llama-like")
    parser.add_argument("--gguf", help="name of a GGUF file in the folder of the model")
    parser.add_argument("--given", type=Path, required=True, help="a text file; the last fifth is judged")
    parser.add_argument("--never", type=Path, nargs="+", required=True, help="text files of other kinds, to judge on")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 6])
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens for choosing layers and repairing cuts")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--judged", type=int, default=16, help="windows of each kind of text to judge on")
    parser.add_argument("--dtype", default="bfloat16", help="data type of the weights")
    parser.add_argument("--out", type=Path, default=Path("build/pruning_quality.jsonl"))
    parser.add_argument("--only-tables", action="store_true")
    args = parser.parse_args()
    name = Path(args.model).name
    found = Records(args.out, Row)
    whole = Row(name, "whole", 0, args.tokens)
    wanted = [whole, *(Row(name, rule, count, args.tokens) for count in args.layers for rule in args.rules)]
    if not args.only_tables and not set(wanted) <= set(found):
        measure([row for row in wanted if row not in found], found, args)
    if whole not in found:
        return
    base = found[whole]["losses"]
    shown = ", ".join(f"{kind} {math.exp(statistics.fmean(one)):.2f}" for kind, one in base.items())
    print(f"\n{name}: perplexity of the whole model: {shown}\n")
    kinds = [kind for kind in base if kind != args.given.stem]
    table = []
    for rule in args.rules:
        rows = [found.get(Row(name, rule, count, args.tokens)) for count in args.layers]
        sets = ([args.given.stem], kinds)
        table.append([rule, *(increase(row["losses"], base, one) if row else "" for row in rows for one in sets)])
    print(markdown(["rule", *(f"{n} layers, {kind}" for n in args.layers for kind in ("given", "never given"))], table))
    table = []
    for row in wanted:
        if "not_healed" in (one := found.get(row, {})):
            cells = [increase(one["losses"], one["not_healed"], some) for some in (*([kind] for kind in base), kinds)]
            table.append([row.rule, str(row.layers), ", ".join(map(str, one["dropped"])), *cells])
    print("\nhealed, compared with the same cut not healed:\n")
    print(markdown(["rule", "layers", "dropped", *base, "never given"], table))


def measure(rows: list[Row], found: Records, args: argparse.Namespace) -> None:
    """Makes the cuts, and adds their losses to the results."""
    tokenizer = AutoTokenizer.from_pretrained(args.model, gguf_file=args.gguf)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, gguf_file=args.gguf, dtype=args.dtype)
    model = model.to(DEVICE).eval()
    data = Data(args.given, tokenizer, args.tokens, args.seq_len, max(args.layers))
    texts = {args.given.stem: data.judged} | {one.stem: [one.read_text(encoding="utf-8")] for one in args.never}
    judged = {kind: windows(text, tokenizer, args.judged, args.seq_len) for kind, text in texts.items()}
    for row in rows:
        started = time.process_time()
        try:
            smaller = model if row.rule == "whole" else RULES[row.rule](model, data, row.layers)
        except NotApplicableError as error:
            print(f"{row.rule} {row.layers}: {error}")
            continue
        seconds = time.process_time() - started
        one: dict[str, Any] = {"losses": losses(smaller, judged), "core_seconds": round(seconds, 1)}
        if gone := record(smaller.config).dropped:
            one |= {"dropped": gone.layers, "attention": gone.attention}
        if row.rule in PRUNE:
            one["not_healed"] = losses(cut(model, one["dropped"]), judged)
        found.add(row, one)
        print(row.rule, row.layers, {kind: round(statistics.fmean(some), 3) for kind, some in one["losses"].items()})


if __name__ == "__main__":
    main()
