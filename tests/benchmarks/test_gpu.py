"""benchmarks/gpu.sh: every line of it runs, in a small form."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.sh"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_every_line_runs_in_a_small_form():
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "200"}
    done = subprocess.run(["bash", SCRIPT, "--smoke"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for title in ("Scaling, Llama tiny", "in training", "DepthStatsCallback", "scores of", "prune, two", "a diagnosis"):
        assert title in done.stdout
    # The scale under DDP and FSDP2 gives the loss of one process, and under QLoRA that of the folded checkpoint.
    rows = re.findall(r"(DDP|FSDP2|QLoRA) .*?([0-9.]+e[+-][0-9]+)", done.stdout)
    assert {name for name, _ in rows} == {"DDP", "FSDP2", "QLoRA"}
    assert all(float(difference) < 1e-5 for _, difference in rows)
