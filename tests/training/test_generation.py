"""Healing on what the whole model writes itself: that it is the whole model, what is learned, and that it stays."""

import itertools
import json
import signal
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import recipe
from hf_lnscale.checkpoints.hub import push
from hf_lnscale.training.arguments import DataArguments, RecipeConfig
from hf_lnscale.training.chats import prepare_chat
from hf_lnscale.training.generation import BATCH, write_self_data
from hf_lnscale.training.recipe_data import load_text_or_chats
from hf_lnscale.training.trainer import RecipeTrainer
from recipe import SMALL

pytestmark = [pytest.mark.xdist_group("recipes"), pytest.mark.usefixtures("quick_recipes")]

LENGTH = 64


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("self")
    recipe.save_model(folder / "quiet")
    for name, loud in (("model", 30), ("brief", 15)):
        model = AutoModelForCausalLM.from_pretrained(folder / "quiet")
        with torch.no_grad():
            head_VD = model.get_output_embeddings().weight
            head_VD.mul_(loud)  # far from uniform: another model writes something else
            if name == "brief":  # ends at times
                head_VD[model.config.eos_token_id] = 0
        model.save_pretrained(folder / name)
        recipe.tokenizer().save_pretrained(folder / name)
    recipe.write_rows(folder / "text.jsonl", recipe.text_rows())
    recipe.write_rows(folder / "chat.jsonl", CHATS)
    return folder


def turn(role, content):
    return {"role": role, "content": content}


CHATS = [
    *recipe.CHAT[:12],
    # A chat with two answers, and one that fills the window
    {"messages": [turn("user", "1?"), turn("assistant", "First."), turn("user", "Two?"), turn("assistant", "Second.")]},
    {"messages": [turn("user", "long " * 200), turn("assistant", "Third.")]},
]


def words(here, out, *more):
    data = ["--model_name_or_path", here / "model", "--dataset_name", here / "text.jsonl", *SMALL]
    return [*data, "--depth_stats_steps", 0, "--drop_layers", 1, "--self_data", BATCH + 4, *more, "--output_dir", out]


def written(model, prompts, length, seed):
    """Sampled token by token, without a cache and without padding."""
    torch.manual_seed(seed)
    rows, done = [list(prompt) for prompt in prompts], [False] * len(prompts)
    end = model.config.eos_token_id
    for _ in range(length - min(map(len, prompts))):
        with torch.no_grad():
            logits_BV = torch.stack([model(torch.tensor([row])).logits[0, -1] for row in rows])
        for row, token in enumerate(torch.multinomial(logits_BV.softmax(-1), 1)[:, 0].tolist()):
            if not done[row]:
                rows[row].append(token)
                done[row] = token == end
    return [row[len(prompt) : length] for row, prompt in zip(rows, prompts, strict=True)]


def made(here, out, name, rows=BATCH + 4, model="model", **settings):
    settings = {"max_length": LENGTH, "report_to": "none", "seed": 5} | settings
    training = RecipeConfig(output_dir=str(out), **settings)
    tokenizer = AutoTokenizer.from_pretrained(here / model)
    arguments = DataArguments(dataset_name=str(here / f"{name}.jsonl"), eval_dataset_name=str(here / f"{name}.jsonl"))
    train, held_out = load_text_or_chats(arguments, "text", 5)
    prepare_chat(training, tokenizer, train)
    load = partial(AutoModelForCausalLM.from_pretrained, here / model)
    data = write_self_data(training, tokenizer, load, train, rows)
    common = {"args": training, "train_dataset": data, "eval_dataset": held_out, "processing_class": tokenizer}
    return RecipeTrainer(model=load(drop_layers=[1]), **common), tokenizer, list(itertools.islice(train, rows))


