"""Perplexity against brute force, standard errors against simulation, tasks of lm-evaluation-harness, tables."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers as tf
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import tiny
from hf_lnscale import LNScalingConfig
from hf_lnscale.checkpoints.names import load, locate
from hf_lnscale.evaluation import Estimate, Perplexity, evaluate, perplexity
from hf_lnscale.evaluation.perplexity import BLOCK_SIZE, block_cuts
from hf_lnscale.evaluation.tasks import TaskResult, error_of_mean

TEXT = "hé llo wörld, this is a text. " * 3 + "日本語 and 🙂 end"


def byte_tokenizer(bos=False, adds=False, merges=()):
    """A token a byte, and some merges; ids below 96 as the tiny models have it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    seen = sorted({c for c, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(TEXT) for c in c})
    vocabulary = {"</s>": 0, "<s>": 1} | {c: i for i, c in enumerate(seen, start=2)}
    for a, b in merges:
        vocabulary[a + b] = len(vocabulary)
    assert len(vocabulary) <= tiny.VOCAB
    assert set(seen) <= set(alphabet)
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>"} if bos else {}
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **special)


def brute_force(model, ids, begin, everywhere, seq_len, stride):
    """Nats of each token by a forward pass of its own, on the tokens that its window holds in front of it."""
    ids, nats = [begin, *ids], []
    last = len(ids) - 1
    for position in range(1, len(ids)):
        # The window that predicts it: the first one, or the k-th after it.
        k = max(0, math.ceil((position - seq_len) / stride))
        start = max(0, min(last, seq_len + k * stride) - seq_len)
        context = ids[start:position]
        if everywhere and start:
            context[0] = begin
        with torch.no_grad():
            logits_V = model(torch.tensor([context])).logits[0, -1].double()
        nats.append(-logits_V.log_softmax(-1)[ids[position]].item())
    return nats


# --- perplexity -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("bos", "adds"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("seq_len", "stride", "batch_size"), [(16, 8, 3), (16, 16, 1), (20, 1, 8), (500, 250, 2)])
def test_every_token_is_predicted_once_from_its_window(bos, adds, seq_len, stride, batch_size):
    model = tiny.model(max_position_embeddings=512).double()
    tokenizer = byte_tokenizer(bos, adds)
    texts = [TEXT, "a text", "this"]  # shorter documents are padded beside longer ones
    found = perplexity(model, texts, tokenizer, seq_len=seq_len, stride=stride, batch_size=batch_size, progress=False)
    nats = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        nats += brute_force(model, ids, int(bos), adds, seq_len, stride)
    assert found.num_tokens == len(nats) == sum(len(text.encode()) for text in texts)
    assert found.num_bytes == found.num_tokens  # a token a byte
    assert found.nats == pytest.approx(math.fsum(nats), rel=1e-12)
    assert found.loss.value == pytest.approx(math.fsum(nats) / len(nats), rel=1e-12)
    assert found.perplexity.value == pytest.approx(math.exp(math.fsum(nats) / len(nats)), rel=1e-12)
    assert found.bits_per_byte.value == pytest.approx(found.loss.value / math.log(2), rel=1e-12)
    assert found.block_nats.sum().item() == pytest.approx(found.nats, rel=1e-12)


def test_bytes_are_those_of_the_text_whatever_the_tokens():
    tokenizer = byte_tokenizer(merges=[("t", "h"), ("th", "i"), ("thi", "s"), ("Ġ", "a")])
    found = perplexity(tiny.model(), [TEXT], tokenizer, seq_len=32, progress=False)
    assert found.num_bytes == len(TEXT.encode())
    assert found.num_tokens == len(tokenizer(TEXT).input_ids) < found.num_bytes
    assert found.bits_per_byte.value == pytest.approx(found.nats / math.log(2) / len(TEXT.encode()))


