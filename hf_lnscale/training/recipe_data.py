"""What is trained on, and what is held out of it: from the Hub, from files, or from Python itself."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import is_conversational

from ..measuring import sample
from .arguments import ChatConfig, DataArguments
from .scripts import recipes_folder

# Of a text file, so many lines are one row: rows are what is shuffled and held out.
LINES_A_ROW = 100
BUILDERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load_text(arguments: DataArguments, column: str, seed: int) -> tuple[Any, Any]:
    """Text to train on and text that is held out, each with the one column `column`.

    Raises:
        ValueError: if there is no such column, no text in it, or no row; the message names the dataset and what it has.
        FileNotFoundError: if a path does not exist.
    """
    if arguments.dataset_name is None:
        embedded = Dataset.from_dict({column: sample.documents()})
        return _held_out(arguments, embedded, seed, lambda data, name: data)

    def only_text(data: Any, name: str) -> Any:
        if column not in (has := _first_row(data, name)):
            raise ValueError(f"dataset_text_field: {name!r} has no column {column!r}; it has {', '.join(has)}")
        if not isinstance(has[column], (str, type(None))):
            raise ValueError(
                f"dataset_text_field: column {column!r} of {name!r} holds {has[column]!r}, which is no text"
            )
        data = data.filter(_has_text, input_columns=column, batched=True)  # the rest would be rows of nothing but EOS
        # Any other column could make TRL take the rows for something else than text.
        return data.select_columns([column])

    return _held_out(arguments, _load(arguments, arguments.dataset_train_split), seed, only_text)


def load_conversations(arguments: DataArguments, seed: int) -> tuple[Any, Any]:
    """Chats (`messages`), or prompts with completions, to train on and held out.

    Raises:
        ValueError: if there are no such columns, or no row; the message names the dataset and what it has.
        FileNotFoundError: if a path does not exist.
    """
    if arguments.dataset_name is None:
        return _held_out(arguments, Dataset.from_list(sample.conversations()), seed, lambda data, name: data)

    def only_conversations(data: Any, name: str) -> Any:
        has = list(_first_row(data, name))
        for wanted in (["messages"], ["prompt", "completion"], ["conversations"]):
            if set(wanted) <= set(has):
                return data.select_columns(wanted + [more for more in ("tools", "chat_template_kwargs") if more in has])
        raise ValueError(
            f"dataset_name: {name!r} has columns {', '.join(has)}; sft.py reads 'messages', or 'prompt' and "
            "'completion'" + ("; for raw text there is continue_pretrain.py" if "text" in has else "")
        )

    return _held_out(arguments, _load(arguments, arguments.dataset_train_split), seed, only_conversations)


def prepare_chat(training: ChatConfig, tokenizer: Any, train: Any) -> None:
    """Settles for the data which chat template there is, and whether only the assistant's answers are learned.

    Raises:
        ValueError: if the data is a chat and there is no template for it, or one that does not mark the answers.
    """
    if training.chat_template_path == "chatml":
        training.chat_template_path = str(recipes_folder() / "configs" / "chatml.jinja")
    row = next(iter(train))
    if training.assistant_only_loss is None:
        training.assistant_only_loss = "prompt" not in row and not isinstance(row.get("text"), str)
    if not is_conversational(row) and "conversations" not in row:
        return
    path = training.chat_template_path
    advice = "name one with --chat_template_path: chatml, a .jinja file, or the tokenizer of a chat model"
    if path is None:
        template = tokenizer.chat_template
        if not template:
            raise ValueError(f"the tokenizer of {tokenizer.name_or_path!r} has no chat template; {advice}")
    elif path.endswith((".jinja", ".j2")):
        if not Path(path).is_file():
            raise FileNotFoundError(f"chat_template_path: there is no file {path!r}")
        template = tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    else:
        return
    if training.assistant_only_loss and not has_generation_markers(template):
        try:
            get_training_chat_template(tokenizer)
        except ValueError:
            raise ValueError(
                f"the chat template of {path or tokenizer.name_or_path!r} does not say which tokens are the "
                f"assistant's; {advice}, or learn all tokens with --assistant_only_loss false"
            ) from None


def first_texts(data: Any, column: str, characters: int = 20_000_000) -> Iterable[str]:
    """The texts of a dataset from its start, as many as fit: enough to train a tokenizer on."""
    for row in data:
        if characters <= 0:
            return
        yield row[column]
        characters -= len(row[column])


def _held_out(arguments: DataArguments, train: Any, seed: int, only: Any) -> tuple[Any, Any]:
    """Picks the columns, and what to evaluate on: other data, a split, or rows that are taken out of training."""
    name = arguments.dataset_name or "the text that comes with Python"
    if arguments.eval_samples < 1:
        raise ValueError(f"eval_samples must be at least 1, got {arguments.eval_samples}")
    train = only(train, name)
    other = arguments.eval_dataset_name
    if other or (arguments.dataset_test_split and _has_splits(arguments)):
        split = arguments.dataset_test_split or "train"
        evaluation = only(_load(arguments, split, other), other or f"{name}, split {split}")
        return train, _first(evaluation, arguments.eval_samples)
    if isinstance(train, IterableDataset):
        rest = train.skip(arguments.eval_samples)
        if next(iter(rest), None) is None:
            raise ValueError(
                f"eval_samples: the first {arguments.eval_samples} rows of {name!r} are held out, and no other is left "
                "to train on; lower --eval_samples, or do not stream"
            )
        return rest, _first(train, arguments.eval_samples)
    if len(train) < 2:
        raise ValueError(
            f"dataset_name: {name!r} has a single row, of which none can be held out to evaluate on; name other data "
            "with --eval_dataset_name"
        )
    held_out = min(arguments.eval_samples, max(1, len(train) // 10))
    parts = train.train_test_split(test_size=held_out, seed=seed)
    return parts["train"], parts["test"]


def _has_text(texts: list[str | None]) -> list[bool]:
    return [bool(text) for text in texts]


def _first(data: Any, rows: int) -> Dataset:
    """The first rows, in memory: of a stream, Trainer could not tell which of the last ones it has seen twice."""
    if isinstance(data, IterableDataset):
        return Dataset.from_list(list(data.take(rows)), features=data.features)
    return data.select(range(min(rows, len(data))))


def _has_splits(arguments: DataArguments) -> bool:
    """Whether there is a split to evaluate on. A file has none; of a folder, files of its name or in a folder of it."""
    path, split = Path(arguments.dataset_name or ""), arguments.dataset_test_split
    assert split is not None
    return not path.exists() or (path.is_dir() and any(_is_of(file, path, split) for file in path.rglob("*")))


def _is_of(file: Path, folder: Path, split: str) -> bool:
    named = re.fullmatch(rf"{re.escape(split)}([-_.].*)?", file.stem) is not None
    return file.suffix in BUILDERS and (named or split in file.relative_to(folder).parts[:-1])


def _load(arguments: DataArguments, split: str, name: str | None = None) -> Any:
    given = name or arguments.dataset_name
    assert given is not None
    path = Path(given)
    if not path.exists():
        if path.suffix in BUILDERS or given.startswith((".", "/")):
            raise FileNotFoundError(f"dataset_name: there is no file {given!r}")
        configuration = None if name else arguments.dataset_config
        return load_dataset(given, configuration, split=split, streaming=arguments.dataset_streaming)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in BUILDERS)
    if name is None and path.is_dir():
        test = arguments.dataset_test_split if split == arguments.dataset_train_split else None
        files = [file for file in files if _is_of(file, path, split)] or [
            file for file in files if test is None or not _is_of(file, path, test)
        ]
    kinds = {BUILDERS.get(file.suffix) for file in files}
    if len(kinds) != 1 or None in kinds:
        what = "holds none of" if not kinds else "mixes, or is not one of,"
        raise ValueError(f"dataset_name: {given!r} {what} {', '.join(BUILDERS)}")
    if not any(file.stat().st_size for file in files):
        raise ValueError(f"dataset_name: {given!r} is empty")
    (kind,) = kinds
    paths = [str(file.resolve()) for file in files]
    data = load_dataset(str(kind), data_files={split: paths}, split=split, streaming=arguments.dataset_streaming)
    if kind == "text":
        data = data.map(_join_lines, batched=True, batch_size=LINES_A_ROW)
    return data


def _join_lines(rows: dict[str, list[str]]) -> dict[str, list[str]]:
    return {"text": ["\n".join(rows["text"])]}


def _first_row(data: Any, name: str) -> dict[str, Any]:
    first = next(iter(data), None)
    if first is None:
        raise ValueError(f"dataset_name: {name!r} is empty")
    return first
