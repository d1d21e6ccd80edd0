"""What training runs share: callbacks, and what the recipes are made of.

Importing it needs torch and transformers alone; what needs more is imported when it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .warmup import LNScalingWarmupCallback

if TYPE_CHECKING:
    from .depth_stats import DepthStatsCallback, plot_depth_stats, read_depth_stats

__all__ = ["DepthStatsCallback", "LNScalingWarmupCallback", "plot_depth_stats", "read_depth_stats"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(".depth_stats", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
