"""Perplexity over strided windows and bits per byte of a text, with standard errors.

Tokens. A document is a sequence of tokens t_1 ... t_N, each predicted exactly once; t_1 is predicted from a beginning
token (`bos_token`, or `eos_token` if there is none, as in lm-evaluation-harness). The first window predicts `seq_len`
tokens. Each following one advances by `stride` and predicts only the new tokens, from at least `seq_len - stride`
preceding ones; the last extends backwards until it is full. If the tokenizer itself prepends the beginning token to a
text (Llama, Gemma), it replaces the oldest token of every window: these models degrade without a BOS token.

Standard errors. Tokens of one passage are not independent, so the text is split into blocks (documents, or about 2 kB
of a long one, at a space), see `measuring.uncertainty`. Blocks are at the same places in the text for every model, so
models are compared block by block, which removes the effect of the text's difficulty (the clustered and paired standard
errors of arXiv 2411.00640). They estimate the variation between texts of the same kind, but not between training seeds.

Shapes: B windows, T input tokens, V vocabulary, K blocks.
"""

from __future__ import annotations

import bisect
import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from ..core.errors import ArgumentError
from ..measuring.known_text import caution
from ..measuring.losses import MOST_NATS, token_losses, why_not_finite
from ..measuring.split_model import require_known_ids
from ..measuring.stream import eval_mode
from ..measuring.text import Batch, added_beginning, documents, window_length
from ..measuring.uncertainty import ratio_residuals, standard_error

BLOCK_SIZE = 2048  # characters
SEQ_LEN = 1024
_NO_TOKEN = "there is no token to predict in the text"


@dataclass(frozen=True)
class Estimate:
    """A mean, or a difference of means, and its standard error; None if it cannot be determined."""

    value: float
    stderr: float | None


@dataclass(frozen=True, eq=False)
class Perplexity:
    """A model's predictions of a text.

    Attributes:
        nats: negative log-likelihood of the text.
        num_tokens: number of predicted tokens.
        num_bytes: number of UTF-8 bytes that these tokens represent.
        num_documents: number of documents.
        unknown_tokens: tokens that the tokenizer replaced by its `unk_token`. The text behind them is not predicted, so
            bits per byte are too low.
        text: digest of the text.
        tokenization: digest of the token ids; only models with the same digest are compared per token.
        block_nats: shape (K,), float64; None if the tokenizer does not return offsets of tokens in the text.
        block_tokens: shape (K,), float64.
        block_bytes: shape (K,), float64.
        caution: a warning if part of the text was used to choose or heal the model's layers, else "".
    """

    nats: float
    num_tokens: int
    num_bytes: int
    num_documents: int
    unknown_tokens: int
    text: str
    tokenization: str
    block_nats: torch.Tensor | None
    block_tokens: torch.Tensor
    block_bytes: torch.Tensor
    caution: str = ""

    @property
    def loss(self) -> Estimate:
        """Nats per token."""
        return Estimate(self.nats / self.num_tokens, self._stderr(by_token=True))

    @property
    def perplexity(self) -> Estimate:
        """exp(loss), with a standard error by the delta method: d exp(x) = exp(x) dx."""
        loss, value = self.loss, math.exp(self.nats / self.num_tokens)
        return Estimate(value, None if loss.stderr is None else value * loss.stderr)

    @property
    def bits_per_byte(self) -> Estimate:
        """nats / ln 2 / UTF-8 bytes of the text. Unlike perplexity, it compares models with different tokenizers."""
        error = self._stderr(by_token=False)
        return Estimate(self.nats / math.log(2) / self.num_bytes, None if error is None else 1.0 / math.log(2) * error)

    def minus(self, reference: Perplexity) -> dict[str, Estimate]:
        """Differences from a reference on the same text, with paired standard errors over blocks.

        Returns:
            `bits_per_byte` and, if the tokens are the same, `loss` (nats per token) and `perplexity`.

        Raises:
            ValueError: if the texts differ.
        """
        if self.text != reference.text:
            raise ValueError("perplexities of different texts cannot be compared")
        names = ["bits_per_byte"]
        if self.tokenization == reference.tokenization:
            names += ["loss", "perplexity"]
        return {name: self._difference(reference, name) for name in names}

    def _difference(self, reference: Perplexity, name: str) -> Estimate:
        ours, theirs = getattr(self, name).value, getattr(reference, name).value
        residuals, other = (one._residuals(name != "bits_per_byte") for one in (self, reference))
        if residuals is None or other is None:
            return Estimate(ours - theirs, None)
        if name == "perplexity":
            residuals, other = residuals * ours, other * theirs
        unit = math.log(2) if name == "bits_per_byte" else 1.0
        return Estimate(ours - theirs, standard_error((residuals - other) / unit))

    def _residuals(self, by_token: bool) -> torch.Tensor | None:
        """The contribution of each block to the error of the mean per token or byte, in nats."""
        sizes_K, total = (self.block_tokens, self.num_tokens) if by_token else (self.block_bytes, self.num_bytes)
        return None if self.block_nats is None else ratio_residuals(self.block_nats, sizes_K, self.nats / total)

    def _stderr(self, by_token: bool) -> float | None:
        residuals = self._residuals(by_token)
        return None if residuals is None else standard_error(residuals)


