"""Compares the perplexity, task results, speed, memory and size of models."""

from __future__ import annotations

from .comparison import Evaluation, evaluate
from .perplexity import Estimate, Perplexity, perplexity
from .speed import Speed, Timing, measure
from .tasks import TaskResult

__all__ = ["Estimate", "Evaluation", "Perplexity", "Speed", "TaskResult", "Timing", "evaluate", "measure", "perplexity"]
