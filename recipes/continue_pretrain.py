r"""Trains a checkpoint on, on raw text.

    python recipes/continue_pretrain.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --output_dir runs/continue
    python recipes/continue_pretrain.py --config recipes/configs/continue_pretrain/qwen3-0.6b.yaml \
        --dataset_name text.jsonl --output_dir runs/continue
    accelerate launch --config_file recipes/accelerate/fsdp2.yaml recipes/continue_pretrain.py \
        --config recipes/configs/continue_pretrain/llama-3.1-8b.yaml --dataset_name corpus/ --output_dir runs/continue

A checkpoint that was trained with LayerNorm Scaling keeps it, without an option. One that was trained without it can be
led over: its scale goes from none to 1/sqrt(l) over the first steps, all of which must lie in the run.

    python recipes/continue_pretrain.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --dataset_name text.jsonl \
        --ln_scaling --ln_scaling_warmup_steps 1000 --max_steps 5000 --output_dir runs/lns

`--help` lists every option; `--resume_from_checkpoint true` goes on with a run that was stopped.
"""

from trl import ModelConfig, get_peft_config

from hf_lnscale.training.arguments import ContinueConfig, DataArguments, DepthArguments, WarmupArguments, parse
from hf_lnscale.training.recipe_data import load_text
from hf_lnscale.training.recipe_model import load
from hf_lnscale.training.recipe_run import Run, script
from hf_lnscale.training.trainer import RecipeTrainer


@script
def main() -> None:
    warmup, depth, data, checkpoint, training = parse(
        "continue_pretrain",
        WarmupArguments,
        DepthArguments,
        DataArguments,
        ModelConfig,
        ContinueConfig,
        description=__doc__,
    )
    run = Run("continue_pretrain", training, warmup, depth, data, checkpoint)
    model, tokenizer = load(checkpoint, training, depth, warmup)
    train, held_out = load_text(data, training.dataset_text_field, training.seed)
    trainer = RecipeTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=get_peft_config(checkpoint),
    )
    run.train(trainer)


if __name__ == "__main__":
    main()
