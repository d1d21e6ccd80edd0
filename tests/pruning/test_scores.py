"""Layer scores against the papers' formulas in double precision, and against models that layers were deleted from."""

import copy
import gc
import json
import math
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import hf_lnscale
import tiny
from hf_lnscale.measuring.losses import losses_by_source, sweep
from hf_lnscale.measuring.text import token_batches
from hf_lnscale.pruning.scores import METHODS, LayerScores, score_layers
from oracles import decoder_layers

LAYERS = tiny.LAYERS
FEW = ["llama", "gemma2", "qwen3_next", "qwen2_5_vl_text"]


@pytest.fixture
def ids():
    return tiny.tokens(6, 11, seed=1)


def padded(ids, side):
    """The same sequences, of unequal lengths, padded; with the unpadded ones."""
    lengths = [11, 7, 5, 11, 3, 8]
    batch, mask, single = torch.zeros_like(ids), torch.zeros_like(ids), []
    for row, length in enumerate(lengths):
        place = slice(11 - length, 11) if side == "left" else slice(0, length)
        batch[row, place], mask[row, place] = ids[row, :length], 1
        single.append(ids[row : row + 1, :length])
    return [
        {"input_ids": batch[:2], "attention_mask": mask[:2]},
        {"input_ids": batch[2:], "attention_mask": mask[2:]},
    ], single


def deleted(model, positions):
    """A copy without these layers, as one deletes them by hand."""
    cut = copy.deepcopy(model)
    layers = decoder_layers(cut)
    base = next(module for module in cut.modules() if getattr(module, "layers", None) is layers)
    kept = [i for i in range(len(layers)) if i not in positions]
    base.layers = nn.ModuleList(layers[i] for i in kept)
    base.config.num_hidden_layers = len(kept)
    if getattr(base.config, "layer_types", None):
        base.config.layer_types = [base.config.layer_types[i] for i in kept]
    return cut


@torch.no_grad()
def log_probabilities(model, ids):
    return model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)


def mean_loss(model, ids):
    found = log_probabilities(model, ids)[:, :-1].gather(-1, ids[:, 1:, None])
    return -found.mean().item()


def mean_kl(full, cut, ids):
    p, q = log_probabilities(full, ids), log_probabilities(cut, ids)
    return (p.exp() * (p - q)).sum(-1).mean().item()


@torch.no_grad()
def residual_stream(model, ids):
    """Inputs of all layers and the output of the last, shape (L + 1, B, T, D), in double precision."""
    found, layers = [], decoder_layers(model)

    def record(layer, args, output):
        found.extend([args[0], output] if layer is layers[-1] else [args[0]])

    hooks = [layer.register_forward_hook(record) for layer in layers]
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack(found).double()


def cosine(a, b):
    return (a * b).sum(-1) / ((a * a).sum(-1).sqrt() * (b * b).sum(-1).sqrt())


def naive_angular(stream, i, n, last=True):
    """Gromov et al., equation 7, one pair at a time."""
    a, b = stream[i], stream[i + n]
    if last:
        a, b = a[:, -1], b[:, -1]
    return (torch.arccos(cosine(a, b)) / math.pi).mean().item()


def close(found, expected, rel=1e-9):
    return found.tolist() == pytest.approx([float(value) for value in expected], rel=rel, abs=1e-12)


# --- the residual stream ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FEW)
def test_block_influence_is_the_papers(family, ids):
    model = tiny.loud(family)
    stream = residual_stream(model, ids)
    expected = [1 - cosine(stream[i], stream[i + 1]).mean().item() for i in range(LAYERS)]
    found = score_layers(model, tiny.two_batches(ids), progress=False)
    assert found.scores.shape == (LAYERS,)
    assert found.scores.dtype == torch.float64
    assert close(found.scores, expected)


