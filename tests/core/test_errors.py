"""Errors carry the argument's name: Python shows it, the command line its option."""

import pickle
from pathlib import Path

import pytest

from hf_lnscale.core import errors


def option(name, value):
    return f"--{name.replace('_', '-')}" + ("" if value in (None, "True") else f" {value}")


@pytest.mark.parametrize(
    ("error", "python", "command_line"),
    [
        (
            errors.ArgumentError("num_layers", 31, "an integer from 1 to 29"),
            "num_layers must be an integer from 1 to 29, got 31",
            "--num-layers must be an integer from 1 to 29, got 31",
        ),
        (
            errors.PathExistsError("out", Path("smaller"), problem="exists; choose another, or pass `force=True`"),
            "out 'smaller' exists; choose another, or pass force=True",
            "--out 'smaller' exists; choose another, or pass --force",
        ),
        (
            errors.ArgumentError("heal", problem="`method=greedy_healed` heals, `num_layers` does not"),
            "heal: method=greedy_healed heals, num_layers does not",
            "--heal: --method greedy_healed heals, --num-layers does not",
        ),
        # A value is shown as it is, whatever it looks like.
        (
            errors.PathNotFoundError("data", "a `force=True`\nfile", problem="is not there"),
            "data 'a `force=True`\\nfile' is not there",
            "--data 'a `force=True`\\nfile' is not there",
        ),
        (errors.CheckpointError("no `x-y` here"), "no `x-y` here", "no `x-y` here"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_messages(error, python, command_line):
    assert str(error) == python
    assert error.render(option) == command_line
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), again.hint, vars(again)) == (python, error.hint, vars(error))


def test_an_argument_error_knows_its_argument():
    error = errors.ArgumentError("method", "greed", "one of greedy, best_of", hint="see `method`")
    assert (error.argument, error.value, error.valid) == ("method", "greed", "one of greedy, best_of")
    assert error.render_hint(option) == "see --method"


@pytest.mark.parametrize(
    ("ours", "builtin"),
    [
        (errors.ArgumentError, ValueError),
        (errors.PathExistsError, FileExistsError),
        (errors.PathNotFoundError, FileNotFoundError),
        (errors.UnsupportedArchitectureError, ValueError),
        (errors.CheckpointError, ValueError),
        (errors.UnsupportedTransformersError, RuntimeError),
        (errors.MissingPackageError, ImportError),
    ],
)
def test_errors_are_caught_as_the_builtin_ones(ours, builtin):
    with pytest.raises(builtin, match="reason"):
        raise ours("reason")
    assert issubclass(ours, errors.HFLNScaleError)


def test_require_packages():
    errors.require_packages("a test", "test", "json", "pytest")
    with pytest.raises(ImportError, match=r"^a test needs nowhere_to_be: install the extra hf-lnscale\[test\]$"):
        errors.require_packages("a test", "test", "json", "nowhere_to_be")
