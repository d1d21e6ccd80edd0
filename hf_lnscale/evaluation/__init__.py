"""What a model is worth and what it costs: perplexity, tasks, speed, memory, size; several models side by side."""

from __future__ import annotations

from .comparison import Evaluation, evaluate
from .perplexity import Estimate, Perplexity, perplexity
from .speed import Speed, Timing, measure
from .tasks import TaskResult

__all__ = ["Estimate", "Evaluation", "Perplexity", "Speed", "TaskResult", "Timing", "evaluate", "measure", "perplexity"]
