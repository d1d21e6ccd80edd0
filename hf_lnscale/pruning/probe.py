"""Finds the row of a family by experiment on a tiny random model.

Pre-norms are identified by intervention, not by name. For a layer y = x + f(n1(x)), z = y + g(n2(y)), the input x is
shifted by a random d while the outputs of n1, and then of n1 and n2, are held fixed. In a Pre-LN block, the input of n2
and then the output of the layer shift by exactly d, so nothing else in the layer reads the residual stream.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import re
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..core import families
from ..core.families import Family, UnsupportedArchitectureError, text_config
from ..core.norm import scale_norm
from ..core.stack import pretrained_modules
from ..measuring.stream import kv_cache
from .checkpoint_layers import rename_layers
from .depth_fields import prune_config

_MOST_PARAMETERS = 50_000_000  # limit for a tiny model, since unknown size fields could make it huge
# Field names and their values in a tiny model. With these values, per-layer patterns contain both kinds of layers.
_SIZES: dict[int, str] = {
    96: "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size",
    64: "max_position_embeddings n_positions n_ctx max_seq_len index_topk index_topk_blocks",
    48: "intermediate_size intermediate_size_mlp dense_intermediate_size ffn_dim n_inner dff d_ff dim_ff d_inner "
    "decoder_ffn_dim encoder_ffn_dim ffn_hidden_size feed_forward_size",
    32: "hidden_size d_model n_embd dim embedding_size embedding_dim word_embed_proj_dim emb_dim lru_width "
    "input_embedding_size output_embedding_size attention_hidden_size",
    16: "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size qk_head_dim "
    "shared_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size",
    8: "head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim kv_lora_rank q_lora_rank index_head_dim swa_head_dim "
    "linear_key_head_dim linear_value_head_dim linear_head_dim kv_channels attention_head_dim dim_head d_head "
    "hidden_size_per_layer_input attention_head_size o_lora_rank rotary_dim mamba_d_state state_size "
    "ssm_state_size time_step_rank mamba_dt_rank",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers num_blocks "
    "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads linear_num_heads "
    "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads linear_num_value_heads "
    "num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num sliding_window window_size "
    "sliding_window_size attention_chunk_size local_attention attention_window_size loop_layer_index_end",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_query_groups index_n_heads "
    "num_experts_per_tok num_experts_per_token moe_k moe_topk first_k_dense_replace max_window_layers "
    "num_dense_layers no_rope_layer_interval interleave_moe_layer_step attn_layer_period expert_layer_period "
    "mamba_expand n_groups mamba_n_groups layer_group_size global_attn_every_n_layers "
    "sliding_window_pattern moe_layer_end_index eos_token_id n_layers_per_attn_res_block loop_layer_index_start "
    "loop_num_passes",
    1: "n_shared_experts num_shared_experts moe_layer_start_index attn_layer_offset expert_layer_offset n_group "
    "topk_group num_expert_group bos_token_id",
    0: "num_nextn_predict_layers num_mtp_layers num_kv_shared_layers pad_token_id",
}


@dataclass(frozen=True)
class Proposal:
    """The result of probing a family.

    Attributes:
        model_type: `model_type` of the text model.
        family: the row for the table; None if the family can be neither scaled nor cut.
        no_scaling: why LayerNorm Scaling is not possible; "" if it is.
        no_dropping: why layers cannot be dropped; "" if they can.
    """

    model_type: str
    family: Family | None
    no_scaling: str = ""
    no_dropping: str = ""

    def __str__(self) -> str:
        if self.no_scaling or self.family is None:
            reasons = dict.fromkeys([self.no_scaling, self.no_dropping or "layers can be dropped"])
            return f"{self.model_type}: no row: {'; '.join(reasons)}"
        values = {name: value for name, value in vars(self.family).items() if value != getattr(Family(), name)}
        arguments = "".join(f", {name}={value!r}" for name, value in values.items())
        note = f"  # layers cannot be dropped: {self.no_dropping}" if self.no_dropping else ""
        return f"hf_lnscale.register_family({self.model_type!r}{arguments}){note}"


def propose_family(model: nn.Module) -> Proposal:
    """Finds the row of a model's family for `register_family`, or the reason why it has none.

    Builds a tiny random model of the same classes (four layers, hidden size 32, on the CPU, in float64). By intervening
    in it, determines the norms before attention and MLP, and verifies that their outputs can be scaled through their
    weights and that a configuration of the remaining layers is equivalent to deleting the others.

    Args:
        model: a transformers model of any size, possibly wrapped; only its classes are used.

    Returns:
        A `Proposal`; printing it shows the call to make.

    Raises:
        UnsupportedArchitectureError: if no tiny model can be built from the configuration class.
    """
    modules = pretrained_modules(model)
    if not modules:
        raise UnsupportedArchitectureError(f"propose_family: {type(model).__name__} contains no transformers model")
    text = text_config(modules[0].config)
    inner = next((module for module in modules if module.config.model_type == text.model_type), modules[0])
    try:
        config = tiny_config(type(text))
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in type(inner)(config).parameters())
        if count > _MOST_PARAMETERS:
            raise ValueError(f"it has {count:,} parameters, so its configuration uses unknown names for its sizes")
        return propose_from(type(inner), config)
    except Exception as error:
        raise UnsupportedArchitectureError(
            f"propose_family: no tiny {type(inner).__name__} could be run: {type(error).__name__}: {error}. Call "
            "hf_lnscale.pruning.probe.propose_from() with its class and a configuration of a small model"
        ) from error


def propose_from(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> Proposal:
    """Like `propose_family`, given the configuration of a tiny model of four layers and at most a few MB."""
    try:
        return probe(tiny_model(model_class, config))
    except RuntimeError:  # some models compute in float32 regardless of their dtype
        return probe(tiny_model(model_class, config, torch.float32))


def tiny_config(config_class: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    """A configuration of a tiny model, with sizes set for every field that has a known name."""
    known = {*inspect.signature(config_class.__init__).parameters, *config_class.attribute_map}
    known |= set(getattr(config_class, "__dataclass_fields__", ()))
    values: dict[str, Any] = {name: value for value, names in _SIZES.items() for name in names.split() if name in known}
    if known & {"kv_lora_rank", "linear_num_heads"}:  # latent attention has equally many of both
        values["num_key_value_heads"] = values.get("num_attention_heads", 4)
    config = config_class(**(values | changes))
    if "mrope_section" in getattr(config_class, "ignore_keys_at_rope_validation", ()):
        # How half a head is divided among the axes of a picture; the default fits the heads of a large model.
        rope = config.rope_parameters
        for part in [one for one in rope.values() if isinstance(one, dict)] or [rope]:  # for each kind of layer
            half = int(8 * part.get("partial_rotary_factor", 1)) // 2
            part["mrope_section"] = [half - half // 4 * 2, half // 4, half // 4]
    return config


def tiny_model(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype = torch.float64
) -> PreTrainedModel:
    """A random model in which every layer affects the output, on the CPU and with eager implementations."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = model_class(config)
        model.to(dtype).eval().requires_grad_(False)  # type: ignore[arg-type]
        model.set_attn_implementation("eager")
        model.set_experts_implementation("eager")  # grouped kernels do not support float64
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            elif parameter.std() < 0.1:
                parameter.mul_(4)
    return model


