"""`hf-lnscale env`: what a bug report needs to know about a machine and its Python environment."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from .._version import __version__
from ..core.display import one_line
from .options import AsJson

REQUIRED = ("torch", "transformers", "huggingface-hub", "safetensors", "tokenizers")
OPTIONAL = {
    "train": ("trl", "peft", "accelerate", "datasets"),
    "eval": ("lm-eval",),
    "plot": ("matplotlib",),
    "other": ("bitsandbytes", "deepspeed", "liger-kernel", "kernels", "flash-attn", "gguf", "llama-cpp-python", "vllm"),
}


def env(as_json: AsJson = False) -> None:
    """Show versions, what is installed, devices."""
    found = environment()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    packages, optional = found["packages"], {name for names in found["extras"].values() for name in names}
    rows = {
        "hf_lnscale": f"{found['hf_lnscale']['version']}  {found['hf_lnscale']['path']}",
        "python": f"{found['python']['version']}  {found['python']['path']}",
        "platform": found["platform"],
        **{name: version for name, version in packages.items() if name not in optional},
        **{
            extra: ", ".join(f"{name} {packages[name] or 'no'}" for name in names)
            for extra, names in found["extras"].items()
        },
        "devices": "; ".join(found["devices"]),
        "threads": found["threads"],
        "flags": "on" if found["flags"] else "off",
        "llama.cpp": found["llama_cpp"] or "no converter to GGUF found",
    }
    for name, value in rows.items():
        print(f"{name:16} {one_line(value)}")


def environment() -> dict[str, Any]:
    """Versions, what is installed, devices.

    Returns:
        `hf_lnscale`, `python`, `platform`, `flags` (whether transformers understands ours), `packages` (version by
        name, None if missing), `extras` (name of each extra, with its packages), `devices`, `threads`, `llama_cpp`
        (where the converter to GGUF is, or None).
    """
    import torch

    from ..checkpoints.gguf import find_converter
    from ..hooks.install import is_enabled

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
    import torch

    found = [f"cpu, {os.cpu_count()} cores"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            found.append(f"cuda:{index}, {about.name}, {about.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found
