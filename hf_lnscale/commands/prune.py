"""`hf-lnscale prune`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from ..core.json_file import to_json
from .options import (
    TEXT,
    AsJson,
    BatchSize,
    Checkpoint,
    Device,
    Dtype,
    Force,
    SeqLen,
    parse_bytes,
    parse_count,
    parse_increase,
    parse_layers,
    written,
)


def prune(
    model: Checkpoint,
    out: Annotated[Path, Option(help="Folder to write.")],
    data: Annotated[
        list[str] | None,
        Option(
            metavar="[NAME=]FILE[:WEIGHT]",
            help=f"{TEXT}. Several sources: --data wiki=a.txt --data code=b.jsonl:0.5. Defaults to English and Python "
            "code shipped with Python.",
        ),
    ] = None,
    num_layers: Annotated[int | None, Option("--layers", help="Drop this many layers.")] = None,
    max_perplexity_increase: Annotated[
        Any,
        Option(
            "--max-ppl-increase",
            parser=parse_increase,
            metavar="SHARE",
            help="Drop as many layers as possible within this increase on held-out data, e.g. 10%.",
        ),
    ] = None,
    target_params: Annotated[
        Any, Option(parser=parse_count, metavar="COUNT", help="Drop until this many parameters are left, e.g. 500M.")
    ] = None,
    target_memory: Annotated[
        Any, Option(parser=parse_bytes, metavar="SIZE", help="Drop until weights and KV cache fit, e.g. 4GiB.")
    ] = None,
    cache_tokens: Annotated[int, Option(help="Tokens in the KV cache included in --target-memory.")] = 0,
    cache_batch: Annotated[int, Option(help="Sequences in that cache.")] = 1,
    drop: Annotated[
        Any, Option(parser=parse_layers, metavar="LAYERS", help="Drop these layers, e.g. 12,14,17 or 12-14.")
    ] = None,
    method: Annotated[str | None, Option(help="How layers are chosen; see docs/pruning.md. Default: best_of.")] = None,
    units: Annotated[
        str, Option(help="layers; or sublayers: layers, attention and MLPs, relative to what each saves.")
    ] = "layers",
    heal: Annotated[
        str, Option(help="How to heal the cut without training: refit, linear, ..., none; auto: refit if possible.")
    ] = "auto",
    held_out: Annotated[Path | None, Option(help="Evaluation data, instead of a quarter of --data.")] = None,
    num_tokens: Annotated[int, Option("--tokens", help="Number of tokens to use; a quarter is held out.")] = 16_384,
    abilities: Annotated[
        bool, Option("--abilities", help="Also measure sums, copying, MMLU questions and agreement with the original.")
    ] = False,
    seq_len: SeqLen = None,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    device: Device = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Make a model smaller by dropping layers, chosen by measurement.

    Requires exactly one of --layers, --max-ppl-increase, --target-params,
    --target-memory and --drop.
    """
    from ..checkpoints.folders import public_command
    from ..checkpoints.names import Placement
    from ..measuring.text import Windows, parse_sources
    from ..pruning.prune import prune as run

    sources: Any = None
    if data:
        sources = data[0] if len(data) == 1 and Path(data[0]).is_file() else parse_sources(data)
    found = run(
        model, sources, num_layers=num_layers, max_perplexity_increase=max_perplexity_increase,
        target_params=target_params, target_memory=target_memory, cache_tokens=cache_tokens, cache_batch=cache_batch,
        drop=drop, method=method, units=units, heal=None if heal == "none" else heal, held_out=held_out,
        windows=Windows(num_tokens, seq_len, batch_size), placement=Placement(dtype, device), out=out, force=force,
        abilities=abilities, command=public_command(["hf-lnscale", *sys.argv[1:]]),
    )  # fmt: skip
    plan = found.plan
    if as_json:
        print(to_json({"path": str(out), **dataclasses.asdict(plan)}, indent=2))
        return
    print(found)
    if plan.heal is not None and "healed" not in plan.perplexity:
        print("healing did not help on held-out data and was not applied")
    print(written(out, found.model.config))
