"""Text that needs no download."""

import textwrap

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny
from hf_lnscale.measuring.sample import default_sources, documents, own_text, train_tokenizer, with_default_sources
from hf_lnscale.measuring.text import Windows, token_batches


def tokenizer():
    made = Tokenizer(models.WordLevel({"<s>": 0} | {f"w{i}": i for i in range(1, tiny.VOCAB)}, unk_token="<s>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


@pytest.mark.slow
def test_default_sources_are_english_and_code_and_share_nothing():
    sources = default_sources()
    assert list(sources) == ["english", "python"]
    english, python = ("\n".join(sources[name]) for name in sources)
    first = textwrap.TextWrapper.__doc__.strip().splitlines()[0]
    assert first in english
    assert first not in python
    assert "class TextWrapper:" in python
    assert "# Hardcode the recognized whitespace" in python  # comments stay
    assert min(len(english), len(python)) > 500_000
    # The first passages come from many modules, and are the same each time.
    assert default_sources() == sources
    assert sum("import " in piece for piece in sources["python"][:100]) > 5


def test_own_text_is_sampled_from_the_model():
    model = tiny.model().double()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(30)
    batches = own_text(model, tokenizer(), num_tokens=40 * 200, seq_len=40, batch_size=60)
    assert [tuple(ids.shape) for ids in batches] == [(60, 40), (60, 40), (60, 40), (20, 40)]
    ids = torch.cat(batches)
    assert (ids[:, 0] == 0).all()
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(
            model(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
        )
        p = model(ids).logits[:, :-1].softmax(-1)
    # The mean loss of a sample is the entropy.
    entropy = -(p * p.log()).sum(-1)
    assert losses.mean().item() == pytest.approx(entropy.mean().item(), abs=4 * losses.std().item() / 200**0.5)
    assert losses.mean() < 0.9 * torch.tensor(tiny.VOCAB).log()
    again = own_text(model, tokenizer(), num_tokens=40 * 200, seq_len=40, batch_size=60)
    assert torch.equal(torch.cat(again), ids)
    nameless = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match="neither a bos_token nor an eos_token"):
        own_text(model, nameless, 40)


def test_default_sources_are_put_beside_another():
    text = [" ".join(["w5"] * 2000)]
    reader = train_tokenizer(documents()[:20], 300)
    # Sequences of the data to judge and to fit, and those of each default source to fit and to judge.
    for count, fitted_count, expected in ((64, 40, (20, 8)), (9, 11, (5, 4)), (2, 1, (1, 2))):
        given = [
            token_batches(text, tokenizer=reader, windows=Windows(number * 16, 16, 5))
            for number in (fitted_count, count)
        ]
        found = with_default_sources(*given, reader)
        for part, data, number in zip(found, given, expected, strict=True):
            assert [part.only(name).num_sequences for name in part.weights][1:] == [number, number]
            assert part.only("list").num_sequences == data.num_sequences
            assert {batch.input_ids.shape[1] for batch in part} == {16}
            assert torch.equal(part.batches[0].input_ids, data.batches[0].input_ids)
        assert found[0].weights == {"list": 1.0, "english": 0.25, "python": 0.25}
        rows = [
            {tuple(row) for batch in part if batch.name != "list" for row in batch.input_ids.tolist()} for part in found
        ]
        assert not rows[0] & rows[1]
    named = token_batches({"python": (text, 2.0)}, tokenizer=tokenizer(), windows=Windows(64, 16))
    fitted, judged = with_default_sources(named, named, tokenizer())
    assert fitted.weights == {"python": 2.0, "english": 0.5, "default python": 0.5}
    assert list(judged.weights) == ["python", "english", "default python"]


def test_a_default_source_that_the_data_is_from_is_not_fitted():
    reader = train_tokenizer(documents()[:20], 300)
    english = default_sources()["english"]
    windows = Windows(40 * 16, 16)
    given = token_batches({"mine": english}, tokenizer=reader, windows=windows)
    other = token_batches({"mine": [" ".join(english[400:])]}, tokenizer=reader, windows=windows)
    for judged, names in ((given, ["mine", "python"]), (other, ["mine", "english", "python"])):
        fitted, found = with_default_sources(other, judged, reader)
        assert list(fitted.weights) == names
        assert list(found.weights) == ["mine", "english", "python"]


def test_batches_remember_their_tokenizer():
    mine, ids = tokenizer(), torch.ones(8, 16, dtype=torch.long)
    text = {"a": [" ".join(["w5"] * 200)], "b": ids}
    for data in (text, text["a"], ids, [ids], {"a": ids}):
        found = token_batches(data, tokenizer=mine, windows=Windows(64, 8))
        parts = found.split(0.5)
        assert all(one.tokenizer is mine for one in (found, *parts, parts[0].only(*parts[0].weights)))
    assert token_batches(ids).tokenizer is None
