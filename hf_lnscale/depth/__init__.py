"""Layers measured, chosen, taken out, and the rest repaired."""
