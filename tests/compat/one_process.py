"""Runs pytest once for each line of stdin, a JSON list of a report's path and pytest's arguments, in this one process.

A report appears when its tests have all been run.
"""

import json
import sys
from pathlib import Path

import pytest

for line in sys.stdin:
    report, *arguments = json.loads(line)
    if pytest.main([f"--junitxml={report}.part", *arguments]) in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        Path(f"{report}.part").rename(report)
