"""Data for the recipes: loaded from the Hub, files or Python itself, validated row by row, mixed and split."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset
from trl.scripts.utils import DatasetConfig
from trl.trainer.utils import remove_none_values

from .._version import __version__
from ..measuring import sample
from ..measuring.text_files import SUFFIXES, file_kind, read_rows
from .arguments import DataArguments
from .chats import features_of, kind_of, to_chat

# A text file in a folder is one document, unless it is larger than this many bytes. Larger files, and files named
# individually, are split into rows of LINES_A_ROW lines, since rows are the unit of shuffling and holding out.
LARGE_FILE = 1 << 20
LINES_A_ROW = 100

Row = dict[str, Any]
Convert = Callable[..., "Row | None"]  # (row, location, columns to read) -> row, or None to skip it
Split = tuple[Any, Any]  # (training data, evaluation data)


def load_text(arguments: DataArguments, column: str, seed: int) -> Split:
    """Loads text for training and evaluation, with the single column `column`.

    Raises:
        ValueError: if a row has no text in the column, or there are no rows; the message names the row or the dataset.
        FileNotFoundError: if a path does not exist.
    """
    return _load_split(arguments, seed, partial(_to_text, column=column), column)


def load_conversations(arguments: DataArguments, seed: int) -> Split:
    """Like `load_text` for chats, or prompts with completions."""
    return _load_split(arguments, seed, to_chat)


def load_text_or_chats(arguments: DataArguments, column: str, seed: int) -> Split:
    """Like `load_text` for rows with such a column, or if no data is named; otherwise like `load_conversations`."""
    return _load_split(arguments, seed, partial(_to_text_or_chat, column=column), column)


def other_text(arguments: DataArguments, column: str) -> Dataset:
    """Text shipped with Python that differs in kind from the training data: English, or code if that is English."""
    kind = "english" if arguments.dataset_name or arguments.datasets else "python"
    return Dataset.from_dict({column: sample.default_sources()[kind][: arguments.eval_samples]})


def first_texts(data: Any, column: str, characters: int = 20_000_000) -> Iterable[str]:
    """Texts from the start of a dataset, about `characters` characters in total, to train a tokenizer on."""
    for row in data:
        if characters <= 0:
            return
        yield row[column]
        characters -= len(row[column])


def _to_text(row: Row, where: str, columns: list[str] | None, column: str) -> Row | None:
    """The text of a row; None if it is empty, since only an end-of-text token would be left."""
    source = columns[0] if columns and column not in columns else column
    if source not in row:
        raise ValueError(f"dataset_text_field: {where} has no column {source!r}; it has {', '.join(map(str, row))}")
    text = row[source]
    if not isinstance(text, (str, type(None))):
        raise ValueError(f"dataset_text_field: column {source!r} of {where} is {text!r}, which is not text")
    return {column: text} if text else None


def _to_text_or_chat(row: Row, where: str, columns: list[str] | None, column: str) -> Row | None:
    is_text = column in row or (columns and isinstance(row.get(columns[0]), str))
    return _to_text(row, where, columns, column) if is_text else to_chat(row, where, columns)


def _load_split(arguments: DataArguments, seed: int, convert: Convert, column: str | None = None) -> Split:
    """Loads a dataset, a mixture or the text shipped with Python (in `column`, or as chats), and evaluation data: other
    data, a split, or rows held out of training."""
    name, wanted, test = arguments.dataset_name, arguments.eval_samples, arguments.dataset_test_split
    parts = arguments.datasets
    if name:
        parts = [DatasetConfig(name, arguments.dataset_config, split=arguments.dataset_train_split)]
    shown = ", ".join(repr(part.path) for part in parts) or "the text shipped with Python"
    if parts:
        train = _mixture(parts, arguments.streaming, convert, test if name else None, seed)
    elif column:
        train = Dataset.from_dict({column: sample.documents()})
    else:
        train = Dataset.from_list(sample.conversations())
    if other := arguments.eval_dataset_name or (name if name and test and _has_split(Path(name), test) else None):
        configuration = arguments.dataset_config if other == name else None
        part = DatasetConfig(other, configuration, split=test or "train")
        return train, _first(_load(part, arguments.streaming, convert), wanted)
    if isinstance(train, IterableDataset):
        rest = train.skip(wanted)
        if next(iter(rest), None) is None:
            raise ValueError(f"eval_samples: {shown} has at most {wanted} rows, so none are left to train on")
        return rest, _first(train, wanted)
    if len(train) < 2:
        raise ValueError(f"dataset_name: {shown} has only one row; name evaluation data with --eval_dataset_name")
    both = train.train_test_split(test_size=min(wanted, max(1, len(train) // 10)), seed=seed)
    return both["train"], both["test"]


def _mixture(parts: list[DatasetConfig], streaming: bool, convert: Convert, test: str | None, seed: int) -> Any:
    """Concatenates datasets, or samples from them by fraction, without replacement, until one is exhausted."""
    loaded = [_load(part, streaming, convert, test) for part in parts]
    if len({tuple(data.features) for data in loaded}) > 1:
        kinds = [f"{part.path!r} has {', '.join(data.features)}" for part, data in zip(parts, loaded, strict=True)]
        raise ValueError(f"datasets: all must be of the same kind; {'; '.join(kinds)}")
    if all(part.fraction is None for part in parts):
        return datasets.concatenate_datasets(loaded)
    fractions = [part.fraction or 0.0 for part in parts]
    if min(fractions) <= 0:
        raise ValueError(f"datasets: fraction must be positive for all or omitted for all, got {fractions}")
    shares = [fraction / sum(fractions) for fraction in fractions]
    return datasets.interleave_datasets(loaded, shares, seed=seed, stopping_strategy="first_exhausted")


def _first(data: Any, rows: int) -> Dataset:
    """The first rows, in memory, since with a stream Trainer cannot tell which of the last rows are duplicates."""
    return Dataset.from_list(list(itertools.islice(data, rows)), features=data.features)


def _load(part: DatasetConfig, streaming: bool, convert: Convert, test: str | None = None) -> Any:
    """Loads one dataset and converts its rows, excluding files of the split `test`."""
    path, raw = Path(part.path), None
    given: dict[str, Any] = {"convert": partial(convert, columns=part.columns)}
    if path.exists() and not _is_saved(path):
        given["files"] = [
            # Size and time of change only serve as part of the cache key.
            (file, path.is_dir(), file.stat().st_size, file.stat().st_mtime_ns)
            for file in _files(path, part.split, test)
        ]
        first = next(_file_rows(**given), None)
    else:
        raw = _load_raw(part, streaming)
        given |= {"name": repr(part.path), "typed": "Json(" not in repr(raw.features)}
        first = next(_raw_rows(enumerate(raw), **given), None)
    if first is None:
        raise ValueError(f"dataset_name: {part.path!r} is empty or has no row with text")
    # The version is part of the cache key, since other releases may convert rows differently.
    given |= {"kind": kind_of(first), "version": __version__}
    features = features_of(first)
    if raw is None:
        make = IterableDataset.from_generator if streaming else Dataset.from_generator
        return make(_file_rows, gen_kwargs=given, features=features)
    return raw.map(
        _convert_batch, batched=True, with_indices=True, remove_columns=list(next(iter(raw))), features=features,
        fn_kwargs={"columns": list(first), **given},
    )  # fmt: skip


def _load_raw(part: DatasetConfig, streaming: bool) -> Any:
    """Loads a dataset from the Hub, or one written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    path = Path(part.path)
    if not path.exists():
        if path.suffix in SUFFIXES or part.path.startswith((".", "/")):
            raise FileNotFoundError(f"dataset_name: there is no file {part.path!r}")
        where = {"data_dir": part.data_dir, "data_files": part.data_files}
        return datasets.load_dataset(part.path, part.name, **where, split=part.split, streaming=streaming)
    data = datasets.load_from_disk(part.path)
    if isinstance(data, datasets.DatasetDict):
        if part.split not in data:
            raise ValueError(f"dataset_name: {part.path!r} has no split {part.split!r}; it has {', '.join(data)}")
        data = data[part.split]
    return data.to_iterable_dataset() if streaming else data


