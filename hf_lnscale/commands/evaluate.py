"""`hf-lnscale evaluate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from ..core.display import one_line, rich_text
from ..core.json_file import to_json
from .options import TEXT, AsJson, Device, Dtype


def evaluate(
    models: Annotated[list[str], Argument(metavar="MODEL...", help="Models to evaluate; the first is the reference.")],
    data: Annotated[Path | None, Option(help=f"{TEXT}, for perplexity.")] = None,
    tasks: Annotated[
        str | None, Option(help="lm-evaluation-harness tasks, e.g. hellaswag,arc_easy, or task files.")
    ] = None,
    include_path: Annotated[Path | None, Option(help="A folder with task files.")] = None,
    limit: Annotated[int | None, Option(help="Maximum number of documents per task.")] = None,
    num_fewshot: Annotated[int | None, Option(help="Number of few-shot examples in tasks.")] = None,
    max_bytes: Annotated[int | None, Option(help="Use only this many bytes of the text, from its start.")] = None,
    seq_len: Annotated[int | None, Option(help="Tokens per window; defaults to 1024 or the models' maximum.")] = None,
    stride: Annotated[int | None, Option(help="Tokens between window starts; defaults to half a window.")] = None,
    batch_size: Annotated[int, Option(help="Windows, or task requests, per batch.")] = 4,
    abilities: Annotated[
        bool, Option("--abilities", help="Sums, copying, MMLU questions, agreement with the first model.")
    ] = False,
    speed: Annotated[bool, Option("--speed/--no-speed", help="Measure speed and memory.")] = True,
    prompt_tokens: Annotated[
        int | None, Option(help="Prompt length for measuring speed. Default: 512, or the models' positions if fewer.")
    ] = None,
    new_tokens: Annotated[int, Option(help="Tokens to decode after the prompt.")] = 32,
    repeats: Annotated[int, Option(help="Number of timed runs; the median is shown.")] = 5,
    dtype: Dtype = "auto",
    device: Device = None,
    out: Annotated[
        Path | None, Option(help="Also write the result to a .json or .md file, or to the model's folder.")
    ] = None,
    as_json: AsJson = False,
    as_markdown: Annotated[bool, Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Compare models: quality, speed, memory, size.

    Perplexity and bits per byte of a text, tasks of lm-evaluation-harness,
    tokens per second, time to the first token, peak memory, parameters, size
    on disk. The first model is the reference; differences have standard errors.
    """
    from rich.console import Console

    from ..checkpoints.names import Placement
    from ..evaluation.comparison import evaluate as run
    from ..evaluation.comparison import report_path

    if out is not None:
        report_path(out)
    if as_json and as_markdown:
        raise typer.BadParameter("--json and --markdown are mutually exclusive")
    named = None if tasks is None else [task.strip() for task in tasks.split(",") if task.strip()]
    if named == []:
        raise typer.BadParameter(f"--tasks: {tasks!r} contains no task")
    found = run(
        models, data, tasks=named or (),
        include_path=include_path, limit=limit, num_fewshot=num_fewshot, max_bytes=max_bytes, seq_len=seq_len,
        stride=stride, batch_size=batch_size, abilities=abilities, speed=speed, prompt_tokens=prompt_tokens,
        new_tokens=new_tokens, repeats=repeats, placement=Placement(dtype, device),
    )  # fmt: skip
    if as_json:
        print(to_json(found.to_dict(), indent=2))
    elif as_markdown:
        print(found.markdown())
    else:
        console = Console(highlight=False)
        console.print(found.table())
        console.print(rich_text(found.notes))
    if out is not None:
        print(f"wrote {one_line(found.save(out))}", file=sys.stderr)
