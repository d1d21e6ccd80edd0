"""Healing against least squares solved anew on states collected by hooks, and a model with the map put in by hand.

Shapes: B sequences, T tokens, N tokens of all sequences, D hidden size, I width of the MLP.
"""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedTokenizerFast

import oracles
import tiny
from hf_lnscale import draft_model, plan_pruning
from hf_lnscale.core.families import UnsupportedArchitectureError
from hf_lnscale.measuring.text import Batch, Windows
from hf_lnscale.pruning import heal as heal_module
from hf_lnscale.pruning.heal import HealReport, heal, healed
from hf_lnscale.pruning.layers import drop_layers

REFUSED = ("gemma2", "gemma3_text")
HEALABLE = [family for family in tiny.FAMILIES if family not in REFUSED]


def speaker(family: str = "llama", **changes) -> nn.Module:
    """A tiny model in float64 whose layers and logits are large enough for a missing layer to matter."""
    model = tiny.model(family, **changes).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "norm" not in name:
                parameter.mul_(4.0)
        model.get_output_embeddings().weight.mul_(2.0)
    return model


@torch.no_grad()
def text_of(model: nn.Module, sequences: int = 24, length: int = 12, removed=(), seed: int = 0) -> torch.Tensor:
    """Token ids that a model says itself, so that whatever makes it differ from itself raises the loss."""
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(3, 90, (sequences, 1), generator=generator)
    with bypassed(model, removed):
        while ids_BT.shape[1] < length:
            logits_BV = model(input_ids=ids_BT, use_cache=False).logits[:, -1].float()
            ids_BT = torch.cat([ids_BT, torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)], dim=1)
    return ids_BT


class bypassed:
    """Layers return what they are given."""

    def __init__(self, model: nn.Module, removed) -> None:
        self.layers = [oracles.decoder_layers(model)[i] for i in removed]

    def __enter__(self) -> None:
        def skip(layer, args, kwargs, output):
            return args[0] if args else kwargs["hidden_states"]

        self.hooks = [layer.register_forward_hook(skip, with_kwargs=True) for layer in self.layers]

    def __exit__(self, *_) -> None:
        for hook in self.hooks:
            hook.remove()


@torch.no_grad()
def logits(model: nn.Module, ids_BT: torch.Tensor, removed=()) -> torch.Tensor:
    with bypassed(model, removed):
        return model(input_ids=ids_BT, use_cache=False).logits


def perplexity(model: nn.Module, ids_BT: torch.Tensor, removed=()) -> float:
    logits_BTV = logits(model, ids_BT, removed)
    return math.exp(F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten()).item())


@torch.no_grad()
def states(model: nn.Module, ids_BT: torch.Tensor, layer: int, removed=(), down: bool = False):
    """A layer's output, its MLP's, and what goes into its down_proj, each (N, ...)."""
    seen = {}
    module = oracles.decoder_layers(model)[layer]
    hooks = [
        module.register_forward_hook(lambda _m, _a, output: seen.update(out=output)),
        module.mlp.register_forward_hook(
            lambda _m, _a, output: seen.update(u=output[0] if isinstance(output, tuple) else output)
        ),
    ]
    if down:
        hooks.append(module.mlp.down_proj.register_forward_hook(lambda _m, args, _o: seen.update(x=args[0])))
    logits(model, ids_BT, removed)
    for hook in hooks:
        hook.remove()
    return tuple(seen[name].flatten(0, -2) for name in (("out", "u", "x") if down else ("out", "u")))


def ridge_regression(x_NF: torch.Tensor, z_ND: torch.Tensor, ridge: float) -> torch.Tensor:
    """min |z - x B|^2 + penalty |B|^2 by QR on the rows of both, not by normal equations."""
    penalty = ridge * x_NF.pow(2).sum(0).median()
    rows = torch.cat([x_NF, penalty.sqrt() * torch.eye(x_NF.shape[1], dtype=x_NF.dtype)])
    return torch.linalg.lstsq(rows, F.pad(z_ND, (0, 0, 0, x_NF.shape[1]))).solution


def with_map(model: nn.Module, layer: int, fit: torch.Tensor) -> nn.Module:
    """A copy in which u becomes u + u B by a hook."""

    def apply(_module, _args, output):
        first = output[0] if isinstance(output, tuple) else output
        first = first + (first @ fit if fit.dim() == 2 else first * fit)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    model = copy.deepcopy(model)
    oracles.decoder_layers(model)[layer].mlp.register_forward_hook(apply)
    return model