def probe(model: PreTrainedModel) -> Proposal:
    """Finds the row of the family of a small model on the CPU, none of whose weights are zero."""
    config = text_config(model.config)
    if getattr(type(model.config), "is_encoder_decoder", False):  # the instance of a decoder may differ
        return Proposal(config.model_type, None, families.ENCODER_DECODER, families.ENCODER_DECODER)
    ids_BT = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    layers = _find_layers(model, ids_BT)
    if isinstance(layers, str):
        return Proposal(config.model_type, None, layers, layers)
    path, calls = layers
    parameters = [id(parameter) for call in calls for parameter in call.layer.parameters()]
    if len(set(parameters)) < len(parameters):
        return Proposal(config.model_type, None, families.SHARED, families.SHARED)
    family, no_scaling = _row(model, path, calls, ids_BT)
    values = config.to_dict()
    fields = tuple(name for name in families.DEPTH_FIELDS if values.get(name) is not None)
    family = replace(family, depth_fields=fields, no_scaling=no_scaling)
    no_dropping = "its configuration counts sub-layers as layers"
    if len(calls) == config.num_hidden_layers:
        no_dropping = _no_dropping(model, path, family, ids_BT)
    if no_dropping:
        family = replace(family, depth_fields=None)
    return Proposal(config.model_type, None if no_scaling and no_dropping else family, no_scaling, no_dropping)


