"""Data that the whole model writes itself, to heal a cut model on (self-data distillation, arXiv 2410.09982)."""

from __future__ import annotations

from typing import Any

import torch

from ..measuring.stream import eval_mode


def continue_prompts(model: Any, tokenizer: Any, prompts: list[list[int]], length: int, seed: int) -> list[list[int]]:
    """What a model writes after each prompt, sampled, up to the end of the text or to `length` tokens with the prompt.

    At temperature 1, without truncation: then the loss on it is, but for a constant, the divergence from the model.

    Args:
        prompts: token ids, of one or more tokens each.
        seed: the same one gives the same text on the same machine.
    """
    longest = max(map(len, prompts))
    given = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(given if isinstance(given, list) else [given])} - {None}
    pad = tokenizer.pad_token_id or tokenizer.eos_token_id or 0
    ids_BT = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask_BT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    device = model.get_input_embeddings().weight.device
    with torch.random.fork_rng(), eval_mode(model):
        torch.manual_seed(seed)
        made_BT = model.generate(
            ids_BT.to(device), attention_mask=mask_BT.to(device), max_new_tokens=length - min(map(len, prompts)),
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, pad_token_id=pad,
            eos_token_id=sorted(ends) or None,
        )  # fmt: skip
    written = []
    for prompt, ids in zip(prompts, made_BT[:, longest:].tolist(), strict=True):
        stop = next((at for at, token in enumerate(ids, 1) if token in ends), len(ids))  # then comes padding
        written.append(ids[: min(stop, length - len(prompt))])
    return written
