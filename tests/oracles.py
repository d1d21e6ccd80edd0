"""Independent reference implementations: formulas from the papers in float64, and plain models changed from outside.

Nothing here calls hf_lnscale.

Shapes: B batch, T tokens, D hidden size, H heads, K key/value heads, E head size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn


def rms_norm(x_BTD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """Zhang and Sennrich, arXiv 1910.07467, equation 4."""
    return x_BTD / torch.sqrt((x_BTD * x_BTD).mean(-1, keepdim=True) + eps) * weight_D


def rotate(x_BHTE: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary embedding, arXiv 2104.09864, equation 15, on pairs (i, i + E/2) as Llama checkpoints are stored."""
    half = x_BHTE.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle_TE = torch.arange(x_BHTE.shape[-2], dtype=torch.float64)[:, None] * frequency
    a, b = x_BHTE[..., :half], x_BHTE[..., half:]
    return torch.cat(
        [a * angle_TE.cos() - b * angle_TE.sin(), b * angle_TE.cos() + a * angle_TE.sin()],
        dim=-1,
    )


def llama_with_layernorm_scaling(
    weights: dict[str, torch.Tensor], config: dict, tokens_BT: torch.Tensor, exponent: float = 0.5
) -> torch.Tensor:
    """Logits (B, T, V) of a Llama in which both pre-norms of layer l are divided by l ** exponent.

    arXiv 2502.05795, equation 8, with l counted from 1; the norm before the output head is not scaled.

    Args:
        weights: state dict of a Llama, in float64.
        config: the fields of its config.json.
        tokens_BT: token ids.
    """
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    eps, theta = config["rms_norm_eps"], config["rope_parameters"]["rope_theta"]
    batch, length = tokens_BT.shape
    future_TT = torch.ones(length, length, dtype=torch.bool).triu(1)

    x_BTD = weights["model.embed_tokens.weight"][tokens_BT]
    for layer in range(config["num_hidden_layers"]):
        scale = 1.0 / (layer + 1) ** exponent
        name = f"model.layers.{layer}."

        h_BTD = scale * rms_norm(x_BTD, weights[name + "input_layernorm.weight"], eps)
        q, k, v = (
            (h_BTD @ weights[f"{name}self_attn.{which}_proj.weight"].T).view(batch, length, n, -1).transpose(1, 2)
            for which, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q, k = rotate(q, theta), rotate(k, theta)
        k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
        scores_BHTT = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
        attention_BHTE = scores_BHTT.masked_fill(future_TT, float("-inf")).softmax(-1) @ v
        x_BTD = (
            x_BTD
            + attention_BHTE.transpose(1, 2).reshape(batch, length, -1) @ weights[name + "self_attn.o_proj.weight"].T
        )

        h_BTD = scale * rms_norm(x_BTD, weights[name + "post_attention_layernorm.weight"], eps)
        gate = h_BTD @ weights[name + "mlp.gate_proj.weight"].T
        up = h_BTD @ weights[name + "mlp.up_proj.weight"].T
        x_BTD = x_BTD + (gate * torch.sigmoid(gate) * up) @ weights[name + "mlp.down_proj.weight"].T

    return rms_norm(x_BTD, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The longest ModuleList called `layers` or `h`: the text decoder's."""
    lists = [
        m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and n.split(".")[-1] in ("layers", "h")
    ]
    return max(lists, key=len)


def with_hooked_norms(plain: nn.Module, norms: Sequence[str], scales: Sequence[float]) -> nn.Module:
    """A copy of a plain model in which forward hooks multiply the outputs of the named norms of each layer."""
    hooked = copy.deepcopy(plain)
    for layer, scale in zip(decoder_layers(hooked), scales, strict=True):
        for name in norms:
            layer.get_submodule(name).register_forward_hook(lambda _module, _args, output, scale=scale: output * scale)
    return hooked
