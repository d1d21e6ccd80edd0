"""Fills missing attention and MLP modules with zeros: a plain checkpoint of complete layers with the same outputs."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from ..core.apply import fold_ln_scaling
from ..core.record import record, write
from ..core.stack import own_stack, pretrained_modules, text_stack
from ..core.sublayers import put
from .export import copy_companions, with_sublayers
from .folders import atomic_directory, require_free
from .names import load, local_folder, locate, read_config


def fill_with_zeros(model: nn.Module) -> nn.Module:
    """Restores missing attention and MLP modules, and the norms used only by them, in place, with all tensors zero.

    All tensors are zero, not just the last projection, so that their gradients are zero too and training leaves the
    sub-layer without effect. The model must have no active scale. Returns it as a plain model with the same outputs.
    """
    stack = text_stack(model)
    found = record(stack.model.config)
    config = copy.deepcopy(stack.model.config)
    write(config, with_sublayers(found))
    with torch.device("meta"):
        whole = own_stack(type(stack.model)(config))
    assert whole is not None
    weight = next(stack.model.parameters())
    for kind, positions in found.sublayers.items():
        path, norms = stack.family.sublayer(kind)
        for position in positions:
            for name in (path, *norms):
                module = whole.layers[position].get_submodule(name).to_empty(device=weight.device).to(weight.dtype)
                for tensor in (*module.parameters(), *module.buffers()):
                    tensor.data.zero_()
                put(stack.layers[position], name, module)
    for part in pretrained_modules(model):
        if record(part.config) == found:
            write(part.config, with_sublayers(found))
    return model


def export_zeros(src: str | os.PathLike[str], out: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Writes a checkpoint in which missing sub-layers are restored as zeros; see `fill_with_zeros`.

    It works in any runtime, at the size and speed of complete layers. An active scale is folded. The model must fit in
    memory. For arguments and errors, see `export`.
    """
    name, _ = locate(src)
    target = Path(out).resolve()
    require_free(target, (name,), str(out), force)
    found = record(read_config(src))
    if not found.sublayers:
        raise ValueError(f"{str(src)!r} needs no zeros: all its layers have attention and MLP")
    source = local_folder(name)
    model = _load_with_head(source)
    fill_with_zeros(fold_ln_scaling(model) if found.active else model)
    with atomic_directory(target, force) as partial:
        copy_companions(source, partial)
        model.save_pretrained(partial)
    return Path(out)


def _load_with_head(folder: Path) -> Any:
    """Loads a checkpoint with the class it was saved from, which may not be a causal language model."""
    names = AutoConfig.from_pretrained(folder).architectures or [""]
    model_class: Any = getattr(transformers, names[0], None)
    known = isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)
    return model_class.from_pretrained(folder).eval() if known else load(folder)  # else custom code