@pytest.mark.parametrize("tokens", ["last", "all"])
@pytest.mark.parametrize("family", FEW)
def test_angular_distance_of_every_block_is_the_papers(family, tokens, ids):
    model = tiny.loud(family)
    stream = residual_stream(model, ids)
    found = score_layers(model, tiny.two_batches(ids), "angular", tokens=tokens, progress=False).scores
    assert found.shape == (LAYERS, LAYERS)
    for i in range(LAYERS):
        for n in range(1, LAYERS + 1):
            if i + n > LAYERS:
                assert found[i, n - 1].isnan()
            else:
                expected = naive_angular(stream, i, n, last=tokens == "last")
                assert found[i, n - 1].item() == pytest.approx(expected, rel=1e-9)


def test_layers_that_do_nothing_have_distance_zero(ids):
    """Rounding puts cosines above 1, where arccos is no number."""
    model = tiny.loud(dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.model.layers.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
    assert score_layers(model, ids, "angular", progress=False).lowest(2) == [0, 1]
    assert score_layers(model, ids, "angular", progress=False).scores[:, 0].max() < 1e-7
    assert score_layers(model, ids, progress=False).scores.abs().max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("method", "tokens"),
    [("block_influence", "last"), ("angular", "last"), ("angular", "all"), ("perplexity", "last"), ("kl", "last")],
)
@pytest.mark.parametrize("family", FEW)
def test_padding_changes_nothing(family, method, tokens, side, ids):
    # Gemma 2 itself yields NaN for left padding in double precision: its softmax is in single, its mask is not.
    model = tiny.loud(family, torch.float32 if family == "gemma2" else torch.float64)
    # With padding on the left a token has another position, and rotary embeddings are rounded to single precision.
    exact = 1e-3 if family == "gemma2" else 1e-6 if side == "left" else 1e-8
    with_padding, without = padded(ids, side)
    found, expected = (
        score_layers(model, data, method, tokens=tokens, progress=False) for data in (with_padding, without)
    )
    assert torch.allclose(found.scores, expected.scores, rtol=exact, atol=1e-12, equal_nan=True)
    assert found.scores.nan_to_num().count_nonzero() in (LAYERS, LAYERS * (LAYERS + 1) // 2)
    assert (found.baseline or 0) == pytest.approx(expected.baseline or 0, rel=exact)


@pytest.mark.parametrize("method", ["block_influence", "angular"])
def test_one_pass_without_the_head(method, ids):
    model = tiny.loud()
    calls = []
    model.lm_head.register_forward_hook(lambda *_: calls.append("head"))
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: calls.append("layer"))
    score_layers(model, tiny.two_batches(ids), method, progress=False)
    assert calls == ["layer"] * LAYERS * 2


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_memory_does_not_grow_with_the_batches(method, ids):
    model = tiny.loud()
    size, live = ids.numel() * tiny.HIDDEN, []

    def count(module, args):
        gc.collect()
        live.append(sum(isinstance(o, torch.Tensor) and o.numel() >= size for o in gc.get_objects()))

    # At the first layer, which runs in whole passes alone.
    model.model.layers[0].register_forward_pre_hook(count)
    score_layers(model, [ids] * 6, method, progress=False)
    assert len(live) >= 6
    assert live[-1] == live[-3]


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_is_accumulated_wider(method, ids):
    model = tiny.loud(dtype=torch.bfloat16)
    low = score_layers(model, ids, method, progress=False).scores
    high = score_layers(model.double(), ids, method, progress=False).scores
    assert low.dtype == torch.float64
    assert torch.allclose(low, high, rtol=0.1, equal_nan=True)


