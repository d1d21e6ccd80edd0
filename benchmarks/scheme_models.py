"""Alternatives to LayerNorm Scaling that keep a deep Llama trainable: norms in other places and scaled branches.

Every scheme starts from the same random Llama, drawn with the same seed, and changes only what its formula says. In the
formulas, x is the residual stream, F is attention or the MLP, N is its norm, and l = 1 ... L is the number of the
layer. N without a subscript has a learned weight, as in Llama. All schemes keep the norm before the head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

import hf_lnscale  # noqa: F401  (turns ln_scaling= on)

Function = Callable[[torch.Tensor], torch.Tensor]
OUTPUT = ("o_proj", "down_proj")


class PreLN(LlamaDecoderLayer):
    """x + F(N(x)): the layer of Llama, with a `branch` that the other schemes override.

    Attributes:
        depth: l, from 1.
        layers: L.
    """

    depth: int
    layers: int

    def setup(self, config: LlamaConfig) -> None:
        """Adds the parameters of the scheme to those of a Llama layer."""

    def branch(self, x: torch.Tensor, which: int, function: Function, norm: nn.Module) -> torch.Tensor:
        """The residual stream after a sub-layer; `which` is 0 for attention, 1 for the MLP."""
        return x + function(norm(x))

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        def attention(x: torch.Tensor) -> torch.Tensor:
            return self.self_attn(hidden_states=x, **kwargs)[0]

        x = self.branch(hidden_states, 0, attention, self.input_layernorm)
        return self.branch(x, 1, self.mlp, self.post_attention_layernorm)


class PostLN(PreLN):
    """N(x + F(x)): Vaswani et al., arXiv 1706.03762, section 3.1."""

    def branch(self, x: torch.Tensor, which: int, function: Function, norm: nn.Module) -> torch.Tensor:
        return norm(x + function(x))


class DeepNorm(PreLN):
    """N(a x + F(x)) with a = (2 L)^(1/4): Wang et al., arXiv 2203.00555, figure 2, for a decoder only."""

    def branch(self, x: torch.Tensor, which: int, function: Function, norm: nn.Module) -> torch.Tensor:
        return norm((2 * self.layers) ** 0.25 * x + function(x))


class MixLN(PreLN):
    """Post-LN in the first quarter of the layers, Pre-LN in the rest: Li et al., arXiv 2412.13795, alpha 0.25."""

    def branch(self, x: torch.Tensor, which: int, function: Function, norm: nn.Module) -> torch.Tensor:
        if self.depth <= math.floor(self.layers * 0.25):
            return norm(x + function(x))
        return x + function(norm(x))


class Sandwich(PreLN):
    """x + N_2(F(N(x))): Peri-LN, Kim et al., arXiv 2502.02732, without a norm after the embedding."""

    def setup(self, config: LlamaConfig) -> None:
        norms = [LlamaRMSNorm(config.hidden_size, config.rms_norm_eps) for _ in range(2)]
        self.output_norms = nn.ModuleList(norms)

    def branch(self, x: torch.Tensor, which: int, function: Function, norm: nn.Module) -> torch.Tensor:
        return x + self.output_norms[which](function(norm(x)))


class LayerScale(PreLN):
    """x + g * F(N(x)), with a learned g per channel: Touvron et al., arXiv 2103.17239, with its initial values."""

    def setup(self, config: LlamaConfig) -> None:
        first = 0.1 if self.layers <= 18 else 1e-5 if self.layers <= 24 else 1e-6
        self.gains = nn.ParameterList([torch.full((config.hidden_size,), first) for _ in range(2)])

    def branch(self, x: torch.Tensor, which: int, function: Function, norm: nn.Module) -> torch.Tensor:
        return x + self.gains[which] * function(norm(x))


class SkipInit(LayerScale):
    """x + g F(N(x)) with a learned scalar g, initially 0: De and Smith, arXiv 2002.10444, who use no norms."""

    def setup(self, config: LlamaConfig) -> None:
        self.gains = nn.ParameterList([torch.zeros(()) for _ in range(2)])


class ResidualScaling(PreLN):
    """x + F(N(x)) / sqrt(2 L), in every pass rather than only in the initial weights."""

    def branch(self, x: torch.Tensor, which: int, function: Function, norm: nn.Module) -> torch.Tensor:
        return x + function(norm(x)) / math.sqrt(2 * self.layers)


class ProRes(PreLN):
    """x + a(l, t) F(N(x)) with a(l, t) = min(t / (T l), 1) at step t: Chen et al., arXiv 2603.05369, "linear".

    T is 1 % of the steps, as in the authors' run with 130M parameters (T = 1,000 of 100,000 steps).
    """

    SHARE: ClassVar[float] = 0.01
    progress: float = 1.0  # t divided by the number of steps; 1 after training

    def branch(self, x: torch.Tensor, which: int, function: Function, norm: nn.Module) -> torch.Tensor:
        return x + min(self.progress / (self.SHARE * self.depth), 1.0) * function(norm(x))


def scale_outputs(model: LlamaForCausalLM) -> None:
    """W_O and W_down divided by sqrt(2 L): GPT-2; Shoeybi et al., arXiv 1909.08053; OLMo, 2402.00838."""
    for layer in model.model.layers:
        for name, weight in _matrices(layer):
            if name in OUTPUT:
                weight /= math.sqrt(2 * len(model.model.layers))


def scale_by_depth(model: LlamaForCausalLM) -> None:
    """All matrices of layer l divided by sqrt(l): DS-Init, Zhang et al., arXiv 1908.11365, section 4.1, alpha 1."""
    for index, layer in enumerate(model.model.layers):
        for _, weight in _matrices(layer):
            weight /= math.sqrt(index + 1)


def xavier(model: LlamaForCausalLM) -> None:
    """The initialization of DeepNorm: Xavier normal, gain (8 L)^(-1/4) for W_V, W_O and the MLP, 1 for W_Q and W_K.

    The MLP of DeepNorm has only W_up and W_down. The gate, which it lacks, gets gain 1, so that the product of the
    gains in a branch is the same as in DeepNorm.
    """
    gain = (8 * len(model.model.layers)) ** -0.25
    for layer in model.model.layers:
        for name, weight in _matrices(layer):
            nn.init.xavier_normal_(weight, gain=1.0 if name in ("q_proj", "k_proj", "gate_proj") else gain)


def _matrices(layer: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The last part of the name of each linear layer, and its weight, detached."""
    linear = [(name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear)]
    return [(name.rpartition(".")[2], module.weight.data) for name, module in linear]


