"""The errors that this package raises. An error about an argument carries its name, so that the command line can name
its option instead.

Messages are one line and name what is wrong, the value given, and what is valid. In messages and hints, `name` and
`name=value` in backticks refer to an argument: the command line shows `--name`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

_REFERENCE = re.compile(r"`(\w+)(?:=([\w.]+))?`")


def _python_name(name: str, value: str | None) -> str:
    return name if value is None else f"{name}={value}"


class HFLNScaleError(Exception):
    """Base class of the errors of this package.

    Args:
        message: what is wrong.
        hint: what to do about it; shown by the command line in a line of its own.
    """

    hint = ""

    def __init__(self, message: str = "", hint: str = "") -> None:
        super().__init__(message, hint)  # all arguments, so that the error can be pickled
        self._message, self.hint = message, hint

    def render(self, named: Callable[[str, str | None], str] = _python_name) -> str:
        """The message.

        Args:
            named: how an argument is called, from its name and, in `name=value`, the value.
        """
        return _replace_references(self._message, named)

    def render_hint(self, named: Callable[[str, str | None], str] = _python_name) -> str:
        """The hint, with arguments called as in `render`."""
        return _replace_references(self.hint, named)

    def __str__(self) -> str:
        return self.render()


class ArgumentError(HFLNScaleError, ValueError):
    """An argument has a value that it cannot have.

    `ArgumentError("num_layers", 31, "an integer from 1 to 29")` reads "num_layers must be an integer from 1 to 29,
    got 31", `ArgumentError("data", "a.txt", problem="is empty")` reads "data 'a.txt' is empty", and without a value it
    is "data: problem".

    Attributes:
        argument: its name in Python.
        value: what was given.
        valid: what is valid.
        hint: what to do about it.
    """

    def __init__(self, argument: str, value: Any = ..., valid: str = "", problem: str = "", hint: str = "") -> None:
        super().__init__(problem, hint)
        self.args = (argument, value, valid, problem, hint)
        self.argument, self.value, self.valid = argument, value, valid

    def render(self, named: Callable[[str, str | None], str] = _python_name) -> str:
        name, problem = named(self.argument, None), super().render(named)
        if self.value is ...:
            return f"{name}: {problem}"
        value = os.fspath(self.value) if isinstance(self.value, os.PathLike) else self.value
        if problem:
            return f"{name} {value!r} {problem}"
        return f"{name} must be {_replace_references(self.valid, named)}, got {value!r}"


class PathExistsError(ArgumentError, FileExistsError):
    """There is something where an argument says to write."""


class PathNotFoundError(ArgumentError, FileNotFoundError):
    """There is no file or folder where an argument says to read."""


class UnsupportedArchitectureError(HFLNScaleError, ValueError):
    """The model's family is not in the table, or its modules are not where its row says they are."""


class CheckpointError(HFLNScaleError, ValueError, OSError):
    """A checkpoint, or a file in its folder, is missing, incomplete or not what it should be.

    It is both types that transformers raises then.
    """


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint of that name."""


class UnsupportedTransformersError(HFLNScaleError, RuntimeError):
    """The installed release of transformers lacks what a flag of this package needs."""


class MissingPackageError(HFLNScaleError, ImportError):
    """A package is missing that an extra of this one would have installed."""


def require_packages(purpose: str, extra: str, *packages: str) -> None:
    """Refuses to go on without optional packages.

    Args:
        purpose: what needs them, such as "the demo".
        extra: the extra of this package that installs them.
        packages: their names in Python.

    Raises:
        MissingPackageError: if one is missing; the message says how to install it.
    """
    for package in packages:
        if find_spec(package) is None:
            raise MissingPackageError(f"{purpose} needs {package}: pip install 'hf-lnscale[{extra}]'")


def _replace_references(text: str, named: Callable[[str, str | None], str]) -> str:
    return _REFERENCE.sub(lambda match: named(match[1], match[2]), text)
