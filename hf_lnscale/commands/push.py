"""`hf-lnscale push`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from .options import AsJson


def push(
    folder: Annotated[Path, Argument(metavar="FOLDER", help="Checkpoint folder.")],
    repo_id: Annotated[
        str, Argument(metavar="REPO", help="Hub repository, e.g. me/model; created if it does not exist.")
    ],
    dry_run: Annotated[bool, Option("--dry-run", help="Show what would be uploaded; needs no network.")] = False,
    evaluation: Annotated[
        Path | None, Option(help="JSON from evaluate --out, for the card; defaults to FOLDER/evaluation.json.")
    ] = None,
    base_model: Annotated[str | None, Option(help="Hub name of the model it was made from.")] = None,
    allow_scaled: Annotated[
        bool, Option("--allow-scaled", help="Allow a checkpoint that needs hf_lnscale to load.")
    ] = False,
    private: Annotated[bool | None, Option("--private/--public", help="Visibility of a new repository.")] = None,
    message: Annotated[str | None, Option(help="Commit message.")] = None,
    as_json: AsJson = False,
) -> None:
    """Upload a checkpoint to the Hub, with its results in the card.

    Files of a training run (optimizer, logs, checkpoints) are not uploaded.
    """
    from ..checkpoints.hub import push as run

    done = run(
        folder, repo_id, evaluation=evaluation, base_model=base_model, allow_scaled=allow_scaled, private=private,
        message=message, dry_run=dry_run,
    )  # fmt: skip
    if as_json:
        print(json.dumps({**dataclasses.asdict(done), "folder": str(done.folder)}, indent=2))
    elif done.url:
        print(f"uploaded {len(done.files) + 1} files: {done.url}")
    else:
        print(done)
