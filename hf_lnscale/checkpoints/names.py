"""Finds and loads models by name: a Hub repository, a folder, or a GGUF file or its folder."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..core.errors import ArgumentError, CheckpointError, CheckpointNotFoundError

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def locate(model: str | os.PathLike[str]) -> tuple[str, dict[str, str]]:
    """Converts a Hub repository, folder or GGUF file to arguments of `from_pretrained`.

    Returns:
        The repository or folder, and `{"gguf_file": ...}` for a GGUF file. Other weights in the same folder take
        precedence.
    """
    path = Path(model)
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise CheckpointError(
            f"{str(model)!r} is an adapter, not a model. Merge it first, in Python after import hf_lnscale: "
            f"AutoPeftModelForCausalLM.from_pretrained({str(model)!r}).merge_and_unload().save_pretrained(...)"
        )
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    if not path.is_dir():
        try:
            validate_repo_id(str(model))
        except HFValidationError:
            raise CheckpointNotFoundError(
                f"{str(model)!r} is neither a folder, nor a .gguf file, nor the name of a repository on the Hub"
            ) from None
        return str(model), {}
    found = sorted(file.name for file in path.glob("*.gguf") if file.is_file())
    if not found or any(any(path.glob(pattern)) for pattern in _WEIGHTS):
        return str(model), {}
    if len(found) > 1:
        raise CheckpointError(f"{str(model)!r} contains {len(found)} GGUF files: {', '.join(found)}; name one of them")
    return str(model), {"gguf_file": found[0]}


def local_folder(name: str, *ignored: str) -> Path:
    """The folder of a model found by `locate`; a Hub repository is downloaded, without the `ignored` patterns."""
    return Path(name) if Path(name).is_dir() else Path(snapshot_download(name, ignore_patterns=["*.gguf", *ignored]))


def read_config(model: str | os.PathLike[str]) -> Any:
    """Reads the configuration of a model found by `locate`, but no weights."""
    name, where = locate(model)
    hint = "a model is a folder, a .gguf file or its folder, or a repository on the Hub"
    if Path(name).is_dir() and not where and not (Path(name) / "config.json").is_file():
        raise CheckpointNotFoundError(f"the folder {str(model)!r} contains no config.json and no .gguf file", hint)
    try:
        return AutoConfig.from_pretrained(name, **where)
    except OSError as error:
        raise CheckpointError(" ".join(f"cannot read {str(model)!r}: {error}".split()), hint) from error


def require_weights(model: str | os.PathLike[str]) -> None:
    """Refuses a folder whose weight files are missing or, by their safetensors headers, truncated."""
    name, where = locate(model)
    if where or not Path(name).is_dir():
        return
    files = {file for pattern in _WEIGHTS for file in Path(name).glob(pattern)}
    if not files:
        raise CheckpointError(f"the folder {str(model)!r} has no weights: no model.safetensors or the like")
    for file in sorted(one for one in files if one.suffix == ".safetensors"):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {str(file)!r}: {error}") from None


def is_causal_lm(config: PreTrainedConfig) -> bool:
    """Whether `AutoModelForCausalLM` supports this configuration."""
    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def load_tokenizer(model: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Loads the tokenizer of a model found by `locate`, with keywords of `from_pretrained`."""
    name, where = locate(model)
    files = Path(name).glob("*") if Path(name).is_dir() and not where else None
    # Without any of these files, transformers may return an empty tokenizer.
    if files is not None and not any(re.search("token|vocab|merges|spiece", file.name) for file in files):
        raise CheckpointError(
            f"the folder {str(model)!r} has no tokenizer: no tokenizer.json, tokenizer_config.json or similar",
            f"save the model's own tokenizer there: AutoTokenizer.from_pretrained(...).save_pretrained({str(model)!r})",
        )
    try:
        return AutoTokenizer.from_pretrained(name, **where, **kwargs)
    except Exception as error:  # transformers raises many types
        raise CheckpointError(f"cannot read the tokenizer of {str(model)!r}: {error}") from error


def dtype_name(dtype: str) -> str:
    """The torch name of a dtype that may be abbreviated, such as bf16; "auto" is returned unchanged."""
    name = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}.get(dtype, dtype)
    found = getattr(torch, name, None)
    if name != "auto" and not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ArgumentError("dtype", dtype, "auto, float32, bfloat16, float16 or another floating-point type of torch")
    return name


@dataclass(frozen=True)
class Placement:
    """The device of a model and the dtype of its weights.

    Attributes:
        dtype: name of a torch dtype, such as float32 or bfloat16; "auto" uses the checkpoint's dtype.
        device: defaults to a GPU if available.
        device_map: passed to `from_pretrained` in place of a device, for example "auto" to spread a model over devices
            or offload it.

    Raises:
        ArgumentError: if both `device` and `device_map` are given, or the dtype or device is not available.
    """

    dtype: str = "auto"
    device: str | None = None
    device_map: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        if self.device is None:
            return
        if self.device_map:
            problem = f"and `device_map` {self.device_map!r} are mutually exclusive"
            raise ArgumentError("device", self.device, problem=problem, hint="use only one of them")
        try:
            torch.empty(0, device=self.device)
        except (AssertionError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ArgumentError("device", self.device, problem=f"is not available: {reason}") from None

    @property
    def main_device(self) -> str:
        """The device to put inputs on."""
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def load(self, model: str | os.PathLike[str]) -> Any:
        """Loads a causal language model on the device; see `load`."""
        if self.device_map:
            return load(model, dtype=self.dtype, device_map=self.device_map)
        loaded = load(model, dtype=self.dtype)
        # A quantized model stays on the device chosen by its quantizer.
        return loaded if getattr(loaded, "is_quantized", False) else loaded.to(self.main_device)


def load(model: str | os.PathLike[str], **kwargs: Any) -> Any:
    """Loads a causal language model found by `locate` in evaluation mode, with keywords of `from_pretrained`.

    GGUF weights are dequantized on loading, so that the model can be saved like any other.
    """
    if isinstance(kwargs.get("dtype"), str):
        kwargs["dtype"] = dtype_name(kwargs["dtype"])
    name, where = locate(model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(name, **where, **kwargs)
    if where and (quantizer := getattr(loaded, "hf_quantizer", None)):  # none in transformers 5.16
        # The weights are dequantized, but transformers still treats the model as quantized and refuses to save it.
        quantizer.remove_quantization_config(loaded)
    return loaded.eval()


def size_on_disk(model: str | os.PathLike[str]) -> int | None:
    """Size of a model's weight files in bytes; None for a Hub repository that is not in the cache."""
    name, where = locate(model)
    folder = Path(name)
    if where:
        return (folder / where["gguf_file"]).stat().st_size
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name, allow_patterns=list(_WEIGHTS), local_files_only=True))
        except OSError:
            return None
    files = next((files for pattern in _WEIGHTS if (files := list(folder.glob(pattern)))), [])
    return sum(file.stat().st_size for file in files) or None
