"""Converts text or token ids to batches."""

from __future__ import annotations

import hashlib
import itertools
import math
import numbers
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedModel

from ..core.config import is_integer
from ..core.display import brief
from ..core.json_file import parse
from .text_files import read_rows

# Name of the source if the data is not text.
TOKEN_IDS = "token ids"


@dataclass(frozen=True)
class Batch:
    """Sequences of token ids, all from one source of text."""

    input_ids: torch.Tensor  # shape (B, T)
    attention_mask: torch.Tensor  # shape (B, T), bool; False for padding, which all measurements ignore
    name: str = ""  # of the source

    @classmethod
    def of(cls, sequences: Sequence[torch.Tensor]) -> Batch:
        """Sequences of ids, shape (T,), padded on the right to the longest."""
        ids_BT = pad_sequence(list(sequences), batch_first=True)
        lengths_B = torch.tensor([len(ids) for ids in sequences])
        return cls(ids_BT, torch.arange(ids_BT.shape[1]) < lengths_B[:, None])

    def to(self, device: torch.device | str) -> Batch:
        return replace(self, input_ids=self.input_ids.to(device), attention_mask=self.attention_mask.to(device))

    @property
    def padded(self) -> bool:
        return not bool(self.attention_mask.all())

    def model_inputs(self) -> dict[str, torch.Tensor]:
        """Keyword arguments of a model's forward. Omits the mask if there is no padding, so that fast kernels apply."""
        if self.padded:
            return {"input_ids": self.input_ids, "attention_mask": self.attention_mask.long()}
        return {"input_ids": self.input_ids}


@dataclass(frozen=True)
class Windows:
    """How text is split into windows of tokens.

    Attributes:
        num_tokens: number of tokens to use, from the start of the text; None uses all.
        seq_len: tokens per window, at most `num_tokens`; None means 512, or the model's number of positions if that is
            smaller.
        batch_size: windows per batch.

    Raises:
        ValueError: if a size is too small; the message names it.
    """

    num_tokens: int | None = 65_536
    seq_len: int | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name, least in (("num_tokens", 2), ("seq_len", 2), ("batch_size", 1)):
            value = getattr(self, name)
            free = value is None and name != "batch_size"
            if not free and (not is_integer(value) or value < least):
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


@dataclass(eq=False, repr=False)
class TokenBatches:
    """Batches that can be iterated repeatedly, in the same order."""

    batches: list[Batch]  # on the CPU, at eight bytes per token
    source: str  # a description of the data's origin, stored in a plan's JSON
    # Name of each source -> its weight in a fit, independent of its number of tokens; 0 for text that is only used for
    # evaluation. Data without named sources is one source, named `source`.
    weights: dict[str, float] = field(default_factory=dict)
    tokenizer: Any = None  # of the text or token ids; None if unknown
    given: bool = True  # whether the text is the user's; False if it stands in for text that nobody gave

    def __post_init__(self) -> None:
        if not self.weights:
            self.weights = {self.source: 1.0}
            self.batches = [replace(batch, name=self.source) for batch in self.batches]

    @classmethod
    def join(cls, sources: Mapping[str, tuple[TokenBatches, float]]) -> TokenBatches:
        """Joins several sources: name -> (batches, weight)."""
        parts = {name: batches for name, (batches, _) in sources.items()}
        return cls(
            [replace(batch, name=name) for name, batches in parts.items() for batch in batches],
            ", ".join(name if name == one.source else f"{name}: {one.source}" for name, one in parts.items()),
            {name: weight for name, (_, weight) in sources.items()},
            next((batches.tokenizer for batches in parts.values() if batches.tokenizer), None),
        )

    def only(self, *names: str) -> TokenBatches:
        """The batches of some sources."""
        weights = {name: self.weights[name] for name in names}
        return replace(self, batches=[batch for batch in self.batches if batch.name in weights], weights=weights)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def num_tokens(self) -> int:
        """Number of tokens, excluding padding."""
        return sum(int(batch.attention_mask.sum()) for batch in self.batches)

    @property
    def num_sequences(self) -> int:
        return sum(len(batch.input_ids) for batch in self.batches)

    def describe(self) -> dict[str, Any]:
        """Describes the data: `source`, `num_tokens`, `num_sequences` and the `sha256` of ids and padding.

        With several sources, also `sources` with the `weight`, `num_tokens` and `num_sequences` of each.
        """
        digest = hashlib.sha256()
        for batch in self.batches:
            digest.update(repr(tuple(batch.input_ids.shape)).encode())
            digest.update(batch.input_ids.numpy().tobytes())
            digest.update(batch.attention_mask.numpy().tobytes())

        def sizes(part: TokenBatches) -> dict[str, int]:
            return {"num_tokens": part.num_tokens, "num_sequences": part.num_sequences}

        found = {"source": self.source, **sizes(self), "sha256": digest.hexdigest()}
        if len(self.weights) > 1:
            weights = self.weights.items()
            found["sources"] = {name: {"weight": weight, **sizes(self.only(name))} for name, weight in weights}
        return found

    def split(self, held_out: float, whole: Collection[str] = ()) -> tuple[TokenBatches, TokenBatches]:
        """Splits the sequences into calibration text and held-out text, taken from the end of each source.

        Args:
            held_out: fraction of each source's sequences to hold out, at least one sequence.
            whole: sources to hold out entirely.
        """
        parts: tuple[list[Batch], list[Batch]] = ([], [])
        for name in self.weights:
            source = self.only(name)
            total, seen = source.num_sequences, 0
            if total < 2 and name not in whole:
                of = f" of {name}" if len(self.weights) > 1 else ""
                raise ValueError(
                    f"data: {total} sequence(s) of tokens{of} cannot be split into calibration and held-out data; "
                    "use more text, a smaller seq_len, or separate held-out data"
                )
            first = 0 if name in whole else total - min(total - 1, max(1, round(total * held_out)))
            for batch in source:
                at = max(first - seen, 0)
                seen += len(batch.input_ids)
                for part, rows in zip(parts, (slice(0, at), slice(at, None)), strict=True):
                    if len(batch.input_ids[rows]):
                        part.append(Batch(batch.input_ids[rows], batch.attention_mask[rows], name))
        kept = {name: weight for name, weight in self.weights.items() if name not in whole}
        held_out_part = replace(self, batches=parts[1], source=f"{self.source}, held out", weights=dict(self.weights))
        return replace(self, batches=parts[0], weights=kept), held_out_part


