"""One run of a recipe: an output folder of its own, a stop that can be resumed, and figures at the end."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.distributed as dist
from datasets.exceptions import DatasetGenerationError, DatasetsError
from jinja2 import TemplateError
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..core.config import LNScalingConfig
from ..core.record import get_ln_scaling
from ..core.stack import text_stack
from .arguments import RecipeConfig
from .depth_stats import DepthStatsCallback
from .run_report import write_report
from .scripts import command
from .warmup import LNScalingWarmupCallback

RUN_FILE = "run.json"
# What makes two runs the same, besides what the recipe's own arguments say: not how, where and how often it computes
# and writes, nor how long it goes on.
_IDENTITY = (
    "seed", "max_length", "packing", "packing_strategy", "dataset_text_field", "learning_rate", "lr_scheduler_type",
    "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "optim", "max_grad_norm", "loss_type", "assistant_only_loss",
    "completion_only_loss", "chat_template_path", "eos_token",
)  # fmt: skip


class Run:
    """A run of a recipe in its output folder, which holds no other.

    Args:
        recipe: name of the script.
        training: the training arguments; `output_dir` and `resume_from_checkpoint` are read.
        told: the other dataclasses of arguments.

    Raises:
        FileExistsError: if the folder holds another run, or this one and it is not to be resumed.
        FileNotFoundError: if the checkpoint to resume does not exist.
    """

    def __init__(self, recipe: str, training: RecipeConfig, *told: Any) -> None:
        self.recipe, self.training = recipe, training
        self.folder = Path(training.output_dir or "")
        words = {key: value for part in told for key, value in dataclasses.asdict(part).items()}
        words |= {key: getattr(training, key, None) for key in _IDENTITY}
        words["batch"] = (
            training.per_device_train_batch_size * training.gradient_accumulation_steps * max(training.world_size, 1)
        )
        self.identity = json.loads(json.dumps({"recipe": recipe, **words}, default=str))
        started = int(os.environ.get("WORLD_SIZE", 1))
        if started != training.world_size:
            raise ValueError(f"{started} processes were started, and this one sees {training.world_size} of them")
        if training.process_index:
            datasets.disable_progress_bars()
        self.checkpoint = self._checkpoint()
        # No process writes before every process has looked.
        training.distributed_state.wait_for_everyone()

    def _checkpoint(self) -> str | None:
        """The checkpoint to resume, once the folder is found to hold nothing else."""
        wanted = self.training.resume_from_checkpoint
        wanted = None if str(wanted).lower() in ("none", "false", "") else wanted
        shown = f"output_dir {str(self.folder)!r}"
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            if not (self.folder / RUN_FILE).is_file():
                raise FileExistsError(
                    f"{shown} is not empty, and no run of a recipe made it; choose another --output_dir"
                )
            there = json.loads((self.folder / RUN_FILE).read_text(encoding="utf-8"))["identity"]
            for key in {**there, **self.identity}:
                if there.get(key) != self.identity.get(key):
                    raise FileExistsError(
                        f"{shown} holds another run: its {key} is {there.get(key)!r}, that of this one "
                        f"{self.identity.get(key)!r}; choose another --output_dir"
                    )
            if wanted is None:
                raise FileExistsError(
                    f"{shown} holds this run already; go on with it with --resume_from_checkpoint true, or choose "
                    "another --output_dir"
                )
        if wanted is None:
            return None
        if str(wanted).lower() in ("true", "1", "latest", "auto"):
            return self._last_checkpoint()
        if not Path(str(wanted)).is_dir():
            raise FileNotFoundError(f"resume_from_checkpoint: there is no folder {wanted!r}")
        if not (Path(str(wanted)) / "trainer_state.json").is_file():
            raise FileNotFoundError(
                f"resume_from_checkpoint: {wanted!r} has no trainer_state.json: no checkpoint of a run, or not complete"
            )
        return str(wanted)

    def _last_checkpoint(self) -> str | None:
        """The last one that is complete: Trainer writes its state last, and may have been killed before."""
        found = [path for path in self.folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
        for path in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
            try:
                resumed_step(path)
                return str(path)
            except (OSError, ValueError, KeyError):
                if self.training.process_index == 0:
                    print(f"{path} is not complete, and is left out", file=sys.stderr)
        return None

    def begin(self) -> None:
        """Marks the folder as this run's, once all that was asked for is known to be right."""
        if self.training.process_index == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"identity": self.identity, "command": command()}, indent=2)
            (self.folder / RUN_FILE).write_text(text + "\n", encoding="utf-8")
        self.training.distributed_state.wait_for_everyone()

    def train(self, trainer: Trainer) -> dict[str, Any]:
        """Trains to the end and writes the model, its card, `metrics.json` and the plots.

        Returns:
            What `metrics.json` holds.

        Raises:
            SystemExit: after SIGINT or SIGTERM, once a checkpoint is saved; with the code 128 + signal.
        """
        stop = StopOnSignal()
        scaling = LNScalingConfig.of(get_ln_scaling(text_stack(trainer.model).model.config))  # type: ignore[arg-type]
        if scaling is not None and scaling.warming_up:
            trainer.add_callback(LNScalingWarmupCallback())
        if self.training.depth_stats_steps:
            trainer.add_callback(DepthStatsCallback(trainer, every_n_steps=self.training.depth_stats_steps))
        trainer.add_callback(_Begin(self))
        # The progress bar last, so that it does not begin before one of the others refuses the run.
        if (progress := trainer.pop_callback(ProgressCallback)) is not None:
            trainer.add_callback(progress)
        trainer.add_callback(stop)
        # Of padding-free batches no mask says what is padding, as none is; of others it does.
        trainer.args.include_num_input_tokens_seen = "all" if getattr(trainer, "padding_free", False) else "non_padding"
        trainer.args.eval_on_start &= self.checkpoint is None
        since = resumed_step(self.checkpoint) if self.checkpoint else -1
        started = time.perf_counter()
        try:
            trainer.train(resume_from_checkpoint=self.checkpoint)
        finally:
            stop.restore()
        seconds = time.perf_counter() - started
        if stop.stopped and stop.signal is not None:
            self._leave(trainer, stop.signal)
        return write_report(self.recipe, trainer, self.identity, command(public=True), self.checkpoint, since, seconds)

    def _leave(self, trainer: Trainer, number: int) -> None:
        step = trainer.state.global_step
        if trainer.is_world_process_zero():
            again = command().replace(" --resume_from_checkpoint true", "") + " --resume_from_checkpoint true"
            if trainer.args.world_size > 1:
                again = f"start it as before, with --resume_from_checkpoint true: ... {again.removeprefix('python ')}"
            print(
                f"{self.recipe}: stopped by {signal.Signals(number).name} after step {step}; saved in "
                f"{self.folder / f'checkpoint-{step}'}. To go on: {again}",
                file=sys.stderr,
            )
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
        raise SystemExit(128 + number)


