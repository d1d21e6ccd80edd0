r"""Continues the pre-training of a checkpoint on raw text.

    python recipes/continue_pretrain.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --output_dir runs/continue
    python recipes/continue_pretrain.py --config recipes/configs/continue_pretrain/qwen3-0.6b.yaml \
        --dataset_name text.jsonl --output_dir runs/continue
    accelerate launch --config_file recipes/accelerate/fsdp2.yaml recipes/continue_pretrain.py \
        --config recipes/configs/continue_pretrain/llama-3.1-8b.yaml --dataset_name corpus/ --output_dir runs/continue

To mix in text of the original kind, use a YAML file such as recipes/configs/continue_pretrain/mixture.yaml.

A checkpoint trained with LayerNorm Scaling keeps it without any option. A checkpoint trained without it can be
converted: its scale is ramped from 1 to 1/sqrt(l) in a warmup that must not exceed the run.

    python recipes/continue_pretrain.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --dataset_name text.jsonl \
        --ln_scaling --ln_scaling_warmup_steps 1000 --max_steps 5000 --output_dir runs/lns

`--help` lists every option; `--resume_from_checkpoint true` continues a run that was stopped.
"""

from trl import get_peft_config

from hf_lnscale.training.arguments import (
    TEXT,
    CheckpointArguments,
    DataArguments,
    RecipeConfig,
    RecipeParser,
    WarmupArguments,
)
from hf_lnscale.training.recipe_data import load_text
from hf_lnscale.training.recipe_model import load_model, load_tokenizer
from hf_lnscale.training.recipe_run import Run, launch
from hf_lnscale.training.trainer import RecipeTrainer


def make_parser(prog: str | None = None) -> RecipeParser:
    types = (WarmupArguments, CheckpointArguments, DataArguments, RecipeConfig)
    # Rewarming and redecaying the learning rate works best on new text (Ibrahim et al., arXiv 2403.08763).
    return RecipeParser("continue_pretrain", types, __doc__, prog, **TEXT, learning_rate=5e-5, warmup_steps=0.01)


def main(
    warmup: WarmupArguments,
    checkpoint: CheckpointArguments,
    data: DataArguments,
    training: RecipeConfig,
) -> None:
    run = Run("continue_pretrain", training, warmup, checkpoint, data)
    tokenizer = load_tokenizer(checkpoint, training)
    train, held_out = load_text(data, training.dataset_text_field, training.seed)
    trainer = RecipeTrainer(
        model=load_model(checkpoint, training, warmup),
        args=training,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=get_peft_config(checkpoint),
    )
    run.train(trainer)


if __name__ == "__main__":
    launch(make_parser(), main)
