"""Command-line arguments of the recipes in addition to TRL's own, as dataclasses for TRL's parser."""

from __future__ import annotations

import shlex
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import trl
from accelerate.utils import parse_flag_from_env
from packaging.version import Version
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

from .scripts import find_config
from .shapes import SHAPES

if Version(trl.__version__) < Version("1.9"):
    raise ImportError(f"the recipes need trl 1.9 or newer; this is trl {trl.__version__}")


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field with its help text."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class DataArguments(ScriptArguments, DatasetMixtureConfig):
    """Data to train and evaluate on: one dataset (`dataset_name`), or a mixture (`datasets` in a YAML file)."""

    dataset_name: str | None = option(
        None,
        "Name on the Hub, or path of a file (.txt, .jsonl, .json, .parquet, .csv, .tsv, or .gz of these), of a folder "
        "of such files, or of a folder written by save_to_disk. Without one: English that comes with every Python.",
    )
    dataset_test_split: str | None = option(  # type: ignore[assignment]
        None,
        "Split to evaluate on, of the Hub or of a folder with files of that name; otherwise rows are held out.",
    )
    eval_dataset_name: str | None = option(None, "Name or path of other data to evaluate on.")
    eval_samples: int = option(256, "Rows to evaluate on; held out of training, at most a tenth, but at least one.")

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        if self.datasets and self.dataset_name:
            raise ValueError("dataset_name and datasets are both given; name one dataset or a mixture")
        if self.test_split_size is not None:
            raise ValueError(f"test_split_size={self.test_split_size} is not used here; give --eval_samples")
        if self.eval_samples < 1:
            raise ValueError(f"eval_samples must be at least 1, got {self.eval_samples}")
        self.streaming |= self.dataset_streaming


@dataclass
class PretrainArguments:
    """The model to build."""

    shape: str = option("demo", "Sizes of the model: one of the paper's, or a small one.", choices=list(SHAPES))
    family: str = option("llama", "Family of the model, a model_type such as llama, qwen3 or gemma2.")
    config_name: str | None = option(None, "Folder or name on the Hub of a config, in place of family and shape.")
    tokenizer_name: str | None = option(None, "Folder or name on the Hub; by default a BPE is trained on the data.")
    vocab_size: int = option(4096, "Vocabulary of the tokenizer that is trained.")
    hidden_size: int | None = option(None, "Overrides the shape's, as do all the following.")
    intermediate_size: int | None = option(None, "Width of the MLP.")
    num_hidden_layers: int | None = option(None, "Number of layers.")
    num_attention_heads: int | None = option(None, "Attention heads.")
    num_key_value_heads: int | None = option(None, "Key and value heads; by default as many as attention heads.")
    head_dim: int | None = option(None, "Size of a head.")
    ln_scaling: bool = option(True, "LayerNorm Scaling; without it, the plain Pre-LN model.")

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:  # from YAML
            raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {self.shape!r}")