def _converted(rows: Iterable[tuple[str, Row]], convert: Convert, kind: str | None) -> Iterator[Row]:
    """Converts rows, given with their locations, and checks that all are of the same kind, if it is given."""
    for where, row in rows:
        if (converted := convert(row, where)) is not None:
            if kind not in (None, found := kind_of(converted)):
                raise ValueError(f"dataset_name: {where} has {found}, but the first row {kind}; all rows must be alike")
            yield converted


def _raw_rows(
    rows: Iterable[tuple[int, Row]], name: str, typed: bool, convert: Convert, kind: str | None = None
) -> Iterator[Row]:
    clean = _without_nulls if typed else dict
    return _converted(((f"row {index + 1} of {name}", clean(row)) for index, row in rows), convert, kind)


def _convert_batch(
    batch: dict[str, list[Any]], indices: list[int], columns: list[str], version: str, **given: Any
) -> dict[str, list[Any]]:
    rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
    kept = list(_raw_rows(zip(indices, rows, strict=True), **given))
    return {column: [row[column] for row in kept] for column in columns}


def _without_nulls(row: Row) -> Row:
    """Removes nulls within columns: in a typed table, every tool call has the arguments of all others."""
    return {**dict.fromkeys(row), **remove_none_values(row)}


# --- files ----------------------------------------------------------------------------------------------------------


