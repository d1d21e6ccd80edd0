"""The scale and the model families. Depends only on torch and transformers."""