def test_a_tokenizer_without_a_token_to_begin_with():
    """The first token of a text cannot be predicted then, and its bytes do not count."""
    tokenizer = byte_tokenizer(merges=[("h", "Ã")])
    tokenizer.eos_token = None
    model = tiny.model().double()
    ids = tokenizer(TEXT).input_ids
    found = perplexity(model, [TEXT, "h"], tokenizer, seq_len=60, stride=30, progress=False)
    nats = brute_force(model, ids[1:], ids[0], False, 60, 30)
    assert found.nats == pytest.approx(math.fsum(nats), rel=1e-12)
    assert found.num_tokens == len(ids) - 1
    # The token holds the h and half of the é, of which the other half is predicted.
    assert found.num_bytes == len(TEXT.encode()) - 1
    assert found.num_documents == 1


def test_unknown_tokens_are_counted():
    vocabulary = {"<unk>": 0} | {f"w{i}": i for i in range(3, tiny.VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    found = perplexity(tiny.model(), ["w3 secret w4 thing"], tokenizer, seq_len=8, progress=False)
    assert found.unknown_tokens == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seq_len": 0}, "seq_len must be at least 1, got 0"),
        ({"seq_len": 8, "stride": 9}, r"stride must be at most seq_len \(8\)"),
        ({"seq_len": 65}, "seq_len must be at most 64, the number of positions of"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_bytes": 0}, "max_bytes must be at least 1, got 0"),
        ({"data": [""]}, "no token to predict"),
        ({"data": torch.zeros(2, 2)}, "data: a row must be a string"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        perplexity(tiny.model(), **({"data": [TEXT], "tokenizer": byte_tokenizer(), "progress": False} | arguments))


def test_outputs_that_are_no_numbers_are_refused():
    model = tiny.model()
    model.lm_head.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="are not finite"):
        perplexity(model, [TEXT], byte_tokenizer(), progress=False)


def test_a_loss_beyond_numbers_is_refused():
    model = tiny.model()
    model.lm_head.weight.data.mul_(1e6)
    with pytest.raises(ValueError, match=r"its loss on this data is .* nats per token"):
        perplexity(model, [TEXT], byte_tokenizer(), progress=False)


def test_max_bytes_cuts_between_characters():
    found = perplexity(tiny.model(), ["this", "hé"], byte_tokenizer(), max_bytes=6, progress=False)
    assert (found.num_bytes, found.num_documents) == (5, 2)


# --- standard errors --------------------------------------------------------------------------------------------------


def test_blocks_cover_the_text_and_begin_at_spaces():
    text = "some words of a text " * 1000
    cuts = block_cuts(text)
    assert cuts[0] == 0
    assert all(text[cut] == " " for cut in cuts[1:])
    sizes = [end - start for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]
    assert sum(sizes) == len(text)
    assert min(sizes) >= BLOCK_SIZE // 2
    assert max(sizes) < 2 * BLOCK_SIZE
    assert block_cuts("日" * 5000) == [0, BLOCK_SIZE]  # without spaces
    assert block_cuts("short") == block_cuts("") == [0]


def made_up(nats, tokens, sizes, tokenization="same"):
    nats, tokens, sizes = (torch.as_tensor(one, dtype=torch.float64) for one in (nats, tokens, sizes))
    totals = (nats.sum().item(), int(tokens.sum()), int(sizes.sum()))
    return Perplexity(*totals, 1, 0, "text", tokenization, nats, tokens, sizes)


def test_standard_errors_against_simulation():
    """They are the spread over many texts of the kind: of a loss, and of the paired difference of two models."""
    generator = torch.Generator().manual_seed(0)
    found = {"loss": [], "stderr": [], "difference": [], "difference_stderr": [], "ppl": [], "ppl_stderr": []}
    for _ in range(2000):
        tokens = torch.randint(300, 700, (40,), generator=generator).double()
        hard = torch.randn(40, generator=generator).double() * 0.4  # how hard a block is, for both models
        ours, theirs = (
            (mean + hard + 0.1 * torch.randn(40, generator=generator).double()) * tokens for mean in (3.1, 3.0)
        )
        one, other = made_up(ours, tokens, 4 * tokens), made_up(theirs, tokens, 4 * tokens)
        change = one.minus(other)
        assert change["loss"].value == pytest.approx(one.loss.value - other.loss.value)
        found["loss"].append(one.loss.value)
        found["stderr"].append(one.loss.stderr)
        found["difference"].append(change["loss"].value)
        found["difference_stderr"].append(change["loss"].stderr)
        found["ppl"].append(change["perplexity"].value)
        found["ppl_stderr"].append(change["perplexity"].stderr)
        assert change["bits_per_byte"].stderr == pytest.approx(change["loss"].stderr / 4 / math.log(2))
    spread = {name: torch.tensor(values).std().item() for name, values in found.items()}
    mean = {name: torch.tensor(values).mean().item() for name, values in found.items()}
    assert mean["stderr"] == pytest.approx(spread["loss"], rel=0.08)
    assert mean["difference_stderr"] == pytest.approx(spread["difference"], rel=0.08)
    assert mean["ppl_stderr"] == pytest.approx(spread["ppl"], rel=0.08)
    assert spread["difference"] < spread["loss"] / 2  # what pairs are for


def test_other_tokens_are_compared_by_the_byte_alone():
    one, other = made_up([3, 5], [4, 4], [8, 8]), made_up([2, 5], [2, 3], [8, 8], tokenization="other")
    change = one.minus(other)
    assert set(change) == {"bits_per_byte"}
    assert change["bits_per_byte"].value == pytest.approx(1 / 16 / math.log(2))
    # By hand: differences of a block to what the mean says are 1 - 0.5 and 0 - 0.5, over 16 bytes.
    assert change["bits_per_byte"].stderr == pytest.approx(math.sqrt(2 / 1 * 2 * 0.25) / 16 / math.log(2))
    with pytest.raises(ValueError, match="different texts"):
        one.minus(Perplexity(**{**vars(other), "text": "another"}))


def test_one_block_has_no_standard_error():
    one = made_up([3], [4], [8])
    assert one.loss == Estimate(0.75, None)
    assert one.minus(one)["loss"] == Estimate(0.0, None)


def test_blocks_of_two_tokenizers_are_the_same_places():
    """Nats fall into the block that a token starts in; with a uniform model each token has the same."""
    model = tiny.model(max_position_embeddings=512)
    model.lm_head.weight.data.zero_()
    text = (TEXT + " ") * 120
    few, many = byte_tokenizer(merges=[("Ġ", "a"), ("t", "h"), ("th", "i"), ("thi", "s")]), byte_tokenizer()
    one, other = (perplexity(model, [text], it, seq_len=256, stride=256, progress=False) for it in (few, many))
    assert torch.equal(one.block_bytes, other.block_bytes)
    ends = [*block_cuts(text)[1:], len(text)]
    sizes = [len(text[start:end].encode()) for start, end in zip(block_cuts(text), ends, strict=True)]
    assert one.block_bytes.tolist() == sizes
    torch.testing.assert_close(other.block_tokens, other.block_bytes)  # a token a byte
    torch.testing.assert_close(one.block_nats, one.block_tokens * math.log(tiny.VOCAB), rtol=1e-5, atol=0)
    assert one.minus(other)["bits_per_byte"].value < 0


# --- tasks and tables -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A plain model, a scaled one of the same weights, a text and two tasks with their data."""
    folder = tmp_path_factory.mktemp("evaluation")
    tiny.model(initializer_range=0.2).save_pretrained(folder / "plain")
    tiny.model(initializer_range=0.2, ln_scaling=LNScalingConfig()).save_pretrained(folder / "scaled")
    for name in ("plain", "scaled"):
        byte_tokenizer().save_pretrained(folder / name)
    (folder / "text.txt").write_text((TEXT + " ") * 30)
    words, picks = [" text", " world", " end", " this", " is", " and"], random.Random(0)
    rows = [
        {"question": "this" + picks.choice(words), "choices": picks.sample(words, 3), "gold": picks.randrange(3)}
        for _ in range(30)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choices = shared | {
        "task": "local_choice",
        "output_type": "multiple_choice",
        "doc_to_target": "{{gold}}",
        "doc_to_choice": "{{choices}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    likelihood = shared | {
        "task": "local_likelihood",
        "output_type": "loglikelihood",
        "doc_to_target": "{{choices[gold]}}",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
    }
    (folder / "choice.yaml").write_text(yaml.safe_dump(choices))
    (folder / "more").mkdir()
    (folder / "more" / "likelihood.yaml").write_text(yaml.safe_dump(likelihood))
    return folder


@pytest.fixture(scope="module")
def found(folder, tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield evaluate(
        [folder / "plain", folder / "scaled"],
        folder / "text.txt",
        tasks=[str(folder / "choice.yaml"), "local_likelihood"],
        include_path=folder / "more",
        prompt_tokens=8,
        new_tokens=2,
        repeats=2,
        progress=False,
    )
    patch.undo()


def answers(model, tokenizer, row):
    """Log-likelihoods of the choices of a question, one by one."""
    values = []
    for choice in row["choices"]:
        question = tokenizer(row["question"]).input_ids
        ids = tokenizer(row["question"] + choice).input_ids
        with torch.no_grad():
            logits_TV = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        values.append(sum(logits_TV[i - 1, ids[i]].item() for i in range(len(question), len(ids))))
    return values


@pytest.mark.slow
def test_tasks_against_the_models_themselves(folder, found):
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    right: dict[str, list[float]] = {}
    for one in found.models:
        model, tokenizer = tf.AutoModelForCausalLM.from_pretrained(one.name), byte_tokenizer()
        values = [answers(model, tokenizer, row) for row in rows]
        right[one.label] = [
            float(max(range(3), key=value.__getitem__) == row["gold"]) for value, row in zip(values, rows, strict=True)
        ]
        acc = one.tasks["local_choice acc"]
        assert acc.value == pytest.approx(sum(right[one.label]) / len(rows))
        deviation = torch.tensor(right[one.label], dtype=torch.float64).std().item()
        assert acc.stderr == pytest.approx(deviation / math.sqrt(len(rows)), rel=1e-6)
        assert list(acc.samples.values()) == right[one.label]
        gold = [value[row["gold"]] for value, row in zip(values, rows, strict=True)]
        assert one.tasks["local_likelihood perplexity"].value == pytest.approx(
            math.exp(-math.fsum(gold) / len(gold)), rel=1e-4
        )
    difference, paired = found.models[1].tasks["local_choice acc"].minus(found.models[0].tasks["local_choice acc"])
    pairs = torch.tensor(right["scaled"], dtype=torch.float64) - torch.tensor(right["plain"], dtype=torch.float64)
    assert pairs.any()
    assert paired
    assert difference.value == pytest.approx(pairs.mean().item())
    assert difference.stderr == pytest.approx(pairs.std().item() / math.sqrt(len(rows)))


@pytest.mark.slow
def test_the_scaled_checkpoint_is_measured_scaled(folder, found):
    scaled = tf.AutoModelForCausalLM.from_pretrained(folder / "scaled")
    expected = perplexity(scaled, folder / "text.txt", byte_tokenizer(), seq_len=64, progress=False)
    assert found.models[1].perplexity.nats == pytest.approx(expected.nats, rel=1e-6)
    assert abs(found.models[1].perplexity.loss.value - found.models[0].perplexity.loss.value) > 0.01


@pytest.mark.slow
def test_figures(folder, found):
    one = found.models[0]
    assert one.parameters == one.speed.parameters == sum(p.numel() for p in tiny.model().parameters())
    assert one.size_on_disk == (folder / "plain" / "model.safetensors").stat().st_size
    assert one.num_layers == 4
    for timing in (one.speed.prefill_tokens_per_second, one.speed.decode_tokens_per_second):
        assert 0 < timing.lowest <= timing.median <= timing.highest
    # The time to the first token is that of the prompt.
    assert one.speed.first_token_seconds.highest == pytest.approx(8 / one.speed.prefill_tokens_per_second.lowest)
    assert one.speed.peak_bytes >= one.speed.load_peak_bytes > 10**8


@pytest.mark.slow
def test_json_and_markdown(found, tmp_path):
    content = json.loads(found.save(tmp_path / "new" / "found.json").read_text())
    assert content["reference"].endswith("plain")
    first, second = content["models"]
    assert "differences" not in first
    assert set(second["differences"]) == {"perplexity", "loss", "bits_per_byte", "tasks"}
    assert second["differences"]["loss"]["value"] == pytest.approx(
        second["text"]["loss"]["value"] - first["text"]["loss"]["value"]
    )
    assert second["differences"]["tasks"]["local_choice acc"]["paired"]
    assert not second["differences"]["tasks"]["local_likelihood perplexity"]["paired"]
    assert content["settings"]["data"] == {"source": "text.txt", "seq_len": 64, "stride": 32}
    lines = found.save(tmp_path / "found.md").read_text().splitlines()
    assert lines[0] == "|  | plain | scaled |"
    rows = {line.split("|")[1].strip(): line for line in lines[2:] if line.startswith("|")}
    for name in ("parameters", "perplexity", "bits per byte", "prefill, tokens/s", "first token, ms", "peak memory"):
        assert name in rows
    assert "±" in rows["perplexity"]
    assert "(not paired)" in rows["local_likelihood perplexity"]
    assert "(not paired)" not in rows["local_choice acc"]
    assert f"{found.models[0].perplexity.num_bytes:,} bytes of text.txt" in lines[-1]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["found.md", "new"]


@pytest.mark.slow
def test_models_of_other_types_and_equal_names(folder, tmp_path):
    """What the weights are is told of each; names are as long as it takes, and where they lie is not told."""
    for name, dtype in (("one", torch.float32), ("other", torch.bfloat16)):
        shutil.copytree(folder / "plain", tmp_path / name / "model")
        tf.AutoModelForCausalLM.from_pretrained(folder / "plain", dtype=dtype).save_pretrained(
            tmp_path / name / "model"
        )
    names = [tmp_path / "one" / "model", tmp_path / "other" / "model"]
    found = evaluate(names, folder / "text.txt", prompt_tokens=4, new_tokens=1, repeats=1, progress=False)
    lines = found.markdown().splitlines()
    assert lines[0] == "|  | one/model | other/model |"
    assert any(line.split("|")[1:4] == [" weights ", " float32 ", " bfloat16 "] for line in lines)
    assert "float32" not in lines[-1]
    assert str(tmp_path) not in found.save(tmp_path / "found.json").read_text()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_packed_weights_are_counted_as_what_they_are(folder, tmp_path):
    model = tiny.model(hidden_size=128, intermediate_size=256, head_dim=32, num_key_value_heads=4)
    model.save_pretrained(tmp_path / "plain")
    quantized = tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    packed = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=quantized)
    packed.save_pretrained(tmp_path / "packed")
    for name in ("plain", "packed"):
        byte_tokenizer().save_pretrained(tmp_path / name)
    found = evaluate(
        [tmp_path / "plain", tmp_path / "packed"], prompt_tokens=4, new_tokens=1, repeats=1, progress=False
    ).models
    assert {one.parameters for one in found} == {one.speed.parameters for one in found} == {model.num_parameters()}
    assert [one.dtype for one in found] == ["float32", "float32, bitsandbytes"]


@pytest.mark.slow
def test_what_is_wrong_is_found_before_anything_is_measured(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_lnscale.evaluation.comparison.measure", None)  # would fail if it were called
    monkeypatch.setattr("hf_lnscale.evaluation.comparison.Placement.load", None)
    plain = str(folder / "plain")
    with pytest.raises(ValueError, match=r"'hellaswa' is neither a task .* nor a task file; did you mean .*hellaswag"):
        evaluate(plain, tasks=["hellaswa"])
    with pytest.raises(FileNotFoundError, match="include_path: there is no folder"):
        evaluate(plain, tasks=["local_choice"], include_path=tmp_path / "none")
    local = (folder / "choice.yaml").read_text()
    (tmp_path / "gone.yaml").write_text(re.sub(r"[^ ]*\.jsonl?", str(tmp_path / "gone.jsonl"), local))
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl"):
        evaluate(plain, tasks=[str(tmp_path / "gone.yaml")])
    with pytest.raises(ValueError, match="nothing to measure"):
        evaluate(plain, speed=False)
    with pytest.raises(ValueError, match="give at least one"):
        evaluate([])
    with pytest.raises(FileNotFoundError, match="data: there is no file"):
        evaluate(plain, "none.txt")
    with pytest.raises(ValueError, match=r"dtype must be auto, .* or another floating-point type of torch, got 'bf17'"):
        load(plain, dtype="bf17")
    with pytest.raises(ValueError, match="seq_len must be at most 64"):
        evaluate(plain, folder / "text.txt", seq_len=100)
    with pytest.raises(OSError, match="'no-such/model'"):
        evaluate([plain, "no-such/model"], folder / "text.txt")
    tiny.model().save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="bare' has no tokenizer"):
        evaluate([plain, tmp_path / "bare"], folder / "text.txt")
    with pytest.raises(ValueError, match="bare' has no tokenizer"):
        evaluate([plain, tmp_path / "bare"], tasks=[str(folder / "choice.yaml")])


def test_scores_that_are_all_the_same_are_not_certain():
    """As if one of two more were another; any others by the formula."""
    assert error_of_mean([0.0] * 200) == error_of_mean([1.0] * 200) == pytest.approx((201 / 202**2 / 200) ** 0.5)
    assert error_of_mean([1.0, 0.0, 0.0]) == pytest.approx((2 / 9 / 2) ** 0.5)
    assert error_of_mean([1.0]) is None


def test_a_mean_of_other_things_is_not_paired():
    def result(value, samples):
        return TaskResult("t", "m", "none", value, 0.3, 2, True, 1, 0, samples)

    assert result(1.0, None).minus(result(0.5, {0: 0.5})) == (Estimate(0.5, math.hypot(0.3, 0.3)), False)
    assert result(1.0, {0: 1.0}).minus(result(0.5, {1: 0.5}))[1] is False
    assert result(1.0, {0: 1.0}).minus(result(0.5, {0: 0.5})) == (Estimate(0.5, None), True)


# --- what a model may be ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_a_model_may_be(folder, tmp_path):
    assert locate("some/name") == ("some/name", {})
    assert locate(folder / "plain") == (str(folder / "plain"), {})
    file = tmp_path / "one.gguf"
    file.touch()
    assert locate(file) == locate(tmp_path) == (str(tmp_path), {"gguf_file": "one.gguf"})
    (tmp_path / "two.gguf").touch()
    with pytest.raises(ValueError, match=r"contains 2 GGUF files: one\.gguf, two\.gguf; name one of them"):
        locate(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert locate(tmp_path) == (str(tmp_path), {})
    with pytest.raises(FileNotFoundError, match=r"neither a folder, nor a \.gguf file, nor"):
        locate(tmp_path / "none")
    assert Path(locate(folder)[0]) == folder
