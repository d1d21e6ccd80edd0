"""Folders that appear under their name when they are complete, and the names by which others may know them."""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def require_free(
    target: Path, read_from: Iterable[Any], shown: str, force: bool, mark: str = "config.json", what: str = "checkpoint"
) -> None:
    """Refuses a folder to write that is not empty, or that holds what is read; before anything is computed.

    With `force` a folder is replaced that holds the file `mark`, by which it is known as `what`.
    """
    for one in read_from:
        if isinstance(one, (str, os.PathLike)) and str(one) and Path(one).exists():
            read = Path(one).resolve()
            if target in (read, *read.parents) or read in target.parents:
                raise ValueError(f"--out {shown!r} must not be, hold or lie in what is read ({one})")
    if target == Path.cwd():
        raise ValueError(f"--out {shown!r} is the current folder; choose another")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not force:
        raise FileExistsError(f"--out {shown!r} exists and is not empty; choose another folder or use --force")
    if not (target / mark).is_file():
        raise FileExistsError(f"--out {shown!r} is no {what}; --force replaces only what it could have written")


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
def atomic_directory(target: Path) -> Iterator[Path]:
    """A new folder to write into, beside the target; it takes the target's place at the end, and is gone on failure."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        partial = Path(scratch) / "partial"
        partial.mkdir()
        yield partial
        replaced = Path(scratch) / "replaced"
        if target.exists():
            os.replace(target, replaced)
        try:
            os.replace(partial, target)
        except BaseException:
            if replaced.exists():
                os.replace(replaced, target)
            raise
