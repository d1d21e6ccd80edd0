"""Replacements for functions of transformers, its Trainer and PEFT."""
