"""What a bug report needs to know of a machine and its Python environment."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .._version import __version__
from ..hooks.install import is_enabled

REQUIRED = ("torch", "transformers", "huggingface-hub", "safetensors", "tokenizers")
OPTIONAL = {
    "train": ("trl", "peft", "accelerate", "datasets"),
    "eval": ("lm-eval",),
    "plot": ("matplotlib",),
    "other": ("bitsandbytes", "deepspeed", "liger-kernel", "kernels", "flash-attn", "gguf", "llama-cpp-python", "vllm"),
}


def environment() -> dict[str, Any]:
    """Versions, what is installed, devices; nothing that is not loaded already is imported.

    Returns:
        `hf_lnscale`, `python`, `platform`, `flags` (whether transformers understands ours), `packages` (version by
        name, None if missing), `extras` (name of each extra, with its packages), `devices`, `threads`, `llama_cpp`
        (where the converter to GGUF is, or None).
    """
    from ..checkpoints.gguf import find_converter

    try:
        converter = str(find_converter())
    except FileNotFoundError:
        converter = None
    optional = [name for names in OPTIONAL.values() for name in names]
    return {
        "hf_lnscale": {"version": __version__, "path": str(Path(__file__).parents[1])},
        "python": {"version": platform.python_version(), "path": sys.executable},
        "platform": platform.platform(),
        "flags": is_enabled(),
        "packages": {name: _version(name) for name in (*REQUIRED, *optional)},
        "extras": {extra: list(names) for extra, names in OPTIONAL.items()},
        "devices": _devices(),
        "threads": torch.get_num_threads(),
        "llama_cpp": converter,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    found = [f"cpu, {os.cpu_count()} cores"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            found.append(f"cuda:{index}, {about.name}, {about.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found
