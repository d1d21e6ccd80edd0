"""The table of model families: where the decoder layers are and which of their norms are pre-norms.

A family is a row of data, found by the `model_type` of the text configuration. `register_family` adds a row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from .errors import UnsupportedArchitectureError as UnsupportedArchitectureError

# The configuration fields over depth that it is known how to follow (depth/layers.py does).
DEPTH_FIELDS = ("layer_types", "no_rope_layers", "max_window_layers", "first_k_dense_replace", "mlp_only_layers")


@dataclass(frozen=True)
class Family:
    """What the plugin must know about one family of decoders.

    Attributes:
        layers: path of the `ModuleList` of decoder layers, from the base model.
        attention_norm: the norm in front of attention (or of a linear-attention mixer), from a layer.
        mlp_norm: the norm in front of the MLP or the experts, from a layer.
        one_plus_weight: the norm computes `normalized * (1 + weight)` and not `normalized * weight`.
        depth_fields: the configuration fields that run over depth, besides `num_hidden_layers`; None if not known.
    """

    layers: str = "layers"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    one_plus_weight: bool = False
    depth_fields: tuple[str, ...] | None = None

    @property
    def pre_norms(self) -> tuple[str, str]:
        return self.attention_norm, self.mlp_norm

    def layer_of_pre_norm(self, name: str) -> int | None:
        """The number of the layer whose pre-norm a checkpoint's tensor belongs to, by its name; None for any other."""
        norms = "|".join(map(re.escape, self.pre_norms))
        match = re.search(rf"(?:^|\.){re.escape(self.layers)}\.(\d+)\.(?:{norms})\.(?:weight|bias)$", name)
        return int(match[1]) if match else None


# Its `post_attention_layernorm` is a norm on the OUTPUT of attention.
_SANDWICH = Family(mlp_norm="pre_feedforward_layernorm", one_plus_weight=True, depth_fields=("layer_types",))
_WINDOWS = ("layer_types", "max_window_layers")

FAMILIES: dict[str, Family] = {
    "llama": Family(depth_fields=()),
    "mistral": Family(depth_fields=()),
    "mixtral": Family(depth_fields=()),
    "ministral": Family(depth_fields=("layer_types",)),
    "qwen2": Family(depth_fields=_WINDOWS),
    "qwen3": Family(depth_fields=_WINDOWS),
    "qwen2_moe": Family(depth_fields=(*_WINDOWS, "mlp_only_layers")),
    "qwen3_moe": Family(depth_fields=(*_WINDOWS, "mlp_only_layers")),
    "qwen3_next": Family(one_plus_weight=True, depth_fields=("layer_types", "mlp_only_layers")),
    "qwen3_5_text": Family(one_plus_weight=True, depth_fields=("layer_types",)),
    "qwen3_5_moe_text": Family(one_plus_weight=True, depth_fields=("layer_types",)),
    "deepseek_v2": Family(depth_fields=("first_k_dense_replace",)),
    "deepseek_v3": Family(depth_fields=("first_k_dense_replace",)),
    "phi3": Family(depth_fields=()),
    "smollm3": Family(depth_fields=("layer_types", "no_rope_layers")),
    "granite": Family(depth_fields=()),
    "gemma": Family(one_plus_weight=True, depth_fields=()),
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
    "qwen2_vl_text": Family(depth_fields=_WINDOWS),
    "qwen2_5_vl_text": Family(depth_fields=_WINDOWS),
    "qwen3_vl_text": Family(depth_fields=()),
    "qwen3_vl_moe_text": Family(depth_fields=("mlp_only_layers",)),
}

_POST_NORM = "it normalizes the output of attention and MLP and has no pre-norm whose output could be scaled"
_POST_LN = "it is a Post-LN model: its residual stream is normalized in every layer, so its variance does not grow"
_PARALLEL = "attention and MLP of a layer run in parallel, a case that LayerNorm Scaling was not studied on"
_NO_WEIGHT = "its norms have no weight that could carry the scale"

# Families for which it is known why they are not in the table.
KNOWN_UNSUPPORTED: dict[str, str] = {
    "olmo": _NO_WEIGHT,
    "olmo2": _POST_NORM,
    "olmo3": _POST_NORM,
    "flex_olmo": _POST_NORM,
    "exaone4": _POST_NORM,
    "bert": _POST_LN,
    "roberta": _POST_LN,
    "xlm-roberta": _POST_LN,
    "distilbert": _POST_LN,
    "cohere": _PARALLEL,
    "cohere2": _PARALLEL,
    "phi": _PARALLEL,
    "falcon": _PARALLEL,
    "gptj": _PARALLEL,
    "gpt_neox": _PARALLEL,
}


