"""Folds a checkpoint on disk: multiplies the scale into its norm weights and copies everything else.

Works on the files tensor by tensor, so even the largest checkpoint needs memory for only one norm. Norm weights are
overwritten in the copied safetensors files, at the offsets given in their headers.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from tqdm import tqdm
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..core.display import brief
from ..core.errors import CheckpointError
from ..core.families import Family, family_of, text_config
from ..core.json_file import read_object
from ..core.norm import scale_parameter
from ..core.record import ACTIVE, FOLDED, MARK, Record, layers_of, mark, parts, protect, record, unprotect
from .folders import COMPANIONS, atomic_directory, files_of, require_free
from .names import local_folder, locate, read_config

Fold = Callable[[torch.Tensor], torch.Tensor]
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_info(path: str) -> dict[str, Any]:
    """Describes the checkpoint in a folder or a Hub repository by its `config.json`; reads no weights.

    `active` is the scaling applied on loading, with its `scales`, `folded` that in the norm weights. `dropped` has the
    `layers`, `attention` and `mlp` that are missing, counted as in the original with its `num_hidden_layers`.
    """
    config = read_config(path)
    num_layers, found = layers_of(config), record(config)
    try:
        supported = bool(family_of(config))
    except ValueError:
        supported = False
    return {
        "path": str(path),
        "model_type": config.model_type,
        "family": text_config(config).model_type,
        "supported": supported,
        "num_layers": num_layers,
        "active": found.active.to_dict() if found.active else None,
        "folded": found.folded.to_dict() if found.folded else None,
        "scales": found.active.scales(num_layers) if found.active and num_layers else [1.0] * (num_layers or 0),
        "dropped": found.dropped.to_dict() if found.dropped else None,
    }


def export(
    src: str | os.PathLike[str], out: str | os.PathLike[str], *, force: bool = False, progress: bool = True
) -> Path:
    """Writes a scaled checkpoint in folded form: a plain checkpoint for any runtime.

    The folder appears only when complete; an interrupted export leaves nothing that loads. Tokenizer, chat template,
    generation config and other small files are copied, but not the state of a training run.

    Args:
        src: folder or Hub repository of a scaled checkpoint with safetensors files.
        out: folder to write.
        force: whether to replace an existing checkpoint at `out`.
        progress: whether to show a progress bar.

    Returns:
        The path written.

    Raises:
        FileExistsError: if `out` is not empty and `force` is False, or contains anything but a checkpoint.
        FileNotFoundError: if `src` has no config.json or no safetensors weights.
        ValueError: if `src` has no active scale, one of `out` and `src` contains the other, or the norms on disk do
            not match the model's family.
    """
    return copy_checkpoint(src, out, _folded_config, force=force, progress=progress)


def copy_checkpoint(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    describe: Callable[[Any, dict[str, Any], str], dict[str, Any]],
    *,
    force: bool,
    progress: bool,
    finish: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Copies a checkpoint file by file and folds its active scale.

    Args:
        src, out, force, progress: see `export`.
        describe: returns the config.json to write, given the configuration, the dict of its file without the active
            scale, and the name to show. May raise an error.
        finish: called with the complete folder before it is moved into place. May raise an error.
    """
    name, where = locate(src)
    if where:
        raise ValueError(f"{str(src)!r} needs no export: a GGUF file has no active ln_scaling")
    target = Path(out).resolve()
    require_free(target, (name,), str(out), force)
    config = read_config(src)
    source = local_folder(name, "*.bin", "*.pt", "*.pth", "*.onnx")
    found, scales = record(config), []
    values = unprotect(json.loads((source / "config.json").read_text(encoding="utf-8")))
    if found.active:
        scaling = found.active.for_layers(num_layers := text_config(config).num_hidden_layers)
        part = next(part for part in parts(values) if part.get(ACTIVE))
        del part[ACTIVE]
        part[FOLDED], scales = scaling.to_dict(), scaling.scales(num_layers)
    plain = describe(config, values, str(src))
    family, files = family_of(config), _weight_files(source)
    folds = {file: _folds(source / file, read, family, scales) for file, read in files.items()}
    names = [name for some in folds.values() for name in some]
    expected = len(scales) * len(family.pre_norms) - sum(map(len, found.sublayers.values()))
    if scales and sum(name.endswith(".weight") for name in names) != expected:
        raise ValueError(f"{str(src)!r} has {len(names)} pre-norm tensors, but its family should have {expected}")

    with atomic_directory(target, force) as folder:
        copy_companions(source, folder, indexed=SAFE_WEIGHTS_NAME not in files)
        for file in tqdm(files, desc="Folding", unit="file", disable=not progress):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            _copy_folded(source / file, folder / file, folds[file], mark(record(plain)))
        for file in files:  # only after all are written, since the disk may have filled up
            _require_folded(source / file, folder / file, folds[file])
        # Written last, since the folder is not a checkpoint without it.
        (folder / "config.json").write_text(json.dumps(plain, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        finish(folder)
    return Path(out)


def with_sublayers(found: Record) -> Record:
    """The record of a model whose missing attention and MLP modules are no longer recorded."""
    dropped = found.dropped and (replace(found.dropped, attention=(), mlp=()) if found.dropped.layers else None)
    return replace(found, dropped=dropped)


def _weight_files(source: Path) -> dict[str, set[str] | None]:
    """The weight files that `from_pretrained` reads, and the tensors it reads from each (None means all).

    A single file takes precedence over an index.
    """
    single, index = source / SAFE_WEIGHTS_NAME, source / SAFE_WEIGHTS_INDEX_NAME
    files: dict[str, set[str] | None] = {SAFE_WEIGHTS_NAME: None}
    if not single.is_file() and index.is_file():
        try:
            weight_map = read_object(index, weight_map=dict)["weight_map"]
            for file in weight_map.values():
                if not isinstance(file, str) or ".." in Path(file).parts or Path(file).is_absolute():
                    raise ValueError(f"it names {brief(file)}, which is not a file in its folder")
            files = {file: {name for name in weight_map if weight_map[name] == file} for file in weight_map.values()}
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{str(index)!r} is not an index of safetensors files: {error}") from None
    for name in files:
        if not (source / name).is_file():
            raise FileNotFoundError(
                f"{str(source)!r} has no {name}; only checkpoints with safetensors files can be exported"
            )
    return dict(sorted(files.items()))


def _folded_config(config: Any, values: dict[str, Any], shown: str) -> dict[str, Any]:
    found = record(config)
    if found.active is None:
        state = "its scale is already folded" if found.folded else "it has no active ln_scaling"
        if found.sublayers:
            state += "; for its layers without attention or MLP use hf-lnscale export --format zeros or --format deci"
        raise ValueError(f"{shown!r} needs no export: {state}")
    return protect(values)


def _folds(file: Path, read: set[str] | None, family: Family, scales: list[float]) -> dict[str, Fold]:
    """The pre-norm tensors read from a file, each with the function that folds it."""
    with safe_open(file, framework="pt") as tensors:
        names = [name for name in tensors.keys() if read is None or name in read]  # noqa: SIM118
    found: dict[str, Fold] = {}
    for name in names:
        layer, one_plus = family.layer_of_pre_norm(name), family.one_plus_weight and name.endswith(".weight")
        # A multi-token prediction layer is stored after the last layer, under the next index.
        if layer is not None and layer < len(scales):
            found[name] = partial(scale_parameter, scale=scales[layer], one_plus_weight=one_plus)
    return found


def _copy_folded(source: Path, target: Path, folds: dict[str, Fold], new_mark: str) -> None:
    """Copies a safetensors file, then overwrites norm tensors with their folded form.

    If the file is marked with its model's record, the copy is marked with `new_mark` instead.
    """
    with open(source, "rb") as old, open(target, "w+b") as new:
        header = old.read(int.from_bytes(old.read(8), "little"))
        entries = json.loads(header)
        if MARK in entries.get("__metadata__", {}):
            entries["__metadata__"][MARK] = new_mark
            header = json.dumps(entries, separators=(",", ":")).encode()
            header += b" " * (-len(header) % 8)  # the format aligns tensors to 8 bytes
        new.write(len(header).to_bytes(8, "little") + header)
        shutil.copyfileobj(old, new, 2**24)
        for name, fold in folds.items():
            if (stored := entries[name]["dtype"]) not in _DTYPES:
                raise ValueError(f"{name} in {source.name} has dtype {stored}; supported are {', '.join(_DTYPES)}")
            start, end = (8 + len(header) + offset for offset in entries[name]["data_offsets"])
            _fold_tensor(new, start, end, _DTYPES[stored], fold)


def _fold_tensor(file: BinaryIO, start: int, end: int, dtype: torch.dtype, fold: Fold) -> None:
    """Overwrites the tensor between two positions in a file with its folded form."""
    file.seek(start)
    folded = fold(torch.frombuffer(bytearray(file.read(end - start)), dtype=dtype))
    file.seek(start)
    file.write(folded.contiguous().view(torch.uint8).numpy().tobytes())


def _require_folded(source: Path, written: Path, folds: dict[str, Fold]) -> None:
    """Verifies that a file was written correctly, since a disk may be full or failing."""
    with safe_open(source, framework="pt") as before, safe_open(written, framework="pt") as after:
        if sorted(before.keys()) != sorted(after.keys()):
            raise CheckpointError(f"{written.name} has different tensors from {str(source)!r}; nothing was written")
        for name, fold in folds.items():
            if not torch.equal(fold(before.get_tensor(name)), after.get_tensor(name)):
                raise CheckpointError(f"{name} in {written.name} was not written correctly; nothing was kept")


def copy_companions(source: Path, folder: Path, indexed: bool = False) -> None:
    """Copies the tokenizer, templates, card and other small files of a checkpoint; if `indexed`, also its index."""
    for name in files_of(source, (*COMPANIONS, *([SAFE_WEIGHTS_INDEX_NAME] if indexed else []))):
        if name != "config.json":
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)
