"""Loads tokenizers, models and teachers for the recipes."""

from __future__ import annotations

import os
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import IntervalStrategy
from trl import get_quantization_config

from ..checkpoints import names
from ..checkpoints.names import locate, read_config, require_weights
from ..core.errors import CheckpointError
from ..core.families import family_of
from ..core.record import get_ln_scaling, record
from ..core.warnings import warn
from .arguments import CheckpointArguments, RecipeConfig, WarmupArguments


def load_tokenizer(checkpoint: CheckpointArguments, training: RecipeConfig) -> Any:
    """Loads the tokenizer of the checkpoint to train, after checking the checkpoint's name and family."""
    name = checkpoint.model_name_or_path
    if not name:
        raise ValueError("model_name_or_path: name the checkpoint to train, a folder or a Hub repository")
    _require_folder("model_name_or_path", name)
    locate(name)  # refuses adapters
    family_of(_config(checkpoint, training))
    require_weights(name)
    return names.load_tokenizer(name, **_source(checkpoint, training))


def load_model(
    checkpoint: CheckpointArguments, training: RecipeConfig, warmup: WarmupArguments | None = None
) -> PreTrainedModel:
    """Loads the checkpoint to train.

    A Pre-LN checkpoint that `warmup` converts to LayerNorm Scaling starts at warmup step 0, where the scale is 1.
    """
    name = str(checkpoint.model_name_or_path)
    options = {"drop_layers": checkpoint.layers(), "dtype": checkpoint.dtype, **_source(checkpoint, training)}
    if warmup is not None and warmup.ln_scaling and not get_ln_scaling(_config(checkpoint, training)):
        options["ln_scaling"] = {"warmup_steps": warmup.ln_scaling_warmup_steps, "schedule": warmup.ln_scaling_schedule}
        warn(
            f"ln_scaling: {name!r} was trained without it. In our measurements, converted models ended up worse than "
            "models trained further unchanged (docs/converting.md); compare with a run without --ln_scaling"
        )
    if quantization := get_quantization_config(checkpoint):
        if not checkpoint.use_peft:
            raise ValueError("load_in_4bit and load_in_8bit require an adapter on a frozen model; add --use_peft")
        options["quantization_config"] = quantization
        if checkpoint.load_in_4bit and not torch.accelerator.is_available():
            # On a CPU, bitsandbytes repacks 4-bit weights for evaluation, after which they pass no gradients.
            print("evaluating only at the end: bitsandbytes cannot train 4-bit weights on a CPU after an evaluation")
            training.eval_on_start, training.eval_strategy = False, IntervalStrategy.NO
    attention = checkpoint.attn_implementation
    return cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(name, attn_implementation=attention, **options))


def load_teacher(name: str, dtype: str, tokenizer: Any) -> PreTrainedModel:
    """Loads a teacher with the student's tokenizer, unsharded in every process even if the student is sharded."""
    if is_deepspeed_zero3_enabled():
        raise ValueError("teacher: not supported with DeepSpeed ZeRO-3, which would shard it; use ZeRO-2 or FSDP2")
    require_same_tokenizer("teacher", name, tokenizer)
    return cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(name, dtype=dtype))


def require_same_tokenizer(argument: str, name: str, tokenizer: Any) -> None:
    """Refuses a model that does not exist or has a different tokenizer from the student."""
    _require_folder(argument, name)
    try:
        read_config(name)
        require_weights(name)
    except CheckpointError as error:
        raise CheckpointError(f"{argument}: {error}") from None
    try:
        vocabulary = AutoTokenizer.from_pretrained(name).get_vocab()
    except (OSError, ValueError):  # a folder without a tokenizer
        return
    if vocabulary != tokenizer.get_vocab():
        raise ValueError(
            f"{argument}: the tokenizer of {name!r} ({len(vocabulary)} tokens) differs from the student's "
            f"({len(tokenizer)} tokens)"
        )


def _require_folder(argument: str, name: str) -> None:
    """Refuses a missing path, for which transformers would report an invalid Hub name."""
    if name.startswith((".", "/", "~")) and not os.path.isdir(name):
        raise ValueError(f"{argument}: there is no folder {name!r}")


def require_pruned(checkpoint: CheckpointArguments, training: RecipeConfig) -> None:
    """Refuses a checkpoint with all its layers, since there would be nothing to heal."""
    if not checkpoint.layers() and record(_config(checkpoint, training)).dropped is None:
        name = checkpoint.model_name_or_path
        raise ValueError(f"{name!r} has all its layers; use --drop_layers, or a checkpoint from hf-lnscale prune")


def _source(checkpoint: CheckpointArguments, training: RecipeConfig) -> dict[str, Any]:
    return {"revision": checkpoint.model_revision, "trust_remote_code": training.trust_remote_code}


def _config(checkpoint: CheckpointArguments, training: RecipeConfig) -> Any:
    name = str(checkpoint.model_name_or_path)
    try:
        return AutoConfig.from_pretrained(name, **_source(checkpoint, training))
    except (OSError, ValueError) as error:  # its message may not name the model
        raise CheckpointError(f"model_name_or_path: cannot read {name!r}: {' '.join(str(error).split())}") from error
