"""The comparison for healing: the full model on the same rows, unchanged or trained in the same way.

Training on a text teaches any model that text. Only the gap to the full model shows what was healed.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..checkpoints.folders import public_name, write_atomically
from ..core.json_file import number_of, read_object, to_json
from .trainer import RecipeTrainer, Rows

CONTROL_FILE = "control.json"
TEXTS = ("eval", "eval_other")  # prefixes of metrics


def _tensor(numbers: list[Any]) -> torch.Tensor:
    return torch.tensor([number_of(one) for one in numbers], dtype=torch.float64)


class Control(TrainerCallback):
    """Records the losses of the full model, and of the cut model before training, for each evaluated row.

    They are stored in `control.json` in the output folder, from which a resumed run reads them.

    Args:
        trainer: the trainer of the cut model.
        name, load: the full model; it is not loaded if the folder already contains its losses.
        train: whether to train the full model in the same way, with the same `options` as the cut model's trainer.

    Raises:
        ValueError: if a resumed run has a different length from the one the full model was trained for.
    """

    def __init__(
        self, trainer: RecipeTrainer, name: str, load: Callable[[], PreTrainedModel], train: bool, **options: Any
    ) -> None:
        self.trainer, self.name, self.trained = trainer, name, train
        self.path = Path(trainer.args.output_dir or "") / CONTROL_FILE
        self.rows: dict[str, dict[str, Rows]] = {"whole": {}, "before": {}}
        self.length = [trainer.args.max_steps, trainer.args.num_train_epochs]
        if self.path.is_file():
            kept = read_object(self.path)
            if train and kept["length"] != self.length:
                lengths = f"{kept['length']} instead of {self.length} steps and epochs"
                raise ValueError(f"control: the unpruned model was trained for {lengths}; use the same length")
            self.rows = {
                who: {text: Rows(*map(_tensor, parts)) for text, parts in texts.items()}
                for who, texts in kept["rows"].items()
            }
            return
        arguments = copy.copy(trainer.args)
        arguments.eval_on_start, arguments.load_best_model_at_end, arguments.report_to = False, False, []
        arguments.eval_strategy, arguments.save_strategy = IntervalStrategy.NO, SaveStrategy.NO
        # A copy, since PEFT writes the name of its base into it, and the adapter of the cut model shares it.
        adapter = copy.deepcopy(options["peft_config"]) if train else None
        with tempfile.TemporaryDirectory() as folder:
            arguments.output_dir = folder
            whole = RecipeTrainer(model=load(), **{**options, "args": arguments, "peft_config": adapter})
            if train:
                whole.train()
            else:  # unsharded, since accelerate does not shard a model without its optimizer
                whole.accelerator.prepare_model(whole.model, evaluation_mode=True)
            whole.evaluate()
            self.rows["whole"] = whole.rows
        self._write()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.rows["before"] = dict(self.trainer.rows)
            self._write()

    def _write(self) -> None:
        if self.trainer.is_world_process_zero():
            rows = {
                who: {text: [part.tolist() for part in parts] for text, parts in texts.items()}
                for who, texts in self.rows.items()
            }
            found = {"whole": public_name(self.name), "trained": self.trained, "length": self.length, "rows": rows}
            write_atomically(self.path, to_json(found) + "\n")

    def metrics(self) -> Iterator[tuple[str, Any]]:
        """Yields the full model's losses and the gaps to them before and after training, with standard errors."""
        yield "whole_model", public_name(self.name) + (", trained equally" if self.trained else "")
        after = self.trainer.rows
        for text in TEXTS:
            whole = self.rows["whole"][text]
            yield text.replace("eval", "whole") + "_loss", whole.mean
            yield text.replace("eval", "whole") + "_loss_stderr", whole.stderr
            for when, rows in (("_before", self.rows["before"].get(text)), ("", after[text])):
                name = text.replace("eval", "gap") + when
                yield name, None if rows is None else rows.mean - whole.mean
                yield f"{name}_stderr", None if rows is None else rows.stderr_against(whole)