# --- weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_taylor_is_weight_times_gradient(family, ids, monkeypatch):
    monkeypatch.setattr("hf_lnscale.measuring.split_model._MAX_LOGITS", 7 * tiny.VOCAB)  # several parts
    model = tiny.loud(family)
    expected = torch.zeros(LAYERS, dtype=torch.float64)
    for batch in tiny.two_batches(ids):
        reference = copy.deepcopy(model)
        logits = reference(input_ids=batch, use_cache=False).logits[:, :-1]
        nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        for i, layer in enumerate(decoder_layers(reference)):
            terms = [(p * p.grad).abs().sum().item() for p in layer.parameters() if p.dim() > 1 and p.grad is not None]
            expected[i] += sum(terms) * len(batch) / len(ids)
    assert expected.min() > 1e-3
    # The norms compute in single precision whatever the model's.
    assert close(score_layers(model, tiny.two_batches(ids), "taylor", progress=False).scores, expected, rel=1e-6)


def test_taylor_with_padding(ids):
    model = tiny.loud()
    with_padding, _ = padded(ids, "right")
    found = score_layers(model, with_padding[:1], "taylor", progress=False).scores
    batch = with_padding[0]
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
    nn.functional.cross_entropy(model(**batch).logits[:, :-1].flatten(0, 1), labels.flatten()).backward()
    expected = [sum((p * p.grad).abs().sum().item() for p in m.parameters() if p.dim() > 1) for m in model.model.layers]
    assert close(found, expected)


def test_taylor_leaves_gradients_as_they_were(ids):
    model = tiny.loud()
    model.model.layers[1].requires_grad_(False)
    given = {name: torch.full_like(p, 3.0) for name, p in model.named_parameters() if "layers.2" in name}
    for name, gradient in given.items():
        model.get_parameter(name).grad = gradient
    frozen = score_layers(model, ids, "taylor", progress=False)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("layers.1" not in name)
        assert parameter.grad is given.get(name)
        assert parameter.grad is None or bool((parameter.grad == 3).all())
        assert not parameter._post_accumulate_grad_hooks
    assert close(score_layers(tiny.loud(), ids, "taylor", progress=False).scores, frozen.scores.tolist())


def test_taylor_holds_no_layers_gradient_beyond_its_turn(ids):
    model = tiny.loud()
    held = []

    def count(module, *gradients):
        held.append(sum(p.grad is not None for p in model.parameters()))

    for layer in model.model.layers[1:]:  # nothing that goes into the first has a gradient
        layer.register_full_backward_hook(count)
    score_layers(model, ids, "taylor", progress=False)
    assert held == [0] * (LAYERS - 1)


@pytest.mark.parametrize("kind", ["quantized", "offloaded"])
def test_weights_that_cannot_be_read_are_refused(kind, ids):
    model = tiny.loud()
    weight = model.model.layers[0].mlp.up_proj.weight.data
    values = weight.to(torch.int8) if kind == "quantized" else weight.to("meta")
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(values, requires_grad=False)
    with pytest.raises(ValueError, match=kind):
        score_layers(model, ids, "taylor", progress=False)


# --- the model without layers -----------------------------------------------------------------------


def swept(model, batches, *args, **options):
    losses = sweep(model, token_batches(batches), *args, progress=False, **options)[1]
    return {candidate: loss.mean for candidate, loss in losses.items()}


