"""Small tasks without a download, and agreement with the first model."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import recipe
from hf_lnscale.evaluation import abilities
from hf_lnscale.evaluation.comparison import evaluate
from hf_lnscale.measuring.text import Windows
from hf_lnscale.pruning.plan import PLAN_FILE, PruningPlan
from hf_lnscale.pruning.prune import prune


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models with one tokenizer."""
    folder = tmp_path_factory.mktemp("abilities")
    for name in "first", "second":
        recipe.save_model(folder / name, attention_dropout=0.0, initializer_range=0.4, max_position_embeddings=1024)
    model, _ = load(folder / "second")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    model.save_pretrained(folder / "second")
    return folder


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_an_exact_answer_is_what_greedy_decoding_gives(folder, monkeypatch):
    """Questions whose answers the model gives, or gives but for the last token."""
    model, tokenizer = load(folder / "first")
    questions = []
    for number in range(6):
        prompt = tokenizer(f"{number} words that come first", return_tensors="pt")
        ids_BT = prompt["input_ids"]
        made = model.generate(**prompt, do_sample=False, max_new_tokens=4, min_new_tokens=4)[0, ids_BT.shape[1] :]
        if number % 2:
            made[-1] = (made[-1] + 1) % 90 + 3
        questions.append((ids_BT[0].tolist(), made.tolist()))
    asked = iter(questions)
    monkeypatch.setattr(abilities, "additions", lambda: [abilities.Question("", "")] * 6)
    monkeypatch.setattr(abilities, "copies", list)
    monkeypatch.setattr(abilities, "mmlu", list)
    monkeypatch.setattr(abilities, "_encode", lambda *_: (lambda one: (one[0] + one[1], len(one[0])))(next(asked)))
    (found,) = abilities.ability_results(model, tokenizer, batch_size=4)
    assert list(found.samples.values()) == [1, 0, 1, 0, 1, 0]
    assert (found.value, found.stderr) == (0.5, pytest.approx(math.sqrt(0.3 / 6)))


@pytest.mark.slow
def test_copying_is_the_share_of_tokens_and_mmlu_the_likeliest_letter(folder):
    model, tokenizer = load(folder / "first")
    found = {one.task.split(",")[0]: one for one in abilities.ability_results(model, tokenizer, batch_size=8)}
    copying, mmlu = abilities.copies()[7], abilities.mmlu()
    with torch.no_grad():
        ids = tokenizer(copying.prompt + copying.answer, return_tensors="pt")["input_ids"]
        start = len(tokenizer(copying.prompt)["input_ids"])
        right = model(ids).logits[0, start - 1 : -1].argmax(-1) == ids[0, start:]
        assert found["copying"].samples[7] == pytest.approx(right.double().mean().item())
        for number in (0, 33):
            ids = tokenizer(mmlu[number].prompt, return_tensors="pt")["input_ids"]
            logits = model(ids).logits[0, -1]
            letters = {letter: logits[tokenizer(letter)["input_ids"][0]].item() for letter in "ABCD"}
            right = max(letters, key=letters.get) == mmlu[number].answer
            assert found["MMLU"].samples[number] == right
    assert found["addition"].num_samples == 200


def test_what_is_asked():
    sums = [one.prompt.splitlines()[-1] for one in abilities.additions()]
    assert all(
        eval(asked.removesuffix(" =")) == int(one.answer)
        for asked, one in zip(sums, abilities.additions(), strict=True)
    )
    assert len(set(sums)) > 190
    for one in abilities.copies():
        assert one.prompt.endswith(f"\n\n{one.answer}\n")
        assert one.answer not in one.prompt.split("\n\n")[0]
    pytest.importorskip("lm_eval")
    questions = abilities.mmlu()
    assert len(questions) > 270
    for one in questions:
        assert one.prompt.startswith("Q: ")
        assert one.prompt.endswith("\nA: The answer is (")
        assert "Let's think" not in one.prompt


