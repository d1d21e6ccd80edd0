"""Tokenizers, models and configurations for the recipes, checked before anything expensive."""

from __future__ import annotations

import os
from typing import Any, cast

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.trainer_utils import IntervalStrategy
from trl import get_quantization_config

from ..checkpoints import names
from ..checkpoints.names import locate, require_weights
from ..core.errors import CheckpointError
from ..core.families import FAMILIES, family_of
from ..core.record import get_ln_scaling, record
from ..core.warnings import warn
from .arguments import SHAPES, CheckpointArguments, PretrainArguments, RecipeConfig, WarmupArguments


def load_tokenizer(checkpoint: CheckpointArguments, training: RecipeConfig) -> Any:
    """Loads the tokenizer of the checkpoint to train, after checking the checkpoint itself."""
    name, source = checkpoint.model_name_or_path, _source(checkpoint, training)
    if not name:
        raise ValueError("model_name_or_path: name the checkpoint to train, a folder or a Hub repository")
    family_of(_checked_config("model_name_or_path", name, **source))
    return names.load_tokenizer(name, **source)


def load_model(
    checkpoint: CheckpointArguments, training: RecipeConfig, warmup: WarmupArguments | None = None
) -> PreTrainedModel:
    """Loads the checkpoint to train.

    A Pre-LN checkpoint that `warmup` converts to LayerNorm Scaling starts at warmup step 0, where the scale is 1.
    """
    name, source = str(checkpoint.model_name_or_path), _source(checkpoint, training)
    options = {"drop_layers": checkpoint.layers(), "dtype": checkpoint.dtype, **source}
    if warmup is not None and warmup.ln_scaling and not get_ln_scaling(AutoConfig.from_pretrained(name, **source)):
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


def require_same_tokenizer(argument: str, name: str, tokenizer: Any) -> None:
    """Refuses a model that does not exist or has a different tokenizer from the student."""
    _checked_config(argument, name)
    try:
        vocabulary = AutoTokenizer.from_pretrained(name).get_vocab()
    except (OSError, ValueError):  # a folder without a tokenizer
        return
    if vocabulary != tokenizer.get_vocab():
        raise ValueError(
            f"{argument}: the tokenizer of {name!r} ({len(vocabulary)} tokens) differs from the student's "
            f"({len(tokenizer)} tokens)"
        )


def require_pruned(checkpoint: CheckpointArguments, training: RecipeConfig) -> None:
    """Refuses a checkpoint with all its layers, since there would be nothing to heal."""
    name = str(checkpoint.model_name_or_path)
    config = AutoConfig.from_pretrained(name, **_source(checkpoint, training))
    if not checkpoint.layers() and record(config).dropped is None:
        raise ValueError(f"{name!r} has all its layers; use --drop_layers, or a checkpoint from hf-lnscale prune")


def _source(checkpoint: CheckpointArguments, training: RecipeConfig) -> dict[str, Any]:
    return {"revision": checkpoint.model_revision, "trust_remote_code": training.trust_remote_code}


def _checked_config(argument: str, name: str, **source: Any) -> Any:
    """The configuration of a model that has weights and is no adapter; errors start with the argument."""
    try:
        if name.startswith((".", "/", "~")) and not os.path.isdir(name):
            raise CheckpointError(f"there is no folder {name!r}")  # transformers would call it an invalid Hub name
        locate(name)
        try:
            config = AutoConfig.from_pretrained(name, **source)
        except (OSError, ValueError) as error:  # its message may not name the model
            raise CheckpointError(f"cannot read {name!r}: {' '.join(str(error).split())}") from error
        require_weights(name)
    except CheckpointError as error:
        raise CheckpointError(f"{argument}: {error}") from error
    return config


def new_config(tokenizer: Any, new: PretrainArguments, max_length: int | None) -> PreTrainedConfig:
    """The configuration of a model to train from scratch, with the tokenizer's vocabulary and special tokens."""
    given, family = new.sizes(), new.family
    if new.config_name is not None:
        config: PreTrainedConfig = AutoConfig.from_pretrained(new.config_name, **given)
        family_of(config)
        if config.vocab_size < len(tokenizer):
            raise ValueError(
                f"config_name: the model of {new.config_name!r} has {config.vocab_size} tokens, but the tokenizer has "
                f"{len(tokenizer)}; name the model's tokenizer with --tokenizer_name"
            )
        return config
    if family not in FAMILIES or FAMILIES[family].no_scaling or family not in CONFIG_MAPPING:
        raise ValueError(
            "family must be the model_type of a family that can be scaled (docs/families.md), such as llama, qwen3 or "
            f"gemma3_text, got {family!r}; for models inside others, use --config_name"
        )
    given = SHAPES[new.shape]._asdict() | given
    del given["learning_rate"]
    hidden, heads = given["hidden_size"], given["num_attention_heads"]
    if "head_dim" not in given and hidden % heads:
        raise ValueError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}; set --head_dim")
    implied = {"head_dim": hidden // heads, "num_key_value_heads": heads}
    if heads % (kv_heads := (implied | given)["num_key_value_heads"]):
        raise ValueError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    family_config: Any = CONFIG_MAPPING[family]
    # A configuration accepts any keyword and ignores those that its family does not have.
    known = family_config()
    if unknown := [name for name in given if not hasattr(known, name)]:
        raise ValueError(f"family {family!r} has no {unknown[0]} in its configuration; use --config_name instead")
    end = tokenizer.eos_token_id
    made: PreTrainedConfig = family_config(
        vocab_size=len(tokenizer),
        # The training length, since it limits the windows on which perplexity is measured.
        max_position_embeddings=max_length,
        bos_token_id=tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end,
        eos_token_id=end,
        # The embedding of the padding token receives no gradient, so it must not be the end-of-text token.
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id != end else None,
        **{name: value for name, value in (implied | given).items() if hasattr(known, name)},
    )
    return made
