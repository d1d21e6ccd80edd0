"""Exceptions of this package. An error about an argument carries its name, which the command line renders as an option.

Messages are one line and state what is wrong, the value given, and what is valid. In messages and hints, `name` and
`name=value` in backticks refer to an argument, shown as `--name` on the command line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from importlib.util import find_spec
from numbers import Integral
from typing import Any

_REFERENCE = re.compile(r"`(\w+)(?:=([\w.]+))?`")


def _python_name(name: str, value: str | None) -> str:
    return name if value is None else f"{name}={value}"


class HFLNScaleError(Exception):
    """Base class of this package's errors. The hint says what to do; the command line shows it on a separate line."""

    hint = ""

    def __init__(self, message: str = "", hint: str = "") -> None:
        super().__init__(message, hint)  # all arguments, for pickle
        self._message, self.hint = message, hint

    def render(self, named: Callable[[str, str | None], str] = _python_name) -> str:
        """The message. `named` maps an argument's name, and its value in `name=value`, to how it is shown."""
        return _replace_references(self._message, named)

    def render_hint(self, named: Callable[[str, str | None], str] = _python_name) -> str:
        """The hint, rendered like the message."""
        return _replace_references(self.hint, named)

    def __str__(self) -> str:
        return self.render()


class ArgumentError(HFLNScaleError, ValueError):
    """An argument has an invalid value.

    `ArgumentError("num_layers", 31, "an integer from 1 to 29")` reads "num_layers must be an integer from 1 to 29,
    got 31", `ArgumentError("data", "a.txt", problem="is empty")` reads "data 'a.txt' is empty"; without a value the
    form is "data: problem".
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
    """The output path already exists."""


class PathNotFoundError(ArgumentError, FileNotFoundError):
    """The input path does not exist."""


class UnsupportedArchitectureError(HFLNScaleError, ValueError):
    """The model's family is not in the table, or its modules are not where the table expects them."""


class CheckpointError(HFLNScaleError, ValueError, OSError):
    """A checkpoint, or a file in its folder, is missing, incomplete or invalid.

    Subclasses both types that transformers raises in these cases.
    """


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No checkpoint has this name."""


class UnsupportedTransformersError(HFLNScaleError, RuntimeError):
    """The installed release of transformers lacks what a flag of this package needs."""


class MissingPackageError(HFLNScaleError, ImportError):
    """An optional package is missing."""


def require_integers(least: int, **values: Any) -> None:
    """Raises `ArgumentError` if any of the named values is not an integer, or is below `least`."""
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ArgumentError(name, value, f"an integer >= {least}")


def require_packages(purpose: str, extra: str, *packages: str) -> None:
    """Raises `MissingPackageError` if any of `packages`, which `purpose` ("the demo") needs, is not installed."""
    for package in packages:
        if find_spec(package) is None:
            raise MissingPackageError(f"{purpose} needs {package}: install the extra hf-lnscale[{extra}]")


def _replace_references(text: str, named: Callable[[str, str | None], str]) -> str:
    return _REFERENCE.sub(lambda match: named(match[1], match[2]), text)
