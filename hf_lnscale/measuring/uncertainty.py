"""Standard errors of means over tokens, from parts of a text.

Tokens of one passage are not independent, so a mean over tokens is a ratio of two sums over K passages (sequences,
blocks of a text), with the standard error of the ratio estimator (Cochran, Sampling Techniques, 3rd ed., chapter 6).
Two models on the same passages are compared in pairs: the residuals are subtracted.
"""

from __future__ import annotations

import math

import torch

# With less text than this, medians over layers, the order of layers and signs change from sample to sample.
LEAST_TOKENS, LEAST_SEQUENCES = 2048, 4


def ratio_residuals(sums_K: torch.Tensor, sizes_K: torch.Tensor, mean: float) -> torch.Tensor:
    """The share of each passage in the error of `mean`, which is sum(sums) / sum(sizes), linearized."""
    return (sums_K - mean * sizes_K) / sizes_K.sum().item()


def standard_error(residuals_K: torch.Tensor) -> float | None:
    """The standard error of the mean, or of a difference of means; None with fewer than two passages."""
    count = len(residuals_K)
    return math.sqrt(count / (count - 1) * residuals_K.square().sum().item()) if count > 1 else None


def too_little(num_tokens: int, num_sequences: int) -> str | None:
    """A caution about text that is too little to judge by, or None."""
    if num_tokens >= LEAST_TOKENS and num_sequences >= LEAST_SEQUENCES:
        return None
    return (
        f"{num_tokens:,} tokens in {num_sequences} sequence{'s' * (num_sequences != 1)} are too few for a verdict: it "
        f"takes {LEAST_TOKENS:,} tokens in {LEAST_SEQUENCES} sequences. Another text could give other figures."
    )


def ends_early(num_tokens: int, wanted: int | None, rest: int) -> str | None:
    """A caution about text that ends before as many tokens as were wanted, if that is known, or None.

    Fewer missing tokens than `rest` are what is left out because it fills no window.
    """
    if wanted is None or wanted - num_tokens < rest:
        return None
    return f"The text ends after {num_tokens:,} of the {wanted:,} tokens to measure on."
