"""hf_lnscale: a plugin for Hugging Face transformers against the curse of depth.

Importing it makes every `from_pretrained`, `from_config` and configuration of transformers understand `ln_scaling` and
`drop_layers`:

    import hf_lnscale
    model = AutoModelForCausalLM.from_config(config, ln_scaling=True)
    model = AutoModelForCausalLM.from_pretrained(name, drop_layers=[12, 14, 17])
"""

from ._version import __version__
from .core.apply import (
    apply_ln_scaling,
    fold_ln_scaling,
    ln_scales,
    remove_ln_scaling,
    set_ln_scaling_step,
    unfold_ln_scaling,
)
from .core.config import LNScalingConfig
from .core.families import UnsupportedArchitectureError, register_family
from .diagnosis import Diagnosis, diagnose
from .evaluation import evaluate
from .hooks.install import disable, enable, is_enabled
from .pruning.heal import heal
from .pruning.layers import drop_layers
from .pruning.plan import PruningPlan
from .pruning.scores import LayerScores, score_layers
from .pruning.search import plan_pruning
from .pruning.speculative import draft_model

__all__ = [
    "Diagnosis",
    "LNScalingConfig",
    "LayerScores",
    "PruningPlan",
    "UnsupportedArchitectureError",
    "__version__",
    "apply_ln_scaling",
    "diagnose",
    "disable",
    "draft_model",
    "drop_layers",
    "enable",
    "evaluate",
    "fold_ln_scaling",
    "heal",
    "is_enabled",
    "ln_scales",
    "plan_pruning",
    "register_family",
    "remove_ln_scaling",
    "score_layers",
    "set_ln_scaling_step",
    "unfold_ln_scaling",
]

enable()