def loss_without(model, batches, removed=()):
    return losses_by_source(model, token_batches(batches), removed).mean


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_sweeps_are_as_deleted(family, ids):
    # Not to the last bit: some routers of experts are in single precision.
    model = tiny.loud(family)
    full = mean_loss(model, ids)
    expected = {i: mean_loss(deleted(model, [i]), ids) for i in range(LAYERS)}
    assert max(abs(loss - full) for loss in expected.values()) > 1e-3
    assert swept(model, tiny.two_batches(ids)) == pytest.approx(expected, rel=1e-9)
    assert loss_without(model, tiny.two_batches(ids)) == pytest.approx(full, rel=1e-9)

    # Two at once, and the divergence from the model with all layers.
    pairs = {i: deleted(model, [1, i]) for i in (3, 0)}
    expected = {i: mean_loss(cut, ids) for i, cut in pairs.items()}
    found = swept(model, tiny.two_batches(ids), removed=[1], candidates=[3, 0])
    assert list(found) == [3, 0]
    assert found == pytest.approx(expected, rel=1e-9)
    assert found == pytest.approx({i: loss_without(model, tiny.two_batches(ids), (1, i)) for i in (3, 0)}, rel=1e-9)
    expected = {i: mean_kl(model, cut, ids) for i, cut in pairs.items()}
    found = swept(model, tiny.two_batches(ids), [1], [3, 0], "kl")
    assert found == pytest.approx(expected, rel=1e-8)
    assert min(found.values()) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_sweeps_are_bit_for_bit_as_deleted(family, ids):
    """In the precision that models run in: the decoder's output, for in the head the parts may differ by rounding."""
    model = tiny.loud(family, dtype=torch.float32)

    def outputs(model, run):
        found = []
        base = next(module for module in model.modules() if getattr(module, "layers", None) is decoder_layers(model))
        hook = base.norm.register_forward_hook(lambda module, args, output: found.append(output))
        with torch.no_grad():
            run(model)
        hook.remove()
        return found

    # Before them come the search for tuples, on two tokens, and the pass that keeps the states.
    found = [x for x in outputs(model, lambda m: swept(m, ids)) if len(x) == len(ids)]
    assert len(found) == 1 + LAYERS
    for i in range(LAYERS):
        (expected,) = outputs(deleted(model, [i]), lambda m: m(input_ids=ids, use_cache=False))
        assert torch.equal(found[1 + i], expected)


@pytest.mark.parametrize("changes", [{"logits_scaling": 3.0}, {"logits_scaling": 0.1, "embedding_multiplier": 5.0}])
def test_what_a_family_does_to_its_logits_is_done(changes, ids):
    model = tiny.loud("granite", **changes)
    assert loss_without(model, ids, [2]) == pytest.approx(mean_loss(deleted(model, [2]), ids), rel=1e-12)


def test_scaled_models_keep_each_layers_own_scale(ids):
    model = tiny.loud(ln_scaling=True)
    expected = {i: mean_loss(deleted(model, [i]), ids) for i in range(LAYERS)}
    assert swept(model, ids) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("limit", [1, 7 * tiny.VOCAB])
