"""The functions that are replaced in transformers, its Trainer and PEFT."""