@dataclass
class CheckpointArguments(ModelConfig):
    """The checkpoint to train."""

    drop_layers: list[str] | None = option(
        None, "Layers to leave out of the checkpoint, as in --drop_layers 12 14, or the path of a pruning plan."
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        # YAML has numbers where the command line has strings; both are the same run.
        self.drop_layers = [str(layer) for layer in self.drop_layers] if self.drop_layers else None

    def layers(self) -> list[int] | str | None:
        """The layers to drop: indices, the path of a plan, or None."""
        words = self.drop_layers or []
        try:
            return [int(word) for word in words] or None
        except ValueError:
            if len(words) == 1:
                return words[0]
        raise ValueError(f"drop_layers: {words} are neither layer indices nor the path of one pruning plan")


@dataclass
class WarmupArguments:
    """Conversion of a Pre-LN checkpoint to LayerNorm Scaling. A checkpoint that is already scaled stays as it is."""

    ln_scaling: bool = option(
        False,
        "Convert the checkpoint from Pre-LN to LNS during a warmup; in our measurements the loss ended higher with it.",
    )
    ln_scaling_warmup_steps: int = option(1000, "Steps of the ramp, all of which must lie in the run.")
    ln_scaling_schedule: str = option("linear", "Shape of the ramp.", choices=["linear", "cosine"])


@dataclass
class TeacherArguments:
    """The model that a pruned model learns from, and the whole model that it is compared with."""

    teacher: str | None = option(
        None,
        "Folder or name on the Hub of the unpruned model, to learn its next-token distribution; none: only the text.",
    )
    teacher_dtype: str = option(
        "auto", "Dtype of the teacher's weights; auto: as saved.", choices=["auto", "bfloat16", "float16", "float32"]
    )
    whole: str | None = option(
        None,
        "The unpruned model, to tell the gap to; by default the teacher, or the checkpoint itself with --drop_layers; "
        "none: tell no gap.",
    )
    control: bool = option(False, "Train the unpruned model equally first, which takes as long, and tell that gap.")
    self_data: int = option(
        0,
        "Train on so many rows in which the unpruned model itself continues a text, or answers a chat; 0: on the data.",
    )

    def __post_init__(self) -> None:
        self.teacher = _named(self.teacher)  # none overrides the one that a config names
        if self.self_data < 0:
            raise ValueError(f"self_data must be a number of rows, or 0, got {self.self_data}")

    def whole_model(self, checkpoint: str | None, layers: Any) -> str | None:
        """The name of the unpruned model, if it is known.

        Raises:
            ValueError: if it is to be trained or to write and is not known, or is to be trained and teaches, or, under
                ZeRO-3, if it is not to be trained.
        """
        whole = _named(self.whole or self.teacher or (checkpoint if layers else None))
        if self.control and self.teacher:
            raise ValueError("control: a model that learns from the unpruned one is compared with that; leave one out")
        if self.control and not whole:
            raise ValueError("control: name the unpruned model to train with --whole")
        if self.self_data and not whole:
            raise ValueError("self_data: name the unpruned model, which is to write, with --whole")
        if whole and not self.control and is_deepspeed_zero3_enabled():
            raise ValueError("whole: DeepSpeed ZeRO-3 shards what is trained only; give --control, or --whole none")
        return whole


def _named(name: str | None) -> str | None:
    return None if str(name).lower() in ("none", "") else name


@dataclass
class RecipeConfig(SFTConfig):
    """TRL's training arguments, with the defaults of every recipe."""

    bf16: bool | None = option(  # type: ignore[assignment]
        None, "Compute in bfloat16; defaults to on if the GPU supports it."
    )
    save_total_limit: int | None = option(2, "Checkpoints to keep.")
    use_cache: bool = option(True, "Value in the model's config.json; training itself uses no cache.")
    eval_on_start: bool = option(True, "Evaluate before the first step too, for comparison.")
    num_train_epochs: float = option(1.0, "Passes over the data.")
    resume_from_checkpoint: str | None = option(
        None, "true: continue from the last checkpoint in the output folder, if any; or the path of one."
    )
    learning_rate: float | None = option(2e-5, "Peak; for pretrain by default the paper's.")  # type: ignore[assignment]
    assistant_only_loss: bool | None = option(  # type: ignore[assignment]
        None, "Learn only the assistant's answers; defaults to on for chats."
    )
    chat_template_path: str | None = option(
        None, "Chat template: chatml, a .jinja file, or a folder or name on the Hub of the tokenizer to take it from."
    )
    num_samples: int = option(
        0, "Held-out prompts to answer at each evaluation, greedily, into samples.jsonl in the output folder; 0: off."
    )
    early_stopping_patience: int = option(
        0,
        "Stop after this many evaluations without a lower loss, and keep the best checkpoint; 0: off. Needs "
        "--eval_strategy.",
    )
    depth_stats_steps: int = option(100, "Steps between measurements over depth (docs/depth-stats.md); 0: off.")
    # Filled in by `launch`: the command line, and whether training has begun, from when on errors show their traceback.
    command: list[str] = field(default_factory=list, init=False)
    begun: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        # Without this, several processes on a machine without an accelerator do not find each other.
        self.use_cpu |= not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
        if self.bf16 is None and not self.fp16:
            self.bf16 = not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        if self.early_stopping_patience:
            if self.eval_strategy == "no":
                raise ValueError("early_stopping_patience needs --eval_strategy steps or epoch")
            self.load_best_model_at_end, self.metric_for_best_model = True, "eval_loss"
            self.save_strategy, self.save_steps = self.eval_strategy, self.eval_steps or self.logging_steps
        super().__post_init__()  # type: ignore[no-untyped-call]


# Defaults for raw text: one stream of tokens, cut into windows; the cosine ends at a tenth of the peak.
TEXT: dict[str, Any] = {
    "packing": True, "packing_strategy": "wrapped", "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
}  # fmt: skip


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    pass


class RecipeParser(TrlParser):
    """TRL's parser, whose `--config` also takes the name of a config of the recipe, such as `qwen3-8b`.

    `prog` is how the recipe is started, as in "hf-lnscale train sft"; `defaults` replace those of the dataclasses.
    """

    def __init__(
        self, recipe: str, types: Iterable[Any], description: str | None, prog: str | None = None, **defaults: Any
    ) -> None:
        super().__init__(
            types,
            prog=prog or f"python {shlex.quote(sys.argv[0])}",
            usage="%(prog)s [--config NAME_OR_FILE] [OPTIONS]",
            description=description,
            formatter_class=_HelpFormatter,
        )
        self.set_defaults(**defaults)
        self.recipe = recipe

    def parse_args_and_config(  # type: ignore[override]
        self, args: Iterable[str] | None = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        """Parses the command line and the YAML file after `--config`, whose values the command line overrides."""
        with_config = ArgumentParser(add_help=False, allow_abbrev=False)
        with_config.add_argument("--config")
        given, words = with_config.parse_known_args(None if args is None else list(args))
        if given.config is not None:
            words += ["--config", str(find_config(self.recipe, given.config))]
        return cast(tuple[Any, ...], super().parse_args_and_config(words, **kwargs))
