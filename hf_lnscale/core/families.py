"""The table of model families: where the decoder layers are and which of their norms are pre-norms.

Rows are looked up by the `model_type` of the text configuration. `register_family` adds a row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from .errors import UnsupportedArchitectureError as UnsupportedArchitectureError

# How a per-layer configuration field changes when layers are dropped; implemented in pruning/depth_fields.py.
RULES = {
    "each": "a list with one entry per layer",
    "cycle": "a list that repeats over the layers",
    "first": "a number of layers, counted from the bottom",
    "last": "the index of the last layer of a kind",
    "indices": "a list of the indices of the layers of a kind",
    "period": "every n-th layer is of a kind, counted from its `..._offset`, or from layer n - 1 if there is none",
    "count": "the total number of layers",
    "shared": "a list with one entry per layer; a shared layer uses the last layer before it that is not shared",
    "unset": "layers depend on each other or on their index: layers cannot be dropped while it is set",
    "dense": "indices of layers without experts; replaces the period `decoder_sparse_step`",
}
# The rule for each such field in transformers.
_FIELDS = {
    "each": "layer_types activation_sparsity_pattern attention_layers layer_rope_theta layers_block_type "
    "mlp_layer_types no_rope_layers num_attention_heads_per_layer",
    "cycle": "block_types",
    "first": "first_k_dense_replace max_window_layers moe_layer_start_index num_dense_layers",
    "last": "moe_layer_end_index",
    "indices": "attn_layer_indices moe_layers",
    "period": "attn_layer_period expert_layer_period moe_layer_interval",
    "dense": "mlp_only_layers",
    "count": "num_blocks",
    "shared": "indexer_types",
    "unset": "num_kv_shared_layers scale_attn_by_inverse_layer_idx",
}
DEPTH_FIELDS = {field: rule for rule, fields in _FIELDS.items() for field in fields.split()}


@dataclass(frozen=True)
class Family:
    """A row of the table: what the plugin must know about one family of decoders.

    Attributes:
        layers: path of the `ModuleList` of decoder layers, relative to the base model.
        attention_norm: path of the norm before attention (or a linear-attention mixer), relative to a layer.
        mlp_norm: path of the norm before the MLP or the experts, relative to a layer.
        one_plus_weight: whether the norm computes `normalized * (1 + weight)` rather than `normalized * weight`.
        depth_fields: per-layer configuration fields besides `num_hidden_layers`: names from `DEPTH_FIELDS`, or a
            mapping from names to rules; None if unknown.
        requires: configuration fields and the values under which the family has two pre-norms per layer.
        no_scaling: why the family cannot be scaled, although its layers can be dropped.
        no_dropping: why its layers cannot be dropped, although it can be scaled.
        attention: path of the module that computes only attention and returns its output and the attention weights;
            "" if there is none, in which case attention cannot be dropped separately.
        mlp: path of the module that computes only the MLP or the experts and returns a tensor; "" as above.
        output_norms: norms on the outputs of attention and the MLP, applied before the residual addition.
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
        """The paths, relative to a layer, of its "attention" or "mlp" module and of the norms used only by it."""
        path, at = (self.attention, 0) if kind == "attention" else (self.mlp, 1)
        norms, others = ({self.pre_norms[i], self.output_norms[i]} - {""} for i in (at, 1 - at))
        return path, sorted(norms - others)

    def layer_of_pre_norm(self, name: str) -> int | None:
        """The index of the layer whose pre-norm owns the named tensor of a checkpoint; None for other tensors."""
        norms = "|".join(map(re.escape, self.pre_norms))
        match = re.search(rf"(?:^|\.){re.escape(self.layers)}\.(\d+)\.(?:{norms})\.(?:weight|bias)$", name)
        return int(match[1]) if match else None

    @property
    def rules(self) -> dict[str, str] | None:
        """The rule for each per-layer configuration field."""
        fields = self.depth_fields
        return fields if fields is None or isinstance(fields, dict) else {name: DEPTH_FIELDS[name] for name in fields}


