"""Diagnoses checkpoints and writes a folder with the report: `hf-lnscale diagnose`."""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoints.folders import atomic_directory, require_free
from ..checkpoints.names import Placement, is_causal_lm, load_tokenizer, read_config, require_weights
from ..core.errors import ArgumentError, CheckpointError, require_packages
from ..core.families import family_of
from ..measuring.split_model import require_known_ids
from ..measuring.text import Windows, require_file, token_batches, window_length
from . import png
from .diagnosis import Diagnosis
from .examine import diagnose
from .result import FILE

COMPARED = "compare.json"
REPORT = "report.html"


def diagnose_checkpoints(
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
    """Diagnoses one or two checkpoints and writes diagnosis.json (compare.json for the second), plots and report.html.

    Reads the text and validates all arguments before loading a model. The folder appears only when complete.

    Args:
        checkpoint: folder or Hub repository.
        data: path of a text, or other data as for `diagnose` that can be read more than once.
        out: folder to write; `force` replaces an existing diagnosis there.
        compare: a second checkpoint, shown next to the first.
        draw: whether to write plots as PNG and SVG, which needs matplotlib.
        settings: passed to `diagnose`.

    Raises:
        FileExistsError: if `out` is not empty and `force` is False, or does not contain a diagnosis.
        ImportError: before anything is computed, if `draw` is set and matplotlib is not installed.
        ValueError: see `diagnose`.
    """
    target = Path(out).resolve()
    require_free(target, (checkpoint, compare, data), str(out), force, FILE, "diagnosis")
    if draw:
        require_packages("plotting", "plot", "matplotlib")
    names = [checkpoint] if compare is None else [checkpoint, compare]
    require_file(data)
    configs = [read_config(name) for name in names]
    for name, config, argument in zip(names, configs, ("checkpoint", "compare"), strict=False):
        family_of(config, "diagnose")
        if not is_causal_lm(config):
            problem = "is not a causal language model; diagnose it from Python with hf_lnscale.diagnose"
            raise ArgumentError(argument, name, problem=problem)
    for name in names:
        require_weights(name)
    windows = replace(windows, seq_len=window_length(windows.seq_len, configs))  # the same length for both
    tokenizers = [_tokenizer(*pair, data, windows) for pair in zip(names, configs, strict=True)]
    found = []
    for name, tokenizer in zip(names, tokenizers, strict=True):
        model = placement.load(name)
        found.append(diagnose(model, data, tokenizer=tokenizer, windows=windows, **settings))
        del model
        gc.collect()
    if len(found) == 2 and found[0].name == found[1].name:
        found = [replace(one, model={**one.model, "name": f"{one.name} ({i})"}) for i, one in enumerate(found, start=1)]
    with atomic_directory(target, force) as partial:
        for one, name in zip(found, (FILE, COMPARED), strict=False):
            one.save(partial / name)
        if draw:
            png.save_all(found, partial)
        found[0].report(partial / REPORT, *found[1:])
    return found


def _tokenizer(name: str, config: Any, data: Any, windows: Windows) -> Any:
    """The tokenizer of a model, checked to give ids within its vocabulary; None if the data is token ids."""
    tokenizer = None
    try:
        tokenizer = load_tokenizer(name)
        batches = token_batches(data, tokenizer=tokenizer, windows=windows)
    except CheckpointError as missing:
        try:
            batches = token_batches(data, windows=windows)  # token ids
        except ValueError:
            raise missing from None
    for batch in batches:
        require_known_ids(batch.input_ids, config)
    return tokenizer
