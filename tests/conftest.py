from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent

# Two test workers on two cores: more threads than that only get in each other's way.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)


@pytest.fixture
def quick_recipes(tmp_path, monkeypatch):
    """Recipes draw no plots, and their data is cached for the test alone."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("hf_lnscale.training.run_report._plot", lambda *told: [])


@pytest.fixture
def run_python(tmp_path):
    """Runs Python code in a new process and returns what it printed.

    Without the plugin, the code runs in a process that has never imported it, which is checked at its end.
    """

    def run(code: str, *args: object, plugin: bool, expect_failure: bool = False) -> str:
        check = "import sys; assert ('hf_lnscale' in sys.modules) == " + repr(plugin)
        path = os.pathsep.join([str(TESTS), str(TESTS.parent)])  # this very checkout, whichever is installed
        script = "\n".join(["import hf_lnscale" if plugin else "", textwrap.dedent(code), check])
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, args)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        if expect_failure:
            assert done.returncode != 0, done.stdout
            return done.stderr
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
