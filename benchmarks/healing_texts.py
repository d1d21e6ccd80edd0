"""Heals a cut on some kinds of text and measures it on these and on kinds of text that healing never saw.

Each row heals the same cut on other sources, with the same total number of tokens. The first half of `--given` and of
each default source is used to fit and to choose the penalty, the second half is measured; of `--never`, the start is
measured. The tables show perplexities, with the change against the cut without healing and its standard error over
windows. "as told" is the change that the report of healing estimates for text that was not fitted on. "default" is
what happens without data; "default, whole step" is the same as if the default sources had been given, and "default and
own" adds text that the model writes itself as a third source.

    python benchmarks/healing_texts.py MODEL --given wiki.txt --never legal.txt c.txt --layers 12 13 14 15 [--gguf FILE]
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from judging import read, split
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_lnscale.core.display import markdown
from hf_lnscale.measuring.losses import SourceLosses, losses_by_source
from hf_lnscale.measuring.sample import default_sources, own_text
from hf_lnscale.measuring.text import TokenBatches, Windows, token_batches
from hf_lnscale.pruning.heal import Healer


def halves(texts: list[str]) -> tuple[list[str], list[str]]:
    if len(texts) > 1:
        return texts[: len(texts) // 2], texts[len(texts) // 2 :]
    return split(texts[0], 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--gguf", help="name of a GGUF file in the folder of the model")
    parser.add_argument("--given", required=True, help="a text file")
    parser.add_argument("--never", nargs="+", default=[], help="text files of other kinds, used for measuring only")
    parser.add_argument("--layers", type=int, nargs="+", action="append", required=True, help="to drop; repeatable")
    parser.add_argument("--tokens", type=int, default=8_192, help="tokens for fitting and for choosing the penalty")
    parser.add_argument("--judged", type=int, default=12, help="windows of each kind of text to measure")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--rows", nargs="+", default=["alone", "guarded", "mixed", "default"],
                        help="among them: 'default, whole step', 'default and own'")  # fmt: skip
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model, gguf_file=args.gguf)
    model = AutoModelForCausalLM.from_pretrained(args.model, gguf_file=args.gguf, dtype=torch.float32).eval()

    name = Path(args.given).stem
    kinds = {one: halves(texts) for one, texts in {name: [read(args.given)], **default_sources()}.items()}
    never = {Path(one).stem: [read(one)] for one in args.never}
    judged_texts = {one: texts[1] for one, texts in kinds.items()} | never
    windows = Windows(args.judged * args.seq_len, args.seq_len)
    judged = TokenBatches.join(
        {one: (token_batches(texts, tokenizer=tokenizer, windows=windows), 0) for one, texts in judged_texts.items()}
    )
    windows = Windows(args.tokens, args.seq_len)
    given = {name: kinds[name][0]}
    default = {one: texts[0] for one, texts in kinds.items() if one != name}

    def batches_of(texts: dict[str, list[str]], **changes: Any) -> TokenBatches:
        batches = token_batches(texts, tokenizer=tokenizer, windows=windows)
        vars(batches).update(changes)
        return batches

    rows: dict[str, Callable[[], Any]] = {
        "alone": lambda: batches_of(given, tokenizer=None),  # judged on nothing else
        "guarded": lambda: given,
        "mixed": lambda: given | default,
        "default": lambda: batches_of(default, given=False),
        "default, whole step": lambda: default,
        "default and own": lambda: default | {"own": own_text(model, tokenizer, args.tokens // 3, args.seq_len)},
    }

    whole = losses_by_source(model, judged)
    cuts = {tuple(layers): losses_by_source(model, judged, layers) for layers in args.layers}
    tables = {
        layers: [[*line(name, losses), "", "", "", ""] for name, losses in (("whole", whole), ("not healed", cut))]
        for layers, cut in cuts.items()
    }
    for row in args.rows:
        healer = Healer(model, rows[row](), tokenizer=None if row == "alone" else tokenizer, windows=windows)
        for layers, cut in cuts.items():
            started = time.process_time()
            with healer.healed(layers, progress=False) as report:
                seconds = time.process_time() - started
                healed = losses_by_source(model, judged, layers)
            fits = ", ".join(f"{one.ridge:g}" + (f" x {one.blend:g}" if one.blend < 1 else "") for one in report.steps)
            expected = report.never_fitted
            told = f"{expected['after'] / expected['before'] - 1:+.1%}" if expected else ""
            tables[layers].append([*line(row, healed, cut, list(never)), told, fits, f"{seconds:.0f}"])
            print(layers, " | ".join(tables[layers][-1]), flush=True)
    for layers, table in tables.items():
        print(f"\nWithout layers {', '.join(map(str, layers))}\n")
        print(markdown(["healed on", *whole.of, "never given, mean", "as told", "ridge", "core-s"], table))


def line(name: str, found: SourceLosses, cut: SourceLosses | None = None, never: Sequence[str] = ()) -> list[str]:
    """A row of perplexities; with `cut`, also their changes against it and the geometric mean change over `never`."""
    if cut is None:
        return [name, *(f"{math.exp(loss.mean):.2f}" for loss in found.of.values())]

    def change(names: Iterable[str]) -> str:
        pairs = [(found.of[one], cut.of[one]) for one in names]
        mean = sum(new.mean - old.mean for new, old in pairs) / len(pairs)
        error = math.hypot(*(new.error(old) or 0.0 for new, old in pairs)) / len(pairs)
        return f"{math.expm1(mean):+.1%} +- {error:.1%}"

    cells = [f"{math.exp(loss.mean):.2f} ({change([one])})" for one, loss in found.of.items()]
    return [name, *cells, change(never) if never else ""]


if __name__ == "__main__":
    main()
