"""Reads files of text row by row: plain text, JSON (lines or one list), CSV, TSV and parquet; also gzipped."""

from __future__ import annotations

import csv
import gzip
import itertools
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..core.errors import require_packages
from ..core.json_file import parse

SUFFIXES = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}


def file_kind(path: Path) -> str | None:
    """The value of `SUFFIXES` for a file, compressed or not; None for another suffix."""
    return SUFFIXES.get(_suffix(path))


def read_rows(path: Path, argument: str, lines_per_row: int | None = None) -> Iterator[tuple[str, Any]]:
    """Yields the rows of a file, each with its location for error messages.

    A row is a text, a value of JSON, or a dict of the columns. A file of an unknown kind is read as text.

    Args:
        argument: the argument that error messages name.
        lines_per_row: how many lines of a text file are a row; by default the whole file is one.

    Raises:
        ValueError: if the file cannot be read as what its suffix says.
        ImportError: for parquet, if pyarrow is not installed.
    """
    kind, name = file_kind(path), repr(path.name)
    if kind == "parquet":
        require_packages("reading .parquet", "train", "pyarrow")
        import pyarrow.parquet

        unreadable: tuple[type[Exception], ...] = (pyarrow.ArrowInvalid,)
    else:
        unreadable = (UnicodeDecodeError, gzip.BadGzipFile, EOFError, csv.Error)
    try:
        if kind == "parquet":
            batches = pyarrow.parquet.ParquetFile(path).iter_batches(1000)
            yield from _numbered(name, itertools.chain.from_iterable(batch.to_pylist() for batch in batches))
            return
        opened: Any = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8-sig", newline="" if kind == "csv" else None) as lines:
            if kind == "csv":
                csv.field_size_limit(2**31 - 1)  # the maximum on all platforms
                delimiter = "\t" if _suffix(path) == ".tsv" else ","
                yield from _numbered(name, csv.DictReader(lines, delimiter=delimiter))
            elif kind == "json":
                yield from _read_json(lines, argument, name, may_be_list=_suffix(path) == ".json")
            elif lines_per_row is None:
                yield name, lines.read()
            else:
                while block := "".join(itertools.islice(lines, lines_per_row)):
                    yield name, block.removesuffix("\n")
    except unreadable as error:
        raise ValueError(f"{argument}: cannot read {name}: {error}") from None


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def _numbered(name: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"row {number} of {name}", row) for number, row in enumerate(rows, 1))


def _read_json(lines: Iterable[str], argument: str, name: str, may_be_list: bool) -> Iterator[tuple[str, Any]]:
    """Yields the values in JSON lines, or in a file that is a single list of rows."""
    if may_be_list:
        lines, start = iter(lines), []  # lines that are read already, since a pipe cannot be read twice
        for line in lines:
            start.append(line)
            if line.strip():
                break
        if start and start[-1].lstrip().startswith("["):
            start += lines
            rows: Any = None
            with suppress(ValueError):  # lists of token ids, one per line
                rows = parse("".join(start))
            if _is_list_of_rows(rows):
                yield from _numbered(name, rows)
                return
        lines = itertools.chain(start, lines)
    expected = 'expected JSON lines, one row per line, such as {"text": "..."}'
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"line {number} of {name}"
            try:
                row = parse(line)
            except ValueError as error:
                raise ValueError(f"{argument}: {where} is not JSON: {error}; {expected}") from None
            if _is_list_of_rows(row):
                raise ValueError(f"{argument}: {where} holds a list of rows; {expected}")
            yield where, row


def _is_list_of_rows(value: Any) -> bool:
    """Whether a value is a list of rows and not a row, which may be a list of token ids."""
    return isinstance(value, list) and any(isinstance(one, (dict, str, list)) for one in value)
