"""Two kills of each verb that writes, and two that are stopped by SIGTERM; `make faults` does 30."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")]


@pytest.mark.parametrize("sent", ["KILL", "TERM"])
def test_what_a_killed_run_leaves(sent):
    for package in ("matplotlib", "gguf", "trl"):
        pytest.importorskip(package)
    script = Path(__file__).with_name("kills.py")
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "2", "--signal", sent], capture_output=True, text=True
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
