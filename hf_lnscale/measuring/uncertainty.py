"""Standard errors of means over tokens, from parts of a text.

Tokens of one passage are not independent, so a mean over tokens is a ratio of two sums over K passages (sequences,
blocks of a text), with the standard error of the ratio estimator (Cochran, Sampling Techniques, 3rd ed., chapter 6).
Two models on the same passages are compared in pairs: the residuals are subtracted.
"""

from __future__ import annotations

import math

import torch


def ratio_residuals(sums_K: torch.Tensor, sizes_K: torch.Tensor, mean: float) -> torch.Tensor:
    """The share of each passage in the error of `mean`, which is sum(sums) / sum(sizes), linearized."""
    return (sums_K - mean * sizes_K) / sizes_K.sum().item()


def standard_error(residuals_K: torch.Tensor) -> float | None:
    """The standard error of the mean, or of a difference of means; None with fewer than two passages."""
    count = len(residuals_K)
    return math.sqrt(count / (count - 1) * residuals_K.square().sum().item()) if count > 1 else None