def perplexity(
    model: PreTrainedModel,
    data: Any,
    tokenizer: Any = None,
    *,
    seq_len: int | None = None,
    stride: int | None = None,
    batch_size: int = 4,
    max_bytes: int | None = None,
    progress: bool = True,
) -> Perplexity:
    """Computes the perplexity of a causal language model on a text.

    Args:
        model: any causal language model.
        data: texts, a path, or rows, as for `token_batches`; each text or row is one document.
        tokenizer: loaded by the model's name if not given.
        seq_len: input tokens per window; the default is 1024, or the model's number of positions if that is smaller.
        stride: tokens predicted by each window but the first, at most `seq_len`; the default is half of it.
        batch_size: windows per batch.
        max_bytes: use only this many bytes of the text, from its start.
        progress: whether to show a progress bar.

    Raises:
        ValueError: if sizes are not positive or inconsistent, the text has no token to predict, or the model's outputs
            are not finite or exp(loss) overflows.
    """
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
    seq_len = window_length(seq_len, [model.config], SEQ_LEN)
    stride = check_windows(model.config, seq_len, stride, batch_size)
    texts = [text for text in first_bytes(documents(data, tokenizer), max_bytes) if text]
    prefix, everywhere = _beginning(tokenizer)
    encoded = [_encode(text, tokenizer, prefix) for text in texts]
    for one in encoded:
        require_known_ids(one.ids, model.config)
    windows = sorted(
        (window for i, one in enumerate(encoded) for window in _windows(i, len(one.ids), seq_len, stride)),
        key=lambda window: window.end - window.start,
        reverse=True,
    )
    if not windows:
        raise ArgumentError("data", problem=_NO_TOKEN)
    nats = [torch.zeros(max(0, len(one.ids) - 1), dtype=torch.float64) for one in encoded]
    bar = logging.tqdm(total=len(windows), desc="perplexity", unit="window", disable=not progress, leave=False)
    with eval_mode(model), bar:
        for at in range(0, len(windows), batch_size):
            batch = windows[at : at + batch_size]
            for window, values in zip(batch, _nats(model, encoded, batch, everywhere), strict=True):
                nats[window.document][window.first - 1 : window.end] = values
            bar.update(len(batch))
    found = _gather(texts, encoded, nats, tokenizer)
    if (loss := found.nats / found.num_tokens) >= MOST_NATS:
        raise ValueError(f"model: its loss on this data is {loss:.4g} nats per token, too high for a comparison")
    known = caution(model.config, (document.ids[int(document.prefixed) :] for document in encoded))
    return replace(found, caution=known or "")


