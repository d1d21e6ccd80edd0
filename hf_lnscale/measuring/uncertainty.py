"""Standard errors of means over tokens.

Tokens of one passage are not independent, so a mean over tokens is treated as a ratio of two sums over K passages
(sequences, or blocks of a text), with the standard error of the ratio estimator (Cochran, Sampling Techniques, 3rd ed.,
chapter 6). Models evaluated on the same passages are compared pairwise, by subtracting residuals.
"""

from __future__ import annotations

import math

import torch

# With less text, medians over layers, the ranking of layers and signs vary from sample to sample.
LEAST_TOKENS, LEAST_SEQUENCES = 2048, 4


def ratio_residuals(sums_K: torch.Tensor, sizes_K: torch.Tensor, mean: float | torch.Tensor) -> torch.Tensor:
    """The linearized contribution of each passage to the error of `mean` = sum(sums) / sum(sizes), over the last
    dimension."""
    return (sums_K - mean * sizes_K) / sizes_K.sum(-1, keepdim=True)


def squared_errors(residuals_K: torch.Tensor) -> torch.Tensor:
    """The squared standard error of each mean, or difference of means, over the last dimension; NaN for one passage."""
    count = residuals_K.shape[-1]
    factor = count / (count - 1) if count > 1 else math.nan
    return factor * residuals_K.square().sum(-1)


def standard_error(residuals_K: torch.Tensor) -> float | None:
    """The standard error of a mean or a difference of means; None for fewer than two passages."""
    return math.sqrt(squared_errors(residuals_K).item()) if len(residuals_K) > 1 else None


def too_little(num_tokens: int, num_sequences: int) -> str | None:
    """A warning if there is too little text for a verdict, else None."""
    if num_tokens >= LEAST_TOKENS and num_sequences >= LEAST_SEQUENCES:
        return None
    return (
        f"{num_tokens:,} tokens in {num_sequences} sequence{'s' * (num_sequences != 1)} are too few for a verdict, "
        f"which takes {LEAST_TOKENS:,} tokens in {LEAST_SEQUENCES} sequences. Other text could give different results."
    )


def ends_early(num_tokens: int, wanted: int | None, rest: int) -> str | None:
    """A warning if the text has fewer tokens than requested, else None.

    A shortfall below `rest` is ignored, as it is only the dropped incomplete window.
    """
    if wanted is None or wanted - num_tokens < rest:
        return None
    return f"The text has only {num_tokens:,} of the {wanted:,} tokens requested."
