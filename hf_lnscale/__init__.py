"""hf_lnscale: a plugin for Hugging Face transformers against the curse of depth.

Importing it enables `ln_scaling` and `drop_layers` in every `from_pretrained`, `from_config` and configuration of
transformers:

    import hf_lnscale
    model = AutoModelForCausalLM.from_config(config, ln_scaling=True)
    model = AutoModelForCausalLM.from_pretrained(name, drop_layers=[12, 14, 17])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .hooks.install import disable, enable, is_enabled

if TYPE_CHECKING:
    from .checkpoints.names import Placement
    from .core.apply import (
        apply_ln_scaling,
        fold_ln_scaling,
        ln_scales,
        remove_ln_scaling,
        set_ln_scaling_step,
        unfold_ln_scaling,
    )
    from .core.config import LNScalingConfig
    from .core.errors import UnsupportedArchitectureError, UnsupportedTransformersError
    from .core.families import register_family
    from .diagnosis import Diagnosis, diagnose
    from .evaluation import evaluate
    from .evaluation.adopt import Adopted, adopt
    from .measuring.text import Windows
    from .pruning.heal import heal
    from .pruning.layers import drop_layers
    from .pruning.plan import PruningPlan
    from .pruning.probe import Proposal, propose_family
    from .pruning.prune import plan_pruning, prune
    from .pruning.pruned import Pruned
    from .pruning.scores import LayerScores, score_layers
    from .pruning.speculative import draft_model

# Where the public names are defined. They are imported on first use, to keep importing this package cheap.
_DEFINED_IN = {
    "checkpoints.names": ("Placement",),
    "core.apply": (
        "apply_ln_scaling", "fold_ln_scaling", "ln_scales", "remove_ln_scaling", "set_ln_scaling_step",
        "unfold_ln_scaling",
    ),
    "core.config": ("LNScalingConfig",),
    "core.errors": ("UnsupportedArchitectureError", "UnsupportedTransformersError"),
    "core.families": ("register_family",),
    "diagnosis": ("Diagnosis", "diagnose"),
    "evaluation": ("evaluate",),
    "evaluation.adopt": ("Adopted", "adopt"),
    "measuring.text": ("Windows",),
    "pruning.heal": ("heal",),
    "pruning.layers": ("drop_layers",),
    "pruning.plan": ("PruningPlan",),
    "pruning.probe": ("Proposal", "propose_family"),
    "pruning.prune": ("plan_pruning", "prune"),
    "pruning.pruned": ("Pruned",),
    "pruning.scores": ("LayerScores", "score_layers"),
    "pruning.speculative": ("draft_model",),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _DEFINED_IN.items() for name in names}

__all__ = [
    "Adopted",
    "Diagnosis",
    "LNScalingConfig",
    "LayerScores",
    "Placement",
    "Proposal",
    "Pruned",
    "PruningPlan",
    "UnsupportedArchitectureError",
    "UnsupportedTransformersError",
    "Windows",
    "__version__",
    "adopt",
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
    "propose_family",
    "prune",
    "register_family",
    "remove_ln_scaling",
    "score_layers",
    "set_ln_scaling_step",
    "unfold_ln_scaling",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


enable()