class Scheme(NamedTuple):
    """How a scheme differs from a plain Llama.

    Attributes:
        title: the name in tables.
        layer: the class of the layers, or None for that of Llama.
        initialize: a function that changes the random weights.
        ln_scaling: whether hf_lnscale scales its norms.
    """

    title: str
    layer: type[PreLN] | None = None
    initialize: Callable[[LlamaForCausalLM], None] | None = None
    ln_scaling: bool = False


SCHEMES = {
    "pre_ln": Scheme("Pre-LN"),
    "lns": Scheme("LNS", ln_scaling=True),
    "post_ln": Scheme("Post-LN", PostLN),
    "deepnorm": Scheme("DeepNorm", DeepNorm, xavier),
    "mix_ln": Scheme("Mix-LN", MixLN),
    "sandwich": Scheme("Sandwich (Peri-LN)", Sandwich),
    "layerscale": Scheme("LayerScale", LayerScale),
    "skipinit": Scheme("SkipInit", SkipInit),
    "depth_scaled_init": Scheme("Depth-scaled init", initialize=scale_by_depth),
    "scaled_init": Scheme("Scaled init", initialize=scale_outputs),
    "lns_scaled_init": Scheme("LNS, scaled init", initialize=scale_outputs, ln_scaling=True),
    "residual_scaling": Scheme("Residual scaling", ResidualScaling),
    "prores": Scheme("ProRes", ProRes),
}


def build(scheme: str, config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """A random Llama of a scheme; with the same seed, all schemes start from the same draws.

    Args:
        scheme: a key of `SCHEMES`.
        config: the configuration of the plain Llama.
        seed: the seed of the weights.
    """
    how = SCHEMES[scheme]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, **({"ln_scaling": True} if how.ln_scaling else {}))
    if how.layer is not None:
        for index, layer in enumerate(model.model.layers):
            layer.__class__ = how.layer
            layer.depth, layer.layers = index + 1, config.num_hidden_layers
            layer.setup(config)
    if how.initialize is not None:
        how.initialize(model)
    return model


def set_progress(model: LlamaForCausalLM, progress: float) -> None:
    """Sets the fraction of training that is done, from 0 to 1, in the layers that depend on it."""
    for layer in model.model.layers:
        if isinstance(layer, ProRes):
            layer.progress = progress