def resumed_step(checkpoint: str | os.PathLike) -> int:
    """The step that a checkpoint of Trainer was written after."""
    return json.loads((Path(checkpoint) / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]


class _Begin(TrainerCallback):
    """Marks the folder when nothing is left that could be refused: after the other callbacks have had their say."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.run.begin()
        _State.training = True


class StopOnSignal(TrainerCallback):
    """On SIGINT or SIGTERM: saves at the end of the step and stops there, in all processes at once.

    Pressed twice, Ctrl-C stops at once and saves nothing.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.stopped = False
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal = number
            os.write(2, b"\nstopping at the end of this step, with a checkpoint\n")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if args.world_size > 1:
            # The signal reaches the processes at different times; a checkpoint needs all of them at the same step.
            number = torch.tensor(self.signal or 0, device=args.device)
            dist.all_reduce(number, dist.ReduceOp.MAX)
            self.signal = int(number) or None
        if self.signal is not None:
            self.stopped = control.should_save = control.should_training_stop = True
        return control


class _State:
    """Whether training has begun: from then on an error is no longer the user's, and its traceback is shown."""

    training = False


def script(main: Callable[[], Any]) -> Callable[[], Any]:
    """Makes a recipe's `main` fail with one line, and exit code 1, for what is wrong before training starts.

    Of what no user could have meant, as of errors while training, the traceback is shown.
    """

    @functools.wraps(main)
    def run() -> Any:
        _State.training = False
        # Of the libraries to one another: nothing that whoever runs a recipe could act on.
        warnings.simplefilter("ignore", FutureWarning)
        try:
            return main()
        except (ValueError, OSError, ImportError, DatasetsError, TemplateError) as error:
            if _State.training:
                raise
            shown = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
            lines = [line.strip() for line in str(shown).splitlines() if line.strip()]
            # What is wrong may be wrong on one machine alone.
            rank = f"[rank {os.environ['RANK']}] " if int(os.environ.get("RANK", 0)) else ""
            name = Path(sys.argv[0]).stem.split()[-1]
            print(f"{rank}{name}: {lines[0] if lines else type(error).__name__}", file=sys.stderr)
            raise SystemExit(1) from None

    return run
