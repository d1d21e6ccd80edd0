"""The command line: its verbs, how errors are shown, and the exit codes.

Each verb is a function in its own file; the first line of its docstring is shown in `hf-lnscale --help`. Errors it
raises are shown here as a line on stderr. Importing this module, as for --help and completion, imports neither torch
nor transformers, since verbs import what they need when they run.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from traceback import walk_tb
from types import SimpleNamespace
from typing import Annotated, Any

import typer
from typer import Option

from .._version import __version__
from ..core.display import one_line
from ..core.errors import HFLNScaleError
from ..core.processes import leaving_on_sigterm
from .adopt import adopt
from .demo import demo
from .diagnose import diagnose
from .env import env
from .evaluate import evaluate
from .export import export, fold
from .info import info
from .options import quiet_transformers
from .prune import prune
from .push import push
from .run import run
from .train import train

_EPILOG = """
[bold]Examples[/bold]

hf-lnscale info MODEL
hf-lnscale diagnose MODEL --data text.txt --out report
hf-lnscale prune MODEL --data text.txt --layers 2 --out smaller
hf-lnscale evaluate MODEL smaller --data text.txt --tasks arc_easy
hf-lnscale export trained --out plain
hf-lnscale run accelerate launch train.py

A MODEL is a folder, a .gguf file or its folder, or a repository on the Hub.

Exit codes: 0 success, 1 failure, 2 invalid command line, 130 interrupted, 143
stopped by SIGTERM; run returns the exit code of the program.
"""
_LONGEST = 600  # maximum length of errors from other libraries

app = typer.Typer(
    name="hf-lnscale",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Counters the curse of depth in transformers models: LayerNorm Scaling, and dropping layers by measurement.",
    epilog=_EPILOG,
)


def _version(show: bool) -> None:
    if show:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, Option("--debug", help="Show the full traceback of errors.")] = False,
    version: Annotated[
        bool, Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    context.obj.debug = debug


_quiet = quiet_transformers()  # used as a decorator
_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}
_OWN_HELP: dict[str, Any] = {"context_settings": {**_PASS_ON, "help_option_names": []}, "no_args_is_help": False}
for verb in (demo, info, diagnose, train, evaluate, prune, export, adopt, push):
    app.command(**(_OWN_HELP if verb is train else {}))(_quiet(verb))
app.command(context_settings={"allow_extra_args": True, "allow_interspersed_args": False})(run)
app.command()(env)
app.command(hidden=True, context_settings=_PASS_ON)(fold)


def main() -> None:
    """Runs the command line. Errors print a line to stderr, with a hint if available, and exit with code 1."""
    options = SimpleNamespace(debug=False)
    try:
        with leaving_on_sigterm("hf-lnscale"), _messages_on_stderr():
            app(prog_name="hf-lnscale", obj=options)
    except Exception as error:
        if options.debug:
            raise
        message, hint = _describe(error)
        print(f"hf-lnscale: {message}" + (f"\n  hint: {hint}" if hint else ""), file=sys.stderr)
        raise SystemExit(1) from None


@contextmanager
def _messages_on_stderr() -> Iterator[None]:
    """Context in which warnings and log messages of this library are single lines on stderr."""
    logger, handler = logging.getLogger("hf_lnscale"), logging.StreamHandler()
    handler.setFormatter(_OneLine())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return one_line(record.getMessage())


def _show_warning(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
    print(f"hf-lnscale: warning: {one_line(message)}", file=sys.stderr)


def _describe(error: Exception) -> tuple[str, str]:
    """The message in one line, and a hint or ""."""
    verb = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    named = _option_names(verb)
    if isinstance(error, HFLNScaleError):
        return one_line(error.render(named)), one_line(error.render_hint(named))
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return _shortened(error), "use a smaller --batch-size or --seq-len, or --dtype bf16, to save memory"
    message = _shortened(error)
    # For these types the message is enough; for all others the type is shown too.
    if not message or not isinstance(error, (ValueError, OSError, ImportError, RuntimeError)):
        message = type(error).__name__ + (f": {message}" if message else "")
    argument = re.match(r"(\w+)(?=:| must )", message)  # the start of messages about an argument
    if argument and (option := named(argument[1], None)) != argument[1]:
        return option + message[argument.end() :], ""
    # This package's own messages already say what to do.
    own = [frame.f_globals["__name__"] for frame, _ in walk_tb(error.__traceback__)][-1].startswith("hf_lnscale.")
    return message, "" if own else f"hf-lnscale --debug {verb} ... shows the traceback"


def _shortened(error: Exception) -> str:
    """A message in one line; of a traceback in it, only the last line is kept."""
    before, traceback, after = str(error).partition("Traceback (most recent call last):")
    lines = [*before.splitlines(), *([after.strip().splitlines()[-1]] if traceback and after.strip() else [])]
    text = one_line(" ".join(" ".join(lines).split()))
    return text if len(text) <= _LONGEST else text[:_LONGEST].rsplit(" ", 1)[0] + " ..."


def _option_names(verb: str) -> Callable[[str, str | None], str]:
    """Maps library arguments to command-line options. Parameters of verbs have the same names as in the library."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    parameters = {one.name: one for one in commands[verb].params} if verb in commands else {}

    def named(name: str, value: str | None) -> str:
        parameter = parameters.get(name)
        if parameter is None:
            return name if value is None else f"{name}={value}"
        if parameter.param_type_name == "argument":
            return str(parameter.metavar)
        if value in (None, "True"):
            return str(parameter.opts[-1])
        if value == "False":
            return str(parameter.secondary_opts[-1])
        return f"{parameter.opts[-1]} {value.lower() if value == 'None' else value}"

    return named


if __name__ == "__main__":
    main()
