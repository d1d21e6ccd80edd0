r"""Pre-trains a model from scratch on text, with LayerNorm Scaling.

A small model in about a minute, on text shipped with Python:

    python recipes/pretrain.py --output_dir runs/pretrain

The paper's 130M model (arXiv 2502.05795) on C4, on one GPU and on eight:

    python recipes/pretrain.py --config recipes/configs/pretrain/130m.yaml --output_dir runs/130m
    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/pretrain.py \
        --config recipes/configs/pretrain/130m.yaml --output_dir runs/130m

Another family and other sizes, on your own text, and the Pre-LN model for comparison:

    python recipes/pretrain.py --family qwen3 --shape 250M --num_key_value_heads 4 --dataset_name text.jsonl \
        --tokenizer_name Qwen/Qwen3-0.6B-Base --output_dir runs/lns
    python recipes/pretrain.py ... --no_ln_scaling --output_dir runs/pre-ln

`--help` lists every option; `--resume_from_checkpoint true` continues a run that was stopped.
"""

from collections.abc import Iterable
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from hf_lnscale.measuring.sample import train_tokenizer
from hf_lnscale.training.arguments import SHAPES, TEXT, DataArguments, PretrainArguments, RecipeConfig, RecipeParser
from hf_lnscale.training.recipe_data import first_texts, load_text
from hf_lnscale.training.recipe_model import new_config
from hf_lnscale.training.recipe_run import Run, launch
from hf_lnscale.training.trainer import RecipeTrainer


def make_parser(prog: str | None = None) -> RecipeParser:
    # The paper's settings (arXiv 2502.05795, section 5), except the batch of 512, which depends on the machine.
    paper = {"learning_rate": None, "warmup_steps": 0.1, "weight_decay": 0.0, "max_length": 256}
    quick = {"gradient_checkpointing": False, "eval_on_start": False}
    types = (PretrainArguments, DataArguments, RecipeConfig)
    return RecipeParser("pretrain", types, __doc__, prog, **TEXT, **paper, **quick)


def get_tokenizer(new: PretrainArguments, training: RecipeConfig, run: Run, texts: Iterable[str]) -> Any:
    """The named tokenizer, the one in the checkpoint to resume, or a new one, trained once for all processes."""
    if new.tokenizer_name or new.config_name or run.checkpoint:
        return AutoTokenizer.from_pretrained(new.tokenizer_name or run.checkpoint or new.config_name)
    trained = [train_tokenizer(texts, new.vocab_size) if training.process_index == 0 else None]
    tokenizer: Any = broadcast_object_list(trained)[0]
    tokenizer.add_special_tokens({"pad_token": "<|padding|>"})
    return tokenizer


def main(new: PretrainArguments, data: DataArguments, training: RecipeConfig) -> None:
    if training.learning_rate is None:
        if new.config_name:
            raise ValueError("learning_rate: required with --config_name; only the paper's shapes have defaults")
        training.learning_rate = SHAPES[new.shape].learning_rate
    run = Run("pretrain", training, new, data)
    column = training.dataset_text_field
    train, held_out = load_text(data, column, training.seed)
    tokenizer = get_tokenizer(new, training, run, first_texts(train, column))
    config = new_config(tokenizer, new, training.max_length)
    set_seed(training.seed)
    # Plain normal initialization, which with LayerNorm Scaling works better than depth-scaled initialization (the
    # paper's table of scalings).
    trainer = RecipeTrainer(
        model=AutoModelForCausalLM.from_config(config, ln_scaling=new.ln_scaling),
        args=training,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    run.train(trainer)


if __name__ == "__main__":
    launch(make_parser(), main)