@pytest.mark.slow
def test_the_whole_model_continues_the_texts(tmp_path, here):
    trainer, tokenizer, given = made(here, tmp_path / "out", "text")
    whole, cut = (
        AutoModelForCausalLM.from_pretrained(here / "model", drop_layers=layers).eval() for layers in (None, [1])
    )
    prompts = [tokenizer(row["text"])["input_ids"][: LENGTH // 8] for row in given]
    expected, others = [], []
    for first in range(0, len(prompts), BATCH):
        expected += written(whole, prompts[first : first + BATCH], LENGTH, 5 + first)
        others += written(cut, prompts[first : first + BATCH], LENGTH, 5 + first)
    rows = list(trainer.train_dataset)
    assert [row["input_ids"] for row in rows] == [a + b for a, b in zip(prompts, expected, strict=True)]
    assert expected != others
    assert any(len(ids) < LENGTH - LENGTH // 8 for ids in expected)  # one that ended by itself, in a batch that went on
    for row, prompt in zip(rows, prompts, strict=True):
        assert row["labels"] == [-100] * len(prompt) + row["input_ids"][len(prompt) :]


@pytest.mark.slow
def test_the_answers_of_chats_are_the_whole_model_s_and_they_alone_are_learned(tmp_path, here, capsys):
    count, length = len(CHATS), 320
    settings = {"model": "brief", "chat_template_path": "chatml", "max_length": length}
    trainer, tokenizer, given = made(here, tmp_path / "out", "chat", count, **settings)
    said = capsys.readouterr().out
    assert "1 of 14 prompts are empty or fill max_length=320, and are skipped" in said
    whole = AutoModelForCausalLM.from_pretrained(here / "brief").eval()
    chats = [row["messages"] for row in given if "long" not in row["messages"][0]["content"]]
    assert len(chats) == count - 1 <= BATCH
    prompts = [
        tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        for chat in chats
    ]
    expected = list(zip(chats, prompts, written(whole, prompts, length, 5), strict=True))
    ended = [one for one in expected if one[2][-1] == tokenizer.eos_token_id]
    assert 1 < len(ended) < len(chats)
    assert f"{len(chats) - len(ended)} of 13 answers do not end within max_length=320, and are skipped" in said
    for row, (chat, prompt, answer) in zip(trainer.train_dataset, ended, strict=True):
        learned = [label for label in row["labels"] if label != -100]
        text = tokenizer.decode(answer, skip_special_tokens=True) + tokenizer.eos_token
        assert learned == tokenizer(text)["input_ids"][: length - len(prompt)]
        assert row["input_ids"] == prompt + learned + row["input_ids"][len(prompt) + len(learned) :]
        assert row["labels"][: len(prompt)] == [-100] * len(prompt)
        assert chat[-1]["content"] not in tokenizer.decode(row["input_ids"])
    (asked,) = (prompt for chat, prompt in zip(chats, prompts, strict=True) if len(chat) == 4)
    assert "First." in tokenizer.decode(asked)  # an earlier answer is part of the question


@pytest.mark.slow
def test_a_run_that_is_resumed_writes_nothing_anew(tmp_path, here, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert recipe.run("heal", *words(here, whole)) == 0
    with monkeypatch.context() as patch:
        recipe.signal_after(3, signal.SIGTERM, patch)
        assert recipe.run("heal", *words(here, out)) == 143
    with monkeypatch.context() as patch:
        patch.setattr("hf_lnscale.training.generation.continue_prompts", None)
        assert recipe.run("heal", *words(here, out, "--resume_from_checkpoint", "true")) == 0
    recipe.same_weights(whole, out)
    assert not any("self_data" in name for name in push(out, "me/healed", allow_scaled=True, dry_run=True).files)
    found = recipe.metrics(out)
    assert found["train_rows"] == BATCH + 4
    assert {"gap", "gap_before", "gap_other", "gap_other_before"} <= found.keys()
    said = "trained on text that the full model generated after prompts from text.jsonl"
    assert said in (out / "README.md").read_text()


@pytest.mark.slow
def test_a_run_that_was_killed_while_the_model_wrote_goes_on_there(tmp_path, here, monkeypatch, capsys):
    import hf_lnscale.training.generation as module

    original, seeds = module.continue_prompts, []

    def killed_after_a_batch(*args):
        if seeds:
            raise KeyboardInterrupt
        seeds.append(args[-1])
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "continue_prompts", killed_after_a_batch)
        with pytest.raises(KeyboardInterrupt):
            recipe.run("heal", *words(here, tmp_path / "out"))
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "self_data").iterdir()}
    assert len(kept) == 1
    assert recipe.run("heal", *words(here, tmp_path / "out")) == 1  # as for every run that is there
    assert "already contains this run; continue it with --resume" in capsys.readouterr().err
    assert recipe.run("heal", *words(here, tmp_path / "out", "--resume_from_checkpoint", "true")) == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert recipe.run("heal", *words(here, tmp_path / "whole")) == 0
    files = [
        {path.name: json.loads(path.read_text()) for path in (tmp_path / name / "self_data").iterdir()}
        for name in ("out", "whole")
    ]
    assert files[0] == files[1]
    recipe.same_weights(tmp_path / "out", tmp_path / "whole")


@pytest.mark.slow
def test_healing_on_chats(tmp_path, here):
    more = ("--dataset_name", here / "chat.jsonl", "--chat_template_path", "chatml", "--max_length", 320)
    more += ("--model_name_or_path", here / "brief")
    assert recipe.run("heal", *words(here, tmp_path / "out", *more)) == 0
    found = recipe.metrics(tmp_path / "out")
    assert {"gap", "gap_before", "gap_other", "gap_other_before"} <= found.keys()
    assert found["train_rows"] < 13
    assert "`packing`" not in (tmp_path / "out" / "README.md").read_text()  # False is left out


def test_what_was_written_for_other_prompts_is_written_anew(tmp_path, here):
    found = []
    for name in ("text", "other"):
        rows = recipe.text_rows() if name == "text" else recipe.text_rows()[::-1]
        recipe.write_rows(here / "changed.jsonl", rows)
        trainer, _, _ = made(here, tmp_path / "out", "changed", 3, max_length=32)
        found.append([row["input_ids"] for row in trainer.train_dataset])
    trainer, _, _ = made(here, tmp_path / "new", "changed", 3, max_length=32)
    assert found[1] == [row["input_ids"] for row in trainer.train_dataset] != found[0]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--self_data", -1), "self_data must be an integer >= 0, got -1"),
        (("--whole", "none"), "self_data: name the unpruned model that generates the data, with --whole"),
        (
            ("--dataset_name", "{}/chat.jsonl", "--chat_template_path", "chatml", "--max_length", 8),
            "self_data: 13 of 13 prompts are empty",
        ),
        (
            ("--dataset_name", "{}/chat.jsonl", "--chat_template_path", "{}/model"),
            "self_data: chat_template_path must be chatml or a .jinja file here",
        ),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, here, capsys, more, said):
    assert recipe.run("heal", *words(here, tmp_path / "out", *(str(word).format(here) for word in more))) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()  # so that other arguments can be tried
