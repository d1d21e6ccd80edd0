"""What is replaced in transformers, its Trainer and PEFT."""
