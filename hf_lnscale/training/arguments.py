"""What a recipe can be told, beside TRL's own arguments: dataclasses for TRL's parser, whose `--help` prints them."""

from __future__ import annotations

import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from typing import Any

import torch
import trl
from accelerate.utils import parse_flag_from_env
from packaging.version import Version
from trl import SFTConfig, TrlParser

from .scripts import find_config
from .shapes import SHAPES

if Version(trl.__version__) < Version("1.16"):
    raise ImportError(f"the recipes need trl 1.16 or newer, and with it Python 3.11; this is trl {trl.__version__}")


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field with its help text."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class DataArguments:
    """What is trained on."""

    dataset_name: str | None = option(
        None,
        "Name on the Hub, or path of a file (.txt, .jsonl, .json, .parquet, .csv) or of a folder of them. Without one: "
        "English that comes with every Python.",
    )
    dataset_config: str | None = option(None, "Configuration of the dataset on the Hub.")
    dataset_train_split: str = option("train", "Split to train on.")
    dataset_test_split: str | None = option(
        None,
        "Split to evaluate on: of a dataset on the Hub, or of a folder with files of that name. Without one, and of a "
        "file, rows are held out of training.",
    )
    dataset_streaming: bool = option(False, "Read the data while training, and not before; needs --max_steps.")
    eval_dataset_name: str | None = option(None, "Name or path of other data to evaluate on.")
    eval_samples: int = option(256, "Rows of data to evaluate on; those held out are a tenth of all rows at the most.")


@dataclass
class PretrainArguments:
    """What model is made."""

    shape: str = option("demo", "Sizes of the model: one of the paper's, or a small one.", choices=list(SHAPES))
    family: str = option("llama", "Family of the model, a model_type such as llama, qwen3 or gemma2.")
    config_name: str | None = option(
        None, "Folder or name on the Hub to take the configuration from, in place of family and shape."
    )
    tokenizer_name: str | None = option(
        None, "Folder or name on the Hub; without one, a byte-level BPE is trained on the first of the data."
    )
    vocab_size: int = option(4096, "Tokens of the tokenizer that is trained.")
    hidden_size: int | None = option(None, "In place of the shape's, as all the following.")
    intermediate_size: int | None = option(None, "Width of the MLP.")
    num_hidden_layers: int | None = option(None, "Number of layers.")
    num_attention_heads: int | None = option(None, "Heads of attention.")
    num_key_value_heads: int | None = option(None, "Heads of keys and values; as many as of attention if not given.")
    head_dim: int | None = option(None, "Size of a head.")
    ln_scaling: bool = option(True, "LayerNorm Scaling; without it, the plain Pre-LN model.")


@dataclass
class DepthArguments:
    """Which layers of the checkpoint are trained."""

    drop_layers: list[str] | None = option(
        None, "Layers to leave out of the checkpoint, as in --drop_layers 12 14, or the path of a pruning plan."
    )

    def __post_init__(self) -> None:
        # YAML has numbers where the command line has words; it is the same run.
        self.drop_layers = [str(layer) for layer in self.drop_layers] if self.drop_layers else None


@dataclass
class WarmupArguments:
    """How a Pre-LN checkpoint is led over to LayerNorm Scaling. One that is scaled already goes on as it is."""

    ln_scaling: bool = option(
        False,
        "Lead the checkpoint from Pre-LN to LayerNorm Scaling: its exponent goes from 0 to 1/2 over the warmup. Where "
        "we measured it, the loss ended higher than without.",
    )
    ln_scaling_warmup_steps: int = option(1000, "Steps of that; they must all lie in the run.")
    ln_scaling_schedule: str = option("linear", "How the exponent rises.", choices=["linear", "cosine"])


@dataclass
class TeacherArguments:
    """What a pruned model learns from."""

    teacher: str | None = option(
        None,
        "Folder or name on the Hub of the unpruned model, to learn its next-token distribution; without one, or with "
        "none, the text alone is learned.",
    )
    teacher_dtype: str = option(
        "auto", "Of the teacher's weights, auto: its own.", choices=["auto", "bfloat16", "float16", "float32"]
    )

    def __post_init__(self) -> None:
        if str(self.teacher).lower() in ("none", ""):  # in place of the one that a config names
            self.teacher = None


@dataclass
class RecipeConfig(SFTConfig):
    """TRL's arguments, with defaults for every recipe."""

    bf16: bool | None = option(  # type: ignore[assignment]
        None, "Compute in bfloat16; without a word, where there is a GPU that can."
    )
    save_total_limit: int | None = option(2, "Checkpoints to keep.")
    use_cache: bool = option(True, "Written to the config.json of the model; training itself uses no cache.")
    resume_from_checkpoint: str | None = option(
        None, "true: go on from the last checkpoint in the output folder, if there is one; or the path of one."
    )
    depth_stats_steps: int = option(
        100,
        "Measure every layer's residual variance, gradient norm and angular distance every so many steps; 0: never.",
    )

    def __post_init__(self) -> None:
        # Several processes on a machine without an accelerator would else not find one another.
        self.use_cpu |= not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
        if self.bf16 is None and not self.fp16:
            self.bf16 = not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        self.dataloader_pin_memory &= torch.cuda.is_available()
        super().__post_init__()