def _files(path: Path, split: str, test: str | None) -> list[Path]:
    """The files of a split: those named after it or in a folder of that name, else all except the test split's."""
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file_kind(file) and file.is_file())
        files = [file for file in files if _in_split(file, path, split)] or [
            file for file in files if test is None or not _in_split(file, path, test)
        ]
    kinds = {file_kind(file) for file in files}
    if len(kinds) != 1 or None in kinds:
        what = "mixes, or is not one of," if kinds else "contains none of"
        raise ValueError(f"dataset_name: {str(path)!r} {what} {', '.join(SUFFIXES)} (or .gz of these)")
    return [file.resolve() for file in files]


def _in_split(file: Path, folder: Path, split: str) -> bool:
    named = re.fullmatch(rf"{re.escape(split)}([-_.].*)?", file.stem) is not None
    return file_kind(file) is not None and (named or split in file.relative_to(folder).parts[:-1])


def _has_split(path: Path, split: str) -> bool:
    """Whether a path has a split: a folder does if files or a folder in it are named after it; a file never does."""
    if _is_saved(path):
        return (path / split).is_dir()
    return not path.exists() or any(_in_split(file, path, split) for file in path.rglob("*"))


def _is_saved(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _file_rows(
    files: list[tuple[Path, bool, int, int]], convert: Convert, kind: str | None = None, version: str = ""
) -> Iterator[Row]:
    rows = itertools.chain.from_iterable(_read(path, in_folder) for path, in_folder, *_ in files)
    return _converted(rows, convert, kind)


def _read(path: Path, in_folder: bool) -> Iterator[tuple[str, Row]]:
    """Yields the rows of a file as dicts, each with its location for error messages."""
    kind, whole = file_kind(path), in_folder and path.stat().st_size <= LARGE_FILE
    for where, row in read_rows(path, "dataset_name", None if whole else LINES_A_ROW):
        if kind == "json" and not isinstance(row, dict):
            raise ValueError(f"dataset_name: {where} is not a JSON object, but {str(row)[:60]!r}")
        yield where, {"text": row} if kind == "text" else _without_nulls(row) if kind == "parquet" else row
