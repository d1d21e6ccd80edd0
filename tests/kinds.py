"""A tiny configuration of every kind of causal language model that transformers registers.

PYTHONPATH=tests python tests/kinds.py    # prints the tables of docs/families.md and docs/compatibility.md
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import transformers as tf
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_lnscale.core.families import FAMILIES, KNOWN_UNSUPPORTED, NO_DROPPING
from hf_lnscale.pruning.probe import tiny_config

_HYBRID = {"layer_types": ["linear_attention", "full_attention"] * 2}
_CONVOLUTION = {"layer_types": ["conv", "full_attention"] * 2}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_chunk_size": 8}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_AUDIO = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_blocks": 1,
    "num_attention_heads": 2,
    "ext_pw_out_channel": 16,
    "depthwise_separable_out_channel": 16,
    "nemo_conv_channels": 16,
}
_BLT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_SHARED = {
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "attention_hidden_size": 64,
    "attention_head_dim": 16,
    "num_key_value_heads": 4,
}
# What a tiny model of a kind needs besides the sizes that `tiny_config` knows.
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA | {"attn_layer_indices": [1, 3]},
    "blt": {
        "encoder_hash_byte_group_vocab": 50,
        "patcher_config": _BLT,
        "encoder_config": _BLT | {"hidden_size_global": 64},
        "decoder_config": _BLT | {"hidden_size_global": 64},
        "global_config": _BLT | {"hidden_size": 64},
    },
    "cohere_compass_text": {
        "rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROPE | {"mrope_section": [1, 1, 2]})
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_text": {
        "head_dim": 16,
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "swa_head_dim": 16,
        "swa_kv_lora_rank": 8,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 8,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_chunk_size": 8},
    "gemma4_text": {"hidden_size_per_layer_input": 0},
    "git": {"vision_config": VISION},
    "glm_moe_dsa": {"indexer_types": ["full", "shared"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": _MAMBA | _HYBRID,
    "kimi_linear": _HYBRID,
    "lfm2": _CONVOLUTION,
    "lfm2_moe": _CONVOLUTION,
    "lara_mini": _HYBRID,
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 2, "chunk_size": 8},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "nemotron_h": {
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "chunk_size": 8,
        "layers_block_type": ["full_attention", "moe", "linear_attention", "mlp"],
    },
    "olmo_hybrid": _HYBRID,
    "phi4_multimodal": {"vision_config": VISION, "audio_config": _AUDIO},
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_5_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "qwen4_exp_text": _HYBRID
    | {
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_n_heads": 2,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
        "shape_vocab_size": 50,
        "pronunciation_vocab_size": 50,
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": _SHARED,
    "zamba2": _SHARED | {"mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 8, "chunk_size": 8},
    "zaya": {"num_experts_per_tok": 1},
}
# transformers has a causal language model of mistral4, but does not register it.
CLASSES = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "mistral4": "Mistral4ForCausalLM"}
# The text decoders of kinds whose configuration leaves them open.
_OPEN = {
    "fuyu": "persimmon",
    "gemma4_assistant": "gemma4_text",
    "gemma4_unified_assistant": "gemma4_unified_text",
    "got_ocr2": "qwen2",
    "moss_transcribe_diarize": "qwen3",
}
# The experiment gives no encoder's output, without which cross-attention does not run: the reason is read in the code.
UNTRIED = ("musicgen_decoder",)
# transformers loads these in two dtypes when it is asked for float64, with or without dropping.
FLOAT32 = ("xlnet",)


def _text_class(kind: str) -> type[PreTrainedConfig]:
    cls = tf.CONFIG_MAPPING[kind]
    parts = cls.sub_configs
    found: type[PreTrainedConfig] = parts.get("text_config") or parts.get("decoder") or cls
    return found


def text_kinds() -> dict[str, str]:
    """Each kind of causal language model, with the `model_type` of its text decoder."""
    found = {}
    for kind in CLASSES:
        found[kind] = _OPEN.get(kind) or _text_class(kind).model_type
    return found


def config(kind: str, **changes: Any) -> PreTrainedConfig:
    """A tiny configuration of the text decoder of a kind."""
    cls = _text_class(kind)
    return tiny_config(cls, **(CHANGES.get(cls.model_type, {}) | changes))


def model_class(kind: str) -> type[PreTrainedModel]:
    found: type[PreTrainedModel] = getattr(tf, CLASSES[kind])
    return found


def table() -> str:
    """Kinds by what works, or by the reason, for docs/families.md."""
    groups: dict[str, list[str]] = {}
    for kind, text in sorted(text_kinds().items()):
        if text in NO_DROPPING:
            works = f"neither; not scale: {KNOWN_UNSUPPORTED[text]}; not drop: {NO_DROPPING[text]}"
        elif (row := FAMILIES.get(text)) is None:
            works = f"neither: {KNOWN_UNSUPPORTED.get(text, 'not known; see `propose_family`')}"
        elif row.no_scaling:
            works = f"drop; not scale: {row.no_scaling}"
        else:
            only = " and ".join(f"`{name}={value!r}`" for name, value in row.requires)
            works = f"scale{f' (with {only})' if only else ''}; " + (
                f"not drop: {row.no_dropping}" if row.no_dropping else "drop"
            )
        groups.setdefault(works, []).append(kind if kind == text else f"{kind} (as {text})")
    lines = [f"| {works} | {', '.join(kinds)} |" for works, kinds in groups.items()]
    lines.sort(key=lambda line: [line.startswith(f"| {start}") for start in ("neither", "drop", "scale")])
    return "\n".join(["| what works | kinds |", "| --- | --- |", *lines])


def counts() -> str:
    """How many of the kinds that transformers registers can be scaled and cut, for docs/compatibility.md."""
    rows = [FAMILIES.get(text) for kind, text in text_kinds().items() if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    found = Counter((bool(row and not row.no_scaling), bool(row and not row.no_dropping)) for row in rows)
    names = {(True, True): "scale; drop", (True, False): "scale", (False, True): "drop", (False, False): "neither"}
    lines = [f"| {name} | {found[key]} |" for key, name in names.items()]
    return "\n".join(["| what works | kinds |", "| --- | ---: |", *lines])


if __name__ == "__main__":
    print(table(), counts(), sep="\n\n")
