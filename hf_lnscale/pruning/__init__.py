"""Layers chosen, taken out, and the rest repaired."""
