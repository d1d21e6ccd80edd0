"""Compares models: perplexity, tasks, speed, memory and size."""

from __future__ import annotations

from .comparison import Evaluation, evaluate
from .perplexity import Estimate, Perplexity, perplexity
from .speed import Speed, Timing, measure
from .tasks import TaskResult

__all__ = ["Estimate", "Evaluation", "Perplexity", "Speed", "TaskResult", "Timing", "evaluate", "measure", "perplexity"]
