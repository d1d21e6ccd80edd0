"""Independent reference implementations: formulas from the papers in float64, and plain models changed from outside.

Nothing here calls hf_lnscale.

Shapes: B batch, T tokens, D hidden size, H heads, K key/value heads, E head size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

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


Function = Callable[[torch.Tensor], torch.Tensor]
Branch = Callable[[torch.Tensor, Function, Function, int, int], torch.Tensor]


def llama(weights: dict[str, torch.Tensor], config: dict, tokens_BT: torch.Tensor, branch: Branch) -> torch.Tensor:
    """Logits (B, T, V) of a Llama whose residual branches are joined by a formula.

    Args:
        weights: state dict of a Llama, in float64.
        config: the fields of its config.json.
        tokens_BT: token ids.
        branch: the stream behind a sub-layer, from the stream x_BTD in front of it, the sub-layer and its norm as
            functions, the layer counted from 0, and 0 for attention or 1 for the MLP. Llama's is x + function(norm(x)).
    """
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    eps, theta = config["rms_norm_eps"], config["rope_parameters"]["rope_theta"]
    batch, length = tokens_BT.shape
    future_TT = torch.ones(length, length, dtype=torch.bool).triu(1)

    x_BTD = weights["model.embed_tokens.weight"][tokens_BT]
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."

        def attention(h_BTD: torch.Tensor, name: str = name) -> torch.Tensor:
            q, k, v = (
                (h_BTD @ weights[f"{name}self_attn.{which}_proj.weight"].T).view(batch, length, n, -1).transpose(1, 2)
                for which, n in (("q", heads), ("k", kv_heads), ("v", kv_heads))
            )
            q, k = rotate(q, theta), rotate(k, theta)
            k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
            scores_BHTT = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
            attention_BHTE = scores_BHTT.masked_fill(future_TT, float("-inf")).softmax(-1) @ v
            return (
                attention_BHTE.transpose(1, 2).reshape(batch, length, -1) @ weights[f"{name}self_attn.o_proj.weight"].T
            )

        def mlp(h_BTD: torch.Tensor, name: str = name) -> torch.Tensor:
            gate = h_BTD @ weights[name + "mlp.gate_proj.weight"].T
            up = h_BTD @ weights[name + "mlp.up_proj.weight"].T
            return (gate * torch.sigmoid(gate) * up) @ weights[name + "mlp.down_proj.weight"].T

        for which, (function, norm) in enumerate(((attention, "input"), (mlp, "post_attention"))):
            weight_D = weights[f"{name}{norm}_layernorm.weight"]
            x_BTD = branch(x_BTD, function, lambda x, weight_D=weight_D: rms_norm(x, weight_D, eps), layer, which)

    return rms_norm(x_BTD, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T


def llama_with_layernorm_scaling(
    weights: dict[str, torch.Tensor], config: dict, tokens_BT: torch.Tensor, exponent: float = 0.5
) -> torch.Tensor:
    """Logits (B, T, V) of a Llama in which both pre-norms of layer l are divided by l ** exponent.

    arXiv 2502.05795, equation 8, with l counted from 1; the norm before the output head is not scaled.
    """
    return llama(weights, config, tokens_BT, lambda x, f, norm, layer, _: x + f(norm(x) / (layer + 1) ** exponent))


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


# --- measures over depth: the papers' formulas, on states that forward hooks record -----------------------------------


def residual_stream(model: nn.Module, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Inputs of all decoder layers and the output of the last, shape (L + 1, B, T, D), in float64."""
    found, layers = [], decoder_layers(model)

    def record(layer, args, output):
        found.extend([args[0], output] if layer is layers[-1] else [args[0]])

    hooks = [layer.register_forward_hook(record) for layer in layers]
    with torch.no_grad():
        model(input_ids=tokens_BT, use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack(found).double()


def sublayer_outputs(model: nn.Module, tokens_BT: torch.Tensor, paths: Sequence[Sequence[str]]) -> list[torch.Tensor]:
    """What the modules at `paths` of each layer return; the first path that a layer has counts. Each (L, B, T, D)."""
    found: list[list[torch.Tensor]] = [[] for _ in paths]
    hooks = []
    for layer in decoder_layers(model):
        for outputs, names in zip(found, paths, strict=True):
            module = next(layer.get_submodule(name) for name in names if hasattr(layer, name))
            hooks.append(
                module.register_forward_hook(
                    lambda _module, _args, output, outputs=outputs: outputs.append(
                        output[0] if isinstance(output, tuple) else output
                    )
                )
            )
    with torch.no_grad():
        model(input_ids=tokens_BT, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.stack(outputs).double() for outputs in found]


def mean_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a * b).sum(-1) / (a.square().sum(-1).sqrt() * b.square().sum(-1).sqrt())).mean().item()


def angular_distance(stream_PBTD: torch.Tensor, start: int, size: int) -> float:
    """Gromov et al., arXiv 2403.17887, equation 7: at the last token, mean over sequences, as a share of pi."""
    a, b = stream_PBTD[start][:, -1], stream_PBTD[start + size][:, -1]
    cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    return (cosine.arccos() / torch.pi).mean().item()


def distance_from_identity(model: nn.Module, tokens_BT: torch.Tensor, layer: int) -> torch.Tensor:
    """|J - I|_F^2 / |I|_F^2 of one layer for each sequence, by the whole Jacobian, shape (B,).

    Rows of the first token's outputs are left out. arXiv 2502.05795, section 3: J tends to the identity with depth.
    """
    calls = []
    module = decoder_layers(model)[layer]
    hook = module.register_forward_pre_hook(
        lambda _module, args, kwargs: calls.append((args[0].detach(), kwargs)), with_kwargs=True
    )
    model(input_ids=tokens_BT, use_cache=False)
    hook.remove()
    (x_BTD, kwargs), distances = calls[0], []
    for row in range(len(x_BTD)):

        def one(x_TD: torch.Tensor, row: int = row) -> torch.Tensor:
            return module(torch.cat([x_BTD[:row], x_TD[None], x_BTD[row + 1 :]]), **kwargs)[row, 1:]

        jacobian = torch.autograd.functional.jacobian(one, x_BTD[row])
        rows = jacobian.shape[0] * jacobian.shape[1]
        matrix = jacobian.reshape(rows, -1)
        identity = torch.eye(matrix.shape[1], dtype=matrix.dtype)[-rows:]
        distances.append((matrix - identity).square().sum() / rows)
    return torch.stack(distances)
