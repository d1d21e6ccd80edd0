"""TRL's SFTTrainer with a token-weighted evaluation loss, and a trainer for distillation.

Shapes: B sequences, T tokens, D hidden size, V vocabulary, N predicted tokens.
"""

from __future__ import annotations

import time
import types
from typing import Any, NamedTuple

import torch
import trl
from datasets import Dataset
from packaging.version import Version
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments, set_seed
from transformers.utils import ModelOutput
from trl import SFTTrainer

from ..measuring.uncertainty import ratio_residuals, standard_error

# Since trl 1.16, the model's forward can return the log-probability of each token, and there is a divergence kernel.
if HAS_FUSED_HEAD := Version(trl.__version__) >= Version("1.16"):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction


class Rows(NamedTuple):
    """The loss of each evaluated row, summed over tokens, in nats, and its number of tokens; each of shape (S,)."""

    losses: torch.Tensor
    tokens: torch.Tensor

    @property
    def mean(self) -> float:
        """Nats per token."""
        return self.losses.sum().item() / self.tokens.sum().item()

    @property
    def stderr(self) -> float | None:
        """Standard error of the mean over the rows; None for a single one."""
        used = self.tokens > 0
        return standard_error(ratio_residuals(self.losses[used], self.tokens[used], self.mean))

    def stderr_against(self, other: Rows) -> float | None:
        """Standard error of the difference from another model's mean on the same rows; None if the rows differ."""
        if not torch.equal(self.tokens, other.tokens):
            return None
        return Rows(self.losses - other.losses, self.tokens).stderr


class RecipeTrainer(SFTTrainer):
    """SFTTrainer whose `eval_loss` is the mean over all predicted tokens, on any number of processes.

    (Trainer averages the means of batches.) `eval_loss_stderr` is its standard error over the evaluated rows, which are
    windows or documents (over batches, if TRL joins their rows); it is omitted if there is only one row.

    Args:
        other_dataset: text of another kind, evaluated as `eval_other` together with the evaluation data.
        kwargs: arguments of SFTTrainer.

    Attributes:
        num_rows: numbers of rows of the training data (None for a stream) and of the evaluation data.
        rows: the results of the last evaluation for each prefix.

    Raises:
        ValueError: if no row of the training data has a token to learn within `max_length`.
    """

    def __init__(self, other_dataset: Dataset | None = None, **kwargs: Any) -> None:
        texts = {"eval": kwargs.pop("eval_dataset")} | ({"other": other_dataset} if other_dataset else {})
        set_seed(kwargs["args"].seed)  # older TRL draws an adapter before it does so
        super().__init__(**kwargs, eval_dataset=texts)
        prepared: Any = self.eval_dataset
        self.eval_dataset, self.other_dataset = prepared["eval"], prepared.get("other")
        self.rows: dict[str, Rows] = {}
        if self.padding_free and self.args.world_size > 1:
            # Duplicates that fill up the last batch are dropped by row, but a padding-free batch is a single row.
            self.args.per_device_eval_batch_size = 1
        arguments, given, kept = kwargs["args"], kwargs["train_dataset"], self.train_dataset
        self.num_rows = (len(given) if isinstance(given, Dataset) else None, len(texts["eval"]))
        if isinstance(kept, Dataset) and not arguments.packing:
            empty = f"rows have nothing to learn in the first {arguments.max_length} tokens (max_length)"
            require_rows(len(kept), len(given), empty, arguments)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if HAS_FUSED_HEAD:
                outputs = model(**inputs, use_cache=False, fused_lm_head=True)
                sums_B = -outputs.log_probs.sum(-1), outputs.label_mask.sum(-1)
            else:  # one row at a time, with the loss as a sum
                labels_BT = inputs["labels"]
                rows = [{key: value[i : i + 1] for key, value in inputs.items()} for i in range(len(labels_BT))]
                losses = [model(**row, use_cache=False, num_items_in_batch=1).loss for row in rows]
                sums_B = torch.stack(losses), (labels_BT[:, 1:] != -100).sum(-1)
        self._evaluated.append([part_B.cpu().double() for part_B in self.accelerator.gather_for_metrics(sums_B)])
        return sums_B[0].sum() / sums_B[1].sum().clamp(min=1), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._evaluated: list[list[torch.Tensor]] = []  # per batch: losses and numbers of tokens of its rows
        output: Any = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        self.rows[prefix] = rows = Rows(*map(torch.cat, zip(*self._evaluated, strict=True)))
        if not rows.tokens.any():
            raise ValueError("the evaluation data has no token to predict; increase --max_length or --eval_samples")
        output.metrics.update({f"{prefix}_loss": rows.mean, f"{prefix}_tokens": int(rows.tokens.sum())})
        if (error := rows.stderr) is not None:
            output.metrics[f"{prefix}_loss_stderr"] = error
        return output

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        other: dict[str, float] = {}
        if eval_dataset is None and self.other_dataset is not None:
            # Before the evaluation data, after which the callbacks are notified.
            started, batches = time.perf_counter(), self.get_eval_dataloader(self.other_dataset)
            other = self.evaluation_loop(batches, "Evaluation", True, metric_key_prefix="eval_other").metrics
            other["eval_other_runtime"] = time.perf_counter() - started
            self.log(other)
        return {**super().evaluate(eval_dataset, ignore_keys, metric_key_prefix), **other}


