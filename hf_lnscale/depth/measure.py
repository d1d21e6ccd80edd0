"""What a checkpoint costs to load and to run, measured in a process of its own: nothing else is in its memory.

python -m hf_lnscale.depth.measure CHECKPOINT [--drop 12,14,17]
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM


def measure(
    checkpoint: str | os.PathLike,
    *,
    drop_layers: list[int] | None = None,
    delete_after: bool = False,
    count_bytes: bool = False,
    dtype: str = "auto",
    device: str | None = None,
    prompt_tokens: int = 512,
    new_tokens: int = 32,
    repeats: int = 3,
) -> dict[str, float]:
    """Loads a checkpoint in a new process and runs it.

    Args:
        checkpoint: folder, or name on the Hub.
        drop_layers: passed to `from_pretrained`.
        delete_after: load everything, and delete the layers from the model then, as is done by hand.
        count_bytes: read files without mapping them, so that the system counts what is read; memory and time are then
            not what they usually are.
        dtype: passed to `from_pretrained`.
        device: to run on; None takes a GPU if there is one.
        prompt_tokens: length of the prompt that prefill is timed on; it is random ids, batch size 1.
        new_tokens: tokens to decode, greedily.
        repeats: runs of each; the median counts.

    Returns:
        `load_seconds`, `load_peak_bytes` and `peak_bytes` (after loading, and after running: of the device's memory on
        a GPU, else of the process), `bytes_read` (with `count_bytes`), `prefill_tokens_per_second`,
        `decode_tokens_per_second`, `parameters`.

    Raises:
        RuntimeError: if the process fails; the message is the last line that it printed.
    """
    arguments = ["--dtype", dtype, "--prompt-tokens", prompt_tokens, "--new-tokens", new_tokens, "--repeats", repeats]
    arguments += ["--drop", ",".join(map(str, drop_layers))] if drop_layers else []
    arguments += ["--device", device] if device else []
    arguments += ["--delete-after"] * delete_after + ["--count-bytes"] * count_bytes
    command = [sys.executable, "-m", "hf_lnscale.depth.measure", str(checkpoint), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise RuntimeError(f"measuring {str(checkpoint)!r} failed: {last[0]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory(device: str) -> int:
    """The most bytes that were ever in use: of the device's memory on a GPU, else of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: a new process starts with that of the one that started it.
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _bytes_read() -> int:
    counters = Path("/proc/self/io")
    return int(counters.read_text().split()[1]) if counters.exists() else 0


def _delete(model: Any, dropped: list[int]) -> None:
    for layer in sorted(dropped, reverse=True):
        del model.model.layers[layer]
    for position, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = position
    model.config.num_hidden_layers = len(model.model.layers)


def main(
    checkpoint: str,
    drop: Annotated[str, typer.Option(help="Layers not to load, as in 12,14,17.")] = "",
    delete_after: Annotated[bool, typer.Option("--delete-after", help="Load them, and delete them then.")] = False,
    count_bytes: Annotated[bool, typer.Option("--count-bytes", help="Read without mapping, and count.")] = False,
    dtype: str = "auto",
    device: str = "",
    prompt_tokens: int = 512,
    new_tokens: int = 32,
    repeats: int = 3,
) -> None:
    """Prints what loading and running a checkpoint costs, as one line of JSON."""
    import hf_lnscale  # noqa: F401

    dropped = [int(layer) for layer in drop.split(",") if layer]
    keywords: dict[str, Any] = {"dtype": dtype, "disable_mmap": count_bytes}
    if dropped and not delete_after:
        keywords["drop_layers"] = dropped
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    read, started = _bytes_read(), time.perf_counter()
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, **keywords)
    model = model.to(device).eval()
    if delete_after:
        _delete(model, dropped)
    found: dict[str, float] = {
        "load_seconds": time.perf_counter() - started,
        "bytes_read": _bytes_read() - read,
        "load_peak_bytes": peak_memory(device),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (1, prompt_tokens), generator=generator).to(device)
    prefill, decode = [], []
    with torch.no_grad():
        for _ in range(repeats + 1):
            started = time.perf_counter()
            output = model(ids, use_cache=True, logits_to_keep=1)
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            token.item()
            prefill.append(time.perf_counter() - started)
            started = time.perf_counter()
            for _ in range(new_tokens):
                output = model(token, past_key_values=output.past_key_values, use_cache=True)
                token = output.logits[:, -1].argmax(-1, keepdim=True)
            token.item()
            decode.append(time.perf_counter() - started)
    # The first of each is warming up.
    found["prefill_tokens_per_second"] = prompt_tokens / statistics.median(prefill[1:])
    found["decode_tokens_per_second"] = new_tokens / statistics.median(decode[1:])
    found["peak_bytes"] = peak_memory(device)
    print(json.dumps(found))


if __name__ == "__main__":
    typer.run(main)
