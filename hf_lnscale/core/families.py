"""The table of model families: where the decoder layers are and which of their norms are pre-norms.

A family is a row of data, found by the `model_type` of the text configuration. `register_family` adds a row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from .errors import UnsupportedArchitectureError as UnsupportedArchitectureError

# How a configuration field over depth follows when layers are dropped (pruning/layers.py does it).
RULES = {
    "each": "a list with one entry a layer",
    "cycle": "a list that repeats over the layers",
    "first": "a number of layers, counted from the bottom",
    "last": "the index of the last layer of a kind",
    "indices": "a list of the indices of the layers of a kind",
    "period": "every n-th layer is of a kind, counted from its `..._offset`, or so that layer n - 1 is the first",
    "count": "the number of all layers",
    "shared": "a list with one entry a layer, of which a shared one takes from the last one before it that is not",
    "unset": "layers depend on each other or on their own number: no layer is dropped while it is set",
    "dense": "indices of layers without experts, which take over from `decoder_sparse_step`, a period",
}
# The rule of each field that families of transformers have.
DEPTH_FIELDS = {
    "layer_types": "each",
    "activation_sparsity_pattern": "each",
    "attention_layers": "each",
    "layer_rope_theta": "each",
    "layers_block_type": "each",
    "mlp_layer_types": "each",
    "no_rope_layers": "each",
    "num_attention_heads_per_layer": "each",
    "block_types": "cycle",
    "first_k_dense_replace": "first",
    "max_window_layers": "first",
    "moe_layer_start_index": "first",
    "num_dense_layers": "first",
    "moe_layer_end_index": "last",
    "attn_layer_indices": "indices",
    "moe_layers": "indices",
    "attn_layer_period": "period",
    "expert_layer_period": "period",
    "moe_layer_interval": "period",
    "mlp_only_layers": "dense",
    "num_blocks": "count",
    "indexer_types": "shared",
    "num_kv_shared_layers": "unset",
    "scale_attn_by_inverse_layer_idx": "unset",
}


@dataclass(frozen=True)
class Family:
    """What the plugin must know about one family of decoders.

    Attributes:
        layers: path of the `ModuleList` of decoder layers, from the base model.
        attention_norm: the norm in front of attention (or of a linear-attention mixer), from a layer.
        mlp_norm: the norm in front of the MLP or the experts, from a layer.
        one_plus_weight: the norm computes `normalized * (1 + weight)` and not `normalized * weight`.
        depth_fields: the configuration fields that run over depth, besides `num_hidden_layers`: names of
            `DEPTH_FIELDS`, or names with their rule; None if not known.
        requires: configuration fields with the value without which the family has no two pre-norms a layer.
        no_scaling: why the family cannot be scaled, though its layers can be dropped.
        no_dropping: why its layers cannot be dropped, though it can be scaled.
        attention: the module of a layer that computes attention and nothing else, and returns a pair of it and the
            attention weights; "" if there is none, so that attention cannot be dropped alone.
        mlp: that of the MLP or the experts, which returns a tensor.
        output_norms: the norms behind attention and behind the MLP, before their output is added to the stream.
    """

    layers: str = "layers"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    one_plus_weight: bool = False
    depth_fields: tuple[str, ...] | dict[str, str] | None = None
    requires: tuple[tuple[str, Any], ...] = ()
    no_scaling: str = ""
    no_dropping: str = ""
    attention: str = "self_attn"
    mlp: str = "mlp"
    output_norms: tuple[str, str] = ("", "")

    @property
    def pre_norms(self) -> tuple[str, str]:
        return self.attention_norm, self.mlp_norm

    def sublayer(self, kind: str) -> tuple[str, list[str]]:
        """The paths, from a layer, of the module of "attention" or "mlp" and of the norms that serve it alone."""
        first = kind == "attention"
        norms, others = ({self.pre_norms[at], self.output_norms[at]} - {""} for at in ((0, 1) if first else (1, 0)))
        return self.attention if first else self.mlp, sorted(norms - others)

    def layer_of_pre_norm(self, name: str) -> int | None:
        """The number of the layer whose pre-norm a checkpoint's tensor belongs to, by its name; None for any other."""
        norms = "|".join(map(re.escape, self.pre_norms))
        match = re.search(rf"(?:^|\.){re.escape(self.layers)}\.(\d+)\.(?:{norms})\.(?:weight|bias)$", name)
        return int(match[1]) if match else None

    @property
    def rules(self) -> dict[str, str] | None:
        """The rule of each configuration field over depth."""
        fields = self.depth_fields
        return fields if fields is None or isinstance(fields, dict) else {name: DEPTH_FIELDS[name] for name in fields}


