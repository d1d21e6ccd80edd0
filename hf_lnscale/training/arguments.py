"""Command-line arguments of the recipes, in addition to TRL's own, as dataclasses for TRL's parser."""

from __future__ import annotations

import shlex
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
import trl
from accelerate.utils import parse_flag_from_env
from packaging.version import Version
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

from ..core.errors import require_integers
from .scripts import find_config

if Version(trl.__version__) < Version("1.9"):
    raise ImportError(f"the recipes need trl 1.9 or newer; this is trl {trl.__version__}")


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with a help text."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class DataArguments(ScriptArguments, DatasetMixtureConfig):
    """Training and evaluation data: one dataset (`dataset_name`), or a mixture (`datasets` in a YAML file)."""

    dataset_name: str | None = option(
        None,
        "Hub dataset, or path of a file (.txt, .jsonl, .json, .parquet, .csv, .tsv, or .gz of these), a folder of such "
        "files, or a folder written by save_to_disk. Defaults to English text shipped with Python.",
    )
    dataset_test_split: str | None = option(  # type: ignore[assignment]
        None, "Evaluation split, on the Hub or in a folder with files of that name; by default rows are held out."
    )
    eval_dataset_name: str | None = option(None, "Name or path of separate evaluation data.")
    eval_samples: int = option(256, "Rows to evaluate on. If held out of training: at most a tenth, at least one.")

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        if self.datasets and self.dataset_name:
            raise ValueError("dataset_name and datasets are both given; use either one dataset or a mixture")
        if self.test_split_size is not None:
            raise ValueError(f"test_split_size={self.test_split_size} is not supported; use --eval_samples")
        if self.eval_samples < 1:
            raise ValueError(f"eval_samples must be at least 1, got {self.eval_samples}")
        self.streaming |= self.dataset_streaming


