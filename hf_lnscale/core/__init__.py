"""The scale and the families: what needs torch and transformers alone."""
