"""A tiny random configuration of every family in the table: four layers, a vocabulary of 96."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as tf
from transformers import PreTrainedConfig, PreTrainedModel

from oracles import decoder_layers

VOCAB, HIDDEN, LAYERS = 96, 32, 4

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# Not in Qwen3-MoE: vLLM would make it a shared expert of which the checkpoint has no weights.
_SHARED = _MOE | {"shared_expert_intermediate_size": 16}
_MLA = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
_VISION = {
    "depth": 1,
    "embed_dim": 16,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": HIDDEN,
    "patch_size": 4,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
    "fullatt_block_indexes": [0],
}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}

# model_type of the text decoder: configuration class of the model that holds it, what it adds, and the norms that
# must be scaled (written out, not read from the table under test).
LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")
SANDWICH_NORMS = ("input_layernorm", "pre_feedforward_layernorm")
FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any], tuple[str, str]]] = {
    "llama": (tf.LlamaConfig, {}, LLAMA_NORMS),
    "mistral": (tf.MistralConfig, {}, LLAMA_NORMS),
    "mixtral": (tf.MixtralConfig, {"num_local_experts": 4}, LLAMA_NORMS),
    "ministral": (tf.MinistralConfig, {}, LLAMA_NORMS),
    "qwen2": (tf.Qwen2Config, {}, LLAMA_NORMS),
    "qwen3": (tf.Qwen3Config, {}, LLAMA_NORMS),
    "qwen2_moe": (tf.Qwen2MoeConfig, _SHARED, LLAMA_NORMS),
    "qwen3_moe": (tf.Qwen3MoeConfig, _MOE, LLAMA_NORMS),
    "qwen3_next": (tf.Qwen3NextConfig, _SHARED | _LINEAR, LLAMA_NORMS),
    "qwen3_5_text": (tf.Qwen3_5TextConfig, _LINEAR, LLAMA_NORMS),
    "qwen3_5_moe_text": (tf.Qwen3_5MoeTextConfig, _SHARED | _LINEAR, LLAMA_NORMS),
    "deepseek_v2": (tf.DeepseekV2Config, _MLA, LLAMA_NORMS),
    "deepseek_v3": (tf.DeepseekV3Config, _MLA, LLAMA_NORMS),
    "phi3": (tf.Phi3Config, {}, LLAMA_NORMS),
    "smollm3": (tf.SmolLM3Config, {}, LLAMA_NORMS),
    "granite": (tf.GraniteConfig, {}, LLAMA_NORMS),
    "gemma": (tf.GemmaConfig, {}, LLAMA_NORMS),
    "gemma2": (tf.Gemma2Config, {}, SANDWICH_NORMS),
    "gemma3_text": (tf.Gemma3TextConfig, {}, SANDWICH_NORMS),
    "qwen2_vl_text": (tf.Qwen2VLConfig, _MROPE, LLAMA_NORMS),
    "qwen2_5_vl_text": (tf.Qwen2_5_VLConfig, _MROPE, LLAMA_NORMS),
    "qwen3_vl_text": (tf.Qwen3VLConfig, _MROPE, LLAMA_NORMS),
    "qwen3_vl_moe_text": (tf.Qwen3VLMoeConfig, _MROPE | _MOE, LLAMA_NORMS),
}
COMPOSITE = [name for name, (cls, _, _) in FAMILIES.items() if "text_config" in cls.sub_configs]

# What the tiny configurations leave at values with which a mistake would not show.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {family: (family, {}) for family in FAMILIES} | {
    "qwen2 windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    "qwen3 windows": ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen2_moe windows": ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}),
    "ministral windows": (
        "ministral",
        {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "qwen3_moe sparse step": ("qwen3_moe", {"decoder_sparse_step": 2}),
    "qwen3_moe mlp only": ("qwen3_moe", {"mlp_only_layers": [1, 2]}),
    "qwen3_next sparse step": ("qwen3_next", {"decoder_sparse_step": 3}),
    "deepseek_v3 dense": ("deepseek_v3", {"first_k_dense_replace": 2}),
    "smollm3 interval": ("smollm3", {"no_rope_layer_interval": 2}),
}


def config(family: str = "llama", **changes: Any) -> PreTrainedConfig:
    """The configuration of a tiny model of a family; `changes` go to the outermost configuration."""
    cls, extra, _ = FAMILIES[family]
    text = _BASE | extra
    if family not in COMPOSITE:
        return cls(**(text | changes))
    special = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    return cls(text_config=text, vision_config=dict(_VISION), **(special | changes))


def auto_class(family: str) -> Any:
    return tf.AutoModelForImageTextToText if family in COMPOSITE else tf.AutoModelForCausalLM


def model(family: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny model with random weights in every norm too: at one, or zero, many a mistake would not show."""
    torch.manual_seed(seed)
    # The grouped kernels for experts know no float64.
    built = auto_class(family).from_config(config(family, **changes), experts_implementation="eager")
    return randomize_norms(built.eval(), seed)


