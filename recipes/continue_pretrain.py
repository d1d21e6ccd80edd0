"""Trains a checkpoint on, on raw text.

    python recipes/continue_pretrain.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --output_dir runs/continue
    python recipes/continue_pretrain.py --config recipes/configs/continue_pretrain/qwen3-0.6b.yaml \
        --dataset_name text.jsonl --output_dir runs/continue
    accelerate launch --config_file recipes/accelerate/fsdp2.yaml recipes/continue_pretrain.py \
        --config recipes/configs/continue_pretrain/llama-3.1-8b.yaml --dataset_name corpus/ --output_dir runs/continue

A checkpoint that was trained with LayerNorm Scaling keeps it, without an option. One that was trained without it is led
over with `--ln_scaling_warmup_steps`: its scale goes from none to 1/sqrt(l) within so many steps, and the last of them
must lie inside the run.

`--help` lists every option; `--resume_from_checkpoint true` goes on with a run that was stopped.
"""

from trl import ModelConfig, get_peft_config

from hf_lnscale.training.arguments import ContinueConfig, DataArguments, DepthArguments, parse
from hf_lnscale.training.data import load_text
from hf_lnscale.training.model import load
from hf_lnscale.training.run import Run, script
from hf_lnscale.training.trainer import RecipeTrainer


@script
def main() -> None:
    depth, data, checkpoint, training = parse(
        "continue_pretrain", DepthArguments, DataArguments, ModelConfig, ContinueConfig, description=__doc__
    )
    run = Run("continue_pretrain", training, depth, data, checkpoint)
    model, tokenizer = load(checkpoint, training, depth)
    train, held_out = load_text(data, training.dataset_text_field, training.seed)
    trainer = RecipeTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=get_peft_config(checkpoint),
        callbacks=run.callbacks(),
    )
    run.train(trainer)


if __name__ == "__main__":
    main()
