"""Running recipes inside the test process, and the small things that they are run on."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import tiny

pytest.importorskip("trl", minversion="1.9")

from hf_lnscale.measuring.sample import documents, train_tokenizer
from hf_lnscale.training.recipe_run import launch
from hf_lnscale.training.scripts import import_recipe
from hf_lnscale.training.trainer import RecipeTrainer

# Each run collects garbage several times; what is loaded by now is none.
gc.freeze()
RECIPES = Path(__file__).parents[1] / "recipes"
# A run of a second.
# fmt: off
SMALL = [
    "--max_length", "32", "--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "2", "--max_steps", "6",
    "--logging_steps", "1", "--eval_samples", "4", "--save_steps", "100", "--learning_rate", "1e-2",
    "--warmup_steps", "0", "--depth_stats_steps", "3", "--disable_tqdm", "true",
]
# fmt: on
CHAT = [
    {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}. " * 3}]}
    for i in range(40)
]


def run(name: str, *words: Any) -> int:
    """Does what `python recipes/NAME.py WORDS` does, in this process; returns its exit code."""
    module = import_recipe(name)
    try:
        launch(module.make_parser(f"python {name}.py"), module.main, [*map(str, words)])
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def signal_after(step: int, number: int, patch: pytest.MonkeyPatch, process: int = 0) -> None:
    """From here on, one of the processes gets a signal in that step."""
    original, calls = RecipeTrainer.training_step, []

    def training_step(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == step and self.args.process_index == process:
            os.kill(os.getpid(), number)
        return original(self, *args, **kwargs)

    patch.setattr(RecipeTrainer, "training_step", training_step)


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def history(folder: Path, key: str) -> list[float]:
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in entries if key in entry]


def losses(folder: Path) -> list[float]:
    return history(folder, "loss")


def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(documents(standard_library=False)[:20], 300)


def save_model(folder: Path, **changes: Any) -> None:
    """A tiny Llama with dropout, in which a seed that is not restored would show, and its tokenizer."""
    reader = tokenizer()
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), reader.eos_token_id)
    model = tiny.model(**({"vocab_size": len(reader), "attention_dropout": 0.1} | special | changes))
    model.save_pretrained(folder)
    reader.save_pretrained(folder)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text_rows(count: int = 40) -> list[dict[str, str]]:
    return [{"text": text[:600]} for text in documents(standard_library=False)[:count]]


def same_weights(one: Path, other: Path, **tolerance: float) -> None:
    from safetensors.torch import load_file

    names = [path.name for path in one.glob("*.safetensors")]
    assert names
    for name in names:
        here, there = load_file(one / name), load_file(other / name)
        assert here.keys() == there.keys()
        for key in here:
            if tolerance:
                torch.testing.assert_close(here[key], there[key], **tolerance)
            else:
                assert torch.equal(here[key], there[key]), key
