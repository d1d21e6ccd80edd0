"""`hf-lnscale diagnose`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from typer import Option

from ..core.display import one_line
from .options import BatchSize, Checkpoint, Data, Device, Dtype, Force, SeqLen


def diagnose(
    checkpoint: Checkpoint,
    data: Data,
    out: Annotated[Path, Option(help="Folder for report.html, diagnosis.json and the plots.")],
    compare: Annotated[str | None, Option(help="A second checkpoint, shown next to the first.")] = None,
    loss: Annotated[bool, Option("--loss/--no-loss", help="Loss without each layer: about L / 2 passes.")] = True,
    jacobian: Annotated[bool, Option("--jacobian/--no-jacobian", help="Jacobians: 4 passes over 8 windows.")] = True,
    draw: Annotated[bool, Option("--plots/--no-plots", help="Write PNG and SVG files; needs matplotlib.")] = True,
    num_tokens: Annotated[int, Option("--tokens", help="Number of tokens to use.")] = 16_384,
    seq_len: SeqLen = None,
    batch_size: BatchSize = 8,
    dtype: Dtype = "auto",
    device: Device = None,
    device_map: Annotated[str | None, Option(help="For example auto, to spread or offload.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print diagnosis.json; with --compare, a list of the two.")] = False,
    force: Force = False,
) -> None:
    """Report what each layer of a model does and contributes.

    Looks for the curse of depth: prints tables and writes a report with plots.
    """
    from ..checkpoints.names import Placement
    from ..diagnosis.folder import diagnose_checkpoints
    from ..measuring.text import Windows

    found = diagnose_checkpoints(
        checkpoint, data, out, compare=compare, draw=draw, force=force, loss=loss, jacobian=jacobian,
        windows=Windows(num_tokens, seq_len, batch_size), placement=Placement(dtype, device, device_map),
    )  # fmt: skip
    if as_json:
        documents = [json.loads(one.to_json()) for one in found]
        print(json.dumps(documents if compare else documents[0], indent=1))
        return
    print(*found, sep="\n")
    print(f"wrote {one_line(out / 'report.html')}")
