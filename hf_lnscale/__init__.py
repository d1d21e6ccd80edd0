"""hf_lnscale: LayerNorm Scaling for Hugging Face transformers, against the curse of depth.

Importing it makes every `from_pretrained`, `from_config` and configuration of transformers understand `ln_scaling`:

    import hf_lnscale
    model = AutoModelForCausalLM.from_config(config, ln_scaling=True)
"""

from ._version import __version__
from .depth.layers import drop_layers
from .depth.plan import PruningPlan
from .families import UnsupportedArchitectureError, register_family
from .hooks import disable, enable, is_enabled
from .scaling import (
    LNScalingConfig,
    apply_ln_scaling,
    fold_ln_scaling,
    ln_scales,
    remove_ln_scaling,
    unfold_ln_scaling,
)

__all__ = [
    "LNScalingConfig",
    "PruningPlan",
    "UnsupportedArchitectureError",
    "__version__",
    "apply_ln_scaling",
    "disable",
    "drop_layers",
    "enable",
    "fold_ln_scaling",
    "is_enabled",
    "ln_scales",
    "register_family",
    "remove_ln_scaling",
    "unfold_ln_scaling",
]

enable()
