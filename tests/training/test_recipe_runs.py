"""The life of a run: how it ends, what it leaves, and that a finished one is left alone."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import recipe
from hf_lnscale.commands.train import start
from hf_lnscale.core.record import add_known_text, known_text
from hf_lnscale.measuring.known_text import caution, share_known, sketch
from hf_lnscale.measuring.text import Windows, token_batches
from hf_lnscale.training.scripts import import_recipe
from recipe import SMALL

pytestmark = [pytest.mark.xdist_group("recipes"), pytest.mark.usefixtures("quick_recipes")]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    recipe.save_model(folder / "model", attention_dropout=0.0)
    recipe.write_rows(folder / "text.jsonl", recipe.text_rows())
    recipe.write_rows(folder / "chat.jsonl", recipe.CHAT)
    return folder


def words(here, out, *more):
    data = ["--model_name_or_path", here / "model", "--dataset_name", here / "text.jsonl"]
    return [*data, *SMALL, "--depth_stats_steps", 0, *more, "--output_dir", out]


def state(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_finished_run_is_not_trained_further(tmp_path, here, capsys):
    out, resume = tmp_path / "out", ["--resume_from_checkpoint", "true"]
    assert recipe.run("continue_pretrain", *words(here, out, *resume)) == 0
    before = state(out)
    capsys.readouterr()
    assert recipe.run("continue_pretrain", *words(here, out, *resume)) == 0
    assert (
        f"the run in {out} is finished, after step 6; to train longer, increase --max_steps" in capsys.readouterr().out
    )
    assert state(out) == before
    # Longer, it goes on.
    assert recipe.run("continue_pretrain", *words(here, out, *resume, "--max_steps", 8)) == 0
    assert recipe.metrics(out)["steps"] == 8


@pytest.mark.slow
def test_evaluating_on_text_that_the_model_was_chosen_on_is_told(tmp_path, here):
    model, tokenizer = (one.from_pretrained(here / "model") for one in (AutoModelForCausalLM, AutoTokenizer))
    seen = token_batches(here / "text.jsonl", tokenizer=tokenizer, windows=Windows(None, 64))
    add_known_text(model.config, sketch(seen))
    for one in (model, tokenizer):
        one.save_pretrained(tmp_path / "model")
    more = ("--model_name_or_path", tmp_path / "model", "--max_length", 64, "--max_steps", 1)
    with pytest.warns(UserWarning, match=r"evaluation data: About 1?\d\d? % .* heal the model's layers \(text.jsonl\)"):
        assert recipe.run("continue_pretrain", *words(here, tmp_path / "out", *more)) == 0


@pytest.mark.slow
def test_a_healed_model_knows_the_text_that_it_was_healed_on(tmp_path, here):
    more = ("--drop_layers", 1, "--packing", "false")
    with pytest.warns(UserWarning, match="name the unpruned model with --teacher"):
        assert recipe.run("heal", *words(here, tmp_path / "out", *more)) == 0
    model, tokenizer = (one.from_pretrained(tmp_path / "out") for one in (AutoModelForCausalLM, AutoTokenizer))
    rows = [torch.tensor(tokenizer(row["text"]).input_ids[:32]) for row in recipe.text_rows()]  # --max_length
    held_out = recipe.metrics(tmp_path / "out")["eval_rows"]
    assert "heal the model's layers (text.jsonl)" in caution(model.config, rows)
    text = known_text(model.config)
    share = share_known(text, rows)
    assert 1 - 3 * held_out / len(rows) < share <= 1  # the rows held out are not known
    recipe.run("continue_pretrain", *words(here, tmp_path / "trained"))
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    assert known_text(trained.config) is None


@pytest.mark.slow
def test_a_run_of_epochs_that_is_finished(tmp_path, here, capsys):
    out = tmp_path / "out"
    more = ["--max_steps", -1, "--per_device_train_batch_size", 64, "--resume_from_checkpoint", "true"]
    assert recipe.run("continue_pretrain", *words(here, out, *more)) == 0
    steps, before = recipe.metrics(out)["steps"], state(out)
    assert recipe.run("continue_pretrain", *words(here, out, *more)) == 0
    assert "is finished" in capsys.readouterr().out
    assert state(out) == before
    assert recipe.run("continue_pretrain", *words(here, out, *more, "--num_train_epochs", 2)) == 0
    assert recipe.metrics(out)["steps"] == 2 * steps


@pytest.mark.slow
def test_a_run_that_was_killed_after_its_last_step_trains_no_more(tmp_path, here):
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert recipe.run("continue_pretrain", *words(here, whole)) == 0
    assert recipe.run("continue_pretrain", *words(here, out)) == 0
    for name in ("metrics.json", "model.safetensors", "README.md", "trainer_state.json"):
        (out / name).unlink()
    assert recipe.run("continue_pretrain", *words(here, out, "--resume_from_checkpoint", "true")) == 0
    recipe.same_weights(whole, out)
    one, two = recipe.metrics(whole), recipe.metrics(out)
    for name in ("steps", "eval_loss", "tokens_seen"):
        assert two[name] == one[name], name
    assert recipe.losses(out) == recipe.losses(whole)


@pytest.mark.slow
def test_early_stopping_keeps_the_best_checkpoint(tmp_path, here):
    """At a rate that ruins the model, the best is the one before."""
    out = tmp_path / "out"
    more = ["--learning_rate", 0.5, "--max_steps", 40, "--eval_strategy", "steps", "--eval_steps", 1]
    more += ["--early_stopping_patience", 2, "--lr_scheduler_type", "constant", "--lr_scheduler_kwargs", "{}"]
    assert recipe.run("continue_pretrain", *words(here, out, *more)) == 0
    found = recipe.metrics(out)
    losses = recipe.history(out, "eval_loss")
    assert found["steps"] < 40
    assert found["eval_loss"] == losses[-1] == min(losses[1:])  # the first is that before any step
    best = found["best_step"]
    assert losses[best] == min(losses[1:])
    assert found["steps"] == best + 2
    recipe.same_weights(out, out / f"checkpoint-{best}")
    assert "early_stopping_patience" in (out / "README.md").read_text()


def test_early_stopping_needs_evaluations(tmp_path, here, capsys):
    assert recipe.run("continue_pretrain", *words(here, tmp_path / "out", "--early_stopping_patience", 2)) == 1
    assert "early_stopping_patience requires --eval_strategy" in capsys.readouterr().err


@pytest.mark.slow
def test_samples_are_what_the_model_writes(tmp_path, here):
    out = tmp_path / "out"
    more = ["--dataset_name", here / "chat.jsonl", "--chat_template_path", "chatml", "--max_length", 96]
    more += ["--eval_strategy", "steps", "--eval_steps", 3]
    assert recipe.run("sft", *words(here, out, *more)) == 0
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert sorted({line["step"] for line in lines}) == [0, 3, 6]
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    chats = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in recipe.CHAT}
    for line in lines[-2:]:
        question = line["prompt"].split("<|im_start|>user\n")[1].split("<|im_end|>")[0]
        assert line["reference"] == chats[question] + tokenizer.eos_token
        asked = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        assert line["prompt"] == tokenizer.decode(ids[0])
        for _ in range(64):  # greedily, token by token
            with torch.no_grad():
                ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1)[:, None]], dim=1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
        assert line["prompt"] + line["generated"] == tokenizer.decode(ids[0])


@pytest.mark.slow
def test_the_card_of_an_adapter_with_its_values(tmp_path, here):
    """Values that the run settled on; nothing that does not take an adapter."""
    out = tmp_path / "out"
    recipe.save_model(tmp_path / "scaled", ln_scaling=True)
    more = ["--dataset_name", here / "chat.jsonl", "--chat_template_path", "chatml", "--use_peft", "--max_length", 96]
    more += ["--model_name_or_path", tmp_path / "scaled", "--warmup_steps", 0.5, "--num_samples", 0]
    assert recipe.run("sft", *words(here, out, *more)) == 0
    card = (out / "README.md").read_text()
    rows = dict(line.strip("| ").split("` | `") for line in card.splitlines() if line.startswith("| `"))
    values = {key.strip("`"): value.strip("`") for key, value in rows.items()}
    assert values["assistant_only_loss"] == "True"
    assert values["warmup_steps"] == "3"
    assert "eos_token" not in values  # not given
    assert values["max_steps"] == "6"
    assert values["lora_target_modules"] == "['q_proj', 'v_proj']"
    assert "| train rows | 36 |\n| eval rows | 4 |" in card
    assert (recipe.metrics(out)["train_rows"], recipe.metrics(out)["eval_rows"]) == (36, 4)
    assert "or write a plain checkpoint" not in card
    assert "AutoPeftModelForCausalLM" in card
    assert not (out / "samples.jsonl").exists()


@pytest.mark.slow
def test_the_card_of_a_model_without_sublayers(tmp_path, here):
    recipe.save_model(tmp_path / "cut", drop_attention=[1], drop_mlp=[2])
    more = ["--model_name_or_path", tmp_path / "cut", "--max_steps", 1]
    assert recipe.run("continue_pretrain", *words(here, tmp_path / "out", *more)) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Attention of layers 1; MLPs of layers 2 (counted from 0) of the original 4 were dropped." in card
    assert "or write a plain checkpoint with `hf-lnscale export --format zeros`" in card


@pytest.mark.slow
def test_the_card_of_a_mixture(tmp_path, here):
    """Names the parts and their shares, and not where they lie."""
    parts = [{"path": str(here / "text.jsonl"), "fraction": 0.9}, {"path": str(here / "old.jsonl"), "fraction": 0.1}]
    recipe.write_rows(here / "old.jsonl", recipe.text_rows(20))
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump({"datasets": parts}))
    common = words(here, tmp_path / "out", "--config", tmp_path / "mix.yaml")
    at = common.index("--dataset_name")
    assert recipe.run("continue_pretrain", *common[:at], *common[at + 2 :]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "It was trained on text.jsonl, old.jsonl." in card
    assert "| `fractions` | `[0.9, 0.1]` |" in card
    assert str(here) not in card


def test_an_error_of_several_lines_is_told_whole_in_one(tmp_path, here, monkeypatch, capsys):
    def fail(*told):
        raise OSError("cannot read it:\n  the disk\n  is full")

    monkeypatch.setattr(import_recipe("continue_pretrain"), "load_tokenizer", fail)
    assert recipe.run("continue_pretrain", *words(here, tmp_path / "out")) == 1
    assert capsys.readouterr().err.endswith("continue_pretrain: cannot read it: the disk is full\n")


@pytest.mark.slow
def test_every_way_to_start_a_recipe(tmp_path, here, capsys):
    """As a script, by `hf-lnscale train`, and from Python."""
    script = recipe.RECIPES / "sft.py"
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert f"python {script} [--config NAME_OR_FILE]" in done.stdout
    for name in ("--chat_template_path", "--datasets", "--early_stopping_patience", "--learning_rate"):
        assert name in done.stdout
    start("continue", [str(word) for word in words(here, tmp_path / "verb", "--max_steps", 1)])
    told = json.loads((tmp_path / "verb" / "run.json").read_text())["command"]
    assert told.startswith("hf-lnscale train continue --model_name_or_path ")
    assert "Made by `hf-lnscale train continue --model_name_or_path model" in (tmp_path / "verb/README.md").read_text()


def test_configs_evaluate_during_training():
    for path in recipe.RECIPES.glob("configs/*/*.yaml"):
        if path.stem != "mixture":
            config = yaml.safe_load(path.read_text())
            assert config.get("eval_strategy") == "steps", path
            assert config.get("eval_steps"), path
