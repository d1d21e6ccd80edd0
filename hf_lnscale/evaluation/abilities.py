"""Abilities that perplexity does not show: small tasks that need no download, and agreement with the whole model.

Where layers go, reasoning and exact recall suffer before fluency does (arXiv 2602.01997).
"""

from __future__ import annotations

import json
import keyword
import math
import random
import re
import statistics
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..measuring.sample import own_text
from ..measuring.split_model import SplitModel
from ..measuring.stream import eval_mode, upcast
from ..measuring.text import Batch
from .tasks import TaskResult

QUESTIONS = {"addition": 200, "copying": 50}
LETTERS = "ABCD"


class Question(NamedTuple):
    """A text to go on with, and how it goes on."""

    prompt: str
    answer: str


def about_abilities(reference: str) -> str:
    """What the figures are of; `reference` names the model that the others are compared with."""
    return (
        f"{QUESTIONS['addition']} sums of numbers below 100, {QUESTIONS['copying']} lists of words to copy. Agreement "
        f"with the {reference} model, on text that it wrote: on the likeliest next token, and the KL divergence from "
        "it in nats per token."
    )


def additions() -> list[Question]:
    """Sums of two numbers of two digits, after four examples."""
    draw = random.Random(0)
    pairs = [(draw.randint(10, 99), draw.randint(10, 99)) for _ in range(4 + QUESTIONS["addition"])]
    examples = "".join(f"{a} + {b} = {a + b}\n" for a, b in pairs[:4])
    return [Question(f"{examples}{a} + {b} =", f" {a + b}\n") for a, b in pairs[4:]]


def copies() -> list[Question]:
    """Sixteen words in an order without sense, to be repeated, after one example."""
    draw = random.Random(0)
    lines = [" ".join(draw.sample(keyword.kwlist, 16)) for _ in range(1 + QUESTIONS["copying"])]
    return [Question(f"{lines[0]}\n{lines[0]}\n\n{line}\n", line) for line in lines[1:]]


def mmlu() -> list[Question]:
    """The questions of MMLU, five of each subject, that lm-evaluation-harness has in its package; none without it."""
    found = find_spec("lm_eval")
    if found is None or found.origin is None:
        return []
    path = Path(found.origin).parent / "tasks" / "mmlu" / "flan_cot_fewshot" / "_cot_prompts.json"
    if not path.is_file():
        return []
    questions = []
    for text in json.loads(path.read_text(encoding="utf-8")).values():
        for question in re.split(r"\n\s*Q: ", text)[1:]:
            asked, _, reasons = question.partition("\nA:")
            answer = re.search(r"answer is \(?([A-D])\)?", reasons)
            if answer is not None:
                questions.append(Question(f"Q: {asked}\nA: The answer is (", answer[1]))
    return questions


def ability_results(model: Any, tokenizer: Any, batch_size: int = 4) -> list[TaskResult]:
    """Measures a model on each task.

    Args:
        model, tokenizer: a causal language model, on its device.
        batch_size: questions at a time.

    Returns:
        addition: share of sums whose every token is the likeliest, so that greedy decoding gives it; copying: share of
        tokens that are; MMLU: share of questions whose letter is the likeliest of the four.
    """
    results = []
    for name, metric, questions in (
        ("addition", "exact", additions()),
        ("copying", "tokens", copies()),
        ("MMLU, in lm-eval's package", "accuracy", mmlu()),
    ):
        rows = [_encode(question, tokenizer) for question in questions]
        scores = []
        for (ids, start), question, logits_NV in zip(rows, questions, _logits(model, rows, batch_size), strict=True):
            if metric == "accuracy":
                letters = [tokenizer(question.prompt + letter)["input_ids"][start] for letter in LETTERS]
                scores.append(float(LETTERS[int(logits_NV[0, letters].argmax())] == question.answer))
            else:
                right = (logits_NV.argmax(-1).cpu() == torch.tensor(ids[start:])).double()
                scores.append(right.prod().item() if metric == "exact" else right.mean().item())
        if scores:
            results.append(_result(name, metric, scores))
    return results


