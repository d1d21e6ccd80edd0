"""Child processes (environment, termination with the parent) and a clean exit on SIGTERM."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Contains a sitecustomize.py, which Python runs at startup if this folder is on PYTHONPATH.
STARTUP = Path(__file__).parents[1] / "hooks" / "startup"


def environment_without_flags() -> dict[str, str]:
    """This process's environment variables, without those that enable the flags."""
    path = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part and Path(part) != STARTUP]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def environment_with_flags() -> dict[str, str]:
    """This process's environment variables, with the flags enabled in all Python child processes."""
    plain = environment_without_flags()
    return {**plain, "PYTHONPATH": os.pathsep.join(filter(None, [str(STARTUP), plain["PYTHONPATH"]]))}


def command_of(function: str) -> list[str]:
    """The command that calls a function of this package, given as `module:name`, in a new process.

    `python -c` and `python -m` put the current folder first on the path, where a file such as `typer.py` would shadow
    the library; this command does not. The function is called without arguments and may read `sys.argv`.
    """
    module, _, name = function.partition(":")
    root = str(Path(__file__).parents[2])
    code = f"import sys; sys.path[:] = [{root!r}, *filter(None, sys.path)]; from {module} import {name}; {name}()"
    return [sys.executable, "-c", code]


# Runs a script that exits when its standard input closes, that is, when the parent process ends. What it imports, even
# from the standard library, must not come from the current folder.
_FOLLOW = """
import sys
sys.path[:] = filter(None, sys.path)
import os, runpy, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_script(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a Python script without the flags in a process that ends with this one, even if it is killed."""
    reading, writing = os.pipe()
    try:
        return subprocess.run(
            [sys.executable, "-c", _FOLLOW, str(script), *map(str, arguments)],
            stdin=reading, capture_output=True, text=True, env=environment_without_flags(),
        )  # fmt: skip
    finally:
        os.close(reading)
        os.close(writing)


@contextmanager
def leaving_on_sigterm(name: str) -> Iterator[None]:
    """Context in which SIGTERM prints a message and raises SystemExit(143), so cleanup runs as after Ctrl-C."""
    stopped = -math.inf

    def leave(number: int, frame: Any) -> None:
        nonlocal stopped
        if time.monotonic() - stopped < 1:  # in a process group the signal may arrive twice
            return
        stopped = time.monotonic()
        os.write(2, f"{name}: stopped by SIGTERM\n".encode())
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