def register_family(
    model_type: str,
    *,
    layers: str = "layers",
    attention_norm: str = "input_layernorm",
    mlp_norm: str = "post_attention_layernorm",
    one_plus_weight: bool = False,
    depth_fields: tuple[str, ...] | None = None,
    overwrite: bool = False,
) -> Family:
    """Adds a family of decoders to the table, for this process.

    Only norms whose output goes into attention or into the MLP may be named: LayerNorm Scaling multiplies the
    pre-norms (arXiv 2502.05795, section 4, equation 8), and a norm on a sub-layer's output is something else, whatever
    its name says. Norms with a bias work: weight and bias are both scaled.

    Args:
        model_type: `config.model_type` of the text model, e.g. `"starcoder2"`.
        layers: path of the `ModuleList` of decoder layers, from the base model (`AutoModel`'s class).
        attention_norm: path of the norm in front of attention, from a layer.
        mlp_norm: path of the norm in front of the MLP or the experts, from a layer.
        one_plus_weight: whether the norm multiplies by `1 + weight`, as Gemma's does.
        depth_fields: configuration fields that run over depth besides `num_hidden_layers`, of those that are known to
            `hf_lnscale.core.families.DEPTH_FIELDS`; `()` if there are none. With None, no layers can be dropped. Where
            a configuration has `layer_types`, these are followed in any case.
        overwrite: replace a row that exists.

    Returns:
        The new row.

    Raises:
        ValueError: for an empty or malformed name, for a field over depth that is not known, or for a `model_type` that
            is in the table, without `overwrite`.

    Example:
        >>> hf_lnscale.register_family("starcoder2")
        >>> model = AutoModelForCausalLM.from_config(Starcoder2Config(ln_scaling=True))
    """
    paths = {"layers": layers, "attention_norm": attention_norm, "mlp_norm": mlp_norm}
    for argument, value in {"model_type": model_type, **paths}.items():
        if not isinstance(value, str) or not value:
            raise ValueError(f"register_family: {argument} must be a non-empty string, got {value!r}")
    if attention_norm == mlp_norm:
        raise ValueError(
            f"register_family: attention_norm and mlp_norm are both {mlp_norm!r}; a norm that feeds both is scaled "
            f"once in the paper's sense and is not supported, since {_PARALLEL}"
        )
    if not isinstance(one_plus_weight, bool):
        raise ValueError(f"register_family: one_plus_weight must be True or False, got {one_plus_weight!r}")
    if model_type in FAMILIES and not overwrite:
        raise ValueError(f"register_family: model_type {model_type!r} is in the table already; give overwrite=True")
    if depth_fields is not None:
        for name in depth_fields:
            if name not in DEPTH_FIELDS:
                raise ValueError(f"register_family: depth_fields: {name!r} is not one of {', '.join(DEPTH_FIELDS)}")
        depth_fields = tuple(depth_fields)
    FAMILIES[model_type] = Family(**paths, one_plus_weight=one_plus_weight, depth_fields=depth_fields)
    return FAMILIES[model_type]


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the text decoder: `config` itself, or its part that speaks of the decoder layers."""
    try:
        found = config.get_text_config()
    except ValueError:  # more than one text model inside; none of these is in the table
        return config
    # Configurations from outside transformers may hold it as a plain dict.
    return found if isinstance(found, PreTrainedConfig) else config


def family_of(config: PreTrainedConfig, argument: str = "ln_scaling") -> Family:
    """The row of a model's text decoder; `argument` is what a refusal speaks of.

    Raises:
        UnsupportedArchitectureError: if there is none; the message says why, where it is known, and how to add one.
    """
    model_type = text_config(config).model_type
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    reason = KNOWN_UNSUPPORTED.get(model_type)
    why = f": {reason}" if reason else ", as its pre-norms are not known"
    raise UnsupportedArchitectureError(
        f"{argument} is not supported for model_type {model_type!r}{why}. Supported: {', '.join(sorted(FAMILIES))}. "
        "If the family does have a norm in front of attention and one in front of the MLP, add it with "
        "hf_lnscale.register_family(model_type, layers=..., attention_norm=..., mlp_norm=..., depth_fields=...)."
    )


def submodule(module: nn.Module, path: str) -> Any:
    """The submodule at a dotted path, or None."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None
