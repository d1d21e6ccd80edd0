"""What a checkpoint costs to run, measured in a process of its own: nothing else is in its memory."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..checkpoints.names import load


@dataclass(frozen=True)
class Timing:
    """Several runs of the same thing.

    Attributes:
        median, lowest, highest: of the runs; the first, which warms up, is not among them.
    """

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: list[float]) -> Timing:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Speed:
    """What loading and running a checkpoint takes.

    Attributes:
        parameters: as the model counts them, tied ones once.
        load_seconds: until the model can run.
        load_peak_bytes, peak_bytes: most memory after loading, and after running: the device's on a GPU, else the whole
            process's, interpreter and libraries included.
        prefill_tokens_per_second: tokens of the prompt over the time to the first token.
        decode_tokens_per_second: tokens after the first.
        first_token_seconds: from the prompt to the first new token.
    """

    parameters: int
    load_seconds: float
    load_peak_bytes: int
    peak_bytes: int
    prefill_tokens_per_second: Timing
    decode_tokens_per_second: Timing
    first_token_seconds: Timing


def measure(
    checkpoint: str | os.PathLike,
    *,
    drop_layers: list[int] | None = None,
    dtype: str = "auto",
    device: str | None = None,
    prompt_tokens: int = 512,
    new_tokens: int = 32,
    repeats: int = 3,
) -> Speed:
    """Loads a checkpoint in a new process and runs it, batch size 1.

    Args:
        checkpoint: folder, name on the Hub, or GGUF file.
        drop_layers: passed to `from_pretrained`.
        dtype: passed to `from_pretrained`.
        device: to run on; None takes a GPU if there is one.
        prompt_tokens: length of the prompt, random ids.
        new_tokens: tokens to decode after the first, greedily.
        repeats: runs, after one that warms up.

    Raises:
        ValueError: for numbers that are not positive.
        RuntimeError: if the process fails; the message is the last line that it printed.
    """
    for name, value in {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    arguments = ["--dtype", dtype, "--prompt-tokens", prompt_tokens, "--new-tokens", new_tokens, "--repeats", repeats]
    arguments += ["--drop", ",".join(map(str, drop_layers))] if drop_layers else []
    arguments += ["--device", device] if device else []
    start = "import typer; from hf_lnscale.evaluation.speed import main; typer.run(main)"
    command = [sys.executable, "-c", start, str(checkpoint), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise RuntimeError(f"measuring {str(checkpoint)!r} failed: {last[0]}")
    found: Any = {
        name: Timing(**value) if isinstance(value, dict) else value
        for name, value in json.loads(done.stdout.splitlines()[-1]).items()
    }
    return Speed(**found)


def peak_memory(device: str = "cpu") -> int:
    """The most bytes that were ever in use: of the device's memory on a GPU, else of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: a new process starts with that of the one that started it.
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(
    checkpoint: str,
    drop: Annotated[str, typer.Option(help="Layers not to load, as in 12,14,17.")] = "",
    dtype: str = "auto",
    device: str = "",
    prompt_tokens: int = 512,
    new_tokens: int = 32,
    repeats: int = 3,
) -> None:
    """Prints what loading and running a checkpoint costs, as one line of JSON."""
    keywords: dict[str, Any] = {"drop_layers": [int(layer) for layer in drop.split(",")]} if drop else {}
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    started = time.perf_counter()
    model: Any = load(checkpoint, dtype=dtype, **keywords).to(device)
    load_seconds, load_peak_bytes = time.perf_counter() - started, peak_memory(device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (1, prompt_tokens), generator=generator).to(device)
    prefill, decode = [], []
    with torch.no_grad():
        for _ in range(repeats + 1):
            started = time.perf_counter()
            output = model(ids, use_cache=True, logits_to_keep=1)
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            token.item()  # waits for the device
            prefill.append(time.perf_counter() - started)
            started = time.perf_counter()
            for _ in range(new_tokens):
                output = model(token, past_key_values=output.past_key_values, use_cache=True)
                token = output.logits[:, -1].argmax(-1, keepdim=True)
            token.item()
            decode.append(time.perf_counter() - started)
    prefill, decode = prefill[1:], decode[1:]
    found = Speed(
        parameters=model.num_parameters(),  # of packed weights too
        load_seconds=load_seconds,
        load_peak_bytes=load_peak_bytes,
        peak_bytes=peak_memory(device),
        prefill_tokens_per_second=Timing.of([prompt_tokens / seconds for seconds in prefill]),
        decode_tokens_per_second=Timing.of([new_tokens / seconds for seconds in decode]),
        first_token_seconds=Timing.of(prefill),
    )
    print(json.dumps(asdict(found)))
