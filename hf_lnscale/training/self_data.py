"""Data that the whole model writes itself, to heal a cut model on (self-data distillation, arXiv 2410.09982)."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from ..checkpoints.folders import write_atomically
from ..measuring.stream import eval_mode
from .arguments import RecipeConfig
from .chats import features_of

BATCH = 16


def write_self_data(
    training: RecipeConfig,
    tokenizer: Any,
    load: Callable[[], PreTrainedModel],
    rows: Any,
    count: int,
    begin: Callable[[], None] = lambda: None,
) -> Dataset:
    """The first `count` rows with a model's own words in place of theirs; only these words are learned.

    Of a text the first `max_length / 8` tokens are kept, of a chat everything before its last answer. What the model
    wrote is kept in `self_data/` in the output folder, a file a batch, and not written again. A batch has a seed of its
    own: the data are the same on any number of processes, and in a run that was resumed.

    Args:
        load: loads the model that writes; not called where everything is written.
        rows: text, chats, or prompts with completions; a prompt that fills `max_length`, and a chat whose answer does
            not end within it, are left out.
        begin: called before the first file is written.

    Raises:
        ValueError: if no prompt is left, if no answer of a chat ended within `max_length`, or if the chat template is
            that of another tokenizer, which is not known before training begins.
    """
    template = training.chat_template_path or ".jinja"
    if "tools" in rows.column_names and not template.endswith((".jinja", ".j2")):
        raise ValueError(f"self_data: chat_template_path must be chatml or a .jinja file here, got {template!r}")
    length = training.max_length or 1024
    chats = [_question(row) if "tools" in row else row for row in itertools.islice(rows, count)]
    pairs = [(chat, _prompt_ids(chat, tokenizer, training.dataset_text_field, length // 8)) for chat in chats]
    kept = [(chat, ids) for chat, ids in pairs if 0 < len(ids) < length]
    left_out = f"{len(pairs) - len(kept)} of {len(pairs)} prompts have no token, or all of max_length={length}"
    if not kept:
        raise ValueError(f"self_data: {left_out}")
    if len(kept) < len(pairs) and training.process_index == 0:
        print(f"self_data: {left_out}, and are left out")
    begin()
    answers = _written(training, tokenizer, load, [ids for _, ids in kept], length)
    if "tools" in chats[0]:
        made = [
            {**chat, "completion": [{"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}]}
            for (chat, prompt), ids in zip(kept, answers, strict=True)
            if len(prompt) + len(ids) < length  # a chat template would end the others too
        ]
        cut = f"{len(kept) - len(made)} of {len(kept)} answers have not ended within max_length={length}"
        if not made:
            raise ValueError(f"self_data: {cut}")
        if len(made) < len(kept) and training.process_index == 0:
            print(f"self_data: {cut}, and are left out")
        return Dataset.from_list(made, features=features_of(made[0]))
    training.completion_only_loss = True
    return Dataset.from_list(
        [
            {"input_ids": prompt + ids, "completion_mask": [0] * len(prompt) + [1] * len(ids)}
            for (_, prompt), ids in zip(kept, answers, strict=True)
        ]
    )


def _written(
    training: RecipeConfig, tokenizer: Any, load: Callable[[], PreTrainedModel], prompts: list[list[int]], length: int
) -> list[list[int]]:
    """What the model writes after each prompt, from the files of those batches that are written already."""
    folder, rank = Path(training.output_dir or "") / "self_data", training.process_index
    files = {folder / f"{first:07}.json": prompts[first : first + BATCH] for first in range(0, len(prompts), BATCH)}
    mine = list(files)[rank :: training.world_size]
    # Prompts are compared: the data may have changed since.
    missing = [path for path in mine if not path.is_file() or json.loads(path.read_text())["prompts"] != files[path]]
    model: Any = load().to(training.device) if missing else None  # type: ignore[arg-type]
    started = time.perf_counter()
    for done, path in enumerate(missing):
        longest = length - min(map(len, files[path]))
        written = continue_prompts(model, tokenizer, files[path], longest, training.seed + int(path.stem))
        write_atomically(path, json.dumps({"prompts": files[path], "written": written}))
        if done == 0 and rank == 0:
            minutes = (time.perf_counter() - started) * len(missing) / 60
            print(f"self_data: the whole model writes {len(prompts)} texts first, in about {minutes:.1f} minutes")
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
        asked = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True, **keywords)
        return list(asked["input_ids"])
    ids: list[int] = tokenizer(row.get("prompt", row.get(column)))["input_ids"]
    return ids if "prompt" in row else ids[: max(1, beginning)]


def continue_prompts(
    model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int, seed: int | None = None
) -> list[list[int]]:
    """What a model writes after each prompt, up to the end of the text: greedily, or sampled with a seed.

    Sampled at temperature 1, without truncation: then the loss on it is, but for a constant, the divergence from the
    model. The same seed gives the same text on the same machine.

    Args:
        prompts: token ids, of one or more tokens each.
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
    return [ids[:stop] for ids, stop in zip(written, stops, strict=True)]  # then comes padding
