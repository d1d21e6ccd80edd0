"""The configuration of a checkpoint of DeciLM, which this file lies beside: hf-lnscale export --format deci wrote both.

vLLM knows the architecture, but leaves its configuration to the checkpoint. Nothing of hf_lnscale is needed to read it.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig


class Part(dict[str, Any]):
    """What JSON can hold, read as attributes."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class DeciConfig(LlamaConfig):
    """Llama's, with what each layer has in `block_configs`."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Any = (), intermediate_size: Any = None, **kwargs: Any) -> None:
        # A checkpoint has no intermediate_size: Llama's classes, which would make the missing parts anew, want one.
        self.block_configs = [Part({name: Part(part) for name, part in block.items()}) for block in block_configs]
        super().__init__(**kwargs)
