"""Writes a model whose layers lack attention or MLP as DeciLM, an architecture for such models in vLLM and llama.cpp.

`block_configs` describes what each layer lacks and gives its MLP size as a multiple of the hidden size, which both
programs round up to a multiple of 256. Tensors have Llama's names.
"""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig

from ..core.display import brief
from ..core.errors import CheckpointError, UnsupportedArchitectureError
from ..core.json_file import read_object
from ..core.record import SUBLAYERS, record
from . import configuration_deci
from .export import copy_checkpoint, with_sublayers
from .names import read_config

_FAMILIES = ("llama", "mistral", "qwen2")  # families that compute the same function as DeciLM
_NOT_WRITTEN = {"_name_or_path", "id2label", "label2id"}


def export_deci(
    src: str | os.PathLike[str], out: str | os.PathLike[str], *, force: bool = False, progress: bool = True
) -> Path:
    """Writes a checkpoint whose layers lack attention or MLP as DeciLM: for vLLM, and llama.cpp if no MLP is missing.

    An active scale is folded. The tensors written are checked against the configuration. For arguments and other
    errors, see `export`.

    Raises:
        UnsupportedArchitectureError: if DeciLM cannot represent the model; the message gives the reason.
    """
    return copy_checkpoint(src, out, _described, force=force, progress=progress, finish=partial(_finish, str(src)))


def readers(folder: Path) -> str:
    """A description of the programs that can read an exported folder."""
    blocks = read_object(folder / "config.json")["block_configs"]
    if any(block["ffn"]["no_op"] for block in blocks):
        other = "not for llama.cpp, which also drops the attention of a layer without MLP"
    else:
        other = "and for llama.cpp, if its converter supports the tokenizer (Llama 2 or Llama 3 style)"
    return f"DeciLM, for vLLM with --trust-remote-code; {other}"


def _described(config: Any, values: dict[str, Any], shown: str) -> dict[str, Any]:
    """The config.json of DeciLM."""
    if not (missing := record(config).sublayers):
        raise ValueError(f"{shown!r} needs no --format deci: all its layers have attention and MLP; omit --format")
    if reason := _misfit(config):
        hint = "--format zeros works for any model"
        raise UnsupportedArchitectureError(f"{shown!r} cannot be written as DeciLM: {reason}", hint)
    group = config.num_attention_heads // config.num_key_value_heads
    multiple = {"ffn_mult": 3 * config.intermediate_size / (2 * config.hidden_size)}
    blocks: list[dict[str, Any]] = []
    for at in range(config.num_hidden_layers):
        attention, ffn = ({"no_op": at in missing.get(kind, ()), "replace_with_linear": False} for kind in SUBLAYERS)
        # llama.cpp would also drop the attention of a layer without MLP; without this key, its converter fails instead.
        ffn |= {} if ffn["no_op"] else multiple
        blocks.append(
            {"attention": attention | {"n_heads_in_group": None if attention["no_op"] else group}, "ffn": ffn}
        )
    # Other keys may have a different meaning in the programs that read the file.
    known = LlamaConfig().to_dict().keys() - _NOT_WRITTEN
    plain = LlamaConfig().to_dict() | config.to_dict()
    if config.model_type != "llama":  # the other families ignore these fields, but readers of DeciLM do not
        plain |= {"attention_bias": False, "mlp_bias": False}
    return {key: value for key, value in plain.items() if key in known} | {
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{configuration_deci.__name__.rpartition('.')[2]}.DeciConfig"},
        "block_configs": blocks,
        "head_dim": config.hidden_size // config.num_attention_heads,  # Qwen2 has no such field
        "intermediate_size": None,  # makes Llama's classes fail instead of initializing missing parts randomly
        "model_type": configuration_deci.DeciConfig.model_type,
        "qkv_bias": config.model_type == "qwen2" or plain["attention_bias"],
        **with_sublayers(record(values)).to_dict(),
    }


def _misfit(config: Any) -> str:
    """Why DeciLM cannot represent a model; "" if it can."""
    if config.model_type not in _FAMILIES:
        return f"it supports only models that compute what {', '.join(_FAMILIES)} do, not {config.model_type}"
    heads, hidden = config.num_attention_heads, config.hidden_size
    rope, classes = config.rope_parameters or {}, config.architectures or [""]
    kind = rope.get("rope_type", "default")
    begins = 0 not in record(config).sublayers.get("attention", ())
    rules = (
        (classes[0].endswith("ForCausalLM"), f"it is for causal language models, not {classes}"),
        (begins, "its first layer has no attention, which both vLLM and llama.cpp require"),
        (config.hidden_act == "silu", f"its MLPs use {config.hidden_act}, not silu"),
        (
            config.intermediate_size % 256 == 0,
            f"the size of its MLPs, {config.intermediate_size}, is not a multiple of 256",
        ),
        (
            (getattr(config, "head_dim", None) or hidden // heads) * heads == hidden,
            "the size of its heads is not hidden_size / num_attention_heads",
        ),
        (heads % config.num_key_value_heads == 0, "num_attention_heads is not a multiple of num_key_value_heads"),
        (not getattr(config, "sliding_window", None), "its attention has a sliding window"),
        (
            kind in ("default", "llama3"),
            f"its rotary embedding is {kind}, but llama.cpp's converter supports only default and llama3",
        ),
        (rope.get("partial_rotary_factor", 1) == 1, "its rotary embedding covers only part of each head"),
    )
    return next((reason for fits, reason in rules if not fits), "")


def _finish(shown: str, folder: Path) -> None:
    """Copies the code of the configuration class, and checks that the tensors match the configuration.

    DeciLM has the tensors of the model itself, which `_misfit` ensures.
    """
    shutil.copy(configuration_deci.__file__, folder)
    config = read_config(shown)
    with torch.device("meta"):
        tensors = AutoModelForCausalLM.from_config(config).state_dict()
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    expected = sorted((name, (*tensor.shape,)) for name, tensor in tensors.items())
    found = []
    for file in folder.rglob("*.safetensors"):
        with safe_open(file, framework="pt") as written:
            found += [(name, (*written.get_slice(name).get_shape(),)) for name in written.keys()]  # noqa: SIM118
    if sorted(found) != expected:
        wrong = sorted({name for name, _ in {*found} ^ {*expected}})
        raise CheckpointError(f"{shown!r} does not have the tensors of DeciLM, see {brief(wrong)}; nothing was written")
