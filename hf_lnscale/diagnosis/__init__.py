"""Measurements over depth: how the residual stream grows, and what each layer is worth.

Layers are counted from 0, as in `model.model.layers`. All measurements run without dropout and leave the model as it
was: same mode, no hooks, no gradients, no cache.
"""

from .diagnosis import Diagnosis
from .examine import diagnose

__all__ = ["Diagnosis", "diagnose"]
