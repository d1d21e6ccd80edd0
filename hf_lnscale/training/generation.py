"""Text that models generate: data to heal a cut model on (self-data distillation, arXiv 2410.09982), and samples."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback

from ..checkpoints.folders import write_atomically
from ..measuring.stream import eval_mode
from .arguments import RecipeConfig
from .chats import features_of
from .trainer import require_rows

BATCH = 16  # prompts of self-data in a file
MAX_NEW_TOKENS = 64  # in a sample


def write_self_data(
    training: RecipeConfig,
    tokenizer: Any,
    load: Callable[[], PreTrainedModel],
    rows: Any,
    count: int,
    begin: Callable[[], None] = lambda: None,
) -> Dataset:
    """Replaces completions in the first `count` rows by text that a model generates. Only this text is trained on.

    Prompts are the first `max_length / 8` tokens of a text, or everything before the last answer of a chat. Generated
    text is stored in `self_data/` in the output folder, one file per batch, and reused. Each batch has its own seed, so
    the data does not depend on the number of processes or on resuming.

    Args:
        load: loads the generating model; not called if all text already exists.
        rows: text, chats, or prompts with completions. Skips prompts that fill `max_length`, and chats whose answer
            does not end within it.
        begin: called before the first file is written.

    Raises:
        ValueError: if none is left, or the chat template belongs to another tokenizer, which training loads later.
    """
    is_chat, template = "tools" in rows.column_names, training.chat_template_path or ".jinja"
    if is_chat and not template.endswith((".jinja", ".j2")):
        raise ValueError(f"self_data: chat_template_path must be chatml or a .jinja file here, got {template!r}")
    length = training.max_length or 1024
    asked = [_question(row) if is_chat else row for row in itertools.islice(rows, count)]
    pairs = [(row, _prompt_ids(row, tokenizer, training.dataset_text_field, length // 8)) for row in asked]
    kept = [(row, ids) for row, ids in pairs if 0 < len(ids) < length]
    unusable = f"prompts are empty or fill max_length={length}"
    require_rows(len(kept), len(pairs), unusable, training, "self_data: ")
    begin()
    answers = _written(training, tokenizer, load, [ids for _, ids in kept], length)
    texts = [(row, prompt, ids) for (row, prompt), ids in zip(kept, answers, strict=True)]
    if not is_chat:
        training.completion_only_loss = True
        return Dataset.from_list(
            [
                {"input_ids": prompt + ids, "completion_mask": [0] * len(prompt) + [1] * len(ids)}
                for _, prompt, ids in texts
            ]
        )
    made = [
        {**chat, "completion": [{"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}]}
        for chat, prompt, ids in texts
        if len(prompt) + len(ids) < length  # a chat template would also terminate the others
    ]
    require_rows(len(made), len(kept), f"answers do not end within max_length={length}", training, "self_data: ")
    return Dataset.from_list(made, features=features_of(made[0]))


def _written(
    training: RecipeConfig, tokenizer: Any, load: Callable[[], PreTrainedModel], prompts: list[list[int]], length: int
) -> list[list[int]]:
    """The model's continuation of each prompt. Only batches without a file are generated."""
    folder, rank = Path(training.output_dir or "") / "self_data", training.process_index
    files = {folder / f"{first:07}.json": prompts[first : first + BATCH] for first in range(0, len(prompts), BATCH)}
    mine = list(files)[rank :: training.world_size]
    # Compares prompts, since the data may have changed.
    missing = [path for path in mine if not path.is_file() or json.loads(path.read_text())["prompts"] != files[path]]
    model: Any = load().to(training.device) if missing else None  # type: ignore[arg-type]
    started = time.perf_counter()
    for done, path in enumerate(missing):
        longest = length - min(map(len, files[path]))
        written = continue_prompts(model, tokenizer, files[path], longest, training.seed + int(path.stem))
        write_atomically(path, json.dumps({"prompts": files[path], "written": written}))
        if done == 0 and rank == 0:
            minutes = (time.perf_counter() - started) * len(missing) / 60
            print(f"self_data: the full model first generates {len(prompts)} texts, in about {minutes:.1f} minutes")
    training.distributed_state.wait_for_everyone()
    written = [ids for path in files for ids in json.loads(path.read_text())["written"]]
    return [ids[: length - len(prompt)] for prompt, ids in zip(prompts, written, strict=True)]


def _question(chat: dict[str, Any]) -> dict[str, Any]:
    """A chat up to its last answer, as a row with the columns prompt, tools and chat_template_kwargs."""
    if (prompt := chat.get("prompt")) is None:
        messages = chat["messages"]
        answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        prompt = messages[: answers[-1]]
    return {"prompt": prompt, "tools": chat["tools"], "chat_template_kwargs": chat["chat_template_kwargs"]}


def _prompt_ids(row: dict[str, Any], tokenizer: Any, column: str, beginning: int) -> list[int]:
    if "tools" in row:
        tools = json.loads(row["tools"]) if row["tools"] else None
        keywords: dict[str, Any] = {"tools": tools, **row["chat_template_kwargs"]}
        encoded = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True, **keywords)
        return list(encoded["input_ids"])
    ids: list[int] = tokenizer(row.get("prompt", row.get(column)))["input_ids"]
    return ids if "prompt" in row else ids[: max(1, beginning)]


def continue_prompts(
    model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int, seed: int | None = None
) -> list[list[int]]:
    """Generates a continuation of each prompt up to the end of the text: greedily, or by sampling if `seed` is given.

    Samples at temperature 1 without truncation, so the loss on the text is the divergence from the model up to a
    constant. The same seed gives the same text on the same machine.

    Args:
        prompts: token ids of each prompt, at least one.
    """
    longest, given = max(map(len, prompts)), model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(given if isinstance(given, list) else [given])} - {None}
    pad = tokenizer.pad_token_id or tokenizer.eos_token_id or 0
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if seed is not None else {}
    device = model.get_input_embeddings().weight.device
    ids_BT = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask_BT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), eval_mode(model):
        torch.manual_seed(seed or 0)
        made_BT = model.generate(
            ids_BT, attention_mask=mask_BT, max_new_tokens=max_new_tokens, do_sample=seed is not None, **sampling,
            repetition_penalty=1.0, pad_token_id=pad, eos_token_id=sorted(ends) or None,
        )  # fmt: skip
    written = made_BT[:, longest:].tolist()
    stops = [next((at for at, token in enumerate(ids, 1) if token in ends), len(ids)) for ids in written]
    return [ids[:stop] for ids, stop in zip(written, stops, strict=True)]  # the rest is padding


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
