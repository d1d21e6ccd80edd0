"""Fills layers without attention or MLP with zeros: a plain checkpoint of whole layers, with the same outputs."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from ..core.apply import fold_ln_scaling
from ..core.record import record, write
from ..core.stack import own_stack, pretrained_modules, text_stack
from ..core.sublayers import put
from .export import copy_companions
from .folders import atomic_directory, require_free
from .names import load, locate


def fill_with_zeros(model: nn.Module) -> nn.Module:
    """Puts back each missing attention and MLP, and the norms that serve it alone, in place, with all tensors zero.

    Every tensor is zero, and not the last projection alone, so that training leaves the sub-layer without effect, too:
    the gradient of each of its tensors is zero. What comes back is the same model, without an active scale before and
    after, with the same outputs: a plain model of its family.
    """
    stack = text_stack(model)
    found = record(stack.model.config)
    dropped = found.dropped and (replace(found.dropped, attention=(), mlp=()) if found.dropped.layers else None)
    config = copy.deepcopy(stack.model.config)
    write(config, replace(found, dropped=dropped))
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
            write(part.config, replace(found, dropped=dropped))
    return model


def export_zeros(src: str | os.PathLike[str], out: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Writes a checkpoint in which what is missing of some layers is there again, as zeros; see `fill_with_zeros`.

    For any runtime, with the size and the speed of whole layers. An active scale is folded. Needs memory for the model.
    Arguments and errors are those of `export`.
    """
    name, _ = locate(src)
    target = Path(out).resolve()
    require_free(target, (name,), str(out), force)
    source = Path(name) if Path(name).is_dir() else Path(snapshot_download(name, ignore_patterns=["*.gguf"]))
    model = _load_with_head(source)
    found = record(text_stack(model).model.config)
    if not found.sublayers:
        raise ValueError(f"{str(src)!r} needs no zeros: all its layers have attention and MLP")
    fill_with_zeros(fold_ln_scaling(model) if found.active else model)
    with atomic_directory(target, force) as partial:
        copy_companions(source, partial)
        model.save_pretrained(partial)
    return Path(out)


def _load_with_head(folder: Path) -> Any:
    """The model of a checkpoint in the class that it was saved from: a causal language model or any other."""
    names = AutoConfig.from_pretrained(folder).architectures or [""]
    model_class: Any = getattr(transformers, names[0], None)
    known = isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)
    return model_class.from_pretrained(folder).eval() if known else load(folder)  # else by code in the checkpoint
