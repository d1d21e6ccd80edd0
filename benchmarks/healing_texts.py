"""Healing on one kind of text, judged on others: what is given, what is not, and what the guard is worth.

For a set of layers that go, each row heals on other sources of text, with as many tokens in all, and is judged on
windows of each kind that were neither fitted nor used to choose the penalty. A column is marked where its kind was not
fitted. Kinds: a file of your own, English (language reference and docstrings) and code (the standard library), and, to
fit on alone, text that the model writes itself.

    python benchmarks/healing_texts.py MODEL TEXT_FILE --layers 12 13 14 15 [--gguf FILE]
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lnscale.core.display import markdown
from hf_lnscale.measuring.losses import SourceLosses, losses_by_source
from hf_lnscale.measuring.sample import default_sources
from hf_lnscale.measuring.text import TokenBatches, Windows, token_batches
from hf_lnscale.pruning.heal import Healer

# Name of the row -> weights of the sources.
FITS: dict[str, dict[str, float]] = {
    "text": {"text": 1},
    "text, guarded": {"text": 1, "english": 0, "python": 0},
    "text and a little of the default": {"text": 1, "english": 0.25, "python": 0.25},
    "text, english": {"text": 1, "english": 1},
    "text, python": {"text": 1, "python": 1},
    "english, python (the default)": {"english": 1, "python": 1},
    "text, english, python": {"text": 1, "english": 1, "python": 1},
    "own": {"own": 1},
    "own, guarded": {"own": 1, "english": 0, "python": 0},
    "text, own": {"text": 1, "own": 1},
    "english, python, own": {"english": 1, "python": 1, "own": 1},
}


def parts_of(sources: TokenBatches, weights: dict[str, float], windows: Windows) -> TokenBatches:
    """As many tokens in all as `windows` says, by weight; a quarter of the average for what is judged only."""
    total, per_window = sum(weights.values()), windows.seq_len
    chosen = {}
    for name, weight in weights.items():
        share = weight / total or 0.125
        count = max(2, round(windows.num_tokens * share / per_window))
        ids = torch.cat([batch.input_ids for batch in sources.only(name)])[:count]
        chosen[name] = token_batches(list(ids.split(windows.batch_size))), weight
    return TokenBatches.join(chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", help="a text file; its first part is fitted, its last judged")
    parser.add_argument("--gguf", help="name of a GGUF file in the folder")
    parser.add_argument("--layers", type=int, nargs="+", action="append", required=True, help="may be repeated")
    parser.add_argument("--tokens", type=int, default=8_192, help="to fit on and to choose the penalty by")
    parser.add_argument("--judged", type=int, default=8, help="windows of each kind")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--fits", type=int, nargs="+", default=range(len(FITS)), help="rows, counted from 0")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model, gguf_file=args.gguf)
    model = AutoModelForCausalLM.from_pretrained(args.model, gguf_file=args.gguf, dtype=torch.float32).eval()
    fits = [list(FITS)[index] for index in args.fits]

    windows = Windows(args.tokens + args.judged * args.seq_len, args.seq_len, 8)
    with open(args.text, encoding="utf-8") as file:
        kinds: dict[str, Any] = {"text": [file.read().replace("<unk>", "unk")], **default_sources()}
    started = time.process_time()
    if any("own" in FITS[name] for name in fits):
        own = default_sources(model, tokenizer, args.tokens, args.seq_len)["own"]
        print(f"{args.tokens:,} tokens of its own: {time.process_time() - started:.0f} core-seconds")
    sources, judged = {}, {}
    for name, data in kinds.items():
        batches = token_batches(data, tokenizer=tokenizer, windows=windows)
        ids = torch.cat([batch.input_ids for batch in batches])
        sources[name] = token_batches(list(ids[: -args.judged].split(8))), 1.0
        judged[name] = token_batches(list(ids[-args.judged :].split(8))), 1.0
    if any("own" in FITS[name] for name in fits):
        sources["own"] = token_batches(own), 1.0
    text, judge = TokenBatches.join(sources), TokenBatches.join(judged)

    whole = losses_by_source(model, judge)
    rows: dict[tuple[int, ...], list[list[str]]] = {}
    cut = {}
    for layers in map(tuple, args.layers):
        cut[layers] = losses_by_source(model, judge, layers)
        rows[layers] = [row("whole model", whole), row("not healed", cut[layers])]
    for name in fits:
        healer = Healer(model, parts_of(text, FITS[name], windows=Windows(args.tokens, args.seq_len, 8)))
        for layers, table in rows.items():
            started = time.process_time()
            with healer.healed(layers, progress=False) as report:
                seconds = time.process_time() - started
                found = losses_by_source(model, judge, layers)
            fitted = {source for source, weight in FITS[name].items() if weight}
            steps = ", ".join(f"{s.ridge:g}" + (f" x {s.blend:g}" if s.blend < 1 else "") for s in report.steps)
            table.append(row(name, found, cut[layers], fitted, steps, f"{seconds:.0f}"))
            print(layers, " | ".join(table[-1]), flush=True)
            for source, one in report.sources.items():
                if one.perplexity_left_out is not None:
                    print(f"    {source}: {one.perplexity_before:.2f}, never fitted {one.perplexity_left_out:.2f}")
    for layers, table in rows.items():
        print(f"\nWithout layers {', '.join(map(str, layers))}\n")
        print(markdown(["fitted on", *judge.weights, "not fitted", "ridge", "core-s"], table))


def row(
    name: str,
    found: SourceLosses,
    cut: SourceLosses | None = None,
    fitted: set[str] | None = None,
    steps: str = "",
    seconds: str = "",
) -> list[str]:
    """Perplexities; those of kinds that were not fitted are marked, with the change of their geometric mean."""
    cells = []
    for source, loss in found.of.items():
        error = cut and loss.error(cut.of[source])
        mark = "*" if cut and fitted is not None and source not in fitted else ""
        cells.append(f"{math.exp(loss.mean):.2f}{mark}" + (f" ({error:.1%})" if error else ""))
    unseen = [source for source in found.of if cut and fitted is not None and source not in fitted]
    change = sum(found.of[one].mean - cut.of[one].mean for one in unseen) / len(unseen) if unseen and cut else None
    return [name, *cells, "" if change is None else f"{math.expm1(change):+.1%}", steps, seconds]


if __name__ == "__main__":
    main()