def test_logits_in_parts_give_the_same(limit, ids, monkeypatch):
    model = tiny.loud("gemma2")
    whole = [swept(model, tiny.two_batches(ids), [0], None, measure) for measure in ("loss", "kl")]
    monkeypatch.setattr("hf_lnscale.measuring.split_model._MAX_LOGITS", limit)
    sizes = []
    model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output[..., 0].numel()))
    parts = [swept(model, tiny.two_batches(ids), [0], None, measure) for measure in ("loss", "kl")]
    assert max(sizes) == max(limit // tiny.VOCAB, 1)
    assert parts[0] == pytest.approx(whole[0], rel=1e-12)
    assert parts[1] == pytest.approx(whole[1], rel=1e-8)


def test_perplexity_and_kl_are_the_sweeps(ids):
    model = tiny.loud()
    found = score_layers(model, tiny.two_batches(ids), "perplexity", progress=False)
    assert found.baseline == pytest.approx(math.exp(mean_loss(model, ids)))
    assert close(found.scores, [math.exp(mean_loss(deleted(model, [i]), ids)) for i in range(LAYERS)])
    found = score_layers(model, tiny.two_batches(ids), "kl", progress=False)
    assert close(found.scores, [mean_kl(model, deleted(model, [i]), ids) for i in range(LAYERS)])


def test_a_sweep_runs_half_the_layers(ids):
    model = tiny.loud()
    loss_without(model, ids)
    calls = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    swept(model, tiny.two_batches(ids))
    # A batch: all layers once, then for each candidate those after it. The search for tuples runs one sequence.
    assert len([size for size in calls if size > 1]) == 2 * (LAYERS + LAYERS * (LAYERS - 1) // 2)


class TupleLayer(LlamaDecoderLayer):
    def forward(self, *args, **kwargs):
        return (super().forward(*args, **kwargs), "attention weights")


class TupleModel(LlamaModel):
    """As models were up to transformers 4, and those from the Hub still are."""

    def forward(self, input_ids, **kwargs):
        hidden = self.embed_tokens(input_ids)
        positions = self.rotary_emb(hidden, torch.arange(input_ids.shape[1])[None])
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=positions)[0]
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


@pytest.mark.parametrize("method", METHODS)
def test_layers_that_return_tuples(method, ids):
    model = tiny.loud()
    expected = score_layers(model, ids, method, progress=False).scores
    model.model.__class__ = TupleModel
    for layer in model.model.layers:
        layer.__class__ = TupleLayer
    found = score_layers(model, ids, method, progress=False).scores
    assert torch.allclose(found, expected, rtol=1e-8, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [{"return_dict": False}, {"output_hidden_states": True}, {"output_router_logits": True}],
)
def test_flags_of_the_config_do_not_matter(flags, ids):
    model = tiny.loud("qwen3_moe")
    expected = [score_layers(model, ids, method, progress=False).scores for method in METHODS]
    for name, value in flags.items():
        setattr(model.config, name, value)
    before = hooks(model)
    for method, scores in zip(METHODS, expected, strict=True):
        assert torch.equal(score_layers(model, ids, method, progress=False).scores.nan_to_num(), scores.nan_to_num())
    assert hooks(model) == before


# --- the model afterwards ---------------------------------------------------------------------------


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def state(model):
    parts = {name: (type(m), m.training, sorted(vars(m))) for name, m in model.named_modules()}
    values = {name: (p.clone(), p.grad, p.requires_grad) for name, p in model.named_parameters()}
    return parts, values, hooks(model), model.config.to_dict(), torch.is_grad_enabled()


def same(a, b):
    (parts_a, values_a, *rest_a), (parts_b, values_b, *rest_b) = a, b
    equal = all(torch.equal(values_a[n][0], values_b[n][0]) and values_a[n][1:] == values_b[n][1:] for n in values_a)
    return parts_a == parts_b and values_a.keys() == values_b.keys() and equal and rest_a == rest_b


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FEW)
def test_a_model_is_left_as_it_was(family, method, ids):
    model = tiny.loud(family).train()
    decoder_layers(model)[2].eval()
    if hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = torch.tensor([[5]])
    before = state(model)
    score_layers(model, ids, method, progress=False)
    assert same(before, state(model))
    if hasattr(model.model, "rope_deltas"):
        assert model.model.rope_deltas.item() == 5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("place", ["layers.0.mlp", "layers.3.mlp", "norm"])
def test_a_model_is_left_as_it_was_after_an_exception(method, place, ids):
    """On the second batch, within a candidate too."""
    model = tiny.loud().train()
    before = state(model)
    passes = []

    def fail(module, args):
        passes.append(1)
        if len(passes) == (4 if method in ("perplexity", "kl") and place != "layers.0.mlp" else 2):
            raise RuntimeError("broken")

    handle = model.model.get_submodule(place).register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        score_layers(model, tiny.two_batches(ids), method, progress=False)
    handle.remove()
    assert same(before, state(model))


def test_dropout_is_off(ids):
    model = tiny.loud(attention_dropout=0.9)
    expected = [score_layers(model, ids, method, progress=False).scores for method in ("block_influence", "taylor")]
    model.train()
    for method, scores in zip(("block_influence", "taylor"), expected, strict=True):
        assert torch.equal(score_layers(model, ids, method, progress=False).scores, scores)


# --- what comes back --------------------------------------------------------------------------------

THREE = LayerScores("block_influence", torch.tensor([0.5, 0.1, 0.1, 0.3], dtype=torch.float64), "a/model")


