"""Checkpoints, as recipes load them."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import IntervalStrategy
from trl import ModelConfig, SFTConfig, get_quantization_config

from ..checkpoints.names import locate
from ..core.families import family_of, text_config
from ..core.record import DROPPED, get_ln_scaling
from ..core.warnings import warn
from .arguments import DepthArguments, WarmupArguments, layers_of


def load(
    model: ModelConfig, training: SFTConfig, depth: DepthArguments, warmup: WarmupArguments | None = None
) -> tuple[PreTrainedModel, Any]:
    """The checkpoint to train, and its tokenizer.

    Args:
        model: which checkpoint, in which dtype, quantized or not.
        training: whether its own code is trusted.
        depth: the layers to leave out.
        warmup: whether a Pre-LN checkpoint is to be led over to LayerNorm Scaling. It is loaded with the scale at the
            start of its warmup, where it does nothing yet.

    Raises:
        ValueError: if there is no checkpoint of that name, or layers do not exist.
        UnsupportedArchitectureError: if its family is not in the table; before any weight is read.
    """
    name = model.model_name_or_path
    if not name:
        raise ValueError("model_name_or_path: name the checkpoint to train, a folder or a name on the Hub")
    if name.startswith((".", "/", "~")) and not os.path.isdir(name):
        raise ValueError(f"model_name_or_path: there is no folder {name!r}")
    locate(name)  # what it refuses
    common = {"revision": model.model_revision, "trust_remote_code": training.trust_remote_code}
    config = AutoConfig.from_pretrained(name, **common)
    family_of(config)
    kwargs: dict[str, Any] = {"drop_layers": layers_of(depth.drop_layers)}
    if warmup is not None and warmup.ln_scaling and not get_ln_scaling(config):
        kwargs["ln_scaling"] = {"warmup_steps": warmup.ln_scaling_warmup_steps, "schedule": warmup.ln_scaling_schedule}
        warn(
            f"ln_scaling: {name!r} was trained without it. Where we measured it, a model that was led over ended worse "
            "than one that was trained on as it is (docs/converting.md); compare with a run without --ln_scaling"
        )
    tokenizer = AutoTokenizer.from_pretrained(name, **common)
    quantization = get_quantization_config(model)
    if quantization is not None:
        if not model.use_peft:
            raise ValueError("load_in_4bit and load_in_8bit train an adapter on a frozen model; add --use_peft")
        kwargs["quantization_config"] = quantization
        if model.load_in_4bit and not torch.accelerator.is_available():
            # On a CPU, bitsandbytes repacks 4-bit weights when a model is evaluated, and lets no gradient through then.
            print("no evaluation before the end: bitsandbytes cannot go on training 4-bit weights on a CPU after one")
            training.eval_on_start, training.eval_strategy = False, IntervalStrategy.NO
    loaded = AutoModelForCausalLM.from_pretrained(
        name,
        dtype=model.dtype,
        attn_implementation=model.attn_implementation,
        **common,
        **kwargs,
    )
    return loaded, tokenizer


def load_teacher(name: str, dtype: str, tokenizer: Any) -> PreTrainedModel:
    """A model to learn from: whole in every process, however the one that is trained is sharded.

    Args:
        name: folder, or name on the Hub.
        dtype: of its weights.
        tokenizer: the student's.

    Raises:
        ValueError: if the teacher's tokenizer is another one; under DeepSpeed ZeRO-3, which takes every model apart
            that is loaded.
    """
    if is_deepspeed_zero3_enabled():
        raise ValueError("teacher: not with DeepSpeed ZeRO-3, which would take the teacher apart; use ZeRO-2 or FSDP2")
    try:
        vocabulary = AutoTokenizer.from_pretrained(name).get_vocab()
    except (OSError, ValueError):  # a folder without one
        vocabulary = tokenizer.get_vocab()
    if vocabulary != tokenizer.get_vocab():
        raise ValueError(
            f"teacher: the tokenizer of {name!r}, of {len(vocabulary)} tokens, is not the student's, of "
            f"{len(tokenizer)}; they must be one"
        )
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype)


def require_pruned(model: PreTrainedModel) -> None:
    """Refuses a model of which nothing was dropped: there would be nothing to heal.

    Raises:
        ValueError: if its configuration notes no dropped layers.
    """
    if not vars(text_config(model.config)).get(DROPPED):
        raise ValueError(
            f"{model.config.name_or_path!r} has all its layers; give --drop_layers, or a checkpoint that "
            "hf-lnscale prune wrote"
        )
