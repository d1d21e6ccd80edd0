"""The configuration of a model to pre-train, of any family and size."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from ..core.families import FAMILIES, family_of
from .arguments import SHAPES, PretrainArguments


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