def angular():
    scores = torch.full((4, 4), math.nan, dtype=torch.float64)
    for n, row in enumerate([[0.4, 0.2, 0.3, 0.1], [0.5, 0.6, 0.4], [0.7, 0.8], [0.9]]):
        scores[: 4 - n, n] = torch.tensor(row, dtype=torch.float64)
    return LayerScores("angular", scores, "a/model", {"num_tokens": 7, "source": "text"}, tokens="last")


def test_order_and_lowest():
    assert THREE.order() == [1, 2, 3, 0]
    assert [THREE.lowest(n) for n in (0, 1, 3)] == [[], [1], [1, 2, 3]]
    assert angular().order() == [3, 1, 2, 0]
    assert [angular().best_block(n) for n in (1, 2, 3)] == [range(3, 4), range(2, 4), range(3)]
    assert [angular().lowest(n) for n in (0, 2)] == [[], [2, 3]]


@pytest.mark.parametrize("n", [-1, 4, 1.0, True])
def test_wrong_numbers_of_layers_are_refused(n):
    with pytest.raises(ValueError, match="n must be an integer from 0 to 3"):
        THREE.lowest(n)
    with pytest.raises(ValueError, match="n must be an integer from 1 to 3"):
        angular().best_block(n)


def test_a_block_without_a_distance_is_not_the_best():
    """A state that is not finite has no angle to another."""
    found = angular()
    found.scores[2, 1] = math.nan
    rest = [start for start in range(len(found.scores) - 1) if start != 2]
    start = min(rest, key=lambda start: found.scores[start, 1].item())
    assert found.best_block(2) == range(start, start + 2)


def test_an_adapter_s_weights_are_not_taken_for_the_layer_s(ids):
    config = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1])
    expected = score_layers(tiny.loud(), ids, "taylor", progress=False).scores
    adapted = get_peft_model(tiny.loud(), config)
    for model in (adapted, adapted.base_model.model):
        with pytest.raises(ValueError, match=r"'taylor'.*PEFT adapter.*merge it first"):
            score_layers(model, ids, "taylor", progress=False)
    assert torch.equal(score_layers(adapted.merge_and_unload(), ids, "taylor", progress=False).scores, expected)


def test_best_block_needs_angular_distances():
    with pytest.raises(ValueError, match=r"'angular'.*'block_influence'"):
        THREE.best_block(1)


@pytest.mark.parametrize("method", METHODS)
def test_scores_come_back_from_disk(method, ids, tmp_path):
    model = tiny.loud()
    model.config.name_or_path = "a/model"
    given = score_layers(model, ids, method, progress=False)
    given.save(tmp_path / "scores.json")
    json.loads((tmp_path / "scores.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    found = LayerScores.load(tmp_path / "scores.json")
    assert torch.allclose(found.scores, given.scores, rtol=0, atol=0, equal_nan=True)
    for name in ("method", "model", "data", "baseline", "tokens", "num_layers"):
        assert getattr(found, name) == getattr(given, name)
    assert found.model == "a/model"
    assert (found.baseline is not None) == (method == "perplexity")
    assert found.data == token_batches(ids).describe()


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"scores": [1.0]}', '{"method": "kl", "scores": [[1.0]]}', '{"method": "x", "scores": [1.0]}']
)
def test_other_files_are_refused(text, tmp_path):
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(ValueError, match=r"scores\.json.*no layer scores"):
        LayerScores.load(tmp_path / "scores.json")