POST_NORM = "it normalizes the output of attention and MLP and has no pre-norm whose output could be scaled"
POST_LN = "it is a Post-LN model: its residual stream is normalized in every layer, so its variance does not grow"
PARALLEL = "attention and MLP of a layer run in parallel, a case that LayerNorm Scaling was not studied on"
NO_WEIGHT = "its norms have no weight that could carry the scale"
ENCODER_DECODER = "it is the decoder of an encoder-decoder model, whose layers also attend to an encoder's output"
HYPER = "it has no plain residual stream: several streams are mixed in every layer (hyper-connections or similar)"
NO_STACK = "it has no single list of layers in which each takes the output of the previous one"
MULTIPLIED = "it has no plain residual stream: each layer multiplies the stream"
MORE_READERS = "parts of a layer other than attention and MLP, after their pre-norms, read the residual stream"
MORE_NORMS = "a layer has more pre-norms than one for attention and one for the MLP"
ONE_SUBLAYER = "a layer is a single sub-layer with one norm, so depth is not counted in pairs of attention and MLP"
UNEQUAL = "its layers do not all have the same pre-norms"
NOT_LINEAR = "the output of its pre-norms is not linear in their weight, so it cannot be scaled through the weight"
NO_CHECK = "its tiny model does not give the same outputs with a cache as without, so a cut could not be checked"
RENAMED = "its checkpoints name the pre-norms differently from its model, so layers in files are not recognized"
SHARED = "its layers share the weights of one Transformer block, so a layer is not a separate part"
NUMBERED = "its attention computes with the number of its layer"

GEMMA = "input_layernorm pre_feedforward_layernorm"
CPMANT = "self_att.layernorm_before_attention ffn.layernorm_before_ffn"
PLAIN_GEMMA4 = (("hidden_size_per_layer_input", 0), ("enable_moe_block", False))
POST_GEMMA = ("post_attention_layernorm", "post_feedforward_layernorm")


def _rows(names: str, depth_fields: str = "", norms: str = "", **others: Any) -> dict[str, Family]:
    """Rows for these model types, with Llama's values where none are given. Strings are space-separated lists."""
    if norms:
        others["attention_norm"], others["mlp_norm"] = norms.split()
    fields = None if "no_dropping" in others else tuple(depth_fields.split())
    return dict.fromkeys(names.split(), Family(depth_fields=fields, **others))


