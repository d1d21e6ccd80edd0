"""What the recipes share. Importing it needs torch and transformers alone."""

from .warmup import LNScalingWarmupCallback

__all__ = ["LNScalingWarmupCallback"]
