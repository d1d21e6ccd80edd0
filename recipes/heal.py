r"""Heals a pruned model by training, with LoRA or in full, on text or by distillation from the unpruned model.

    python recipes/heal.py --config smollm2-135m --drop_layers 12 14 --output_dir runs/healed
    hf-lnscale prune Qwen/Qwen3-0.6B-Base --data text.jsonl --layers 4 --out pruned
    python recipes/heal.py --config qwen3-0.6b --model_name_or_path pruned --dataset_name text.jsonl \
        --output_dir runs/healed

With LoRA on text, without a teacher, as in Gromov et al. (arXiv 2403.17887), and on eight GPUs:

    python recipes/heal.py --config recipes/configs/heal/llama-3.2-1b.yaml --model_name_or_path pruned \
        --teacher none --learning_rate 3e-4 --output_dir runs/healed
    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/heal.py \
        --config recipes/configs/heal/llama-3.1-8b.yaml --model_name_or_path pruned --output_dir runs/healed

On text that the unpruned model generates: continuations of the beginnings of 2,000 rows, or answers if they are chats:

    python recipes/heal.py --model_name_or_path pruned --whole Qwen/Qwen3-0.6B --dataset_name chats.jsonl \
        --self_data 2000 --output_dir runs/healed

Training on a text teaches the model that text, whether it heals or not. The run therefore reports the gap to the
unpruned model before and after training, on the text and on text of another kind. With `--control`, the unpruned model
is first trained in the same way.

`--help` lists every option; `--resume_from_checkpoint true` continues a run that was stopped.
"""

from dataclasses import replace
from functools import partial

from transformers import AutoModelForCausalLM
from trl import get_peft_config

from hf_lnscale.core.warnings import warn
from hf_lnscale.training.arguments import (
    TEXT,
    CheckpointArguments,
    DataArguments,
    RecipeConfig,
    RecipeParser,
    TeacherArguments,
)
from hf_lnscale.training.chats import prepare_chat
from hf_lnscale.training.control import Control
from hf_lnscale.training.generation import write_self_data
from hf_lnscale.training.recipe_data import load_text_or_chats, other_text
from hf_lnscale.training.recipe_model import load_model, load_tokenizer, require_pruned, require_same_tokenizer
from hf_lnscale.training.recipe_run import Run, launch
from hf_lnscale.training.trainer import DistillationTrainer, RecipeTrainer


def make_parser(prog: str | None = None) -> RecipeParser:
    types = (TeacherArguments, CheckpointArguments, DataArguments, RecipeConfig)
    # Minitron's peak and decay for distillation (arXiv 2408.11796, table 4), also used for text.
    return RecipeParser("heal", types, __doc__, prog, **TEXT, learning_rate=1e-4, warmup_steps=0.05)


def main(
    teacher: TeacherArguments,
    checkpoint: CheckpointArguments,
    data: DataArguments,
    training: RecipeConfig,
) -> None:
    run = Run("heal", training, teacher, checkpoint, data)
    if not (teacher.teacher or teacher.self_data):
        warn(
            "teacher: without one the model learns your text, and other text can get worse (docs/recipes.md); name the "
            "unpruned model with --teacher"
        )
    whole = teacher.whole_model(checkpoint.model_name_or_path, checkpoint.layers())
    tokenizer = load_tokenizer(checkpoint, training)
    require_pruned(checkpoint, training)
    for name, argument in {whole: "whole", teacher.teacher: "teacher"}.items():  # often the same model
        if name:
            require_same_tokenizer(argument, name, tokenizer)
    load_unpruned = partial(AutoModelForCausalLM.from_pretrained, dtype=teacher.teacher_dtype)
    train, held_out = load_text_or_chats(data, training.dataset_text_field, training.seed)
    prepare_chat(training, tokenizer, train)
    training.packing &= train.column_names == [training.dataset_text_field]  # keeps answers with their questions
    if whole and teacher.self_data:
        train = write_self_data(
            training, tokenizer, partial(load_unpruned, whole), train, teacher.self_data, begin=run.mark
        )
    options = {
        "args": training,
        "train_dataset": train,
        "eval_dataset": held_out,
        "other_dataset": other_text(data, training.dataset_text_field) if whole else None,
        "processing_class": tokenizer,
        "peft_config": get_peft_config(checkpoint),
    }
    model = load_model(checkpoint, training)
    trainer = (
        DistillationTrainer(load_unpruned(teacher.teacher), model=model, **options)
        if teacher.teacher
        else RecipeTrainer(model=model, **options)
    )
    if whole:
        run.mark()
        load = partial(load_model, replace(checkpoint, model_name_or_path=whole, drop_layers=None), training)
        run.control = Control(trainer, whole, load, teacher.control, **options)
    run.train(trainer)


if __name__ == "__main__":
    launch(make_parser(), main)
