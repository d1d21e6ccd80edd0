"""hf_lnscale: a plugin for Hugging Face transformers against the curse of depth.

Importing it enables `ln_scaling` and `drop_layers` in every `from_pretrained`, `from_config` and configuration of
transformers:

    import hf_lnscale
    model = AutoModelForCausalLM.from_config(config, ln_scaling=True)
    model = AutoModelForCausalLM.from_pretrained(name, drop_layers=[12, 14, 17])
"""

import sys

# `python -m hf_lnscale` puts the current folder first on the path, where a file such as typing.py would shadow the
# library; isolated mode and `python -P` (Python 3.11) do not.
if (
    sys.argv[:1] == ["-m"]
    and sys.orig_argv[-len(sys.argv)] in ("hf_lnscale", "-mhf_lnscale")
    and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False))
):
    del sys.path[0]

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__ as __version__
from .hooks.install import disable as disable
from .hooks.install import enable as enable
from .hooks.install import is_enabled as is_enabled

if TYPE_CHECKING:  # `as` makes type checkers take them as public
    from .checkpoints.names import Placement as Placement
    from .core.apply import apply_ln_scaling as apply_ln_scaling
    from .core.apply import fold_ln_scaling as fold_ln_scaling
    from .core.apply import ln_scales as ln_scales
    from .core.apply import remove_ln_scaling as remove_ln_scaling
    from .core.apply import set_ln_scaling_step as set_ln_scaling_step
    from .core.apply import unfold_ln_scaling as unfold_ln_scaling
    from .core.config import LNScalingConfig as LNScalingConfig
    from .core.errors import UnsupportedArchitectureError as UnsupportedArchitectureError
    from .core.errors import UnsupportedTransformersError as UnsupportedTransformersError
    from .core.families import register_family as register_family
    from .diagnosis import Diagnosis as Diagnosis
    from .diagnosis import diagnose as diagnose
    from .evaluation import evaluate as evaluate
    from .evaluation.adopt import Adopted as Adopted
    from .evaluation.adopt import adopt as adopt
    from .measuring.text import Windows as Windows
    from .pruning.heal import heal as heal
    from .pruning.layers import drop_layers as drop_layers
    from .pruning.plan import PruningPlan as PruningPlan
    from .pruning.probe import Proposal as Proposal
    from .pruning.probe import propose_family as propose_family
    from .pruning.prune import plan_pruning as plan_pruning
    from .pruning.prune import prune as prune
    from .pruning.pruned import Pruned as Pruned
    from .pruning.scores import LayerScores as LayerScores
    from .pruning.scores import score_layers as score_layers
    from .pruning.speculative import draft_model as draft_model

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

__all__ = sorted(["__version__", "disable", "enable", "is_enabled", *_MODULE_OF])


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


enable()
