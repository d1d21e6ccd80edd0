"""Checkpoints of models trained with LayerNorm Scaling by other code: they are known by their perplexity."""

from __future__ import annotations

import json
import math
import re
import shutil
import warnings

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import load_file

import oracles
from hf_lnscale import adopt
from hf_lnscale.core.errors import ArgumentError
from hf_lnscale.evaluation import Perplexity
from hf_lnscale.evaluation.adopt import why_not
from hf_lnscale.measuring import sample

LAYERS = 6
SCALES = [layer**-0.5 for layer in range(1, LAYERS + 1)]
NORMS = ("input_layernorm", "post_attention_layernorm")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two plain `llama` checkpoints, one trained with its norms' outputs scaled from outside, and both models."""
    root = tmp_path_factory.mktemp("trained")
    texts = sample.documents(standard_library=False)
    (root / "text.txt").write_text("\n".join(texts[:20]))
    tokenizer = sample.train_tokenizer(texts[20:60], 512)
    ids = torch.tensor(tokenizer("\n".join(texts[20:])).input_ids)
    models = {}
    for name, scales in {"lns": SCALES, "pre_ln": [1.0] * LAYERS}.items():
        torch.manual_seed(0)
        config = tf.LlamaConfig(
            vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=4,
            max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        model = models[name] = oracles.with_hooked_norms(tf.LlamaForCausalLM(config), NORMS, scales)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(100):
            starts = torch.randint(len(ids) - 64, (8, 1))
            batch = ids[starts + torch.arange(64)]
            model(batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval().save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root, models


@pytest.mark.slow
def test_what_was_trained_with_it_is_marked(trained, tmp_path):
    root, models = trained
    (root / "lns/README.md").write_text("a card")
    done = adopt(root / "lns", tmp_path / "out", root / "text.txt", progress=False)
    assert done.path == tmp_path / "out"
    assert done.scaled.perplexity.value < done.plain.perplexity.value
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that of a cold switch
        loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(512, (2, 20))
    torch.testing.assert_close(loaded(ids).logits, models["lns"](ids).logits, rtol=1e-4, atol=1e-4)
    weights = [load_file(folder / "model.safetensors") for folder in (root / "lns", tmp_path / "out")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["hf_lnscale"])["ln_scaling"]["depths"] == [1, 2, 3, 4, 5, 6]
    for name in ("README.md", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (root / "lns" / name).read_bytes()
    with pytest.raises(ValueError, match="is already marked as scaled"):
        adopt(tmp_path / "out", tmp_path / "again", root / "text.txt")


@pytest.mark.slow
def test_what_was_trained_without_it_is_refused_with_both_figures(trained, tmp_path):
    root, _ = trained
    with pytest.raises(ArgumentError, match="the scale makes it worse") as refused:
        adopt(root / "pre_ln", tmp_path / "out", root / "text.txt", progress=False)
    found = re.search(
        r"perplexity ([\d.e+]+) ± [\d.]+ without the scale, ([\d.e+]+) ± [\d.]+ with it", str(refused.value)
    )
    for figure, scales in zip(found.groups(), ([1.0] * LAYERS, SCALES), strict=True):
        expected = _perplexity(root / "pre_ln", scales, (root / "text.txt").read_text()[:65_536])
        assert float(figure) == pytest.approx(expected, rel=1e-3)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_no_difference_is_refused(trained, tmp_path):
    root, _ = trained
    with pytest.raises(ArgumentError, match="the difference may be chance"):
        adopt(root / "lns", tmp_path / "out", root / "text.txt", ln_scaling={"exponent": 0}, progress=False)
    with pytest.raises(ArgumentError, match="the difference may be chance"):  # of one passage alone
        adopt(root / "lns", tmp_path / "out", root / "text.txt", max_bytes=1000, progress=False)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_an_old_checkpoint_without_a_tokenizer(trained, tmp_path):
    """As the authors' code leaves it: no tokenizer, and with an old release of transformers a .bin file."""
    root, models = trained
    old = tmp_path / "old"
    old.mkdir()
    shutil.copy(root / "lns/config.json", old)
    torch.save(load_file(root / "lns/model.safetensors"), old / "pytorch_model.bin")
    with pytest.raises(ValueError, match="has no tokenizer"):
        adopt(old, tmp_path / "out", root / "text.txt")
    adopt(old, tmp_path / "out", root / "text.txt", tokenizer=root / "lns", max_bytes=10_000, progress=False)
    assert not list((tmp_path / "out").glob("*.bin"))
    assert len(tf.AutoTokenizer.from_pretrained(tmp_path / "out")) == 512
    ids = torch.randint(512, (2, 20))
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(loaded(ids).logits, models["lns"](ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("mean", "reason"),
    [(-2.01, ""), (-2.0, "may be chance"), (0.0, "may be chance"), (2.0, "may be chance"), (2.01, "makes it worse")],
)
def test_the_bound_is_two_standard_errors(mean, reason):
    """Two blocks of four tokens whose nats change by mean - 1 and mean + 1: mean / 4 a token, standard error 1 / 4."""

    def predicted(*nats):
        sizes = torch.tensor([4.0, 4.0], dtype=torch.float64)
        return Perplexity(sum(nats), 8, 8, 1, 0, "", "", torch.tensor(nats, dtype=torch.float64), sizes, sizes)

    found = why_not(predicted(8.0, 16.0), predicted(8.0 + mean - 1, 16.0 + mean + 1))
    assert reason in found
    assert bool(found) == bool(reason)


def _perplexity(folder, scales, text):
    """Of windows of 256 tokens that follow one another, by the model with forward hooks."""
    model = oracles.with_hooked_norms(tf.AutoModelForCausalLM.from_pretrained(folder), NORMS, scales).eval()
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    ids, nats, done = torch.tensor([tokenizer.eos_token_id, *tokenizer(text).input_ids]), 0.0, 0
    while done < len(ids) - 1:
        end = min(len(ids) - 1, done + 256)
        start = max(0, end - 256)
        with torch.no_grad():
            log_p = model(ids[None, start:end]).logits[0].double().log_softmax(-1)
        nats -= log_p.gather(1, ids[start + 1 : end + 1, None])[done - start :].sum().item()
        done = end
    return math.exp(nats / done)
