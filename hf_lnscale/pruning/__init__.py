"""Chooses layers to drop, drops them and heals the rest."""
