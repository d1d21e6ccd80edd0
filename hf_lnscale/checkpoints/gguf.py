"""Writes a checkpoint as a GGUF file, using llama.cpp's converter."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from ..core.errors import ArgumentError, PathExistsError, PathNotFoundError
from ..core.families import text_config
from ..core.processes import run_script
from ..core.record import DROPPED, get_ln_scaling, record
from .export import export
from .folders import scratch_folder
from .names import local_folder, locate, read_config

CONVERTER = "convert_hf_to_gguf.py"
_PATTERNS = ("layer_types", "no_rope_layers", "mlp_only_layers")


def find_converter(path: str | os.PathLike[str] | None = None) -> Path:
    """Finds llama.cpp's converter at `path`, at $LLAMA_CPP (either the file or llama.cpp's folder), or on PATH."""
    for source, place in (("converter", path), ("LLAMA_CPP", os.environ.get("LLAMA_CPP"))):
        if place:
            found = Path(place) / CONVERTER if Path(place).is_dir() else Path(place)
            if not found.is_file():
                raise PathNotFoundError(source, place, problem=f"is not llama.cpp's converter: there is no {found}")
            return found.resolve()
    if on_path := shutil.which(CONVERTER):
        return Path(on_path).resolve()
    raise PathNotFoundError(
        "converter",
        problem=f"a GGUF file needs llama.cpp's {CONVERTER}, found neither by `converter` or `LLAMA_CPP` nor on PATH",
        hint="clone https://github.com/ggml-org/llama.cpp and use `converter=llama.cpp`",
    )


def export_gguf(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    converter: str | os.PathLike[str] | None = None,
    outtype: str = "auto",
    force: bool = False,
    progress: bool = True,
) -> Path:
    """Writes a checkpoint as a GGUF file, for llama.cpp and programs built on it.

    An active scale is first folded into the weights, in a temporary folder. The file appears only when complete. The
    converter runs in this Python environment, which needs the packages in llama.cpp's requirements.

    Args:
        checkpoint: folder or Hub repository of a scaled, folded, pruned or plain checkpoint.
        out: file to write.
        converter: see `find_converter`.
        outtype: weight type, as named by the converter: f32, f16, bf16, q8_0, auto.
        force: whether to replace `out` if it exists.
        progress: whether to show a progress bar while folding.

    Raises:
        ValueError: if an argument is invalid, or layers were dropped from a model whose layers follow a pattern that
            may be built into llama.cpp.
        RuntimeError: if the converter fails, with the last line of its output.
    """
    target = Path(out)
    if target.suffix != ".gguf":
        raise ArgumentError("out", str(out), "a file that ends in .gguf")
    if target.exists() and not force:
        raise PathExistsError("out", str(out), problem="exists", hint="choose another file, or use `force=True`")
    script = find_converter(converter)
    name, where = locate(checkpoint)
    if where:
        raise ValueError(f"{str(checkpoint)!r} is already a GGUF file")
    config = read_config(name)
    if record(config).sublayers:
        raise ValueError(
            f"{str(checkpoint)!r} has layers without attention or MLP; fill them with zeros first (hf-lnscale export "
            "--format zeros), or use --format deci if llama.cpp can read the result"
        )
    _require_no_pattern(config, str(checkpoint))
    with scratch_folder(target) as scratch:
        scaled = get_ln_scaling(config)
        source = export(name, scratch / "folded", progress=progress) if scaled else local_folder(name)
        written = scratch / target.name
        # The converter reads configuration and weights separately, so with the plugin it would lose the scale.
        done = run_script(script, source, "--outfile", written, "--outtype", outtype)
        if done.returncode or not written.is_file():
            lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            reason = lines[-1].strip() if lines else f"exit code {done.returncode}"
            raise RuntimeError(f"{script.name} failed: {reason}")
        os.replace(written, target)
    return target


def _require_no_pattern(config: Any, shown: str) -> None:
    """Refuses a pruned model whose layer pattern differs from its family's default for that number of layers."""
    text = text_config(config)
    if record(config).dropped is None:
        return
    plain = {key: value for key, value in text.to_dict().items() if key not in (*_PATTERNS, DROPPED)}
    family = type(text).from_dict(plain)
    for name in _PATTERNS:
        if getattr(text, name, None) != getattr(family, name, None):
            raise ValueError(
                f"{shown!r} has dropped layers, and its family's layers follow a pattern ({name}). llama.cpp may apply "
                "its own built-in pattern from the first layer on and give wrong outputs"
            )