def same(model: nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def quietly(model: nn.Module, layers, data, **options) -> HealReport:
    return heal(model, layers, data, progress=False, **({"method": "linear"} | options))


@pytest.mark.parametrize("family", HEALABLE)
def test_healed_weights_are_the_fitted_map_in_every_family(family):
    # One whose multiplier is 1 by default would not show whether it is heeded.
    model = speaker(family, **({"residual_multiplier": 0.6} if family == "granite" else {}))
    plain, ids = copy.deepcopy(model), text_of(model)
    removed = [1, 2]
    report = quietly(model, removed, ids, held_out=ids)
    (step,) = report.steps
    assert step.kept
    assert step.layer == 0
    assert step.dropped == (1, 2)

    (target, _), (out, u) = states(plain, ids, 2), states(plain, ids, 0, removed)
    factor = getattr(plain.config, "residual_multiplier", 1.0)
    fit = ridge_regression(factor * u, target - out, step.ridge)
    torch.testing.assert_close(
        logits(model, ids, removed), logits(with_map(plain, 0, fit), ids, removed), rtol=1e-6, atol=1e-6
    )
    assert report.perplexity_full == pytest.approx(perplexity(plain, ids))
    assert report.perplexity_before == pytest.approx(perplexity(plain, ids, removed))
    assert report.perplexity_after == pytest.approx(perplexity(model, ids, removed))
    assert report.perplexity_after < report.perplexity_before

    before, after = plain.state_dict(), model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name: value.shape for name, value in before.items()} == {name: v.shape for name, v in after.items()}
    assert changed
    assert all(".layers.0.mlp." in name and "down_proj" in name for name in changed)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3"])
