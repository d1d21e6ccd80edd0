"""Model shapes of "The Curse of Depth in Large Language Models" (arXiv 2502.05795), for any family and size."""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from ..core.families import FAMILIES, family_of


class Shape(NamedTuple):
    """Sizes of a Llama, and the paper's learning rate for it."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_hidden_layers: int
    learning_rate: float


SHAPES = {
    # Not in the paper: as deep as its smallest model, but trains within a minute.
    "demo": Shape(128, 344, 4, 12, 1e-3),
    "130M": Shape(768, 2048, 12, 12, 1e-3),
    "250M": Shape(768, 2560, 16, 24, 1e-3),
    "350M": Shape(1024, 2736, 16, 24, 1e-3),
    "1B": Shape(2048, 5461, 32, 24, 5e-4),
    "7B": Shape(4096, 11008, 32, 32, 5e-4),
}
SIZES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "head_dim",
)  # fmt: skip


def new_config(
    tokenizer: Any, *, family: str, shape: str, config_name: str | None, max_length: int, sizes: dict[str, int | None]
) -> PreTrainedConfig:
    """The configuration of a model to train from scratch, with the tokenizer's vocabulary and special tokens.

    Based on `family` (a `model_type`) and `shape` (a key of `SHAPES`), or on the checkpoint `config_name`. Values in
    `sizes` override any of `SIZES` unless they are None.
    """
    given = {name: value for name, value in sizes.items() if value is not None}
    for name, value in given.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if config_name is not None:
        config: PreTrainedConfig = AutoConfig.from_pretrained(config_name, **given)
        family_of(config)
        if config.vocab_size < len(tokenizer):
            raise ValueError(
                f"config_name: the model of {config_name!r} has {config.vocab_size} tokens, but the tokenizer has "
                f"{len(tokenizer)}; name the model's tokenizer with --tokenizer_name"
            )
        return config
    if family not in FAMILIES or FAMILIES[family].no_scaling or family not in CONFIG_MAPPING:
        raise ValueError(
            "family must be the model_type of a family that can be scaled (docs/families.md), such as llama, qwen3 or "
            f"gemma3_text, got {family!r}; for models inside others, use --config_name"
        )
    given = SHAPES[shape]._asdict() | given
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
