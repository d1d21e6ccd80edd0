"""Mean and variance of states over tokens, accumulated batch by batch.

Shapes: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

import torch


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
