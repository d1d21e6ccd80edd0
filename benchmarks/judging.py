"""Shared by the benchmarks of quality: texts, losses on them, and results in a file, so that no run is repeated."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hf_lnscale.measuring.text import Windows, token_batches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Losses = dict[str, list[float]]  # for each kind of text, the loss of each window, in nats per token


class Records(dict[Any, dict[str, Any]]):
    """Results by run, each a line of a file that need not exist yet.

    Args:
        path: the file.
        kind: the dataclass of runs.
    """

    def __init__(self, path: Path, kind: type) -> None:
        super().__init__()
        self.path = path
        for line in map(json.loads, path.read_text().splitlines() if path.exists() else []):
            # Some earlier files say "row" instead of "run", and have the results beside it.
            self[kind(**(line.get("run") or line["row"]))] = line.get("found", line)

    def add(self, run: Any, found: dict[str, Any]) -> None:
        self[run] = found
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps({"run": asdict(run), "found": found}) + "\n")


def read(path: str | Path) -> str:
    return Path(path).read_text(encoding="utf-8").replace("<unk>", "unk")


def split(text: str, parts: int) -> tuple[list[str], list[str]]:
    """A text without the last of so many equal parts, and that part."""
    cut = text.index("\n", len(text) * (parts - 1) // parts)
    return [text[:cut]], [text[cut:]]


def windows(texts: list[str], tokenizer: Any, count: int, seq_len: int) -> torch.Tensor:
    """The start of texts as token ids, shape (count, seq_len)."""
    batches = token_batches(texts, tokenizer=tokenizer, windows=Windows(count * seq_len, seq_len))
    return torch.cat([batch.input_ids for batch in batches])[:count].to(DEVICE)


@torch.no_grad()
def losses(model: Any, judged: dict[str, torch.Tensor]) -> Losses:
    return {
        name: [model(input_ids=one[None], labels=one[None]).loss.item() for one in windows]
        for name, windows in judged.items()
    }


def difference(found: Losses, whole: Losses, kinds: Iterable[str]) -> tuple[float, float]:
    """The mean over kinds of the differences in loss, and its standard error over windows."""
    differences = [[a - b for a, b in zip(found[kind], whole[kind], strict=True)] for kind in kinds]
    mean = statistics.fmean(statistics.fmean(one) for one in differences)
    return mean, math.hypot(*(statistics.stdev(one) / math.sqrt(len(one)) for one in differences)) / len(differences)