POST_NORM = "it normalizes the output of attention and MLP and has no pre-norm whose output could be scaled"
POST_LN = "it is a Post-LN model: its residual stream is normalized in every layer, so its variance does not grow"
PARALLEL = "attention and MLP of a layer run in parallel, a case that LayerNorm Scaling was not studied on"
NO_WEIGHT = "its norms have no weight that could carry the scale"
ENCODER_DECODER = "it is the decoder of an encoder-decoder model, which LayerNorm Scaling was not studied on"
HYPER = "it has no plain residual stream: several streams are mixed in every layer (hyper-connections and their like)"
NO_STACK = "it has no one list of layers that each take the output of the one before"
MULTIPLIED = "it has no plain residual stream: each layer multiplies the stream"
MORE_READERS = "other parts of a layer than attention and MLP behind their pre-norms read the residual stream"
MORE_NORMS = "a layer has more pre-norms than one for attention and one for the MLP"
ONE_SUBLAYER = "a layer is a single sub-layer with one norm, so depth is not counted in pairs of attention and MLP"
UNEQUAL = "its layers do not all have the same pre-norms"
NOT_LINEAR = "the output of its pre-norms is not linear in their weight, and so cannot be scaled by it"
NO_CHECK = "its tiny model gives other outputs with a cache than without, so that a cut could not be checked"
RENAMED = "its checkpoints name the pre-norms differently from its model, so that layers in files are not recognized"
SHARED = "its layers share the weights of one Transformer block, so that a layer is not a part of its own"

