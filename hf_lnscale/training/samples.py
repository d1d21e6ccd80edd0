"""Generates sample answers while a chat model trains."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from .self_data import continue_prompts

MAX_NEW_TOKENS = 64


class SamplesCallback(TrainerCallback):
    """At each evaluation, answers the first held-out prompts greedily and appends the results to `samples.jsonl`.

    Each line has `step`, `prompt`, `generated`, and `reference`, the answer in the data. The prompt is everything
    before the first trained token. Sharded models are skipped, since every token would involve all processes.
    """

    def __init__(self, trainer: Trainer, num_samples: int) -> None:
        self.trainer = trainer
        self.rows: list[tuple[list[int], list[int]]] = []  # prompt and reference, as token ids
        for row in itertools.islice(iter(trainer.eval_dataset or ()), num_samples):
            learned = [label != -100 for label in row["labels"]]
            start = learned.index(True) if True in learned else 0
            stop = learned.index(False, start) if False in learned[start:] else len(learned)
            if start:
                self.rows.append((row["input_ids"][:start], row["input_ids"][start:stop]))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled:
            return
        model: Any = self.trainer.accelerator.unwrap_model(self.trainer.model)
        tokenizer: Any = self.trainer.processing_class
        path = Path(args.output_dir or "") / "samples.jsonl"
        with path.open("a", encoding="utf-8") as file, self.trainer.compute_loss_context_manager():
            for prompt, reference in self.rows:
                (made,) = continue_prompts(model, tokenizer, [prompt], MAX_NEW_TOKENS)
                texts = {"prompt": prompt, "generated": made, "reference": reference}
                line = {"step": state.global_step} | {key: tokenizer.decode(ids) for key, ids in texts.items()}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
