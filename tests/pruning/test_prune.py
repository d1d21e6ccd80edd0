"""`prune`: in memory and on disk, in Python and on the command line."""

import copy
import gc
import json
import math
import re
import subprocess
import sys
import warnings
import weakref

import numpy as np
import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM

import hf_lnscale
import tiny
from hf_lnscale import PruningPlan, diagnose, drop_layers, plan_pruning, prune
from hf_lnscale.core.display import with_error
from hf_lnscale.evaluation import evaluate
from hf_lnscale.measuring.text import Windows, token_batches
from hf_lnscale.pruning import heal_fit, search
from hf_lnscale.pruning import prune as prune_module

L = 6


def model(family="llama", **changes):
    return tiny.model(family, num_hidden_layers=L, **changes)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model(ln_scaling=True).save_pretrained(folder)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, tiny.VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(f"w{token}" for token in tiny.tokens(1, 800)[0].tolist()))
    return file


def run(*arguments, expect=0):
    command = [sys.executable, "-m", "hf_lnscale", "prune", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == expect, done.stderr
    return done.stdout + done.stderr


def test_why_a_cut_is_not_healed():
    """Two layers share a weight, which cannot be changed for one of them."""
    model, ids = tiny.model(), tiny.tokens(8, 16)
    model.model.layers[1].mlp.down_proj.weight = model.model.layers[2].mlp.down_proj.weight
    with pytest.warns(UserWarning, match="the cut is not healed: .*down_proj"):
        found = prune(model, ids, num_layers=1, held_out=ids, progress=False)
    assert any(one.startswith("the cut is not healed: ") for one in found.plan.notes["cautions"])
    assert found.plan.heal is None


@pytest.mark.slow
def test_prune(checkpoint, text, tmp_path):
    """Layers by count, healed: what is written is plain but for its own depths, and does what its plan says."""
    printed = run(
        checkpoint, "--data", text, "--layers", 2, "--heal", "linear", "--seq-len", 16, "--out", tmp_path / "out"
    )
    assert "LayerNorm Scaling is active" in printed
    for word in ("layers", "parameters", "checkpoint", "perplexity", "prefill", "decode", "peak memory"):
        assert word in printed
    # Measured once.
    assert not re.search(r"peak memory.*%", printed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]  # no record of the search, no temporary folder
    found = PruningPlan.load(tmp_path / "out")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert pruned.config.dropped_layers["layers"] == list(found.layers)
    assert pruned.config.ln_scaling["depths"] == [i + 1 for i in range(L) if i not in found.layers]
    tokenizer = tf.AutoTokenizer.from_pretrained(tmp_path / "out")
    _, held_out = token_batches(text, tokenizer=tokenizer, windows=Windows(seq_len=16)).split(0.25)
    with torch.no_grad():
        losses = [pruned(batch.input_ids, labels=batch.input_ids).loss for batch in held_out]
    sizes = torch.tensor([batch.input_ids[:, 1:].numel() for batch in held_out])
    perplexity = math.exp((torch.stack(losses) * sizes).sum() / sizes.sum())
    assert perplexity == pytest.approx(found.perplexity.get("healed", found.perplexity["after"]), rel=1e-4)
    card = (tmp_path / "out/README.md").read_text()
    assert f"without_layers {found.layers}" not in card
    assert "2 of 6 layers dropped" in card
    assert "hf-lnscale prune" in card
    assert "| perplexity, held out |" in card
    assert not tiny.uploaded_that_say(tmp_path.parent, tmp_path / "out")
    # The plan names the same layers to whoever loads the whole checkpoint with it.
    again = AutoModelForCausalLM.from_pretrained(checkpoint, drop_layers=tmp_path / "out")
    assert again.config.dropped_layers["layers"] == pruned.config.dropped_layers["layers"]


@pytest.mark.slow
def test_the_method_that_heals_writes_what_it_says(checkpoint, text, tmp_path):
    given = ("--method", "greedy_healed", "--layers", 1, "--seq-len", 16, "--out", tmp_path / "out")
    run(checkpoint, "--data", text, *given)
    assert PruningPlan.load(tmp_path / "out").heal["method"] == "refit"
    assert "use another method" in run(checkpoint, "--data", text, *given, "--heal", "none", "--force", expect=1)


@pytest.mark.slow
@pytest.mark.parametrize("content", ["", '{"key": {"method": {"search": "greedy"}}, "steps": []}'])
def test_an_interrupted_prune_is_not_in_the_way(content, checkpoint, text, tmp_path):
    record = tmp_path / ".out.search.json"
    record.write_text(content)
    run(checkpoint, "--data", text, "--layers", 1, "--seq-len", 16, "--out", tmp_path / "out")
    assert not record.exists()


@pytest.mark.slow
def test_prune_given_layers(checkpoint, text, tmp_path):
    given = ("--data", text, "--drop", "1,-2", "--heal", "none", "--seq-len", 16, "--out", tmp_path / "out", "--json")
    command = [sys.executable, "-m", "hf_lnscale", "prune", *map(str, (checkpoint, *given))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)  # and nothing else is printed there
    assert found["layers"] == [1, 4]
    costs = found["notes"]["cost"]
    assert costs["after"]["size_on_disk"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert costs["after"]["parameters"] < costs["before"]["parameters"]
    assert PruningPlan.load(tmp_path / "out").notes["cost"] == costs
    expected = drop_layers(AutoModelForCausalLM.from_pretrained(checkpoint), [1, 4])
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(got(tiny.tokens()).logits, expected(tiny.tokens()).logits)


@pytest.mark.slow
def test_prune_heals_where_it_can(checkpoint, text, tmp_path, monkeypatch):
    run(checkpoint, "--data", text, "--drop", 2, "--seq-len", 16, "--out", tmp_path / "llama")
    assert PruningPlan.load(tmp_path / "llama").heal["method"] == "refit"
    monkeypatch.setattr(heal_fit, "OUTPUT_WEIGHTS", ("mlp.other",))
    in_process(checkpoint, text, tmp_path / "out", drop=[2])
    assert PruningPlan.load(tmp_path / "out").heal is None
    with pytest.raises(ValueError, match="healing is not possible"):
        in_process(checkpoint, text, tmp_path / "other", drop=[2], heal="linear")


@pytest.mark.slow
@pytest.mark.parametrize("heal", [None, "linear"])
def test_speed_is_measured_without_the_model_in_memory(heal, checkpoint, text, tmp_path, monkeypatch):
    weights, drop = [], prune_module._drop

    def dropped(full, plan, report):
        weights.extend(map(weakref.ref, full.parameters()))
        drop(full, plan, report)

    def measured(*_):
        gc.collect()
        raise KeyError(sum(weight() is not None for weight in weights))

    monkeypatch.setattr(prune_module, "_drop", dropped)
    monkeypatch.setattr(prune_module, "_with_cost", measured)
    with pytest.raises(KeyError, match=r"^0$"):
        in_process(checkpoint, text, tmp_path / "out", num_layers=1, heal=heal)
    assert weights


def in_process(checkpoint, text, out, **options):
    return prune_module.prune(
        str(checkpoint), str(text), out=out, progress=False, **{"windows": Windows(seq_len=16), **options}
    )


@pytest.mark.slow
def test_prune_tells_what_text_can_expect_that_was_never_fitted(checkpoint, text, tmp_path):
    run(checkpoint, "--data", text, "--drop", 2, "--seq-len", 16, "--tokens", 3200, "--out", tmp_path / "a")
    heal = PruningPlan.load(tmp_path / "a").heal
    assert [source["weight"] for source in heal["sources"].values()] == [1, 0.25, 0.25]
    assert list(heal["sources"])[1:] == ["english", "python"]
    assert max(one["change"] for one in heal["sources"].values()) <= 0
    expected = math.prod(source["perplexity_left_out"] for source in heal["sources"].values()) ** (1 / 3)
    assert heal["never_fitted"]["after"] == pytest.approx(expected)
    card = (tmp_path / "a/README.md").read_text()
    line = next(line for line in card.splitlines() if "never fitted, healed" in line)
    relative = [one["errors"]["after"] / one["perplexity_after"] for one in heal["sources"].values()]
    error = expected * math.hypot(*relative) / 3  # of the mean of three logarithms
    assert heal["never_fitted"]["after_error"] == pytest.approx(error)
    assert with_error(expected, error) in line
    assert "%" not in line  # an estimate
    never = [
        with_error(*(heal["never_fitted"][one] for one in (which, f"{which}_error"))) for which in ("full", "after")
    ]
    assert f"never fitted: before {never[0]}, healed {never[1]}" in str(PruningPlan.load(tmp_path / "a"))

    run(checkpoint, "--drop", 2, "--seq-len", 16, "--tokens", 3200, "--out", tmp_path / "b")  # English and Python
    heal = PruningPlan.load(tmp_path / "b").heal
    assert {name: source["weight"] for name, source in heal["sources"].items()} == {"english": 1, "python": 1}
    expected = math.sqrt(math.prod(source["perplexity_left_out"] for source in heal["sources"].values()))
    assert heal["never_fitted"]["after"] == pytest.approx(expected)


@pytest.mark.slow
def test_the_text_that_a_model_was_chosen_on_is_known_to_it(checkpoint, text, tmp_path):
    """By every way to a pruned model; and told by every measurement on that text, and on no other."""
    given = {"num_layers": 2, "heal": None, "method": "block_influence", "windows": Windows(seq_len=32)}
    found = in_process(checkpoint, text, tmp_path / "out", **given)
    note = json.loads((tmp_path / "out/config.json").read_text())["calibration_text"]
    assert note["source"] == "text.txt"
    assert note["passages"] == found.plan.data["calibration"]["passages"]
    for made in (
        AutoModelForCausalLM.from_pretrained(checkpoint, drop_layers=tmp_path / "out"),
        drop_layers(AutoModelForCausalLM.from_pretrained(checkpoint), found.plan),
    ):
        assert made.config.calibration_text == note
    by_hand = drop_layers(AutoModelForCausalLM.from_pretrained(checkpoint), found.plan.layers)
    assert not hasattr(by_hand.config, "calibration_text")
    other = tmp_path / "other.txt"
    other.write_text(" ".join(f"w{token}" for token in tiny.tokens(1, 800, seed=7)[0].tolist()))
    half = tmp_path / "half.txt"  # of it, and from another place on
    half.write_text(" ".join(text.read_text().split()[205:500]))
    told = "used to choose or heal the model's layers (text.txt), so its results are better here than on other text"
    whole, pruned = str(checkpoint), str(tmp_path / "out")
    for file, known in ((text, True), (half, True), (other, False)):
        compared = evaluate([whole, pruned], file, speed=False, progress=False)
        assert (f"out: About {compared.models[1].perplexity.caution[6:]}" in compared.notes) == known
        assert (told in compared.notes) == known
        assert not compared.models[0].perplexity.caution
        tokenizer = tf.AutoTokenizer.from_pretrained(pruned)
        seen = diagnose(found.model, str(file), tokenizer=tokenizer, jacobian=False, progress=False)
        assert any(told in one for one in seen.verdict["cautions"]) == known
        assert (told in " ".join(str(seen).split())) == known
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            again = in_process(pruned, other, tmp_path / f"again {file.name}", **given | {"held_out": str(file)})
        mine = [str(one.message) for one in caught if "held-out data: " in str(one.message)]
        assert any(told in one for one in mine) == known
        assert any("is also calibration data" in one for one in mine) == (file == other)
        # Both texts are known to what is cut twice.
        assert again.model.config.calibration_text["source"] == "text.txt, other.txt"


def test_the_text_that_a_model_was_healed_on_is_known_to_it():
    full = tiny.speaker(num_hidden_layers=L)
    said = tiny.said_by(full, length=32)
    report = hf_lnscale.heal(full, [2, 3], said, progress=False)
    assert report.kept
    assert full.config.calibration_text["source"] == "token ids"
    with pytest.warns(UserWarning, match=r"held-out data: About .* used to choose or heal .* layers \(token ids\)"):
        hf_lnscale.heal(copy.deepcopy(full), [1], tiny.tokens(8, 32), held_out=said[:8], progress=False)
    report.undo()
    assert not hasattr(full.config, "calibration_text")


@pytest.mark.slow
def test_perplexities_have_standard_errors(checkpoint, text, tmp_path):
    """Against the spread between the sequences of the held-out text, computed from the two models' own losses."""
    found = in_process(checkpoint, text, tmp_path / "out", drop=[1, 4], heal=None)
    tokenizer = tf.AutoTokenizer.from_pretrained(checkpoint)
    _, held_out = token_batches(text, tokenizer=tokenizer, windows=Windows(seq_len=16)).split(0.25)
    ids = torch.cat([batch.input_ids for batch in held_out])
    loss = []
    for path in (checkpoint, tmp_path / "out"):
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(path)(ids).logits[:, :-1].double()
        loss.append(-logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].mean(1))
    before, after = loss
    root = len(ids) ** 0.5
    assert found.plan.errors == pytest.approx(
        {
            "before": before.mean().exp().item() * before.std().item() / root,
            "after": after.mean().exp().item() * after.std().item() / root,
            "after_change": (after.mean() - before.mean()).exp().item() * (after - before).std().item() / root,
        },
        rel=1e-3,
    )
    (row,) = [row for row in found.rows if row[0] == "perplexity, held out"]
    for cell, name in zip(row[1:3], ("before", "after"), strict=True):
        assert float(cell.partition(" ± ")[2]) == pytest.approx(found.plan.errors[name], rel=0.05)
    assert row[3].endswith(f" ± {found.plan.errors['after_change']:.1%}")
    card = (tmp_path / "out/README.md").read_text()
    assert " | ".join(row) in card
    assert f"± its standard error over {len(ids)} sequences" in card
    assert f"{ids.numel()} tokens in {len(ids)} sequences are too few for a verdict" in card
    assert "median of 5 runs (lowest to highest) in turn" in card


def test_a_table_of_80_columns(monkeypatch):
    """Of the widest figures that there are."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    speed = "12,345.6 (11,234.5 to 13,456.7)"
    plan = PruningPlan((1, 2), {}, model_name="model")
    shown = str(hf_lnscale.Pruned(plan, None, [("prefill, tokens/s", speed, speed, "+10.1% ± 0.2%")]))
    assert max(map(len, shown.splitlines())) <= 80
    for word in ("prefill, tokens/s", "12,345.6", "(11,234.5", "13,456.7)", "+10.1%", "0.2%"):
        assert word in shown


@pytest.mark.slow
def test_text_that_ends_early_is_told(checkpoint, text):
    tokenizer = tf.AutoTokenizer.from_pretrained(checkpoint)
    given = {"drop": [1], "heal": None, "progress": False}
    ends = "data: The text has only 800 of the 816 tokens requested."
    for number, told in {800: False, 815: False, 816: True}.items():
        found = hf_lnscale.prune(model(), str(text), tokenizer=tokenizer, windows=Windows(number, 16), **given)
        assert (ends in found.plan.notes["cautions"]) == told
    few = ["96 tokens in 3 sequences are too few", "32 tokens in 1 sequence are too few"]
    cautions = hf_lnscale.prune(model(), tiny.tokens(4, 32), **given).plan.notes["cautions"]
    assert [one.partition(" data: ")[2].partition(" for a verdict")[0] for one in cautions] == few


def test_prune_that_finds_no_layer_writes_nothing(checkpoint, tmp_path):
    """On what the model says itself, every layer matters."""
    sharp = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        sharp.lm_head.weight.mul_(50)
    sharp.save_pretrained(tmp_path / "sharp")
    tf.AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "sharp")
    said = sharp.generate(tiny.tokens(20, 1), min_new_tokens=31, max_new_tokens=31, suppress_tokens=[0, 1, 2])
    (tmp_path / "text.txt").write_text(" ".join(f"w{token}" for token in said.flatten().tolist()))
    budget = {
        "max_perplexity_increase": 1e-9,
        "method": "block_influence",
        "heal": None,
        "windows": Windows(seq_len=32),
    }
    with pytest.raises(ValueError, match="no layer can be dropped: even the cheapest raises perplexity from"):
        in_process(tmp_path / "sharp", tmp_path / "text.txt", tmp_path / "out", **budget)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sharp", "text.txt"]


@pytest.mark.parametrize("goal", [{"target_params": 10**6}, {"target_memory": 10**7}, {"drop": []}])
def test_a_target_that_the_model_meets_already_is_refused(goal):
    with pytest.raises(ValueError, match=rf"{next(iter(goal))} .* is already met by the unchanged model"):
        hf_lnscale.prune(model(), tiny.tokens(8, 16), progress=False, **goal)


@pytest.mark.slow
@pytest.mark.parametrize("goal", [{"num_layers": 2}, {"max_perplexity_increase": 0.5}])
def test_no_set_is_healed_twice_in_the_same_way(goal, monkeypatch):
    """Proposals are healed quickly, and in full the set that won, in place."""
    healings = []
    heal = search.Healer.heal

    def counted(healer, layers, *args, quick=False, **options):
        healings.append((tuple(layers), quick))
        return heal(healer, layers, *args, quick=quick, **options)

    monkeypatch.setattr(search.Healer, "heal", counted)
    full = tiny.speaker(num_hidden_layers=L)
    said = tiny.said_by(full)  # the model's own text, on which healing helps
    by_hand = copy.deepcopy(full)
    found = hf_lnscale.prune(full, said, progress=False, **goal)
    assert len(healings) == len(set(healings)) >= 4
    assert "healed" in found.plan.perplexity
    assert (found.plan.layers, False) in healings
    report = hf_lnscale.heal(by_hand, found.plan.layers, token_batches(said).split(0.25)[0], progress=False)
    assert report.to_dict() == found.plan.heal
    drop_layers(by_hand, found.plan.layers)
    for name, weight in by_hand.state_dict().items():
        assert torch.equal(full.state_dict()[name], weight)


@pytest.mark.slow
def test_prune_writes_what_plan_pruning_plans(checkpoint, text, tmp_path):
    found = in_process(checkpoint, text, tmp_path / "out", num_layers=2, heal="linear")
    whole = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = tf.AutoTokenizer.from_pretrained(checkpoint)
    expected = plan_pruning(
        whole, str(text), num_layers=2, heal="linear", tokenizer=tokenizer, windows=Windows(seq_len=16), progress=False
    )
    for name in ("layers", "perplexity", "heal"):
        assert getattr(found.plan, name) == getattr(expected, name)


@pytest.mark.slow
def test_prune_refuses_before_the_search_what_cannot_be_healed(checkpoint, text, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "_steps", lambda *_: pytest.fail("searched"))
    with monkeypatch.context() as patch:
        patch.setattr(heal_fit, "OUTPUT_WEIGHTS", ("mlp.other",))
        for options in ({"heal": "linear"}, {"method": "greedy_healed"}):
            with pytest.raises(ValueError, match="healing is not possible for model_type 'llama'"):
                in_process(checkpoint, text, tmp_path / "out", num_layers=1, **options)
    for options in ({"num_layers": 1}, {"drop": [1]}):
        with pytest.raises(ValueError, match="1 sequence of calibration data is too little"):
            in_process(checkpoint, text, tmp_path / "out", windows=Windows(32, 16), **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.nan, 1e6])
def test_prune_refuses_figures_that_are_none(value, checkpoint, text, tmp_path):
    broken = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        broken.lm_head.weight.mul_(value)
    broken.save_pretrained(tmp_path / "broken")
    tf.AutoTokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "broken")
    for given in ({"drop": [1]}, {"num_layers": 1}):
        with pytest.raises(ValueError, match=r"its perplexity on the held-out data is (nan|inf)"):
            in_process(tmp_path / "broken", text, tmp_path / "out", heal=None, **given)
    # And of what was written, whatever the plan says.
    batches = token_batches(text, tokenizer=tf.AutoTokenizer.from_pretrained(checkpoint), windows=Windows(seq_len=16))
    for said in (90.0, math.nan):
        with pytest.raises(ValueError, match="nothing was kept"):
            prune_module._read_again(
                tmp_path / "broken",
                PruningPlan((1,), {}, perplexity={"after": said}),
                batches,
                prune_module.Placement(),
            )


def test_prune_refuses_before_a_weight_is_read(checkpoint, text, tmp_path, monkeypatch):
    monkeypatch.setattr(prune_module.Placement, "load", lambda *_, **__: pytest.fail("loaded"))
    for given, message in (
        ({"num_layers": 0}, "num_layers must be an integer from 1 to 5"),
        ({"num_layers": 6}, "num_layers must be an integer from 1 to 5"),
        ({"drop": [9]}, "layer 9 does not exist in a model of 6"),
        ({"drop": [1], "windows": Windows(seq_len=10_000)}, "seq_len must be at most"),
    ):
        with pytest.raises(ValueError, match=message):
            in_process(checkpoint, text, tmp_path / "out", **given)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        in_process(checkpoint, "none.txt", tmp_path / "out", num_layers=1)


@pytest.mark.slow
def test_prune_refuses(checkpoint, text, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("x")
    given = (checkpoint, "--data", text, "--seq-len", 16)
    assert "exists and is not empty" in run(*given, "--layers", 1, "--out", tmp_path / "full", expect=1)
    assert "exactly one of" in run(*given, "--out", tmp_path / "out", expect=1)
    assert "is not a valid increase" in run(*given, "--max-ppl-increase", "10", "--out", tmp_path / "out", expect=2)
    assert "is not a checkpoint" in run(*given, "--layers", 1, "--force", "--out", tmp_path / "full", expect=1)
    for out in (checkpoint, checkpoint / "inside", checkpoint.parent, text.parent):
        assert "must not be, contain or be inside" in run(*given, "--layers", 1, "--force", "--out", out, expect=1)
    assert "'' is not a list of layers" in run(*given, "--drop", "", "--out", tmp_path / "out", expect=2)
    assert "'a' is not a list of layers" in run(*given, "--drop", "a", "--out", tmp_path / "out", expect=2)
    assert "does not exist in a model of 6" in run(*given, "--drop", "9", "--out", tmp_path / "out", expect=1)
    assert "is not a valid increase" in run(*given, "--max-ppl-increase", "x", "--out", tmp_path / "out", expect=2)
    assert "there is no file" in run(checkpoint, "--data", "none.txt", "--layers", 1, "--out", "o", expect=1)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


# --- in memory ------------------------------------------------------------------------------------------------------


DATA = [tiny.tokens(4, 12, seed=seed) for seed in range(4)]


@pytest.mark.slow
def test_in_memory():
    """The model is healed and cut in place, as `plan_pruning`, `heal` and `drop_layers` do it one by one."""
    full = model()
    by_hand = copy.deepcopy(full)
    found = hf_lnscale.prune(full, DATA, num_layers=2, progress=False)
    assert found.model is full
    assert found.path is None
    plan = plan_pruning(by_hand, DATA, num_layers=2, heal="refit", progress=False)
    assert found.plan == plan
    if "healed" in plan.perplexity:
        hf_lnscale.heal(by_hand, plan.layers, token_batches(DATA).split(0.25)[0], progress=False)
    drop_layers(by_hand, plan.layers)
    assert torch.equal(full(tiny.tokens()).logits, by_hand(tiny.tokens()).logits)
    assert [row[0] for row in found.rows][:4] == ["layers", "parameters", "weights", "perplexity, held out"]
    assert found.rows[0] == ("layers", "6", "4", "-33.3%")
    assert "without layers" in str(found)
    losses = [full(ids, labels=ids, use_cache=False).loss.item() for ids in DATA[3:]]
    said = plan.perplexity.get("healed", plan.perplexity["after"])
    assert math.exp(losses[0]) == pytest.approx(said, rel=1e-5)


@pytest.mark.slow
def test_in_memory_by_size_and_by_name():
    total = sum(p.numel() for p in model().parameters())
    layer = sum(p.numel() for p in model().model.layers[0].parameters())
    found = hf_lnscale.prune(model(), DATA, target_params=total - 2 * layer, heal=None, progress=False)
    assert found.model.num_parameters() == total - 2 * layer
    found = hf_lnscale.prune(model(), DATA, drop=[-1, 2], heal=None, progress=False)
    assert found.plan.layers == (2, 5)
    for drop in (np.array([-1, 2]), torch.tensor([2, 5])):
        assert hf_lnscale.prune(model(), DATA, drop=drop, heal=None, progress=False).plan.layers == (2, 5)
    assert found.plan.method == {"search": "given"}
    assert found.plan.data["calibration"] is None


@pytest.mark.slow
def test_in_memory_onto_disk(checkpoint, text, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint)
    found = in_process_of(loaded, text, tmp_path / "out", drop=[1, 4])
    assert found.path == (tmp_path / "out").resolve()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again(tiny.tokens()).logits, loaded(tiny.tokens()).logits)
    assert PruningPlan.load(tmp_path / "out") == found.plan
    assert tf.AutoTokenizer.from_pretrained(tmp_path / "out")("w5").input_ids == [5]
    assert "| perplexity, held out |" in (tmp_path / "out/README.md").read_text()
    nameless = model()
    with pytest.raises(ValueError, match="tokenizer: required for out"):
        hf_lnscale.prune(nameless, DATA, num_layers=1, out=tmp_path / "other")


def test_lengths_to_measure_speed_with_are_checked_first(checkpoint, text, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_lnscale.pruning.prune.search_layers", lambda *_, **__: pytest.fail("searched"))
    for name in ("prompt_tokens", "new_tokens"):
        with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, got 0"):
            in_process_of(checkpoint, text, tmp_path / "out", drop=[1], **{name: 0})


def in_process_of(loaded, text, out, **options):
    return hf_lnscale.prune(loaded, str(text), out=out, windows=Windows(seq_len=16), progress=False, **options)


def test_what_cannot_be_dropped_is_refused_before_the_search(monkeypatch):
    monkeypatch.setattr(search, "_steps", lambda *_: pytest.fail("searched"))
    adapted = get_peft_model(model(), LoraConfig(r=2, target_modules=["q_proj"]))
    held = model()
    optimizer = torch.optim.SGD(held.parameters())
    for full, given, message in (
        (adapted, {"num_layers": 1}, "has a PEFT adapter"),
        (adapted, {"target_params": 10}, "has a PEFT adapter"),
        (held, {"num_layers": 1}, "an optimizer .SGD. holds parameters"),
        (model(), {"num_layers": 6}, "num_layers must be an integer from 1 to 5 for this model, got 6"),
        (model(), {"drop": [9]}, "drop: layer 9 does not exist in a model of 6 layers"),
        (model(), {"num_layers": 1, "drop": [1]}, "exactly one of .* must be given, got num_layers=1, drop=.1."),
        (tiny.model(num_hidden_layers=1), {"num_layers": 1}, "model: it has only one layer"),
        (model(), {"target_params": 10}, "target_params must be at least"),
    ):
        with pytest.raises(ValueError, match=message):
            hf_lnscale.prune(full, DATA, progress=False, **given)
    del optimizer


def test_a_cut_that_fails_leaves_the_weights_as_they_were(monkeypatch):
    full = tiny.speaker(num_hidden_layers=L)
    before = copy.deepcopy(full.state_dict())

    def fail(*_, **kinds):
        assert any(not torch.equal(before[name], value) for name, value in full.state_dict().items())
        raise MemoryError

    monkeypatch.setattr(prune_module, "drop_layers", fail)
    said = tiny.said_by(full)  # the model's own text, on which every layer matters and healing helps
    with pytest.raises(MemoryError):
        hf_lnscale.prune(full, said, drop=[4], progress=False)
    assert all(torch.equal(before[name], value) for name, value in full.state_dict().items())
