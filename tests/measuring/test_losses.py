"""Standard errors by sequence, and the pieces that every measurement shares."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

import tiny
from hf_lnscale.measuring.losses import MeanLoss, losses_by_source, sweep, token_losses
from hf_lnscale.measuring.state_stats import (
    BlockAngles,
    Moments,
    channel_moments,
    cosine_distance,
    layer_angle,
    pooled_moments,
)
from hf_lnscale.measuring.stream import upcast
from hf_lnscale.measuring.text import token_batches
from hf_lnscale.measuring.uncertainty import ratio_residuals, standard_error
from oracles import decoder_layers


def test_the_error_of_a_ratio_is_that_of_many_texts():
    """The spread of means over texts that are drawn again and again, of sequences of unequal length."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(5, 60, (2000, 40), generator=generator).double()
    # Long sequences are harder; half of the differences is the sequence's own.
    sums = sizes * (2 + 0.01 * sizes + 0.5 * torch.randn(sizes.shape, generator=generator, dtype=torch.float64))
    means = sums.sum(1) / sizes.sum(1)
    errors = [
        standard_error(ratio_residuals(s, n, mean)) for s, n, mean in zip(sums, sizes, means.tolist(), strict=True)
    ]
    assert sum(errors) / len(errors) == pytest.approx(means.std().item(), rel=0.05)


def test_one_passage_has_no_error():
    assert standard_error(ratio_residuals(torch.tensor([3.0]), torch.tensor([2.0]), 1.5)) is None


def test_sequences_of_equal_length_have_the_error_of_a_mean():
    losses = MeanLoss(torch.tensor([2, 0, 2, 2]))  # a sequence without a token to predict is none
    losses.add(torch.tensor([1.0, 2.0, 4.0, 5.0, 0.5, 1.0]), torch.tensor([0, 0, 2, 2, 3, 3]))
    assert losses.mean == pytest.approx(13.5 / 6)
    assert losses.error() == pytest.approx(torch.tensor([1.5, 4.5, 0.75]).std().item() / math.sqrt(3))
    other = MeanLoss(losses.counts_S)
    other.add(torch.tensor([1.0, 2.0, 4.0, 5.0, 0.5, 1.0]) + 0.25, torch.tensor([0, 0, 2, 2, 3, 3]))
    assert other.error(losses) == pytest.approx(0, abs=1e-12)  # in pairs, an equal difference everywhere is certain