# Found, and tested, by pruning/probe.py. Mind the names: `post_attention_layernorm` is the norm in front of the MLP in
# Llama and a norm on the output of attention in Gemma 2.
_ROWS: tuple[tuple[Family, str], ...] = (
    (
        Family(depth_fields=()),
        "arcee aria_text bitnet emu3_text_model ernie4_5 glm glm4 gpt_neox_japanese granite granitemoe "
        "granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hyperclovax internlm3 iquestcoder jais2 "
        "jetmoe llama minimax_m2 ministral3 mistral mixtral olmoe persimmon phi3 phi4_multimodal phimoe "
        "qwen3_vl_text seed_oss solar_open starcoder2 youtu",
    ),
    (Family(depth_fields=("layer_types",)), "cwm gpt_oss granitemoehybrid kolibri1 lara_mini ministral"),
    (
        Family(depth_fields=("layer_types", "mlp_layer_types")),
        "dots3_note_text inkling_text kimi_linear mellum mimo_v2_flash",
    ),
    (Family(depth_fields=("layer_types", "max_window_layers")), "qwen2 qwen2_5_vl_text qwen2_vl_text qwen3"),
    (Family(depth_fields=("mlp_layer_types",)), "axk1 glm4_moe_lite hy_v3"),
    (
        Family(depth_fields=("layer_types", "mlp_layer_types", "first_k_dense_replace")),
        "bailing_hybrid deepseek_v32 exaone_moe",
    ),
    (Family(depth_fields=("first_k_dense_replace",)), "deepseek_v2 deepseek_v3 glm4_moe sarvam_mla sarvam_moe"),
    (
        Family(mlp_norm="pre_feedforward_layernorm", one_plus_weight=True, depth_fields=("layer_types",)),
        "gemma2 gemma3_text vaultgemma",
    ),
    (
        Family(attention_norm="self_attn_layer_norm", mlp_norm="final_layer_norm", depth_fields=()),
        "biogpt musicgen_melody_decoder xglm",
    ),
    (Family(one_plus_weight=True, depth_fields=()), "gemma nemotron"),
    (Family(depth_fields=("layer_types", "layer_rope_theta")), "granite_swa granitemoe_swa"),
    (Family(attention_norm="operator_norm", mlp_norm="ffn_norm", depth_fields=("layer_types",)), "lfm2 lfm3"),
    (Family(one_plus_weight=True, depth_fields=("layer_types",)), "qwen3_5_moe_text qwen3_5_text"),
    (Family(depth_fields=("mlp_only_layers",)), "qwen3_moe qwen3_vl_moe_text"),
    (Family(mlp_norm="pre_mlp_layernorm", depth_fields=("layer_types", "num_dense_layers")), "afmoe"),
    (
        Family(attention_norm="attention_layernorm", mlp_norm="feedforward_layernorm", depth_fields=()),
        "apertus apertus1p5_text",
    ),
    (Family(mlp_norm="pre_ff_layernorm", no_dropping=NO_CHECK), "bamba"),
    (Family(layers="h", requires=(("apply_residual_connection_post_layernorm", False),), depth_fields=()), "bloom"),
    (
        Family(
            layers="encoder.layers",
            attention_norm="self_att.layernorm_before_attention",
            mlp_norm="ffn.layernorm_before_ffn",
            no_dropping=NO_CHECK,
        ),
        "cpmant",
    ),
    (Family(layers="h", attention_norm="layernorm1", mlp_norm="layernorm2", depth_fields=()), "ctrl"),
    (
        Family(
            layers="blocks", attention_norm="norm_attn_norm.norm_1", mlp_norm="norm_attn_norm.norm_2", depth_fields=()
        ),
        "dbrx",
    ),
    (Family(no_dropping="its attention computes with the number of its layer"), "diffllama"),
    (Family(depth_fields=("layer_types", "first_k_dense_replace", "max_window_layers")), "dots1"),
    (Family(depth_fields=("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval")), "ernie4_5_moe"),
    (Family(mlp_norm="pre_ff_layernorm", depth_fields=()), "falcon_h1"),
    (Family(no_dropping=RENAMED), "exaone"),
    (Family(depth_fields=("layer_types", "mlp_only_layers")), "flint"),
    (
        Family(
            mlp_norm="pre_feedforward_layernorm",
            requires=(("hidden_size_per_layer_input", 0), ("enable_moe_block", False)),
            depth_fields=("layer_types", "num_kv_shared_layers"),
        ),
        "gemma4_text",
    ),
    (
        Family(mlp_norm="pre_feedforward_layernorm", depth_fields=("layer_types", "num_kv_shared_layers")),
        "gemma4_unified_text",
    ),
    (Family(depth_fields=("layer_types", "mlp_layer_types", "first_k_dense_replace", "indexer_types")), "glm_moe_dsa"),
    (
        Family(layers="h", attention_norm="ln_1", mlp_norm="ln_2", depth_fields=("scale_attn_by_inverse_layer_idx",)),
        "gpt2",
    ),
    (Family(layers="h", attention_norm="ln_1", mlp_norm="ln_2", depth_fields=()), "gpt_bigcode"),
    (Family(layers="h", attention_norm="ln_1", mlp_norm="ln_2", depth_fields=("attention_layers",)), "gpt_neo"),
    (Family(mlp_norm="pre_ff_layernorm", depth_fields=("attn_layer_period", "expert_layer_period")), "jamba"),
    (Family(depth_fields=("layer_types", "mlp_layer_types", "num_attention_heads_per_layer")), "laguna"),
    (
        Family(attention_norm="operator_norm", mlp_norm="ffn_norm", depth_fields=("layer_types", "num_dense_layers")),
        "lfm2_moe",
    ),
    (Family(depth_fields=("layer_types", "no_rope_layers", "moe_layers")), "llama4_text"),
    (Family(layers="encoder.layer", attention_norm="attention.ln", mlp_norm="ln", depth_fields=()), "megatron-bert"),
    (Family(no_dropping="its residual branches are scaled by the number of layers"), "minicpm3"),
    (Family(one_plus_weight=True, depth_fields=("layer_types", "mlp_layer_types")), "minimax_m3_vl_text"),
    (Family(no_dropping=NO_CHECK), "moshi"),
    (Family(layers="blocks", attention_norm="norm_1", mlp_norm="norm_2", depth_fields=()), "mpt"),
    (
        Family(
            attention_norm="self_attn_layer_norm",
            mlp_norm="final_layer_norm",
            requires=(("do_layer_norm_before", True),),
            depth_fields=(),
        ),
        "opt",
    ),
    (Family(depth_fields=("layer_types", "max_window_layers", "mlp_only_layers")), "qwen2_moe"),
    (Family(one_plus_weight=True, depth_fields=("layer_types", "mlp_only_layers")), "qwen3_next"),
    (
        Family(
            attention_norm="temporal_pre_norm",
            mlp_norm="channel_pre_norm",
            one_plus_weight=True,
            depth_fields=("block_types",),
        ),
        "recurrent_gemma",
    ),
    (
        Family(
            layers="encoder.layer",
            attention_norm="attention.LayerNorm",
            mlp_norm="intermediate.LayerNorm",
            depth_fields=(),
        ),
        "roberta-prelayernorm",
    ),
    (Family(depth_fields=("layer_types", "no_rope_layers")), "smollm3"),
    (Family(requires=(("use_parallel_residual", False),), depth_fields=()), "stablelm"),
    (
        Family(
            layers="encoder.layer",
            attention_norm="attention.self_attn_layer_norm",
            mlp_norm="LayerNorm",
            depth_fields=(),
        ),
        "xlm-roberta-xl",
    ),
    (Family(layers="blocks", attention_norm="norm_mlstm", mlp_norm="norm_ffn", no_dropping=NO_CHECK), "xlstm"),
    (
        Family(layers="encoder.layer", no_scaling=POST_LN, depth_fields=()),
        "bert bert-generation big_bird camembert data2vec-text electra ernie git rembert roberta roc_bert "
        "roformer xlm-roberta xmod",
    ),
    (Family(layers="h", no_scaling=PARALLEL, depth_fields=()), "codegen falcon gptj"),
    (Family(no_scaling=PARALLEL, depth_fields=()), "cohere gpt_neox phi"),
    (Family(no_scaling=ONE_SUBLAYER, depth_fields=()), "falcon_mamba mamba mamba2"),
    (Family(no_scaling=PARALLEL, depth_fields=("layer_types",)), "cohere2 cohere_compass_text"),
    (Family(no_scaling=POST_NORM, depth_fields=("layer_types",)), "exaone4 olmo3"),
    (Family(no_scaling=POST_NORM, depth_fields=()), "flex_olmo olmo2"),
    (Family(no_scaling=UNEQUAL, depth_fields=("layer_types",)), "modernbert-decoder olmo_hybrid"),
    (Family(no_scaling=NO_WEIGHT, depth_fields=()), "nanochat olmo"),
    (Family(no_scaling=NOT_LINEAR, depth_fields=("layer_types", "mlp_layer_types")), "axk2"),
    (Family(no_scaling=PARALLEL, depth_fields=("layer_types", "mlp_layer_types")), "cohere2_moe"),
    (Family(no_scaling=MULTIPLIED, depth_fields=()), "doge"),
    (Family(no_scaling=ONE_SUBLAYER, depth_fields=("layers_block_type",)), "nemotron_h"),
    (Family(layers="h", no_scaling=POST_LN, depth_fields=()), "openai-gpt"),
    (Family(no_scaling=POST_LN, depth_fields=()), "trocr"),
    (Family(layers="layer", no_scaling=POST_LN, depth_fields=()), "xlnet"),
)
# What the rows above leave out: where a layer's attention and MLP are, if not at `self_attn` and `mlp`, and the norms
# behind them. Families without any of the two modules are named last.
_SUBLAYERS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"attention": "attn"}, "codegen gpt2 gpt_bigcode gpt_neo gptj mpt"),
    ({"attention": "attention"}, "gpt_neox"),
    ({"attention": ""}, "falcon_h1 glm_moe_dsa gpt_neox_japanese jetmoe recurrent_gemma"),
    ({"mlp": "feed_forward"}, "falcon_h1 jamba lfm2 lfm2_moe lfm3"),
    ({"mlp": "block_sparse_moe"}, "granitemoe"),
    ({"mlp": "mlp_block"}, "recurrent_gemma"),
    ({"mlp": ""}, "biogpt gpt_oss granitemoe_swa granitemoehybrid granitemoeshared llama4_text mpt opt xglm"),
    ({"mlp_norm": "input_layernorm"}, "cohere cohere2 cohere2_moe cohere_compass_text phi"),  # one norm for both
    ({"attention_norm": "ln_1", "mlp_norm": "ln_1"}, "codegen gptj"),
    ({"attention_norm": "", "mlp_norm": ""}, "exaone4 flex_olmo olmo2 olmo3"),
    (
        {"output_norms": ("post_attention_layernorm", "post_feedforward_layernorm")},
        "exaone4 flex_olmo gemma2 gemma3_text olmo2 olmo3",
    ),
    ({"output_norms": ("post_attention_layernorm", "post_mlp_layernorm")}, "afmoe"),
    ({"output_norms": ("post_self_attn_layernorm", "post_mlp_layernorm")}, "glm4 kolibri1"),
    ({"output_norms": ("post_norm1", "post_norm2")}, "hyperclovax"),
    ({"output_norms": ("post_operator_norm", "post_ffn_norm")}, "lfm3"),
    (
        {"attention": "", "mlp": ""},
        "bert bert-generation big_bird bloom camembert ctrl data2vec-text dbrx doge electra ernie falcon falcon_mamba "
        "gemma4_text gemma4_unified_text git inkling_text mamba mamba2 megatron-bert modernbert-decoder "
        "musicgen_melody_decoder nemotron_h olmo_hybrid openai-gpt rembert roberta roberta-prelayernorm roc_bert "
        "roformer trocr xlm-roberta xlm-roberta-xl xlnet xmod",
    ),
)
FAMILIES: dict[str, Family] = {name: family for family, names in _ROWS for name in names.split()}
for _changes, _names in _SUBLAYERS:
    FAMILIES |= {name: replace(FAMILIES[name], **_changes) for name in _names.split()}