def token_batches(
    data: Any, model: PreTrainedModel | None = None, *, tokenizer: Any = None, windows: Windows = Windows()
) -> TokenBatches:
    """Converts text, datasets, files or token ids to batches.

    Texts are tokenized, joined with the end-of-text token and split into `windows`, without padding. An incomplete
    last window is dropped, and blank texts are skipped. No more text is read than `windows.num_tokens` requires. If the
    tokenizer prepends a token (the `bos_token` of Llama or Gemma), every window starts with it, as in the model's
    training, and it counts as a token.

    Args:
        data: one of
            - texts: a list, or any iterable, of strings;
            - rows with a column "text" or "messages", such as a `datasets.Dataset`, streamed or not;
            - the path of a text file, or of a .jsonl, .json, .csv, .tsv or .parquet file of such rows; compressed files
              end in .gz;
            - token ids: a tensor or array of shape (B, T), a dict with "input_ids" and optionally "attention_mask", or
              an iterable of these or of lists of ids;
            - several sources of text: a dict {name: data} or {name: (data, weight)}, with data as above. The weight (1
              by default) is the source's weight in a fit and determines its number of tokens, at least two windows. A
              source of weight 0 is only evaluated.
        model: the model whose tokenizer is loaded if none is given.
        tokenizer: converts text to ids; not needed for token ids.
        windows: how texts are split. Batches of token ids are used as they are.

    Raises:
        ValueError: if the data is of an unknown type, has no known column or no text, or a size is not positive; the
            message names the argument.
        FileNotFoundError: if `data` is a string and no such file exists.
    """
    if isinstance(data, TokenBatches):
        return data
    if isinstance(data, Mapping) and hasattr(data, "column_names"):
        raise ValueError(f"data: choose a split of the dataset, such as data[{next(iter(data), 'train')!r}]")
    if isinstance(data, Mapping) and "input_ids" not in data:
        return _join(data, model, tokenizer, windows)
    if isinstance(data, Mapping) or _is_array(data):
        return TokenBatches([_ids(data)], TOKEN_IDS, tokenizer=tokenizer)
    if isinstance(data, (str, os.PathLike)):
        source, rows = Path(data).name, _file_rows(Path(data))
    elif isinstance(data, Iterable):
        source, rows = str(getattr(data, "builder_name", None) or type(data).__name__), iter(data)
    else:
        raise ValueError(f"data must be texts, a dataset, a path or batches of token ids, got {type(data).__name__}")

    try:
        first = next(rows)
    except StopIteration:
        raise ValueError(f"data: {source} is empty") from None
    rows = itertools.chain([first], rows)
    ids = isinstance(first, (list, tuple)) and all(isinstance(one, numbers.Integral) for one in first)
    if ids or _is_array(first) or isinstance(first, Batch) or (isinstance(first, Mapping) and "input_ids" in first):
        return TokenBatches([_ids(row) for row in rows], TOKEN_IDS, tokenizer=tokenizer)
    if tokenizer is None:
        name = "" if model is None else model.config.name_or_path
        if not name:
            raise ValueError("tokenizer: required, since the data is text and the model has no name to load it by")
        tokenizer = AutoTokenizer.from_pretrained(name)
    seq_len = window_length(windows.seq_len, [] if model is None else [model.config])
    batches = _windows(_texts(rows, tokenizer), tokenizer, windows, seq_len, source)
    return TokenBatches(batches, source, tokenizer=tokenizer)


