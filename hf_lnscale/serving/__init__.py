"""Support for serving programs with their own model implementations, so that they can load scaled checkpoints."""
