"""`hf-lnscale env`: describes the machine and its Python environment for bug reports."""

from __future__ import annotations

import json
import os
import platform
import sys
from contextlib import suppress
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
    """Show versions, installed packages and devices."""
    found = environment()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    packages = found["packages"]
    rows = {
        "hf_lnscale": f"{found['hf_lnscale']['version']}  {found['hf_lnscale']['path']}",
        "python": f"{found['python']['version']}  {found['python']['path']}",
        "platform": found["platform"],
        **{name: packages[name] for name in REQUIRED},
        **{key: ", ".join(f"{name} {packages[name] or 'no'}" for name in names) for key, names in OPTIONAL.items()},
        "devices": "; ".join(found["devices"]),
        "threads": found["threads"],
        "flags": "on" if found["flags"] else "off",
        "llama.cpp": found["llama_cpp"] or "no GGUF converter found",
    }
    for name, value in rows.items():
        print(f"{name:16} {one_line(value)}")


def environment() -> dict[str, Any]:
    """The content of `env`. `packages` maps names to versions (None if missing), `extras` extras to their packages."""
    import torch

    from ..checkpoints.gguf import find_converter
    from ..hooks.install import is_enabled

    packages: dict[str, str | None] = dict.fromkeys([*REQUIRED, *(one for names in OPTIONAL.values() for one in names)])
    for name in packages:
        with suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    converter = None
    with suppress(FileNotFoundError):
        converter = str(find_converter())
    devices = [f"cpu, {os.cpu_count()} cores"]
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        devices.append(f"cuda:{index}, {about.name}, {about.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
    if torch.backends.mps.is_available():
        devices.append("mps")
    return {
        "hf_lnscale": {"version": __version__, "path": str(Path(__file__).parents[1])},
        "python": {"version": platform.python_version(), "path": sys.executable},
        "platform": platform.platform(),
        "flags": is_enabled(),
        "packages": packages,
        "extras": {extra: list(names) for extra, names in OPTIONAL.items()},
        "devices": devices,
        "threads": torch.get_num_threads(),
        "llama_cpp": converter,
    }