def require_rows(kept: int, given: int, why: str, arguments: TrainingArguments, place: str = "") -> None:
    """Prints how many of the given rows are left out, and `why`; raises ValueError if none is kept."""
    left_out = f"{place}{given - kept} of {given} {why}"
    if not kept:
        raise ValueError(left_out)
    if kept < given and arguments.process_index == 0:
        print(f"{left_out}, and are skipped")


class DistillationTrainer(RecipeTrainer):
    """Trains on the forward KL divergence from a teacher's next-token distribution on given text.

    This is Minitron's loss for depth-pruned models (arXiv 2408.11796: logits only; 2407.14679, best practice 6, adds
    hidden states if many layers were dropped). TRL's kernel computes it tile by tile over the vocabulary, without
    materializing the (B, T, V) logits of either model.

    Args:
        teacher: a causal language model with the student's tokenizer, unsharded in every process. Its head may be
            padded to a different number of rows.
        kwargs: arguments of SFTTrainer.

    Raises:
        ValueError: if a head has fewer rows than the tokenizer has tokens, another loss is requested, or trl is older
            than 1.16.
    """

    def __init__(self, teacher: PreTrainedModel, **kwargs: Any) -> None:
        if not HAS_FUSED_HEAD:
            raise ValueError("teacher: distillation needs trl 1.16 or newer; otherwise use --teacher none")
        super().__init__(**kwargs)
        if kwargs["args"].loss_type == "dft" or self.args.label_smoothing_factor:
            raise ValueError("teacher: loss_type and label_smoothing_factor cannot be combined with distillation")
        student = self.accelerator.unwrap_model(self.model)
        student = student.get_base_model() if hasattr(student, "get_base_model") else student
        sizes = [model.get_output_embeddings().weight.shape[0] for model in (student, teacher)]
        if sizes[0] != sizes[1] and min(sizes) < (tokens := len(kwargs["processing_class"])):
            raise ValueError(f"teacher: it has {sizes[1]} tokens, the student {sizes[0]} and their tokenizer {tokens}")
        self.teacher = teacher.to(self.accelerator.device).eval().requires_grad_(False)
        _add_divergence(student)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = {**inputs, "use_cache": False}
        labels_BT = inputs.pop("labels")
        with torch.no_grad():
            hidden_BTD = self.teacher.base_model(**inputs).last_hidden_state
        divergence_N = model(**inputs, labels=labels_BT, teacher=(hidden_BTD, self.teacher)).loss
        tokens = len(divergence_N) if num_items_in_batch is None else num_items_in_batch
        loss = divergence_N.sum() / torch.as_tensor(tokens, device=divergence_N.device).clamp(min=1)
        # `num_items_in_batch` counts the tokens of all processes, over which gradients are averaged.
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return loss


def _add_divergence(student: PreTrainedModel) -> None:
    """Adds the keyword `teacher` to the student's forward, which then returns the divergence of each predicted token.

    This must happen inside the forward, so that DDP and FSDP also handle the parameters of the output head.
    """
    forward = student.forward

    def forward_with_teacher(self: Any, *args: Any, teacher: Any = None, **kwargs: Any) -> Any:
        if teacher is None:
            return forward(*args, **kwargs)
        teacher_hidden_BTD, teacher_model = teacher
        # The hidden state at a position predicts the token at the next one.
        predicted_BT = kwargs.pop("labels")[:, 1:] != -100
        hidden_BTD = self.base_model(*args, **kwargs).last_hidden_state
        # Both models have the same tokenizer; rows beyond its tokens are padding.
        both = min(model.get_output_embeddings().weight.shape[0] for model in (self, teacher_model))
        divergence_N, _ = ChunkedDivergenceFunction.apply(
            hidden_BTD[:, :-1][predicted_BT],
            *_head(self, both),
            teacher_hidden_BTD[:, :-1][predicted_BT],
            *_head(teacher_model, both),
            0.0,  # forward KL
            1.0,  # temperature
            *_logit_transform(self.config),
            *_logit_transform(teacher_model.config),
        )
        return ModelOutput(loss=divergence_N)

    student.forward = types.MethodType(forward_with_teacher, student)


def _head(model: PreTrainedModel, tokens: int) -> list[torch.Tensor | None]:
    """Weight and bias of the output head for its first `tokens` tokens."""
    head = model.get_output_embeddings()
    parts = (part.full_tensor() if isinstance(part, DTensor) else part for part in (head.weight, head.bias))
    return [part if part is None else part[:tokens] for part in parts]


def _logit_transform(config: PreTrainedConfig) -> tuple[float, float | None]:
    """A family's logit transform: a factor, with the names that TRL uses, and a soft cap (Gemma)."""
    text: Any = config.get_text_config()
    named = (getattr(text, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"))
    factor: Any = next((one for one in named if one is not None), None)
    if factor is None:
        factor = getattr(text, "logits_scaling", 1.0)
        factor = factor if text.model_type == "hyperclovax" else 1.0 / factor  # Granite divides
    return factor, getattr(text, "final_logit_softcapping", None)
