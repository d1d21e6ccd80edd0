"""The environment of child processes: with the plugin's flags turned on in every Python below, or without them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Holds a sitecustomize.py, which Python runs at its start if this folder is on PYTHONPATH.
STARTUP = Path(__file__).parents[1] / "hooks" / "startup"


def environment_without_flags() -> dict[str, str]:
    """This process's environment variables, without those that turn the flags on."""
    path = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part and Path(part) != STARTUP]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def environment_with_flags() -> dict[str, str]:
    """This process's environment variables, with those that turn the flags on in every Python process below it."""
    plain = environment_without_flags()
    return {**plain, "PYTHONPATH": os.pathsep.join(filter(None, [str(STARTUP), plain["PYTHONPATH"]]))}


def command_of(function: str) -> list[str]:
    """The command that calls a function of this package in a new process, without the current folder on its path.

    `python -c` and `python -m` put the current folder first: a file such as `typer.py` in it would be run.

    Args:
        function: `module:name`; called without arguments, it reads `sys.argv`.
    """
    module, _, name = function.partition(":")
    root = str(Path(__file__).parents[2])
    code = f"import sys; sys.path[:] = [{root!r}, *filter(None, sys.path)]; from {module} import {name}; {name}()"
    return [sys.executable, "-c", code]
