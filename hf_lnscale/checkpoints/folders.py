"""Folders that appear under their name when they are complete, and the names by which others may know them.

A folder is written into a hidden one beside it, `.NAME.XXXXXXXX.partial`, which holds a lock for as long as its process
lives. What a killed process leaves is found by that lock: the next run for the same folder removes it, and puts back a
folder that was being replaced.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shlex
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from glob import escape as glob_escape
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..core.errors import ArgumentError, PathExistsError

logger = logging.getLogger(__name__)

# Written by `evaluate` into a model's folder, and put into its card by `push`.
EVALUATION_FILE = "evaluation.json"
# Files of a checkpoint, a diagnosis or an evaluation. Only folders that hold nothing else are replaced.
_OURS = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json", "*.gguf",
    "*config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken",
    "chat_template*", "chat_templates", "additional_chat_templates", "README.md", "LICENSE*", "NOTICE*",
    "USE_POLICY.md", ".gitattributes", "pruning_plan.json", EVALUATION_FILE, "diagnosis.json", "compare.json",
    "report.html", "*.png", "*.svg", "training_args.bin", "configuration_deci.py",
)  # fmt: skip
_LONGEST_NAME = 200  # bytes; file systems take 255, and a suffix is added


def require_free(
    target: Path, read_from: Iterable[Any], shown: str, force: bool, mark: str = "config.json", what: str = "checkpoint"
) -> None:
    """Refuses an output folder that could not be written or replaced, before anything is computed.

    What an interrupted run for the same folder has left is cleaned up first.

    Args:
        target: the folder to write, absolute; `shown` is how the user named it.
        read_from: what is read; paths among it must neither be, hold nor lie in the target.
        force: whether a folder may be replaced that holds the file `mark`, by which a `what` is known, and nothing that
            is not written here.
    """
    if len(os.fsencode(target.name)) > _LONGEST_NAME:
        raise ArgumentError("out", shown, problem=f"has a name of more than {_LONGEST_NAME} bytes")
    for one in read_from:
        if isinstance(one, (str, os.PathLike)) and str(one) and Path(one).exists():
            read = Path(one).resolve()
            if target in (read, *read.parents) or read in target.parents:
                raise ArgumentError("out", shown, problem=f"must not be, hold or lie in what is read ({one})")
    if target in (Path.cwd(), *Path.cwd().parents):
        raise ArgumentError("out", shown, problem="is or holds the current folder", hint="choose another folder")
    _clean_up_after_killed_runs(target)
    if _is_free(target):
        return
    problem, hint = "", "choose another folder"
    if not force:
        problem, hint = "exists and is not empty", f"{hint}, or use `force=True` to replace it"
    elif not (target / mark).is_file():
        problem, hint = f"is not a {what}; only what could have been written by this is replaced", ""
    elif stranger := _stranger(target):
        problem = f"holds {stranger!r}, which no {what} has; it is not replaced"
    if problem:
        raise PathExistsError("out", shown, problem=problem, hint=hint)


def _is_free(target: Path) -> bool:
    return not target.exists() or (target.is_dir() and not any(target.iterdir()))


def _stranger(target: Path) -> str | None:
    """The first entry of a folder that this package would not have written."""
    return next((name for name in sorted(os.listdir(target)) if not any(fnmatch(name, one) for one in _OURS)), None)


def public_name(name: str) -> str:
    """A name on the Hub as it is, of a local path only the last part: where it lies is nobody's business."""
    path = name.startswith(("/", "./", "../", "~")) or os.path.isabs(name) or os.path.exists(name)
    return os.path.basename(os.path.normpath(name)) if path else name


def public_command(words: Iterable[str]) -> str:
    """A command line, with paths and the values of `--option=path` by their public names."""
    shown = []
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        shown.append(option + equals + (public_name(value) if value else ""))
    return shlex.join(shown)


@contextmanager
def atomic_directory(target: Path, force: bool = False) -> Iterator[Path]:
    """A new folder to write into; it takes the target's place at the end, and is gone on failure.

    With `force` a checkpoint that is there is replaced. Anything else that has appeared under the name meanwhile is an
    error, and the result is kept beside it.
    """
    with scratch_folder(target) as scratch:
        partial, replaced = scratch / "new", scratch / "old"
        partial.mkdir()
        yield partial
        if not _is_free(target) and (not force or not target.is_dir() or _stranger(target)):
            kept = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}-"))
            os.replace(partial, kept)
            raise PathExistsError(
                "out", str(target), problem=f"was filled meanwhile and is left alone; the result is in {kept}"
            )
        try:
            if target.exists():
                os.replace(target, replaced)
            os.replace(partial, target)
        except BaseException:  # SIGTERM among them, which can also come right after either
            if replaced.exists() and not target.exists():
                os.replace(replaced, target)
            raise


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside a file or folder to be; if this process is killed, the next for that target removes it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _clean_up_after_killed_runs(target)
    scratch = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    lock = FileLock(scratch / ".lock")
    with contextlib.ExitStack() as cleanup:
        # Twice, and before it is made: SIGTERM can come amid either.
        for _ in range(2):
            cleanup.callback(shutil.rmtree, scratch, ignore_errors=True)
        cleanup.callback(lock.release)
        scratch.mkdir()
        lock.acquire()
        yield scratch


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file that is complete whenever it is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _clean_up_after_killed_runs(target: Path) -> None:
    for left in target.parent.glob(f".{glob_escape(target.name)}.*.partial"):
        lock = FileLock(left / ".lock")
        # A run that is still going on, or a folder that is not ours to touch.
        with contextlib.suppress(Timeout, OSError):
            lock.acquire(timeout=0)
            _remove(left, lock, target)
            logger.warning("removed %s, which a killed run had left", left)


def _remove(scratch: Path, lock: FileLock, target: Path) -> None:
    """Removes a scratch folder; what was being replaced goes back if nothing has taken its place."""
    if (scratch / "old").is_dir() and not target.exists():
        os.replace(scratch / "old", target)
        logger.warning("put back %s, which a run that did not end was replacing", target)
    lock.release()
    shutil.rmtree(scratch, ignore_errors=True)
