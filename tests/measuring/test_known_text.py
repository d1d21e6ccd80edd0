"""Whether a model is measured on text that it was chosen on: against exact sets of passages, on Python's own text."""

import json
import random

import pytest
import torch

import tiny
from hf_lnscale.core.record import KnownText, add_known_text, known_text
from hf_lnscale.measuring.known_text import PASSAGE, caution, passages, percent, sequences_of, share_known, sketch
from hf_lnscale.measuring.sample import documents, source_code, train_tokenizer
from hf_lnscale.measuring.text import Batch, TokenBatches, Windows, token_batches


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(documents(standard_library=False)[:20], 512)


@pytest.fixture(scope="module")
def english(tokenizer):
    """Token ids of the topics of the language reference, a sequence each."""
    found = [torch.tensor(tokenizer(text).input_ids) for text in documents(standard_library=False)]
    return [ids for ids in found if len(ids) >= PASSAGE]


def sets(sequences):
    return {tuple(ids[i : i + PASSAGE].tolist()) for ids in sequences for i in range(len(ids) - PASSAGE + 1)}


def of(sequences):
    return sketch(TokenBatches([Batch(ids[None], torch.ones(1, len(ids)).bool()) for ids in sequences], "a.txt"))


def test_hashes_are_those_of_distinct_passages(english):
    assert len(passages(english)) == len(sets(english))
    assert not torch.equal(passages([torch.tensor([1, 2])]), passages([torch.tensor([2, 1])]))
    assert len(passages([torch.tensor([], dtype=torch.long)])) == 1
    assert passages(english).min() >= 0
    assert passages(english).max() < 1 << 48


@pytest.mark.slow
@pytest.mark.parametrize("part", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("seed", range(5))
def test_the_estimate_is_the_exact_share(part, seed, english):
    """Of a text of which a part is in the known one; within three standard errors of a sample of its size."""
    order = random.Random(seed).sample(english, len(english))
    half = len(order) // 2
    known, other = order[:half], order[half:]
    measured = known[: max(1, round(part * half))] + other[: round((1 - part) * half)]
    exact = len(sets(known) & sets(measured)) / len(sets(measured))
    text = of(known)
    assert len(text.passages) == 128
    sampled = int((passages(measured) <= text.passages[-1]).sum())
    error = (exact * (1 - exact) / sampled) ** 0.5
    assert share_known(text, measured) == pytest.approx(exact, abs=3 * error + 1e-9)


@pytest.mark.slow
def test_misses_and_false_alarms(english, tokenizer):
    """As the module says, on real text: 5 % of the known text is found, and another kind of text is no alarm."""
    order = random.Random(0).sample(english, len(english))
    known, other = order[::2], order[1::2]
    whole = torch.cat(known)
    text = of(known)
    size = len(whole) // 20
    parts = whole[: 20 * size].view(20, size)
    assert sum(share_known(text, [part]) > 0.5 for part in parts) >= 19
    code = [torch.tensor(tokenizer(one).input_ids) for one in source_code()[:40]]
    assert share_known(text, code) == 0
    # The other half of the reference shares some tables and sentences with the first.
    shared = len(sets(known) & sets(other)) / len(sets(other))
    assert share_known(text, other) == pytest.approx(shared, abs=0.02)


def test_a_share_in_words():
    shown = {1.0: "100 %", 0.997: "100 %", 0.0629: "6.3 %", 0.5: "50 %", 0.000512: "0.051 %"}
    assert {share: percent(share) for share in shown} == shown


def test_windows_of_another_length_and_place(tokenizer):
    """And windows that begin with a token of their own, as those of a tokenizer with a beginning token do."""
    text = "\n".join(documents(standard_library=False))
    config = tiny.config()
    found = sketch(token_batches([text], tokenizer=tokenizer, windows=Windows(16_384, 512)))
    add_known_text(config, found)
    for windows in (Windows(4096, 128), Windows(8192, 300), Windows(16_384, 48)):
        batches = token_batches([text[1000:]], tokenizer=tokenizer, windows=windows)
        assert "used to choose or heal the model's layers (list)" in caution(config, sequences_of(batches))
        begun = [torch.cat([torch.tensor([0]), ids]) for ids in sequences_of(batches)]
        assert caution(config, begun)
    later = token_batches([text[100_000:]], tokenizer=tokenizer, windows=Windows(16_384, 512))
    assert caution(config, sequences_of(later)) is None
    assert caution(tiny.config(), sequences_of(later)) is None


def test_one_passage_that_texts_share_is_no_alarm():
    one, other = (tiny.tokens(1, 4000, seed=seed)[0] for seed in (1, 2))
    text = of([one])
    at = int((passages_in_order(one) == text.passages[0]).nonzero()[0])
    license_of_both = one[at : at + PASSAGE]
    assert share_known(text, [torch.cat([other, license_of_both])]) == 0
    assert share_known(text, [torch.cat([other[:100], license_of_both])]) > 0.1  # of so short a text it is a good part


def passages_in_order(ids):
    return torch.stack([passages([ids[i : i + PASSAGE]])[0] for i in range(len(ids) - PASSAGE + 1)])


def test_padding_does_not_count():
    ids = tiny.tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    (batches,) = [token_batches({"input_ids": ids, "attention_mask": mask})]
    assert [len(one) for one in sequences_of(batches)] == [40, 20]


def test_several_texts_are_noted_in_bounded_space():
    config = tiny.config()
    texts = [of([tiny.tokens(1, 2000, seed=seed)[0]]) for seed in range(4)]
    for number, text in enumerate(texts):
        add_known_text(config, KnownText(f"{number}.txt", text.passages))
    found = known_text(config)
    assert found.source == "0.txt, 1.txt, 2.txt, 3.txt"
    # The sketch of all of them together.
    assert found.passages == of([tiny.tokens(1, 2000, seed=seed)[0] for seed in range(4)]).passages
    assert len(json.dumps(config.calibration_text)) < 2000
    add_known_text(config, KnownText("0.txt", texts[0].passages))
    assert known_text(config) == found


@pytest.mark.parametrize(
    "value",
    [1, "a", [], {}, {"source": "a"}, {"source": 1, "passages": ""}, {"source": "a", "passages": "00c0ffee012"},
     {"source": "a", "passages": "00C0FFEE0123"}, {"source": "a", "passages": 3}, {"source": "a", "passages": None}],
    ids=repr,
)  # fmt: skip
def test_values_that_are_not_valid(value):
    config = tiny.config(calibration_text=value)
    with pytest.raises(ValueError, match=r"^calibration_text must look like .*, got "):
        known_text(config)
