"""Configuration class of the DeciLM checkpoint in this folder. Written by `hf-lnscale export --format deci`.

vLLM implements the architecture but expects the checkpoint to define its configuration. Does not require hf_lnscale.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig


class Part(dict[str, Any]):
    """A dict whose keys can be read as attributes."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class DeciConfig(LlamaConfig):
    """`LlamaConfig` with `block_configs`, which describes each layer."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Any = (), intermediate_size: Any = None, **kwargs: Any) -> None:
        # None in the checkpoint, so that Llama's classes fail instead of initializing the missing parts randomly.
        self.block_configs = [Part({name: Part(part) for name, part in block.items()}) for block in block_configs]
        super().__init__(**kwargs)