class Continuations:
    """Text that a model wrote itself, and its distribution of each next token, to compare other models with.

    Args:
        model, tokenizer: see `own_text`.
        num_tokens: to write. Their log-probabilities are kept in main memory in float16, 2 bytes x vocabulary each.
        seq_len: tokens in a sequence.
    """

    def __init__(self, model: Any, tokenizer: Any, num_tokens: int = 1024, seq_len: int = 64) -> None:
        self.vocabulary = tokenizer.get_vocab()
        with eval_mode(model):
            self.texts = own_text(model, tokenizer, num_tokens, seq_len, batch_size=8)
        self.log_probs = [log_p_NV.half().cpu() for log_p_NV in self._log_probs(model)]

    def agreement(self, model: Any, tokenizer: Any) -> list[TaskResult]:
        """How a model continues each token of them: whether its likeliest token is the same, and the divergence from
        their writer's distribution, KL(writer || model) in nats; nothing for a model of another tokenizer."""
        if tokenizer.get_vocab() != self.vocabulary:
            return []
        same, divergence = [], []
        for theirs_NV, ours_NV in zip(self.log_probs, self._log_probs(model), strict=True):
            size = min(theirs_NV.shape[1], ours_NV.shape[1])  # heads may be padded
            log_p_NV, log_q_NV = theirs_NV[:, :size].double(), ours_NV[:, :size].double().cpu()
            same.append((log_p_NV.argmax(-1) == log_q_NV.argmax(-1)).double().mean().item())
            divergence.append((log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1).mean().item())
        return [
            _result("agreement on its own text", "top-1", same),
            _result("agreement on its own text", "KL", divergence, better_high=False),
        ]

    def _log_probs(self, model: Any) -> Iterator[torch.Tensor]:
        """For each sequence, (T - 1, V)."""
        rows = [(ids, 1) for ids_BT in self.texts for ids in ids_BT.tolist()]
        return (logits_NV.log_softmax(-1) for logits_NV in _logits(model, rows, 8))


def _encode(question: Question, tokenizer: Any) -> tuple[list[int], int]:
    """Token ids of prompt and answer, and where the answer begins."""
    prompt, ids = (tokenizer(text)["input_ids"] for text in (question.prompt, question.prompt + question.answer))
    start = next((i for i, pair in enumerate(zip(prompt, ids, strict=False)) if pair[0] != pair[1]), len(prompt))
    return ids, start


@torch.no_grad()
def _logits(model: Any, rows: Sequence[tuple[list[int], int]], batch_size: int) -> Iterator[torch.Tensor]:
    """For each row (token ids, start), the logits, in at least float32, for the tokens from `start` on, (N, V)."""
    halves = SplitModel(model)
    for at in range(0, len(rows), batch_size):
        part = rows[at : at + batch_size]
        ids_BT = torch.zeros(len(part), max(len(ids) for ids, _ in part), dtype=torch.long)
        mask_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        for i, (ids, _) in enumerate(part):
            ids_BT[i, : len(ids)], mask_BT[i, : len(ids)] = torch.tensor(ids), True
        with eval_mode(model):
            x_BTD = halves.hidden(Batch(ids_BT, mask_BT))
            logits = [upcast(halves.logits(x_BTD[i, start - 1 : len(ids) - 1])) for i, (ids, start) in enumerate(part)]
        yield from logits


def _result(name: str, metric: str, scores: list[float], better_high: bool = True) -> TaskResult:
    count = len(scores)
    error = statistics.stdev(scores) / math.sqrt(count) if count > 1 else None
    return TaskResult(
        name, metric, "none", statistics.fmean(scores), error, count, better_high, 1, None, dict(enumerate(scores))
    )
