"""`hf-lnscale adopt`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from .options import TEXT, BatchSize, Device, Force, written


def adopt(
    model: Annotated[str, Argument(metavar="MODEL", help="A folder or Hub repository.")],
    out: Annotated[Path, Option(help="Folder to write.")],
    data: Annotated[Path | None, Option(help=f"{TEXT}; defaults to English text.")] = None,
    tokenizer: Annotated[
        str | None, Option(help="Name or folder of the tokenizer, if it is not in the model's folder.")
    ] = None,
    max_bytes: Annotated[int, Option(help="Use only this many bytes of the text, from its start.")] = 65_536,
    seq_len: Annotated[int | None, Option(help="Tokens per window; defaults to 256, as in the paper.")] = None,
    batch_size: BatchSize = 4,
    device: Device = None,
    force: Force = False,
) -> None:
    """Mark a checkpoint that was trained with the scale elsewhere.

    Measures perplexity without and with the scale, and refuses unless the
    scale lowers the loss by more than two standard errors.
    """
    from ..checkpoints.names import Placement, read_config
    from ..evaluation.adopt import adopt as run

    done = run(
        model, out, data, tokenizer=tokenizer, max_bytes=max_bytes, seq_len=seq_len, batch_size=batch_size,
        placement=Placement(device=device), force=force,
    )  # fmt: skip
    print(done)
    print(written(out, read_config(str(out))))
