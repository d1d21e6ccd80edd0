"""Samples of generated text during the training of a chat model."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from ..measuring.stream import eval_mode

MAX_NEW_TOKENS = 64


class SamplesCallback(TrainerCallback):
    """Answers the first held-out prompts at each evaluation, greedily, and appends them to `samples.jsonl`.

    A line holds `step`, `prompt`, `generated`, and `reference`, the answer in the data. The prompt is everything before
    the first trained token. Sharded models are skipped: they would need every process for every token.
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
        with path.open("a", encoding="utf-8") as file, eval_mode(model), self.trainer.compute_loss_context_manager():
            for prompt, reference in self.rows:
                ids = torch.tensor([prompt], device=args.device)
                made = model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MAX_NEW_TOKENS,
                    pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
                )  # fmt: skip
                texts = {"prompt": prompt, "generated": made[0, len(prompt) :], "reference": reference}
                line = {"step": state.global_step} | {key: tokenizer.decode(ids) for key, ids in texts.items()}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