@dataclass
class TextConfig(RecipeConfig):
    """Defaults for training on raw text: one stream of tokens, cut into windows."""

    packing: bool = option(True, "Join texts and cut them into windows of max_length tokens.")
    packing_strategy: str = option(
        "wrapped",
        "wrapped: one stream, windows cut anywhere; bfd, bfd_split: texts are kept apart, which needs FlashAttention "
        "to be fast.",
        choices=["bfd", "bfd_split", "wrapped"],
    )


@dataclass
class PretrainConfig(TextConfig):
    """The paper's settings (arXiv 2502.05795, section 5), but for the batch of 512, which depends on the machine."""

    learning_rate: float | None = option(  # type: ignore[assignment]
        None, "Peak; without one, the paper's: 1e-3 for shapes up to 350M, 5e-4 from 1B on."
    )
    lr_scheduler_type: str = option("cosine_with_min_lr", "Schedule after the warmup.")
    lr_scheduler_kwargs: dict | str | None = field(
        default_factory=lambda: {"min_lr_rate": 0.1}, metadata={"help": "The cosine ends at a tenth."}
    )
    warmup_steps: float = option(0.1, "Steps to the peak, or their share of all.")
    weight_decay: float = option(0.0, "The paper has none.")
    max_length: int | None = option(256, "Tokens in a window.")
    num_train_epochs: float = option(1.0, "Passes over the data.")
    gradient_checkpointing: bool = option(False, "Compute activations twice, to save memory.")


@dataclass
class ContinueConfig(TextConfig):
    """Warmed up again and decayed again, as Ibrahim et al. (arXiv 2403.08763) find it best for a new text."""

    learning_rate: float = option(5e-5, "Peak.")
    lr_scheduler_type: str = option("cosine_with_min_lr", "Schedule after the warmup.")
    lr_scheduler_kwargs: dict | str | None = field(
        default_factory=lambda: {"min_lr_rate": 0.1}, metadata={"help": "The cosine ends at a tenth."}
    )
    warmup_steps: float = option(0.01, "Steps to the peak, or their share of all.")
    eval_on_start: bool = option(True, "Evaluate before the first step too: what the checkpoint was worth before.")
    num_train_epochs: float = option(1.0, "Passes over the data.")


@dataclass
class HealConfig(TextConfig):
    """The peak and decay of Minitron (arXiv 2408.11796, table 4) for distillation, which also do for text."""

    learning_rate: float = option(1e-4, "Peak.")
    lr_scheduler_type: str = option("cosine_with_min_lr", "Schedule after the warmup.")
    lr_scheduler_kwargs: dict | str | None = field(
        default_factory=lambda: {"min_lr_rate": 0.1}, metadata={"help": "The cosine ends at a tenth."}
    )
    warmup_steps: float = option(0.05, "Steps to the peak, or their share of all.")
    eval_on_start: bool = option(True, "Evaluate before the first step too: what the checkpoint was worth before.")
    num_train_epochs: float = option(1.0, "Passes over the data.")


@dataclass
class ChatConfig(RecipeConfig):
    """TRL's defaults, but that the assistant's answers alone are learned wherever the data is a chat."""

    assistant_only_loss: bool | None = option(  # type: ignore[assignment]
        None, "Learn the assistant's answers alone; without a word: yes where the data has messages."
    )
    chat_template_path: str | None = option(
        None,
        "Chat template to train with: chatml, a .jinja file, or a folder or name on the Hub of the tokenizer to take "
        "it from.",
    )
    eval_on_start: bool = option(True, "Evaluate before the first step too: what the checkpoint was worth before.")
    num_train_epochs: float = option(1.0, "Passes over the data.")


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    pass


def parse(recipe: str, *types: Any, description: str | None = None) -> tuple[Any, ...]:
    """Reads the command line, and the YAML file after `--config`, whose values the command line overrides.

    `--config` also takes the name of a file in the recipe's own folder of configs, such as `qwen3-8b`.

    Raises:
        ValueError: for an option, or a key of the file, that does not exist.
        FileNotFoundError: if there is no such file.
    """
    words = [part for word in sys.argv[1:] for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" in words[:-1]:
        at = words.index("--config") + 1
        words[at] = str(find_config(recipe, words[at]))
    parser = TrlParser(
        types,
        usage="%(prog)s [--config NAME_OR_FILE] [OPTIONS]",
        description=description,
        formatter_class=_HelpFormatter,
    )
    return parser.parse_args_and_config(words)


def layers_of(words: list[str] | None) -> Any:
    """Reads the words after --drop_layers: indices, or the path of a plan."""
    if not words:
        return None
    if all(word.lstrip("-").isdigit() for word in words):
        return [int(word) for word in words]
    if len(words) > 1:
        raise ValueError(f"drop_layers: {words} are neither layer indices nor the path of one pruning plan")
    return words[0]