def test_padding_and_batches_do_not_change_the_errors():
    ids = tiny.tokens(5, 9)
    model = tiny.model()
    with torch.no_grad():
        for parameter in decoder_layers(model).parameters():
            if parameter.dim() >= 2:
                parameter.mul_(10)
    lengths = [9, 4, 7, 1, 5]
    mask = torch.tensor([[place < length for place in range(9)] for length in lengths])
    single = [ids[row : row + 1, :length] for row, length in enumerate(lengths)]
    found = [
        sweep(model, token_batches(data), progress=False)
        for data in ({"input_ids": ids, "attention_mask": mask}, single)
    ]
    for full, without in found:
        assert full.counts_S.tolist() == [8, 3, 6, 0, 4]
        assert full.error() == pytest.approx(found[0][0].error(), rel=1e-4)
        assert without[2].error(full) == pytest.approx(found[0][1][2].error(found[0][0]), rel=1e-4)
        assert full.total == pytest.approx(full.sums_S.sum().item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("limit", [1, 7 * 5, 2**24])
def test_token_losses_in_parts(limit, dtype, monkeypatch):
    monkeypatch.setattr("hf_lnscale.measuring.losses._UPCAST_LOGITS", limit)
    seen = []
    monkeypatch.setattr("hf_lnscale.measuring.losses.upcast", lambda part: seen.append(len(part)) or upcast(part))
    logits, targets = torch.randn(13, 5).to(dtype), torch.randint(0, 5, (13,))
    expected = -logits.double().log_softmax(-1)[range(13), targets]
    found = token_losses(logits, targets)
    assert seen == {1: [1] * 13, 7 * 5: [7, 6], 2**24: [13]}[limit]
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert len(token_losses(logits[:0], targets[:0])) == 0


def test_moments_of_parts_are_those_of_the_whole():
    x = torch.randn(50, 7, dtype=torch.float64) * torch.arange(1, 8) + 100
    merged, rest = Moments(7), Moments(7)
    for part, into in ((x[:3], merged), (x[3:4], merged), (x[4:30], rest), (x[30:], rest)):
        variance, mean = channel_moments(part)
        into.add(len(part), mean, variance)
    both = merged.merged(rest)
    assert torch.allclose(both.channels_D, x.var(0, correction=0))
    assert both.variance == pytest.approx(x.var(correction=0).item())
    assert both.merged(Moments(7)).variance == pytest.approx(both.variance)
    counted = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    states = torch.randn(2, 3, 4, dtype=torch.float64)
    picked = states[counted.bool()]
    mean, variance = pooled_moments(states, counted)
    assert mean.item() == pytest.approx(picked.mean().item())
    assert variance.item() == pytest.approx(picked.var(correction=0).item())
    assert [value.item() for value in pooled_moments(states, torch.zeros(2, 3))] == [0, 0]


def test_angles_by_hand():
    x = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 0.0]]])
    y = torch.tensor([[[0.0, 3.0], [-1.0, 0.0], [5.0, 0.0], [1.0, 1.0]]])
    angles = layer_angle(x, y)[0, :3]
    assert angles.tolist() == pytest.approx([math.pi / 2, math.pi, 0.0])
    distances = cosine_distance(x, y, x.norm(dim=-1), y.norm(dim=-1))
    assert distances[0].tolist() == pytest.approx([1.0, 2.0, 0.0, 1.0])  # a state of zeros has no direction
    small = layer_angle(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[1.0, 1e-5]]]))
    assert small.item() == pytest.approx(1e-5, rel=1e-4)


def test_block_angles_over_many_tokens():
    """More tokens than are taken at a time; in the block of both layers they turn by the sum of the angles."""
    turns = torch.rand(1100, 2, dtype=torch.float64) * 0.7
    at = torch.cat([torch.zeros(1100, 1, dtype=torch.float64), turns.cumsum(1)], 1)
    blocks = BlockAngles(2)
    for part in at.split(600):
        blocks.add([torch.stack([angle.cos(), angle.sin()], -1) for angle in part.unbind(1)])
    means = turns.mean(0) / math.pi
    found = blocks.mean()
    assert blocks.count == 1100
    assert found[:, 0].tolist() == pytest.approx(means.tolist())
    assert found[0, 1].item() == pytest.approx(means.sum().item())
    assert found[1, 1].isnan()
    assert blocks.errors().tolist() == pytest.approx((turns.std(0) / math.pi / 1100**0.5).tolist())


def test_a_sweep_of_no_token_is_refused_before_a_pass():
    model = tiny.model()
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("ran"))
    with pytest.raises(ValueError, match=r"data: .* no token to predict"):
        sweep(model, token_batches(tiny.tokens(3, 1)), progress=False)


def test_the_loss_counts_each_source_once():
    """As in the figures of a search, whatever the sources' number of tokens."""
    model, few, many = tiny.loud(), tiny.tokens(1, 6), tiny.tokens(5, 9)
    found = losses_by_source(model, token_batches({"few": few, "many": many}), [1]).mean
    del model.model.layers[1]
    with torch.no_grad():
        logits = [model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1) for ids in (few, many)]
    means = [cross_entropy(x, ids[:, 1:].flatten()).item() for x, ids in zip(logits, (few, many), strict=True)]
    assert abs(means[0] - means[1]) > 1e-3
    assert found == pytest.approx(sum(means) / 2, rel=1e-6)
