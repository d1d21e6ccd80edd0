"""Runs tasks of lm-evaluation-harness on a model in memory."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .perplexity import Estimate


@dataclass(frozen=True)
class TaskResult:
    """A metric of a task, with the names and values that lm-evaluation-harness reports; None if it does not."""

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    num_samples: int | None  # documents evaluated
    higher_is_better: bool | None
    version: Any
    num_fewshot: int | None
    # The metric of each document by its index; None if `value` is not their mean.
    samples: dict[int, float] | None = field(repr=False)

    @property
    def name(self) -> str:
        """The name in tables."""
        return f"{self.task} {self.metric}" + ("" if self.filter == "none" else f" ({self.filter})")

    def minus(self, reference: TaskResult) -> tuple[Estimate, bool]:
        """The difference from a reference, and whether its standard error is paired.

        It is paired if both have the metric for the same documents (arXiv 2411.00640). Otherwise, for example for task
        groups, the results are treated as independent, which overestimates the error if models fail on the same
        documents.
        """
        difference = self.value - reference.value
        ours, theirs = self.samples, reference.samples
        if ours is not None and theirs is not None and ours.keys() == theirs.keys():
            pairs = [ours[number] - theirs[number] for number in ours]
            return Estimate(difference, error_of_mean(pairs)), True
        if self.stderr is None or reference.stderr is None:
            return Estimate(difference, None), False
        return Estimate(difference, math.hypot(self.stderr, reference.stderr)), False


def error_of_mean(samples: Sequence[float]) -> float | None:
    """The standard error of a mean of scores from 0 to 1, or of their differences; None for a single one.

    Of scores that are all the same it is not 0: as if one of two more were another (Agresti and Coull 1998).
    """
    count = len(samples)
    if count < 2:
        return None
    if len(set(samples)) == 1:
        share = 1 / (count + 2)
        return math.sqrt(share * (1 - share) / count)
    return statistics.stdev(samples) / math.sqrt(count)


def task_manager(tasks: Sequence[str], include_path: str | os.PathLike[str] | None = None) -> Any:
    """Creates the `TaskManager` of lm-evaluation-harness and checks that it knows the tasks.

    Args:
        tasks: names of tasks, groups or tags, or paths of task files.
        include_path: a folder of task files, which can then be named in `tasks`.

    Raises:
        ImportError: if lm-evaluation-harness is not installed; the message names the extra.
        ValueError: if a task is unknown.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ImportError("tasks need lm-evaluation-harness: install the extra hf-lnscale[eval]") from None
    if include_path is not None and not Path(include_path).is_dir():
        raise FileNotFoundError(f"include_path: there is no folder {str(include_path)!r}")
    manager = TaskManager(include_path=include_path)
    for task in tasks:
        if task not in manager.task_index and not (task.endswith((".yaml", ".yml")) and Path(task).is_file()):
            close = [name for name in manager.all_tasks if task.lower() in name.lower()][:5]
            hint = f"; did you mean {', '.join(close)}?" if close else "; 'lm_eval ls tasks' lists them"
            raise ValueError(f"tasks: {task!r} is neither a task of lm-evaluation-harness nor a task file{hint}")
    return manager


def load_tasks(tasks: Sequence[str], manager: Any) -> None:
    """Loads tasks and their data, which the cache of datasets then has."""
    with contextlib.redirect_stdout(sys.stderr):
        manager.load(list(tasks)) if hasattr(manager, "load") else manager.load_task_or_group(list(tasks))


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    manager: Any,
    *,
    batch_size: int = 4,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> list[TaskResult]:
    """Runs tasks on a causal language model, on its device. Any error raised by a task passes.

    Args:
        model, tokenizer: the model.
        tasks, manager: see `task_manager`.
        batch_size: requests per batch.
        limit: maximum number of documents per task.
        num_fewshot: overrides the number of few-shot examples of each task.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(sys.stderr):  # it prints messages, and stdout may be JSON
        found: Any = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            log_samples=True,
        )
    return [
        _result(found, task, key, value)
        for task, figures in found["results"].items()
        for key, value in figures.items()
        if "," in key and "_stderr," not in key and isinstance(value, (int, float))
    ]


def _result(found: dict[str, Any], task: str, key: str, value: float) -> TaskResult:
    """The metric `key` of a task, from the results of lm-evaluation-harness."""
    metric, _, which = key.partition(",")
    about = {name: found.get(name, {}).get(task) for name in ("n-samples", "higher_is_better", "versions", "n-shot")}
    stderr = found["results"][task].get(f"{metric}_stderr,{which}")
    return TaskResult(
        task=task,
        metric=metric,
        filter=which,
        value=float(value),
        stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
        num_samples=(about["n-samples"] or {}).get("effective"),
        higher_is_better=(about["higher_is_better"] or {}).get(metric),
        version=about["versions"],
        num_fewshot=about["n-shot"],
        samples=_samples(found.get("samples", {}).get(task), metric, which, float(value)),
    )


def _samples(rows: Any, metric: str, which: str, value: float) -> dict[int, float] | None:
    """The metric of each document; None if the reported value is not their mean."""
    found: dict[int, list[float]] = defaultdict(list)
    for row in rows or []:
        if row.get("filter", "none") == which:
            if not isinstance(row.get(metric), (int, float)):
                return None
            found[row["doc_id"]].append(float(row[metric]))
    if not found or any(len(values) > 1 for values in found.values()):
        return None
    single = {number: values[0] for number, values in found.items()}
    mean = math.fsum(single.values()) / len(single)
    return single if math.isclose(mean, value, rel_tol=1e-6, abs_tol=1e-9) else None
