"""Measures the speed and memory of checkpoints, each in a separate process.

The processes alternate run by run, so that drifts in the machine's speed affect all of them equally.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.names import Placement, load, size_on_disk
from ..core.errors import require_integers
from ..core.processes import command_of
from ..measuring.stream import kv_cache

# With n runs each, the ranges of two equally fast models are disjoint by chance in 2 of C(2n, n) cases: 33 % for two
# runs, 10 % for three, 3 % for four.
LEAST_RUNS = 4


@dataclass(frozen=True)
class Timing:
    """Timings of several runs, without the first, which is a warmup."""

    median: float
    lowest: float
    highest: float
    runs: int
    in_turn: bool = True  # whether runs of the compared models alternated

    @classmethod
    def of(cls, values: list[float], in_turn: bool = True) -> Timing:
        return cls(statistics.median(values), min(values), max(values), len(values), in_turn)

    def times(self, factor: float) -> Timing:
        """The same timings in another unit."""
        return replace(self, median=factor * self.median, lowest=factor * self.lowest, highest=factor * self.highest)

    def __str__(self) -> str:
        return f"{self.median:,.1f} ({self.lowest:,.1f} to {self.highest:,.1f})"


def relative_change(value: Timing | float | None, reference: Timing | float | None) -> float | None:
    """Relative change from a reference; None if it is unknown or may be noise.

    A change of timings may be noise if the ranges overlap, there are fewer than `LEAST_RUNS` runs, or the runs did not
    alternate, so that the machine's speed may have changed in between.
    """
    if isinstance(value, Timing) and isinstance(reference, Timing):
        if value.lowest <= reference.highest and reference.lowest <= value.highest:
            return None
        if min(value.runs, reference.runs) < LEAST_RUNS or not (value.in_turn and reference.in_turn):
            return None
        return value.median / reference.median - 1.0
    if isinstance(value, Timing) or isinstance(reference, Timing) or not value or not reference:
        return None
    return value / reference - 1.0


@dataclass(frozen=True)
class Speed:
    """The cost of loading and running a checkpoint.

    Attributes:
        parameters: number of parameters, with tied ones counted once.
        load_seconds: time until it is ready to run.
        load_peak_bytes, peak_bytes: peak memory after loading, and after all runs: of the GPU, or on a CPU of the
            process, including the interpreter and libraries. Each is a single measurement.
        prefill_tokens_per_second: prompt tokens divided by the time to the first token.
        decode_tokens_per_second: decoding speed after the first token.
        first_token_seconds: time to the first token.
    """

    parameters: int
    load_seconds: float
    load_peak_bytes: int
    peak_bytes: int
    prefill_tokens_per_second: Timing
    decode_tokens_per_second: Timing
    first_token_seconds: Timing


def measure(
    *checkpoints: str | os.PathLike[str],
    placement: Placement = Placement(),
    prompt_tokens: int = 512,
    new_tokens: int = 32,
    repeats: int = 5,
) -> list[Speed]:
    """Loads each checkpoint in a new process and alternates their runs, with batch size 1.

    All models are in memory at once. If they do not fit, they are measured one after the other, which
    `Timing.in_turn` records.

    Args:
        checkpoints: folders, Hub repositories or GGUF files.
        placement: device and dtype.
        prompt_tokens: length of the prompt of random ids.
        new_tokens: number of tokens to decode greedily after the first.
        repeats: runs of each checkpoint after a warmup run.

    Returns:
        One `Speed` per checkpoint.

    Raises:
        ValueError: if a number is not positive.
        RuntimeError: if a process fails; the message is the last line it printed.
    """
    require_integers(1, prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats)
    settings = {"dtype": placement.dtype, "device": placement.main_device, "new_tokens": new_tokens}
    jobs = [{**settings, "checkpoint": str(checkpoint), "prompt_tokens": prompt_tokens} for checkpoint in checkpoints]
    if _fit(checkpoints, placement):
        return _in_turn(jobs, repeats)
    return [_in_turn([job], repeats, compared=len(jobs) == 1)[0] for job in jobs]


def _fit(checkpoints: Sequence[str | os.PathLike[str]], placement: Placement) -> bool:
    """Whether all checkpoints fit in memory at once, with room for activations."""
    sizes = [size_on_disk(checkpoint) for checkpoint in checkpoints]
    if placement.main_device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(placement.main_device)
    elif Path("/proc/meminfo").exists():
        free = _proc_bytes("meminfo", "MemAvailable")
    else:
        return False
    # Weights may take up to four times their size on disk (8-bit to float32).
    growth = 1.5 if placement.dtype == "auto" else 4
    return all(sizes) and growth * sum(filter(None, sizes)) < free


def _in_turn(jobs: list[dict[str, Any]], repeats: int, compared: bool = True) -> list[Speed]:
    with contextlib.ExitStack() as opened:
        processes = [opened.enter_context(_started(job)) for job in jobs]
        loaded = [answer() for answer in processes]
        runs: list[list[dict[str, float]]] = [[] for _ in jobs]
        for turn in range(repeats + 1):
            for which in range(len(jobs))[:: 1 if turn % 2 else -1]:
                runs[which].append(processes[which]("run"))
    return [_speed(job, load, found[1:], compared) for job, load, found in zip(jobs, loaded, runs, strict=True)]


def _speed(job: dict[str, Any], loaded: dict[str, Any], runs: list[dict[str, float]], in_turn: bool) -> Speed:
    prefill, decode = ([run[name] for run in runs] for name in ("prefill", "decode"))
    return Speed(
        **loaded,
        peak_bytes=int(runs[-1]["peak_bytes"]),
        prefill_tokens_per_second=Timing.of([job["prompt_tokens"] / seconds for seconds in prefill], in_turn),
        decode_tokens_per_second=Timing.of([job["new_tokens"] / seconds for seconds in decode], in_turn),
        first_token_seconds=Timing.of(prefill, in_turn),
    )


@contextlib.contextmanager
def _started(job: dict[str, Any]) -> Iterator[Callable[..., dict[str, Any]]]:
    """Starts a process that runs `serve`. Yields a function that sends a request, if any, and returns the next answer.

    The process ends when its standard input closes, including when this process is killed.
    """
    command = [*command_of("hf_lnscale.evaluation.speed:serve"), json.dumps(job)]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)

        def answer(request: str = "") -> dict[str, Any]:
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                if request:
                    print(request, file=process.stdin, flush=True)
            if line := process.stdout.readline():
                found: dict[str, Any] = json.loads(line)
                return found
            process.wait()
            errors.seek(0)
            last = errors.read().strip().splitlines()[-1:] or ["no message"]
            raise RuntimeError(f"measuring {job['checkpoint']!r} failed: {last[0]}")

        try:
            yield answer
        finally:
            process.kill()
            process.communicate()


def _proc_bytes(file: str, field: str) -> int:
    lines = Path("/proc", file).read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def peak_memory(device: str = "cpu") -> int:
    """Peak memory in bytes: device memory on a GPU, otherwise memory of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    if Path("/proc/self/status").exists():
        return _proc_bytes("self/status", "VmHWM")  # not ru_maxrss, which a new process inherits from its parent
    import resource  # not available on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def serve() -> None:
    """Loads the checkpoint of the job in `sys.argv` and runs it once per line of standard input."""
    job = json.loads(sys.argv[1])
    answers, sys.stdout = sys.stdout, sys.stderr  # keeps output of libraries out of the answers
    device = job["device"]
    started = time.perf_counter()
    model = load(job["checkpoint"], dtype=job["dtype"]).to(device)
    about = {"parameters": model.num_parameters(), "load_seconds": time.perf_counter() - started}
    print(json.dumps({**about, "load_peak_bytes": peak_memory(device)}), file=answers, flush=True)
    generator = torch.Generator().manual_seed(0)
    shape = (1, job["prompt_tokens"])
    ids = torch.randint(model.config.get_text_config().vocab_size, shape, generator=generator).to(device)
    for _ in sys.stdin:
        with torch.no_grad():
            started = time.perf_counter()
            output = model(ids, use_cache=True, logits_to_keep=1)
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            token.item()  # waits for the device
            first = time.perf_counter()
            for _ in range(job["new_tokens"]):
                output = model(token, **kv_cache(output), use_cache=True)
                token = output.logits[:, -1].argmax(-1, keepdim=True)
            token.item()
            ended = time.perf_counter()
        run = {"prefill": first - started, "decode": ended - first, "peak_bytes": peak_memory(device)}
        print(json.dumps(run), file=answers, flush=True)
