"""Detects evaluation on text that was used to choose or heal a model's layers.

A passage is `PASSAGE` consecutive tokens, about a dozen words: audits of training data look for overlaps of about that
length (13 words in arXiv 2005.14165, appendix C). The configuration stores the `KEPT` smallest hashes of a text's
distinct passages, a uniform sample regardless of its length (bottom-k sampling, Broder 1997) that is comparable between
texts. Only passages that cross a window boundary are lost: 15 of 512 in windows of 512.

Misses: if a fraction f of the known text is evaluated, it contains none of the stored passages with probability
(1 - f)^128, 0.1 % at f = 0.05 and 8 % at 0.02. False alarms: 48-bit hashes practically never collide, so the remaining
cause is text that documents really share, such as a license. A single passage is therefore reported only if it is at
least a tenth of those that could have been found.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable

import torch
from torch.nn import functional as F
from transformers import PreTrainedConfig

from ..core.record import KEPT, KnownText, known_text
from .text import TokenBatches

PASSAGE = 16
_DIGESTS = (hashlib.sha256(bytes([place])).digest() for place in range(PASSAGE))
_FACTORS = [int.from_bytes(digest[:8], "big", signed=True) | 1 for digest in _DIGESTS]


def passages(sequences: Iterable[torch.Tensor]) -> torch.Tensor:
    """Sorted 48-bit hashes of the distinct passages in sequences of ids; a shorter sequence is one passage."""
    found = [torch.zeros(0, dtype=torch.long)]
    for ids_T in sequences:
        ids_T = F.pad(ids_T.long().cpu(), (0, max(0, PASSAGE - len(ids_T))), value=-1)
        length = len(ids_T) - PASSAGE + 1
        hashes = torch.zeros(length, dtype=torch.long)
        for i, factor in enumerate(_FACTORS):  # multilinear hashing, modulo 2^64
            hashes += factor * ids_T[i : i + length]
        found.append(hashes >> 16 & (1 << 48) - 1)  # only the high bits are uniformly distributed
    distinct: torch.Tensor = torch.cat(found).unique()
    return distinct


def sequences_of(batches: TokenBatches) -> list[torch.Tensor]:
    """The sequences without padding."""
    return [ids[mask] for batch in batches for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]


def sketch(batches: TokenBatches) -> KnownText:
    return sketch_of(sequences_of(batches), batches.source)


def sketch_of(sequences: Iterable[torch.Tensor], source: str) -> KnownText:
    """A sample of hashes of a text's passages; only a thousand sequences are in memory at once."""
    kept, left = torch.zeros(0, dtype=torch.long), iter(sequences)
    while part := list(itertools.islice(left, 1000)):
        kept = torch.cat([kept, passages(part)]).unique()[:KEPT]
    return KnownText(source, tuple(kept.tolist()))


def share_known(text: KnownText, sequences: Iterable[torch.Tensor]) -> float:
    """Estimates the fraction of the sequences contained in a text; 0 if at most one passage matches by chance."""
    own = passages(sequences)
    if len(text.passages) >= KEPT:  # restrict both to the same sample
        own = own[own <= text.passages[-1]]
    met = int(torch.isin(own, torch.tensor(text.passages, dtype=torch.long)).sum())
    share = met / max(1, len(own))
    return share if met > 1 or share >= 0.1 else 0.0


def percent(share: float) -> str:
    """Formats a fraction estimated from a sample, with two digits."""
    return f"{float(f'{100 * share:.2g}'):g} %"


def caution(config: PreTrainedConfig, sequences: Iterable[torch.Tensor]) -> str | None:
    """A warning if the sequences overlap with text used to choose or heal the model's layers, else None."""
    text = known_text(config)
    if text is None or not (share := share_known(text, sequences)):
        return None
    return (
        f"About {percent(share)} of this text was used to choose or heal the model's layers ({text.source}), so its "
        "results are better here than on other text."
    )
