"""From checkpoints to a folder with the report: what `hf-lnscale diagnose` runs."""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from ..checkpoints.folders import atomic_directory, require_free
from ..checkpoints.names import Placement, locate, read_config
from ..core.families import family_of
from ..measuring.text import Windows, require_file, window_length
from . import figures as plots
from .examine import diagnose
from .result import FILE, Diagnosis

COMPARED = "compare.json"
REPORT = "report.html"


def run(
    checkpoint: str,
    data: Any,
    out: str | os.PathLike[str],
    *,
    compare: str | None = None,
    windows: Windows = Windows(num_tokens=16_384),
    placement: Placement = Placement(),
    draw: bool = True,
    force: bool = False,
    **settings: Any,
) -> list[Diagnosis]:
    """Diagnoses a checkpoint, or two, and writes diagnosis.json (compare.json of the second), plots and report.html.

    The folder appears under its name when it is complete.

    Args:
        checkpoint: folder or name on the Hub.
        data: see `diagnose`.
        out: folder to write.
        compare: a second checkpoint, to be shown beside the first.
        windows: how text is cut.
        placement: where the models are computed, and the type of their weights.
        draw: write plots as PNG and SVG, which needs matplotlib.
        force: replace a diagnosis that is at `out`.
        settings: passed to `diagnose`.

    Raises:
        FileExistsError: if `out` is not empty, without `force`, or holds something else than a diagnosis.
        ImportError: if plots are wanted and matplotlib is missing; before anything is computed.
        ValueError: as `diagnose`.
    """
    target = Path(out).resolve()
    require_free(target, (checkpoint, compare, data), str(out), force, FILE, "diagnosis")
    if draw:
        plots.require_matplotlib()
    names = [checkpoint] if compare is None else [checkpoint, compare]
    require_file(data)
    configs = [read_config(name) for name in names]
    for name, config in zip(names, configs, strict=True):  # a second that is none is told before the first is measured
        family_of(config, "diagnose")
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise ValueError(f"{name!r} is no causal language model; diagnose it from Python, with hf_lnscale.diagnose")
    windows = replace(windows, seq_len=window_length(windows.seq_len, configs))  # the same length for both
    found = []
    for name in names:
        model = placement.load(name)
        folder, where = locate(name)
        tokenizer = AutoTokenizer.from_pretrained(folder, **where) if where else None
        found.append(diagnose(model, data, tokenizer=tokenizer, windows=windows, **settings))
        del model
        gc.collect()
    if len(found) == 2 and found[0].name == found[1].name:
        found = [replace(one, model={**one.model, "name": f"{one.name} ({i})"}) for i, one in enumerate(found, start=1)]
    with atomic_directory(target) as partial:
        found[0].save(partial / FILE)
        if compare is not None:
            found[1].save(partial / COMPARED)
        if draw:
            plots.save_all(found, partial)
        found[0].report(partial / REPORT, *found[1:])
    return found