def test_agreement_on_the_first_models_own_text(folder):
    first, tokenizer = load(folder / "first")
    second, _ = load(folder / "second")
    written = abilities.Continuations(first, tokenizer, num_tokens=64, seq_len=16)
    same, divergence = written.agreement(first, tokenizer)
    assert same.value == 1
    assert abs(divergence.value) < 1e-3  # kept in float16
    same, divergence = written.agreement(second, tokenizer)
    ids = torch.cat(written.texts)
    assert ids.shape == (4, 16)
    with torch.no_grad():
        p, q = (model.double()(ids).logits[:, :-1].log_softmax(-1) for model in (first, second))
    assert same.value == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    each = (p.exp() * (p - q)).sum(-1).mean(-1)
    assert divergence.value == pytest.approx(each.mean().item(), rel=5e-3)
    assert divergence.stderr == pytest.approx(each.std().item() / 2, rel=2e-2)
    assert not divergence.higher_is_better


def test_another_tokenizer_has_no_agreement(folder, tmp_path):
    first, tokenizer = load(folder / "first")
    written = abilities.Continuations(first, tokenizer, num_tokens=32, seq_len=16)
    tokenizer.add_tokens(["another"])
    assert written.agreement(first, tokenizer) == []


def test_a_tokenizer_that_begins_no_text_is_refused_before_a_model_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_lnscale.evaluation.comparison.Placement.load", None)
    model, tokenizer = load(folder / "first")
    tokenizer.bos_token = tokenizer.eos_token = None
    for one in (model, tokenizer):
        one.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither a bos_token nor an eos_token"):
        evaluate([tmp_path, folder / "second"], abilities=True, speed=False)


@pytest.mark.slow
def test_evaluate_compares_them(folder):
    found = evaluate([folder / "first", folder / "second"], abilities=True, speed=False, progress=False)
    table = found.markdown()
    for row in ("addition exact", "copying tokens", "agreement on its own text top-1", "agreement on its own text KL"):
        assert row in table
    assert "the KL divergence from it" in table
    first, second = found.to_dict()["models"]
    assert "agreement on its own text KL" not in first["tasks"]
    assert second["differences"]["tasks"]["copying tokens"]["paired"]


@pytest.mark.slow
def test_prune_says_what_evaluate_says(folder, tmp_path):
    """Of the whole model before the cut, and of the one that it writes; evaluate reads both from disk."""
    model, tokenizer = load(folder / "first")
    text = [row["text"] for row in recipe.text_rows(20)]
    options = {"drop": [1], "windows": Windows(num_tokens=1024, seq_len=64), "progress": False}
    pruned = prune(model, text, tokenizer=tokenizer, abilities=True, out=tmp_path / "cut", **options)
    whole, cut = evaluate([folder / "first", tmp_path / "cut"], abilities=True, speed=False, progress=False).models
    found = PruningPlan.load(tmp_path / "cut" / PLAN_FILE).notes["abilities"]
    assert found.keys() == cut.tasks.keys()
    for name, after in cut.tasks.items():
        assert found[name]["after"] == pytest.approx([after.value, after.stderr])
        if before := whole.tasks.get(name):
            change, _ = after.minus(before)
            assert found[name]["before"] == pytest.approx([before.value, before.stderr])
            assert found[name]["change"] == pytest.approx([change.value, change.stderr])
        else:
            assert found[name]["before"] == found[name]["change"] == [None, None]
    assert found["copying tokens"]["change"][0] != 0
    assert found["agreement on its own text top-1"]["after"][0] < 1
    card = (tmp_path / "cut/README.md").read_text()
    for said in ("copying tokens", "agreement on its own text KL", "Agreement with the whole model"):
        assert said in card
    assert [row[0] for row in pruned.rows[-len(found) :]] == list(found)


def test_prune_refuses_a_tokenizer_that_begins_no_text_before_it_searches(folder):
    model, tokenizer = load(folder / "first")
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a bos_token nor an eos_token"):
        prune(model, ["some text"], tokenizer=tokenizer, abilities=True, num_layers=1)
    model.name_or_path = model.config.name_or_path = ""
    with pytest.raises(ValueError, match="required for abilities"):
        prune(model, ["some text"], abilities=True, num_layers=1)
