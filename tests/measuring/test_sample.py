"""Text that needs no download."""

import textwrap

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import tiny
from hf_lnscale.measuring.sample import calibration_text, default_sources, own_text
from hf_lnscale.measuring.text import Windows


def tokenizer():
    made = Tokenizer(models.WordLevel({"<s>": 0} | {f"w{i}": i for i in range(1, tiny.VOCAB)}, unk_token="<s>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


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
    with pytest.raises(ValueError, match="no bos_token and no eos_token"):
        own_text(model, nameless, 40)


def test_text_of_one_source_is_judged_on_others_too():
    model, windows = tiny.model(), Windows(64 * 16, 16, 8)
    text = [" ".join(["w5"] * 2000)]
    found = calibration_text(text, model, tokenizer=tokenizer(), windows=windows)
    assert found.weights == {"list": 1.0, "english": 0.0, "python": 0.0}
    assert [found.only(name).num_sequences for name in found.weights] == [64, 8, 8]
    assert {batch.input_ids.shape[1] for batch in found} == {16}
    # The same for batches of text, and not again for what has others already.
    part, _ = calibration_text(text, model, tokenizer=tokenizer(), windows=windows).only("list").split(0.75)
    assert [calibration_text(part, model).only(name).num_sequences for name in found.weights] == [16, 2, 2]
    assert calibration_text(found, model) is found
    ids = torch.zeros(8, 16, dtype=torch.long)
    assert calibration_text(ids, model).weights == {"token ids": 1.0}
    assert len(calibration_text(ids, model, tokenizer=tokenizer()).weights) == 3
    assert calibration_text(None, model, tokenizer=tokenizer(), windows=windows).weights == {"english": 1, "python": 1}