def _stream(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """The first argument of a module that may be the residual stream."""
    values = (*args, *kwargs.values())
    return next((x for x in values if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim() >= 2), None)


def _output(output: Any) -> Any:
    return output[0] if isinstance(output, (tuple, list)) else output


class _Call(NamedTuple):
    """A call of a layer, with its input and output, that can be repeated."""

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    x_BTD: torch.Tensor
    y_BTD: torch.Tensor

    def again(
        self, x_BTD: torch.Tensor, watched: dict[str, nn.Module], held: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any], dict[str, Any]]:
        """The layer's output for a different input, and the inputs and outputs of some submodules.

        `held` fixes the outputs of some of these.
        """
        inputs: dict[str, Any] = {}
        outputs: dict[str, Any] = {}
        with ExitStack() as hooks, torch.no_grad():
            for name, module in watched.items():

                def hold(_: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> Any:
                    inputs[name], outputs[name] = _stream(args, kwargs), output
                    return held.get(name)

                hooks.enter_context(module.register_forward_hook(hold, with_kwargs=True))
            output = self.layer(
                *(x_BTD if value is self.x_BTD else value for value in self.args),
                **{name: x_BTD if value is self.x_BTD else value for name, value in self.kwargs.items()},
            )
        return _output(output), inputs, outputs


def _find_layers(model: PreTrainedModel, ids_BT: torch.Tensor) -> tuple[str, list[_Call]] | str:
    """The path of the decoder layers and their calls, or the reason why there are none."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    calls: dict[str, list[_Call]] = {name: [] for name in lists}
    with ExitStack() as hooks, torch.no_grad():
        for name, layers in lists.items():

            def note(layer: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                x, y = _stream(args, kwargs), _output(output)
                if x is not None and isinstance(y, torch.Tensor):
                    calls[name].append(_Call(layer, args, kwargs, x, y))

            for layer in layers:
                hooks.enter_context(layer.register_forward_hook(note, with_kwargs=True))
        model(input_ids=ids_BT, use_cache=False)
    chained = [
        name
        for name, made in calls.items()
        if len(made) > 1
        and [call.layer for call in made] == list(lists[name])
        and all(torch.equal(after.x_BTD, before.y_BTD) for before, after in itertools.pairwise(made))
    ]
    width = getattr(text_config(model.config), "hidden_size", None)  # missing if each of several stacks has one
    if not chained or width is None:
        return families.NO_STACK
    path = max(chained, key=lambda candidate: len(calls[candidate]))
    x_BTD = calls[path][0].x_BTD
    return (path, calls[path]) if x_BTD.dim() == 3 and x_BTD.shape[-1] == width else families.HYPER


def _from_the_base(model: PreTrainedModel, path: str) -> str:
    """Converts a path in a model to a path in the innermost `PreTrainedModel` that contains the module."""
    holders = [f"{name}." for name, module in model.named_modules() if name and isinstance(module, PreTrainedModel)]
    return path.removeprefix(max(filter(path.startswith, holders), key=len, default=""))


def _pre_norms(call: _Call) -> tuple[str, str] | str:
    """The paths of a layer's two pre-norms, or the reason why there are not two."""
    norms: dict[str, nn.Module] = {}
    for name, module in call.layer.named_modules():
        kind = type(module).__name__.lower()
        # A gated norm contains a norm; take the outer module, which reads the stream.
        outer = any(name.startswith(f"{holder}.") for holder in norms)
        whole = (kind.endswith("norm") and "attention" not in kind) or not list(module.children())
        if name and not outer and whole and "norm" in kind:
            norms[name] = module

    x_BTD = call.x_BTD
    d_BTD = torch.randn(x_BTD.shape, generator=torch.Generator().manual_seed(1), dtype=x_BTD.dtype)
    y_BTD, at, outputs = call.again(x_BTD, norms, {})
    tensors = {name: out for name, out in outputs.items() if isinstance(out, torch.Tensor)}
    if any(out.shape == y_BTD.shape and torch.equal(out, y_BTD) for out in tensors.values()):
        return families.POST_LN
    # Level by level, find the norms that d reaches when the outputs of all norms before them are held fixed.
    level = [name for name, x in at.items() if x is not None and _equal(x, x_BTD)]
    levels, held, factors = [level], {name: outputs[name] for name in level}, list[torch.Tensor]()
    while level:
        moved_BTD, moved, _ = call.again(x_BTD + d_BTD, norms, held)
        factors_of = {name: _factor(d_BTD, at[name], moved[name]) for name in at if name not in held}
        reached = {name: by for name, by in factors_of.items() if by is not None and by.abs().max() > 1e-3}
        level = list(reached)
        held |= {name: outputs[name] for name in level}
        levels, factors = [*levels, level], [*factors, *reached.values()]
    if not held:
        whole_outputs = {name: out for name, out in tensors.items() if out.numel() == y_BTD.numel()}
        moves = _factor(d_BTD, y_BTD, call.again(x_BTD + d_BTD, norms, whole_outputs)[0])
        return families.POST_NORM if moves is not None and _is_one(moves) else families.MORE_READERS
    if (moves := _factor(d_BTD, y_BTD, moved_BTD)) is None:
        return families.MORE_READERS
    if moves.abs().max() < 1e-3:
        return families.POST_LN
    if not all(map(_is_one, (*factors, moves))):
        return families.MULTIPLIED
    if [len(names) for names in levels] == [1, 1, 0]:
        return levels[0][0], levels[1][0]
    if len(held) > 2:
        return families.MORE_NORMS
    _, inputs, _ = call.again(x_BTD, dict(call.layer.named_children()), {})
    normed_BTD = outputs[levels[0][0]]
    readers = [x for x in inputs.values() if x is not None and _equal(x, normed_BTD)]
    return families.PARALLEL if len(held) == 2 or len(readers) > 1 else families.ONE_SUBLAYER


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two states are equal, allowing for modules that flatten batch and tokens."""
    return a.numel() == b.numel() and torch.equal(a.reshape(b.shape), b)


def _factor(d_BTD: torch.Tensor, before: torch.Tensor | None, after: torch.Tensor | None) -> torch.Tensor | None:
    """The factor per channel such that the shift is factor * d; None if there is none."""
    if after is None or before is None or not after.numel() == before.numel() == d_BTD.numel():
        return None
    moved_BTD = after.reshape(d_BTD.shape) - before.reshape(d_BTD.shape)
    factor_D = (moved_BTD * d_BTD).mean((0, 1)) / d_BTD.square().mean((0, 1))
    return factor_D if torch.allclose(moved_BTD, factor_D * d_BTD, atol=1e-3) else None


def _is_one(factor_D: torch.Tensor) -> bool:
    return torch.allclose(factor_D, torch.ones_like(factor_D), atol=1e-3)


def _one_plus_weight(norm: nn.Module) -> bool | None:
    """Whether a norm multiplies by 1 + weight (True) or by weight (False); None if its output is not linear in it."""
    weight = norm._parameters.get("weight")
    if weight is None or set(norm._parameters) - {"weight", "bias"}:
        return None
    x_TD = torch.randn(8, weight.numel(), generator=torch.Generator().manual_seed(2), dtype=weight.dtype)
    with torch.no_grad():
        for one_plus in (False, True):
            zero, scaled = copy.deepcopy(norm), copy.deepcopy(norm)
            for parameter in zero.parameters():
                parameter.zero_()
            zero._parameters["weight"].sub_(float(one_plus))  # type: ignore[union-attr]
            scale_norm(scaled, 0.3, one_plus, False)
            if not zero(x_TD).any() and torch.allclose(scaled(x_TD), norm(x_TD) * 0.3, atol=1e-5):
                return one_plus
    return None


def _row(model: PreTrainedModel, path: str, calls: list[_Call], ids_BT: torch.Tensor) -> tuple[Family, str]:
    """The row of a family without its per-layer fields, and why it cannot be scaled ("" if it can)."""
    family = Family(layers=_from_the_base(model, path))
    rows = [_pre_norms(call) for call in calls]
    row = rows[0]
    if any(other != row for other in rows) and not all(isinstance(other, str) for other in rows):
        return family, families.UNEQUAL
    if isinstance(row, str):
        return family, row
    norms = [call.layer.get_submodule(name) for call in calls for name in row]
    if all(norm._parameters.get("weight") is None for norm in norms):
        return family, families.NO_WEIGHT
    one_plus = {_one_plus_weight(norm) for norm in norms}
    if len(one_plus) > 1 or None in one_plus:
        return family, families.NOT_LINEAR
    family = replace(family, attention_norm=row[0], mlp_norm=row[1], one_plus_weight=bool(one_plus.pop()))
    return family, "" if _scales_as_hooks_do(model, path, family, ids_BT) else families.NOT_LINEAR


def _scales_as_hooks_do(model: PreTrainedModel, path: str, family: Family, ids_BT: torch.Tensor) -> bool:
    """Whether scaling norms gives the same outputs as multiplying their outputs by hooks."""
    by_hooks, by_weights = copy.deepcopy(model), copy.deepcopy(model)
    for position in range(len(model.get_submodule(path))):  # type: ignore[arg-type]
        scale = (position + 2) ** -0.5
        for name in family.pre_norms:
            hooked, scaled = (built.get_submodule(f"{path}.{position}.{name}") for built in (by_hooks, by_weights))
            hooked.register_forward_hook(lambda _, args, output, scale=scale: output * scale)
            scale_norm(scaled, scale, family.one_plus_weight, False)
    return _same_outputs(by_hooks, by_weights, ids_BT)


@torch.no_grad()
def _same_outputs(one: PreTrainedModel, other: PreTrainedModel, ids_BT: torch.Tensor) -> bool:
    first, second = (model(input_ids=ids_BT, use_cache=False)[0] for model in (one, other))
    return torch.allclose(first, second, rtol=1e-4, atol=1e-4)


_CUTS = ([0], [1], [2], [3], [0, 2], [1, 2])


def _no_dropping(model: PreTrainedModel, path: str, family: Family, ids_BT: torch.Tensor) -> str:
    """Why layers cannot be dropped; "" if a smaller configuration is equivalent to removing them."""
    on_disk = revert_weight_conversion(model, model.state_dict())
    pre_norms = [name for name in on_disk if name.endswith(".weight") and family.layer_of_pre_norm(name) is not None]
    total = text_config(model.config).num_hidden_layers
    if not family.no_scaling and len(pre_norms) < 2 * total:
        return families.RENAMED
    try:
        if _cache_error(model, ids_BT) > 1e-3:
            return families.NO_CHECK
    except Exception:
        return families.NO_CHECK
    whole, refusals, numbered = model.state_dict(), [], re.compile(rf"^({re.escape(path)}\.)(\d+)(\..*)$")
    for dropped in _CUTS:
        config = copy.deepcopy(model.config)
        try:
            prune_config(config, dropped, family)
        except ValueError as error:
            refusals.append(str(error).removeprefix("drop_layers: "))
            continue
        kept = [layer for layer in range(total) if layer not in dropped]
        smaller = tiny_model(type(model), config, model.dtype)
        old = {new: old for old, new in rename_layers(whole, numbered, kept).items()}
        smaller.load_state_dict({name: whole[old[name]] for name in smaller.state_dict()})
        skipping = copy.deepcopy(model)
        for layer in dropped:
            skipping.get_submodule(f"{path}.{layer}").register_forward_hook(_return_input, with_kwargs=True)
        if not _same_outputs(smaller, skipping, ids_BT):
            return f"a model with the reduced configuration differs from one without layers {dropped}"
        if (difference := _cache_error(smaller, ids_BT)) > 1e-3:
            return f"without layers {dropped}, outputs with a KV cache differ by {difference:.1g}"
    return refusals[0] if len(refusals) == len(_CUTS) else ""


def _return_input(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """A forward hook that makes a layer return its input."""
    x = _stream(args, kwargs)
    return type(output)((x, *output[1:])) if isinstance(output, (tuple, list)) else x


@torch.no_grad()
def _cache_error(model: PreTrainedModel, ids_BT: torch.Tensor) -> float:
    """The largest relative difference in the output at the last token caused by a cache; 0 without a cache."""
    whole = model(input_ids=ids_BT, use_cache=False)[0][:, -1]
    cache = kv_cache(model(input_ids=ids_BT[:, :-1], use_cache=True))
    if not cache:
        return 0.0
    last = model(input_ids=ids_BT[:, -1:], use_cache=True, **cache)[0][:, -1]
    return float((last - whole).abs().max() / whole.abs().max())
