"""benchmarks/judging.py: results that an earlier run wrote are found again."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import judging


@dataclass(frozen=True)
class Run:
    way: str
    seed: int


def test_records_are_read_again_also_from_earlier_files(tmp_path):
    path = tmp_path / "new" / "runs.jsonl"
    judging.Records(path, Run).add(Run("a", 0), {"loss": 1.0})
    run, row = ({"way": "b", "seed": seed} for seed in (1, 2))
    path.write_text(
        path.read_text() + json.dumps({"run": run, "loss": 2.0}) + "\n" + json.dumps({"row": row, "loss": 3.0})
    )
    found = judging.Records(path, Run)
    assert {run: one["loss"] for run, one in found.items()} == {Run("a", 0): 1.0, Run("b", 1): 2.0, Run("b", 2): 3.0}
