"""vLLM: uses vLLM's own model class and multiplies the pre-norm weights while loading.

vLLM calls `register` in each of its processes. A class is created when vLLM looks it up in this module by the name in
the checkpoint's config.json, so registering imports no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..core.families import FAMILIES, RENAMED, family_of, text_config
from ..core.norm import scale_parameter
from ..core.record import ARCHITECTURE_PREFIX, record


def register() -> None:
    """Registers the protected names of all architectures that both vLLM and the table of families support.

    Not those whose pre-norms have other names in checkpoints, where `scaled` would not find them.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as names
    from vllm import ModelRegistry

    known = {names[family] for family, row in FAMILIES.items() if family in names and row.no_dropping != RENAMED}
    for name in known & set(ModelRegistry.get_supported_archs()):
        protected = ARCHITECTURE_PREFIX + name
        ModelRegistry.register_model(protected, f"{__name__}:{protected}")


def scaled(weights: Iterable[tuple[str, torch.Tensor]], config: PreTrainedConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """A checkpoint's tensors with the scale folded in, in their own dtype.

    Args:
        weights: names, as in the checkpoint, and tensors; all or only some.
        config: configuration of the model, with an active scale.

    Raises:
        UnsupportedArchitectureError: if the model's family is not in the table.
    """
    family, scaling = family_of(config), record(config).active
    assert scaling is not None
    scales = scaling.scales(text_config(config).num_hidden_layers)
    for name, weight in weights:
        position = family.layer_of_pre_norm(name)
        # A multi-token prediction layer is stored after the last layer, under the next index.
        if position is not None and position < len(scales):
            one_plus = family.one_plus_weight and name.endswith(".weight")
            weight = scale_parameter(weight, scales[position], one_plus)
        yield name, weight


def __getattr__(name: str) -> Any:
    if not name.startswith(ARCHITECTURE_PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm import ModelRegistry

    base: Any = ModelRegistry.models[name.removeprefix(ARCHITECTURE_PREFIX)].load_model_cls()

    class Scaled(base):  # type: ignore[misc]
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            self._scaled_config = vllm_config.model_config.hf_config

        def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], *args: Any, **kwargs: Any) -> Any:
            return super().load_weights(scaled(weights, self._scaled_config), *args, **kwargs)

    Scaled.__name__ = Scaled.__qualname__ = name
    return Scaled