def _join(data: Mapping[str, Any], model: PreTrainedModel | None, tokenizer: Any, windows: Windows) -> TokenBatches:
    pairs = {name: value if _is_weighted(value) else (value, 1.0) for name, value in data.items()}
    for name, (_, weight) in pairs.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"data: sources of text must have names, got {name!r}")
        if not 0 <= weight < math.inf:
            raise ValueError(f"data: the weight of {name} must be a number >= 0, got {weight!r}")
    total = sum(weight for _, weight in pairs.values())
    if not total > 0:
        raise ValueError(f"data: at least one source must have a weight above 0, got {dict.fromkeys(pairs, 0)}")
    least = 2 * window_length(windows.seq_len, [] if model is None else [model.config])
    sources: dict[str, tuple[TokenBatches, float]] = {}
    for name, (one, weight) in pairs.items():
        # A source of weight 0 gets as many tokens as one of average weight.
        share = weight / total or 1 / len(pairs)
        size = None if windows.num_tokens is None else max(least, round(windows.num_tokens * share))
        try:
            batches = token_batches(one, model, tokenizer=tokenizer, windows=replace(windows, num_tokens=size))
        except ValueError as error:
            raise ValueError(f"{error} (source {name})") from error
        sources[name] = batches, float(weight)
    return TokenBatches.join(sources)


def _is_weighted(value: Any) -> bool:
    """Whether a source is given as (data, weight)."""
    pair = isinstance(value, tuple) and len(value) == 2
    return pair and not isinstance(value[0], numbers.Number) and isinstance(value[1], numbers.Real)


def parse_sources(arguments: Iterable[str]) -> dict[str, tuple[str, float]]:
    """Parses sources of text from a command line: `PATH`, `NAME=PATH` or `NAME=PATH:WEIGHT`.

    The default name is the file name without its suffix. An argument that is itself the path of an existing file is
    used as such, even if it contains `=` or `:`. Returns {name: (path, weight)}, as accepted by `token_batches`.
    """
    valid = "use PATH, NAME=PATH or NAME=PATH:WEIGHT"
    sources: dict[str, tuple[str, float]] = {}
    for argument in arguments:
        name, path, weight = "", argument, 1.0
        if not os.path.isfile(argument):
            head, equals, tail = argument.partition("=")
            if argument.startswith("="):
                raise ValueError(f"data: {argument!r} has no name before '='; {valid}")
            if equals and not set(head) & set("/\\"):
                name, path = head, tail
            front, colon, number = path.rpartition(":")
            if colon and not os.path.isfile(path):
                with suppress(ValueError):  # not a number, so part of the path
                    path, weight = front, float(number)
        name = name or Path(path).stem
        if not path or not 0 <= weight < math.inf:
            raise ValueError(f"data: {argument!r} is not a source of text; {valid}")
        if name in sources:
            raise ValueError(f"data: two sources are named {name!r}; rename one, for example other={path}")
        sources[name] = path, weight
    return sources


def window_length(seq_len: int | None, configs: Iterable[Any], default: int = 512, argument: str = "seq_len") -> int:
    """The window length for models with these configurations: `seq_len`, or the default limited by their positions.

    A `seq_len` beyond a model's number of positions is refused, since its results there would be meaningless.
    """
    length = default if seq_len is None else seq_len
    for config in configs:
        most: int = getattr(config.get_text_config(), "max_position_embeddings", None) or length
        if seq_len is not None and seq_len > most:
            raise ValueError(
                f"{argument} must be at most {most}, the number of positions of {config.name_or_path!r}, got {seq_len}"
            )
        length = min(length, most)
    return length


def documents(data: Any, tokenizer: Any = None) -> list[str]:
    """The texts in any data that `token_batches` accepts, one for each text, row or text file.

    A column "messages" is rendered with the tokenizer's chat template.
    """
    if isinstance(data, (str, os.PathLike)):
        data = _file_rows(Path(data))
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise ValueError(f"data must be texts, rows of a dataset or a path, got {type(data).__name__}")
    return list(_texts(data, tokenizer))