def check_windows(config: Any, seq_len: int, stride: int | None, batch_size: int) -> int:
    """Validates sizes and returns the stride."""
    stride = max(1, seq_len // 2) if stride is None else stride
    for name, value in {"seq_len": seq_len, "stride": stride, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if stride > seq_len:
        raise ValueError(f"stride must be at most seq_len ({seq_len}), or tokens would be skipped, got {stride}")
    window_length(seq_len, [config])  # refuses windows that are too long
    return stride


def require_token(texts: Sequence[str], tokenizer: Any) -> None:
    """Refuses text without a token to predict, which none before it says."""
    prefix, _ = _beginning(tokenizer)
    if not any(len(_encode(text[:BLOCK_SIZE], tokenizer, prefix).ids) > 1 for text in texts if text):
        raise ArgumentError("data", problem=_NO_TOKEN)


def first_bytes(texts: Sequence[str], max_bytes: int | None) -> list[str]:
    """The first `max_bytes` UTF-8 bytes of the texts, truncated at a character boundary."""
    if max_bytes is None:
        return list(texts)
    if max_bytes < 1:
        raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
    taken, left = [], max_bytes
    for text in texts:
        if left <= 0:
            break
        raw = text.encode()
        taken.append(text if len(raw) <= left else raw[:left].decode(errors="ignore"))
        left -= len(raw)
    return taken


class _Encoded(NamedTuple):
    """A document: `ids` with the beginning token at [0], and the offset of each token in the text, if known."""

    ids: torch.Tensor
    starts: list[int] | None
    prefixed: bool


class _Window(NamedTuple):
    """The inputs ids[start:end] of a document, which predict ids[first] to ids[end]."""

    document: int
    start: int
    end: int
    first: int


def _beginning(tokenizer: Any) -> tuple[int | None, bool]:
    """The beginning token, and whether the tokenizer itself adds it."""
    if tokenizer.bos_token_id is not None:
        return tokenizer.bos_token_id, added_beginning(tokenizer) is not None
    return tokenizer.eos_token_id, False


def _encode(text: str, tokenizer: Any, prefix: int | None) -> _Encoded:
    fast = tokenizer.is_fast
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    starts = [start for start, _ in encoded["offset_mapping"]] if fast else None
    ids = list(encoded["input_ids"])
    if prefix is not None:
        return _Encoded(torch.tensor([prefix, *ids]), starts, True)
    if not fast and len(ids) > 1:
        raise ValueError("tokenizer: it has neither a bos_token nor an eos_token to start a text with")
    return _Encoded(torch.tensor(ids, dtype=torch.long), starts, False)


def _windows(document: int, length: int, seq_len: int, stride: int) -> Iterator[_Window]:
    """Windows over `length` ids, all of which except [0] are predicted."""
    done, last = 0, length - 1
    while done < last:
        end = min(last, seq_len if done == 0 else done + stride)
        yield _Window(document, max(0, end - seq_len), end, done + 1)
        done = end


def _nats(model: Any, encoded: list[_Encoded], windows: list[_Window], everywhere: bool) -> Iterator[torch.Tensor]:
    """Negative log-likelihoods of the tokens predicted by each window, float64."""
    rows = [encoded[one.document].ids[one.start : one.end] for one in windows]
    if everywhere:  # every window starts with the beginning token
        rows = [torch.cat([encoded[one.document].ids[:1], row[1:]]) for one, row in zip(windows, rows, strict=True)]
    batch = Batch.of(rows).to(model.get_input_embeddings().weight.device)
    logits_BTV = model(**batch.model_inputs(), use_cache=False).logits
    for row_TV, window in zip(logits_BTV, windows, strict=True):
        logits_NV = row_TV[window.first - 1 - window.start : window.end - window.start]
        targets_N = encoded[window.document].ids[window.first : window.end + 1]
        values = token_losses(logits_NV, targets_N).double().cpu()
        if not values.isfinite().all():
            problem = f"the outputs of {model.config.name_or_path!r} are not finite; {why_not_finite(model)}"
            raise ArgumentError("model", problem=problem)
        yield values


def _gather(texts: list[str], encoded: list[_Encoded], nats: list[torch.Tensor], tokenizer: Any) -> Perplexity:
    text_digest, token_digest = hashlib.sha256(), hashlib.sha256()
    blocks: list[list[float]] = []  # nats, tokens, bytes
    unknown = 0
    rare = tokenizer.unk_token_id
    for text, document, values in zip(texts, encoded, nats, strict=True):
        text_digest.update(hashlib.sha256(text.encode()).digest())
        token_digest.update(hashlib.sha256(document.ids.numpy().tobytes()).digest())
        if rare is not None and rare not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            unknown += int((document.ids == rare).sum())
        if document.starts is None:
            blocks.append([values.sum().item(), len(values), len(text.encode())])
            continue
        # Without a beginning token, the first token is not predicted and its bytes do not count.
        starts = document.starts if document.prefixed else document.starts[1:]
        begin = 0 if document.prefixed else (starts[0] if starts else len(text))
        cuts, first = block_cuts(text), len(blocks)
        for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True):
            blocks.append([0.0, 0, len(text[max(start, begin) : max(end, begin)].encode())])
        for start, value in zip(starts, values.tolist(), strict=True):
            block = blocks[first + bisect.bisect_right(cuts, start) - 1]
            block[0] += value
            block[1] += 1
    nats_K, tokens_K, bytes_K = torch.tensor(blocks, dtype=torch.float64).T
    placed = all(document.starts is not None for document in encoded)
    return Perplexity(
        nats=math.fsum(value for values in nats for value in values.tolist()),
        num_tokens=sum(map(len, nats)),
        num_bytes=round(bytes_K.sum().item()),
        num_documents=sum(len(values) > 0 for values in nats),
        unknown_tokens=unknown,
        text=text_digest.hexdigest(),
        tokenization=token_digest.hexdigest(),
        block_nats=nats_K if placed else None,
        block_tokens=tokens_K,
        block_bytes=bytes_K,
    )


def block_cuts(text: str, size: int = BLOCK_SIZE) -> list[int]:
    """Start offsets of a document's blocks: about every `size` characters, before a nearby space if possible."""
    cuts, at = [0], size
    while at <= len(text) - size // 2:
        space = re.compile(r"(?<=\S)\s").search(text, at, at + size // 4)
        at = space.start() if space else at
        cuts.append(at)
        at += size
    return cuts
