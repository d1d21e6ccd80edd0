"""Measurements over depth: how the residual stream grows, and what each layer is worth.

Layers are counted as in `model.model.layers`: the first is 0. All measurements run without dropout and without
gradients, and leave the model as it was: same mode, no hooks, no cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..scaling import text_stack

__all__ = ["loss_added_by_removing_each_layer", "residual_variance"]


def residual_variance(
    model: nn.Module, input_ids: torch.Tensor | Iterable[torch.Tensor], skip_tokens: int = 0
) -> list[float]:
    """The variance of the residual stream in front of the first layer and after each layer.

    It is the variance of arXiv 2502.05795, section 3: one number a layer, of all entries of the hidden states, pooled
    over sequences, positions and channels, with their common mean taken off. In units of the hidden states, squared.

    One token can be nearly all of it. Trained models put massive activations on the first token of a sequence
    (arXiv 2402.17762): measure with `skip_tokens=1` too before reading anything into a jump.

    Args:
        model: a causal language model of a known family; any head or wrapper.
        input_ids: token ids without padding, shape (B, T), or several such batches; the shapes may differ.
        skip_tokens: leave the first tokens of each sequence out of the variance; they are still attended to.

    Returns:
        L + 1 floats: [0] after the embedding, [i] after i layers. The final norm comes after the last of them.

    Raises:
        ValueError: if there is no token to measure on.
        UnsupportedArchitectureError: if the model's family is not in the table.
    """
    stack = text_stack(model)
    # Per place in the stream: number of entries, mean, and sum of squared deviations from the mean.
    moments = [(0, 0.0, 0.0)] * (len(stack.layers) + 1)

    def measure(place: int, hidden_BTD: torch.Tensor) -> None:
        hidden_BTD = hidden_BTD[:, skip_tokens:]
        if hidden_BTD.numel():
            variance, mean = torch.var_mean(hidden_BTD.float(), correction=0)
            moments[place] = _merge(moments[place], hidden_BTD.numel(), mean.item(), variance.item())

    def before_first(layer: nn.Module, args: Any, kwargs: Any) -> None:
        measure(0, _hidden_states(args, kwargs))

    def after(place: int) -> Any:
        return lambda layer, args, output: measure(place, output[0] if isinstance(output, tuple) else output)

    with _evaluating(model):
        hooks = [stack.layers[0].register_forward_pre_hook(before_first, with_kwargs=True)]
        hooks += [layer.register_forward_hook(after(place)) for place, layer in enumerate(stack.layers, start=1)]
        try:
            for batch in _batches(input_ids):
                stack.model(input_ids=batch.to(_device(stack.model)), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
    if not moments[0][0]:
        raise ValueError(f"residual_variance: input_ids holds no token past the first {skip_tokens} of each sequence")
    return [squares / count for count, _, squares in moments]


def loss_added_by_removing_each_layer(model: nn.Module, batches: torch.Tensor | Iterable[torch.Tensor]) -> list[float]:
    """What each layer is worth: the loss without it minus the loss with all of them.

    A removed layer hands its input on unchanged, one layer at a time, without any training afterwards. A number near 0
    says that the model does as well without the layer; a negative one, that it does better. (The effectiveness of a
    layer in arXiv 2502.05795, section 2, measured there by performance on a benchmark.)

    Args:
        model: a causal language model of a known family, with its head.
        batches: token ids without padding, shape (B, T) with T >= 2, or several such batches.

    Returns:
        L floats, first layer first, in nats a token (mean cross-entropy of the next token over all batches). It costs
        L + 1 passes over the batches.

    Raises:
        ValueError: if there is no token to predict.
        UnsupportedArchitectureError: if the model's family is not in the table.
    """
    batches = list(_batches(batches))
    with _evaluating(model):
        full = _loss(model, batches)
        added = []
        for layer in text_stack(model).layers:
            with _bypassed(layer):
                added.append(_loss(model, batches) - full)
    return added


def _loss(model: nn.Module, batches: list[torch.Tensor]) -> float:
    """Mean cross-entropy of the next token over all batches."""
    total, count = 0.0, 0
    for ids_BT in batches:
        ids_BT = ids_BT.to(_device(model))
        predicted = ids_BT[:, 1:].numel()
        if predicted:
            total += model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.item() * predicted
            count += predicted
    if not count:
        raise ValueError("there is no token to predict: batches must hold sequences of two tokens or more")
    return total / count


@contextmanager
def _bypassed(layer: nn.Module) -> Iterator[None]:
    """Within it, the layer returns its input. It still computes, so that whatever it calls keeps working."""

    def bypass(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        hidden = _hidden_states(args, kwargs)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    hook = layer.register_forward_hook(bypass, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is back in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _merge(moments: tuple[int, float, float], count: int, mean: float, variance: float) -> tuple[int, float, float]:
    """Moments of two sets together (Chan, Golub & LeVeque 1983), in double precision."""
    old_count, old_mean, old_squares = moments
    total = old_count + count
    difference = mean - old_mean
    squares = old_squares + variance * count + difference**2 * old_count * count / total
    return total, old_mean + difference * count / total, squares


def _hidden_states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The residual stream that goes into a decoder layer, shape (B, T, D)."""
    return args[0] if args else kwargs["hidden_states"]


def _batches(input_ids: torch.Tensor | Iterable[torch.Tensor]) -> Iterable[torch.Tensor]:
    return [input_ids] if isinstance(input_ids, torch.Tensor) else input_ids


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