def added_beginning(tokenizer: Any) -> int | None:
    """The token that a tokenizer prepends to a text, if any."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return bos if bos is not None and list(tokenizer("a").input_ids[:1]) == [bos] else None


def _is_array(value: Any) -> bool:
    """Whether a value is an array of token ids: a tensor, or a numpy array without strings."""
    numpy = hasattr(value, "__array_interface__") and value.dtype.kind not in "OSU"
    return numpy or isinstance(value, torch.Tensor)


def _ids(row: Any) -> Batch:
    if isinstance(row, Batch):
        return row.to("cpu")
    row = row if isinstance(row, Mapping) else {"input_ids": row}
    ids = torch.as_tensor(row["input_ids"]).cpu()
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        shown = f"{ids.dtype} of shape {tuple(ids.shape)}"
        raise ValueError(f"data: token ids must be integers of shape (B, T), got {shown}")
    mask = row.get("attention_mask")
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else torch.as_tensor(mask).cpu().bool()
    if mask.shape != ids.shape and mask[None].shape != ids.shape:
        raise ValueError(f"data: attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}")
    return Batch(ids.long(), mask.reshape(ids.shape))


def require_file(data: Any) -> None:
    """Refuses the path of a missing file, also within sources; ignores other data."""
    if isinstance(data, Mapping):
        for value in data.values():
            require_file(value[0] if _is_weighted(value) else value)
    # Not Path.is_file(), which raises on overlong names, such as a text passed by mistake.
    if isinstance(data, (str, os.PathLike)) and not os.path.isfile(data):
        name = brief(os.fspath(data))
        hint = " (a text itself must be in a list)" if any(map(str.isspace, name)) else ""
        raise FileNotFoundError(f"data: there is no file {name}{hint}")


def _file_rows(path: Path) -> Iterator[Any]:
    require_file(path)
    return (row for _, row in read_rows(path, "data"))


def _texts(rows: Iterable[Any], tokenizer: Any) -> Iterator[str]:
    for number, row in enumerate(rows):
        if isinstance(row, str):
            if number == 0 and len(row) < 4096 and os.path.isfile(row):
                raise ValueError(
                    f"data: a list must contain texts, but its first entry is the path {row!r}; name files as sources: "
                    '{"a": "a.txt", "b": "b.txt"}'
                )
            yield row
        elif isinstance(row, Mapping) and isinstance(row.get("text"), str):
            yield row["text"]
        elif isinstance(row, Mapping) and row.get("messages"):
            if not getattr(tokenizer, "chat_template", None):
                raise ValueError("data: a 'messages' column needs a tokenizer with a chat template; this one has none")
            messages = row["messages"]
            messages = parse(messages) if isinstance(messages, str) else messages  # a cell of a CSV file
            rendered = tokenizer.apply_chat_template(messages, tokenize=False)
            # `_windows` adds it again.
            yield rendered.removeprefix(getattr(tokenizer, "bos_token", None) or "")
        elif isinstance(row, Mapping) and "text" in row:
            raise ValueError(f"data: column 'text' must hold strings; row {number} (from 0) has {row['text']!r:.50}")
        else:
            has = f"columns {sorted(map(str, row))}" if isinstance(row, Mapping) else type(row).__name__
            raise ValueError(f"data: a row must be a string or have a column 'text' or 'messages', got {has}")


def _windows(texts: Iterator[str], tokenizer: Any, windows: Windows, seq_len: int, source: str) -> list[Batch]:
    begin, num_tokens = added_beginning(tokenizer), windows.num_tokens
    if num_tokens is not None:
        seq_len = min(seq_len, num_tokens)
    length = seq_len if begin is None else seq_len - 1  # without the prepended token
    wanted = None if num_tokens is None else num_tokens // seq_len * length
    ids: list[int] = []
    for text in filter(str.strip, texts):
        if ids and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        # More than enough characters for the missing tokens; otherwise a long file would be tokenized to its end.
        if wanted is not None:
            text = text[: 64 * (wanted - len(ids) + 1)]
        ids.extend(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        if wanted is not None and len(ids) >= wanted:
            ids = ids[:wanted]
            break
    if not ids or (len(ids) < 2 and begin is None):
        raise ValueError(f"data: {source} has {len(ids)} token(s) of text; predicting a token takes at least two")
    length = min(length, len(ids))
    windows_NT = torch.tensor(ids[: len(ids) // length * length]).reshape(-1, length)
    if begin is not None:
        windows_NT = F.pad(windows_NT, (1, 0), value=begin)
    return [Batch(part, torch.ones_like(part, dtype=torch.bool)) for part in windows_NT.split(windows.batch_size)]
