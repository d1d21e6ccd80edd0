"""What a cut costs and what it saves: whole layers compared with attention alone, both healed, as a table and a plot.

    python benchmarks/pruning_quality.py MODEL --given wiki.txt --never licences.txt cpp.txt \\
        --rules prune "attention alone, healed"
    python benchmarks/pruning_savings.py MODEL --given wiki.txt --plot savings.png

With several models, each is a row of plots. The cost is read from the output of `pruning_quality.py`: the increase in
perplexity on kinds of text that were never given, with its standard error. The savings are measured here: parameters,
the KV cache of 4,096 tokens, and the time to decode a token after a prompt. For the last, a checkpoint of each cut is
written, and all checkpoints are timed in turn (median, and range over the runs).
"""

from __future__ import annotations

import argparse
import math
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from judging import DEVICE, Records, difference
from matplotlib.figure import Figure
from pruning_quality import Row
from transformers import AutoModelForCausalLM

import hf_lnscale  # noqa: F401 - turns the flags on
from hf_lnscale.checkpoints.names import Placement
from hf_lnscale.core.display import markdown
from hf_lnscale.evaluation.speed import measure
from hf_lnscale.pruning.target import Target

RULES = {"prune": "layers", "attention alone, healed": "attention alone"}
CACHE_TOKENS = 4096
SAVED = {"parameters": "parameters", "cache": f"KV cache, {CACHE_TOKENS:,} tokens", "decode": "time to decode"}


@dataclass
class Cut:
    """One cut: its cost and its savings.

    Attributes:
        model, what, count: the model, what was removed, and from how many layers.
        cost, error: the increase in perplexity as a fraction, and its standard error.
        saved: for each key of `SAVED`, the fraction saved: median, lowest, highest.
    """

    model: str
    what: str
    count: int
    cost: float
    error: float
    saved: dict[str, tuple[float, float, float]] = field(default_factory=dict)


def cuts_of(folder: Path, args: argparse.Namespace) -> list[Cut]:
    rows = Records(args.rows, Row).items()
    found = {(row.rule, row.layers): one for row, one in rows if row.model == folder.name}
    base = found["whole", 0]["losses"]
    kinds = [kind for kind in base if kind != args.given.stem]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16").to(DEVICE).eval()
    cuts, folders = [], [folder]
    with ExitStack() as stack:
        for (rule, count), one in sorted(found.items()):
            if rule not in RULES:
                continue
            mean, error = difference(one["losses"], base, kinds)
            cut = Cut(folder.name, RULES[rule], count, math.expm1(mean), math.exp(mean) * error)
            units = [*one["dropped"], *(("attention", layer) for layer in one["attention"])]
            sizes = Target(model, ("num_layers", 1), CACHE_TOKENS).sizes(units)
            for name, key in (("parameters", "params"), ("cache", "cache_bytes")):
                before, after = sizes[key]
                cut.saved[name] = (1 - after / before,) * 3
            folders.append(Path(stack.enter_context(tempfile.TemporaryDirectory())))
            flags = {"drop_layers": one["dropped"] or None, "drop_attention": one["attention"] or None}
            AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16", **flags).save_pretrained(folders[-1])
            cuts.append(cut)
        speeds = measure(
            *folders, placement=Placement("bfloat16", DEVICE), prompt_tokens=args.prompt, repeats=args.repeats
        )
    whole, *others = (speed.decode_tokens_per_second for speed in speeds)
    for cut, speed in zip(cuts, others, strict=True):
        low, middle, high = (1 - whole.median / one for one in (speed.lowest, speed.median, speed.highest))
        cut.saved["decode"] = middle, low, high
    return cuts


def draw(cuts: list[Cut], path: Path) -> None:
    models = list(dict.fromkeys(cut.model for cut in cuts))
    figure = Figure(figsize=(10, 2.9 * len(models)), layout="constrained")
    for row, model in zip(figure.subplots(len(models), len(SAVED), squeeze=False, sharey="row"), models, strict=True):
        row[0].set_ylabel(f"{model}\nincrease in perplexity")
        for axes, (key, name) in zip(row, SAVED.items(), strict=True):
            for what, marker in (("layers", "s"), ("attention alone", "o")):
                some = [cut for cut in cuts if (cut.model, cut.what) == (model, what)]
                x = [100 * cut.saved[key][0] for cut in some]
                spread = [[100 * abs(cut.saved[key][0] - cut.saved[key][end]) for cut in some] for end in (1, 2)]
                y, errors = [100 * cut.cost for cut in some], [100 * cut.error for cut in some]
                axes.errorbar(x, y, errors, spread, marker=marker, label=what)
            axes.set_xlabel(f"{name} saved")
            axes.xaxis.set_major_formatter("{x:.0f} %")
            axes.yaxis.set_major_formatter("+{x:.0f} %")
            axes.set_xlim(left=min(0, axes.get_xlim()[0]))
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
        row[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="folders of whole models")
    parser.add_argument("--given", type=Path, required=True, help="the text given to pruning_quality.py")
    parser.add_argument("--rows", type=Path, default=Path("build/pruning_quality.jsonl"), help="its output")
    parser.add_argument("--prompt", type=int, default=1024, help="prompt tokens before the timed ones")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plot", type=Path, help="file to save the plot to")
    args = parser.parse_args()
    cuts = [cut for folder in args.models for cut in cuts_of(folder, args)]
    table = []
    for cut in cuts:
        parameters, cache, (middle, low, high) = (cut.saved[key] for key in SAVED)
        decode = f"{middle:.1%} ({low:.1%} to {high:.1%})"
        cost = f"{cut.cost:+.1%} ± {cut.error:.1%}"
        table.append([cut.model, cut.what, str(cut.count), cost, f"{parameters[0]:.1%}", f"{cache[0]:.1%}", decode])
    print(markdown(["model", "without", "number", "increase, never given", *SAVED.values()], table))
    if args.plot:
        draw(cuts, args.plot)


if __name__ == "__main__":
    main()
