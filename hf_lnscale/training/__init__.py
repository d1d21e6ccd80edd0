"""Callbacks for any Trainer, and code shared by the recipes.

Importing it requires only torch and transformers; names that need more are imported on first use.
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
