"""Output folders that appear only when complete, and names that are safe to publish.

A folder is first written to a hidden one beside it, `.NAME.XXXXXXXX.partial`, which holds a lock while its process
runs. If the process is killed, the next run for the same folder detects this by the lock, removes the hidden folder and
restores a folder that was being replaced.
"""

from __future__ import annotations

import contextlib
import itertools
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

# Written to a model's folder by `evaluate`, and added to its card by `push`.
EVALUATION_FILE = "evaluation.json"
# Files of a checkpoint besides its weights. Everything else in its folder, such as the logs and samples of a training
# run, may contain private data and is neither copied nor uploaded.
COMPANIONS = (
    "*config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken",
    "*.model", "chat_template*", "additional_chat_templates", "configuration_*.py", "modeling_*.py",
    "tokenization_*.py", "processing_*.py", "*_processing*.py", "README.md", "LICENSE*", "NOTICE*", "USE_POLICY.md",
    ".gitattributes",
)  # fmt: skip
WEIGHTS = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json", "*.gguf"
)  # fmt: skip
MEASURED = (
    "pruning_plan.json", EVALUATION_FILE, "diagnosis.json", "compare.json", "report.html", "*.png", "*.svg"
)  # fmt: skip
_LOCAL = ("training_args.bin",)
_LONGEST_NAME = 200  # bytes; file systems allow 255, and a suffix is added


def require_free(
    target: Path, read_from: Iterable[Any], shown: str, force: bool, mark: str = "config.json", what: str = "checkpoint"
) -> None:
    """Refuses, before anything is computed, an output folder that cannot be written or replaced.

    Leftovers of an interrupted run for the same folder are cleaned up first.

    Args:
        target: absolute path of the output folder.
        read_from: inputs; paths among them must not be, contain or be inside the target.
        shown: the output folder as the user named it.
        force: whether to allow replacing a folder that contains the file `mark`, which identifies a `what`, and only
            files that this package writes.
    """
    require_place(target, shown)
    for one in read_from:
        if isinstance(one, (str, os.PathLike)) and str(one) and Path(one).exists():
            read = Path(one).resolve()
            if target in (read, *read.parents) or read in target.parents:
                raise ArgumentError("out", shown, problem=f"must not be, contain or be inside the input ({one})")
    if target in (Path.cwd(), *Path.cwd().parents):
        raise ArgumentError("out", shown, problem="is or contains the current folder", hint="choose another folder")
    _clean_up_after_killed_runs(target)
    if _is_free(target):
        return
    problem, hint = "", "choose another folder"
    if not force:
        problem, hint = "exists and is not empty", f"{hint}, or use `force=True` to replace it"
    elif not (target / mark).is_file():
        problem, hint = f"is not a {what}, so it is not replaced", ""
    elif foreign := _foreign_file(target):
        problem = f"contains {foreign!r}, which is not part of a {what}, so it is not replaced"
    if problem:
        raise PathExistsError("out", shown, problem=problem, hint=hint)


def require_place(path: Path, shown: str, argument: str = "out") -> None:
    """Refuses an output path that cannot be created."""
    above = next(one for one in path.absolute().parents if one.exists())
    if not above.is_dir():
        raise ArgumentError(argument, shown, problem=f"cannot be created: {str(above)!r} is a file")
    if not os.access(above, os.W_OK):
        raise ArgumentError(argument, shown, problem=f"cannot be created: {str(above)!r} is not writable")
    if len(os.fsencode(path.name)) > _LONGEST_NAME:
        raise ArgumentError(argument, shown, problem=f"has a name longer than {_LONGEST_NAME} bytes")


def _is_free(target: Path) -> bool:
    return not target.exists() or (target.is_dir() and not any(target.iterdir()))


def _foreign_file(target: Path) -> str | None:
    """The first entry of a folder that is not part of a checkpoint, a diagnosis or an evaluation."""
    ours = (*COMPANIONS, *WEIGHTS, *MEASURED, *_LOCAL)
    return next((name for name in sorted(os.listdir(target)) if not any(fnmatch(name, one) for one in ours)), None)


def files_of(folder: Path, patterns: Iterable[str]) -> list[str]:
    """The files of a folder that match a pattern by their name or by their top-level folder."""
    matching = [entry for entry in folder.iterdir() if any(fnmatch(entry.name, pattern) for pattern in patterns)]
    files = itertools.chain.from_iterable(entry.rglob("*") if entry.is_dir() else [entry] for entry in matching)
    return sorted(file.relative_to(folder).as_posix() for file in files if file.is_file())


def public_name(name: str) -> str:
    """A Hub name unchanged, but only the last component of a local path, which may be private."""
    path = name.startswith(("/", "./", "../", "~")) or os.path.isabs(name) or os.path.exists(name)
    return os.path.basename(os.path.normpath(name)) if path else name


def public_command(words: Iterable[str]) -> str:
    """A command line with paths, also in `--option=path`, replaced by their public names."""
    shown = []
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        shown.append(option + equals + (public_name(value) if value else ""))
    return shlex.join(shown)


@contextmanager
def atomic_directory(target: Path, force: bool = False) -> Iterator[Path]:
    """Yields a new folder to write to, which replaces the target on success and is removed on failure.

    With `force`, an existing checkpoint is replaced. If anything else has appeared at the target in the meantime, an
    error is raised and the result is kept beside it.
    """
    with scratch_folder(target) as scratch:
        partial, replaced = scratch / "new", scratch / "old"
        partial.mkdir()
        yield partial
        if not _is_free(target) and (not force or not target.is_dir() or _foreign_file(target)):
            kept = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}-"))
            os.replace(partial, kept)
            raise PathExistsError(
                "out", str(target), problem=f"has appeared in the meantime and is kept; the result is in {kept}"
            )
        try:
            if target.exists():
                os.replace(target, replaced)
            os.replace(partial, target)
        except BaseException:  # including SIGTERM, which may arrive right after either call
            if replaced.exists() and not target.exists():
                os.replace(replaced, target)
            raise


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """Yields a hidden folder beside the target. If this process is killed, the next run for the target removes it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _clean_up_after_killed_runs(target)
    scratch = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    lock = FileLock(scratch / ".lock")
    with contextlib.ExitStack() as cleanup:
        # Registered twice, and before the folder exists, since SIGTERM may interrupt either step.
        for _ in range(2):
            cleanup.callback(shutil.rmtree, scratch, ignore_errors=True)
        cleanup.callback(lock.release)
        scratch.mkdir()
        lock.acquire()
        yield scratch


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file that is complete whenever it exists."""
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
        # Suppressed: the run is still active, or the folder belongs to another user.
        with contextlib.suppress(Timeout, OSError):
            lock.acquire(timeout=0)
            if (left / "old").is_dir() and not target.exists():
                os.replace(left / "old", target)
                logger.warning("restored %s, which an interrupted run was replacing", target)
            lock.release()
            shutil.rmtree(left, ignore_errors=True)
            logger.warning("removed %s, left behind by a killed run", left)
