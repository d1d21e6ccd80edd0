"""Measurements over depth: how the residual stream grows, and what each layer contributes.

Layers are counted from 0, as in `model.model.layers`. All measurements run without dropout and leave the model
unchanged: same mode, no hooks, no gradients, no cache.
"""

from .diagnosis import Diagnosis
from .examine import diagnose

__all__ = ["Diagnosis", "diagnose"]
