"""What training runs share. Nothing here is imported by the core; TRL, PEFT and matplotlib are imported where used."""

from .depth_stats import DepthStatsCallback, plot_depth_stats, read_depth_stats

__all__ = ["DepthStatsCallback", "plot_depth_stats", "read_depth_stats"]
