"""Statistics of states over tokens: mean and variance, and how far layers rotate them.

Shapes: B batch, T tokens, N selected tokens of B x T, D hidden size, L layers, P = L + 1 places in the residual stream.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F


class Moments:
    """Count, mean and variance of each channel over tokens, merged batch by batch in float64 (Chan et al. 1983)."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.mean_D = torch.zeros(channels, dtype=torch.float64)
        self.squares_D = torch.zeros(channels, dtype=torch.float64)

    def add(self, count: int, mean_D: torch.Tensor, variance_D: torch.Tensor) -> None:
        """Adds `count` values per channel with the given mean and variance (float64, on the CPU)."""
        if not count:
            return
        total = self.count + count
        difference_D = mean_D - self.mean_D
        self.squares_D += variance_D * count + difference_D**2 * (self.count * count / total)
        self.mean_D += difference_D * (count / total)
        self.count = total

    def merged(self, other: Moments) -> Moments:
        """The moments of both samples combined."""
        both = Moments(len(self.mean_D))
        for one in (self, other):
            both.add(one.count, one.mean_D, one.squares_D / max(one.count, 1))
        return both

    @property
    def channels_D(self) -> torch.Tensor:
        """The variance of each channel over tokens."""
        return self.squares_D / self.count

    @property
    def variance(self) -> float:
        """The variance of all entries, within and between channels."""
        return (self.channels_D.mean() + self.mean_D.var(correction=0)).item()


def channel_moments(x: torch.Tensor) -> torch.Tensor:
    """Variance and mean of each channel of states (..., D), shape (2, D), on the states' device."""
    tokens = tuple(range(x.dim() - 1))
    mean_D = x.mean(tokens)
    # Two steps take a third of the time of `torch.var_mean`.
    return torch.stack([(x - mean_D).square_().mean(tokens), mean_D])


def mean_where(counted_BT: torch.Tensor, values_BT: torch.Tensor) -> torch.Tensor:
    """Mean over the counted tokens; 0 if there are none."""
    return torch.where(counted_BT > 0, values_BT, 0).sum() / counted_BT.sum().clamp_min(1)


def pooled_moments(x_BTD: torch.Tensor, counted_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of all entries of the counted tokens, on the states' device."""
    variance_BT, mean_BT = torch.var_mean(x_BTD, dim=-1, correction=0)
    mean = mean_where(counted_BT, mean_BT)
    return mean, mean_where(counted_BT, variance_BT + (mean_BT - mean) ** 2)


def cosine_distance(
    x_BTD: torch.Tensor, y_BTD: torch.Tensor, x_norm_BT: torch.Tensor, y_norm_BT: torch.Tensor
) -> torch.Tensor:
    """1 - cosine similarity of each token's two states, given the states and their norms; shape (B, T).

    With x and y a layer's input and output, the mean over tokens is Block Influence (ShortGPT, arXiv 2403.03853,
    equation 1).
    """
    product_BT = (x_norm_BT * y_norm_BT).clamp_min(torch.finfo(x_norm_BT.dtype).tiny)
    distance_BT: torch.Tensor = 1 - torch.linalg.vecdot(x_BTD, y_BTD) / product_BT
    return distance_BT


def layer_angle(x_BTD: torch.Tensor, y_BTD: torch.Tensor) -> torch.Tensor:
    """Angle between a layer's input and output, in radians, shape (B, T).

    Computed from the layer's contribution d = y - x, since in float32 the arccosine of a cosine near 1 loses all digits
    of a small angle: tan(angle) = |x| |d| sin(x, d) / (|x|^2 + x d).
    """
    d_BTD = y_BTD - x_BTD
    xx_BT, dd_BT, xd_BT = (torch.linalg.vecdot(a, b) for a, b in ((x_BTD, x_BTD), (d_BTD, d_BTD), (x_BTD, d_BTD)))
    return torch.atan2((xx_BT * dd_BT - xd_BT**2).clamp_min(0).sqrt(), xx_BT + xd_BT)


class BlockAngles:
    """Angular distance of every block of layers, arccos(cos(x_i, x_{i+n})) / pi (Gromov et al., arXiv 2403.17887,
    equation 7), averaged over tokens in float64."""

    def __init__(self, layers: int) -> None:
        self.layers, self.count = layers, 0
        self._sums_PP, self._squares_PP = torch.zeros(2, layers + 1, layers + 1, dtype=torch.float64)

    def add(self, states: Sequence[torch.Tensor]) -> None:
        """Adds tokens: their states at each of the P places, shape (N, D)."""
        for parts in zip(*(x_ND.split(512) for x_ND in states), strict=True):
            x_NPD = F.normalize(torch.stack([x_ND.cpu().double() for x_ND in parts], dim=1), dim=-1)
            angles_NPP = (x_NPD @ x_NPD.transpose(1, 2)).clamp_(-1, 1).acos_() / math.pi
            self._sums_PP += angles_NPP.sum(0)
            self._squares_PP += angles_NPP.square().sum(0)
            self.count += len(x_NPD)

    def mean(self) -> torch.Tensor:
        """Shape (L, L): entry [i, n - 1] is the block of n layers starting at layer i; NaN if it exceeds the model."""
        means_LL = torch.full((self.layers, self.layers), math.nan, dtype=torch.float64)
        for n in range(1, self.layers + 1):
            means_LL[: self.layers - n + 1, n - 1] = self._sums_PP.diagonal(n) / self.count
        return means_LL

    def errors(self) -> torch.Tensor:
        """Standard errors of the means of single layers, shape (L,), with each token independent; NaN for one token."""
        mean_L = self._sums_PP.diagonal(1) / self.count
        variance_L = (self._squares_PP.diagonal(1) / self.count - mean_L.square()).clamp_min(0)
        return (variance_L / (self.count - 1)).sqrt() if self.count > 1 else torch.full_like(mean_L, math.nan)