# Families that can be neither scaled nor cut, by the reason.
KNOWN_UNSUPPORTED: dict[str, str] = {
    name: reason
    for reason, names in (
        (
            ENCODER_DECODER,
            "bart bigbird_pegasus blenderbot blenderbot-small marian mbart musicgen musicgen_decoder musicgen_melody "
            "mvp pegasus plbart prophetnet whisper",
        ),
        (MULTIPLIED, "beam zaya"),
        (HYPER, "deepseek_v4 gemma3n_text hy_v4 qwen4_exp_text"),
        (NO_STACK, "blt dory hrm_text inkling2_loop_text mllama_text_model reformer xlm"),
        (POST_LN, "distilbert minimax"),
        (MORE_NORMS, "longcat_flash"),
        (MORE_READERS, "inkling2_text"),
        (UNEQUAL, "rwkv"),
        (SHARED, "zamba zamba2"),
    )
    for name in names.split()
}


def register_family(
    model_type: str,
    *,
    layers: str = "layers",
    attention_norm: str = "input_layernorm",
    mlp_norm: str = "post_attention_layernorm",
    one_plus_weight: bool = False,
    depth_fields: tuple[str, ...] | dict[str, str] | None = None,
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
        depth_fields: configuration fields that run over depth besides `num_hidden_layers`: of those that are known to
            `hf_lnscale.core.families.DEPTH_FIELDS`, or any with one of the `RULES` there, such as
            `{"layer_sizes": "each"}`; `()` if there are none. With None, no layers can be dropped. Where a
            configuration has `layer_types` or `per_layer_config`, these are followed in any case.
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
    paths: dict[str, Any] = {"layers": layers, "attention_norm": attention_norm, "mlp_norm": mlp_norm}
    for argument, value in {"model_type": model_type, **paths}.items():
        if not isinstance(value, str) or not value:
            raise ValueError(f"register_family: {argument} must be a non-empty string, got {value!r}")
    if attention_norm == mlp_norm:
        raise ValueError(
            f"register_family: attention_norm and mlp_norm are both {mlp_norm!r}; a norm that feeds both is scaled "
            f"once in the paper's sense and is not supported, since {PARALLEL}"
        )
    if not isinstance(one_plus_weight, bool):
        raise ValueError(f"register_family: one_plus_weight must be True or False, got {one_plus_weight!r}")
    if model_type in FAMILIES and not overwrite:
        raise ValueError(f"register_family: model_type {model_type!r} is in the table already; give overwrite=True")
    if depth_fields is not None:
        known = depth_fields if isinstance(depth_fields, dict) else DEPTH_FIELDS
        for name in depth_fields:
            if name not in known:
                raise ValueError(
                    f"register_family: depth_fields: {name!r} is not one of {', '.join(DEPTH_FIELDS)}; give "
                    f"{{{name!r}: rule}}, with one of the rules {', '.join(RULES)}"
                )
            if known[name] not in RULES:
                raise ValueError(
                    f"register_family: depth_fields: {name}: {known[name]!r} is not a rule; use {', '.join(RULES)}"
                )
        depth_fields = dict(depth_fields) if isinstance(depth_fields, dict) else tuple(depth_fields)
    # Sub-layers are dropped in the families of the table alone: what a module returns is not known of others.
    FAMILIES[model_type] = Family(
        **paths, one_plus_weight=one_plus_weight, depth_fields=depth_fields, attention="", mlp=""
    )
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
    text = text_config(config)
    model_type = text.model_type
    family = FAMILIES.get(model_type)
    if family is not None:
        reason = family.no_dropping if argument == "drop_layers" else family.no_scaling or _unmet(family, text)
        if not reason:
            return family
    else:
        reason = KNOWN_UNSUPPORTED.get(model_type, "")
    raise UnsupportedArchitectureError(
        f"{argument} is not supported for model_type {model_type!r}: {reason or 'its pre-norms are not known'}. If it "
        "does have a norm before attention and one before the MLP, add it with hf_lnscale.register_family(model_type, "
        "layers=..., attention_norm=..., mlp_norm=..., depth_fields=...), as hf_lnscale.propose_family(model) says"
    )


def require_sublayer(config: PreTrainedConfig, kind: str, argument: str) -> Family:
    """The row of a model's text decoder, if it can lose its attention or its MLP alone.

    Args:
        config: of the model.
        kind: "attention" or "mlp".
        argument: what a refusal speaks of.

    Raises:
        UnsupportedArchitectureError: if it cannot; the message says why.
    """
    family, text = family_of(config, "drop_layers"), text_config(config)
    reason = _unmet(family, text)
    if not reason and not family.sublayer(kind)[0]:
        reason = (
            f"no module of its layers is known that computes {kind} and nothing else, and whose output is all that is "
            "added to the residual stream"
        )
    if reason:
        raise UnsupportedArchitectureError(
            f"{argument} is not supported for model_type {text.model_type!r}: {reason}. Whole layers can go: "
            "drop_layers"
        )
    return family


def _unmet(family: Family, text: PreTrainedConfig) -> str:
    for name, value in family.requires:
        if getattr(text, name, value) != value:
            return f"its norms are pre-norms with {name}={value!r} only, not with {getattr(text, name)!r}"
    return ""


def submodule(module: nn.Module, path: str) -> Any:
    """The submodule at a dotted path, or None."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None