def test_every_expert_of_a_mixture_is_changed(family):
    model = speaker(family, num_hidden_layers=4)
    plain, ids = copy.deepcopy(model), text_of(model)
    (step,) = quietly(model, [2], ids, held_out=ids, method="refit").steps
    assert step.kept
    assert step.layer == 1
    assert step.method == "linear"
    (target, _), (out, u) = states(plain, ids, 2), states(plain, ids, 1, [2])
    # A map by hand in every weight, found by name.
    a_DD = torch.eye(tiny.HIDDEN) + ridge_regression(u, target - out, step.ridge).T
    mlps = [oracles.decoder_layers(m)[1].mlp for m in (plain, model)]
    for name, before in mlps[0].named_parameters():
        after = mlps[1].get_parameter(name)
        torch.testing.assert_close(after, a_DD @ before if "down_proj" in name else before, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("method", ["linear", "refit"])
def test_several_cuts_are_healed_one_after_the_other(method):
    model = speaker(num_hidden_layers=7, mlp_bias=True)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.bias.normal_(std=0.1)
    plain, ids = copy.deepcopy(model), text_of(model)
    removed = [1, 3, 4, 6]
    report = quietly(model, removed, ids, held_out=ids, method=method)
    assert [(step.layer, step.dropped) for step in report.steps] == [(0, (1,)), (2, (3, 4)), (5, (6,))]

    expected = copy.deepcopy(plain)
    for step, end in zip(report.steps, (1, 4, 6), strict=True):
        target, *_ = states(plain, ids, end)
        out, u, x = states(expected, ids, step.layer, removed, down=True)
        down = expected.model.layers[step.layer].mlp.down_proj
        loss = math.log(perplexity(expected, ids, removed))
        assert step.loss_before == pytest.approx(loss)
        if step.kept:
            with torch.no_grad():
                if method == "refit":
                    down.weight += ridge_regression(x, target - out, step.ridge).T
                else:
                    a_DD = torch.eye(tiny.HIDDEN) + ridge_regression(u, target - out, step.ridge).T
                    down.weight.copy_(a_DD @ down.weight)
                    down.bias.copy_(a_DD @ down.bias)
        relative = (states(expected, ids, step.layer, removed)[0] - target).norm(dim=-1) / target.norm(dim=-1)
        assert step.error_after == pytest.approx(relative.pow(2).mean().sqrt().item())
        torch.testing.assert_close(model.model.layers[step.layer].mlp.down_proj.weight, down.weight)
    assert sum(step.kept for step in report.steps) >= 2
    torch.testing.assert_close(logits(model, ids, removed), logits(expected, ids, removed), rtol=1e-6, atol=1e-6)
    losses = [step.loss_before for step in report.steps] + [report.steps[-1].loss_after]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("method", ["magnitude", "magnitude_per_channel"])
def test_magnitudes_are_closed_by_least_squares(method):
    model = speaker()
    with torch.no_grad():  # a cut whose gap is one of magnitude: the layer repeats a part of the MLP before it
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.load_state_dict(model.model.layers[0].mlp.state_dict())
        model.model.layers[1].post_attention_layernorm.weight.copy_(
            model.model.layers[0].post_attention_layernorm.weight
        )
    plain, ids = copy.deepcopy(model), text_of(model)
    (step,) = quietly(model, [1], ids, held_out=ids, method=method).steps
    assert step.kept
    assert step.ridge == 0
    (target, _), (out, u) = states(plain, ids, 1), states(plain, ids, 0, [1])
    dims = (0, 1) if method == "magnitude" else (0,)
    factor = 1 + (u * (target - out)).sum(dims) / (u * u).sum(dims)
    weights = [m.model.layers[0].mlp.down_proj.weight for m in (plain, model)]
    torch.testing.assert_close(weights[1], weights[0] * (factor[:, None] if factor.dim() else factor))


@pytest.mark.parametrize("family", ["granite", "phi3", "gemma", "qwen3_5_text", "qwen3_vl_text"])
def test_refit_weights_are_least_squares_in_what_goes_into_them(family):
    model = speaker(family, **({"residual_multiplier": 0.6} if family == "granite" else {}))
    plain, ids = copy.deepcopy(model), text_of(model, sequences=48)
    (step,) = quietly(model, [1, 2], ids, held_out=ids, method="refit").steps
    assert step.kept
    (target, _), (out, _, x) = states(plain, ids, 2), states(plain, ids, 0, [1, 2], down=True)
    factor = getattr(plain.config, "residual_multiplier", 1.0)
    before, after = (oracles.decoder_layers(m)[0].mlp.down_proj.weight for m in (plain, model))
    torch.testing.assert_close(after, before + ridge_regression(factor * x, target - out, step.ridge).T)


def test_refit_fits_no_worse_than_a_map_of_the_output():
    model = speaker()
    ids = text_of(model, sequences=48)
    with healed(model, [1, 2], ids, held_out=ids, method="refit", progress=False) as refit:
        pass
    with healed(model, [1, 2], ids, held_out=ids, method="linear", progress=False) as linear:
        pass
    assert refit.steps[0].error_after < linear.steps[0].error_after < linear.steps[0].error_before


def test_every_kept_layer_behind_the_first_cut_can_be_healed():
    model = speaker(num_hidden_layers=6)
    ids = text_of(model)
    with healed(model, [2, 4], ids, held_out=ids, method="linear", progress=False) as cuts:
        pass
    report = quietly(model, [2, 4], ids, held_out=ids, reach="after")
    assert [(step.layer, step.dropped) for step in report.steps] == [(1, (2,)), (3, (4,)), (5, ())]
    assert report.perplexity_after <= cuts.perplexity_after


def test_data_in_batches_is_data_at_once():
    ids = text_of(speaker(), sequences=24)
    fitted = []
    for parts in ([ids], list(ids.split(5)), [ids[:7, :9], ids[:7, 9:], ids[7:]]):
        model = speaker()
        assert quietly(model, [1], parts, held_out=ids).kept
        fitted.append(model.model.layers[0].mlp.down_proj.weight)
    torch.testing.assert_close(fitted[0], fitted[1], rtol=1e-9, atol=1e-11)
    assert not torch.allclose(fitted[0], fitted[2])  # other context, other states


def test_padding_counts_for_nothing():
    ids = text_of(speaker(), sequences=16)
    results = []
    for filler in (None, 5, 77):
        model = speaker()
        short = ids[:8, :7]
        if filler is None:
            data = [ids[8:], short]
        else:
            mask = torch.ones(16, 12, dtype=torch.bool)
            mask[8:, 7:] = False
            padded = torch.where(mask, torch.cat([ids[8:], ids[:8]]), filler)
            data = [Batch(padded, mask)]
        report = quietly(model, [1], data, held_out=data)
        results.append((report.perplexity_after, report.steps[0], model.model.layers[0].mlp.down_proj.weight))
    assert results[0][1].kept
    for perplexity_after, step, weight in results[1:]:
        assert perplexity_after == pytest.approx(results[0][0])
        assert step.error_before == pytest.approx(results[0][1].error_before)
        torch.testing.assert_close(weight, results[0][2], rtol=1e-7, atol=1e-9)


def test_what_does_not_help_on_held_out_data_is_not_kept():
    model = speaker()
    # Held-out text is the pruned model's own: to be led towards the full one makes it worse.
    calibration, held_out = text_of(model), text_of(model, removed=[1, 2])
    weights = copy.deepcopy(model.state_dict())
    for method in ("refit", "linear"):  # a mere factor can do good by chance
        report = quietly(model, [1, 2], calibration, held_out=held_out, method=method)
        (step,) = report.steps
        assert not report.kept
        assert not step.kept
        assert step.reason
        assert step.loss_after == step.loss_before
        assert step.error_after == step.error_before
        assert report.perplexity_after == report.perplexity_before
        assert same(model, weights)


def test_healed_is_undone_at_exit_whatever_happens():
    model = speaker(num_hidden_layers=6).bfloat16().train()
    weights, ids = copy.deepcopy(model.state_dict()), text_of(model)
    with healed(model, [2, 4], ids, held_out=ids, progress=False) as report:
        assert report.kept
        assert not same(model, weights)
    assert same(model, weights)
    assert model.training
    with pytest.raises(KeyboardInterrupt), healed(model, [2, 4], ids, held_out=ids, progress=False):  # noqa: PT012
        assert not same(model, weights)
        raise KeyboardInterrupt
    assert same(model, weights)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_heal_that_breaks_off_leaves_the_model_as_it_was(monkeypatch):
    model = speaker()
    weights, ids = copy.deepcopy(model.state_dict()), text_of(model)
    calls = []
    plain_loss = heal_module._Stream.loss

    def failing(stream):
        calls.append(same(model, weights))
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return plain_loss(stream)

    monkeypatch.setattr(heal_module._Stream, "loss", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        quietly(model, [1], ids, held_out=ids)
    assert calls[-1] is False
    assert same(model, weights)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_undo_and_forget():
    model = speaker()
    weights, ids = copy.deepcopy(model.state_dict()), text_of(model)
    report = quietly(model, [2], ids, held_out=ids)
    changed = copy.deepcopy(model.state_dict())
    healed_logits = logits(model, ids, [2])
    drop_layers(model, [2])
    torch.testing.assert_close(logits(model, ids), healed_logits)
    report.undo()
    torch.testing.assert_close(
        model.model.layers[1].mlp.down_proj.weight, weights["model.layers.1.mlp.down_proj.weight"]
    )
    model.model.layers[1].mlp.down_proj.load_state_dict({"weight": changed["model.layers.1.mlp.down_proj.weight"]})
    report.forget()
    report.undo()
    torch.testing.assert_close(logits(model, ids), healed_logits)


def test_bfloat16_is_rounded_once():
    wide = speaker().bfloat16()
    ids = text_of(wide)
    model = copy.deepcopy(wide)
    (step,) = quietly(model, [1], ids, held_out=ids).steps
    assert step.kept
    after = model.model.layers[0].mlp.down_proj.weight
    assert after.dtype == torch.bfloat16
    (target, _), (out, u) = states(wide, ids, 1), states(wide, ids, 0, [1])
    fit = ridge_regression(u.double(), target.double() - out.double(), step.ridge)
    expected = (torch.eye(tiny.HIDDEN) + fit.T) @ wide.model.layers[0].mlp.down_proj.weight.double()
    assert (after != expected.bfloat16()).float().mean() < 1e-3


def test_a_cut_in_front_of_the_first_kept_layer_is_noted():
    model = speaker()
    ids = text_of(model)
    first, second = quietly(model, [0, 2], ids, held_out=ids).steps
    assert (first.layer, first.dropped, first.kept) == (None, (0,), False)
    assert "in front" in first.reason
    assert (second.layer, second.dropped) == (1, (2,))


def test_the_report_says_it_all():
    model = speaker()
    ids = text_of(model)
    report = quietly(model, [-2, 0], ids)
    assert report.dropped == (0, 2)
    assert report.data["calibration"]["num_sequences"] == 18
    assert report.data["held_out"]["num_sequences"] == 6
    stored = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert stored["perplexity"]["after"] == report.perplexity_after
    assert [step["layer"] for step in stored["steps"]] == [None, 1]
    text = str(report)
    assert f"{report.perplexity_before:.2f} to {report.perplexity_after:.2f}" in text
    assert "no layer is kept in front" in " ".join(text.split())


@pytest.mark.parametrize("family", REFUSED)
def test_a_norm_behind_the_mlp_is_refused(family, monkeypatch):
    model = speaker(family)
    with pytest.raises(UnsupportedArchitectureError, match="post_feedforward_layernorm"):
        quietly(model, [1], tiny.tokens(4))
    # Without the table's word, the measurement says so.
    monkeypatch.setattr(heal_module, "_NOT_LINEAR", {})
    with pytest.raises(UnsupportedArchitectureError, match="residual stream plus"):
        quietly(model, [1], tiny.tokens(4))


def test_an_mlp_that_is_not_linear_in_its_weights_is_refused():
    model = speaker()
    ids, weights = text_of(model), copy.deepcopy(model.state_dict())
    model.model.layers[0].mlp.register_forward_hook(lambda _m, _a, output: F.normalize(output, dim=-1))
    with pytest.raises(UnsupportedArchitectureError, match="does not follow its weights"):
        quietly(model, [1], ids, held_out=ids)
    assert same(model, weights)


def test_weights_that_cannot_be_changed_are_refused():
    ids = tiny.tokens(4)
    model = speaker()
    model.model.layers[1].mlp.down_proj.to("meta")
    with pytest.raises(ValueError, match=r"mlp\.down_proj of layer 1 is not in memory"):
        quietly(model, [2], ids)

    model = speaker()
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[0].mlp.down_proj.weight
    with pytest.raises(ValueError, match=r"shared by .*layers\.0\.mlp.*layers\.1\.mlp"):
        quietly(model, [2], ids)

    model = speaker()
    down = model.model.layers[1].mlp.down_proj
    down.weight = nn.Parameter(down.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="quantized"):
        quietly(model, [2], ids)

    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(speaker(), peft.LoraConfig(target_modules=["down_proj"], r=2))
    with pytest.raises(ValueError, match="merge or unload"):
        quietly(model, [2], ids)


def test_wrong_arguments_are_named():
    model, ids = speaker(), tiny.tokens(4)
    for argument, layers, options in (
        ("method", [1], {"method": "magic"}),
        ("reach", [1], {"reach": "all"}),
        ("layers", [7], {}),
        ("layers", [0, 1, 2, 3], {}),
        ("data", [1], {"held_out": ids[:, :1]}),
    ):
        with pytest.raises(ValueError, match=argument):
            quietly(model, layers, ids, **options)
    with pytest.raises(ValueError, match="head"):
        quietly(AutoModel.from_config(tiny.config()), [1], ids)


@pytest.mark.parametrize("layers", [2, "plan"])
def test_layers_are_a_list(layers):
    with pytest.raises(ValueError, match=f"layers must be a list of layer indices, got {layers!r}; valid are"):
        quietly(speaker(), layers, tiny.tokens(4))
    with pytest.raises(ValueError, match=f"drop_layers must be a list of layer indices, got {layers!r}; valid are"):
        draft_model(speaker(), layers)


def test_the_figure_of_a_healed_plan_is_delivered(tmp_path):
    """As docs/pruning.md does it: heal on what the plan was made with, then drop."""
    model = speaker()
    words = models.WordLevel({f"w{i}": i for i in range(tiny.VOCAB)}, unk_token="w0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ids = text_of(model, sequences=48, length=16)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{token}" for token in ids.flatten().tolist()))
    sizes = {"tokenizer": PreTrainedTokenizerFast(tokenizer_object=tokenizer), "progress": False}
    plan = plan_pruning(model, text, num_layers=1, heal="linear", windows=Windows(640, 16), **sizes)
    assert plan.perplexity["healed"] < plan.perplexity["after"]
    taken = plan.data["calibration"]["num_tokens"]
    assert heal(model, plan.layers, text, method="linear", windows=Windows(taken, 16), **sizes).to_dict() == plan.heal
    drop_layers(model, plan.layers)
    assert perplexity(model, ids[30:40]) == pytest.approx(plan.perplexity["healed"], rel=1e-6)
