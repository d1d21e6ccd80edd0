"""Runs a causal language model in two parts, decoder and head, optionally without some of its layers.

Removing a layer is exact: the layer does not run, and outputs equal those of a model from which it was deleted.

Shapes: B batch, T tokens, N selected tokens of B x T, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..core.errors import ArgumentError
from ..core.stack import Stack, pretrained_modules, text_stack
from ..core.sublayers import Unit, absent
from .stream import hidden_states
from .text import Batch

# Maximum number of logits in memory, since B x T x V may not fit. In bfloat16 this is just under 32 MiB, the largest
# allocation that glibc's malloc reuses; allocating fresh memory for each larger slice takes as long as the head itself.
_MAX_LOGITS = 15 * 2**20
# Only the last hidden state is needed, whatever the config requests. (For the others, transformers would add permanent
# hooks to the layers.)
PLAIN_FORWARD = {"use_cache": False, "return_dict": True} | dict.fromkeys(
    ["output_hidden_states", "output_attentions", "output_router_logits"], False
)


class StandIn(nn.Module):
    """Replaces a module with one that has a different forward; all other attributes are the original's."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        vars(self).update(_module=module, _forward=forward)  # no child, whose parameters would count twice

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_module"], name)


@contextmanager
def replaced(parent: nn.Module, children: Mapping[str, nn.Module]) -> Iterator[None]:
    """Context in which some children of a module are replaced."""
    saved = {name: parent._modules[name] for name in children}
    parent._modules.update(children)
    try:
        yield
    finally:
        parent._modules.update(saved)


class SplitModel:
    """A causal language model split into its decoder (up to and including the final norm) and its head.

    Both run the model's own forward, with placeholders for removed parts, so masks, rotary embeddings and logit
    processing (soft-capping, scaling) are the model's own. Layers keep their index, by which some families select a
    mask.
    """

    def __init__(self, model: nn.Module) -> None:
        self.stack = text_stack(model)
        heads = [
            (module, name)
            for module in pretrained_modules(model)
            if module.get_output_embeddings() is not None
            for name, child in module.named_modules()
            if child is self.stack.model and name
        ]
        if not heads:
            problem = f"{type(model).__name__} has no language modeling head; load it with AutoModelForCausalLM, or "
            problem += "choose a method that needs none, such as 'block_influence'"
            raise ArgumentError("model", problem=problem)
        self.head, path = heads[-1]
        folder, _, self.name = path.rpartition(".")
        self.parent = self.head.get_submodule(folder)
        self.output: Any = None
        self.tuples: list[bool] | None = None

    def hidden(
        self, batch: Batch, removed: Iterable[Unit] = (), start: tuple[int, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """The decoder's output after the final norm, shape (B, T, D).

        Args:
            batch: token ids.
            removed: layers and sub-layers to skip.
            start: (position, x_BTD): starts after that layer, with x_BTD as the residual stream.
        """
        position, x_BTD = start or (-1, None)
        removed = list(removed)
        layers = {*(unit for unit in removed if isinstance(unit, int)), *range(position + 1)}
        stand_ins = {str(i): self._skip(i, x_BTD if i == position else None) for i in layers}
        with ExitStack() as parts:
            for kind, layer in (unit for unit in removed if not isinstance(unit, int)):
                parent, _, name = self.stack.family.sublayer(kind)[0].rpartition(".")
                holder = self.stack.layers[layer].get_submodule(parent)
                parts.enter_context(replaced(holder, {name: absent(kind, layer)}))
            parts.enter_context(replaced(self.stack.layers, stand_ins))
            output = self.stack.model(**model_inputs(self.stack, batch), **PLAIN_FORWARD)
        self.output = copy.copy(output)
        self.output["last_hidden_state"] = None
        hidden_BTD: torch.Tensor = output.last_hidden_state
        return hidden_BTD

    def logits(self, x_ND: torch.Tensor) -> torch.Tensor:
        """The head's output for states returned by `hidden`, shape (N, V), in the head's dtype."""
        output = copy.copy(self.output)
        output["last_hidden_state"] = x_ND[None]
        ids_1N = torch.zeros(1, len(x_ND), dtype=torch.long, device=x_ND.device)
        with replaced(self.parent, {self.name: StandIn(self.stack.model, lambda *_, **__: output)}):
            logits_1NV = self.head(input_ids=ids_1N, **PLAIN_FORWARD).logits
        found: torch.Tensor = logits_1NV[0]
        return found

    def parts(self, count: int) -> Iterator[slice]:
        """Slices of `count` tokens whose logits fit in memory."""
        return logit_slices(count, self.stack.model.config.vocab_size)

    def _skip(self, position: int, x_BTD: torch.Tensor | None = None) -> StandIn:
        if self.tuples is None:
            self.tuples = returns_tuples(self.stack)
        wrap = self.tuples[position]

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = hidden_states(args, kwargs) if x_BTD is None else x_BTD
            return (output,) if wrap else output

        return StandIn(self.stack.layers[position], forward)


def logit_slices(count: int, vocab_size: int) -> Iterator[slice]:
    """Slices of `count` tokens whose logits fit in memory."""
    size = max(1, _MAX_LOGITS // vocab_size)
    return (slice(at, at + size) for at in range(0, count, size))


def returns_tuples(stack: Stack) -> list[bool]:
    """Whether each layer returns a tuple, as layers did up to transformers 4. Determined by a pass over two tokens."""
    found: list[bool] = []
    with ExitStack() as hooks:
        for layer in stack.layers:
            hooks.enter_context(layer.register_forward_hook(lambda *given: found.append(isinstance(given[2], tuple))))
        ids = torch.zeros(1, 2, dtype=torch.long)
        stack.model(**model_inputs(stack, Batch(ids, torch.ones_like(ids, dtype=torch.bool))), **PLAIN_FORWARD)
    return found


def predictions(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """A mask of the tokens that predict a next one, shape (B, T), bool, and their targets, shape (N,).

    Neither the predicting token nor its target is padding.
    """
    predicted = batch.attention_mask[:, 1:] & batch.attention_mask[:, :-1]
    return F.pad(predicted, (0, 1)), batch.input_ids[:, 1:][predicted]


def pick_tokens(x_BTD: torch.Tensor, picked_BT: torch.Tensor) -> torch.Tensor:
    """The states of the selected tokens, shape (N, D)."""
    return x_BTD[picked_BT.to(x_BTD.device)]


def model_inputs(stack: Stack, batch: Batch) -> dict[str, torch.Tensor]:
    """Keyword arguments of the decoder's forward, on the device of its embedding."""
    require_known_ids(batch.input_ids, stack.model.config)
    device: torch.device = stack.model.get_input_embeddings().weight.device  # type: ignore[assignment]
    # Offloaded weights are on "meta"; the hooks that restore them also move the inputs.
    return (batch if device.type == "meta" else batch.to(device)).model_inputs()


def require_known_ids(ids: torch.Tensor, config: Any) -> None:
    """Refuses token ids outside the vocabulary, which would raise an error or, on a GPU, end the process."""
    size = config.get_text_config().vocab_size
    if (wrong := ids[(ids < 0) | (ids >= size)]).numel():
        problem = f"token id {int(wrong[0])} is outside the model's vocabulary of {size:,} tokens; check the tokenizer"
        raise ArgumentError("data", problem=problem)
