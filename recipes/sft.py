r"""Fine-tunes a checkpoint on chats, instructions, or prompts with completions, training only on the answers.

    python recipes/sft.py --model_name_or_path HuggingFaceTB/SmolLM2-135M --chat_template_path chatml \
        --output_dir runs/sft
    python recipes/sft.py --config recipes/configs/sft/qwen3-0.6b.yaml --dataset_name chats.jsonl --output_dir runs/sft

With LoRA, and with QLoRA on a model that would not fit otherwise:

    python recipes/sft.py --config recipes/configs/sft/qwen3-0.6b.yaml --use_peft --lora_r 16 --learning_rate 2e-4 \
        --output_dir runs/lora
    python recipes/sft.py --config recipes/configs/sft/llama-3.1-8b.yaml --output_dir runs/qlora

In full on eight GPUs:

    accelerate launch --config_file recipes/accelerate/fsdp2.yaml recipes/sft.py \
        --config recipes/configs/sft/qwen3-8b.yaml --use_peft false --load_in_4bit false --learning_rate 2e-5 \
        --lr_scheduler_type cosine --max_grad_norm 1 --gradient_accumulation_steps 2 --output_dir runs/sft

`--help` lists every option; `--resume_from_checkpoint true` continues a run that was stopped.
"""

from trl import get_peft_config

from hf_lnscale.training.arguments import CheckpointArguments, DataArguments, RecipeConfig, RecipeParser
from hf_lnscale.training.chats import prepare_chat
from hf_lnscale.training.recipe_data import load_conversations
from hf_lnscale.training.recipe_model import load_model, load_tokenizer
from hf_lnscale.training.recipe_run import Run, launch
from hf_lnscale.training.trainer import RecipeTrainer


def make_parser(prog: str | None = None) -> RecipeParser:
    types = (CheckpointArguments, DataArguments, RecipeConfig)
    return RecipeParser("sft", types, __doc__, prog, num_samples=2)


def main(checkpoint: CheckpointArguments, data: DataArguments, training: RecipeConfig) -> None:
    run = Run("sft", training, checkpoint, data)
    tokenizer = load_tokenizer(checkpoint, training)
    train, held_out = load_conversations(data, training.seed)
    prepare_chat(training, tokenizer, train)
    trainer = RecipeTrainer(
        model=load_model(checkpoint, training),
        args=training,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=get_peft_config(checkpoint),
    )
    run.train(trainer)


if __name__ == "__main__":
    launch(make_parser(), main)
