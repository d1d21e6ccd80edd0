"""Evaluates several models in the same way and shows them in one table."""

from __future__ import annotations

import gc
import logging
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import zip_longest
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table

from .._version import __version__
from ..checkpoints.folders import EVALUATION_FILE, public_name, require_place, write_atomically
from ..checkpoints.names import Placement, load_tokenizer, read_config, require_weights, size_on_disk
from ..core.display import markdown, markdown_text, show_bytes, terminal, with_error
from ..core.errors import ArgumentError, require_integers
from ..core.json_file import to_json
from ..measuring.sample import first_token
from ..measuring.text import documents, window_length
from .abilities import Continuations, ability_results, about_abilities
from .perplexity import BLOCK_SIZE, SEQ_LEN, Estimate, Perplexity, check_windows, first_bytes, perplexity, require_token
from .speed import LEAST_RUNS, Speed, measure, relative_change
from .tasks import TaskResult, load_tasks, run_tasks, task_manager

logger = logging.getLogger(__name__)

# A standard error from K blocks itself has a relative error of about 1 / sqrt(2 (K - 1)): a quarter with nine blocks.
LEAST_BLOCKS = 9


@dataclass(frozen=True, eq=False)
class ModelFigures:
    """The results of one model. `perplexity`, `speed` and `tasks` are only there if they were asked for."""

    name: str  # given by the caller
    label: str  # in the table
    parameters: int  # tied ones counted once
    num_layers: int | None
    size_on_disk: int | None  # of its weight files in bytes, if they are on this machine
    dtype: str  # of its weights during the evaluation
    perplexity: Perplexity | None = None
    speed: Speed | None = None
    tasks: dict[str, TaskResult] = field(default_factory=dict)  # by task and metric


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        models: the first is the reference.
        settings: everything that the results depend on: text, windows, dtype, device, task options, versions.
    """

    models: list[ModelFigures]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The evaluation as JSON types. Every model but the first has its `differences` from the first."""
        return {
            "format": 1,
            "reference": public_name(self.models[0].name),
            "settings": self.settings,
            "models": [_model_dict(one, self.models[0]) for one in self.models],
            "markdown": self.markdown(),  # the table, for a model card
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes Markdown to a .md file, JSON to a .json file, or `evaluation.json` to a folder.

        Raises:
            ArgumentError: for any other path.
        """
        path = report_path(path)
        text = self.markdown() if path.suffix == ".md" else to_json(self.to_dict(), indent=2)
        write_atomically(path, text + "\n")
        return path

    def markdown(self) -> str:
        """The table in Markdown, followed by the notes."""
        return f"{markdown(*self._cells())}\n\n{markdown_text(self.notes)}"

    def table(self) -> Table:
        """The table for a terminal; show `notes` after it."""
        return terminal(*self._cells())

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        """The header and the rows of the table."""
        first, others = self.models[0], self.models[1:]
        rows: list[list[str]] = []

        def add(name: str, cells: Iterable[str], changes: Iterable[str] = ()) -> None:
            """Adds a row of values, with the difference from the first model, if known, below each."""
            pairs = zip_longest(cells, ("", *changes), fillvalue="")
            rows.append([name, *("\n".join(filter(None, pair)) for pair in pairs)])

        def relative(name: str, attribute: str, show: Callable[[Any], str] = str) -> None:
            """Adds a row of values with changes in percent."""
            values = [attrgetter(attribute)(one) for one in self.models]
            changes = [relative_change(one, values[0]) for one in values[1:]]
            add(name, map(show, values), ["" if change is None else f"{change:+.1%}" for change in changes])

        if any(one.num_layers for one in self.models):
            relative("layers", "num_layers", lambda value: "-" if value is None else str(value))
        relative("parameters", "parameters", lambda value: f"{value / 1e6:,.1f} M")
        relative("size on disk", "size_on_disk", show_bytes)
        if len({one.dtype for one in self.models}) > 1:
            add("weights", [one.dtype for one in self.models])
        if first.perplexity:
            measured = [one.perplexity for one in self.models if one.perplexity]
            changes = [one.minus(first.perplexity) for one in measured[1:]]
            for name in ("perplexity", "bits_per_byte"):
                estimates = [getattr(one, name) for one in measured]
                differences = [_change(one[name]) if name in one else "different tokens" for one in changes]
                add(name.replace("_", " "), [with_error(one.value, one.stderr) for one in estimates], differences)
        if first.speed:
            relative("prefill, tokens/s", "speed.prefill_tokens_per_second")
            relative("decode, tokens/s", "speed.decode_tokens_per_second")
            relative("first token, ms", "speed.first_token_seconds", lambda value: str(value.times(1000)))
            add("peak memory", [show_bytes(one.speed.peak_bytes if one.speed else None) for one in self.models])
        for name in dict.fromkeys(name for one in self.models for name in one.tasks):
            results = [one.tasks.get(name) for one in self.models]
            cells = ["-" if one is None else with_error(one.value, one.stderr) for one in results]
            add(name, cells, [_task_change(one.tasks.get(name), first.tasks.get(name)) for one in others])
        return ["", *(one.label for one in self.models)], rows

    @property
    def notes(self) -> str:
        """The data and settings of the evaluation, and how to read the table."""
        notes = ["±: standard error."]
        if len(self.models) > 1:
            notes.append("The second value of a model is its difference from the first model.")
        first = self.models[0]
        if first.perplexity:
            text, found = self.settings["data"], first.perplexity
            counts = {one.perplexity.num_tokens for one in self.models if one.perplexity}
            tokens = " or ".join(f"{count:,}" for count in sorted(counts))
            notes.append(
                f"Perplexity: {tokens} tokens, {found.num_bytes:,} bytes of {text['source']}, windows of "
                f"{text['seq_len']} tokens, stride {text['stride']}."
            )
            if (blocks := len(found.block_bytes)) < LEAST_BLOCKS:
                notes.append(
                    f"The text has {blocks} block{'s' * (blocks != 1)} of about {BLOCK_SIZE // 1000} kB; reliable "
                    f"standard errors take {LEAST_BLOCKS}, so other text may give results outside of them."
                )
            for one in self.models:
                if one.perplexity and one.perplexity.caution:
                    notes.append(f"{one.label}: {one.perplexity.caution}")
                if one.perplexity and one.perplexity.unknown_tokens:
                    notes.append(
                        f"{one.perplexity.unknown_tokens:,} tokens of the text are unknown to {one.label}, so its "
                        "values are too low."
                    )
        if first.speed:
            speed = self.settings["speed"]
            together = first.speed.decode_tokens_per_second.in_turn
            how = "in turn" if together else "one after the other, as they do not fit in memory together"
            dtype = f", {first.dtype}" if len({one.dtype for one in self.models}) == 1 else ""
            notes.append(
                f"Speed: batch size 1, a prompt of {speed['prompt_tokens']} tokens, {speed['new_tokens']} new tokens, "
                f"median of {speed['repeats']} runs (lowest to highest), each model in a separate process, {how}, "
                f"on {self.settings['device']}{dtype}. Peak memory is a single measurement."
            )
            if len(self.models) > 1:
                shown = f"the ranges of {LEAST_RUNS} or more runs do not overlap"
                notes.append(f"Differences in speed are shown if {shown}.")
        if self.settings["tasks"]:
            limit = self.settings["tasks"]["limit"]
            first_ones = f", the first {limit} documents of each" if limit else ""
            notes.append(f"Tasks: lm-evaluation-harness {self.settings['versions']['lm_eval']}{first_ones}.")
        if self.settings["abilities"]:
            notes.append(about_abilities("first"))
        return " ".join(notes)


def report_path(out: str | os.PathLike[str]) -> Path:
    """The file that `Evaluation.save` will write.

    Raises:
        ArgumentError: if `out` is neither a .json or .md file nor a folder.
    """
    path = Path(out) / EVALUATION_FILE if Path(out).is_dir() else Path(out)
    require_place(path, str(out))
    if path.suffix not in (".json", ".md"):
        raise ArgumentError("out", str(out), "a file that ends in .json or .md, or an existing folder")
    return path


def evaluate(
    models: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    data: Any = None,
    *,
    tasks: Sequence[str] = (),
    include_path: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    max_bytes: int | None = None,
    seq_len: int | None = None,
    stride: int | None = None,
    batch_size: int = 4,
    abilities: bool = False,
    speed: bool = True,
    prompt_tokens: int | None = None,
    new_tokens: int = 32,
    repeats: int = 5,
    placement: Placement = Placement(),
    progress: bool = True,
) -> Evaluation:
    """Evaluates models in the same way and compares them with the first: quality, speed, memory and size.

    One model is in memory at a time, except for speed. Arguments are validated before anything is measured.

    Args:
        models: one or several folders, Hub repositories or GGUF files. The first is the reference for the others.
        data: text for perplexity and bits per byte, see `perplexity`. A column "messages" is rendered with the first
            model's chat template, so that all models get the same text.
        tasks, include_path: see `task_manager`.
        limit, num_fewshot: see `run_tasks`.
        max_bytes, seq_len, stride: see `perplexity`. The default `seq_len` is 1024, or the smallest number of positions
            of any of the models.
        batch_size: number of windows, or task requests, per batch.
        abilities: whether to measure addition, copying, the MMLU questions packaged with lm-evaluation-harness, and
            agreement with the first model on text that it generates. Nothing is downloaded.
        speed: whether to measure speed and memory.
        prompt_tokens, new_tokens, repeats: see `measure`. The default of the first is 512, or the smallest number of
            positions of any of the models.
        placement: device and dtype of the models.
        progress: whether to show progress bars.

    Raises:
        ValueError: if an argument is invalid; the message names it.
        OSError: if a model or file does not exist.
        ImportError: if tasks are given but lm-evaluation-harness is not installed; the message names the extra.
    """
    names = [str(one) for one in ([models] if isinstance(models, (str, os.PathLike)) else models)]
    if not names:
        raise ValueError("models: give at least one")
    if data is None and not tasks and not abilities and not speed:
        raise ValueError("nothing to measure: give data, tasks, abilities=True, or speed=True")
    given = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats, "limit": limit}
    require_integers(1, **{name: value for name, value in given.items() if value is not None})
    if num_fewshot is not None:
        require_integers(0, num_fewshot=num_fewshot)
    configs = [read_config(name) for name in names]
    prompt_tokens = window_length(prompt_tokens, configs, argument="prompt_tokens")
    for name in names:
        require_weights(name)
    tokenizers = [load_tokenizer(name) if data is not None or tasks or abilities else None for name in names]
    manager = task_manager(tasks, include_path) if tasks else None
    if manager is not None:  # so that data that cannot be had is known before anything is measured
        load_tasks(tasks, manager)
    if abilities and len(names) > 1:
        first_token(tokenizers[0])
    texts, text_settings = None, None
    if data is not None:
        seq_len = window_length(seq_len, configs, SEQ_LEN)
        for config in configs:
            stride = check_windows(config, seq_len, stride, batch_size)
        source = Path(data).name if isinstance(data, (str, os.PathLike)) else type(data).__name__
        texts = first_bytes(documents(data, tokenizers[0]), max_bytes)
        if not any(text.strip() for text in texts):
            raise ArgumentError("data", source, problem="contains no text")
        for tokenizer in tokenizers:
            require_token(texts, tokenizer)
        text_settings = {"source": source, "seq_len": seq_len, "stride": stride}

    labels, device = _labels(names), placement.main_device
    costs: Sequence[Speed | None] = [None] * len(names)
    runs = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats}
    if speed:
        logger.info("measuring speed and memory of %s, each in a separate process", ", ".join(labels))
        costs = measure(*names, placement=placement, **runs)
    figures = []
    continuations: Continuations | None = None  # generated by the first model
    for name, config, tokenizer, label, cost in zip(names, configs, tokenizers, labels, costs, strict=True):
        model: Any = placement.load(name)
        text_figures = None
        if texts is not None:
            text_figures = perplexity(
                model, texts, tokenizer, seq_len=seq_len, stride=stride, batch_size=batch_size, progress=progress
            )
        results = []
        if tasks:
            results = run_tasks(
                model, tokenizer, tasks, manager, batch_size=batch_size, limit=limit, num_fewshot=num_fewshot
            )
        if abilities:
            results += ability_results(model, tokenizer, batch_size)
            if continuations is not None:
                results += continuations.agreement(model, tokenizer)
            elif len(names) > 1:
                continuations = Continuations(model, tokenizer)
        figures.append(
            ModelFigures(
                name=name,
                label=label,
                parameters=model.num_parameters(),  # counts packed weights correctly
                num_layers=getattr(config.get_text_config(), "num_hidden_layers", None),
                size_on_disk=size_on_disk(name),
                dtype=_weights(model),
                perplexity=text_figures,
                speed=cost,
                tasks={result.name: result for result in results},
            )
        )
        del model
        gc.collect()
        if device.startswith("cuda"):
            torch.cuda.empty_cache()  # frees memory for other processes
    return Evaluation(
        figures,
        {
            "data": text_settings,
            "speed": runs if speed else None,
            "tasks": {"limit": limit, "num_fewshot": num_fewshot} if tasks else None,
            "abilities": abilities,
            "dtype": placement.dtype,
            "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
            "threads": torch.get_num_threads(),
            "versions": {
                "hf_lnscale": __version__,
                "transformers": transformers.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
                **({"lm_eval": version("lm_eval")} if tasks else {}),
            },
        },
    )


def _labels(names: list[str]) -> list[str]:
    """Shortens names to their last components, keeping enough of them to tell the names apart."""
    parts = [(Path(name).resolve() if Path(name).exists() else Path(name)).parts for name in names]
    for count in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(one[-count:]) for one in parts]
        if len(set(labels)) == len({*parts}):
            break
    return labels


def _weights(model: Any) -> str:
    """The dtype of a model's weights, and their quantization method, if any."""
    dtype, quantization = str(model.dtype).removeprefix("torch."), getattr(model.config, "quantization_config", None)
    if quantization is None:
        return dtype
    found = quantization if isinstance(quantization, dict) else quantization.to_dict()
    return f"{dtype}, {getattr(found['quant_method'], 'value', found['quant_method'])}"


def _change(difference: Estimate) -> str:
    return with_error(difference.value, difference.stderr, sign="+")


def _task_change(result: TaskResult | None, reference: TaskResult | None) -> str:
    if result is None or reference is None:
        return ""
    difference, paired = result.minus(reference)
    return _change(difference) + ("" if paired else " (not paired)")


def _model_dict(one: ModelFigures, reference: ModelFigures) -> dict[str, Any]:
    named = ("label", "parameters", "num_layers", "size_on_disk", "dtype")
    found: dict[str, Any] = {"name": public_name(one.name)} | {name: getattr(one, name) for name in named}
    differences: dict[str, Any] = {}
    if text := one.perplexity:
        counts = ("nats", "num_tokens", "num_bytes", "num_documents", "unknown_tokens", "caution")
        found["text"] = {name: asdict(getattr(text, name)) for name in ("perplexity", "loss", "bits_per_byte")}
        found["text"] |= {name: getattr(text, name) for name in counts} | {"num_blocks": len(text.block_bytes)}
        if reference.perplexity:
            differences |= {name: asdict(value) for name, value in text.minus(reference.perplexity).items()}
    if one.speed:
        found["speed"] = asdict(one.speed)
    if one.tasks:
        found["tasks"] = {
            name: {key: value for key, value in asdict(result).items() if key != "samples"}
            for name, result in one.tasks.items()
        }
        changes = {
            name: result.minus(reference.tasks[name]) for name, result in one.tasks.items() if name in reference.tasks
        }
        differences["tasks"] = {name: asdict(value) | {"paired": paired} for name, (value, paired) in changes.items()}
    if one is not reference:
        found["differences"] = differences
    return found