def test_printed_as_a_table():
    rows = [line.split() for line in str(THREE).splitlines() if "│" in line]
    assert [row[1::2] for row in rows] == [["0", "0.5", "4"], ["1", "0.1", "1"], ["2", "0.1", "2"], ["3", "0.3", "3"]]
    text = str(angular())
    assert "7 tokens of text" in text
    assert "2 to 3" in text


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_plots(method, ids, tmp_path):
    pytest.importorskip("matplotlib")
    scores = score_layers(tiny.loud(), ids, method, progress=False)
    figure = scores.plot(tmp_path / "scores.png")
    assert (tmp_path / "scores.png").stat().st_size > 5000
    axes = figure.axes[0]
    if method == "angular":
        assert axes.images[0].get_array().count() == LAYERS * (LAYERS + 1) // 2
    else:
        assert [bar.get_height() for bar in axes.patches] == scores.scores.tolist()


def test_plotting_without_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"hf-lnscale\[plot\]"):
        THREE.plot()


def test_progress_is_shown_when_asked_for(ids, capsys):
    model = tiny.loud()
    for method in METHODS:
        score_layers(model, ids, method, progress=False)
    assert capsys.readouterr().err == ""
    for method in ("block_influence", "perplexity"):
        score_layers(model, ids, method)
    assert "without a layer" in capsys.readouterr().err


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "cosine"}, "method must be one of block_influence, .*kl, got 'cosine'"),
        ({"method": "angular", "tokens": "first"}, "tokens must be 'last' or 'all', got 'first'"),
        ({"data": None}, "data must be texts, a dataset, a path .*got NoneType"),
        ({"data": "nowhere.txt", "tokenizer": object()}, "no file 'nowhere.txt'"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, ids):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        score_layers(tiny.loud(), **({"data": ids, "progress": False} | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"removed": [4]}, "removed: layers are 0 to 3, got 4"),
        ({"removed": [-1]}, "removed: layers are 0 to 3, got -1"),
        ({"candidates": ["1"]}, "candidates: layers are 0 to 3, got '1'"),
        ({"removed": [1], "candidates": [0, 1]}, "candidates: layer 1 is already removed"),
        ({"measure": "accuracy"}, "measure must be 'loss' or 'kl', got 'accuracy'"),
    ],
)
def test_wrong_sweeps_are_refused(arguments, message, ids):
    with pytest.raises(ValueError, match=message):
        swept(tiny.loud(), ids, **arguments)


@pytest.mark.parametrize("method", METHODS)
def test_data_without_tokens_is_refused(method, ids):
    with pytest.raises(ValueError, match="no token"):
        score_layers(tiny.loud(), {"input_ids": ids, "attention_mask": ids * 0}, method, progress=False)


@pytest.mark.parametrize("method", ["taylor", "perplexity"])
def test_single_tokens_predict_nothing(method, ids):
    with pytest.raises(ValueError, match="no token"):
        score_layers(tiny.loud(), ids[:, :1], method, progress=False)


def test_rows_of_nothing_but_padding_do_not_count(ids):
    model = tiny.loud()
    data = {"input_ids": ids, "attention_mask": (torch.arange(6) != 2).long()[:, None].expand(6, 11)}
    for method in METHODS:
        found = score_layers(model, data, method, progress=False).scores
        expected = score_layers(model, ids[[0, 1, 3, 4, 5]], method, progress=False).scores
        assert torch.allclose(found, expected, rtol=1e-8, equal_nan=True)


@pytest.mark.parametrize("method", ["taylor", "perplexity", "kl"])
def test_models_without_a_language_head(method, ids):
    classifier = AutoModelForSequenceClassification.from_config(tiny.config())
    for model in (tiny.loud().model, classifier):
        with pytest.raises(ValueError, match="no language modeling head"):
            score_layers(model, ids, method, progress=False)


@pytest.mark.parametrize("method", ["block_influence", "angular"])
def test_base_models_do_for_the_others(method, ids):
    model = tiny.loud()
    found, expected = (score_layers(m, ids, method, progress=False).scores for m in (model.model, model))
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_unknown_models_are_refused(ids):
    with pytest.raises(hf_lnscale.UnsupportedArchitectureError):
        score_layers(nn.Linear(2, 2), ids)