# Found and tested by pruning/probe.py. Beware of names: `post_attention_layernorm` is the norm before the MLP in Llama
# but a norm on the output of attention in Gemma 2.
FAMILIES: dict[str, Family] = {
    **_rows(
        "arcee aria_text bitnet emu3_text_model ernie4_5 glm glm4 gpt_neox_japanese granite granitemoe "
        "granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hyperclovax internlm3 iquestcoder jais2 "
        "jetmoe llama minimax_m2 ministral3 mistral mixtral olmoe persimmon phi3 phi4_multimodal phimoe "
        "qwen3_vl_text seed_oss solar_open starcoder2 youtu",
    ),
    **_rows("cwm gpt_oss granitemoehybrid kolibri1 lara_mini ministral", "layer_types"),
    **_rows("dots3_note_text inkling_text kimi_linear mellum mimo_v2_flash", "layer_types mlp_layer_types"),
    **_rows("qwen2 qwen2_5_vl_text qwen2_vl_text qwen3", "layer_types max_window_layers"),
    **_rows("axk1", "mlp_layer_types first_k_dense_replace"),  # the second before transformers 5.20
    **_rows("glm4_moe_lite hy_v3", "mlp_layer_types"),
    **_rows("bailing_hybrid deepseek_v32 exaone_moe", "layer_types mlp_layer_types first_k_dense_replace"),
    **_rows("deepseek_v2 deepseek_v3 glm4_moe mistral4 sarvam_mla sarvam_moe", "first_k_dense_replace"),
    **_rows("gemma2 gemma3_text vaultgemma", "layer_types", norms=GEMMA, one_plus_weight=True),
    **_rows("biogpt musicgen_melody_decoder xglm", norms="self_attn_layer_norm final_layer_norm"),
    **_rows("gemma nemotron", one_plus_weight=True),
    **_rows("granite_swa granitemoe_swa", "layer_types layer_rope_theta"),
    **_rows("lfm2 lfm3", "layer_types", norms="operator_norm ffn_norm"),
    **_rows("qwen3_5_moe_text qwen3_5_text", "layer_types", one_plus_weight=True),
    **_rows("qwen3_moe qwen3_vl_moe_text", "mlp_only_layers"),
    **_rows("afmoe", "layer_types num_dense_layers", norms="input_layernorm pre_mlp_layernorm"),
    **_rows("apertus apertus1p5_text", norms="attention_layernorm feedforward_layernorm"),
    **_rows("bamba", norms="input_layernorm pre_ff_layernorm", no_dropping=NO_CHECK),
    **_rows("bloom", layers="h", requires=(("apply_residual_connection_post_layernorm", False),)),
    **_rows("cpmant", layers="encoder.layers", norms=CPMANT, no_dropping=NO_CHECK),
    **_rows("ctrl", layers="h", norms="layernorm1 layernorm2"),
    **_rows("dbrx", layers="blocks", norms="norm_attn_norm.norm_1 norm_attn_norm.norm_2"),
    **_rows("diffllama", no_dropping=NUMBERED),
    **_rows("dots1", "layer_types first_k_dense_replace max_window_layers"),
    **_rows("ernie4_5_moe", "moe_layer_start_index moe_layer_end_index moe_layer_interval"),
    **_rows("falcon_h1", norms="input_layernorm pre_ff_layernorm"),
    **_rows("exaone", no_dropping=RENAMED),
    **_rows("flint", "layer_types mlp_only_layers"),
    **_rows("gemma4_text", "layer_types num_kv_shared_layers", norms=GEMMA, requires=PLAIN_GEMMA4),
    **_rows("gemma4_unified_text", "layer_types num_kv_shared_layers", norms=GEMMA),
    **_rows("glm_moe_dsa", "layer_types mlp_layer_types first_k_dense_replace indexer_types"),
    **_rows("gpt2", "scale_attn_by_inverse_layer_idx", layers="h", norms="ln_1 ln_2"),
    **_rows("gpt_bigcode", layers="h", norms="ln_1 ln_2"),
    **_rows("gpt_neo", "attention_layers", layers="h", norms="ln_1 ln_2"),
    **_rows("jamba", "attn_layer_period expert_layer_period", norms="input_layernorm pre_ff_layernorm"),
    **_rows("laguna", "layer_types mlp_layer_types num_attention_heads_per_layer"),
    **_rows("lfm2_moe", "layer_types num_dense_layers", norms="operator_norm ffn_norm"),
    **_rows("llama4_text", "layer_types no_rope_layers moe_layers"),
    **_rows("megatron-bert", layers="encoder.layer", norms="attention.ln ln"),
    **_rows("minicpm3", no_dropping="its residual branches are scaled by the number of layers"),
    **_rows("minimax_m3_vl_text", "layer_types mlp_layer_types", one_plus_weight=True),
    **_rows("moshi", no_dropping=NO_CHECK),
    **_rows("mpt", layers="blocks", norms="norm_1 norm_2"),
    **_rows("opt", norms="self_attn_layer_norm final_layer_norm", requires=(("do_layer_norm_before", True),)),
    **_rows("qwen2_moe", "layer_types max_window_layers mlp_only_layers"),
    **_rows("qwen3_next", "layer_types mlp_only_layers", one_plus_weight=True),
    **_rows("recurrent_gemma", "block_types", norms="temporal_pre_norm channel_pre_norm", one_plus_weight=True),
    **_rows("roberta-prelayernorm", layers="encoder.layer", norms="attention.LayerNorm intermediate.LayerNorm"),
    **_rows("smollm3", "layer_types no_rope_layers"),
    **_rows("stablelm", requires=(("use_parallel_residual", False),)),
    **_rows("xlm-roberta-xl", layers="encoder.layer", norms="attention.self_attn_layer_norm LayerNorm"),
    **_rows("xlstm", layers="blocks", norms="norm_mlstm norm_ffn", no_dropping=NO_CHECK),
    **_rows(
        "bert bert-generation big_bird camembert data2vec-text electra ernie git rembert roberta roc_bert roformer "
        "xlm-roberta xmod",
        layers="encoder.layer",
        no_scaling=POST_LN,
    ),
    **_rows("codegen falcon gptj", layers="h", no_scaling=PARALLEL),
    **_rows("cohere gpt_neox phi", no_scaling=PARALLEL),
    **_rows("falcon_mamba mamba mamba2", no_scaling=ONE_SUBLAYER),
    **_rows("cohere2 cohere_compass_text", "layer_types", no_scaling=PARALLEL),
    **_rows("exaone4 olmo3", "layer_types", no_scaling=POST_NORM),
    **_rows("flex_olmo olmo2", no_scaling=POST_NORM),
    **_rows("modernbert-decoder olmo_hybrid", "layer_types", no_scaling=UNEQUAL),
    **_rows("nanochat olmo", no_scaling=NO_WEIGHT),
    **_rows("axk2", "layer_types mlp_layer_types", no_scaling=NOT_LINEAR),
    **_rows("cohere2_moe", "layer_types mlp_layer_types", no_scaling=PARALLEL),
    **_rows("doge", no_scaling=MULTIPLIED),
    **_rows("nemotron_h", "layers_block_type", no_scaling=ONE_SUBLAYER),
    **_rows("openai-gpt", layers="h", no_scaling=POST_LN),
    **_rows("trocr", no_scaling=POST_LN),
    **_rows("xlnet", layers="layer", no_scaling=POST_LN),
}
# Additions to the rows above: paths of attention and MLP other than `self_attn` and `mlp`, and norms on their outputs.
# Families with neither module come last.
for _names, _changes in (
    ("codegen gpt2 gpt_bigcode gpt_neo gptj mpt", {"attention": "attn"}),
    ("gpt_neox", {"attention": "attention"}),
    ("falcon_h1 glm_moe_dsa gpt_neox_japanese jetmoe recurrent_gemma", {"attention": ""}),
    ("falcon_h1 jamba lfm2 lfm2_moe lfm3", {"mlp": "feed_forward"}),
    ("granitemoe", {"mlp": "block_sparse_moe"}),
    ("recurrent_gemma", {"mlp": "mlp_block"}),
    ("biogpt gpt_oss granitemoe_swa granitemoehybrid granitemoeshared llama4_text mpt opt xglm", {"mlp": ""}),
    ("cohere cohere2 cohere2_moe cohere_compass_text phi", {"mlp_norm": "input_layernorm"}),  # one norm for both
    ("codegen gptj", {"attention_norm": "ln_1", "mlp_norm": "ln_1"}),
    ("exaone4 flex_olmo olmo2 olmo3", {"attention_norm": "", "mlp_norm": ""}),
    ("afmoe", {"output_norms": ("post_attention_layernorm", "post_mlp_layernorm")}),
    ("exaone4 flex_olmo gemma2 gemma3_text olmo2 olmo3", {"output_norms": POST_GEMMA}),
    ("glm4 kolibri1", {"output_norms": ("post_self_attn_layernorm", "post_mlp_layernorm")}),
    ("hyperclovax", {"output_norms": ("post_norm1", "post_norm2")}),
    ("lfm3", {"output_norms": ("post_operator_norm", "post_ffn_norm")}),
    (
        "bert bert-generation big_bird bloom camembert ctrl data2vec-text dbrx doge electra ernie falcon falcon_mamba "
        "gemma4_text gemma4_unified_text git inkling_text mamba mamba2 megatron-bert modernbert-decoder "
        "musicgen_melody_decoder nemotron_h olmo_hybrid openai-gpt rembert roberta roberta-prelayernorm roc_bert "
        "roformer trocr xlm-roberta xlm-roberta-xl xlnet xmod",
        {"attention": "", "mlp": ""},
    ),
):
    FAMILIES |= {name: replace(FAMILIES[name], **_changes) for name in _names.split()}

