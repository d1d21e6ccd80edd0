"""A run of a recipe: its own output folder, resumable interruption, and a report at the end."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, cast

import datasets
import torch
from accelerate.utils import gather
from datasets.exceptions import DatasetGenerationError, DatasetsError
from jinja2 import TemplateError
from transformers import EarlyStoppingCallback, ProgressCallback, TrainerCallback

from ..checkpoints.folders import public_command, public_name, require_place, write_atomically
from ..core.config import is_integer
from ..core.display import brief
from ..core.json_file import read_object
from ..core.processes import leaving_on_sigterm
from ..core.record import record
from ..core.stack import text_stack
from ..core.warnings import warn
from ..measuring.known_text import caution, sketch_of
from ..pruning.layers import note_text
from .arguments import RecipeConfig, RecipeParser
from .control import Control
from .depth_stats import DepthStatsCallback
from .generation import SamplesCallback
from .run_report import data_names, training_cost, write_report
from .trainer import RecipeTrainer
from .warmup import LNScalingWarmupCallback

RUN_FILE = "run.json"
# Runs with equal values of these and of the recipe's own arguments are the same run. Hardware, logging, saving and
# training length may change when a run is resumed.
_IDENTITY = (
    "seed", "max_length", "packing", "packing_strategy", "dataset_text_field", "learning_rate", "lr_scheduler_type",
    "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "optim", "max_grad_norm", "loss_type", "assistant_only_loss",
    "completion_only_loss", "chat_template_path", "eos_token",
)  # fmt: skip


def launch(parser: RecipeParser, main: Callable[..., Any], words: list[str] | None = None) -> None:
    """Parses the command line and calls a recipe's `main` with the parsed dataclasses, training arguments last.

    User errors before training print one line to stderr and exit with code 1; all other errors show a traceback.
    """
    words = sys.argv[1:] if words is None else words
    training: RecipeConfig | None = None
    # Not with several processes: one that waits for the others cannot run the handler.
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    try:
        with leaving_on_sigterm(parser.recipe) if alone else nullcontext(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # between libraries, so users cannot act on them
            arguments = parser.parse_args_and_config(words)
            training = arguments[-1]
            training.command = [*shlex.split(parser.prog), *words]
            main(*arguments)
    except (ValueError, OSError, ImportError, DatasetsError, TemplateError) as error:
        if training is not None and training.begun:
            raise
        shown = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
        message = " ".join(str(shown).split()) or type(error).__name__
        # The rank is shown because the error may occur on only one machine.
        rank = f"[rank {os.environ['RANK']}] " if int(os.environ.get("RANK", 0)) else ""
        print(f"{rank}{parser.recipe}: {message}", file=sys.stderr)
        raise SystemExit(1) from None


class Run(TrainerCallback):
    """A run of a recipe in its own output folder; `given` are the dataclasses of arguments besides `training`.

    Raises:
        FileExistsError: if the folder contains another run, or this run and it is not resumed.
        FileNotFoundError: if the checkpoint to resume does not exist.
        SystemExit: with code 0, if the run to resume is finished.
    """

    def __init__(self, recipe: str, training: RecipeConfig, *given: Any) -> None:
        self.recipe, self.training = recipe, training
        self.folder = Path(training.output_dir or "")
        require_place(self.folder / RUN_FILE, str(self.folder), "output_dir")
        words = {key: value for part in given for key, value in dataclasses.asdict(part).items()}
        words |= {key: getattr(training, key, None) for key in _IDENTITY}
        batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
        self.identity = json.loads(json.dumps({"recipe": recipe, **words, "batch": batch}, default=str))
        started = int(os.environ.get("WORLD_SIZE", 1))
        if started != training.world_size:  # each process would train separately in the same folder
            raise ValueError(f"{started} processes were started, but this one sees only {training.world_size}")
        if training.process_index:
            datasets.disable_progress_bars()
        self.checkpoint = self._checkpoint()
        self.trained = False  # all steps were completed before the run was killed
        self.control: Control | None = None  # the comparison for a healing run
        # No process may write before all processes have checked the folder.
        training.distributed_state.wait_for_everyone()

    def _checkpoint(self) -> str | None:
        """The checkpoint to resume from, after checking that the folder contains only this run."""
        wanted = str(self.training.resume_from_checkpoint or "false")
        self._require_own_folder(resuming=wanted.lower() != "false")
        if wanted.lower() == "false":
            return None
        if wanted.lower() == "true":
            self._leave_if_finished()
            return self._last_checkpoint()
        if not Path(wanted).is_dir():
            raise FileNotFoundError(f"resume_from_checkpoint: there is no folder {wanted!r}")
        if not _is_complete(Path(wanted)):
            raise FileNotFoundError(f"resume_from_checkpoint: {wanted!r} has no complete trainer_state.json")
        return wanted

    def _require_own_folder(self, resuming: bool) -> None:
        if not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir())):
            return
        found, problem = _read(self.folder / RUN_FILE).get("identity"), ""
        if not isinstance(found, dict):
            problem = "is not empty and was not created by a recipe"
        elif differing := [key for key in {**found, **self.identity} if found.get(key) != self.identity.get(key)]:
            recorded, current = (brief(one.get(differing[0])) for one in (found, self.identity))
            problem = f"contains another run, whose {differing[0]} is {recorded} instead of {current}"
        elif not resuming:
            problem = "already contains this run; continue it with --resume_from_checkpoint true"
        if problem:
            raise FileExistsError(f"output_dir {str(self.folder)!r} {problem}; choose another --output_dir")

    def _leave_if_finished(self) -> None:
        metrics, length = _read(self.folder / "metrics.json"), self.training.max_steps
        steps: Any = metrics.get("steps")
        same = metrics.get("length") == [length, self.training.num_train_epochs]
        if not is_integer(steps) or not any(self.folder.glob("*.safetensors")) or not (same or 0 < length <= steps):
            return
        if self.training.process_index == 0:
            print(
                f"{self.recipe}: the run in {self.folder} is finished, after step {steps}; to train longer, "
                "increase --max_steps or --num_train_epochs"
            )
        raise SystemExit(0)

    def _last_checkpoint(self) -> str | None:
        steps = [path.name.rpartition("-")[2] for path in self.folder.glob("checkpoint-*")]
        for step in sorted((int(step) for step in steps if step.isdecimal()), reverse=True):
            path = self.folder / f"checkpoint-{step}"
            if _is_complete(path):
                return str(path)
            if self.training.process_index == 0:
                print(f"skipping {path}, which is incomplete", file=sys.stderr)
        return None

    def mark(self) -> None:
        """Marks the folder as belonging to this run, so that it can be resumed."""
        if self.training.process_index == 0:
            text = json.dumps({"identity": self.identity, "command": shlex.join(self.training.command)}, indent=2)
            write_atomically(self.folder / RUN_FILE, text + "\n")
        self.training.distributed_state.wait_for_everyone()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the run, after the other callbacks had the chance to refuse it."""
        self.mark()
        self.training.begun = True
        if self.trained:
            raise _AlreadyTrained

    def train(self, trainer: RecipeTrainer) -> None:
        """Trains to the end and writes the model, its card, `metrics.json` and the plots.

        Raises:
            SystemExit: with code 128 + signal, after SIGINT or SIGTERM, once a checkpoint is saved.
        """
        arguments, model = trainer.args, cast(Any, trainer.model)
        config = text_stack(model).model.config
        known = caution(config, _sequences(trainer.eval_dataset))
        if known and arguments.process_index == 0:
            warn(f"evaluation data: {known}")
        rows = trainer.train_dataset
        if self.recipe == "heal" and isinstance(rows, datasets.Dataset):  # a stream would be read twice
            data = ", ".join(map(public_name, data_names(self.identity))) or "Python's"
            note_text(model, sketch_of(_sequences(rows), data))
        resumed = self.checkpoint
        before = _read(Path(resumed) / "trainer_state.json") if resumed else {}
        # A run killed between its last step and its report has no steps left.
        longer = arguments.max_steps <= 0 and arguments.num_train_epochs > before.get("num_train_epochs", 0)
        last = arguments.max_steps if arguments.max_steps > 0 else before.get("max_steps", 0)
        self.trained = bool(before) and not longer and before["global_step"] >= last
        if self.trained and arguments.load_best_model_at_end:
            resumed = before["best_model_checkpoint"] or resumed
        stop = StopOnSignal()
        # The progress bar comes last, so that it does not start if another callback refuses the run.
        progress = trainer.pop_callback(ProgressCallback)
        for callback in (*self._callbacks(trainer, config), self, self.control, stop, progress):
            if callback is not None:
                trainer.add_callback(callback)
        # A padding-free batch has no mask to count by.
        arguments.include_num_input_tokens_seen = "all" if trainer.padding_free else "non_padding"
        arguments.eval_on_start &= resumed is None
        started = time.perf_counter()
        with stop, suppress(_AlreadyTrained):
            trainer.train(resume_from_checkpoint=resumed)
        seconds = time.perf_counter() - started
        if stop.stopped is not None:
            self._leave(trainer, stop.stopped)
        cost = training_cost(trainer, self.checkpoint, before, seconds)
        write_report(trainer, self.identity, public_command(self.training.command), cost, self.control)

    def _callbacks(self, trainer: RecipeTrainer, config: Any) -> Iterator[TrainerCallback]:
        if (scaling := record(config).active) and scaling.warming_up:
            yield LNScalingWarmupCallback()
        if self.training.depth_stats_steps:
            yield DepthStatsCallback(trainer, every_n_steps=self.training.depth_stats_steps)
        if self.training.early_stopping_patience:
            yield EarlyStoppingCallback(self.training.early_stopping_patience)
        if self.training.num_samples:
            yield SamplesCallback(trainer, self.training.num_samples)

    def _leave(self, trainer: RecipeTrainer, number: int) -> None:
        step = trainer.state.global_step
        if trainer.is_world_process_zero():
            resume = shlex.join(self.training.command).replace(" --resume_from_checkpoint true", "")
            resume += " --resume_from_checkpoint true"
            if trainer.args.world_size > 1:
                resume = f"start it as before, with --resume_from_checkpoint true: ... {resume.removeprefix('python ')}"
            print(
                f"{self.recipe}: stopped by {signal.Signals(number).name} after step {step}; saved in "
                f"{self.folder / f'checkpoint-{step}'}. To continue: {resume}",
                file=sys.stderr,
            )
        trainer.accelerator.end_training()
        raise SystemExit(128 + number)


def _read(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file; empty if it cannot be read."""
    try:
        return read_object(path)
    except (OSError, ValueError):
        return {}


def _sequences(rows: Any) -> Iterator[torch.Tensor]:
    return (torch.as_tensor(row["input_ids"]) for row in rows)


def _is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint is complete: Trainer writes its state last, and may have been killed before."""
    return "global_step" in _read(checkpoint / "trainer_state.json")


class _AlreadyTrained(Exception):
    """Exits `Trainer.train` after loading the checkpoint, without training."""


class StopOnSignal(TrainerCallback):
    """On SIGINT or SIGTERM, saves a checkpoint at the end of the step and stops, in all processes at once.

    A second Ctrl-C stops immediately without saving.
    """

    signal: int | None = None
    stopped: int | None = None  # the signal that ended training

    def __enter__(self) -> StopOnSignal:
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal = number
            os.write(2, b"\nsaving a checkpoint and stopping at the end of this step\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:
            # The signal reaches processes at different times, but a checkpoint needs all of them at the same step.
            self.signal = int(gather(torch.tensor(self.signal or 0, device=args.device)).max()) or None
        if self.signal is not None:
            self.stopped = self.signal
            control.should_save = control.should_training_stop = True