class Shape(NamedTuple):
    """Sizes of a Llama, and the learning rate for it, of "The Curse of Depth" (arXiv 2502.05795)."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_hidden_layers: int
    learning_rate: float


SHAPES = {
    # Not in the paper: as deep as its smallest model, but trains within a minute.
    "demo": Shape(128, 344, 4, 12, 1e-3),
    "130M": Shape(768, 2048, 12, 12, 1e-3),
    "250M": Shape(768, 2560, 16, 24, 1e-3),
    "350M": Shape(1024, 2736, 16, 24, 1e-3),
    "1B": Shape(2048, 5461, 32, 24, 5e-4),
    "7B": Shape(4096, 11008, 32, 32, 5e-4),
}


@dataclass
class PretrainArguments:
    """The model to build."""

    shape: str = option("demo", "Model sizes: one of the paper's, or a small one.", choices=list(SHAPES))
    family: str = option("llama", "Model family, a model_type such as llama, qwen3 or gemma2.")
    config_name: str | None = option(None, "Folder or Hub name of a config, instead of family and shape.")
    tokenizer_name: str | None = option(None, "Folder or Hub name; by default a BPE tokenizer is trained on the data.")
    vocab_size: int = option(4096, "Vocabulary size of a newly trained tokenizer.")
    hidden_size: int | None = option(None, "Overrides the value of the shape, as do the following options.")
    intermediate_size: int | None = option(None, "MLP width.")
    num_hidden_layers: int | None = option(None, "Number of layers.")
    num_attention_heads: int | None = option(None, "Number of attention heads.")
    num_key_value_heads: int | None = option(None, "Number of key and value heads; defaults to the attention heads.")
    head_dim: int | None = option(None, "Size of each head.")
    ln_scaling: bool = option(True, "Use LayerNorm Scaling; otherwise train a plain Pre-LN model.")

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:  # from YAML
            raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {self.shape!r}")
        require_integers(1, **self.sizes())

    def sizes(self) -> dict[str, int]:
        """The sizes that override those of the shape, by their names in a configuration."""
        names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
        return {name: value for name in (*names, "head_dim") if (value := getattr(self, name)) is not None}


@dataclass
class CheckpointArguments(ModelConfig):
    """The checkpoint to train."""

    drop_layers: list[str] | None = option(None, "Layers to drop, such as 12 14, or the path of a pruning plan.")

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        # YAML gives numbers and the command line strings; both must identify the same run.
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
    """Conversion of a Pre-LN checkpoint to LayerNorm Scaling. Checkpoints that are already scaled are unchanged."""

    ln_scaling: bool = option(
        False, "Convert from Pre-LN to LNS in a warmup; in our measurements this increased the loss."
    )
    ln_scaling_warmup_steps: int = option(1000, "Length of the ramp in steps; must not exceed the run.")
    ln_scaling_schedule: str = option("linear", "Shape of the ramp.", choices=["linear", "cosine"])


@dataclass
class TeacherArguments:
    """The teacher of a pruned model, and the unpruned model that it is compared with."""

    teacher: str | None = option(
        None, "Folder or Hub name of the unpruned model to distill from; none: train on text only."
    )
    teacher_dtype: str = option(
        "auto", "Its dtype; auto: as saved.", choices=["auto", "bfloat16", "float16", "float32"]
    )
    whole: str | None = option(
        None,
        "The unpruned model, to report the gap to it; defaults to the teacher, or with --drop_layers to the checkpoint "
        "itself; none: report no gap.",
    )
    control: bool = option(False, "First train the unpruned model in the same way (doubles the time); report that gap.")
    self_data: int = option(0, "Train on this many texts or answers by the unpruned model; 0: train on the data.")

    def __post_init__(self) -> None:
        self.teacher = _named(self.teacher)  # none overrides the teacher in a config file
        require_integers(0, self_data=self.self_data)

    def whole_model(self, checkpoint: str | None, layers: Any) -> str | None:
        """The name of the unpruned model, if known.

        Raises:
            ValueError: if `control` or `self_data` needs it and it is unknown, `control` is combined with a teacher, or
                ZeRO-3 would shard a model that does not train.
        """
        whole = _named(self.whole or self.teacher or (checkpoint if layers else None))
        if self.control and self.teacher:
            raise ValueError("control: cannot be combined with a teacher, with which the model is compared already")
        if self.control and not whole:
            raise ValueError("control: name the unpruned model to train, with --whole")
        if self.self_data and not whole:
            raise ValueError("self_data: name the unpruned model that generates the data, with --whole")
        if (self.teacher or self.self_data or (whole and not self.control)) and is_deepspeed_zero3_enabled():
            raise ValueError(
                "teacher, self_data, whole: DeepSpeed ZeRO-3 would shard a model that does not train; use ZeRO-2 or "
                "FSDP2, or train on your data with --control or --whole none"
            )
        return whole


def _named(name: str | None) -> str | None:
    return None if str(name).lower() in ("none", "") else name


@dataclass
class RecipeConfig(SFTConfig):
    """TRL's training arguments, with the defaults of every recipe."""

    bf16: bool | None = option(None, "Compute in bfloat16; on by default if the GPU can.")  # type: ignore[assignment]
    save_total_limit: int | None = option(2, "Number of checkpoints to keep.")
    use_cache: bool = option(True, "Value in the model's config.json; training itself does not use a cache.")
    eval_on_start: bool = option(True, "Also evaluate before the first step, for comparison.")
    num_train_epochs: float = option(1.0, "Passes over the data.")
    resume_from_checkpoint: str | None = option(
        None, "Path of a checkpoint; or true: continue from the last checkpoint in the output folder, if any."
    )
    learning_rate: float | None = option(2e-5, "Peak; pretrain defaults to the paper's.")  # type: ignore[assignment]
    assistant_only_loss: bool | None = option(  # type: ignore[assignment]
        None, "Train only on the assistant's answers; defaults to on for chats."
    )
    chat_template_path: str | None = option(
        None, "Chat template: chatml, a .jinja file, or the folder or Hub name of a tokenizer that has one."
    )
    num_samples: int = option(0, "Number of held-out prompts to answer at each evaluation, in samples.jsonl; 0: off.")
    early_stopping_patience: int = option(
        0, "Evaluations without a lower loss after which to stop and keep the best checkpoint; 0: off."
    )
    depth_stats_steps: int = option(100, "Steps between depth statistics (docs/depth-stats.md); 0: off.")
    # Set by `launch` and `Run`: the command line, and whether training has begun, after which errors show a traceback.
    command: list[str] = field(default_factory=list, init=False)
    begun: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        # Required for several processes to find each other on a machine without an accelerator.
        self.use_cpu |= not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
        if self.bf16 is None and not self.fp16:
            self.bf16 = not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        least = {"max_length": 2, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
        least |= {"gradient_accumulation_steps": 1, "learning_rate": 0}
        for name, lowest in least.items():
            if (value := getattr(self, name)) is not None and value < lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {value}")
        if self.early_stopping_patience:
            if self.eval_strategy == "no":
                raise ValueError("early_stopping_patience requires --eval_strategy steps or epoch")
            self.load_best_model_at_end, self.metric_for_best_model = True, "eval_loss"
            self.save_strategy, self.save_steps = self.eval_strategy, self.eval_steps or self.logging_steps
        super().__post_init__()  # type: ignore[no-untyped-call]


# Defaults for raw text: one stream of tokens, split into windows; the cosine schedule ends at a tenth of the peak.
TEXT: dict[str, Any] = {
    "packing": True, "packing_strategy": "wrapped", "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
}  # fmt: skip


class _HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    pass


class RecipeParser(TrlParser):
    """TRL's parser, whose `--config` also accepts the name of a config shipped with the recipe, such as `qwen3-8b`.

    `prog` is the command that starts the recipe, such as "hf-lnscale train sft"; `defaults` override
    the defaults of the dataclasses.
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
        """Parses the command line and the YAML file given by `--config`; the command line takes precedence."""
        with_config = ArgumentParser(add_help=False, allow_abbrev=False)
        with_config.add_argument("--config")
        given, words = with_config.parse_known_args(None if args is None else list(args))
        if given.config is not None:
            words += ["--config", str(find_config(self.recipe, given.config))]
        return cast(tuple[Any, ...], super().parse_args_and_config(words, **kwargs))
