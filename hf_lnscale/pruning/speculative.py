"""Draft models for speculative decoding: a view of a model without some of its layers that shares its weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..core.errors import require_integers
from ..core.families import text_config
from ..core.stack import text_stack
from .cut import normalize_layers
from .depth_fields import prune_config
from .layers import delete_layers
from .plan import PruningPlan


def draft_model(
    model: nn.Module, drop_layers: Iterable[int] | PruningPlan, *, num_assistant_tokens: int = 5
) -> PreTrainedModel:
    """Returns the model without some of its layers, sharing its weights, as an assistant for its own generation.

    In speculative decoding (arXiv 2211.17192), a cheap draft proposes a few tokens, the full model verifies all of them
    in one forward pass, and the output follows the full model's distribution. A draft made of the model's own layers
    (arXiv 2309.08168) has the same parameter objects, so it needs no memory for weights and follows every training
    step. Modules, configuration and KV cache are separate, and the model is not changed. Measure whether it is faster;
    on small models it is not (docs/tried.md).

    Create the draft last: after the model is on its device, in its dtype and with its adapters, and after its scale is
    folded or unfolded. Parameters follow `model.to(...)`, but buffers, switched adapters, scales and kernels bound
    later do not; `draft.to(...)` would move the model's parameters. The draft is in evaluation mode. Module hooks are
    kept and also run in the draft.

    Args:
        model: a causal language model of a family in the table; a PEFT model gives a draft with its adapters.
        drop_layers: positions of the layers to drop, counted from 0 (negative ones from the end), or a plan.
        num_assistant_tokens: number of tokens that the draft proposes before the model verifies them.

    Returns:
        A model of the same class. Its `generation_config` has `num_assistant_tokens`, a constant schedule and no
        confidence threshold (transformers' defaults of 20 tokens and 0.4 suit drafts with negligible cost).

    Raises:
        ValueError: if layers are invalid, the number of tokens is below 1, or the model cannot be shared because it is
            sharded, uses a PEFT method that acts outside its layers (prompt and prefix tuning), or has a module whose
            forward was replaced by a closure.
        UnsupportedArchitectureError: if the family or its per-layer configuration fields are unknown.

    Example:
        >>> draft = hf_lnscale.draft_model(model, [12, 14, 17])
        >>> model.generate(**inputs, assistant_model=draft, do_sample=False)
    """
    require_integers(1, num_assistant_tokens=num_assistant_tokens)
    stack = text_stack(model)
    if isinstance(drop_layers, PruningPlan):
        drop_layers.require_whole_layers("drop_layers")
        drop_layers.require_made_for(stack.model.config)
        drop_layers = drop_layers.layers
    dropped = normalize_layers(drop_layers, len(stack.layers))
    _require_shareable(model)
    draft: PreTrainedModel = _view(next(module for module in model.modules() if isinstance(module, PreTrainedModel)))
    stack = text_stack(draft)
    if dropped:
        # The outermost configuration that contains the decoder's configuration.
        configs = [part.config for part in draft.modules() if isinstance(part, PreTrainedModel)]
        prune_config(next(config for config in configs if text_config(config) is stack.model.config), dropped)
        delete_layers(stack, dropped)
    settings = getattr(draft, "generation_config", None)  # None for a model without a head
    if settings is not None:
        settings.num_assistant_tokens = num_assistant_tokens
        settings.num_assistant_tokens_schedule = "constant"
        settings.assistant_confidence_threshold = 0.0
    draft.eval()
    return draft


class _Shared(TorchFunctionMode):
    """Context in which deepcopy shares tensors, including those held by quantized layers and offload hooks."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__:
            return args[0]
        return func(*args, **(kwargs or {}))


def _view(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of every module that shares the same tensors.

    Uses deepcopy, which rebinds methods bound to the originals (by accelerate, by kernels) to the copies, and copies a
    configuration shared by many modules only once.
    """
    # Parameters and buffers are listed because some subclasses define their own __deepcopy__, bypassing the mode above.
    tensors = [tensor for part in model.modules() for tensor in (*part._parameters.values(), *part._buffers.values())]
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors if tensor is not None}
    with _Shared():
        view: PreTrainedModel = copy.deepcopy(model, memo)
    return view


def _require_shareable(model: nn.Module) -> None:
    peft: Any = getattr(model, "active_peft_config", None)
    if getattr(peft, "is_prompt_learning", False):
        raise ValueError(
            f"draft_model: {peft.peft_type} changes the input of the whole model, which the draft would not receive"
        )
    for name, parameter in model.named_parameters():
        # FSDP2 and tensor parallelism, FSDP1, DeepSpeed ZeRO-3.
        if type(parameter).__name__ in ("DTensor", "FlatParameter") or hasattr(parameter, "ds_id"):
            raise ValueError(f"draft_model: {name} is sharded; create the draft from an unsharded model")
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        if isinstance(forward, FunctionType) and forward.__closure__:
            problem = f"was replaced by a closure, {forward.__qualname__}, which would run the model's own module in a "
            problem += "draft; bind it as a method: types.MethodType(function, module)"
            raise ValueError(f"draft_model: the forward of {name or 'the model'} {problem}")
