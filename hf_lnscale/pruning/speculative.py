"""Speculative decoding with a model's own layers: the same text, drafted with some layers left out.

Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding", arXiv 2211.17192: a cheap
model proposes a few tokens, the full one checks them all in one forward pass, and what comes out has the full model's
own distribution. Here the cheap model is the full one without some layers (as in arXiv 2309.08168): it needs no
weights of its own. Whether it pays depends on how often it is right and on how much cheaper it is; both are measured.

Shapes: B sequences, T tokens of prompt and answer, N tokens of the answer, V vocabulary.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ..core.families import text_config
from ..core.stack import Stack, text_stack
from ..measuring.stream import eval_mode
from ..measuring.text import Batch, Windows, token_batches
from .layers import delete_layers, normalize_layers, prune_config
from .plan import PruningPlan

# --- the draft ------------------------------------------------------------------------------------------------------


def draft_model(model: nn.Module, drop_layers: Any, *, num_assistant_tokens: int | None = None) -> PreTrainedModel:
    """The model without some of its layers, on the same weights: an assistant for its own generation.

    Every parameter of the draft is the parameter of the model, the same object: it takes no memory for weights, and
    follows every training step. Modules, configuration and KV cache are its own, and the model stays as it is.

    Make it last: after the model is on its device, in its dtype, with its adapters. Parameters follow `model.to(...)`,
    but buffers, switched adapters and kernels that are bound later do not; `draft.to(...)` would move the model's
    parameters. The draft is in evaluation mode. Hooks on modules are kept, and run in the draft too.

    Args:
        model: a causal language model of a family in the table; one wrapped by PEFT gives a draft with its adapters.
        drop_layers: positions of the layers that the draft leaves out, negative ones counted from the end; or what
            `choose_draft` or `plan_pruning` returned.
        num_assistant_tokens: tokens that it proposes before the model checks them; by default those of the choice,
            or 5.

    Returns:
        A model of the same class. Its `generation_config` says `num_assistant_tokens`, a constant schedule, and no
        confidence threshold (transformers' defaults of 20 tokens and 0.4 suit drafts that cost next to nothing).

    Raises:
        ValueError: for wrong layers, a number of tokens below 1, or a model that cannot be shared: a sharded one, one
            that a PEFT method steers from outside its layers (prompt and prefix tuning), or one with a module whose
            forward was replaced by a closure.
        UnsupportedArchitectureError: if the family, or its configuration fields over depth, are not known.

    Example:
        >>> draft = hf_lnscale.draft_model(model, [12, 14, 17])
        >>> model.generate(**inputs, assistant_model=draft, do_sample=False)
    """
    if isinstance(drop_layers, PruningPlan):
        drop_layers.require_made_for(text_stack(model).model.config)
        if num_assistant_tokens is None:
            num_assistant_tokens = drop_layers.notes.get("num_assistant_tokens")
    if num_assistant_tokens is None:
        num_assistant_tokens = getattr(drop_layers, "num_assistant_tokens", 5)
    _require_count("num_assistant_tokens", num_assistant_tokens)
    dropped = normalize_layers(_layers(drop_layers), len(text_stack(model).layers))
    _require_shareable(model)
    draft = _view(_generator(model))
    stack = text_stack(draft)
    if dropped:
        prune_config(_whole_config(draft, stack), dropped)
        delete_layers(stack, dropped)
    settings = getattr(draft, "generation_config", None)  # a model without a head has none
    if settings is not None:
        settings.num_assistant_tokens = num_assistant_tokens
        settings.num_assistant_tokens_schedule = "constant"
        settings.assistant_confidence_threshold = 0.0
    return draft.eval()


def _layers(drop_layers: Any) -> Any:
    if isinstance(drop_layers, PruningPlan):
        return drop_layers.layers
    return drop_layers.layers if isinstance(drop_layers, (DraftStep, DraftMeasurement)) else drop_layers


def _whole_config(draft: PreTrainedModel, stack: Stack) -> PreTrainedConfig:
    """The outermost configuration whose text part is the one that the decoder reads."""
    parts = [part.config for part in draft.modules() if isinstance(part, PreTrainedModel)]
    return next(config for config in parts if text_config(config) is stack.model.config)


class _Shared(TorchFunctionMode):
    """Within it, deepcopy hands on tensors as they are: quantized layers and offload hooks hold some besides."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__:
            return args[0]
        return func(*args, **(kwargs or {}))


def _view(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of every module, on the same tensors.

    deepcopy, as it binds methods to the copies that were bound to the originals (by accelerate, by kernels), and copies
    a configuration once that many modules hold.
    """
    # Parameters and buffers by name: some subclasses have a __deepcopy__ of their own, past the mode above.
    tensors = [tensor for part in model.modules() for tensor in (*part._parameters.values(), *part._buffers.values())]
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors if tensor is not None}
    with _Shared():
        return copy.deepcopy(model, memo)


def _require_shareable(model: nn.Module) -> None:
    peft: Any = getattr(model, "active_peft_config", None)
    if getattr(peft, "is_prompt_learning", False):
        raise ValueError(
            f"draft_model: {peft.peft_type} adds to the input of the whole model, which a draft of its layers would "
            "not see"
        )
    for name, parameter in model.named_parameters():
        # FSDP2 and tensor parallelism, FSDP1, DeepSpeed's ZeRO-3.
        if type(parameter).__name__ in ("DTensor", "FlatParameter") or hasattr(parameter, "ds_id"):
            raise ValueError(f"draft_model: {name} is sharded; make the draft of a model that is whole")
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        if isinstance(forward, FunctionType) and forward.__closure__:
            raise ValueError(
                f"draft_model: the forward of {name or 'the model'} was replaced by a closure, {forward.__qualname__}; "
                "in a draft it would still run the model's own module. Bind it as a method: "
                "types.MethodType(function, module)"
            )


# --- what a draft promises ------------------------------------------------------------------------------------------


def expected_tokens(acceptance: float, num_assistant_tokens: int) -> float:
    """Tokens that one check by the full model yields: those accepted, and the one it always adds itself.

    Args:
        acceptance: probability a that a proposed token is accepted, given that those before it were; 0 ... 1.
        num_assistant_tokens: tokens proposed, g.

    Returns:
        `(1 - a^(g + 1)) / (1 - a)`, between 1 and g + 1 (arXiv 2211.17192, equation 1).
    """
    return sum(acceptance**k for k in range(num_assistant_tokens + 1))


def expected_speedup(
    acceptance: float, cost_ratio: float, num_assistant_tokens: int, verification_cost: float = 1.0
) -> float:
    """How many times as fast as plain decoding speculative decoding should be.

    Args:
        acceptance: as in `expected_tokens`.
        cost_ratio: time of the draft for one token over the time of the full model for one, c.
        num_assistant_tokens: tokens proposed, g.
        verification_cost: time of the full model for g + 1 tokens at once over its time for one, v. The paper takes
            it to be 1, which holds where weights are what is waited for: large models at short context.

    Returns:
        `(1 - a^(g + 1)) / ((1 - a) (g c + v))` (arXiv 2211.17192, theorem 3.8, with v = 1).
    """
    rounds = num_assistant_tokens * cost_ratio + verification_cost
    return expected_tokens(acceptance, num_assistant_tokens) / rounds


def best_num_assistant_tokens(
    acceptance: float, cost_ratio: float, verification_costs: Sequence[float] | int = 20
) -> tuple[int, float]:
    """The number of tokens to propose that promises the most speed.

    Args:
        acceptance: as in `expected_tokens`.
        cost_ratio: as in `expected_speedup`.
        verification_costs: of proposing 1, 2, ... tokens, as in `expected_speedup`; or only how many to try, each
            at the cost of 1.

    Returns:
        The number, and the speed-up expected with it.
    """
    costs = [1.0] * verification_costs if isinstance(verification_costs, int) else list(verification_costs)
    promised = [(expected_speedup(acceptance, cost_ratio, g, cost), g) for g, cost in enumerate(costs, start=1)]
    speedup, number = max(promised, key=lambda pair: (pair[0], -pair[1]))
    return number, speedup


@dataclass(frozen=True)
class DraftStep:
    """One draft that `choose_draft` looked at.

    Attributes:
        layers: positions of the layers left out, sorted.
        acceptance: share of the held-out answers' tokens that it would have proposed (or, sampling, the mean
            probability that they are accepted), 0 ... 1.
        cost_ratio: its time for one token over the full model's, both measured while decoding.
        num_assistant_tokens: the number of tokens to propose that is best for it.
        speedup: expected with that number; 1.0 is the speed of plain decoding.
    """

    layers: list[int]
    acceptance: float
    cost_ratio: float
    num_assistant_tokens: int
    speedup: float


@dataclass(frozen=True)
class DraftChoice(DraftStep):
    """The draft that promises the most speed, and every one on the way there.

    Attributes:
        steps: the best draft found with one layer left out, with two, and so on.
        verification_costs: time of the full model for 2, 3, ... tokens at once over its time for one.
        data: what was measured on: as `TokenBatches.describe`, with `max_new_tokens` and `temperature`.
    """

    steps: list[DraftStep]
    verification_costs: list[float]
    data: dict[str, Any]

    @property
    def pays(self) -> bool:
        """Whether any speed is promised. If not, plain decoding is faster."""
        return self.speedup > 1.0

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {**asdict(self), "pays": self.pays}


def choose_draft(
    model: nn.Module,
    data: Any,
    *,
    tokenizer: Any = None,
    max_drop: int | None = None,
    num_candidates: int = 8,
    max_assistant_tokens: int = 10,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    held_out: float = 0.25,
    num_tokens: int = 1024,
    seq_len: int = 64,
    batch_size: int = 8,
) -> DraftChoice:
    """Finds the layers to leave out, and the number of tokens to propose, that promise the fastest decoding.

    The model answers the prompts once. A draft's acceptance is then read off one forward pass over these answers: a
    token is accepted where the draft says the same, given the same text so far (sampling: with the probability
    min(1, q/p); its mean is that of arXiv 2211.17192, theorem 3.5). Layers are left out one by one, each time the one
    that keeps acceptance highest, till even a draft of a single layer would be too slow for what is left of it
    (corollary 3.9: a draft pays if its acceptance is above its cost ratio). Costs are measured, side by side.

    The expectation counts forward passes alone. What `generate` itself costs comes on top, and weighs on small models:
    `measure_draft` measures it all.

    Args:
        model: a causal language model of a family in the table, as it will be used: device, dtype, adapters.
        data: prompts, as `token_batches` takes them. Texts are cut into prompts of `seq_len` tokens; token ids are
            taken as they are, such as whole prompts in a chat template, padded or not.
        tokenizer: turns text into ids; by default the model's own.
        max_drop: the most layers to leave out; None sets no limit.
        num_candidates: layers tried in each step but the first, those that did best in the step before. All layers
            are tried where this is the number of layers.
        max_assistant_tokens: the largest number of tokens to propose that is looked at.
        max_new_tokens: length of an answer, tokens.
        temperature: 0 for greedy decoding, else for sampling.
        held_out: share of the prompts that judges the steps, and chooses no layer.
        num_tokens: tokens to take from texts for prompts.
        seq_len: tokens in a prompt cut from text.
        batch_size: prompts answered at once.

    Returns:
        The best draft. `pays` is False where none promises any speed.

    Raises:
        ValueError: for wrong arguments, fewer than two prompts, or a model with linear attention: it cannot take back
            a rejected token, so transformers has no assisted generation for it.
        UnsupportedArchitectureError: if the family, or its configuration fields over depth, are not known.
    """
    num_layers = len(text_stack(model).layers)
    max_drop = num_layers - 1 if max_drop is None else max_drop
    for name, value, most in (
        ("max_drop", max_drop, num_layers - 1),
        ("num_candidates", num_candidates, None),
        ("max_assistant_tokens", max_assistant_tokens, None),
        ("max_new_tokens", max_new_tokens, None),
    ):
        _require_count(name, value, most)
    _require_assisted(model, temperature)
    prompts = token_batches(
        data, _generator(model), tokenizer=tokenizer, windows=Windows(num_tokens, seq_len, batch_size)
    )
    with eval_mode(model):
        parts = [
            [answer for batch in part for answer in _answers(model, batch, max_new_tokens, temperature)]
            for part in prompts.split(held_out)
        ]
        choose_by, judge_by = parts
        context = choose_by[0].ids_BT[:1]
        verification_costs = [
            max(1.0, _time_ratio(model, model, context, width)) for width in range(2, max_assistant_tokens + 2)
        ]

        def acceptance(layers: list[int], answers: list[_Answers]) -> float:
            return _acceptance(draft_model(model, layers), answers, temperature)

        floor = _time_ratio(model, draft_model(model, range(1, num_layers)), context, 1)
        candidates = list(range(num_layers))
        layers: list[int] = []
        steps: list[DraftStep] = []
        while len(layers) < max_drop and (not steps or steps[-1].acceptance > floor):
            ranked = sorted(candidates, key=lambda layer: -acceptance(sorted([*layers, layer]), choose_by))
            layers = sorted([*layers, ranked[0]])
            # The others in the order of this step, those that were not tried last.
            rest = [layer for layer in range(num_layers) if layer not in ranked and layer not in layers]
            candidates = (ranked[1:] + rest)[:num_candidates]
            accepted = acceptance(layers, judge_by)
            cost = _time_ratio(model, draft_model(model, layers), context, 1)
            number, speedup = best_num_assistant_tokens(accepted, cost, verification_costs)
            steps.append(DraftStep(layers, accepted, cost, number, speedup))
    best = max(steps, key=lambda step: step.speedup)
    described = {**prompts.describe(), "max_new_tokens": max_new_tokens, "temperature": temperature}
    return DraftChoice(**vars(best), steps=steps, verification_costs=verification_costs, data=described)


# --- what a draft does ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DraftMeasurement:
    """Assisted generation with a draft beside plain generation.

    Attributes:
        layers: positions of the layers left out, sorted.
        num_assistant_tokens: tokens proposed at a time.
        proposed: tokens that the draft proposed in all.
        accepted: those of them that the model took.
        acceptance: accepted tokens over those that were judged; what follows a rejected token is not (the a of
            `expected_tokens`; accepted / proposed is less).
        tokens_per_verification: new tokens for each forward pass of the full model.
        cost_ratio: time of the draft for one token over that of the full model, forward passes alone.
        verification_cost: time of the full model for all proposed tokens and one more over its time for one.
        predicted: speed-up expected from these (`expected_speedup`).
        speedups: measured, of each prompt: tokens a second with the draft over those without it.
        same: share of the prompts whose answers are the same token for token; None when sampling. Below 1 only where
            two tokens are equally likely but for rounding, as checking many tokens at once rounds otherwise than one.
    """

    layers: list[int]
    num_assistant_tokens: int
    proposed: int
    accepted: int
    acceptance: float
    tokens_per_verification: float
    cost_ratio: float
    verification_cost: float
    predicted: float
    speedups: list[float]
    same: float | None

    @property
    def speedup(self) -> float:
        """The median over the prompts."""
        return statistics.median(self.speedups)

    @property
    def pays(self) -> bool:
        return self.speedup > 1.0

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {**asdict(self), "speedup": self.speedup, "pays": self.pays}


def measure_draft(
    model: nn.Module,
    data: Any,
    drop_layers: Any,
    *,
    num_assistant_tokens: int | None = None,
    tokenizer: Any = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    num_tokens: int = 512,
    seq_len: int = 64,
) -> DraftMeasurement:
    """Generates with a draft and without, prompt by prompt in turn, and counts and times what happens.

    Args:
        model: as for `choose_draft`.
        data: as for `choose_draft`. Each prompt is answered on its own: transformers has no assisted generation of
            more than one sequence at a time.
        drop_layers: as for `draft_model`.
        num_assistant_tokens: as for `draft_model`.
        tokenizer: turns text into ids; by default the model's own.
        max_new_tokens: length of an answer, tokens.
        temperature: 0 for greedy decoding, else for sampling.
        num_tokens: tokens to take from texts for prompts.
        seq_len: tokens in a prompt cut from text.

    Raises:
        ValueError: for wrong arguments, or a model that transformers does not generate with assistance for.
        UnsupportedArchitectureError: if the family, or its configuration fields over depth, are not known.
    """
    _require_count("max_new_tokens", max_new_tokens)
    _require_assisted(model, temperature)
    draft = draft_model(model, drop_layers, num_assistant_tokens=num_assistant_tokens)
    number = draft.generation_config.num_assistant_tokens
    batches = token_batches(data, _generator(model), tokenizer=tokenizer, windows=Windows(num_tokens, seq_len))
    prompts = [ids_1T.to(_generator(model).device) for batch in batches for ids_1T in _prompts(batch, one_by_one=True)]
    settings = _settings(max_new_tokens, temperature)
    rounds: list[tuple[int, int, bool]] = []
    speedups, same = [], []
    with eval_mode(model):
        _generate(model, prompts[0], settings, draft)  # the first is slow, whatever it is
        for turn, ids_1T in enumerate(prompts):
            rates, answers = {}, {}
            for assisted in (True, False) if turn % 2 else (False, True):
                counter = _Rounds(draft, _generator(model).generation_config.eos_token_id)
                start = _now(ids_1T.device)
                answer = _generate(model, ids_1T, settings, draft if assisted else None, counter)
                rates[assisted] = (answer.shape[1] - ids_1T.shape[1]) / (_now(ids_1T.device) - start)
                answers[assisted] = answer
                counter.hook.remove()
                if assisted:
                    rounds += counter.rounds
            speedups.append(rates[True] / rates[False])
            same.append(torch.equal(answers[True], answers[False]))
        cost = _time_ratio(model, draft, prompts[0], 1)
        verification_cost = max(1.0, _time_ratio(model, model, prompts[0], number + 1))
    proposed, accepted = (sum(counts) for counts in list(zip(*rounds, strict=True))[:2])
    # A round that the end of the text cut short rejected nothing.
    judged = accepted + sum(taken < given and not ended for given, taken, ended in rounds)
    acceptance = accepted / max(judged, 1)
    num_layers = len(text_stack(model).layers)
    return DraftMeasurement(
        layers=normalize_layers(_layers(drop_layers), num_layers),
        num_assistant_tokens=number,
        proposed=proposed,
        accepted=accepted,
        acceptance=acceptance,
        tokens_per_verification=(accepted + len(rounds)) / len(rounds),
        cost_ratio=cost,
        verification_cost=verification_cost,
        predicted=expected_speedup(acceptance, cost, number, verification_cost),
        speedups=speedups,
        same=None if temperature else sum(same) / len(same),
    )


class _Rounds(BaseStreamer):
    """Counts what is proposed and accepted. `generate` hands it the prompt, then the tokens of each check."""

    def __init__(self, draft: PreTrainedModel, eos: int | list[int] | None) -> None:
        self.rounds: list[tuple[int, int, bool]] = []  # tokens proposed, accepted, whether the text ended
        self._eos = torch.tensor([] if eos is None else eos).reshape(-1)
        self._proposed = 0
        self._started = False
        self.hook = draft.register_forward_pre_hook(self._count)

    def _count(self, *_: Any) -> None:
        self._proposed += 1

    def put(self, value: torch.Tensor) -> None:
        if self._started:
            ended = bool(torch.isin(value, self._eos).any())
            self.rounds.append((self._proposed, value.numel() - 1, ended))
        self._started, self._proposed = True, 0

    def end(self) -> None:
        pass


# --- measuring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Answers:
    """Prompts and what the model answers.

    Attributes:
        ids_BT: prompts of the same length, and the answers to them.
        counted_BN: which tokens of the answers count; not those after the end of a text.
        log_p_BN: the model's own log-probability of each; None for greedy decoding.
    """

    ids_BT: torch.Tensor
    counted_BN: torch.Tensor
    log_p_BN: torch.Tensor | None


def _generator(model: nn.Module) -> Any:
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def _settings(max_new_tokens: int, temperature: float) -> dict[str, Any]:
    """Of `generate`: nothing that changes the distribution, whatever the model's own generation_config says."""
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": 1, "repetition_penalty": 1.0}
    if temperature:
        return settings | {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    return settings | {"do_sample": False}


def _prompts(batch: Batch, one_by_one: bool) -> list[torch.Tensor]:
    """Token ids of prompts, each of shape (B, T) and without padding."""
    if one_by_one or batch.padded:
        return [ids_T[mask_T][None] for ids_T, mask_T in zip(batch.input_ids, batch.attention_mask, strict=True)]
    return [batch.input_ids]


def _generate(
    model: nn.Module, ids_BT: torch.Tensor, settings: dict[str, Any], draft: Any = None, streamer: Any = None
) -> torch.Tensor:
    extra = {"assistant_model": draft, "streamer": streamer} if draft is not None else {}
    return _generator(model).generate(ids_BT, attention_mask=torch.ones_like(ids_BT), **settings, **extra)


def _answers(model: nn.Module, batch: Batch, max_new_tokens: int, temperature: float) -> Iterator[_Answers]:
    generator = _generator(model)
    eos = torch.tensor(
        [] if generator.generation_config.eos_token_id is None else generator.generation_config.eos_token_id
    )
    for prompt_BT in _prompts(batch, one_by_one=False):
        ids_BT = _generate(model, prompt_BT.to(generator.device), _settings(max_new_tokens, temperature))
        answer_BN = ids_BT[:, prompt_BT.shape[1] :]
        ended_BN = torch.isin(answer_BN, eos.to(answer_BN)).long().cumsum(-1)
        # The token that ends the text is proposed like any other; what follows is padding.
        counted_BN = torch.cat([torch.zeros_like(ended_BN[:, :1]), ended_BN[:, :-1]], dim=-1) == 0
        log_p_BN = _log_probability(generator, ids_BT, answer_BN.shape[1], temperature) if temperature else None
        yield _Answers(ids_BT, counted_BN, log_p_BN)


def _logits(model: Any, ids_BT: torch.Tensor, num_new: int) -> torch.Tensor:
    """What a model says in front of each of the last tokens, shape (B, N, V)."""
    keep = {"logits_to_keep": num_new} if model._supports_logits_to_keep() else {}
    return model(input_ids=ids_BT[:, :-1], use_cache=False, **keep).logits[:, -num_new:]


def _log_probability(model: Any, ids_BT: torch.Tensor, num_new: int, temperature: float) -> torch.Tensor:
    log_BNV = torch.log_softmax(_logits(model, ids_BT, num_new).float() / temperature, dim=-1)
    return log_BNV.gather(-1, ids_BT[:, -num_new:, None]).squeeze(-1)


def _acceptance(draft: PreTrainedModel, answers: list[_Answers], temperature: float) -> float:
    accepted, count = 0.0, 0
    for answer in answers:
        num_new = answer.counted_BN.shape[1]
        if answer.log_p_BN is None:
            accepted_BN = _logits(draft, answer.ids_BT, num_new).argmax(-1) == answer.ids_BT[:, -num_new:]
        else:
            log_q_BN = _log_probability(draft, answer.ids_BT, num_new, temperature)
            accepted_BN = (log_q_BN - answer.log_p_BN).exp().clamp(max=1.0)
        accepted += accepted_BN[answer.counted_BN].double().sum().item()
        count += int(answer.counted_BN.sum())
    return accepted / count


def _time_ratio(model: nn.Module, other: nn.Module, context_1T: torch.Tensor, width: int, pairs: int = 9) -> float:
    """Time of `other` for `width` tokens at once over the time of the model for one, after the same context.

    The two take turns, so that a machine whose speed drifts slows both; the median of the ratios is returned.
    """
    runs: list[Callable[[], float]] = [_decoding(model, context_1T, 1), _decoding(other, context_1T, width)]
    for run in runs:
        run()
    ratios = []
    for turn in range(pairs):
        times = {which: runs[which]() for which in ((0, 1) if turn % 2 else (1, 0))}
        ratios.append(times[1] / times[0])
    return statistics.median(ratios)


def _decoding(model: nn.Module, context_1T: torch.Tensor, width: int) -> Callable[[], float]:
    generator = _generator(model)
    cache = DynamicCache(config=generator.config)
    generator(input_ids=context_1T, past_key_values=cache, use_cache=True)
    next_1W = context_1T[:, -1:].repeat(1, width)

    def run() -> float:
        start = _now(context_1T.device)
        generator(input_ids=next_1W, past_key_values=cache, use_cache=True)
        return _now(context_1T.device) - start

    return run


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def _require_count(name: str, value: Any, most: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or (most is not None and value > most):
        valid = "at least 1" if most is None else f"1 ... {most}"
        raise ValueError(f"{name} must be an integer of {valid}, got {value!r}")


def _require_assisted(model: nn.Module, temperature: float) -> None:
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a number >= 0 (0: greedy decoding), got {temperature!r}")
    text_stack(model)
    generator = _generator(model)
    if not getattr(generator, "can_generate", lambda: False)():
        raise ValueError(f"{type(generator).__name__} has no language modeling head to generate with")
    if generator._is_stateful:
        raise ValueError(
            f"{type(generator).__name__} has linear-attention layers, whose state cannot be taken back to before a "
            "rejected token: transformers has no assisted generation for it"
        )
