"""Marks a checkpoint that was trained with LayerNorm Scaling elsewhere, after verifying this by measurement.

The authors' code (github.com/lmsdss/LayerNorm-Scaling) saves its models as plain `llama`, so nothing in such a
checkpoint says that its pre-norms must be scaled. Its perplexity tells.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from ..checkpoints.export import copy_companions
from ..checkpoints.folders import COMPANIONS, atomic_directory, require_free
from ..checkpoints.names import Placement, is_causal_lm, load_tokenizer, locate, read_config, require_weights
from ..core.apply import apply_ln_scaling
from ..core.display import with_error
from ..core.errors import ArgumentError
from ..core.record import record, set_ln_scaling
from ..measuring import sample
from ..measuring.text import documents, window_length
from .perplexity import Perplexity, check_windows, first_bytes, perplexity

SEQ_LEN = 256  # the paper's training length; such models may do poorly on longer windows


@dataclass(frozen=True, eq=False)
class Adopted:
    """A checkpoint that was marked as scaled. `str` shows the measurements."""

    path: Path  # the folder written
    plain: Perplexity  # without the scale
    scaled: Perplexity  # with it

    def __str__(self) -> str:
        return _figures(self.plain, self.scaled)


def adopt(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    data: Any = None,
    *,
    ln_scaling: Any = True,
    tokenizer: Any = None,
    max_bytes: int | None = 65_536,
    seq_len: int | None = None,
    batch_size: int = 4,
    placement: Placement = Placement(),
    force: bool = False,
    progress: bool = True,
) -> Adopted:
    """Marks a checkpoint that was trained with LayerNorm Scaling but does not record it.

    Measures perplexity without and with the scale. Only if the scale lowers the loss by more than two standard errors
    of the difference, writes the same weights, a `config.json` with `ln_scaling`, the tokenizer and other small files.
    The folder appears only when complete.

    Args:
        model: a folder or Hub repository.
        out: folder to write.
        data, max_bytes, batch_size: see `perplexity`; None uses English text shipped with Python.
        ln_scaling: the scale it was trained with: True for the paper's, or any value accepted by `from_pretrained`.
        tokenizer: the model's tokenizer, or its name, if it is not in the model's folder (the authors' code does not
            save it); it is written too.
        seq_len: tokens per window; the default is 256, the paper's training length, or the number of positions if that
            is smaller.
        placement: device and dtype of the model; the dtype also applies to the weights written.
        force: whether to replace a checkpoint at `out`.
        progress: whether to show progress bars.

    Raises:
        FileExistsError: if `out` is not empty and `force` is False, or contains anything but a checkpoint.
        ValueError: if the scale makes the model worse or the difference is within two standard errors (the message
            gives both perplexities), if the checkpoint is already marked, or if an argument is invalid.
        UnsupportedArchitectureError: if the model's family is not in the table.
    """
    name, gguf = locate(model)
    target = Path(out).resolve()
    require_free(target, (name, data), str(out), force)
    config = read_config(model)
    require_weights(model)
    if gguf or not is_causal_lm(config):
        problem = f"is {'a GGUF file' if gguf else 'not a causal language model'}"
        hint = "load it and mark it in memory: apply_ln_scaling(model).save_pretrained(...)"
        raise ArgumentError("model", str(model), problem=problem, hint=hint)
    if active := record(config).active:
        raise ArgumentError("model", str(model), problem=f"is already marked as scaled: {active.to_dict()}")
    set_ln_scaling(config, ln_scaling)  # validates the argument before anything is measured
    seq_len = window_length(seq_len, [config], SEQ_LEN)
    check_windows(config, seq_len, seq_len, batch_size)
    given = tokenizer
    if tokenizer is None or isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = load_tokenizer(tokenizer or model)
    texts = first_bytes(documents(sample.documents() if data is None else data, tokenizer), max_bytes)
    if not any(text.strip() for text in texts):
        raise ArgumentError("data", problem="contains no text")

    loaded = placement.load(model)
    windows: dict[str, Any] = {"seq_len": seq_len, "stride": seq_len, "batch_size": batch_size, "progress": progress}
    plain = perplexity(loaded, texts, tokenizer, **windows)
    apply_ln_scaling(loaded, ln_scaling)
    scaled = perplexity(loaded, texts, tokenizer, **windows)
    if reason := why_not(plain, scaled):
        raise ArgumentError("model", str(model), problem=f"was not marked: {_figures(plain, scaled)}; {reason}")

    with atomic_directory(target, force) as partial:
        folder = name if Path(name).is_dir() else snapshot_download(name, allow_patterns=list(COMPANIONS))
        copy_companions(Path(folder), partial)
        if given is not None:
            tokenizer.save_pretrained(partial)
        loaded.save_pretrained(partial)  # from memory, to read the weights only once
    return Adopted(Path(out), plain, scaled)


def why_not(plain: Perplexity, scaled: Perplexity) -> str:
    """The reason for not marking a model as trained with the scale, or ""."""
    change = scaled.minus(plain)["loss"]
    if change.stderr is None or abs(change.value) <= 2 * change.stderr:
        return "the difference may be chance; use more text, or text similar to its training data"
    if change.value > 0:
        return "the scale makes it worse, so it was not trained with it"
    return ""


def _figures(plain: Perplexity, scaled: Perplexity) -> str:
    estimates = (plain.perplexity, scaled.perplexity, scaled.minus(plain)["loss"])
    without, with_it, change = (with_error(one.value, one.stderr) for one in estimates)
    return f"perplexity {without} without the scale, {with_it} with it (nats per token: {change})"
