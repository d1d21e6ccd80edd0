"""A healing run is told against the whole model: as it is, and trained equally."""

import json
import shutil

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

import recipe
from hf_lnscale.measuring.sample import default_sources
from recipe import SMALL

pytestmark = [pytest.mark.xdist_group("recipes"), pytest.mark.usefixtures("quick_recipes")]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("control")
    recipe.save_model(folder / "model", attention_dropout=0.0)
    rows = recipe.text_rows()
    recipe.write_rows(folder / "text.jsonl", rows[:30])
    recipe.write_rows(folder / "held_out.jsonl", rows[30:34])
    return folder


def words(here, out, *more):
    data = ["--model_name_or_path", here / "model", "--dataset_name", here / "text.jsonl"]
    data += ["--eval_dataset_name", here / "held_out.jsonl", *SMALL, "--depth_stats_steps", 0]
    return [*data, "--bf16", "false", *more, "--output_dir", out]


def losses(folder, texts, **kwargs):
    """Cross entropy in float64: the sum of each window of 32 tokens of the texts, and its number of tokens."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, **kwargs).double(),
        AutoTokenizer.from_pretrained(folder),
    )
    ids = torch.tensor([token for text in texts for token in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)])
    sums, tokens = [], []
    with torch.no_grad():
        for window in ids.split(32):
            if len(window) > 1:
                logits = model(window[None]).logits[0, :-1]
                sums.append(functional.cross_entropy(logits, window[1:], reduction="sum").item())
                tokens.append(len(window) - 1)
    return torch.tensor(sums), torch.tensor(tokens)


def gap(one, other):
    """The difference of the means, and the standard error of a ratio's (Cochran), row by row."""
    tokens, difference = one[1], one[0] - other[0]
    mean = (difference.sum() / tokens.sum()).item()
    residuals = (difference - mean * tokens) / tokens.sum()
    return mean, (len(tokens) / (len(tokens) - 1) * residuals.square().sum()).sqrt().item()


@pytest.mark.slow
def test_the_gap_to_the_whole_model_before_and_after(tmp_path, here):
    assert recipe.run("heal", *words(here, tmp_path / "out", "--drop_layers", 1)) == 0
    found = recipe.metrics(tmp_path / "out")
    held_out = [json.loads(line)["text"] for line in (here / "held_out.jsonl").read_text().splitlines()]
    for suffix, texts in ("", held_out), ("_other", default_sources()["english"][:4]):
        whole, before = losses(here / "model", texts), losses(here / "model", texts, drop_layers=[1])
        after = losses(tmp_path / "out", texts)
        assert found[f"whole{suffix}_loss"] == pytest.approx((whole[0].sum() / whole[1].sum()).item(), abs=1e-5)
        for name, one in (f"gap{suffix}_before", before), (f"gap{suffix}", after):
            mean, error = gap(one, whole)
            assert found[name] == pytest.approx(mean, abs=1e-5)
            assert found[f"{name}_stderr"] == pytest.approx(error, rel=1e-3)
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    times = [entry[key] for key in ("eval_runtime", "eval_other_runtime") for entry in log if key in entry]
    assert len(times) == 4  # before the first step, and after the training
    training = found["wall_seconds"] - times[0] - times[2]
    assert found["tokens_per_second"] == pytest.approx(found["tokens_seen"] / training)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Gaps are nats per token above model" in card
    assert "gap other before" in card


@pytest.mark.slow
def test_a_control_is_trained_as_that_model_would_be_alone(tmp_path, here):
    assert recipe.run("continue_pretrain", *words(here, tmp_path / "alone", "--learning_rate", 1e-3)) == 0
    more = ("--learning_rate", 1e-3, "--drop_layers", 1, "--control")
    assert recipe.run("heal", *words(here, tmp_path / "out", *more)) == 0
    found = recipe.metrics(tmp_path / "out")
    assert found["whole_loss"] == pytest.approx(recipe.metrics(tmp_path / "alone")["eval_loss"], abs=1e-5)
    assert found["whole_model"] == "model, trained equally"


@pytest.mark.slow
def test_a_resumed_run_is_compared_with_the_same(tmp_path, here, monkeypatch, capsys):
    out, more = tmp_path / "out", ("--drop_layers", 1, "--control", "--save_steps", 3)
    assert recipe.run("heal", *words(here, out, *more)) == 0
    once, known = recipe.metrics(out), (out / "control.json").read_text()
    # As if it had been killed at step 4.
    shutil.rmtree(out / "checkpoint-6")
    for name in ("metrics.json", "model.safetensors"):
        (out / name).unlink()
    more += ("--resume_from_checkpoint", "true")
    monkeypatch.setattr("hf_lnscale.training.control.RecipeTrainer", None)  # nothing is trained or evaluated again
    assert recipe.run("heal", *words(here, out, *more, "--max_steps", 7)) == 1
    assert "control: the unpruned model was trained for [6, 1.0] instead of [7" in capsys.readouterr().err
    assert recipe.run("heal", *words(here, out, *more)) == 0
    assert (out / "control.json").read_text() == known
    found = recipe.metrics(out)
    for name in ("gap", "gap_stderr", "gap_before", "gap_other", "gap_other_before", "whole_loss", "whole_other_loss"):
        assert found[name] == pytest.approx(once[name], abs=1e-6)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--drop_layers", 1, "--control", "--teacher", "{}"), "control: cannot be combined with a teacher"),
        (
            ("--drop_layers", 1, "--control", "--whole", "none"),
            "control: name the unpruned model to train",
        ),
        (("--drop_layers", 1, "--whole", "./nowhere"), "whole: there is no folder './nowhere'"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_written(tmp_path, here, capsys, more, said):
    more = [str(one).format(here / "model") for one in more]
    assert recipe.run("heal", *words(here, tmp_path / "out", *more)) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_no_gap_is_told_where_the_whole_model_is_not_known(tmp_path, here):
    more = ("--drop_layers", 1, "--whole", "none", "--max_steps", 1)
    assert recipe.run("heal", *words(here, tmp_path / "out", *more)) == 0
    assert not {"gap", "whole_model", "eval_other_loss"} & recipe.metrics(tmp_path / "out").keys()
    assert not (tmp_path / "out" / "control.json").exists()