def loud(family: str = "llama", dtype: torch.dtype = torch.float64, **changes: Any) -> PreTrainedModel:
    """One with large weights, so that every layer makes a difference."""
    built = model(family, **changes)
    with torch.no_grad():
        for parameter in decoder_layers(built).parameters():
            if parameter.dim() >= 2:
                parameter.mul_(10)
    return built.to(dtype)


def speaker(family: str = "llama", **changes: Any) -> PreTrainedModel:
    """One in float64 whose layers and logits are large enough for a missing layer to matter to what it says."""
    built = model(family, **changes).double()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.dim() >= 2 and "norm" not in name:
                parameter.mul_(4.0)
        built.get_output_embeddings().weight.mul_(2.0)
    return built


def randomize_norms(built: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return built


def tokens(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def said_by(speaker: torch.nn.Module, sequences: int = 64, length: int = 16, seed: int = 0) -> torch.Tensor:
    """Token ids (B, T) that a model says itself, so that whatever makes it differ from itself raises the loss.

    Every release of torch draws the same numbers with torch.rand, but not the same tokens with torch.multinomial.
    """
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(3, 90, (sequences, 1), generator=generator)
    while ids_BT.shape[1] < length:
        shares_BV = speaker(input_ids=ids_BT, use_cache=False).logits[:, -1].double().softmax(-1)
        drawn_B1 = torch.rand(sequences, 1, dtype=torch.float64, generator=generator)
        ids_BT = torch.cat([ids_BT, torch.searchsorted(shares_BV.cumsum(-1), drawn_B1)], dim=1)
    return ids_BT


def write_gguf(built: PreTrainedModel, path: Path) -> None:
    """A Llama in float32 as llama.cpp's converter would write it, with a tokenizer of letters."""
    import gguf

    config, weights = built.config, built.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<unk>", "<s>", "</s>", *map(chr, range(33, 123)), "Ġ", "w1", "w2"])
    writer.add_token_merges(["w 1", "w 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    names |= {"self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up"}
    names |= {"mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for key, value in weights.items():
        part = key.removesuffix(".weight")
        if part in outer:
            writer.add_tensor(f"{outer[part]}.weight", value.numpy())
            continue
        layer, _, part = part.removeprefix("model.layers.").partition(".")
        name = names[part]
        if name in heads:  # rotary pairs side by side
            value = value.view(heads[name], 2, -1, value.shape[-1]).transpose(1, 2).reshape(value.shape)
        writer.add_tensor(f"blk.{layer}.{name}.weight", value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def two_batches(ids: torch.Tensor) -> list[torch.Tensor]:
    """Two batches of unequal size: means are over tokens, not over batches."""
    return [ids[:4], ids[4:]]


def uploaded_that_say(path: Path, folder: Path) -> list[str]:
    """The files that `push` would upload from a folder, the model card with them, in which a path is written."""
    from hf_lnscale.checkpoints.hub import push  # the configurations above are for processes without the plugin too

    upload = push(folder, "user/model", allow_scaled=True, dry_run=True)
    contents = {name: (folder / name).read_bytes() for name in upload.files} | {"README.md": upload.card.encode()}
    return [name for name, content in contents.items() if str(path).encode() in content]
