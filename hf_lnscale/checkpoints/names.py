"""What a user calls a model: a name on the Hub, a folder, a folder with a GGUF file in it, or that file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, AutoModelForCausalLM

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def locate(model: str | os.PathLike) -> tuple[str, dict[str, str]]:
    """Turns what a user calls a model into the arguments of every `from_pretrained`.

    Args:
        model: name of a repository on the Hub, a folder, or a GGUF file.

    Returns:
        The name or folder, and `{"gguf_file": ...}` where the weights are in one: a folder that holds other weights too
        is read from these.

    Raises:
        FileNotFoundError: if it is none of the three, or a folder without a model.
        ValueError: if there are several GGUF files to choose from, and for the folder of an adapter.
    """
    path = Path(model)
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise ValueError(
            f"{str(model)!r} is an adapter and no model; merge it first: AutoPeftModelForCausalLM.from_pretrained("
            f"{str(model)!r}).merge_and_unload().save_pretrained(...), in Python after `import hf_lnscale`"
        )
    if path.suffix == ".gguf" and path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    if not path.is_dir():
        try:
            validate_repo_id(str(model))
        except HFValidationError:
            raise FileNotFoundError(
                f"{str(model)!r} is neither a folder, nor a .gguf file, nor the name of a repository on the Hub"
            ) from None
        return str(model), {}
    found = sorted(file.name for file in path.glob("*.gguf"))
    if not found or any(any(path.glob(pattern)) for pattern in _WEIGHTS):
        return str(model), {}
    if len(found) > 1:
        raise ValueError(f"{str(model)!r} holds {len(found)} GGUF files: {', '.join(found)}; name one of them")
    return str(model), {"gguf_file": found[0]}


def read_config(model: str | os.PathLike) -> Any:
    """Reads a model's configuration from whatever `locate` finds; no weight is read.

    Raises:
        OSError: if there is no such model; the message names it.
        ValueError: as `AutoConfig` does, and `locate`.
    """
    name, where = locate(model)
    try:
        return AutoConfig.from_pretrained(name, **where)
    except OSError as error:
        if str(model) in str(error):
            raise
        raise OSError(f"cannot read {str(model)!r}: {error}") from error


@dataclass(frozen=True)
class Placement:
    """Where a model is computed, and the type of its weights.

    Attributes:
        dtype: a torch type by name, such as float32 or bfloat16; "auto" is the checkpoint's own.
        device: None takes a GPU if there is one.
        device_map: in place of `device`: passed to `from_pretrained`, such as "auto" for a model that is spread over
            devices or offloaded.

    Raises:
        ValueError: if both `device` and `device_map` are given.
    """

    dtype: str = "auto"
    device: str | None = None
    device_map: str | None = None

    def __post_init__(self) -> None:
        if self.device and self.device_map:
            raise ValueError(f"device and device_map: give one of the two, got {self.device!r} and {self.device_map!r}")

    @property
    def main_device(self) -> str:
        """The device that inputs go to."""
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def load(self, model: str | os.PathLike) -> Any:
        """Loads a causal language model there; see `load`."""
        if self.device_map:
            return load(model, dtype=self.dtype, device_map=self.device_map)
        loaded = load(model, dtype=self.dtype)
        # A quantized model stays where its quantizer has put it.
        return loaded if getattr(loaded, "is_quantized", False) else loaded.to(self.main_device)


def load(model: str | os.PathLike, **kwargs: Any) -> Any:
    """Loads a causal language model from whatever `locate` finds, in evaluation mode.

    The weights of a GGUF file are dequantized on loading; the model is then an ordinary one, and can be saved.

    Args:
        model: see `locate`.
        kwargs: passed to `from_pretrained`.

    Raises:
        OSError: if there is no such model.
        ValueError: as `from_pretrained` does, and `locate`; for a `dtype` that there is not.
    """
    dtype = kwargs.get("dtype", "auto")
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype must be auto, or a type of torch as float32, bfloat16 or float16, got {dtype!r}")
    name, where = locate(model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(name, **where, **kwargs)
    if where:
        # The weights are unpacked already, but a model that came from GGUF counts as quantized and is not saved.
        loaded.hf_quantizer.remove_quantization_config(loaded)
    return loaded.eval()


def size_on_disk(model: str | os.PathLike) -> int | None:
    """Bytes of a model's weight files; None for a name on the Hub of which none are in the cache."""
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