# Families that can be neither scaled nor cut, by reason.
_UNSUPPORTED = {
    ENCODER_DECODER: "bart bigbird_pegasus blenderbot blenderbot-small marian mbart musicgen musicgen_decoder "
    "musicgen_melody mvp pegasus plbart prophetnet whisper",
    MULTIPLIED: "beam zaya",
    HYPER: "deepseek_v4 gemma3n_text hy_v4 qwen4_exp_text",
    NO_STACK: "blt dory hrm_text inkling2_loop_text mllama_text_model reformer xlm",
    POST_LN: "distilbert minimax",
    MORE_NORMS: "longcat_flash",
    MORE_READERS: "inkling2_text",
    UNEQUAL: "rwkv",
    SHARED: "zamba zamba2",
}
KNOWN_UNSUPPORTED = {name: reason for reason, names in _UNSUPPORTED.items() for name in names.split()}
# Why layers of some of these cannot be dropped, where that has another reason.
NO_DROPPING = {
    "beam": "its layers weight what they add to the residual stream by their number",
    "inkling2_text": "its layers also read the outputs of layers before the previous one",
    "longcat_flash": "its configuration counts sub-layers as layers",
    "minimax": NUMBERED,
    "rwkv": NO_CHECK,
    "zaya": "its layers hand on a state of the router besides the residual stream",
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
    """Adds a family of decoders to the table, for the current process.

    Name only norms whose output is the input of attention or of the MLP: LayerNorm Scaling multiplies pre-norms (arXiv
    2502.05795, section 4, equation 8), not norms on a sub-layer's output, whatever their names suggest. For norms with
    a bias, both weight and bias are scaled.

    Args:
        model_type: `config.model_type` of the text model, e.g. `"starcoder2"`.
        layers: path of the `ModuleList` of decoder layers, relative to the base model (`AutoModel`'s class).
        attention_norm: path of the norm before attention, relative to a layer.
        mlp_norm: path of the norm before the MLP or the experts, relative to a layer.
        one_plus_weight: whether the norm multiplies by `1 + weight`, as Gemma's does.
        depth_fields: per-layer configuration fields besides `num_hidden_layers`: names from
            `hf_lnscale.core.families.DEPTH_FIELDS`, or a mapping from any names to `RULES` defined there, such as
            `{"layer_sizes": "each"}`; `()` if there are none. With None, layers cannot be dropped. `layer_types` and
            `per_layer_config` are always adjusted if present.
        overwrite: whether to replace an existing row.

    Returns:
        The new row.

    Raises:
        ValueError: if a name is empty or malformed, a per-layer field is unknown, or `model_type` is already in the
            table and `overwrite` is False.

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
            f"register_family: attention_norm and mlp_norm are both {mlp_norm!r}; a norm that feeds both is not "
            f"supported, since {PARALLEL}"
        )
    if not isinstance(one_plus_weight, bool):
        raise ValueError(f"register_family: one_plus_weight must be True or False, got {one_plus_weight!r}")
    if model_type in FAMILIES and not overwrite:
        raise ValueError(f"register_family: model_type {model_type!r} is already in the table; pass overwrite=True")
    if depth_fields is not None:
        known = depth_fields if isinstance(depth_fields, dict) else DEPTH_FIELDS
        for name in depth_fields:
            problem = f"{name}: {known.get(name)!r} is not a rule; use"
            if name not in known:
                fields = ", ".join(DEPTH_FIELDS)
                problem = f"{name!r} is not one of {fields}; pass {{{name!r}: rule}}, with one of the rules"
            if known.get(name) not in RULES:
                raise ValueError(f"register_family: depth_fields: {problem} {', '.join(RULES)}")
        depth_fields = dict(depth_fields) if isinstance(depth_fields, dict) else tuple(depth_fields)
    # No sub-layers are dropped in registered families, since what their modules return is unknown.
    FAMILIES[model_type] = Family(
        **paths, one_plus_weight=one_plus_weight, depth_fields=depth_fields, attention="", mlp=""
    )
    return FAMILIES[model_type]


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the text decoder: `config` itself or the nested one that describes the decoder layers."""
    try:
        found = config.get_text_config()
    except ValueError:  # several text models inside; no family in the table has that
        return config
    # Configurations from outside transformers may hold it as a plain dict.
    return found if isinstance(found, PreTrainedConfig) else config


def family_of(config: PreTrainedConfig, argument: str = "ln_scaling") -> Family:
    """The row of a model's text decoder, checked to support `argument`: "ln_scaling" or "drop_layers"."""
    text = text_config(config)
    model_type = text.model_type
    dropping = argument == "drop_layers"
    if family := FAMILIES.get(model_type):
        reason = family.no_dropping if dropping else family.no_scaling or _unmet(family, text)
        if not reason:
            return family
    else:
        reason = KNOWN_UNSUPPORTED.get(model_type, "")
        reason = NO_DROPPING.get(model_type, reason) if dropping else reason
    raise UnsupportedArchitectureError(
        f"{argument} is not supported for model_type {model_type!r}: {reason or 'its pre-norms are not known'}. If it "
        "does have a norm before attention and one before the MLP, add it with hf_lnscale.register_family(model_type, "
        "layers=..., attention_norm=..., mlp_norm=..., depth_fields=...); hf_lnscale.propose_family(model) finds the "
        "values"
    )


def require_sublayer(config: PreTrainedConfig, kind: str, argument: str) -> Family:
    """The row of a model's text decoder, checked to support `argument`, which drops only "attention" or "mlp"."""
    family, text = family_of(config, "drop_layers"), text_config(config)
    reason = _unmet(family, text)
    if not reason and not family.sublayer(kind)[0]:
        reason = (
            f"its layers have no known module that computes only {kind} and whose output is all that is added to the "
            "residual stream"
        )
    if reason:
        raise UnsupportedArchitectureError(
            f"{argument} is not supported for model_type {text.model_type!r}: {reason}. Use drop_layers to drop whole "
            "layers"
        )
    return family


def _unmet(family: Family, text: PreTrainedConfig) -> str:
    for name, value in family.requires:
        if getattr(text, name, value) != value:
            return f"its norms are pre-norms only with {name}={value!r}, not with {getattr(text, name)!r}"
    return ""


def submodule(module: nn.Module, path: str) -> Any:
    """The submodule at a dotted path, or None."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None
