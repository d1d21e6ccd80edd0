"""`hf-lnscale run`: runs any unmodified Python program with the flags enabled in all its processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer
from packaging.version import Version
from typer import Argument, Option

from ..core.processes import environment_with_flags
from ..core.warnings import warn

# Programs (first part of their names) that read the configuration with transformers but the weights themselves, and
# would silently lose the scale of a scaled checkpoint.
_READ_WEIGHTS = (
    "convert_hf_to_gguf", "convert_lora_to_gguf", "ct2-transformers-converter", "ctranslate2", "mlx_lm", "sglang",
)  # fmt: skip


def command_line(program: str, arguments: Sequence[str] = (), *, module: bool = False) -> list[str]:
    """The command line that runs a program: a script, a command of this Python environment or on PATH, or a module.

    Raises:
        FileNotFoundError: if there is no such program; the message says where it was searched.
        ValueError: if the program is known to read weights without transformers and would lose the scale.
    """
    named = program
    if Path(program).name.startswith("python") and not module:  # python -m name, or python file
        named = next((word for word in arguments if not word.startswith("-")), program)
    name = Path(named).name.partition(".")[0]
    if name in _READ_WEIGHTS:
        raise ValueError(
            f"{named!r} reads weights itself and would silently lose the scale of a checkpoint; write a plain one with "
            f"hf-lnscale export, and run {name} on that without hf-lnscale run"
        )
    if name == "trl":
        with suppress(PackageNotFoundError):
            if Version(release := version("trl")) < Version("1.15"):
                warn(f"the scripts of trl {release} ignore model_init_kwargs, and with it the flags; trl 1.15 does not")
    if module:
        return [sys.executable, "-m", program, *arguments]
    if program.endswith(".py"):
        if not Path(program).is_file():
            raise FileNotFoundError(f"there is no script {program!r}")
        return [sys.executable, program, *arguments]
    # Not resolved, since in a virtual environment the interpreter is a symlink and commands are next to the symlink.
    commands = Path(sys.executable).parent
    found = shutil.which(program, path=str(commands)) or shutil.which(program)
    if found is None:
        raise FileNotFoundError(
            f"there is no program {program!r} in {commands} or on PATH; -m {program} runs a module of that name"
        )
    return [found, *arguments]


def run(
    context: typer.Context,
    program: Annotated[
        str, Argument(metavar="PROGRAM [ARGS]...", help="A script, or a command of this Python environment.")
    ],
    module: Annotated[bool, Option("-m", "--module", help="Run PROGRAM as a module, like python -m.")] = False,
) -> None:
    """Run any unmodified Python program with the flags enabled.

    The flags are also enabled in its child processes. Arguments after
    PROGRAM are passed to it, and its exit code is returned.

    hf-lnscale run lm_eval --model hf --model_args pretrained=X,ln_scaling=True
    hf-lnscale run trl sft --config sft.yaml
    hf-lnscale run accelerate launch train.py
    """
    command = command_line(program, context.args, module=module)
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "nt":  # where exec starts another process and exits
        raise SystemExit(subprocess.call(command, env=environment_with_flags()))
    os.execve(command[0], command, environment_with_flags())  # replaces this process, and does not return
