"""Programs that serve a model with layers of their own, and read a scaled checkpoint as it is."""
